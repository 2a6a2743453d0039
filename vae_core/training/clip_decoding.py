"""Chosen frames of a clip, and a random cut of it in time and space. Tensors are (3, t, h, w), RGB in [-1, 1]."""

from __future__ import annotations

import itertools
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import BinaryIO

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from torch import Tensor

from ..errors import VideoError
from ..media.animation import first_picture, is_animated
from ..media.opening import check_file, has_no_times, keeps_order_only, picture_stream, reason
from ..media.pixels import ToRGB, look_of
from ..media.rates import snapped
from ..media.scanning import decoded, scan
from ..media.timeline import Timeline
from .clip_files import ClipFile
from .data import TrainingDataError

Pick = Callable[[int], Sequence[int]]  # frame count of a clip -> the frames to take, ascending
Box = tuple[int, int, int, int]  # top, left, height, width


class _UndecodableError(TrainingDataError):
    """What the file announces of its frames does not hold, or is not enough: it must be decoded to know them."""


def clip_rate(clip: ClipFile) -> Fraction:
    """Frames per second as the file says; 25 where it does not, as for a still image."""
    with ExitStack() as stack:
        if clip.kind == "image":
            return Fraction(25)
        stream = _picture(clip, stack)[1]
        return snapped(stream.guessed_rate or stream.average_rate or Fraction(25))


def damage_of(clip: ClipFile) -> str:
    """What is wrong with the frames of a clip, as the end of a sentence; empty for a whole one. Decodes it."""
    if clip.kind == "image":
        return ""
    timeline = _timeline(clip)
    return "; it ".join(timeline.told(*_span(clip, timeline)))


def read_picked(clip: ClipFile, pick: Pick, *, threads: int = 1, whole: bool = False) -> Iterator[Tensor]:
    """The frames that `pick` chooses, one by one, as (3, H, W) float32 in [-1, 1], turned as the file asks.

    Decoding starts at the key frame before the first of them, and goes by what the file announces. `whole`: the clip is
    decoded from the beginning, after it was once to know its frames; in the place of a missing one the one before comes
    again. threads: of the decoder, 0 for one per core.
    Raises VideoError or TrainingDataError where the file cannot be read, or a chosen frame cannot be decoded.
    """
    if clip.kind == "image" or whole:
        yield from _read_image(clip, pick) if clip.kind == "image" else _read_whole(clip, pick)
        return
    times, numbered = _times(clip)
    wanted = pick(len(times))
    missing = deque(times[index] for index in wanted)
    converter: ToRGB | None = None
    for all_of_it in (False, True):  # where seeking does not find a frame, from the beginning
        with ExitStack() as stack:
            container, stream, file = _picture(clip, stack)
            stream.codec_context.thread_count = threads
            if not all_of_it and not numbered and missing and missing[0] > times[0]:
                container.seek(missing[0], stream=stream)
            for number, frame in enumerate(_frames(container, stream)):
                if not missing:
                    return
                if missing[0] == (number if numbered else frame.pts):
                    missing.popleft()
                    if converter is None:
                        look = look_of(container, stream, frame, file, clip.name, "tone-map")
                        converter = ToRGB(frame, clip.name, look)
                    yield converter(frame, 0)
            if not missing:
                return
    raise _UndecodableError(
        f"{clip.name}: {len(missing)} of the frames it announces cannot be decoded, the first at "
        f"{float(missing[0] - times[0]):g} units of its time; it is damaged."
    )


def random_clip(
    clip: ClipFile,
    *,
    frames: int,
    stride: tuple[int, int],
    size: tuple[int, int],
    short_side: int | None,
    random: np.random.Generator,
) -> Tensor:
    """A cut of `clip` as (3, frames, *size): random stride in `stride`, random start, random crop.

    The picture is made smaller until its short side is `short_side` (None: until `size` just fits in), never larger.
    Where a chosen frame cannot be decoded, the clip is decoded once to know which ones can, and another cut is made.
    Raises VideoError or TrainingDataError where the file cannot be read, or is too short or too small.
    """

    def pick(count: int) -> Sequence[int]:
        largest = min(stride[1], (count - 1) // (frames - 1)) if frames > 1 else stride[1]
        if largest < stride[0] or count < 1:
            raise TrainingDataError(
                f"{clip.name}: has {count} frames; {frames} at stride {stride[0]} need {(frames - 1) * stride[0] + 1}."
            )
        step = int(random.integers(stride[0], largest + 1))
        first = int(random.integers(count - (frames - 1) * step))
        return range(first, first + (frames - 1) * step + 1, step)

    def pick_whole(_: int) -> Sequence[int]:
        """A cut without damaged frames, from the longest run of whole ones."""
        run = max(_whole_runs(clip), key=len)
        return [run[index] for index in pick(len(run))]

    def cut(pictures: Iterator[Tensor]) -> Tensor:
        box: Box | None = None
        kept: list[Tensor] = []
        for picture in pictures:
            if box is None:
                box = _random_box(clip, (picture.shape[1], picture.shape[2]), size, short_side, random)
            top, left, height, width = box
            kept.append(picture[:, top : top + height, left : left + width])
        return torch.stack(kept)  # t c h w

    try:
        made = cut(read_picked(clip, pick))
    except _UndecodableError:
        made = cut(read_picked(clip, pick_whole, whole=True))
    if tuple(made.shape[2:]) != size:
        made = F.interpolate(made, size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    return made.transpose(0, 1).contiguous()  # c t h w


def _random_box(
    clip: ClipFile, picture: tuple[int, int], size: tuple[int, int], short_side: int | None, random: np.random.Generator
) -> Box:
    """The part of a picture that becomes `size` when the picture is made smaller."""
    enough = (side / wanted for side, wanted in zip(picture, size, strict=True))
    factor = min(enough) if short_side is None else min(picture) / short_side
    height, width = (round(wanted * factor) for wanted in size)
    if factor < 1 or height > picture[0] or width > picture[1]:
        side = "" if short_side is None else f" at a short side of {short_side}"
        raise TrainingDataError(
            f"{clip.name}: is {picture[1]}x{picture[0]}, too small for crops of {size[1]}x{size[0]}{side}."
        )
    top, left = (int(random.integers(free + 1)) for free in (picture[0] - height, picture[1] - width))
    return top, left, height, width


# ------------------------------------------------------------------------------------------------------ the file


def forget() -> None:
    """Forget what is remembered of files, since they may have changed."""
    _times.cache_clear()
    _timeline.cache_clear()


@lru_cache(maxsize=4096)
def _times(clip: ClipFile) -> tuple[array[int], bool]:
    """When each frame of the clip is shown, as its packets announce it, ascending, in the stream's own units.

    A file that keeps no times gives the numbers of its frames instead, and True.
    """
    times = array("q")
    with ExitStack() as stack:
        container, stream, _ = _picture(clip, stack)
        try:
            packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        except FFmpegError as error:
            raise VideoError(f"{clip.name}: is damaged ({reason(error)}).") from error
        timeless = has_no_times(container) or keeps_order_only(container)
        known = [] if timeless else [packet.pts for packet in packets if packet.pts is not None]
        decoding = [packet.dts for packet in packets if packet.dts is not None]
        if len(known) < len(packets) or not known or stream.time_base is None:
            if clip.start or clip.end is not None:
                raise _UndecodableError(f"{clip.name}: keeps no times of its own.")
            return array("q", range(len(packets))), True
        if any(later < earlier for earlier, later in itertools.pairwise(decoding)):
            raise _UndecodableError(f"{clip.name}: has time stamps that start again.")
        first, unit = min(known), float(stream.time_base)
        end = float("inf") if clip.end is None else clip.end
        times.extend(sorted({time for time in known if clip.start <= (time - first) * unit < end}))
    if not times:
        raise TrainingDataError(f"{clip.name}: no frame lies in this part of it.")
    return times, False


@lru_cache(maxsize=256)
def _timeline(clip: ClipFile) -> Timeline:
    """The frames that decoding gives."""

    def source() -> InputContainer:
        return _opened(clip, clip.open())

    try:
        return scan(source, clip.name)
    except (FFmpegError, OSError) as error:
        raise VideoError(f"{clip.name}: cannot be read ({reason(error)}).") from error


def _span(clip: ClipFile, timeline: Timeline) -> tuple[int, int]:
    """The frames of a timeline that belong to the clip. Raises TrainingDataError where there are none."""
    zero = timeline.time(0)
    inside = [
        frame
        for frame, time in enumerate(timeline.times())
        if clip.start <= float(time - zero) and (clip.end is None or float(time - zero) < clip.end)
    ]
    if not inside:
        raise TrainingDataError(f"{clip.name}: no frame lies in this part of it.")
    return inside[0], inside[-1] + 1


def _whole_runs(clip: ClipFile) -> list[range]:
    """The runs of frames without damage, numbered from the clip's first."""
    timeline = _timeline(clip)
    start, stop = _span(clip, timeline)
    edges = [start - 1, *timeline.damaged(start, stop), stop]
    runs = [range(a + 1 - start, b - start) for a, b in itertools.pairwise(edges) if b > a + 1]
    if not runs:
        raise TrainingDataError(f"{clip.name}: every frame of it is damaged.")
    return runs


def _read_whole(clip: ClipFile, pick: Pick) -> Iterator[Tensor]:
    timeline = _timeline(clip)
    start, stop = _span(clip, timeline)
    shown = list(accumulate(timeline.pictures, max))  # for each frame, its picture or that of the one before
    wanted = deque(start + index for index in pick(stop - start))
    converter: ToRGB | None = None
    picture: Tensor | None = None
    with ExitStack() as stack:
        container, stream, file = _picture(clip, stack)
        for number, frame in enumerate(decoded(container, stream, timeline)):
            if not wanted:
                return
            if number != shown[wanted[0]]:
                continue
            if converter is None:
                converter = ToRGB(frame, clip.name, look_of(container, stream, frame, file, clip.name, "tone-map"))
            picture = converter(frame, wanted[0])
            while wanted and shown[wanted[0]] == number:
                wanted.popleft()
                yield picture
    if wanted:
        raise TrainingDataError(f"{clip.name}: ends earlier than when it was looked at; it is being changed.")


def _read_image(clip: ClipFile, pick: Pick) -> Iterator[Tensor]:
    for _ in pick(1):
        with ExitStack() as stack:
            file = _file(clip, stack)
            if is_animated(file):
                yield first_picture(file, clip.name)
                continue
            container, stream, file = _picture(clip, stack)
            frame = next(_frames(container, stream), None)
            if frame is None:
                raise VideoError(f"{clip.name}: cannot be decoded; it is damaged.")
            yield ToRGB(frame, clip.name, look_of(container, stream, frame, file, clip.name, "tone-map"))(frame, 0)


def _file(clip: ClipFile, stack: ExitStack) -> BinaryIO:
    check_file(clip.path)
    try:
        return stack.enter_context(clip.open())
    except OSError as error:
        raise VideoError(f"{clip.name}: cannot be read ({reason(error)}).") from error


def _picture(clip: ClipFile, stack: ExitStack) -> tuple[InputContainer, VideoStream, BinaryIO]:
    """The opened clip, its picture, and its bytes once more."""
    try:
        container = stack.enter_context(_opened(clip, _file(clip, stack)))
    except (FFmpegError, OSError) as error:
        raise VideoError(f"{clip.name}: cannot be read ({reason(error)}).") from error
    return container, picture_stream(container, clip.name), _file(clip, stack)


def _opened(clip: ClipFile, file: BinaryIO) -> InputContainer:
    return av.open(file, mode="r", metadata_errors="replace")


def _frames(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """The frames that can be decoded."""
    try:
        for packet in container.demux(stream):
            try:
                yield from stream.codec_context.decode(packet if packet.size else None)
            except FFmpegError:
                continue
    except FFmpegError:
        return
