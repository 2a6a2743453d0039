"""Which part of a frame a layer needs, and which it gives: pure arithmetic on spans, one axis at a time.

Sizes and spans count pixels of the layer at hand. At the border of the frame a layer pads as it does for a whole frame;
at any other side of a region it computes only what the region's own pixels give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

Span = tuple[int, int]  # (start, stop)
Size = tuple[int, int]  # (height, width)


class Border(NamedTuple):
    """Which sides of a region are the frame's own border."""

    top: bool = True
    bottom: bool = True
    left: bool = True
    right: bool = True


class Padding(NamedTuple):
    """Pixels to add on each side."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0


WHOLE_FRAME, NO_PADDING = Border(), Padding()


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What an output pixel of a layer sees of its input, along either axis.

    before, after: pixels on both sides of the one that it lies on. stride: 2 for a layer that halves the size. zoom: 2
    for nearest x2 followed by a 3x3 convolution; before and after are then on the enlarged grid.
    """

    before: int = 0
    after: int = 0
    stride: int = 1
    zoom: int = 1

    def size(self, size: int) -> int:
        """Pixels of the output for `size` pixels of input."""
        return size * self.zoom // self.stride

    def needed(self, out: Span, size: int) -> Span:
        """The span of the input, of `size` in all, from which the span `out` of the output can be computed."""
        first, last = out[0] * self.stride - self.before, (out[1] - 1) * self.stride + self.after
        return max(0, first // self.zoom), min(size, last // self.zoom + 1)

    def given(self, source: Span, size: int) -> Span:
        """The span of the output that a layer computes from the span `source` of its input, of `size` in all."""
        start = 0 if source[0] == 0 else -(-(source[0] * self.zoom + self.before) // self.stride)
        if source[1] == size:
            return start, self.size(size)
        return start, (source[1] * self.zoom - 1 - self.after) // self.stride + 1

    def padding(self, border: Border) -> Padding:
        """What the layer pads where its region has these borders."""
        top, bottom, left, right = border
        return Padding(top * self.before, bottom * self.after, left * self.before, right * self.after)


POINT = Reach()
NEIGHBOURS = Reach(before=1, after=1)  # 3x3
ENLARGE = Reach(before=1, after=1, zoom=2)
HALVE_RIGHT = Reach(after=2, stride=2)  # 3x3 of stride 2, padded on the right and at the bottom
HALVE_BOTH = Reach(before=1, after=1, stride=2)


@dataclass(frozen=True, kw_only=True)
class Region:
    """Rows and columns of a frame."""

    rows: Span
    columns: Span

    @property
    def size(self) -> Size:
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    @property
    def area(self) -> int:
        return self.size[0] * self.size[1]

    def scaled(self, size: Size, to: Size) -> Region:
        """The same part of a frame of another size, where this one has `size`."""
        (top, bottom), (left, right) = self.rows, self.columns
        return Region(
            rows=(top * to[0] // size[0], bottom * to[0] // size[0]),
            columns=(left * to[1] // size[1], right * to[1] // size[1]),
        )

    def needed(self, reach: Reach, size: Size) -> Region:
        """What a layer must read of its input, of `size`, to give this."""
        return Region(rows=reach.needed(self.rows, size[0]), columns=reach.needed(self.columns, size[1]))

    def given(self, reach: Reach, size: Size) -> Region:
        """What a layer gives that reads this of its input, of `size`."""
        return Region(rows=reach.given(self.rows, size[0]), columns=reach.given(self.columns, size[1]))

    def border(self, size: Size) -> Border:
        """Which sides lie at the border of a frame of `size`."""
        (top, bottom), (left, right) = self.rows, self.columns
        return Border(top == 0, bottom == size[0], left == 0, right == size[1])

    def of(self, x: Tensor, whole: Region | None = None) -> Tensor:
        """This part of `x`, as a view; `x` shows `whole`, or the frame from its first pixel."""
        top, left = (0, 0) if whole is None else (whole.rows[0], whole.columns[0])
        if self.size == (x.shape[-2], x.shape[-1]):
            return x
        return x[..., self.rows[0] - top : self.rows[1] - top, self.columns[0] - left : self.columns[1] - left]


def full(size: Size) -> Region:
    """The whole of a frame."""
    return Region(rows=(0, size[0]), columns=(0, size[1]))


def sizes(reaches: Sequence[Reach], size: Size) -> list[Size]:
    """The size of the frame before every layer, and after the last."""
    out = [size]
    for reach in reaches:
        out.append((reach.size(out[-1][0]), reach.size(out[-1][1])))
    return out


def chain(reaches: Sequence[Reach], size: Size, out: Region) -> list[Region]:
    """The region needed before every layer, and `out` after the last; `size` is that of the first input."""
    regions = [out]
    for reach, at in zip(reversed(reaches), reversed(sizes(reaches, size)[:-1]), strict=True):
        regions.append(regions[-1].needed(reach, at))
    return regions[::-1]


def split(span: Span, longest: int) -> list[Span]:
    """As few spans of at most `longest` over `span` as there can be, all about equally long."""
    start, size = span[0], span[1] - span[0]
    count = -(-size // longest)
    return [(start + size * i // count, start + size * (i + 1) // count) for i in range(count)]


def grid(region: Region, tile: Size) -> list[Region]:
    """Tiles of at most `tile` = (height, width) over `region`, row by row."""
    rows, columns = split(region.rows, tile[0]), split(region.columns, tile[1])
    return [Region(rows=r, columns=c) for r in rows for c in columns]
