"""Sound in memory, and read from files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import FFmpegError

from ..errors import VideoError
from .opening import open_media, sound_stream
from .scanning import moved_sound
from .timeline import Shifts

LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}
_NO_SHIFTS: Mapping[int, Shifts] = {}


@dataclass(frozen=True, kw_only=True, eq=False)
class Sound:
    """Sound in memory. samples: (channels, samples), floats in [-1, 1]; rate: samples per second.

    Raises `VideoError` for another shape, a number of channels that files do not hold, or values that are no numbers.
    """

    samples: torch.Tensor
    rate: int

    def __post_init__(self) -> None:
        shape = tuple(self.samples.shape)
        if len(shape) != 2 or shape[0] not in LAYOUTS or self.rate < 1 or not self.samples.is_floating_point():
            raise VideoError(
                f"The sound has shape {shape}, {self.samples.dtype} and {self.rate} samples per second; needed are "
                f"floats (channels, samples) with {', '.join(map(str, LAYOUTS))} channels."
            )
        if not torch.isfinite(self.samples).all():
            raise VideoError("The sound holds values that are no numbers (NaN or infinite); leave it out or repair it.")


def read_sound(
    path: str | os.PathLike[str], first: Fraction, end: Fraction | None, shifts: Mapping[int, Shifts] = _NO_SHIFTS
) -> Sound | None:
    """The first sound track of a file from `first` to `end`, seconds of the file's clock, end None for all the rest.

    Its first sample is heard at `first`: silence stands for sound that begins later or has a gap. Channels other than
    mono, stereo, 5.1 and 7.1 are mixed to stereo. shifts: of the file's timeline. None where the file has no sound
    there, or none that can be decoded.
    """
    with open_media(Path(path)) as container:
        stream = sound_stream(container)
        if stream is None:
            return None
        rate = stream.codec_context.sample_rate
        layout = LAYOUTS.get(stream.channels, "stereo")
        collected: _Collected | None = None
        resampler: AudioResampler | None = None
        form: tuple[object, ...] = ()
        for frame in sound_frames(container, stream, shifts.get(stream.index, ())):
            if collected is None:
                if frame is None:
                    return None
                rate = rate or frame.sample_rate  # not known before it is decoded, as in some transport streams
                collected = _Collected(first, rate, None if end is None else round((end - first) * rate))
            parts: list[AudioFrame] = []
            now = form if frame is None else (frame.format.name, frame.layout.name, frame.sample_rate)
            if now != form:  # sound may change on the way; what comes out does not
                parts += resampler.resample(None) if resampler is not None else []
                resampler, form = AudioResampler(format="fltp", layout=layout, rate=rate), now
            if resampler is not None:
                parts += resampler.resample(None if frame is None else finely_timed(frame))
            for part in parts:
                collected.add(part)
            if collected.full:
                break
    return None if collected is None else collected.sound()


def sound_frames(container: InputContainer, stream: AudioStream, shifts: Shifts) -> Iterator[AudioFrame | None]:
    """The decoded sound, then None. A damaged packet is a gap, not the end of the film."""
    with contextlib.suppress(FFmpegError):
        for packet in moved_sound(container, stream, shifts):
            with contextlib.suppress(FFmpegError):
                yield from stream.codec_context.decode(packet)
    with contextlib.suppress(FFmpegError):
        yield from stream.codec_context.decode(None)
    yield None


def finely_timed(frame: AudioFrame) -> AudioFrame:
    """The frame with its time in samples: units of the container may be so coarse that what is cut from it has none."""
    if frame.pts is not None and frame.time_base is not None:
        frame.pts = round(frame.pts * frame.time_base * frame.sample_rate)
        frame.time_base = Fraction(1, frame.sample_rate)
    return frame


class _Collected:
    """Samples put where their times say, from `first` on, at most `length` of them."""

    def __init__(self, first: Fraction, rate: int, length: int | None) -> None:
        self._first, self._rate, self._length = first, rate, length
        self._parts: list[torch.Tensor] = []
        self._next: int | None = None  # where the next frame is expected, in samples since `first`
        self._done = 0  # samples kept

    @property
    def full(self) -> bool:
        return self._length is not None and (self._next or 0) >= self._length

    def add(self, frame: AudioFrame) -> None:
        samples = torch.from_numpy(frame.to_ndarray())  # channels, samples
        start = self._next
        if frame.pts is not None and frame.time_base is not None:
            told = round((frame.pts * frame.time_base - self._first) * self._rate)
            if start is None or abs(told - start) > self._rate // 20:  # less is a time rounded by the container
                start = told
        start = start or 0
        self._next = start + samples.shape[1]
        samples = samples[:, max(0, self._done - start) :]
        if not samples.shape[1] or (self._length is not None and start >= self._length):
            return
        if start > self._done:
            self._parts.append(samples.new_zeros(samples.shape[0], start - self._done))
        self._parts.append(samples)
        self._done = self._next

    def sound(self) -> Sound | None:
        if not self._parts:
            return None
        samples = torch.cat(self._parts, dim=1)[:, : self._length]
        return Sound(samples=samples, rate=self._rate) if samples.shape[1] else None
