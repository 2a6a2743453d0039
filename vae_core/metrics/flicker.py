"""Flicker: what moves in a reconstruction and not in its original. In levels of 0 to 255, frame by frame."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .frames import check_pair
from .motion import LEVELS, optical_flow, warp

OCCLUDED_PIXELS = 1.0  # forward and backward flow that differ by more say that a pixel has no counterpart


@dataclass
class FlickerMeter:
    """Temporal change of a reconstruction against that of its original. Holds two frames.

    change: root mean square of the change of the error from each frame to the next: 0 where the error stands still,
    sqrt(2) sigma for noise of sigma that is new in every frame. excess: mean square of the reconstruction's change less
    that of the original; below 0 where motion is blurred away. One value per frame, NaN for the first.
    """

    change: list[float] = field(default_factory=list[float])
    excess: list[float] = field(default_factory=list[float])
    _last: tuple[Tensor, Tensor] | None = None

    def update(self, reconstruction: Tensor, original: Tensor) -> None:
        """Two (1, 3, t, h, w) chunks in [-1, 1]."""
        check_pair(reconstruction, original)
        for ours, theirs in zip(_levels(reconstruction), _levels(original), strict=True):
            if self._last is None:
                change, excess = math.nan, math.nan
            else:
                moved, truly = ours - self._last[0], theirs - self._last[1]
                change = float((moved - truly).square().mean().sqrt())
                excess = float(moved.square().mean() - truly.square().mean())
            self.change.append(change)
            self.excess.append(excess)
            self._last = ours, theirs

    @property
    def flicker(self) -> float:
        """Root mean square of `change` over the clip; NaN for one frame."""
        known = [value**2 for value in self.change if not math.isnan(value)]
        return math.sqrt(sum(known) / len(known)) if known else math.nan


@dataclass
class WarpMeter:
    """How badly each frame follows from the one before, by the motion of the original. Holds two frames.

    The motion is OpenCV's DIS optical flow of the original; pixels that are covered or uncovered are left out, found by
    flow forth and back. ours, theirs: root mean square difference of each frame to the moved one before, of the
    reconstruction and of the original. One value per frame, NaN for the first. Needs opencv-python-headless.
    """

    ours: list[float] = field(default_factory=list[float])
    theirs: list[float] = field(default_factory=list[float])
    _last: tuple[Tensor, Tensor] | None = None

    def update(self, reconstruction: Tensor, original: Tensor) -> None:
        """Two (1, 3, t, h, w) chunks in [-1, 1]."""
        check_pair(reconstruction, original)
        for ours, theirs in zip(_levels(reconstruction), _levels(original), strict=True):
            if self._last is None:
                self.ours.append(math.nan)
                self.theirs.append(math.nan)
            else:
                back, there = optical_flow(theirs, self._last[1]), optical_flow(self._last[1], theirs)
                seen = visible(back, there)
                self.ours.append(_masked(ours - warp(self._last[0], back), seen))
                self.theirs.append(_masked(theirs - warp(self._last[1], back), seen))
            self._last = ours, theirs

    @property
    def means(self) -> tuple[float, float]:
        """Means of `ours` and `theirs` over the clip; NaN for one frame."""
        return _mean(self.ours), _mean(self.theirs)


def visible(back: Tensor, there: Tensor) -> Tensor:
    """(h, w) bool: pixels whose flow there and back returns to where it began, within a pixel, and inside the frame."""
    height, width = back.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    at_x, at_y = x + back[0], y + back[1]
    inside = (at_x >= 0) & (at_x <= width - 1) & (at_y >= 0) & (at_y <= height - 1)
    return inside & ((back + warp(there, back)).square().sum(0).sqrt() <= OCCLUDED_PIXELS)


def _levels(video: Tensor) -> list[Tensor]:
    """Frames (3, h, w), 0..255, not rounded, on the CPU."""
    return list((video.detach().float().clamp(-1, 1).cpu() + 1).mul(LEVELS / 2)[0].unbind(1))


def _masked(difference: Tensor, seen: Tensor) -> float:
    count = int(seen.sum())
    return math.nan if not count else math.sqrt(float((difference.square().mean(0) * seen).sum()) / count)


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
