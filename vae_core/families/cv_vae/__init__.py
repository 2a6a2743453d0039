"""CV-VAE: the families `cv-vae` (latents of SD 1.5, SD 2.1 and SVD) and `cv-vae-sd3` (latents of SD3 and SD3.5)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..family import Compression, Direction, Family, Scaling, Shapes, Windows, substituted
from ..layout import LEVELS
from .network import CVVAE, CVVAEConfig

__all__ = ["CVVAE", "CV_VAE", "CV_VAE_SD3", "CVVAEConfig"]

# what the diffusion models of so many channels apply to an unscaled latent: scale * (latent - shift)
SAMPLER_SCALING = {4: (0.18215, 0.0), 16: (1.5305, 0.0609)}  # SD 1.5, SD 2.1 and SVD; SD3 and SD3.5

_NAMES = (
    (r"^encoder\.levels\.(\d)\.block_(\d+)\.", r"encoder.down.\1.block.\2."),
    (r"^encoder\.levels\.(\d)\.down\.", r"encoder.down.\1.downsample.conv."),
    (r"^decoder\.levels\.(\d)\.block_(\d+)\.", r"decoder.up.\1.block.\2."),
    (r"^decoder\.levels\.(\d)\.up\.", r"decoder.up.\1.upsample."),
    (r"\.middle\.0\.", r".mid.block_1."),
    (r"\.middle\.2\.", r".mid.block_2."),
    (r"\.middle\.1\.temporal\.(\w+)\.", r".mid.attn_1.\1_t."),
    (r"\.middle\.1\.", r".mid.attn_1."),
    (r"\.shortcut\.", r".nin_shortcut."),
)
_SD3_NAMES = (
    (r"^encoder\.levels\.(\d)\.block_(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"^encoder\.levels\.(\d)\.down\.", r"encoder.down_blocks.\1.downsamplers.0.conv."),
    (r"^decoder\.levels\.(\d)\.block_(\d+)\.", r"decoder.up_blocks.\1.resnets.\2."),
    (r"^decoder\.levels\.(\d)\.up\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.middle\.0\.", r".mid_block.resnets.0."),
    (r"\.middle\.2\.", r".mid_block.resnets.1."),
    (r"\.middle\.1\.norm\.", r".mid_block.attentions.0.group_norm."),
    (r"\.middle\.1\.proj_out\.", r".mid_block.attentions.0.to_out.0."),
    (r"\.middle\.1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.shortcut\.", r".conv_shortcut."),
    (r"\.norm_out\.", r".conv_norm_out."),
)


def _official(config: CVVAEConfig, name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Name and shape in the program of SD 1.5's CV-VAE."""
    name = substituted(name, _NAMES)
    name = re.sub(r"^decoder\.up\.(\d)\.", lambda m: f"decoder.up.{LEVELS - 1 - int(m[1])}.", name)
    linear = re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", name)  # there a 1x1 convolution
    return name, (*shape, 1, 1) if linear else shape


def _official_sd3(config: CVVAEConfig, name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Name and shape in the program of SD3's CV-VAE."""
    name = substituted(name, _SD3_NAMES)
    return name, shape[:-1] if name.endswith(".conv_shortcut.weight") else shape


def _configure(shapes: Shapes, told: Mapping[str, float]) -> CVVAEConfig:
    return _config(shapes, "down", "up", "block", sd3=False)


def _configure_sd3(shapes: Shapes, told: Mapping[str, float]) -> CVVAEConfig:
    return _config(shapes, "down_blocks", "up_blocks", "resnets", sd3=True)


def _config(shapes: Shapes, down: str, up: str, block: str, *, sd3: bool) -> CVVAEConfig:
    if "encoder.conv_in.weight" in shapes:
        first, order, more = f"encoder.{down}", range(LEVELS), 0
        channels = shapes["encoder.conv_out.weight"][0] // 2
    else:
        first, order, more = f"decoder.{up}", (reversed(range(LEVELS)) if sd3 else range(LEVELS)), 1
        channels = shapes["decoder.conv_in.weight"][1]
    blocks = 0
    while f"{first}.0.{block}.{blocks}.conv1.weight" in shapes:
        blocks += 1
    return CVVAEConfig(
        widths=tuple(shapes[f"{first}.{i}.{block}.0.conv1.weight"][0] for i in order),
        blocks_per_level=blocks - more,
        latent_channels=channels,
        sd3=sd3,
    )


def _scaling(config: CVVAEConfig) -> Scaling:
    scale, shift = SAMPLER_SCALING.get(config.latent_channels, (1.0, 0.0))
    return Scaling(scale=scale, shift=shift)


def _widths(config: CVVAEConfig) -> str:
    return f"{', '.join(map(str, config.widths))}; {config.blocks_per_level} residual block(s) per level"


def _tell_tales(down: str, up: str, block: str) -> Mapping[Direction, tuple[Mapping[str, int], ...]]:
    """The numbers of axes tell them from the image VAEs whose names CV-VAE took over, `norm1.weight` and the `conv2` of
    four axes from the diffusers form of Wan's VAE."""
    places: tuple[tuple[Direction, str, str], ...] = (("encode", "encoder", down), ("decode", "decoder", up))
    return {
        direction: (
            {
                f"{half}.conv_in.weight": 5,
                f"{half}.{level}.0.{block}.0.norm1.weight": 1,
                f"{half}.{level}.0.{block}.0.conv1.weight": 5,
                f"{half}.{level}.0.{block}.0.conv2.weight": 4,
            },
        )
        for direction, half, level in places
    }


CV_VAE = Family(
    id="cv-vae",
    compression=Compression(time=4, space=8),
    frames=Windows(first=17, step=16, overlap=1),
    latents=Windows(first=5, step=4, overlap=1),
    tell_tales=_tell_tales("down", "up", "block"),
    configure=_configure,
    build=CVVAE,
    official=_official,
    scaling=_scaling,
    widths=_widths,
    clamp=(-30.0, 20.0),
    reference_tiles=True,
)

CV_VAE_SD3 = Family(
    id="cv-vae-sd3",
    compression=CV_VAE.compression,
    frames=CV_VAE.frames,
    latents=CV_VAE.latents,
    tell_tales=_tell_tales("down_blocks", "up_blocks", "resnets"),
    configure=_configure_sd3,
    build=CVVAE,
    official=_official_sd3,
    scaling=_scaling,
    widths=_widths,
    clamp=CV_VAE.clamp,
    reference_tiles=True,
)
