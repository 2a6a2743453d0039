"""Keyframe detail, by numbers: `python benchmarks/detail_fusion.py CLIP.mp4@FIRST_FRAME ...` prints one table.

The published weights are not needed: a stand-in takes the place of the video decoder, and one the place of the sharp
image decoder. A clip without a path is the bundled one.

video stand-ins: `demo`, the demo CV-VAE's reconstruction; `soft`, the clip blurred by 1.2 pixels.
keyframe stand-ins: `image VAE`, frames 0, 4, 8, ... through the demo IV-VAE as single images; `true`, the clip's own
frames with a little blur and noise; `mean`, the mean of the four frames of each latent, so blurred by motion.

PSNR and SSIM are means over the frames; frames that equal the source count for SSIM alone.
detail is the energy above a blur of 1.5 pixels, as a share of the source's. flicker is the change of the error from
frame to frame, warp how badly each frame follows from the one before by the motion of the source; levels of 0 to 255.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import vae_core  # noqa: E402
from vae_core.detail.fusion import DetailSettings, blur, fuse_detail  # noqa: E402
from vae_core.families import VIDEO  # noqa: E402
from vae_core.media.video import read_frames  # noqa: E402
from vae_core.metrics import FlickerMeter, WarpMeter, frame_quality  # noqa: E402

BUNDLED = ROOT / "vae_core" / "demo" / "demo_clip.mp4"
TIME = VIDEO.time
SIZES = {True: (192, 320), False: (256, 448)}  # of the bundled clip, of others
CASES = (("demo", "image VAE"), ("demo", "true"), ("soft", "true"), ("soft", "mean"))


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    settings = DetailSettings(strength=options.strength, radius=options.radius, confidence=options.confidence)
    print(f"{options.frames} frames of each clip; {settings}\n")
    print("| clip | video | keyframes | result | PSNR, dB | SSIM | detail | flicker | warp |\n" + "|---" * 9 + "|")
    with torch.inference_mode():
        for name in options.clips or [f"{BUNDLED}@0"]:
            source = _read(name, options.frames)
            for video_name, keyframe_name, video, keyframes in _cases(source):
                label = f"| {Path(name).stem.partition('@')[0]} | {video_name} | {keyframe_name} |"
                for result, frames in _results(video, keyframes, settings):
                    print(label, result, _row(frames, source), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="*", help="a video file and, after @, its first frame")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--radius", type=float, default=3.0)
    parser.add_argument("--confidence", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _read(name: str, frames: int) -> Tensor:
    """(1, 3, t, h, w) in [-1, 1], shrunk by area, in steps of 8 bits."""
    path, _, first = name.partition("@")
    size = SIZES[Path(path) == BUNDLED]
    chunks = [F.interpolate(chunk[0].transpose(0, 1), size, mode="area") for chunk in _pieces(path, first, frames)]
    return torch.cat(chunks).transpose(0, 1)[None].add(1).mul(127.5).round().div(127.5).sub(1)


def _pieces(path: str, first: str, frames: int) -> Iterator[Tensor]:
    return read_frames(Path(path), int(first or 0), frames)


def _cases(source: Tensor) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    video_vae, image_vae = vae_core.load("demo-cv-vae"), vae_core.load("demo-iv-vae")
    videos = {
        "demo": video_vae.decode(video_vae.encode(source)).clamp(-1, 1),
        "soft": _blurred(source, 1.2),
    }
    true = source[:, :, ::TIME]
    noise = torch.randn(true.shape, generator=torch.Generator().manual_seed(0))
    means = [source[:, :, k - TIME + 1 : k + 1].mean(2) for k in range(TIME, source.shape[2], TIME)]
    keyframes = {
        "image VAE": torch.cat([image_vae.decode(image_vae.encode(one)) for one in true.split(1, 2)], 2).clamp(-1, 1),
        "true": (_blurred(true, 0.5) + 0.02 * noise).clamp(-1, 1),
        "mean": torch.stack([source[:, :, 0], *means], 2),
    }
    for video, keyframe in CASES:
        yield video, keyframe, videos[video], keyframes[keyframe]


def _results(video: Tensor, keyframes: Tensor, settings: DetailSettings) -> Iterator[tuple[str, Tensor]]:
    yield "video alone", video
    replaced = video.clone()
    replaced[:, :, ::TIME] = keyframes
    yield "keyframes put in", replaced
    yield "keyframe detail", torch.cat([chunk.frames for chunk in fuse_detail([video], [keyframes], settings)], 2)


def _row(frames: Tensor, source: Tensor) -> str:
    psnr, ssim = frame_quality(frames, source)
    flicker, warp = FlickerMeter(), WarpMeter()
    flicker.update(frames, source)
    warp.update(frames, source)
    detail = float(_fine(frames).square().sum() / _fine(source).square().sum())
    quality = f"| {psnr[psnr.isfinite()].mean():.2f} | {ssim.mean():.3f} |"
    return f"{quality} {detail:.2f} | {flicker.flicker:.2f} | {warp.means[0]:.2f} |"


def _blurred(video: Tensor, deviation: float) -> Tensor:
    return torch.stack([blur(frame, deviation) for frame in video[0].unbind(1)], 1)[None]


def _fine(video: Tensor) -> Tensor:
    return video - _blurred(video, 1.5)


if __name__ == "__main__":
    main()
