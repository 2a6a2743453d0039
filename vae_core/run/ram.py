"""RAM for what waits off the device, in page-locked blocks, and copies to and from it while the device computes."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor

from ..nn.region import Region

BLOCK = 2**26  # bytes; a power of two, to which page-locked memory is rounded up
Shape = tuple[int, int, int, int, int]

_log = logging.getLogger("cviv-vae")


class Blocks:
    """Blocks of RAM, page-locked for a GPU. What is given back is kept, and taken again."""

    def __init__(self, device: torch.device) -> None:
        self._home = device if device.type == "meta" else torch.device("cpu")
        self._pin = device.type in ("cuda", "xpu")
        self._spare: list[Tensor] = []

    def take(self, nbytes: int) -> Tensor:
        """A block of `nbytes`."""
        for n, block in enumerate(self._spare):
            if block.numel() == nbytes:
                return self._spare.pop(n)
        if self._pin:
            try:
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                self._pin = False
                _log.info("RAM cannot be page-locked (%s): copies to and from it make the device wait.", error)
        return torch.empty(nbytes, dtype=torch.uint8, device=self._home)

    def give(self, blocks: list[Tensor]) -> None:
        """Take blocks back."""
        self._spare += blocks


class Rows:
    """Rows of a clip (b, c, t, h, w) in RAM: one line of (w, c) for each row of each frame."""

    def __init__(self, shape: Shape, dtype: torch.dtype, blocks: Blocks) -> None:
        self.shape, self.dtype = shape, dtype
        self._pool, self._line = blocks, line_bytes(shape, dtype.itemsize)
        self._each, size, count = layout(shape, dtype.itemsize)
        self._blocks = [blocks.take(size) for _ in range(count)]

    def narrowed(self, channels: int) -> Rows:
        """The same memory for fewer channels: each line lies where one of these lay, which must have been read."""
        rows = copy(self)
        rows.shape = (self.shape[0], channels, *self.shape[2:])
        return rows

    def free(self) -> None:
        """Give the blocks back."""
        self._pool.give(self._blocks)
        self._blocks = []

    def pairs(self, x: Tensor, region: Region) -> Iterator[tuple[Tensor, Tensor]]:
        """Runs of lines, as (rows, w, c): of `x` (b, c, t, h, w), which shows `region`, and where they lie here.

        Where `region` is as wide as the frame, and channels lie side by side in `x`, both are without gaps.
        """
        _, c, t, h, w = self.shape
        line, used = self._line, line_bytes(self.shape, self.dtype.itemsize)
        for frame in range(self.shape[0] * t):
            start, stop = (frame * h + row for row in region.rows)
            top = 0
            while start < stop:
                block, inside = divmod(start, self._each)
                count = min(self._each - inside, stop - start) if used == line else 1
                lines = self._blocks[block][inside * line : (inside + count - 1) * line + used].view(self.dtype)
                there = x[frame // t, :, frame % t, top : top + count].permute(1, 2, 0)
                yield there, lines.view(count, w, c)[:, slice(*region.columns)]
                start, top = start + count, top + count


def line_bytes(shape: Shape, itemsize: int) -> int:
    """Bytes of a row of one frame."""
    return shape[1] * shape[4] * itemsize


def layout(shape: Shape, itemsize: int) -> tuple[int, int, int]:
    """How rows of a shape lie in blocks: lines in each, bytes of each, and how many blocks."""
    line = line_bytes(shape, itemsize)
    each = max(1, BLOCK // line)
    return each, max(BLOCK, line), -(-shape[0] * shape[2] * shape[3] // each)


class Bus:
    """Copies between a device and RAM, on streams of their own where it has such; elsewhere at once."""

    def __init__(self, device: torch.device) -> None:
        self._module: Any = getattr(torch, device.type) if device.type in ("cuda", "xpu") else None
        self._streams = [] if self._module is None else [self._module.Stream(device) for _ in range(2)]

    @contextmanager
    def fetching(self, written: object | None) -> Generator[list[Any]]:
        """Copies made inside go to the device, once `written` is done; the list then holds the event of their end."""
        done: list[Any] = []
        if self._module is None:
            yield done
            return
        stream = self._streams[0]
        if written is not None:
            stream.wait_event(written)
        with self._module.stream(stream):
            yield done
            done.append(stream.record_event())

    def arrive(self, x: Tensor, done: list[Any]) -> None:
        """From here on what the device computes sees `x`, which was fetched."""
        for event in done:
            current = self._module.current_stream(x.device)
            current.wait_event(event)
            x.record_stream(current)

    @contextmanager
    def sending(self, x: Tensor) -> Generator[list[Any]]:
        """Copies of `x` made inside go to RAM, once it is computed; the list then holds the event of their end."""
        done: list[Any] = []
        if self._module is None:
            yield done
            return
        stream = self._streams[1]
        stream.wait_stream(self._module.current_stream(x.device))
        with self._module.stream(stream):
            yield done
            x.record_stream(stream)
            done.append(stream.record_event())

    def settle(self) -> None:
        """Wait until nothing is under way."""
        for stream in self._streams:
            stream.synchronize()
