"""The seam meter: are the borders of tiles and chunks more visible than any other place?

It looks at the error, reconstruction minus original, so that edges of the picture do not count. At every border it
measures how much the error changes from one side to the other, and divides by the same change at places inside tiles
close by that are alike in all but the border: the same raster of 8 pixels, the same position in a group of four
frames. A decode without seams reads about 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..families import VIDEO, Compression
from ..nn.region import split
from ..run.tiling import Overlapping, TilePlan
from .frames import check_pair

LEAST = 1e-12
CLOSE = 4  # places inside, on either side of a border, that it is compared with


@dataclass(frozen=True, kw_only=True)
class Borders:
    """Where a decode was joined.

    rows, columns: (start, stop) of the pixels that two tiles share; start = stop where one ends and the next begins.
    frames: the first frame of every chunk but the first.
    """

    rows: tuple[tuple[int, int], ...] = ()
    columns: tuple[tuple[int, int], ...] = ()
    frames: tuple[int, ...] = ()


def tile_borders(grid: Overlapping, size: tuple[int, int]) -> Borders:
    """The borders of tiles of `grid`, in pixels, over a frame of (height, width)."""
    both: list[tuple[tuple[int, int], ...]] = []
    for side in size:
        spans = grid.spans(side)
        both.append(tuple((after[0], before[1]) for before, after in pairwise(spans)))
    return Borders(rows=both[0], columns=both[1])


def exact_borders(plan: TilePlan, size: tuple[int, int], compression: Compression) -> Borders:
    """The borders of exact strips or tiles, in pixels, over a frame of (height, width)."""
    rows, columns = (
        tuple((stop * compression.space, stop * compression.space) for _, stop in split((0, cells), tile or cells)[:-1])
        for cells, tile in zip(map(compression.cells, size), plan.sides, strict=True)
    )
    return Borders(rows=rows, columns=columns)


def chunk_borders(frames: int, *, first: int = 17, step: int = 16) -> tuple[int, ...]:
    """First frames of the chunks after the first; as given, those of CV-VAE."""
    return tuple(range(first, frames, step))


@dataclass(frozen=True, kw_only=True)
class SeamReading:
    """Ratios of the change at borders to the change inside; NaN where there is no border, or nothing to compare.

    line: from one pixel to the next. step: from one block of 8x8 pixels to the next, across what tiles share; it sees
    tiles that differ in brightness though their border is blended. time: from frame to frame. heat: (h/8, w/8), the
    change of the error across each block of 8x8 pixels, as far as tiles overlap; 1 is the picture's median.
    """

    line: float
    step: float
    time: float
    heat: Tensor

    @property
    def space(self) -> float:
        """The greater of `line` and `step`: the seam meter's number."""
        known = [value for value in (self.line, self.step) if not math.isnan(value)]
        return max(known) if known else math.nan


@dataclass
class _Pool:
    border: float = 0.0
    borders: int = 0
    inside: float = 0.0

    def add(self, values: Tensor, at_border: set[int], inside: set[int]) -> None:
        for index in at_border:
            alike = _nearest(inside, index)
            if alike:
                self.border += float(values[index])
                self.inside += sum(float(values[other]) for other in alike) / len(alike)
                self.borders += 1

    @property
    def ratio(self) -> float:
        return max(self.border, LEAST) / max(self.inside, LEAST) if self.borders else math.nan


@dataclass
class SeamMeter:
    """Add chunks of a clip in their order, then ask for the `reading`. Holds one frame and a few rows of numbers."""

    borders: Borders
    _lines: dict[int, Tensor] = field(default_factory=dict[int, Tensor])  # by dimension: change at every line
    _steps: dict[tuple[int, int], Tensor] = field(default_factory=dict[tuple[int, int], Tensor])
    _heat: Tensor | None = None
    _times: list[float] = field(default_factory=list[float])
    _last: Tensor | None = None
    _frames: int = 0

    def update(self, reconstruction: Tensor, original: Tensor) -> None:
        """Two (1, 3, t, h, w) chunks in [-1, 1]."""
        check_pair(reconstruction, original)
        error = (reconstruction.detach().float().clamp(-1, 1) - original.float().clamp(-1, 1)) / 2
        frames = error[0].transpose(0, 1).cpu()  # t c h w
        self._add_times(frames)
        blocks = F.avg_pool2d(frames, VIDEO.space)
        for dim, borders in ((-1, self.borders.columns), (-2, self.borders.rows)):
            if not borders:
                continue
            lines = _change(frames, 1, dim)
            self._lines[dim] = self._lines.get(dim, torch.zeros(())) + lines
            for lag in {_lag(border) for border in borders}:
                known = self._steps.get((dim, lag), torch.zeros(()))
                self._steps[dim, lag] = known + _change(blocks, lag, dim)
        heat = _heat(blocks, self.borders)
        self._heat = heat if self._heat is None else self._heat + heat
        self._frames += frames.shape[0]

    def _add_times(self, frames: Tensor) -> None:
        for frame in frames:
            change = math.nan if self._last is None else float((frame - self._last).square().mean().sqrt())
            self._times.append(change)
            self._last = frame

    @property
    def reading(self) -> SeamReading:
        """Over all chunks so far."""
        line, step, time = _Pool(), _Pool(), _Pool()
        for dim, borders in ((-1, self.borders.columns), (-2, self.borders.rows)):
            if dim not in self._lines:
                continue
            values = self._lines[dim]
            edges = {at - 1 for border in borders for at in border if 0 < at <= len(values)}
            line.add(values, edges, set(range(VIDEO.space - 1, len(values), VIDEO.space)) - edges)
            for lag in {_lag(border) for border in borders}:
                changes = self._steps[dim, lag]
                ours = [border for border in borders if _lag(border) == lag]
                at = {
                    border[0] // VIDEO.space - 1 for border in ours if 0 <= border[0] // VIDEO.space - 1 < len(changes)
                }
                step.add(changes, at, _inside(len(changes), lag, borders))
        known = {index for index in self.borders.frames if 0 < index < len(self._times)}
        alike = {
            i for i in range(1, len(self._times)) if i not in known and (i - min(known, default=0)) % VIDEO.time == 0
        }
        time.add(torch.tensor(self._times, dtype=torch.float64), known, alike)
        heat = torch.zeros(0, 0) if self._heat is None else self._heat
        middle = float(heat.median()) if heat.numel() else 0.0
        return SeamReading(line=line.ratio, step=step.ratio, time=time.ratio, heat=heat / max(middle, LEAST))


def _nearest(places: set[int], index: int) -> list[int]:
    """The nearest places before and after `index`: a picture has more detail here than there, so look close by."""
    before = sorted((place for place in places if place < index), reverse=True)
    after = sorted(place for place in places if place > index)
    return before[:CLOSE] + after[:CLOSE]


def _lag(border: tuple[int, int]) -> int:
    """Blocks from the last one before what two tiles share to the first after it."""
    return (border[1] - border[0]) // VIDEO.space + 1


def _inside(count: int, lag: int, borders: Sequence[tuple[int, int]]) -> set[int]:
    """Pairs of blocks (i, i + lag) with no part of a border between or under them."""
    free: set[int] = set()
    for index in range(count):
        start, stop = (index + 1) * VIDEO.space, (index + lag) * VIDEO.space
        if all(stop < first or start > last for first, last in borders):
            free.add(index)
    return free


def _change(frames: Tensor, lag: int, dim: int) -> Tensor:
    """Mean absolute change over `lag` along `dim`, summed over frames, for every place along `dim`."""
    length = frames.shape[dim] - lag
    if length < 1:
        return torch.zeros(0, dtype=torch.float64)
    change = (frames.narrow(dim, lag, length) - frames.narrow(dim, 0, length)).abs()
    other = -2 if dim == -1 else -1
    return change.mean((1, other)).double().sum(0)


def _heat(blocks: Tensor, borders: Borders) -> Tensor:
    """(h, w): how much the error changes across each block, summed over frames; as far across as tiles overlap."""
    heat = torch.zeros(blocks.shape[-2:])
    for dim, places in ((-1, borders.columns), (-2, borders.rows)):
        lag = max(map(_lag, places), default=1)
        index = torch.arange(blocks.shape[dim])
        before, after = ((index + shift).clamp(0, len(index) - 1) for shift in (-(lag // 2), lag - lag // 2))
        change = blocks.index_select(dim, after) - blocks.index_select(dim, before)
        heat += change.abs().mean(1).sum(0)
    return heat
