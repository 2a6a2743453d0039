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
}


def write_small(comfy: Comfy, folder: Path) -> None:
    """Write every file of SMALL."""
    cv, iv = comfy.pack("vae_core.cv_vae"), comfy.pack("vae_core.iv_vae")
    narrow = cv.CVVAEConfig(widths=(32, 32, 32, 32), blocks_per_level=1, latent_channels=4, sd3=False)
    configs = {
        "cv": narrow,
        "cv16": replace(narrow, latent_channels=16),
        "sd3": replace(narrow, latent_channels=16, sd3=True),
        "iv": iv.IVVAEConfig(dim=8, latent_channels=4, scale_factor=1.3, shift_factor=0.1),
    }
    core = comfy.pack("vae_core")
    for name, config in configs.items():
        scaling = {"scale_factor": 1.3, "shift_factor": 0.1} if name == "iv" else {}
        state = recipe.state_dict(_official_shapes(comfy, config), seed=0)
        core.save(core.load(state, **scaling), folder / SMALL[name])


def _official_shapes(comfy: Comfy, config: Any) -> dict[str, tuple[int, ...]]:
    keys = comfy.pack("vae_core.keys")
    with torch.device("meta"):
        return dict(keys.key_map(keys.build(config)).values())


def picture(frames: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """An IMAGE: a smooth moving clip, (frames, height, width, 3) in 0..1."""
    video = recipe.video((1, 3, frames, height, width), seed)
    return video[0].movedim(0, -1).add(1).div(2)  # t h w c
