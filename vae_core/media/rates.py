"""Frames per second: exact from rounded time stamps, and the way from uneven times to even ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from statistics import median_low

from ..errors import VideoError

HALF = Fraction(1, 2)
USUAL = tuple(
    sorted(
        [Fraction(n) for n in (5, 8, 10, 12, 15, 16, 18, 20, 24, 25, 30, 48, 50, 60, 72, 90, 100, 120, 144, 240)]
        + [Fraction(n * 1000, 1001) for n in (24, 30, 48, 60, 120, 240)]
        + [Fraction(15000, 1001), Fraction(12000, 1001), Fraction(25, 2), Fraction(15, 2)]
    )
)
_NEAR = Fraction(1, 2000)  # of a rate: closer than this, a usual one is meant (23.976 and 24 are twice as far apart)
_FASTEST = Fraction(1000)
_STUMBLES = Fraction(1, 25)  # of the frames
_MOST_FRAMES = 10**7  # of an even grid


def snapped(rate: Fraction) -> Fraction:
    """The usual rate that is meant by `rate`, such as 60000/1001 by 19001/317; else itself."""
    nearest = min(USUAL, key=lambda usual: abs(usual - rate))
    return nearest if abs(nearest - rate) <= nearest * _NEAR else rate


def constant_rate(
    stamps: Sequence[int], unit: Fraction, said: Sequence[Fraction], end: int | None = None
) -> tuple[Fraction, bool]:
    """The rate of frames shown at `stamps` (in `unit` seconds), and whether they keep to it within half a frame.

    said: rates that the container names, most trusted first; one of them is taken where the stamps are its even grid,
    rounded to units. end: when the last frame ends, where the file is sure of that. For uneven frames: the rate of the
    usual distance.
    """
    said = [snapped(rate) for rate in said if 0 < rate <= _FASTEST]
    if len(stamps) < 2:
        return (1 / ((end - stamps[0]) * unit) if end is not None else said[0] if said else Fraction(25)), True
    span = (stamps[-1] - stamps[0]) * unit
    mean = (len(stamps) - 1) / span
    if end is not None:
        mean = len(stamps) / ((end - stamps[0]) * unit)
    near = [usual for usual in USUAL if abs(usual - mean) <= usual / 100]
    for rate in (*said, *sorted(near, key=lambda usual: abs(usual - mean))):
        if _is_grid(stamps, unit, rate) and (
            end is None or abs(len(stamps) / rate - len(stamps) / mean) <= Fraction(1, 500)
        ):
            return rate, True
    candidates = [mean] if end is not None else [*said, mean]
    for rate in candidates:
        if keeps_to(stamps, unit, rate):
            return (rate if rate in said else snapped(rate)).limit_denominator(10**6), True
    usual = median_low([later - earlier for earlier, later in itertools.pairwise(stamps)]) * unit
    rounding = max(unit / usual, Fraction(1, 100))
    for rate in (*said, *sorted(USUAL, key=lambda rate: abs(rate * usual - 1))):
        if abs(rate * usual - 1) <= rounding:
            return rate, False
    return min((1 / usual).limit_denominator(1001), _FASTEST), False


def keeps_to(stamps: Sequence[int], unit: Fraction, rate: Fraction) -> bool:
    """Whether frames are no more than half a frame away from the even grid of `rate`.

    A few may be up to two frames away: MPEG program streams time only some of their frames, and stumble over others.
    """
    away = furthest(stamps, unit, rate) * rate
    return away <= HALF or (away <= 2 and len(off_grid(stamps, unit, rate)) <= len(stamps) * _STUMBLES)


def off_grid(stamps: Sequence[int], unit: Fraction, rate: Fraction) -> list[int]:
    """The frames that are more than half a frame away from the even grid of `rate`."""
    step = 1 / (rate * unit)
    return [n for n, stamp in enumerate(stamps) if abs(stamp - stamps[0] - n * step) > step / 2]


def is_variable(times: Sequence[Fraction], fps: Fraction) -> bool:
    """Whether these frame times (seconds) leave the even grid of `fps` by more than half a frame anywhere."""
    return any(abs((time - times[0]) * fps - index) > HALF for index, time in enumerate(times))


def on_grid(times: Sequence[Fraction], end: Fraction, fps: Fraction, first: int = 0) -> list[int]:
    """For each frame of an even grid from times[0] up to `end`, the number of the frame that is shown then.

    first: number of the frame at times[0]. Each frame goes to the nearest place of the grid and is shown up to that of
    the next one; of two frames at one place, the later one is shown. Raises VideoError for more than 10^7 frames.
    """
    places = [round((time - times[0]) * fps) for time in times]
    length = max(places[-1] + 1, round((end - times[0]) * fps))
    if length > _MOST_FRAMES:
        raise VideoError(
            f"{len(times)} frames are said to be shown over {float(end - times[0]):g} s, which is {length} frames at "
            f"{float(fps):g} per second; {_MOST_FRAMES} are the most. The time stamps are damaged: use fewer frames."
        )
    shown = [first] * length
    for number, place in enumerate(places):
        stop = places[number + 1] if number + 1 < len(places) else length
        shown[place:stop] = [first + number] * (stop - place)
    return shown


def _is_grid(stamps: Sequence[int], unit: Fraction, rate: Fraction) -> bool:
    """Whether the stamps are what an even grid gives when it is rounded to units, which may be as long as a frame."""
    return furthest(stamps, unit, rate) <= min(unit * Fraction(101, 100), HALF / rate)


def furthest(stamps: Sequence[int], unit: Fraction, rate: Fraction) -> Fraction:
    """The largest distance, in seconds, of a frame from its place in an even grid that begins at the first."""
    step, base = 1 / (rate * unit), stamps[0]
    top, bottom = step.numerator, step.denominator
    furthest = max(abs((stamp - base) * bottom - index * top) for index, stamp in enumerate(stamps))
    return Fraction(furthest, bottom) * unit
