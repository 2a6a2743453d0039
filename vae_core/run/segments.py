"""The steps of a network cut where activations must wait, and into how many strips such a segment is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..nn.region import Region, Size, chain, sizes
from ..nn.steps import Step
from .tiling import StripPlan, TilePlan

STRIPS_ABOVE = 320 * 2**20  # bytes of a step's activations from which on a whole frame runs in strips
STRIP_BYTES, MOST_STRIPS = 256 * 2**20, 6


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Steps that run in a row, in runs that begin and end outside of any skip. sizes: of the frame before every step
    and after the last."""

    steps: tuple[Step, ...]
    sizes: tuple[Size, ...]

    @property
    def whole(self) -> bool:
        return self.steps[0].whole

    @property
    def waits(self) -> bool:
        return self.steps[0].waits and not self.whole

    def regions(self, core: Region, latent: Size) -> list[Region]:
        """What a tile that owns `core` of a frame of `latent` needs before every step, and what it gives."""
        return chain([step.reach for step in self.steps], self.sizes[0], core.scaled(latent, self.sizes[-1]))


def segments(steps: Sequence[Step], size: Size) -> list[Segment]:
    """The steps cut at every point of waiting, and where such a skip ends, over frames of `size` that go in."""
    at = sizes([step.reach for step in steps], size)
    cuts = {0, len(steps)}
    for i, step in enumerate(steps):
        if step.waits and not step.whole:
            cuts |= {i, i + 1}
        if i and step.whole != steps[i - 1].whole:
            cuts.add(i)
    return [Segment(steps=tuple(steps[a:b]), sizes=tuple(at[a : b + 1])) for a, b in pairwise(sorted(cuts))]


def strips(segment: Segment, plan: TilePlan | StripPlan | None, nbytes: int) -> int:
    """Into how many a segment is cut that runs over whole frames, for what it reads of `nbytes`."""
    height = segment.sizes[-1][0]
    if isinstance(plan, StripPlan):
        return plan.count(height)
    count = min(MOST_STRIPS, -(-nbytes // STRIP_BYTES)) if segment.waits and nbytes > STRIPS_ABOVE else 1
    return min(count, height)


def made_again(found: Sequence[Segment], count: int) -> set[int]:
    """Which segments give the `count` largest activations that are made of little, by the number of their pixels."""
    small = [
        i
        for i, (segment, following) in enumerate(pairwise(found))
        if not segment.whole
        and not segment.waits
        and following.waits
        and (i == 0 or segment.sizes[-1][0] > segment.sizes[0][0])
    ]
    return set(sorted(small, key=lambda i: found[i].sizes[-1])[len(small) - min(count, len(small)) :])
