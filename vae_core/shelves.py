"""Where tensors wait between tiles: on the device they are computed on, or in RAM."""

from __future__ import annotations

import torch
from torch import Tensor

from .memory import Memory


class Shelf:
    """Keeps tensors that wait on `home`, while work is done on another device or the same."""

    def __init__(self, home: torch.device) -> None:
        self.home = home

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised (b, c, t, h, w) to be filled part by part."""
        layout = torch.channels_last_3d
        return torch.empty(shape, dtype=like.dtype, device=self.home, memory_format=layout)

    def keep(self, x: Tensor) -> Tensor:
        """`x` as it waits."""
        return x.to(self.home)

    def fetch(self, x: Tensor, device: torch.device) -> Tensor:
        """What waits, on `device`; a view where nothing needs to move."""
        return x.to(device)


class ShelvedMemory(Memory):
    """A `Memory` whose frames wait on a shelf and are read on `device`."""

    def __init__(self, shelf: Shelf, device: torch.device) -> None:
        super().__init__()
        self.shelf = shelf
        self.device = device

    def get(self, slot: str) -> Tensor | None:
        frames = super().get(slot)
        return None if frames is None else self.shelf.fetch(frames, self.device)

    def put(self, slot: str, frames: Tensor) -> None:
        super().put(slot, self.shelf.keep(frames))
