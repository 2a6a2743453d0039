"""Which part of a frame a tile needs, layer by layer: pure arithmetic on spans, one axis at a time.

A tile owns a span of latents. To compute it exactly, a layer must be given what its convolution reads around that span,
and at the border of the frame nothing more, so that the layer pads there as it does for a whole frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

Span = tuple[int, int]  # (start, stop)


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What a layer reads around the outputs it is asked for, in its own pixels.

    zoom: 1 for a layer that keeps the size, 2 for nearest x2 with a 3x3 convolution behind it. before, after: pixels
    read on each side, on the output's grid. halve: a 3x3 convolution of stride 2; `before` and `after` are then what
    it reads beside each pair of input pixels, (0, 1) or (1, 0).
    """

    before: int = 0
    after: int = 0
    zoom: int = 1
    halve: bool = False

    def needed(self, out: Span, size: int) -> Span:
        """The span of the input, of `size` in all, from which the span `out` of the output can be computed."""
        start, stop = out
        if self.halve:  # an even start, so that the stride falls on the same pixels as in the whole frame
            start, stop = 2 * (start - self.before), 2 * stop + self.after
        else:
            start, stop = (start - self.before) // self.zoom, -(-(stop + self.after) // self.zoom)
        return max(0, start), min(size, stop)

    def covered(self, given: Span) -> Span:
        """The span of the output that the layer computes from the span `given` of its input; its rim may be wrong."""
        start, stop = given
        return (start // 2, stop // 2) if self.halve else (start * self.zoom, stop * self.zoom)

    def out_size(self, size: int) -> int:
        return size // 2 if self.halve else size * self.zoom


def same(margin: int) -> Reach:
    """A layer that keeps the size and reads `margin` pixels on every side."""
    return Reach(before=margin, after=margin)


ENLARGE = Reach(before=1, after=1, zoom=2)
HALVE_RIGHT = Reach(after=1, halve=True)  # reads one pixel beyond each pair, on the right and at the bottom
HALVE_LEFT = Reach(before=1, halve=True)


def sizes(reaches: Sequence[Reach], size: int) -> list[int]:
    """The size in front of every layer, and behind the last."""
    out = [size]
    for reach in reaches:
        out.append(reach.out_size(out[-1]))
    return out


def chain(reaches: Sequence[Reach], size: int, out: Span) -> list[Span]:
    """The span needed in front of every layer, and `out` behind the last; `size` is that of the first input."""
    spans = [out]
    for reach, at in zip(reversed(reaches), reversed(sizes(reaches, size)[:-1]), strict=True):
        spans.append(reach.needed(spans[-1], at))
    return spans[::-1]


def scaled(span: Span, factor: int) -> Span:
    return span[0] * factor, span[1] * factor


@dataclass(frozen=True, kw_only=True)
class Region:
    """Rows and columns of a frame."""

    rows: Span
    columns: Span

    @property
    def height(self) -> int:
        return self.rows[1] - self.rows[0]

    @property
    def width(self) -> int:
        return self.columns[1] - self.columns[0]

    @property
    def area(self) -> int:
        return self.height * self.width

    def scaled(self, factor: int) -> Region:
        """The same part of a frame that is `factor` times as large."""
        return Region(rows=scaled(self.rows, factor), columns=scaled(self.columns, factor))

    def needed(self, reach: Reach, size: tuple[int, int]) -> Region:
        return Region(rows=reach.needed(self.rows, size[0]), columns=reach.needed(self.columns, size[1]))

    def covered(self, reach: Reach) -> Region:
        return Region(rows=reach.covered(self.rows), columns=reach.covered(self.columns))

    def of(self, x: Tensor, whole: Region | None = None) -> Tensor:
        """This part of `x`, as a view; `x` shows `whole`, or the frame from its first pixel."""
        top, left = (0, 0) if whole is None else (whole.rows[0], whole.columns[0])
        return x[..., self.rows[0] - top : self.rows[1] - top, self.columns[0] - left : self.columns[1] - left]


def full(size: tuple[int, int]) -> Region:
    """The whole of a frame of `size` = (height, width)."""
    return Region(rows=(0, size[0]), columns=(0, size[1]))


def chain_regions(reaches: Sequence[Reach], size: tuple[int, int], out: Region) -> list[Region]:
    """`chain` for rows and columns together."""
    rows, columns = chain(reaches, size[0], out.rows), chain(reaches, size[1], out.columns)
    return [Region(rows=r, columns=c) for r, c in zip(rows, columns, strict=True)]


def split(span: Span, tile: int) -> list[Span]:
    """As few spans of at most `tile` over `span` as there can be, all about equally long."""
    start, size = span[0], span[1] - span[0]
    count = -(-size // tile)
    return [(start + size * i // count, start + size * (i + 1) // count) for i in range(count)]


def grid(region: Region, tile: tuple[int, int]) -> list[Region]:
    """Tiles of at most `tile` = (height, width) over `region`, row by row."""
    rows, columns = split(region.rows, tile[0]), split(region.columns, tile[1])
    return [Region(rows=r, columns=c) for r in rows for c in columns]
