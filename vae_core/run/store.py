"""What waits between tiles: the activations of a whole chunk, and their moments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..nn.clip import Clip, memory_format
from ..nn.norm import Moments
from ..nn.operators import put
from ..nn.region import Region, Size, full

Measure = Callable[[Clip], Moments]
APART = (
    320 * 2**20
)  # bytes; larger clips of several tensors are put together, so that another canvas can take them over


class Store:
    """Memory for canvases, where they wait: on `home`. What one gives back, the next of the same shape gets."""

    def __init__(self, home: torch.device) -> None:
        self.home = home
        self._spare: Tensor | None = None

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor of the type of `like`."""
        spare, self._spare = self._spare, None
        if spare is not None and spare.shape == shape and spare.dtype == like.dtype:
            return spare
        del spare
        return torch.empty(shape, dtype=like.dtype, device=self.home, memory_format=memory_format(like.device))

    def give(self, data: Tensor) -> None:
        """Take back what nobody needs any more."""
        self._spare = data

    def clear(self) -> None:
        """Keep nothing."""
        self._spare = None


class Canvas:
    """The activations (b, c, t, h, w) of a chunk, written and read tile by tile.

    size: of its frames. measure: gives the moments of what is written, where the next step needs them. onto: a canvas
    whose memory this one takes over, where it is no wider; each tile is then read from it before it is written.
    """

    def __init__(self, size: Size, store: Store, *, measure: Measure | None = None, onto: Canvas | None = None) -> None:
        self.size = size
        self.moments: Moments | None = None
        self._store = store
        self._measure = measure
        self._onto = onto
        self._whole: Clip | None = None  # what was written in one go, on the device
        self._data: Tensor | None = None  # else all of it, where it waits
        self._taken = False  # whether the memory is of the store

    def read(self, region: Region, device: torch.device) -> Clip:
        """A region of it, on `device`; views where nothing needs to move."""
        if self._whole is not None:
            return self._whole.shared().crop(region, full(self.size))
        assert self._data is not None
        return Clip([region.of(self._data).to(device)])

    def write(self, region: Region, clip: Clip, plus: Clip | None = None) -> None:
        """Put a clip, with `plus` added to it, where it belongs; the clip may be kept."""
        x = clip.tensors[0]
        here = x.device == self._store.home
        if here and region == full(self.size) and (len(clip.tensors) == 1 or clip.nbytes <= APART):
            seen = self._whole = clip if plus is None else clip.plus(plus)
            self._onto = None
        else:
            if plus is not None and not here:
                clip, plus = clip.plus(plus), None
            target = region.of(self._room(clip))
            put(clip, target, plus)
            seen = Clip([target]) if here else clip
        if self._measure is not None:
            self.moments = self._measure(seen).pooled(self.moments)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        clip = Clip([self.tensor()]) if self._whole is None else self._whole
        return clip.nbytes

    def tensor(self) -> Tensor:
        """All of it, where it waits."""
        if self._whole is not None:
            return self._whole.tensor()
        assert self._data is not None
        return self._data

    def free(self) -> None:
        """Give the memory back, for the next canvas."""
        if self._data is not None and self._taken:
            self._store.give(self._data)
        self._whole = self._data = None

    def _memory(self) -> Tensor | None:
        """The one tensor that holds all of it, if there is one."""
        if self._whole is None:
            return self._data
        return self._whole.tensors[0] if len(self._whole.tensors) == 1 else None

    def _room(self, clip: Clip) -> Tensor:
        """The memory of the whole."""
        if self._data is None:
            b, c, t, _, _ = clip.shape
            onto, self._onto = self._onto, None
            data = None if onto is None else onto._memory()
            if data is not None and data.shape[1] >= c and data.shape[2] == t:
                self._data = data[:, :c]
            else:
                self._data, self._taken = self._store.take((b, c, t, *self.size), clip.tensors[0]), True
        return self._data
