"""Work, memory traffic and peak memory of our models, counted on tensors without data, beside the targets.

    python benchmarks/profile_meta.py [--size 720x1280] [--models cv cv-sd3 iv-64 iv-96]

Per net frame, one that is delivered: CV-VAE makes 16 in a chunk of 17, IV-VAE 4 in a group. bfloat16, whole frames. The
figures are the same on every machine: no kernel's own copies, no allocator. Targets and the official programs' figures,
counted in the same way, are for 720x1280 and live in `tests/core/meta_profile.py`; tests hold us to the targets.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "core")]

from meta_profile import OFFICIAL, TARGETS, Figures, MetaProfile  # noqa: E402

from vae_core import VideoVAE  # noqa: E402
from vae_core.cv_vae import CVVAEConfig  # noqa: E402
from vae_core.iv_vae import IVVAEConfig  # noqa: E402
from vae_core.keys import Config  # noqa: E402
from vae_core.prediction import meta_model  # noqa: E402
from vae_core.windows import SPACE, pixel_frames  # noqa: E402

MODELS: dict[str, Config] = {
    "cv": CVVAEConfig(widths=(128, 256, 512, 512), blocks_per_level=2, latent_channels=4, sd3=False),
    "cv-sd3": CVVAEConfig(widths=(128, 256, 512, 512), blocks_per_level=2, latent_channels=16, sd3=True),
    "iv-64": IVVAEConfig(dim=64, latent_channels=16, scale_factor=1.0, shift_factor=0.0),
    "iv-96": IVVAEConfig(dim=96, latent_channels=16, scale_factor=1.0, shift_factor=0.0),
}
DIRECTIONS = ("encode", "decode")
AT_720P = (720, 1280)


def size_of(text: str) -> tuple[int, int]:
    """(height, width) of "720x1280"."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) % SPACE == int(width) % SPACE == 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give HEIGHTxWIDTH, multiples of {SPACE}")
    return int(height), int(width)


def per_frame(config: Config, direction: str, size: tuple[int, int]) -> Figures:
    """What a net frame of `size` takes."""
    if isinstance(config, CVVAEConfig):
        profile = _profile(config, direction, size, 5)
        return Figures(profile.flops / 16e12, profile.bytes_moved / 16e9, profile.peak_bytes / 2**30)
    two, three = (_profile(config, direction, size, latents) for latents in (2, 3))
    flops, moved = three.flops - two.flops, three.bytes_moved - two.bytes_moved
    return Figures(flops / 4e12, moved / 4e9, three.peak_bytes / 2**30)


def _profile(config: Config, direction: str, size: tuple[int, int], latents: int) -> MetaProfile:
    vae = VideoVAE(meta_model(config, torch.bfloat16))
    shape = (1, 3, pixel_frames(latents), *size)
    if direction == "decode":
        shape = (1, config.latent_channels, latents, size[0] // SPACE, size[1] // SPACE)
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    with MetaProfile() as profile:
        for piece in vae.decode_stream(x) if direction == "decode" else vae.encode_stream([x]):
            del piece
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
            ours = per_frame(MODELS[model], direction, options.size)
            cells = (_cell(*values) for values in zip(ours, *known, strict=True))
            print(f"| {model} {direction} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
