"""What waits between tiles or steps: the activations of a whole chunk, on the device, in RAM, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..nn.clip import Clip, empty, memory_format
from ..nn.norm import Moments
from ..nn.operators import put
from ..nn.region import Region, Size, full
from .ram import Blocks, Bus, Rows, Shape

Measure = Callable[[Clip], Moments]
APART = (
    320 * 2**20
)  # bytes; larger clips of several tensors are put together, so that another canvas can take them over


class Store:
    """Memory for canvases of one video. room: bytes of them that may lie on the device; None is any number.

    What one gives back on the device, the next of the same shape gets.
    """

    def __init__(self, device: torch.device, room: int | None = None) -> None:
        self.device = device
        self.room = room
        self.bus = Bus(device)
        self._blocks = Blocks(device)
        self._taken = 0
        self._spare: Tensor | None = None

    def claim(self, nbytes: int) -> bool:
        """Count so many bytes on the device, if there is room."""
        if self.room is not None and self._taken + nbytes > self.room:
            return False
        self._taken += nbytes
        return True

    def take(self, shape: Shape, like: Tensor) -> tuple[Tensor | None, Rows | None]:
        """Uninitialised memory of the type of `like`: the first rows on its device, the others in RAM."""
        b, c, t, height, w = shape
        spare = nbytes_of(self._spare)
        rows = height
        if self.room is not None:
            rows = min(height, max(0, self.room - self._taken + spare) // (b * c * t * w * like.element_size()))
        data: Tensor | None = None
        wanted = (b, c, t, rows, w)
        if self._spare is not None and self._spare.shape == wanted and self._spare.dtype == like.dtype:
            data, self._spare = self._spare, None
        elif rows:
            self.clear()
            data = empty(wanted, like)
            self._taken += nbytes_of(data)
        return data, Rows((b, c, t, height - rows, w), like.dtype, self._blocks) if rows < height else None

    def give(self, data: Tensor) -> None:
        """Take back what nobody needs any more."""
        self.clear()
        self._spare = data

    def release(self, nbytes: int) -> None:
        """Count so many bytes less."""
        self._taken -= nbytes

    def clear(self) -> None:
        """Keep nothing on the device."""
        self._taken -= nbytes_of(self._spare)
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
        self._data: Tensor | None = None  # else its first rows, on the device
        self._rest: Rows | None = None  # and the others, in RAM
        self._own = False  # whether the next canvas may have the memory on the device
        self._lent = False  # whether the next canvas has the memory in RAM
        self._claimed = 0  # bytes of the store's room
        self._written: Any = None  # event of the last copy to RAM
        self._ahead: dict[Region, tuple[Tensor, list[Any]]] = {}

    def ahead(self, region: Region) -> None:
        """Begin to fetch what will be read next."""
        if self._rest is not None and region.rows[1] > self._resident:
            self._ahead[region] = self._fetch(region, self._rest)

    def read(self, region: Region) -> Clip:
        """A region of it, on the device; views where nothing needs to move."""
        if self._whole is not None:
            return self._whole.shared().crop(region, full(self.size))
        if self._rest is None or region.rows[1] <= self._resident:
            assert self._data is not None
            return Clip([region.of(self._data)])
        x, done = self._ahead.pop(region, None) or self._fetch(region, self._rest)
        self._store.bus.arrive(x, done)
        here = Region(rows=(region.rows[0], self._resident), columns=region.columns)
        if self._data is not None and here.size[0] > 0:
            x[..., : here.size[0], :].copy_(here.of(self._data))
        return Clip([x])

    def write(self, region: Region, clip: Clip, plus: Clip | None = None) -> None:
        """Put a clip, with `plus` added to it, where it belongs; the clip may be kept."""
        apart = region != full(self.size) or (len(clip.tensors) > 1 and clip.nbytes > APART)
        if not apart and self._data is None and self._rest is None and self._store.claim(clip.nbytes):
            seen = self._whole = clip if plus is None else clip.plus(plus)
            self._onto, self._claimed = None, clip.nbytes
        else:
            seen = self._put(region, clip, plus)
        if self._measure is not None:
            self.moments = self._measure(seen).pooled(self.moments)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        if self._whole is not None:
            return self._whole.nbytes
        return nbytes_of(self._data) + (0 if self._rest is None else prod(self._rest.shape) * self._rest.dtype.itemsize)

    def tensor(self) -> Tensor:
        """All of it, on the device."""
        return self.read(full(self.size)).tensor()

    def free(self, *, again: bool = True) -> None:
        """Give the memory back; on the device, where it is wanted `again`, for the next canvas."""
        if self._data is not None and self._own and again:
            self._store.give(self._data)
        else:
            self._store.release(self._claimed)
        if self._rest is not None and not self._lent:
            self._rest.free()
        self._whole = self._data = self._rest = None
        self._claimed = 0

    @property
    def _resident(self) -> int:
        """Rows on the device."""
        return 0 if self._data is None else self._data.shape[-2]

    def _fetch(self, region: Region, rest: Rows) -> tuple[Tensor, list[Any]]:
        """A tensor of a region, into which the rows that lie in RAM are copied."""
        there, skipped = _below(region, self._resident)
        b, c, t, _, _ = rest.shape
        with self._store.bus.fetching(self._written) as done:
            form = memory_format(self._store.device)
            x = torch.empty((b, c, t, *region.size), dtype=rest.dtype, device=self._store.device, memory_format=form)
            for target, lines in rest.pairs(x[..., skipped:, :], there):
                target.copy_(lines, non_blocking=True)
        return x, done

    def _put(self, region: Region, clip: Clip, plus: Clip | None) -> Clip:
        """Write where it waits; returns what was written, for moments."""
        if self._data is None and self._rest is None:
            self._make(clip)
        rest, resident = self._rest, self._resident
        if rest is None or region.rows[1] <= resident:
            assert self._data is not None
            target = region.of(self._data)
            put(clip, target, plus)
            return Clip([target])
        x = (clip if plus is None else clip.plus(plus)).tensor()
        there, skipped = _below(region, resident)
        if self._data is not None and skipped:
            here = Region(rows=(region.rows[0], resident), columns=region.columns)
            here.of(self._data).copy_(x[..., :skipped, :])
        with self._store.bus.sending(x) as done:
            for source, lines in rest.pairs(x[..., skipped:, :], there):
                lines.copy_(source, non_blocking=True)
        self._written = done[0] if done else None
        return Clip([x])

    def _make(self, clip: Clip) -> None:
        """Have memory for all of it: that of `onto`, or the store's."""
        b, c, t, _, _ = clip.shape
        onto, self._onto = self._onto, None
        if onto is None or not self._take_over(onto, c, t):
            self._data, self._rest = self._store.take((b, c, t, *self.size), clip.tensors[0])
            self._own, self._claimed = True, nbytes_of(self._data)

    def _take_over(self, onto: Canvas, channels: int, frames: int) -> bool:
        """Have the memory of a canvas, unless that is narrower; it can be read until it is written over."""
        data, rest = onto._data, onto._rest
        if onto._whole is not None and len(onto._whole.tensors) == 1:
            data = onto._whole.tensors[0]
        held = rest if data is None else data
        if held is None or held.shape[1] < channels or held.shape[2] != frames:
            return False
        self._rest = None if rest is None else rest.narrowed(channels)
        onto._lent = True
        self._data = None if data is None else data[:, :channels]
        self._claimed, onto._claimed, onto._own = onto._claimed, 0, False
        return True


class Again:
    """The activations of a chunk of which nothing waits: a region is computed again, by `make`, wherever it is read.

    source: the canvas that they are made of, which waits for that.
    """

    def __init__(self, size: Size, source: AnyCanvas, measure: Measure) -> None:
        self.size = size
        self.moments: Moments | None = None
        self.nbytes = 0
        self.make: Callable[[Region], Clip]
        self._source = source
        self._measure = measure

    def ahead(self, region: Region) -> None:
        """Nothing is fetched."""

    def read(self, region: Region) -> Clip:
        """A region of it."""
        return self.make(region)

    def write(self, region: Region, clip: Clip, plus: Clip | None = None) -> None:
        """Take the moments of a region that was computed once for them."""
        self.nbytes += clip.nbytes
        self.moments = self._measure(clip).pooled(self.moments)

    def tensor(self) -> Tensor:
        """All of it."""
        return self.read(full(self.size)).tensor()

    def free(self, *, again: bool = True) -> None:
        """Let go of what it is made of."""
        self._source.free(again=again)


AnyCanvas = Canvas | Again


def nbytes_of(x: Tensor | None) -> int:
    """Bytes of a tensor; 0 without one."""
    return 0 if x is None else x.numel() * x.element_size()


def _below(region: Region, row: int) -> tuple[Region, int]:
    """What of a region lies from `row` on, counted from there; and how many rows of it do not."""
    skipped = max(0, row - region.rows[0])
    return Region(rows=(region.rows[0] + skipped - row, region.rows[1] - row), columns=region.columns), skipped
