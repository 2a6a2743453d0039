"""Frames and sound out of any VIDEO, a chunk at a time; a VIDEO or an IMAGE as the clip that a node works on."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import Input, InputImpl
from torch import Tensor

from ...vae_core import VideoError
from ...vae_core.media.sound import read_sound
from ...vae_core.media.timeline import Timeline
from ...vae_core.media.video import losses, probe, read_shown, timeline_of
from .lazy_video import LazyVideo, cut_audio
from .wire import CHUNK, chunks_of, pixels_of

_TICK = Fraction(1, 10000)  # seconds by which a time given as a float may miss a frame

_log = logging.getLogger("cviv-vae")


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Frames that a node works on.

    name: in messages. read: its `frames` frames, from the first on each time, as (1, 3, t, height, width) in [-1, 1],
    any t. fps: None for images. aspect: width to height of a pixel. sound: reads the sound of these frames. remarks:
    what a user may not expect, as sentences without a dot.
    """

    name: str
    read: Callable[[], Iterator[Tensor]]
    frames: int
    height: int
    width: int
    fps: Fraction | None
    aspect: Fraction = Fraction(1)
    sound: Callable[[], dict[str, Any] | None] | None = None
    remarks: tuple[str, ...] = ()

    def audio(self) -> dict[str, Any] | None:
        """The sound of these frames as an AUDIO, or None where there is none."""
        return None if self.sound is None else self.sound()

    def __str__(self) -> str:
        return f"{self.name} has {self.frames} frames of {self.width}x{self.height}"

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width

    def singles(self) -> Iterator[Tensor]:
        """The same frames one by one."""
        for chunk in self.read():
            yield from chunk.split(1, dim=2)


class VideoSource(ABC):
    """A VIDEO as it is read: width and height in pixels, shape of a pixel, fps, and its frames and sound in parts.

    A part is the frames from `first` on, counted from 0, `count` of them; None, and a number beyond the end, mean all
    the rest. Raises VideoError where `first` is beyond the end.
    """

    width: int
    height: int
    aspect: Fraction = Fraction(1)

    @property
    @abstractmethod
    def fps(self) -> Fraction:
        """Frames per second."""

    @property
    @abstractmethod
    def total(self) -> int:
        """Number of frames."""

    @abstractmethod
    def _read(self, first: int, stop: int, chunk: int) -> Iterator[Tensor]: ...

    @abstractmethod
    def _sound(self, first: int, stop: int) -> dict[str, Any] | None: ...

    def count(self, first: int = 0, count: int | None = None) -> int:
        """Number of frames of a part."""
        first, stop = self._span(first, count)
        return stop - first

    def frames(self, first: int = 0, count: int | None = None, chunk: int = CHUNK) -> Iterator[Tensor]:
        """The frames of a part as (1, 3, t, height, width) in [-1, 1], t up to `chunk`; holds one such chunk."""
        first, stop = self._span(first, count)
        return self._read(first, stop, chunk)

    def clip(self, name: str, first: int = 0, count: int | None = None) -> Clip:
        """The frames of a part."""
        start, stop = self._span(first, count)
        return Clip(
            name=name,
            read=lambda: self.frames(first, count),
            frames=stop - start,
            height=self.height,
            width=self.width,
            fps=self.fps,
            aspect=self.aspect,
            sound=lambda: self.audio(first, count),
            remarks=(*past_the_end(first, count, stop), *self.told(first, count)),
        )

    def told(self, first: int = 0, count: int | None = None) -> list[str]:
        """What of a part does not come through as it is, as sentences without a dot."""
        return []

    def audio(self, first: int = 0, count: int | None = None) -> dict[str, Any] | None:
        """The sound of a part as an AUDIO, or None where there is none."""
        return self._sound(*self._span(first, count))

    def _span(self, first: int, count: int | None) -> tuple[int, int]:
        checked_first(first, self.total)
        return first, self.total if count is None else min(first + count, self.total)


def clip_of(video: Any, name: str, count: int | None = None, *, first: int = 0, skip_damage: bool = False) -> Clip:
    """`count` frames, None for all, of a VIDEO or an IMAGE from `first` on. Raises ValueError where it is neither.

    skip_damage: a frame that is missing in a damaged file shows the one before, instead of an error.
    """
    if isinstance(video, Input.Video):
        return open_video(video, skip_damage=skip_damage).clip(name, first, count)
    if not isinstance(video, Tensor):
        raise ValueError(f"{name} is a {type(video).__name__}; connect an IMAGE batch or a VIDEO.")
    total = video.shape[0]
    pixels = pixels_of(video[checked_first(first, total) :][:count])
    frames, height, width, _ = pixels.shape
    return Clip(
        name=name,
        read=lambda: chunks_of(pixels),
        frames=frames,
        height=height,
        width=width,
        fps=None,
        remarks=past_the_end(first, count, total),
    )


def checked_first(first: int, total: int) -> int:
    """`first` itself. Raises VideoError where a clip of `total` frames has no such frame."""
    if not 0 <= first < total:
        raise VideoError(
            f"The video has {total} frames, numbered from 0; a start at frame {first} is beyond them. Give a smaller "
            "first frame."
        )
    return first


def past_the_end(first: int, count: int | None, total: int) -> tuple[str, ...]:
    """A sentence where fewer frames are there than were asked for."""
    if count is None or first + count <= total:
        return ()
    return (
        f"{count} frames from frame {first} on were asked for, and the video ends after {total}: {total - first} taken",
    )


def open_video(video: Any, *, skip_damage: bool = False) -> VideoSource:
    """Look at a VIDEO. Raises ValueError where it is none, or has no picture. skip_damage: as in `clip_of`."""
    if not isinstance(video, Input.Video):
        raise ValueError(f"Got {type(video).__name__} where a VIDEO is needed: connect Load Video or Create Video.")
    if isinstance(video, LazyVideo):
        return _LazySource(video)
    if isinstance(video, InputImpl.VideoFromComponents):
        return _TensorSource(video.get_components())
    window = getattr(video, "get_active_trim_window", None)  # ComfyUI 0.3 trims nothing
    begin, duration = window() if window is not None else (0.0, 0.0)
    source = video.get_stream_source()
    if isinstance(source, (str, os.PathLike)):
        return _FileSource(Path(source), begin, duration, skip_damage=skip_damage)
    path = _temporary(source)
    try:
        opened = _FileSource(path, begin, duration, skip_damage=skip_damage)
    except BaseException:
        _remove(path)
        raise
    weakref.finalize(opened, _remove, path)
    return opened


class _LazySource(VideoSource):
    """Frames straight from what decodes them."""

    def __init__(self, video: LazyVideo) -> None:
        self._video, self.aspect = video, video.get_pixel_aspect()
        self.width, self.height = video.get_dimensions()

    @property
    def fps(self) -> Fraction:
        return self._video.get_frame_rate()

    @property
    def total(self) -> int:
        return self._video.get_frame_count()

    def _read(self, first: int, stop: int, chunk: int) -> Iterator[Tensor]:
        with contextlib.closing(self._video.chunks(first, stop)) as chunks:
            for images in chunks:
                yield from chunks_of(images, chunk)

    def _sound(self, first: int, stop: int) -> dict[str, Any] | None:
        return self._video.audio_of(first, stop)


class _TensorSource(VideoSource):
    """Frames that are in memory; parts are views."""

    def __init__(self, components: Any) -> None:
        self._images, self._audio = pixels_of(components.images), components.audio
        self._rate = Fraction(components.frame_rate)
        _, self.height, self.width, _ = self._images.shape

    @property
    def fps(self) -> Fraction:
        return self._rate

    @property
    def total(self) -> int:
        return self._images.shape[0]

    def _read(self, first: int, stop: int, chunk: int) -> Iterator[Tensor]:
        yield from chunks_of(self._images[first:stop], chunk)

    def _sound(self, first: int, stop: int) -> dict[str, Any] | None:
        return cut_audio(self._audio, first / self.fps, stop / self.fps)


class _FileSource(VideoSource):
    """Frames of a file from the time `begin` on, `duration` seconds, 0 for all, at a constant rate.

    Where the frames of the file are not evenly spaced, some are dropped and some shown again, so that sound stays.
    """

    def __init__(self, path: Path, begin: float, duration: float, *, skip_damage: bool) -> None:
        info = probe(path)
        self._path, self._info, self._skip_damage = path, info, skip_damage
        self._begin = Fraction(begin)
        self._end = self._begin + Fraction(duration) if duration else None
        self._timeline: Timeline | None = None
        self._all: list[int] | None = None
        self.width, self.height, self.aspect = info.width, info.height, info.aspect

    @property
    def fps(self) -> Fraction:
        return self._known().fps

    @property
    def total(self) -> int:
        return len(self._shown())

    def told(self, first: int = 0, count: int | None = None) -> list[str]:
        first, stop = self._span(first, count)
        shown, timeline = self._shown(stop)[first:stop], self._known()
        endings = [*timeline.told(shown[0], shown[-1] + 1), *losses(self._info)]
        if not timeline.even:
            apart = shown[-1] + 1 - shown[0] - len(set(shown))
            again = len(shown) - len(set(shown))
            endings.append(
                f"has a varying frame rate: of its frames {apart} are dropped and {again} shown again at "
                f"{float(timeline.fps):g} per second, so that sound stays in time"
            )
        return [f"{self._path.name} {ending}" for ending in endings]

    def _known(self, stop: int | None = None) -> Timeline:
        """The timeline, as far as it was needed; decodes what is missing."""
        if self._timeline is None or not (self._timeline.whole or (stop is not None and len(self._timeline) > stop)):
            found = timeline_of(self._path, stop)
            # uneven frames, and a part chosen by time, need all of it
            whole = found.whole or (stop is not None and found.even and self._end is None and not self._begin)
            self._timeline, self._all = found if whole else timeline_of(self._path), None
        return self._timeline

    def _shown(self, stop: int | None = None) -> list[int]:
        """For each frame of the video the frame of the file that is shown; up to `stop` at least."""
        timeline = self._known(stop)
        if self._all is None:
            times = timeline.times()  # on the file's own clock, as ComfyUI takes the ends of a part
            early = sum(time < self._begin - _TICK for time in times) if self._begin else 0
            late = len(times) if self._end is None else sum(time < self._end - _TICK for time in times)
            if late <= early:
                raise VideoError(f"{self._path}: no frame lies in the part that was chosen; choose another.")
            even = timeline.even
            self._all = list(range(early, late)) if even else timeline.resampled(timeline.fps, early, late)
        return self._all

    def _read(self, first: int, stop: int, chunk: int) -> Iterator[Tensor]:
        shown, timeline = self._shown(stop)[first:stop], self._known()
        if timeline.resized is not None and shown[0] < timeline.resized.frame <= shown[-1]:
            raise VideoError(f"{self._path}: {timeline.resized.words()}")
        if not self._skip_damage:
            timeline.check(self._path, shown[0], shown[-1] + 1)
        yield from read_shown(self._path, timeline, shown, chunk)

    def _span(self, first: int, count: int | None) -> tuple[int, int]:
        if first >= 0 and count is not None:
            known = len(self._shown(first + count))
            if known >= first + count:
                return first, first + count
        return super()._span(first, count)

    def _sound(self, first: int, stop: int) -> dict[str, Any] | None:
        shown, timeline = self._shown(stop), self._known()
        if timeline.even:
            begin = timeline.time(shown[first])
            end = timeline.time(shown[stop] if stop < len(shown) else shown[-1] + 1)
        else:
            zero = timeline.time(shown[0])
            begin, end = zero + first / timeline.fps, zero + stop / timeline.fps
        sound = read_sound(self._path, begin, end, timeline.shifts)
        return None if sound is None else {"waveform": sound.samples[None], "sample_rate": sound.rate}


def _temporary(source: io.BytesIO) -> Path:
    """A file with the content of `source` in ComfyUI's temporary folder."""
    folder = folder_paths.get_temp_directory()
    os.makedirs(folder, exist_ok=True)
    source.seek(0)
    with tempfile.NamedTemporaryFile(prefix="video_", dir=folder, delete=False) as file:
        try:
            shutil.copyfileobj(source, file)
        except BaseException:
            file.close()
            _remove(Path(file.name))
            raise
    return Path(file.name)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
