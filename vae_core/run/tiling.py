"""Ways to cut frames: exact tiles and strips, and the official tiles, which are blended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..nn.region import Region, Size, grid


@dataclass(frozen=True, kw_only=True)
class TilePlan:
    """Exact tiles: the result is that of whole frames to rounding, with no seams and nothing blended.

    tile: side of a tile in latents (8 pixels each), or (height, width), not counting what a tile must see around it; a
    width of None makes strips as wide as the frame. A frame is cut into as few tiles of at most this size as there can
    be, all about equally large.
    offload: what waits between tiles lies in RAM, not on the device: slower, and less memory on the device. For CV-VAE
    these are the activations of a whole chunk, for IV-VAE the frame that every causal convolution remembers.
    resident: with `offload`, so many bytes of it stay on the device all the same.
    Raises ValueError for sides below 1.
    """

    tile: int | tuple[int, int | None]
    offload: bool = False
    resident: int = 0

    def __post_init__(self) -> None:
        given: object = self.tile
        sides: tuple[object, ...] = tuple(given) if isinstance(given, (tuple, list)) else (given, given)  # type: ignore[reportUnknownArgumentType]
        whole = [isinstance(side, int) and not isinstance(side, bool) and side >= 1 for side in sides]
        if len(sides) == 2 and isinstance(given, (tuple, list)) and sides[1] is None:
            whole[1] = True
        if len(sides) != 2 or not all(whole):
            raise ValueError(
                f"A tile of {self.tile} latents was asked for; a side is a whole number of latents, at least 1 "
                "(8 pixels). Give one side such as tile=32, or (height, width)."
            )
        if isinstance(given, list):
            object.__setattr__(self, "tile", sides)

    @property
    def room(self) -> int | None:
        """Bytes that may wait on the device; None is any number."""
        return self.resident if self.offload else None

    @property
    def sides(self) -> tuple[int, int | None]:
        """(height, width) in latents; a width of None is that of the frame."""
        return (self.tile, self.tile) if isinstance(self.tile, int) else self.tile

    def count(self, size: Size) -> int:
        """Tiles of a frame of `size` latents."""
        height, width = self.sides
        return -(-size[0] // height) * (1 if width is None else -(-size[1] // width))

    def tiles(self, region: Region) -> list[Region]:
        """The tiles of a region of a frame, in latents."""
        height, width = self.sides
        return grid(region, (height, width or region.size[1]))


@dataclass(frozen=True, kw_only=True)
class StripPlan:
    """Whole frames, every step by itself in full-width strips: the result is that of whole frames to rounding.

    For families whose norms need the whole chunk, so that activations must wait between steps: CV-VAE and image VAEs.

    strips: how many a step is cut into; where frames are small it is fewer.
    room: bytes of what waits that stay on the device, the other rows lie in RAM; None is all of it.
    again: so many of the largest activations that are made of little, by a layer that enlarges or of the chunk itself,
    do not wait: they are computed again wherever they are read.
    Raises ValueError for less than one strip, or numbers below 0.
    """

    strips: int
    room: int | None = None
    again: int = 0

    def __post_init__(self) -> None:
        if self.strips < 1 or self.again < 0 or (self.room is not None and self.room < 0):
            raise ValueError(
                f"A plan of {self.strips} strips, {self.room} bytes on the device and {self.again} activations that "
                "are computed again was asked for; needed is at least one strip, and no number below 0."
            )

    def count(self, height: int) -> int:
        """Strips of a step that gives so many rows."""
        return max(1, min(self.strips, height // LEAST_ROWS))


@dataclass(frozen=True)
class ReferencePlan:
    """The tiling of the official CV-VAE code: overlapping tiles with linear blending. It is not seam-free.

    tile_px: side of a tile in pixels. overlap: fraction of a tile that it shares with the next, 0 to 0.5.
    Raises ValueError where tiles of pixels and tiles of latents would not line up.
    """

    tile_px: int = 576
    overlap: float = 0.2222

    def __post_init__(self) -> None:
        whole = type(self.tile_px) is int and self.tile_px >= SPACE and self.tile_px % SPACE == 0
        fits = whole and 0 <= self.overlap <= 0.5
        if not fits or self.pixels.overlap != SPACE * self.latents.overlap:
            raise ValueError(
                f"Tiles of {self.tile_px} px with overlap {self.overlap} do not line up in pixels and latents. "
                "Allowed are tile sides whose overlap is a whole number of latents: multiples of 72 with overlap "
                "0.2222 (the official 576), multiples of 32 with 0.25. The overlap lies between 0 and 0.5."
            )

    @property
    def pixels(self) -> Overlapping:
        return Overlapping(tile=self.tile_px, overlap=round(self.tile_px * self.overlap))

    @property
    def latents(self) -> Overlapping:
        tile = self.tile_px // SPACE
        return Overlapping(tile=tile, overlap=round(tile * self.overlap))


LEAST_ROWS = 4  # of a strip, which must see one more to either side

SPACE = 8  # pixels per latent in the official program


@dataclass(frozen=True, kw_only=True)
class Overlapping:
    """Tiles of side `tile` that share `overlap` with their neighbours, in pixels or in latents."""

    tile: int
    overlap: int

    @property
    def stride(self) -> int:
        return self.tile - self.overlap

    def spans(self, size: int) -> list[tuple[int, int]]:
        """(start, stop) of every tile over `size`; the last is cut at the edge."""
        spans = [(0, min(self.tile, size))]
        while spans[-1][1] < size:
            start = spans[-1][0] + self.stride
            spans.append((start, min(start + self.tile, size)))
        return spans


AnyPlan = TilePlan | StripPlan | ReferencePlan | None  # None: whole frames


def _blend(y: Tensor, neighbour: Tensor, dim: int) -> None:
    """Fade, in place, from `neighbour` (the last rows or columns of the tile before) to the start of `y`."""
    n = min(neighbour.shape[dim], y.shape[dim])
    start = y.narrow(dim, 0, n)
    ramp = torch.arange(n, device=y.device, dtype=y.dtype) / neighbour.shape[dim]
    ramp = ramp.view(-1, *(1,) * (-1 - dim))
    start.copy_(neighbour.narrow(dim, 0, n) * (1 - ramp) + start * ramp)


def run_blended(x: Tensor, run: Callable[[Tensor], Tensor], *, source: Overlapping, target: Overlapping) -> Tensor:
    """`run` on every tile of (..., h, w), blended into one tensor as the official code does.

    Each tile fades first from the one above, then from the one on the left, both as already blended.
    """
    rows, columns = source.spans(x.shape[-2]), source.spans(x.shape[-1])
    if len(rows) == len(columns) == 1:
        return run(x)
    out: Tensor | None = None
    above: list[Tensor] = []
    for i, (top, bottom) in enumerate(rows):
        left: Tensor | None = None
        edges: list[Tensor] = []
        for j, (start, stop) in enumerate(columns):
            y = run(x[..., top:bottom, start:stop])
            if above:
                _blend(y, above[j], -2)
            if left is not None:
                _blend(y, left, -1)
            if out is None:
                height, width = (n * target.tile // source.tile for n in x.shape[-2:])
                out = y.new_empty(*y.shape[:-2], height, width)
            left = y[..., y.shape[-1] - target.overlap :] if target.overlap else None
            if target.overlap:
                edges.append(y[..., y.shape[-2] - target.overlap :, :].clone())
            last_row, last_column = i == len(rows) - 1, j == len(columns) - 1
            keep = y[..., : None if last_row else target.stride, : None if last_column else target.stride]
            y0, x0 = i * target.stride, j * target.stride
            out[..., y0 : y0 + keep.shape[-2], x0 : x0 + keep.shape[-1]] = keep
        above = edges
    assert out is not None
    return out
