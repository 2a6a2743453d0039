"""What a video shows before it is trained on: where it is cut, and how much it moves between cuts."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor

from ..families import VIDEO
from ..metrics.motion import LEVELS, optical_flow

MOTION = 127  # the motion bucket of a clip that moves as much as clips usually do
LEAST_BUCKET, MOST_BUCKET = 1, 255  # that SVD knows
_LOOK = 256  # pixels, the shorter side on which motion is measured
_THUMB = 24  # pixels, the side of the square on which cuts are found: what moves changes it little
_CUT = 0.08  # of the whole range of brightness, the least by which a thumbnail changes at a cut
_SHARP = 4.0  # times the usual change around it
_AROUND = 6  # frames on either side that say what is usual


@dataclass(frozen=True, kw_only=True)
class Look:
    """A video looked through. changes: of the thumbnail from each frame to the next. moves: mean length of the optical
    flow from frame `4 k` to `4 (k + 1)`, in shares of the shorter side; none where OpenCV is missing.
    """

    frames: int
    changes: Sequence[float]
    moves: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class ClipSpan:
    """Frames of a video without a cut. motion: see `Look`, per 4 frames; None where it was not measured."""

    start: int
    frames: int
    motion: float | None


def look_through(frames: Iterable[Tensor], *, every: int = 1) -> Look:
    """One pass over frames (1, 3, t, h, w) in [-1, 1], of which two are held.

    every: frames of the video from one of these to the next, 1 or 4.
    """
    count, changes, moves = 0, list[float](), list[float]()
    has_flow = importlib.util.find_spec("cv2") is not None
    thumb: Tensor | None = None
    looked: Tensor | None = None
    for chunk in frames:
        for frame in chunk[0].unbind(1):
            small = F.adaptive_avg_pool2d(frame.float().clamp(-1, 1), _THUMB)
            if thumb is not None:
                changes.append(float((small - thumb).abs().mean()) / 2)
            thumb = small
            if has_flow and count * every % VIDEO.time == 0:
                here = _look(frame)
                if looked is not None:
                    moves.append(float(optical_flow(looked, here).square().sum(0).sqrt().mean()) / min(here.shape[1:]))
                looked = here
            count += 1
    return Look(frames=count, changes=changes, moves=moves)


def cuts_of(changes: Sequence[float]) -> list[int]:
    """The frames that begin a new scene: they differ from the one before far more than their neighbours do.

    Fades are no cuts here.
    """
    cuts: list[int] = []
    for index, change in enumerate(changes):
        around = [*changes[max(0, index - _AROUND) : index], *changes[index + 1 : index + 1 + _AROUND]]
        usual = statistics.median(around) if around else 0.0
        if change > max(_CUT, _SHARP * usual):
            cuts.append(index + 1)
    return cuts


def spans_of(look: Look, frames: int) -> list[ClipSpan]:
    """The clips of a video, 4n + 1 frames each and `frames` at most, none across a cut, five frames at least."""
    spans: list[ClipSpan] = []
    for start, stop in pairwise([0, *cuts_of(look.changes), look.frames]):
        count = (min(frames, stop - start) - 1) // VIDEO.time * VIDEO.time + 1
        if count < 1 + VIDEO.time:
            continue
        spans += [
            ClipSpan(start=first, frames=count, motion=_motion(look, first, count))
            for first in range(start, stop - count + 1, count)
        ]
    return spans


def beginning_of(look: Look, latents: int) -> ClipSpan:
    """The first `latents` of a look at one picture for each latent, or as many as lie before the first cut.

    What follows a cut cannot be used: the first latent of a clip stands for one frame, all others for four.
    """
    count = min([look.frames, latents, *cuts_of(look.changes)])
    inside = look.moves[: count - 1]
    return ClipSpan(start=0, frames=count, motion=statistics.fmean(inside) if inside else None)


def buckets_of(motions: Sequence[float | None]) -> list[int]:
    """Motion buckets of clips, of how much each moves per second.

    How SVD's makers numbered motion was never published. So the clip in the middle is told 127, what samplers tell by
    default, and others in proportion.
    """
    measured = [motion for motion in motions if motion is not None]
    usual = statistics.median(measured) if measured else 0.0
    buckets: list[int] = []
    for motion in motions:
        told = MOTION if motion is None or not usual else round(MOTION * motion / usual)
        buckets.append(min(max(told, LEAST_BUCKET), MOST_BUCKET))
    return buckets


def _motion(look: Look, start: int, frames: int) -> float | None:
    inside = look.moves[-(-start // VIDEO.time) : (start + frames - 1) // VIDEO.time]
    return statistics.fmean(inside) if inside else None


def _look(frame: Tensor) -> Tensor:
    """(3, h, w) in [-1, 1] to levels of 0 to 255, the shorter side at most 256 pixels."""
    scale = min(1.0, _LOOK / min(frame.shape[-2:]))
    size = [max(16, round(side * scale)) for side in frame.shape[-2:]]
    small = F.interpolate(frame[None].float(), size, mode="bilinear", antialias=True, align_corners=False)[0]
    return (small.clamp(-1, 1) + 1) * (LEVELS / 2)
