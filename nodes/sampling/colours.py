"""Latents as small pictures: by the factors that ComfyUI knows for a model, or by its tiny decoder if it is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import folder_paths
import torch
import torch.nn.functional as F
from comfy.taesd.taesd import TAESD
from einops import rearrange
from torch import Tensor

AUTO, FACTORS, TINY = "auto", "latent colours", "TAESD"
METHODS = (AUTO, FACTORS, TINY)

Colours = Callable[[Tensor], Tensor]  # (n, z, h, w) -> (n, height, width, 3) in 0..1 on the CPU


def frames_of(x0: Tensor) -> Tensor:
    """(n, z, h, w): every latent of a (b, z, t, h, w) or (n, z, h, w) batch, clip after clip."""
    return rearrange(x0, "b z t h w -> (b t) z h w") if x0.ndim == 5 else x0


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 to count - 1, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    if most == 1:
        return [0]
    return [round(number * (count - 1) / (most - 1)) for number in range(most)]


def colours_of(latent_format: Any, method: str, device: torch.device) -> Colours:
    """What turns latents of a model into pictures. Raises ValueError, with the remedy, where nothing does."""
    path = _tiny_path(latent_format)
    if method == TINY and path is None:
        name = getattr(latent_format, "taesd_decoder_name", None)
        there = f"models/vae_approx/{name}.safetensors is not there" if name else "there is none for this model"
        raise ValueError(f"colours is '{TINY}', but {there}: put the file there, or choose '{FACTORS}'.")
    if path is not None and method != FACTORS:
        return _tiny(path, latent_format, device)
    factors = getattr(latent_format, "latent_rgb_factors", None)
    if factors is None:
        raise ValueError(
            f"ComfyUI knows no colours for the latents of this model ({type(latent_format).__name__}), so they cannot "
            "be shown while it samples. Set show to 'off', or take the node out."
        )
    return _factors(latent_format)


def _factors(latent_format: Any) -> Colours:
    weight = torch.tensor(latent_format.latent_rgb_factors).t()  # 3 z
    bias = getattr(latent_format, "latent_rgb_factors_bias", None)
    reshape = getattr(latent_format, "latent_rgb_factors_reshape", None)  # newer ComfyUI: latents that are packed

    def colours(latents: Tensor) -> Tensor:
        latents = latents if reshape is None else reshape(latents)
        offset = None if bias is None else torch.tensor(bias).to(latents)
        rgb = F.linear(latents.movedim(1, -1), weight.to(latents), offset)  # n h w 3
        return rgb.float().add(1).div(2).clamp(0, 1).cpu()

    return colours


def _tiny(path: str, latent_format: Any, device: torch.device) -> Colours:
    decoder = TAESD(None, path, latent_channels=latent_format.latent_channels).to(device)

    def colours(latents: Tensor) -> Tensor:
        pictures = [decoder.decode(one.to(device).float())[0].movedim(0, -1).cpu() for one in latents.split(1)]
        return torch.stack(pictures).float().add(1).div(2).clamp(0, 1)

    return colours


def _tiny_path(latent_format: Any) -> str | None:
    """The tiny decoder of pictures for a model's latents, if it is there; those of videos are another network."""
    name = getattr(latent_format, "taesd_decoder_name", None)
    if not name or not str(name).startswith("tae") or str(name).startswith(("taehv", "taeltx", "taeh3")):
        return None
    found = [file for file in folder_paths.get_filename_list("vae_approx") if file.startswith(name)]
    return folder_paths.get_full_path("vae_approx", found[0]) if found else None
