"""When each frame of a video is shown: pure arithmetic on what a decoder gave and what the packets had announced."""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from statistics import median_low
from typing import NamedTuple

from ..errors import VideoError
from .rates import constant_rate, furthest, off_grid, on_grid

_ROUNDED = Fraction(1, 500)  # seconds
Shifts = tuple[tuple[int, Fraction], ...]  # (number of a packet, seconds by which it and those after it are moved)
_LATER = (
    0.25  # of a frame: what lies closer to a picture than this is no picture of its own, where something is damaged
)
_ALONE = 0.75  # the same, where nothing says that the file is damaged: a second field, a frame that is never shown


class Announced(NamedTuple):
    """A packet that should become a picture: when it is shown and for how long, in units of its stream."""

    stamp: int | None
    duration: int


class Picture(NamedTuple):
    """A picture that the decoder gave. flawed: it says that parts of it are not decoded. key: refers to no other."""

    stamp: int | None
    flawed: bool
    size: tuple[int, int]  # height, width as stored
    key: bool = True


class Resized(NamedTuple):
    """Where the picture changes size: sizes are (height, width) as stored."""

    frame: int
    before: tuple[int, int]
    after: tuple[int, int]

    def words(self) -> str:
        """The end of a sentence that begins with the name of the file."""
        return (
            f"changes from {self.before[1]}x{self.before[0]} to {self.after[1]}x{self.after[0]} at frame {self.frame}; "
            "one size is needed: use the frames before it, or convert it first."
        )


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The frames of a file from its first picture on, and when each is shown.

    stamps: of the frames, ascending, in `unit` seconds on the file's clock; where its time stamps start again, the
    clock goes on. end: when the last frame ends. pictures: for each frame the number of its picture, in the order of
    decoding. missing: frames that have none and show the one before. flawed: frames with errors in them. lead: pictures
    before the first frame that cannot be shown, for the file begins within a group of pictures. cut: frames that the
    file announces after its end. fps: frames per second; where the frames are not evenly spaced, of the usual distance.
    even: whether they are. shifts: by number of the stream.
    """

    unit: Fraction
    stamps: array[int]
    end: int
    pictures: array[int]
    missing: tuple[int, ...] = ()
    flawed: tuple[int, ...] = ()
    lead: int = 0
    cut: int = 0
    fps: Fraction
    even: bool
    resized: Resized | None = None
    whole: bool = True
    interlaced: bool = False
    threads: bool = True
    why: str = ""
    shifts: Mapping[int, Shifts] = field(default_factory=dict[int, Shifts])

    def __len__(self) -> int:
        return len(self.stamps)

    def time(self, frame: int) -> Fraction:
        """When frame `frame` is shown, in seconds; of the number after the last, when the video ends."""
        return (self.end if frame >= len(self.stamps) else self.stamps[frame]) * self.unit

    def times(self, start: int = 0, stop: int | None = None) -> list[Fraction]:
        """When the frames from `start` to `stop` - 1 are shown, in seconds."""
        return [stamp * self.unit for stamp in self.stamps[start:stop]]

    def on_time(self, start: int = 0, stop: int | None = None) -> bool:
        """Whether the frames from `start` to `stop` - 1 are 1 / fps apart, but for what a container may round."""
        return furthest(self.stamps[start:stop], self.unit, self.fps) <= _ROUNDED

    def damaged(self, start: int = 0, stop: int | None = None) -> list[int]:
        """The missing and flawed frames from `start` to `stop` - 1."""
        stop = len(self) if stop is None else stop
        return sorted(frame for frame in (*self.missing, *self.flawed) if start <= frame < stop)

    def check(self, path: object, start: int, stop: int) -> None:
        """Raise VideoError, with the ranges that can be used, where a frame from `start` to `stop` - 1 is damaged."""
        damaged = self.damaged(start, stop)
        if not damaged:
            return
        counts = [(len([frame for frame in self.missing if start <= frame < stop]), "is missing", "are missing")]
        counts += [(len(damaged) - counts[0][0], "has errors in it", "have errors in them")]
        words = " and ".join(f"{n} {one if n == 1 else more}" for n, one, more in counts if n)
        runs = _free_runs(damaged, start, stop)
        best = max(runs, key=len, default=None)
        usable = "none between can be used" if best is None else f"frames {_span(runs[0])} can be used"
        longest = f" and, the most, {_span(best)}" if best is not None and best is not runs[0] else ""
        choice = "" if best is None else f" (--start {best.start} --frames {len(best)})"
        raise VideoError(
            f"{path}: is damaged from frame {damaged[0]} on{f' ({self.why})' if self.why else ''}: of frames "
            f"{start} to {stop - 1}, {words}; {usable}{longest}{choice}. With --skip-damage (skip_damage on a node) "
            "the frame before stands in for what is missing."
        )

    def told(self, start: int = 0, stop: int | None = None) -> list[str]:
        """What a user should know of these frames, as ends of sentences that begin with the name of the file."""
        stop = len(self) if stop is None else min(stop, len(self))
        missing = sum(start <= frame < stop for frame in self.missing)
        flawed = sum(start <= frame < stop for frame in self.flawed)
        said: list[str] = []
        if self.lead and not start:
            said.append(
                f"begins within a group of pictures: its first {_frames(self.lead)} cannot be decoded, and it is used "
                f"from {float(self.time(0)):.3f} s on its own clock on"
            )
        if missing:
            said.append(f"is damaged: {_frames(missing)} {'is' if missing == 1 else 'are'} missing, and the one before "
                        "stands in")  # fmt: skip
        if flawed:
            said.append(f"is damaged: {_frames(flawed)} {'has' if flawed == 1 else 'have'} errors")
        if self.cut and stop == len(self):
            said.append(f"is cut short: {_frames(self.cut)} at its end {'is' if self.cut == 1 else 'are'} missing")
        joins = next(iter(self.shifts.values()), ())
        if joins:
            said.append(
                f"has time stamps that start again {_often(len(joins))}: its sections are joined one after another"
            )
        return said

    def resampled(self, fps: Fraction, start: int = 0, stop: int | None = None) -> list[int]:
        """For each frame of a video of constant rate, the number of the frame to show, so that times stay.

        From the time of frame `start` on, up to that of frame `stop`.
        """
        stop = len(self) if stop is None else min(stop, len(self))
        return on_grid(self.times(start, stop), self.time(stop), fps, start)


def build(
    announced: Iterable[Announced],
    pictures: Sequence[Picture],
    *,
    unit: Fraction,
    rates: Sequence[Fraction],
    errors: str = "",
    lacking: int = 0,
    hidden: bool = False,
    whole: bool = True,
    ends: bool = False,
    interlaced: bool = False,
    threads: bool = True,
    shifts: Mapping[int, Shifts] | None = None,
) -> Timeline | None:
    """The timeline of what was announced and decoded; None where there is no picture.

    rates: what the container says, most trusted first. errors: what the decoder complained of. lacking: packets that
    the container's index names and the file lacks. hidden: the codec has packets that are never shown. whole: up to the
    end of the file. ends: the duration of the last frame is a part of the content, as in GIF.
    """
    if not pictures:
        return None
    packets = list(announced)
    sound = [number for number, picture in enumerate(pictures) if not picture.flawed] or list(range(len(pictures)))
    first = sound[0]  # what comes before refers to pictures that are not there
    trusted = any(not picture.flawed for picture in pictures)
    stamps = _ascending([picture.stamp for picture in pictures[first:]], unit, rates)
    numbered = any(picture.stamp is None for picture in pictures)
    usual = _usual(stamps, unit, rates)
    known = sorted(packet.stamp for packet in packets if packet.stamp is not None)
    evidence = bool(errors) or any(picture.flawed for picture in pictures[first:])
    lead, after, lost = first, 0, list[int]()
    if known and not numbered and (evidence or not hidden):
        seen = {picture.stamp for picture in pictures}
        near = usual * (_LATER if evidence else _ALONE)
        alone = [stamp for stamp in known if stamp not in seen and _distance(stamps, stamp) >= near]
        lead += sum(stamp < stamps[0] for stamp in alone)
        after = sum(stamp > stamps[-1] for stamp in alone) if whole else 0
        lost = [stamp for stamp in alone if stamps[0] < stamp < stamps[-1]]
    elif evidence and not known:
        lost = _gaps(stamps, usual)
    frames = sorted([*((stamp, first + n) for n, stamp in enumerate(stamps)), *((stamp, -1) for stamp in lost)])
    numbers = array("q", (number for _, number in frames))
    last = {packet.stamp: packet.duration for packet in packets}.get(stamps[-1], 0)
    placed = array("q", (stamp for stamp, _ in frames))
    end = placed[-1] + (last if ends and last > 0 else 0)
    fps, even = constant_rate(placed, unit, rates, end if end > placed[-1] else None)
    for frame in off_grid(placed, unit, fps) if even else ():
        placed[frame] = placed[0] + round(frame / (fps * unit))
    if end <= placed[-1]:
        end = placed[-1] + max(1, last if not even and last > 0 else round(1 / fps / unit))
    size = pictures[first].size
    changes = ((frame, pictures[n].size) for frame, n in enumerate(numbers) if n >= 0 and pictures[n].size != size)
    resized = next((Resized(frame, size, other) for frame, other in changes), None)
    return Timeline(
        unit=unit,
        stamps=placed,
        end=end,
        pictures=numbers,
        missing=tuple(frame for frame, number in enumerate(numbers) if number < 0),
        flawed=_flawed(numbers, pictures) if trusted else (),
        lead=lead,
        cut=after + lacking if whole else 0,
        fps=fps,
        even=even,
        resized=resized,
        whole=whole,
        interlaced=interlaced,
        threads=threads,
        why=errors,
        shifts=shifts or {},
    )


def _flawed(numbers: Sequence[int], pictures: Sequence[Picture]) -> tuple[int, ...]:
    """Frames from one with errors, or a missing one, up to the next that refers to no other."""
    found: list[int] = []
    spoilt = False
    for frame, number in enumerate(numbers):
        picture = pictures[number] if number >= 0 else None
        spoilt = picture is None or picture.flawed or (spoilt and not picture.key)
        if spoilt and picture is not None:
            found.append(frame)
    return tuple(found)


def _ascending(stamps: Sequence[int | None], unit: Fraction, rates: Sequence[Fraction]) -> list[int]:
    """Stamps of pictures in the order of decoding: each later than the one before, none left out."""
    step = max(1, round(1 / (rates[0] if rates else 25) / unit))
    placed: list[int] = []
    for stamp in stamps:
        before = placed[-1] if placed else None
        if stamp is None:
            stamp = 0 if before is None else before + step
        placed.append(stamp if before is None or stamp > before else before + 1)
    return placed


def _usual(stamps: Sequence[int], unit: Fraction, rates: Sequence[Fraction]) -> int:
    if len(stamps) < 2:
        return max(1, round(1 / (rates[0] if rates else 25) / unit))
    return median_low([later - earlier for earlier, later in itertools.pairwise(stamps)])


def _distance(stamps: Sequence[int], stamp: int) -> int:
    place = bisect_left(stamps, stamp)
    return min(abs(other - stamp) for other in stamps[max(0, place - 1) : place + 1])


def _gaps(stamps: Sequence[int], usual: int) -> list[int]:
    """Where frames are missing between stamps that are otherwise `usual` apart."""
    found: list[int] = []
    for earlier, later in itertools.pairwise(stamps):
        found += [
            earlier + usual * n for n in range(1, round((later - earlier) / usual)) if earlier + usual * n < later
        ]
    return found


def _free_runs(damaged: Sequence[int], start: int, stop: int) -> list[range]:
    """The ranges between damaged frames."""
    edges = [start - 1, *damaged, stop]
    return [range(a + 1, b) for a, b in itertools.pairwise(edges) if b > a + 1]


def _span(frames: range) -> str:
    return f"{frames.start} to {frames.stop - 1}"


def _frames(count: int) -> str:
    return f"{count} frame{'s' * (count != 1)}"


def _often(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
