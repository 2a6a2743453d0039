"""Latent-space regularization (CV-VAE): a frozen image VAE reads and writes the video VAE's latents.

With the video VAE E, D, a frozen image VAE E_i, D_i and a mapping psi that keeps the first frame of a clip and one
frame of every later group of four, the decoder's term is |psi(X) - D_i(E(X))| and the encoder's |X - D(E_i(psi(X)))|.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..families import VIDEO
from .frozen import ImageVAE

Mapping = Literal["first", "slice", "average", "random"]
MAPPINGS: tuple[Mapping, ...] = ("first", "slice", "average", "random")


def map_frames(video: Tensor, mapping: Mapping, draws: Tensor | None = None) -> Tensor:
    """psi: (b, c, 1 + 4n, h, w) to (b, c, 1 + n, h, w), or to (b, c, 1, h, w) with `first`.

    first: frame 0 alone. slice: frames 0, 4, 8, ... average: of each group of four, the mean. random: of each group,
    the frame that `draws`, (b, n) integers from 0 to 3, names.
    """
    if mapping == "first" or video.shape[2] == 1:
        return video[:, :, :1]
    groups = rearrange(video[:, :, 1:], "b c (n k) h w -> b c n k h w", k=VIDEO.time)
    if mapping == "slice":
        later = groups[:, :, :, VIDEO.time - 1]
    elif mapping == "average":
        later = groups.mean(dim=3)
    else:
        assert draws is not None, "the random mapping needs draws"
        index = draws.to(video.device)[:, None, :, None, None, None].expand(-1, video.shape[1], -1, 1, *video.shape[3:])
        later = groups.gather(3, index)[:, :, :, 0]
    return torch.cat((video[:, :, :1], later), dim=2)


def draw_frames(groups: int, generator: torch.Generator) -> Tensor:
    """For one clip, which frame of each of its `groups` the random mapping takes: (groups,)."""
    return torch.randint(VIDEO.time, (groups,), generator=generator)


def mapped_latent(latent: Tensor, mapping: Mapping) -> Tensor:
    """The latents that stand for the frames that psi keeps."""
    return latent[:, :, :1] if mapping == "first" else latent


def decoded_frames(image_vae: ImageVAE, latent: Tensor) -> Tensor:
    """D_i, frame by frame and with a gradient for the latent: (b, z, t, h, w) to (b, 3, t, 8h, 8w).

    What the image VAE computes in between is computed again in the backward pass.
    """
    b = latent.shape[0]

    def decode(z: Tensor) -> Tensor:
        return image_vae.decode(z)[0]

    flat = rearrange(latent, "b z t h w -> (b t) z h w")
    frames: Tensor = checkpoint(decode, flat, use_reentrant=False)
    return rearrange(frames, "(b t) c h w -> b c t h w", b=b)


@torch.no_grad()
def encoded_frames(image_vae: ImageVAE, video: Tensor) -> Tensor:
    """E_i, frame by frame: the posterior means of (b, 3, t, h, w) as (b, z, t, h/8, w/8)."""
    mean, _ = image_vae.encode(rearrange(video, "b c t h w -> (b t) c h w"))
    return rearrange(mean, "(b t) z h w -> b z t h w", b=video.shape[0])
