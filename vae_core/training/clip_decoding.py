"""Chosen frames of a clip, and a random cut of it in time and space. Tensors are (3, t, h, w), RGB in [-1, 1]."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from fractions import Fraction
from functools import lru_cache

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from torch import Tensor

from ..errors import VideoError
from ..media.pixels import ToRGB
from .clip_files import ClipFile
from .data import TrainingDataError

Pick = Callable[[int], Sequence[int]]  # frame count of a clip -> the frames to take, ascending
Box = tuple[int, int, int, int]  # top, left, height, width


def clip_rate(clip: ClipFile) -> Fraction:
    """Frames per second as the file says; 25 where it does not, as for a still image."""
    with ExitStack() as stack:
        stream = _picture(clip, stack)[1]
        return stream.average_rate or stream.guessed_rate or Fraction(25)


def read_picked(clip: ClipFile, pick: Pick, *, threads: int = 1) -> Iterator[Tensor]:
    """The frames that `pick` chooses, one by one, as (3, H, W) float32 in [-1, 1], turned as the file asks.

    Decoding starts at the key frame before the first of them. threads: of the decoder, 0 for one per core.
    Raises VideoError or TrainingDataError where the file cannot be read, or a chosen frame cannot be decoded.
    """
    times, numbered = _times(clip)
    wanted = pick(len(times))
    missing = deque(times[index] for index in wanted)
    converter: ToRGB | None = None
    for whole in (False, True):  # where seeking does not find a frame, from the beginning
        with ExitStack() as stack:
            container, stream = _picture(clip, stack)
            stream.codec_context.thread_count = threads
            if not whole and not numbered and missing and missing[0] > times[0]:
                container.seek(missing[0], stream=stream)
            for number, frame in enumerate(_frames(container, stream, clip)):
                if not missing:
                    return
                if missing[0] == (number if numbered else frame.pts):
                    missing.popleft()
                    converter = converter or ToRGB(frame, clip.path)
                    yield converter(frame, 0)
            if not missing:
                return
    raise TrainingDataError(f"{clip.name}: {len(missing)} of its {len(times)} frames cannot be decoded; it is damaged.")


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

    box: Box | None = None
    parts: list[Tensor] = []
    for picture in read_picked(clip, pick):
        if box is None:
            box = _random_box(clip, (picture.shape[1], picture.shape[2]), size, short_side, random)
        top, left, height, width = box
        parts.append(picture[:, top : top + height, left : left + width])
    cut = torch.stack(parts)  # t c h w
    if tuple(cut.shape[2:]) != size:
        cut = F.interpolate(cut, size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    return cut.transpose(0, 1).contiguous()  # c t h w


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


@lru_cache(maxsize=4096)
def _times(clip: ClipFile) -> tuple[array[int], bool]:
    """When each frame of the clip is shown, ascending, in the stream's own units; nothing is decoded.

    A file that keeps no times, and a still image, gives the numbers of its frames instead, and True.
    """
    times = array("q")
    with ExitStack() as stack:
        container, stream = _picture(clip, stack)
        if clip.kind == "image":
            return array("q", [0]), True
        try:
            packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        except FFmpegError as error:
            raise VideoError(f"{clip.name}: is damaged ({_reason(error)}).") from error
        known = [packet.pts for packet in packets if packet.pts is not None]
        if len(known) < len(packets) or not known or stream.time_base is None:
            if clip.start or clip.end is not None:
                raise TrainingDataError(f"{clip.name}: keeps no times, so no part of it can be chosen.")
            return array("q", range(len(packets))), True
        first, unit = min(known), float(stream.time_base)
        end = float("inf") if clip.end is None else clip.end
        times.extend(sorted({time for time in known if clip.start <= (time - first) * unit < end}))
    if not times:
        raise TrainingDataError(f"{clip.name}: no frame lies in this part of it.")
    return times, False


def _picture(clip: ClipFile, stack: ExitStack) -> tuple[InputContainer, VideoStream]:
    try:
        file = stack.enter_context(clip.open())
        container = stack.enter_context(av.open(file, mode="r", metadata_errors="replace"))
    except (FFmpegError, OSError) as error:
        raise VideoError(f"{clip.name}: cannot be read ({_reason(error)}).") from error
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            if stream.codec_context is None:  # pyright: ignore[reportUnnecessaryComparison]
                raise VideoError(f"{clip.name}: this PyAV has no decoder for it.")
            return container, stream
    raise VideoError(f"{clip.name}: holds no picture.")


def _frames(container: InputContainer, stream: VideoStream, clip: ClipFile) -> Iterator[VideoFrame]:
    try:
        yield from container.decode(stream)
    except FFmpegError as error:
        raise VideoError(f"{clip.name}: is damaged ({_reason(error)}).") from error


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error).lower()
