"""What the training loop needs of an image VAE that it does not train."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class ImageVAE(Protocol):
    """An image VAE. Tensors are (b, c, h, w), pixels in [-1, 1], compression 8 x 8."""

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(b, 3, h, w) to mean and logvar, each (b, z, h/8, w/8)."""
        ...

    def decode(self, latent: Tensor) -> tuple[Tensor, ...]:
        """(b, z, h/8, w/8) to one or more reconstructions (b, 3, h, w) of the same image."""
        ...
