"""How well weights reconstruct clips, against shrinking and enlarging: the figures that the demo weights are held to.

    python -m vae_core.training.figures demo-cv-vae CLIP.mp4 ...

Of each clip the first 17 frames are taken, their centre square shrunk to 256 x 256 by area and rounded to 8 bits. The
baseline is the same frames shrunk 8 times by area and enlarged again by bicubic interpolation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from ..door.loading import load
from ..door.vae import VideoVAE
from ..media.video import read_frames
from ..metrics import frame_quality

FRAMES = 17
SIDE = 256


def centre_square(video: Tensor) -> Tensor:
    """(1, 3, t, h, w) in [-1, 1] to its centre square at 256 x 256, in steps of 8 bits."""
    height, width = video.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = video[0, :, :, top : top + side, left : left + side].transpose(0, 1)  # t c h w
    small = F.interpolate(square, (SIDE, SIDE), mode="area")
    return ((small + 1) * 127.5).round().div(127.5).sub(1).transpose(0, 1)[None]


def shrunk_and_enlarged(video: Tensor) -> Tensor:
    """The baseline: what is left of each frame at an eighth of its size."""
    frames = video[0].transpose(0, 1)
    small = F.interpolate(frames, scale_factor=1 / 8, mode="area")
    return F.interpolate(small, frames.shape[-2:], mode="bicubic", align_corners=False).transpose(0, 1)[None]


def psnr(vae: VideoVAE, video: Tensor) -> tuple[float, float]:
    """PSNR in dB, mean over the frames, of the baseline and of what the posterior mean decodes to."""
    reconstruction = vae.decode(vae.encode(video))
    return (
        float(frame_quality(shrunk_and_enlarged(video), video)[0].mean()),
        float(frame_quality(reconstruction, video)[0].mean()),
    )


def main(
    weights: Annotated[str, typer.Argument(help="A weights file, demo-cv-vae or demo-iv-vae.")],
    clips: Annotated[list[Path], typer.Argument(help="Video files.")],
    threads: Annotated[int, typer.Option()] = 1,
) -> None:
    """Print one line for each clip."""
    torch.set_num_threads(threads)
    vae = load(weights)
    for clip in clips:
        video = centre_square(torch.cat(list(read_frames(clip, frames=FRAMES)), dim=2))
        baseline, value = psnr(vae, video)
        typer.echo(f"{clip.name}: {value:.2f} dB, baseline {baseline:.2f} dB, {value - baseline:+.2f} dB over it")


if __name__ == "__main__":
    typer.run(main)
