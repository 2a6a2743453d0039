"""The bundled demo clip: slow camera moves over two photographs that the demo weights were never trained on.

    python -m vae_core.training.demo_clip vae_core/demo/demo_clip.mp4

Both photographs come with scikit-image: `chelsea` (Stefan van der Walt, CC0) and `rocket` (SpaceX, public domain).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import torch
import torch.nn.functional as F
import typer
from skimage import data as photographs  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]
from torch import Tensor

SIZE = (192, 320)  # height, width
FPS = 24


@dataclass(frozen=True, kw_only=True)
class Move:
    """A camera move over one photograph: centres as fractions of its height and width, zooms in pixels of the
    photograph per pixel of the clip, turns in degrees; each from the first frame to the last.
    """

    photograph: str
    frames: int
    centres: tuple[tuple[float, float], tuple[float, float]]
    zooms: tuple[float, float]
    turns: tuple[float, float]


# the cut falls between two groups of four frames: 1 + 24 and 24
MOVES = (
    Move(photograph="chelsea", frames=25, centres=((0.44, 0.46), (0.44, 0.54)), zooms=(1.30, 1.12), turns=(0, 0)),
    Move(photograph="rocket", frames=24, centres=((0.60, 0.47), (0.42, 0.52)), zooms=(1.45, 1.45), turns=(-2, 1)),
)


def film(move: Move) -> Tensor:
    """The frames of one move, (t, 3, h, w) in [0, 1], each cut from the photograph at fractions of a pixel."""
    picture = torch.from_numpy(getattr(photographs, move.photograph)().copy()).permute(2, 0, 1).float() / 255
    height, width = picture.shape[1:]
    frames: list[Tensor] = []
    for step in torch.linspace(0, 1, move.frames).tolist():
        (y0, x0), (y1, x1) = move.centres
        zoom = math.exp(math.log(move.zooms[0]) * (1 - step) + math.log(move.zooms[1]) * step)
        turn = math.radians(move.turns[0] * (1 - step) + move.turns[1] * step)
        ys, xs = torch.meshgrid(
            (torch.arange(SIZE[0]) - (SIZE[0] - 1) / 2) * zoom,
            (torch.arange(SIZE[1]) - (SIZE[1] - 1) / 2) * zoom,
            indexing="ij",
        )
        columns = (x0 + (x1 - x0) * step) * width + xs * math.cos(turn) - ys * math.sin(turn)
        rows = (y0 + (y1 - y0) * step) * height + xs * math.sin(turn) + ys * math.cos(turn)
        grid = torch.stack((2 * columns / width - 1, 2 * rows / height - 1), dim=-1)[None]
        frames.append(F.grid_sample(picture[None], grid, "bicubic", "reflection", align_corners=False)[0])
    return torch.stack(frames).clamp(0, 1)


def main(path: Path) -> None:
    """Write the clip as H.264."""
    frames = torch.cat([film(move) for move in MOVES]).mul(255).round().to(torch.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS), options={"crf": "18", "preset": "slow"})
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        for picture in frames.permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    typer.run(main)
