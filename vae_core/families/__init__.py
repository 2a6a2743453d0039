"""The families of VAEs. A new one is a folder here and a line in `FAMILIES`."""

from __future__ import annotations

from torch import Tensor

from .cv_vae import CV_VAE, CV_VAE_SD3
from .family import DIRECTIONS, Compression, Direction, Family, Network, Shapes, Windows
from .image_vae import IMAGE_VAE
from .iv_vae import IV_VAE

__all__ = [
    "DIRECTIONS",
    "FAMILIES",
    "VIDEO",
    "Compression",
    "Direction",
    "Family",
    "Network",
    "Windows",
    "family_of",
    "recognize",
]

VIDEO = CV_VAE.compression  # of the families that compress time, SVD's frames by CV-VAE among them

FAMILIES: dict[str, Family] = {family.id: family for family in (CV_VAE, CV_VAE_SD3, IV_VAE, IMAGE_VAE)}


def family_of(shapes: Shapes) -> Family | None:
    """The family that weights of these official names and shapes belong to, or None."""
    return next((family for family in FAMILIES.values() if family.halves_in(shapes)), None)


def recognize(tensors: dict[str, Tensor]) -> tuple[Family, tuple[Direction, ...], dict[str, Tensor]] | None:
    """The family that weights belong to, the halves that are there, and the weights under official names; or None."""
    for family in FAMILIES.values():
        renamed = family.modernize(tensors)
        halves = family.halves_in({name: tuple(tensor.shape) for name, tensor in renamed.items()})
        if halves:
            return family, halves, renamed
    return None
