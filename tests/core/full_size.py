"""VAEs of the published widths, without data."""

from __future__ import annotations

import torch

from vae_core import VideoVAE
from vae_core.families import DIRECTIONS, FAMILIES
from vae_core.families.cv_vae import CVVAEConfig
from vae_core.families.image_vae import ImageVAEConfig
from vae_core.families.iv_vae import IVVAEConfig
from vae_core.plan.footprint import meta_network

from ..conftest import Config, family_of_config

FULL: dict[str, Config] = {
    "cv-vae": CVVAEConfig(widths=(128, 256, 512, 512), blocks_per_level=2, latent_channels=4, sd3=False),
    "cv-vae-sd3": CVVAEConfig(widths=(128, 256, 512, 512), blocks_per_level=2, latent_channels=16, sd3=True),
    "iv-vae": IVVAEConfig(dim=64, latent_channels=16, scale_factor=1.0, shift_factor=0.0),
    "image-vae": ImageVAEConfig(
        widths=(128, 256, 512, 512),
        blocks_per_level=2,
        latent_channels=4,
        quantized=(True, True),
        decoder_attention=True,
        norm_eps=1e-6,
        scale_factor=0.18215,
        shift_factor=0.0,
    ),
}


def full_size(config: Config, dtype: torch.dtype = torch.bfloat16) -> VideoVAE:
    """A VAE on the meta device, which is planned and counted as if on a GPU."""
    return VideoVAE(meta_network(FAMILIES[family_of_config(config)], config, DIRECTIONS, dtype))


def latent_shape(vae: VideoVAE, frames: int = 25, height: int = 90, width: int = 160) -> tuple[int, ...]:
    """Of a latent; 97 frames of 720x1280, unless told otherwise."""
    return (1, vae.info.latent_channels, frames, height, width)
