"""Work, memory traffic and peak memory of our models, counted on tensors without data, beside the targets.

    python benchmarks/profile_meta.py [--size 720x1280] [--models cv cv-sd3 iv-64 iv-96 image]

Per net frame, one that is delivered: CV-VAE makes 16 in a chunk of 17, IV-VAE 4 in a group, an
image VAE each alone. bfloat16, whole frames. The
figures are the same on every machine: no kernel's own copies, no allocator. Targets and the official programs' figures,
counted in the same way, are for 720x1280 and live in `tests/core/meta_profile.py`; tests hold us to the targets.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "core")]

from meta_profile import OFFICIAL, TARGETS, Figures, MetaProfile  # noqa: E402

from vae_core import VideoVAE  # noqa: E402
from vae_core.families import DIRECTIONS, Direction, Family  # noqa: E402
from vae_core.families.cv_vae import CV_VAE, CV_VAE_SD3, CVVAEConfig  # noqa: E402
from vae_core.families.image_vae import IMAGE_VAE, ImageVAEConfig  # noqa: E402
from vae_core.families.iv_vae import IV_VAE, IVVAEConfig  # noqa: E402
from vae_core.plan.footprint import meta_network  # noqa: E402

SPACE = 8  # pixels per latent, of every model here
WIDTHS = (128, 256, 512, 512)
MODELS: dict[str, tuple[Family, Any]] = {
    "cv": (CV_VAE, CVVAEConfig(widths=WIDTHS, blocks_per_level=2, latent_channels=4, sd3=False)),
    "cv-sd3": (CV_VAE_SD3, CVVAEConfig(widths=WIDTHS, blocks_per_level=2, latent_channels=16, sd3=True)),
    "iv-64": (IV_VAE, IVVAEConfig(dim=64, latent_channels=16, scale_factor=1.0, shift_factor=0.0)),
    "iv-96": (IV_VAE, IVVAEConfig(dim=96, latent_channels=16, scale_factor=1.0, shift_factor=0.0)),
    "image": (
        IMAGE_VAE,
        ImageVAEConfig(
            widths=WIDTHS,
            blocks_per_level=2,
            latent_channels=4,
            quantized=(True, True),
            decoder_attention=True,
            norm_eps=1e-6,
            scale_factor=0.18215,
            shift_factor=0.0,
        ),
    ),
}
AT_720P = (720, 1280)


def size_of(text: str) -> tuple[int, int]:
    """(height, width) of "720x1280"."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) % SPACE == int(width) % SPACE == 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give HEIGHTxWIDTH, multiples of {SPACE}")
    return int(height), int(width)


def per_frame(model: str, direction: Direction, size: tuple[int, int]) -> Figures:
    """What a net frame of `size` takes."""
    family, _ = MODELS[model]
    step, overlap = family.frames.step, family.latents.overlap
    if overlap:  # a chunk computes what it repeats of the one before again
        profile = _profile(model, direction, size, family.latents.first)
        return Figures(profile.flops / (step * 1e12), profile.bytes_moved / (step * 1e9), profile.peak_bytes / 2**30)
    two, three = (_profile(model, direction, size, latents) for latents in (2, 3))
    flops, moved = three.flops - two.flops, three.bytes_moved - two.bytes_moved
    return Figures(flops / (step * 1e12), moved / (step * 1e9), three.peak_bytes / 2**30)


def _profile(model: str, direction: Direction, size: tuple[int, int], latents: int) -> MetaProfile:
    family, config = MODELS[model]
    vae = VideoVAE(meta_network(family, config, DIRECTIONS, torch.bfloat16))
    shape = (1, 3, family.compression.pixel_frames(latents), *size)
    if direction == "decode":
        shape = (1, config.latent_channels, latents, *(family.compression.cells(side) for side in size))
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    with MetaProfile() as profile:
        for chunk in vae.decode_stream(x) if direction == "decode" else vae.encode_stream([x]):
            del chunk
    return profile


def _cell(value: float, official: float, target: float) -> str:
    beside = [f"{word} {known:.4g}" for word, known in (("official", official), ("target", target)) if known > 0]
    return f"{value:.2f}" + f" ({', '.join(beside)})" * bool(beside) + " **missed**" * (value > target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=size_of, default=AT_720P, help="HEIGHTxWIDTH in pixels")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    options = parser.parse_args()
    unknown = Figures(math.nan, math.nan, math.nan)
    print(f"torch {torch.__version__}, {options.size[0]}x{options.size[1]}, bfloat16, per net frame\n")
    print("| | TFLOP | GB moved | peak, GiB |\n|---|---|---|---|")
    for model in options.models:
        for direction in DIRECTIONS:
            known = [
                table.get((model, direction), unknown) if options.size == AT_720P else unknown
                for table in (OFFICIAL, TARGETS)
            ]
            ours = per_frame(model, direction, options.size)
            cells = (_cell(*values) for values in zip(ours, *known, strict=True))
            print(f"| {model} {direction} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
