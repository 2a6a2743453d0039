"""Decoding a file once, without keeping a picture, to know its timeline; and decoding it again along that timeline."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, overload

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Stream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from ..errors import VideoError
from . import animation
from .opening import (
    check_file,
    has_no_times,
    is_still,
    keeps_order_only,
    open_media,
    picture_stream,
    reason,
    sound_stream,
    times_may_jump,
)
from .timeline import Announced, Picture, Shifts, Timeline, build

_BACK = Fraction(1, 10)  # seconds by which time stamps go back where they start again
_AHEAD = Fraction(10)  # seconds by which they jump ahead there
_KEPT = 32  # timelines remembered
_HIDDEN = frozenset({"vp8", "vp9", "libvpx", "libvpx-vp9", "av1", "libdav1d", "libaom-av1"})
_OWN_ENDS = frozenset({"gif", "apng"})  # formats in which the duration of every frame is a part of the content
_DEFAULT_RATE = Fraction(25)

Opener = Callable[[], InputContainer]

_known: OrderedDict[tuple[str, int, int], Timeline] = OrderedDict()
_lock = threading.Lock()


def timeline_of(path: Path, stop: int | None = None) -> Timeline:
    """When each frame of a file is shown, found by decoding it; up to frame `stop` at least, None for all.

    Remembered for files that did not change. Raises VideoError where the file is no video or has no picture.
    """
    status = check_file(path)
    key = str(path.absolute()), status.st_mtime_ns, status.st_size
    with _lock:
        known = _known.get(key)
    if known is None or not (known.whole or (stop is not None and len(known) > stop)):
        known = (
            animation.timeline(path) if animation.is_animation(path) else scan(partial(open_media, path), path, stop)
        )
        with _lock:
            _known[key] = known
            _known.move_to_end(key)
            while len(_known) > _KEPT:
                _known.popitem(last=False)
    return known


def decoded(container: InputContainer, stream: VideoStream, timeline: Timeline) -> Iterator[VideoFrame]:
    """All pictures of a file in the order of its timeline's `pictures`; those that fail are passed over."""
    yield from _pictures(container, stream, timeline.shifts.get(stream.index, ()), _Facts(), threads=timeline.threads)


def first_picture(container: InputContainer, stream: VideoStream, name: object) -> VideoFrame:
    """The first picture that can be decoded. Raises VideoError where there is none."""
    facts = _Facts()
    for frame in _pictures(container, stream, (), facts, threads=False):
        return frame
    raise _unreadable(name, facts)


@overload
def moved(container: InputContainer, stream: VideoStream, shifts: Shifts) -> Iterator[Packet[VideoStream]]: ...
@overload
def moved(container: InputContainer, stream: AudioStream, shifts: Shifts) -> Iterator[Packet[AudioStream]]: ...
def moved(container: InputContainer, stream: Any, shifts: Shifts) -> Iterator[Packet[Any]]:
    """The packets of one stream, without the empty ones, with their times on the clock of the timeline."""
    rest = list(shifts)
    shift = Fraction(0)
    full = (packet for packet in container.demux(stream) if packet.size)
    for number, packet in enumerate(full):
        while rest and number >= rest[0][0]:
            shift = rest.pop(0)[1]
        if shift and packet.time_base:
            ticks = round(shift / packet.time_base)
            if packet.pts is not None:
                packet.pts += ticks
            if packet.dts is not None:
                packet.dts += ticks
        yield packet


def moved_sound(container: InputContainer, stream: AudioStream, shifts: Shifts) -> Iterator[Packet[AudioStream]]:
    """As `moved`, up to where a damaged time stamp puts the sound beyond a gap after the end of the picture."""
    end = None if shifts else _picture_end(container)
    last: Fraction | None = None
    for packet in moved(container, stream, shifts):
        if end is not None and packet.pts is not None:
            time = packet.pts * packet.time_base
            if time > end + _AHEAD and (last is None or time > last + _AHEAD):
                return
            last = time
        yield packet


def _picture_end(container: InputContainer) -> Fraction | None:
    """When the picture ends, as the file says; None where it says nothing, or has no picture."""
    known = [
        ((stream.start_time or 0) + stream.duration) * stream.time_base
        for stream in container.streams.video
        if stream.duration is not None and stream.time_base is not None
    ]
    if container.streams.video and container.duration is not None:
        known.append(Fraction((container.start_time or 0) + container.duration, av.time_base))
    return min(known, default=None)


# ---------------------------------------------------------------------------------------------------- one pass


@dataclass
class _Facts:
    """What one pass found."""

    announced: list[Announced] = field(default_factory=list[Announced])
    pictures: list[Picture] = field(default_factory=list[Picture])
    packets: int = 0
    error: str = ""
    interlaced: bool = False
    goes_back: bool = False
    guessed: bool = False  # a picture has no time of its own, and that of its packet is right without threads only
    whole: bool = True

    @property
    def clean(self) -> bool:
        """Whether every packet became a picture and nothing was complained of."""
        if self.error or self.guessed or any(picture.flawed for picture in self.pictures):
            return False
        last = max((picture.stamp or 0 for picture in self.pictures), default=0)
        due = sum(self.whole or (packet.stamp or 0) <= last for packet in self.announced)
        return len(self.pictures) >= due


def scan(source: Opener, name: object, stop: int | None = None) -> Timeline:
    """As `timeline_of`, of whatever `source` opens anew each time; name: for messages. Not remembered."""
    with source() as container:
        jumpy = times_may_jump(container)
    shifts = _find_joins(source, name) if jumpy else {}
    facts, made = _pass(source, name, stop, shifts, threads=True)
    if facts.goes_back and not jumpy:
        shifts = _find_joins(source, name)
        facts, made = _pass(source, name, stop, shifts, threads=True)
    if not facts.clean:
        swift = facts.pictures
        facts, made = _pass(source, name, stop, shifts, threads=False)
        if made is not None and not facts.error and facts.pictures == swift:
            made = replace(made, threads=True)  # some packets are never shown, and nothing failed
    if made is None:
        raise _unreadable(name, facts)
    return made


def _unreadable(name: object, facts: _Facts) -> VideoError:
    why = f" ({facts.error})" if facts.error else ""
    return VideoError(f"{name}: holds a video stream without a single readable frame{why}; choose another file.")


def _pass(
    source: Opener, name: object, stop: int | None, shifts: dict[int, Shifts], *, threads: bool
) -> tuple[_Facts, Timeline | None]:
    facts = _Facts()
    with source() as container:
        stream = picture_stream(container, name)
        single = is_still(container)
        wanted = None if stop is None else stop + 1
        for count, _ in enumerate(
            _pictures(container, stream, shifts.get(stream.index, ()), facts, threads=threads), start=1
        ):
            if wanted is not None and count > wanted + _flawed_lead(facts):
                facts.whole = False
                break
        unit = stream.time_base or Fraction(1, 25)
        rates = [_DEFAULT_RATE] if single else _rates(stream, facts)
        if all(picture.stamp is None for picture in facts.pictures):
            unit = 1 / rates[0]  # nothing but their order is known
        made = build(
            facts.announced,
            facts.pictures,
            unit=unit,
            rates=rates,
            errors=facts.error,
            lacking=_lacking(container, stream, facts),
            hidden=stream.codec_context.name in _HIDDEN,
            whole=facts.whole,
            ends=container.format.name in _OWN_ENDS,
            interlaced=facts.interlaced,
            threads=threads,
            shifts=shifts,
        )
    return facts, made


def _flawed_lead(facts: _Facts) -> int:
    return next((n for n, picture in enumerate(facts.pictures) if not picture.flawed), len(facts.pictures))


def _pictures(
    container: InputContainer, stream: VideoStream, shifts: Shifts, facts: _Facts, *, threads: bool
) -> Iterator[VideoFrame]:
    """Decode to the end, past what fails.

    With frame threads an error may swallow pictures that are whole: what they give is right only where nothing fails.
    """
    stream.thread_type = "AUTO" if threads else "SLICE"
    last: int | None = None
    timeless, ordered = has_no_times(container), keeps_order_only(container)
    facts.guessed |= threads and ordered

    def decode(packet: Packet[VideoStream] | None) -> Iterator[VideoFrame]:
        try:
            frames = stream.codec_context.decode(packet)
        except FFmpegError as error:
            facts.error = facts.error or reason(error)
            return
        for frame in frames:
            stamp = None if timeless else frame.dts if ordered or frame.pts is None else frame.pts
            facts.guessed |= threads and not timeless and frame.pts is None
            facts.pictures.append(Picture(stamp, frame.is_corrupt, (frame.height, frame.width), frame.key_frame))
            facts.interlaced |= frame.interlaced_frame
            yield frame

    try:
        for packet in moved(container, stream, shifts):
            facts.packets += 1
            if packet.dts is not None and packet.time_base:
                facts.goes_back |= last is not None and (last - packet.dts) * packet.time_base > _BACK
                last = packet.dts
            if not packet.is_discard:
                shown = None if timeless or ordered else packet.pts
                facts.announced.append(Announced(shown, packet.duration or 0))
            yield from decode(packet)
    except FFmpegError as error:  # the container itself is damaged: what was read so far is all there is
        facts.error = facts.error or reason(error)
    yield from decode(None)


def _rates(stream: VideoStream, facts: _Facts) -> list[Fraction]:
    """What the file says of its rate. A raw stream has only what is coded in it, and its demuxer a default."""
    coded = stream.codec_context.framerate
    found = [stream.guessed_rate, stream.average_rate, stream.base_rate]
    if all(picture.stamp is None for picture in facts.pictures):
        found.insert(0, coded)
    return [rate for rate in found if rate] or [_DEFAULT_RATE]


def _lacking(container: InputContainer, stream: VideoStream, facts: _Facts) -> int:
    """Packets that the index of the file names and the file does not hold."""
    if not facts.whole or "mov" not in container.format.name:  # others count otherwise, or not at all
        return 0
    return max(0, stream.frames - facts.packets)


# ---------------------------------------------------------------------------------------------------- joined files


@dataclass
class _Section:
    """Packets of one stream between two places where its time stamps start again. first, last: seconds."""

    number: int
    first: Fraction
    last: Fraction


def _find_joins(source: Opener, name: object) -> dict[int, Shifts]:
    """For each stream whose time stamps start again: from which packet on it is moved by how much.

    The picture is in charge: a section begins where the last frame of the one before ends, and its sound moves along.
    """
    with source() as container:
        sound = sound_stream(container)
        streams: list[Stream] = [picture_stream(container, name), *([] if sound is None else [sound])]
        indices = [stream.index for stream in streams]  # not to be asked for once the file is closed
        found = _sections(container, streams)
    main = found[indices[0]]
    if len(indices) == 1:
        return _shifts(found, main)
    if len({len(sections) for sections in found.values()}) > 1:
        # a jump ahead in one of the two alone is a gap in it
        found = {index: _without_gaps(sections) for index, sections in found.items()}
        main = found[indices[0]]
    heard = found[indices[1]]
    if len(heard) == len(main):
        return _shifts(found, main)
    return _shifts({indices[0]: main}, main) | _shifts({indices[1]: heard}, heard)


def _sections(container: InputContainer, streams: list[Stream]) -> dict[int, list[_Section]]:
    """The sections of each stream, by its index."""
    found: dict[int, list[_Section]] = {stream.index: [] for stream in streams}
    counts = dict.fromkeys(found, 0)
    before: dict[int, Fraction] = {}
    jumpy = times_may_jump(container)
    with contextlib.suppress(FFmpegError):  # what was read so far is all there is
        for packet in container.demux(streams):
            if not packet.size:
                continue
            index = packet.stream_index
            number, counts[index] = counts[index], counts[index] + 1
            stamp = packet.pts if packet.dts is None else packet.dts
            if stamp is None:
                continue
            time = stamp * packet.time_base
            shown = time if packet.pts is None else packet.pts * packet.time_base
            last = before.get(index)
            step = Fraction(0) if last is None else max(Fraction(0), min(time - last, _BACK))
            end = shown + ((packet.duration or 0) * packet.time_base or step)
            if last is None or time < last - _BACK or (jumpy and time > last + _AHEAD):
                found[index].append(_Section(number, shown, end))
            section = found[index][-1]
            section.first, section.last = min(section.first, shown), max(section.last, end)
            before[index] = time
    return found


def _without_gaps(sections: list[_Section]) -> list[_Section]:
    kept = sections[:1]
    for section in sections[1:]:
        if section.first >= kept[-1].last:
            kept[-1] = _Section(kept[-1].number, kept[-1].first, section.last)
        else:
            kept.append(section)
    return kept


def _shifts(found: dict[int, list[_Section]], main: list[_Section]) -> dict[int, Shifts]:
    """All streams of `found` moved as their sections of `main` are, each to the end of the one before."""
    moves: list[Fraction] = [Fraction(0)]
    for earlier, later in itertools.pairwise(main):
        moves.append(earlier.last + moves[-1] - later.first)
    shifts = {
        index: tuple((section.number, move) for section, move in zip(sections[1:], moves[1:], strict=False))
        for index, sections in found.items()
    }
    return {index: steps for index, steps in shifts.items() if steps}
