"""Small VAEs with recipe weights, written as files into models/vae: fast, and their pictures mean nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..golden import recipe
from .inprocess import Comfy

SMALL = {
    "cv": "small_cv.safetensors",
    "cv16": "small_cv_16.safetensors",
    "sd3": "small_cv_sd3.safetensors",
    "iv": "small_iv.safetensors",
    "image": "small_image.safetensors",
    "image16": "small_image_16.safetensors",
}


def write_small(comfy: Comfy, folder: Path) -> None:
    """Write every file of SMALL."""
    cv, iv, image = (comfy.pack(f"vae_core.families.{name}") for name in ("cv_vae", "iv_vae", "image_vae"))
    narrow = cv.CVVAEConfig(widths=(32, 32, 32, 32), blocks_per_level=1, latent_channels=4, sd3=False)
    flat = image.ImageVAEConfig(
        widths=(32, 32, 32, 32),
        blocks_per_level=1,
        latent_channels=4,
        quantized=(True, True),
        decoder_attention=True,
        norm_eps=1e-6,
        scale_factor=0.18215,
        shift_factor=0.0,
    )
    kinds: dict[str, tuple[Any, Any]] = {
        "cv": (cv.CV_VAE, narrow),
        "cv16": (cv.CV_VAE, replace(narrow, latent_channels=16)),
        "sd3": (cv.CV_VAE_SD3, replace(narrow, latent_channels=16, sd3=True)),
        "iv": (iv.IV_VAE, iv.IVVAEConfig(dim=8, latent_channels=4, scale_factor=1.3, shift_factor=0.1)),
        "image": (image.IMAGE_VAE, flat),
        "image16": (image.IMAGE_VAE, replace(flat, latent_channels=16, quantized=(False, False))),
    }
    core = comfy.pack("vae_core")
    for name, (family, config) in kinds.items():
        scaling = {"scale_factor": 1.3, "shift_factor": 0.1} if name == "iv" else {}
        state = recipe.state_dict(_official_shapes(family, config), seed=0)
        core.save(core.load(state, **scaling), folder / SMALL[name])


def _official_shapes(family: Any, config: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return dict(family.key_map(family.network(config)).values())


def picture(frames: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """An IMAGE: a smooth moving clip, (frames, height, width, 3) in 0..1."""
    video = recipe.video((1, 3, frames, height, width), seed)
    return video[0].movedim(0, -1).add(1).div(2)  # t h w c
