"""Pictures as SVD is told of them: the latent of an image VAE and the embedding of CLIP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..bridge.native import NativeVideoVAE

CHANNELS = 4  # of SVD's latent space


@dataclass(frozen=True, kw_only=True)
class Reader:
    """What turns a latent into a picture, and a picture into what SVD is told of it."""

    image_vae: Any
    clip_vision: Any

    def read(self, latent: Tensor, level: float, seed: int) -> tuple[Tensor, Tensor]:
        """(image latent (1, 4, h, w), embedding (1, 1, d)) of a latent (1, 4, h, w), unscaled, by way of its picture.

        level: noise that is laid on the picture for the image VAE, as SVD is told, drawn from `seed`.
        """
        pixels = self.image_vae.decode(latent)
        pixels = pixels.reshape(-1, *pixels.shape[-3:])[:1, ..., :3]
        return encode_pictures(self.image_vae, with_noise(pixels, level, seed)), see_pictures(self.clip_vision, pixels)


class Anchor:
    """The image that a chunk starts from, made of the latents `carried` (k, 4, h, w) into it.

    kind: "moving": the first of them. "all carried": each for itself, and the last for the rest. "re-encoded": the
    first of them by way of its picture, which CLIP sees anew, too. "first": the image given stays.
    """

    def __init__(self, kind: str, reader: Reader | None, carried: Tensor, seed: int) -> None:
        self._kind, self._reader, self._carried, self._seed = kind, reader, carried, seed
        self._read: tuple[Tensor, Tensor] | None = None

    @property
    def moves(self) -> bool:
        """Whether there is another image than the one given."""
        return self._kind != "first"

    def told(self, image: Tensor, latents: int, level: float) -> dict[str, Any]:
        """What changes in a condition with `image` for a chunk of `latents`; level: its noise, see `Reader`."""
        carried = self._carried.to(image)
        if self._kind == "all carried":
            rest = carried[-1:].expand(latents - carried.shape[0], -1, -1, -1)
            return {"concat_latent_image": torch.cat((carried, rest))}
        if self._kind == "moving" or self._reader is None:
            return {"concat_latent_image": carried[:1]}
        if self._read is None:
            self._read = self._reader.read(carried[:1], level, self._seed)
        shown, seen = self._read
        return {"concat_latent_image": shown.to(image), "cross_attn": seen}


def check_readers(clip_vision: Any, image_vae: Any) -> None:
    """Raise ValueError for a model that cannot make SVD's conditions."""
    if clip_vision is None:
        raise ValueError(
            "There is no CLIP vision model: this checkpoint holds none. Load an SVD checkpoint with Image Only "
            "Checkpoint Loader, or a CLIP vision file (ViT-H) with Load CLIP Vision."
        )
    if isinstance(image_vae, NativeVideoVAE) and not may_be_svds(image_vae):
        raise ValueError(
            f"The image VAE is {image_vae.codec.family}, whose latent space is not SVD's: SVD would see noise. Connect "
            "the VAE of Image Only Checkpoint Loader, or a CV-VAE or an image VAE with 4 channels."
        )


def may_be_svds(vae: NativeVideoVAE) -> bool:
    """Whether the latents of a VAE may be in SVD's space."""
    return vae.codec.info.scaled_by == "sampler" and vae.latent_channels == CHANNELS


def with_noise(pixels: Tensor, level: float, seed: int) -> Tensor:
    """`pixels` with `level` of noise, drawn from `seed`."""
    if not level:
        return pixels
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed % 2**63), dtype=pixels.dtype)
    return pixels + noise.to(pixels.device) * level


def encode_pictures(vae: Any, pixels: Tensor) -> Tensor:
    """(n, 4, h, w): each picture by itself, whatever the VAE makes of a batch."""
    latents = []
    for picture in pixels.split(1):
        latent = vae.encode(picture)
        latent = latent[:, :, 0] if latent.ndim == 5 else latent
        if latent.ndim != 4 or latent.shape[1] != CHANNELS:
            raise ValueError(
                f"The image VAE made a latent of shape {tuple(latent.shape)}; SVD takes {CHANNELS} channels at an "
                "eighth of the size. Connect the VAE of Image Only Checkpoint Loader, or a CV-VAE with 4 channels."
            )
        latents.append(latent)
    return torch.cat(latents)


def see_pictures(clip_vision: Any, pixels: Tensor) -> Tensor:
    """CLIP's embeddings, (n, 1, d)."""
    return clip_vision.encode_image(pixels).image_embeds.unsqueeze(1)
