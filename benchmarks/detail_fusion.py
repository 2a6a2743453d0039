"""Keyframe detail, by numbers: `python benchmarks/detail_fusion.py [CLIP.mp4@FIRST_FRAME ...]` prints one table.

The published weights are not needed: stand-ins take the place of the video decoder and of the sharp image decoder. All
made scenes of `detail_scenes.py` are measured, then the bundled clip and the clips given, also by the demo VAEs.

videos: `soft`, each frame blurred by 1.2 pixels; `uneven`, by 0.7 to 1.5 pixels, another for each of the four frames of
a latent; `sharp`, the source; `demo`, the demo CV-VAE's reconstruction.
keyframes: `noisy`, the frames 0, 4, 8 ... of the source with a blur of 0.5 pixels and noise of 2.5 levels;
`drawn`, one of the four frames by chance; `mean`, the mean of the four, so blurred by motion; `invented`, with fine
detail that is another in each; `other`, turned upside down; `softer`, blurred by 0.8 pixels; `image VAE`, the frames
through the demo IV-VAE as single images.

Each of PSNR, flicker and pulse is given for the video alone / the video after an unsharp mask / keyframe detail.
PSNR: mean over frames, dB, of at most 60. flicker: change of the error from frame to frame, levels of 255. pulse: by
how much the energy above a blur of 1.5 pixels, as a share of the source's, differs between the four frames of a latent.
added: the share of the picture that got detail, as the node reports it. A case is worse where keyframe detail is below
the video alone by more than 0.005 dB of PSNR, or has more flicker by over 1 % and 0.01 levels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from detail_scenes import KEYFRAMES, PAIRS, SCENES, VIDEOS, each, shown  # noqa: E402

import vae_core  # noqa: E402
from vae_core.detail.fusion import DetailSettings, fuse_detail  # noqa: E402
from vae_core.media.video import read_frames  # noqa: E402
from vae_core.metrics import FlickerMeter  # noqa: E402
from vae_core.metrics.phases import phase_spread  # noqa: E402

BUNDLED = ROOT / "vae_core" / "demo" / "demo_clip.mp4"
SIZES = {True: (192, 320), False: (256, 448)}  # of the bundled clip, of others
DEMO = (("demo", "image VAE"), ("demo", "noisy"))
REAL_PAIRS = (("soft", "noisy"), ("soft", "mean"), ("uneven", "mean"), ("sharp", "softer"))
MOST_PSNR = 60.0
PSNR_SLACK, FLICKER_SLACK, FLICKER_SHARE = 0.005, 0.01, 0.01  # dB, levels, of the flicker alone


@dataclass(frozen=True)
class Figures:
    """Of one clip against its source."""

    psnr: float
    flicker: float
    pulse: float

    def worse_than(self, other: Figures) -> bool:
        return self.psnr < other.psnr - PSNR_SLACK or self.flicker > other.flicker * (1 + FLICKER_SHARE) + FLICKER_SLACK


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    settings = DetailSettings(strength=options.strength, radius=options.radius, confidence=options.confidence)
    print(f"{options.frames} frames of each clip; {settings}\n")
    print("| clip | video | keyframes | PSNR, dB | flicker | pulse, % | added | |\n" + "|---" * 8 + "|")
    count = worse = 0
    with torch.inference_mode():
        for clip, video_name, keyframe_name, source, video, keyframes in _cases(options):
            alone, mask, ours, added = compare(source, video, keyframes, settings)
            count, worse = count + 1, worse + ours.worse_than(alone)
            print(f"| {clip} | {video_name} | {keyframe_name} |", _row(alone, mask, ours, added), flush=True)
    print(f"\n{count} cases, {worse} worse than the video alone")


def compare(
    source: Tensor, video: Tensor, keyframes: Tensor, settings: DetailSettings
) -> tuple[Figures, Figures, Figures, float]:
    """The video alone, after an unsharp mask, with keyframe detail; and the share of the picture that got detail."""
    chunks = list(fuse_detail([video], [keyframes], settings))
    carried = [share for chunk in chunks for share in chunk.carried]
    result = torch.cat([chunk.frames for chunk in chunks], 2)
    unsharp = (video + (video - each(video, [1.2]))).clamp(-1, 1)
    alone, mask, ours = (figures(clip, source) for clip in (video, unsharp, result))
    return alone, mask, ours, sum(carried) / len(carried)


def figures(clip: Tensor, source: Tensor) -> Figures:
    errors = ((clip - source) / 2).square().mean((0, 1, 3, 4))  # of 0..1, frame by frame
    meter = FlickerMeter()
    meter.update(clip, source)
    level = _fine(clip).square().mean((0, 1, 3, 4)) / _fine(source).square().mean((0, 1, 3, 4))
    return Figures(
        float((-10 * errors.log10()).clamp(max=MOST_PSNR).mean()), meter.flicker, 100 * phase_spread(level.tolist())
    )


def _row(alone: Figures, mask: Figures, ours: Figures, added: float) -> str:
    psnr = f"{alone.psnr:.2f} / {mask.psnr:.2f} / {ours.psnr:.2f}"
    flicker = f"{alone.flicker:.2f} / {mask.flicker:.2f} / {ours.flicker:.2f}"
    pulse = f"{alone.pulse:.0f} / {mask.pulse:.0f} / {ours.pulse:.0f}"
    return f"{psnr} | {flicker} | {pulse} | {added:.0%} | {'**worse**' if ours.worse_than(alone) else ''} |"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="*", help="a video file and, after @, its first frame")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--scenes", nargs="*", default=list(SCENES), choices=list(SCENES))
    parser.add_argument("--made-only", action="store_true", help="no real clips, no demo VAEs")
    parser.add_argument("--real-only", action="store_true", help="no made scenes")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--radius", type=float, default=3.0)
    parser.add_argument("--confidence", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _cases(options: argparse.Namespace) -> Iterator[tuple[str, str, str, Tensor, Tensor, Tensor]]:
    for scene in () if options.real_only else options.scenes:
        source = SCENES[scene](options.frames)
        for video, keyframes in PAIRS:
            yield scene, video, keyframes, source, VIDEOS[video](source), KEYFRAMES[keyframes](source)
    if options.made_only:
        return
    for name in [f"{BUNDLED}@0", *options.clips]:
        source, label = _read(name, options.frames), Path(name).stem.partition("@")[0]
        for video, keyframes in REAL_PAIRS:
            yield label, video, keyframes, source, VIDEOS[video](source), KEYFRAMES[keyframes](source)
        decoded, images = _by_demo_vaes(source)
        for video, keyframes in DEMO:
            theirs = images if keyframes == "image VAE" else KEYFRAMES[keyframes](source)
            yield label, video, keyframes, source, decoded, theirs


def _read(name: str, frames: int) -> Tensor:
    """(1, 3, t, h, w) in [-1, 1], shrunk by area, in steps of 8 bits."""
    path, _, first = name.partition("@")
    size = SIZES[Path(path) == BUNDLED]
    chunks = read_frames(Path(path), int(first or 0), frames)
    small = [F.interpolate(chunk[0].transpose(0, 1), size, mode="area") for chunk in chunks]
    return torch.cat(small).transpose(0, 1)[None].add(1).mul(127.5).round().div(127.5).sub(1)


def _by_demo_vaes(source: Tensor) -> tuple[Tensor, Tensor]:
    """The clip through the demo CV-VAE, and the frame of each latent through the demo IV-VAE as a single image."""
    video_vae, image_vae = vae_core.load("demo-cv-vae"), vae_core.load("demo-iv-vae")
    video = video_vae.decode(video_vae.encode(source)).clamp(-1, 1)
    images = [image_vae.decode(image_vae.encode(one)) for one in shown(source).split(1, 2)]
    return video, torch.cat(images, 2).clamp(-1, 1)


def _fine(video: Tensor) -> Tensor:
    return video - each(video, [1.5])


if __name__ == "__main__":
    main()
