"""CV-VAE: the families `cv-vae` (latents of SD 1.5, SD 2.1 and SVD) and `cv-vae-sd3` (latents of SD3 and SD3.5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..family import DIRECTIONS, HALVES, Compression, Direction, Family, Shapes, Windows
from ..layout import CLAMP, diffusers_name, original, sizes_in, widths_in_words
from .network import CVVAE, CVVAEConfig

__all__ = ["CVVAE", "CV_VAE", "CV_VAE_SD3", "CVVAEConfig"]


def _official_sd3(config: CVVAEConfig, name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Name and shape in the program of SD3's CV-VAE."""
    name = diffusers_name(name)
    return name, shape[:-1] if name.endswith(".conv_shortcut.weight") else shape


def _configure(shapes: Shapes, told: Mapping[str, float]) -> CVVAEConfig:
    return CVVAEConfig(**sizes_in(shapes, "down", "up", "block", upward=False), sd3=False)


def _configure_sd3(shapes: Shapes, told: Mapping[str, float]) -> CVVAEConfig:
    return CVVAEConfig(**sizes_in(shapes, "down_blocks", "up_blocks", "resnets", upward=True), sd3=True)


def _tell_tales(down: str, up: str, block: str) -> dict[Direction, tuple[dict[str, int]]]:
    """The numbers of axes tell them from the image VAEs whose names CV-VAE took over, `norm1.weight` and the `conv2` of
    four axes from the diffusers form of Wan's VAE."""
    return {
        direction: (
            {
                f"{HALVES[direction]}.conv_in.weight": 5,
                f"{HALVES[direction]}.{level}.0.{block}.0.norm1.weight": 1,
                f"{HALVES[direction]}.{level}.0.{block}.0.conv1.weight": 5,
                f"{HALVES[direction]}.{level}.0.{block}.0.conv2.weight": 4,
            },
        )
        for direction, level in zip(DIRECTIONS, (down, up), strict=True)
    }


CV_VAE = Family(
    id="cv-vae",
    compression=Compression(time=4, space=8),
    frames=Windows(first=17, step=16, overlap=1),
    latents=Windows(first=5, step=4, overlap=1),
    tell_tales=_tell_tales("down", "up", "block"),
    configure=_configure,
    build=CVVAE,
    official=original,
    widths=widths_in_words,
    clamp=CLAMP,
    reference_tiles=True,
)
CV_VAE_SD3 = replace(
    CV_VAE,
    id="cv-vae-sd3",
    tell_tales=_tell_tales("down_blocks", "up_blocks", "resnets"),
    configure=_configure_sd3,
    official=_official_sd3,
)
