"""Which windows the model sees in one step, and how much each latent counts: pure functions, without ComfyUI."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .windows import count_spans, plan_spans

FUSES = ("pyramid", "overlap-linear", "random")


@dataclass(frozen=True, kw_only=True)
class Window:
    """What the model sees at once. latents: their numbers, in its order. weights: over all windows, those of a latent
    sum to one. place: the positions in time that a time offset tells; they go on past the end of a loop.
    """

    latents: tuple[int, ...]
    weights: Tensor
    places: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a clip is cut into windows.

    length: latents of a window. overlap: latents that neighbours share, at least. fuse: "pyramid" trusts the middle of
    a window most; "overlap-linear" cross-fades where windows overlap; "random" cuts there, in every step elsewhere.
    moving: whether windows lie elsewhere in every step. loop: whether the clip ends where it begins.
    """

    length: int
    overlap: int
    fuse: str
    moving: bool
    loop: bool

    def windows(self, latents: int, step: int, seed: int, *, wide: bool = False) -> list[Window]:
        """The windows of one step, every latent in at least one. wide: they take every other latent."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        rows = [range(phase, latents, 2) for phase in range(2)] if wide and latents > 2 else [range(latents)]
        return [window for row in rows for window in self._of_row(row, step, generator)]

    def most_windows(self, latents: int) -> int:
        """Windows of a step at most."""
        if self.loop:
            return len(self._starts(latents, 0)[0])
        return count_spans(latents, self.length, self.overlap) + (self.moving and latents > self.length)

    def _of_row(self, row: range, step: int, generator: torch.Generator) -> list[Window]:
        """The windows over the latents `row`. One that sticks out is moved inside and keeps its weights: there it is
        trusted no further than before, so that its other end, which is the same in many steps, is no seam.
        """
        starts, length = self._starts(len(row), step)
        weights: dict[int, Tensor] = {}
        for start, weight in zip(starts, _weights(starts, length, len(row), self, generator), strict=True):
            inside = start if self.loop else min(max(start, 0), len(row) - length)
            weights[inside] = weights[inside] + weight if inside in weights else weight
        out: list[Window] = []
        for start, weight in weights.items():
            where = [(start + index) % len(row) for index in range(length)]
            if weight.any():
                places = tuple(row[0] + (start + index) * row.step for index in range(length))
                out.append(Window(latents=tuple(row[index] for index in where), weights=weight[where], places=places))
        return out

    def _starts(self, latents: int, step: int) -> tuple[list[int], int]:
        """(first latents of the windows in order, their length); without a loop some may stick out."""
        length, stride = min(self.length, latents), self.length - self.overlap
        if self.loop:
            # two at least: where one window ends, another has its middle
            count = min(latents, max(2, -(-latents // stride)))
            shift = _shift(step, -(-latents // count)) if self.moving else 0
            return [index * latents // count + shift for index in range(count)], length
        if latents <= self.length:
            return [0], length
        if not self.moving:
            return [span.start for span in plan_spans(latents, self.length, self.overlap)], length
        return list(range(_shift(step, stride) - stride, latents - length + stride, stride)), length


def _shift(step: int, stride: int) -> int:
    """0 to stride - 1: in `stride` steps each once, those of neighbouring steps far apart."""
    if stride < 3:
        return step % max(1, stride)
    golden = max(1, round(stride * 0.618))
    jump = next(way for way in range(golden, golden + stride) if math.gcd(way, stride) == 1)
    return step * jump % stride


def _weights(
    starts: Sequence[int], length: int, latents: int, schedule: Schedule, generator: torch.Generator
) -> list[Tensor]:
    """(latents,) for each window: how much it counts for each latent of the clip."""
    if schedule.fuse == "random":
        shapes = _cut_shapes(starts, length, latents, loop=schedule.loop, generator=generator)
    else:
        shapes = [_shape(starts, index, length, latents, schedule) for index in range(len(starts))]
    out = [torch.zeros(latents) for _ in starts]
    for weight, start, shape in zip(out, starts, shapes, strict=True):
        where = start + torch.arange(length)
        inside = torch.ones(length, dtype=torch.bool) if schedule.loop else (where >= 0) & (where < latents)
        weight[where[inside] % latents] = shape[inside]
    total = torch.stack(out).sum(0)
    return [weight / total for weight in out]


def _shape(starts: Sequence[int], index: int, length: int, latents: int, schedule: Schedule) -> Tensor:
    """The weights of one window before they are brought to a sum of one."""
    rising = torch.arange(1.0, length + 1)
    falling = rising.flip(0)
    if schedule.fuse == "pyramid":
        return torch.minimum(rising, falling)
    before, after = (starts[index] - starts[index - 1]), (starts[(index + 1) % len(starts)] - starts[index])
    if schedule.loop:
        before, after = before % latents or latents, after % latents or latents
    shared_before = length - before if index or schedule.loop else 0
    shared_after = length - after if index + 1 < len(starts) or schedule.loop else 0
    weight = torch.minimum(torch.ones(length), rising / (max(0, shared_before) + 1))
    return torch.minimum(weight, falling / (max(0, shared_after) + 1))


def _cut_shapes(
    starts: Sequence[int], length: int, latents: int, *, loop: bool, generator: torch.Generator
) -> list[Tensor]:
    """1 for the latents that a window has to itself, 0 for others: cuts lie anywhere in the overlaps."""
    cuts: list[int] = []  # the first latent that belongs to a window rather than to the one before
    for index, start in enumerate(starts):
        if not index and not loop:
            cuts.append(start)
            continue
        stop = starts[index - 1] + length - (0 if index else latents)  # of the window before
        least = max([start, *cuts[-1:]])
        drawn = least + int(torch.randint(max(1, stop - least + 1), (1,), generator=generator))
        round_trip = [first + latents for first in cuts[:1] if loop]
        cuts.append(min([drawn, start + length - 1, *round_trip]))
    ends = [*cuts[1:], cuts[0] + latents if loop else latents]
    weights = []
    for start, cut, end in zip(starts, cuts, ends, strict=True):
        index = start + torch.arange(length)
        weights.append(((index >= cut) & (index < end)).float())
    return weights
