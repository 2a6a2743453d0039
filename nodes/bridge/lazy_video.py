"""A VIDEO whose frames are made only while something reads or writes it, a chunk at a time."""

from __future__ import annotations

import json
import logging
import math
import os
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, cast

import folder_paths
import torch
from comfy_api.latest import Input, Types
from einops import rearrange
from torch import Tensor

from ...vae_core import VideoError
from ...vae_core.media.sound import Sound
from ...vae_core.media.video import Codec, Container, VideoWriter
from .schema import check_choice
from .written import Form, WrittenFiles, copy_video

Frames = Callable[[int, int], Iterator[Tensor]]
Audio = Mapping[str, Any]

CRF = 18
_CONTAINERS = ("auto", "mp4", "mov", "mkv", "webm")
_CODECS = ("auto", "h264", "av1", "vp9")
_COLOURS = ("auto", "sRGB")
_HAIR = Fraction(1, 1000)  # of a frame: what rounding may do to a time

_log = logging.getLogger("cviv-vae")


class LazyVideo(Input.Video):
    """A VIDEO of `frame_count` frames that holds none of them.

    frames: called anew by everything that reads the video, as frames(start, stop); it yields the frames from start to
    stop - 1 as (t, height, width, 3) in 0..1, in chunks of any length, and is closed when its reader stops early.
    byte_frames: the same in 0..255 as uint8, for files of 8 bits, each chunk good until the next is asked for; None:
    `frames` serves them, too. audio: a ComfyUI AUDIO of the whole video, or None. crf: quality of the file where the
    one who saves it asks for none; codec and bits per channel likewise. aspect: width to height of a pixel. copied:
    called with the file that a second writing is a copy of. finished:
    called with the first frame and the end of what a file now holds.
    """

    def __init__(
        self,
        frames: Frames,
        *,
        width: int,
        height: int,
        frame_count: int,
        frame_rate: Fraction,
        byte_frames: Frames | None = None,
        audio: Audio | None = None,
        crf: float = CRF,
        aspect: Fraction = Fraction(1),
        first_frame: int = 0,
        codec: str = "auto",
        bits: int = 8,
        copied: Callable[[Path], None] | None = None,
        finished: Callable[[int, int], None] = lambda start, stop: None,
    ) -> None:
        self._frames, self._byte_frames = frames, byte_frames
        self._width, self._height = width, height
        self._first, self._count, self._rate = first_frame, frame_count, Fraction(frame_rate)
        self._audio, self._crf, self._aspect = audio, crf, aspect
        self._codec, self._bits = codec, bits
        self._file: str | None = None
        self._written, self._copied, self._finished = WrittenFiles(), copied, finished

    def __repr__(self) -> str:
        size = f"{self._width}x{self._height}"
        return (
            f"<video of {self._count} frames, {size}, {float(self._rate):g} frames per second, decoded when it is read>"
        )

    # ------------------------------------------------------------------------------------------- what it says of itself

    def get_dimensions(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self._width, self._height

    def get_frame_count(self) -> int:
        """Number of frames."""
        return self._count

    def get_frame_rate(self) -> Fraction:
        """Frames per second."""
        return self._rate

    def get_duration(self) -> float:
        """Length in seconds."""
        return float(self._count / self._rate)

    def get_container_format(self) -> str:
        """The container that `get_stream_source` writes, spelt as PyAV spells it."""
        return "mov,mp4,m4a,3gp,3g2,mj2"

    def get_pixel_aspect(self) -> Fraction:
        """Width to height of a pixel; ComfyUI knows only square ones."""
        return self._aspect

    def get_bit_depth(self) -> int:
        """Bits per channel that are written where nothing else is asked for."""
        return self._bits

    def get_color_space(self) -> str:
        """The colours are those of ordinary video: BT.709."""
        return "sRGB"

    def get_active_trim_window(self) -> tuple[float, float]:
        """No part is hidden: a trimmed lazy video writes only its part."""
        return 0.0, 0.0

    # ----------------------------------------------------------------------------------------------------- its content

    def chunks(self, first: int = 0, stop: int | None = None) -> Generator[Tensor, None, None]:
        """The frames first to stop - 1, None for the end, as (t, h, w, 3) in 0..1; decodes while it is read."""
        stop = self._count if stop is None else min(stop, self._count)
        yield from self._frames(self._first + first, self._first + stop)

    def audio_of(self, first: int = 0, stop: int | None = None) -> dict[str, Any] | None:
        """The sound of the frames first to stop - 1, None for the end, as an AUDIO."""
        stop = self._count if stop is None else stop
        return cut_audio(self._audio, (self._first + first) / self._rate, (self._first + stop) / self._rate)

    def get_components(self) -> Any:
        """All frames in one tensor, with sound and rate: for those who need them in memory."""
        images = torch.empty(self._count, self._height, self._width, 3)
        done = 0
        with closing(self.chunks()) as chunks:
            for chunk in chunks:
                images[done : done + chunk.shape[0]] = chunk
                done += chunk.shape[0]
        self._check_count(done)
        return Types.VideoComponents(images=images, audio=self.audio_of(), frame_rate=self._rate)

    def as_trimmed(
        self, start_time: float | None = None, duration: float | None = None, strict_duration: bool = True
    ) -> LazyVideo | None:
        """The part from `start_time` on (negative: from the end), `duration` seconds long (0 or None: all the rest).

        It stays lazy. None where nothing would be left, or, with `strict_duration`, less than `duration`.
        """
        length = self._count / self._rate
        begin = Fraction(start_time or 0)
        if begin < 0:
            begin = max(length + begin, Fraction(0))
        asked = Fraction(duration or 0)
        end = min(begin + asked, length) if asked else length
        if asked < 0 or (strict_duration and (end - begin) < asked - _HAIR / self._rate):
            return None
        first, stop = math.ceil(begin * self._rate - _HAIR), math.ceil(end * self._rate - _HAIR)
        if stop <= first:
            return None
        return LazyVideo(
            self._frames,
            width=self._width,
            height=self._height,
            frame_count=stop - first,
            frame_rate=self._rate,
            byte_frames=self._byte_frames,
            audio=self._audio,
            crf=self._crf,
            aspect=self._aspect,
            codec=self._codec,
            bits=self._bits,
            first_frame=self._first + first,
            finished=self._finished,
        )

    # ---------------------------------------------------------------------------------------------------------- writing

    def save_to(
        self,
        path: str | os.PathLike[str] | BinaryIO,
        format: Any = "auto",  # noqa: A002, ComfyUI's name for it
        codec: Any = "auto",
        metadata: Mapping[str, Any] | None = None,
        bit_depth: int | None = None,
        crf: float | None = None,
        color_space: str | None = None,
    ) -> None:
        """Write the video while it is decoded; the file gets its name when it is complete.

        Where it was written in this form before, and the file is there still, that is copied, and nothing is decoded.
        format: auto (by the suffix of `path`, else mp4), mp4, mov, mkv or webm; codec: auto (h264, in webm av1), h264,
        av1 or vp9; metadata: values that JSON can hold; bit_depth: 8 or 10; crf: lower is better, None takes that of
        this video. Raises ValueError for anything else.
        """
        if color_space is not None:
            check_choice("color_space", color_space, _COLOURS)
        container = _container(path, str(getattr(format, "value", format)))
        asked = str(getattr(codec, "value", codec))
        name = _codec(container, self._codec if asked == "auto" else asked)
        bits = bit_depth or self._bits
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()}
        target = path if isinstance(path, (str, os.PathLike)) else cast("BinaryIO", path)
        form = Form(container=container, codec=name, crf=self._crf if crf is None else crf, bits=bits)
        if self._copy(form, target, texts):
            return
        writer = VideoWriter(
            target,
            fps=self._rate,
            size=(self._height, self._width),
            aspect=self._aspect,
            audio=_sound(self.audio_of()),
            crf=form.crf,
            container=container,
            codec=name,
            bits=bits,
            metadata=texts,
        )
        with writer, closing(self._levels() if bits == 8 else self.chunks()) as chunks:
            for chunk in chunks:
                if chunk.dtype == torch.uint8:
                    writer.write_pixels(chunk)
                else:
                    writer.write(rearrange(chunk, "t h w c -> 1 c t h w") * 2 - 1)
            self._check_count(writer.frames)
        for sentence in writer.told:
            _log.warning("%s.", sentence)
        self._finished(self._first, self._first + self._count)
        if isinstance(target, (str, os.PathLike)):
            self._written.add(form, Path(target))

    def _copy(self, form: Form, target: str | os.PathLike[str] | BinaryIO, texts: Mapping[str, str]) -> bool:
        """Copy the file that was written in `form` before; False where there is none."""
        source = self._written.find(form)
        if source is None:
            return False
        copy_video(source, target, form.container, texts)
        if self._copied is not None:
            self._copied(source)
        return True

    def _levels(self) -> Generator[Tensor, None, None]:
        """All frames for a file of 8 bits: uint8 where whoever makes them can, else as `chunks`."""
        yield from (self._byte_frames or self._frames)(self._first, self._first + self._count)

    def get_stream_source(self) -> str:
        """Path of a file in ComfyUI's temporary folder, written when it is first asked for."""
        if self._file is None or not os.path.exists(self._file):
            folder = folder_paths.get_temp_directory()
            os.makedirs(folder, exist_ok=True)
            path = os.path.join(folder, f"video_{uuid.uuid4().hex}.mp4")
            self.save_to(path)
            self._file = path
        return self._file

    def _check_count(self, got: int) -> None:
        if got != self._count:
            raise VideoError(f"The video has {got} frames where {self._count} were announced; decode it again.")


def cut_audio(audio: Audio | None, begin: Fraction, end: Fraction | None) -> dict[str, Any] | None:
    """The part of an AUDIO from `begin` to `end`, in seconds; None where there is none or it is over before."""
    if audio is None:
        return None
    rate = int(audio["sample_rate"])
    waveform = audio["waveform"][..., round(begin * rate) : None if end is None else round(end * rate)]
    return {"waveform": waveform, "sample_rate": rate} if waveform.shape[-1] else None


def _sound(audio: Audio | None) -> Sound | None:
    """The AUDIO as sound for a file; of a batch the first."""
    if audio is None:
        return None
    waveform = audio["waveform"]
    if waveform.shape[0] > 1:
        _log.warning("The sound is a batch of %d; the first is used.", waveform.shape[0])
    return Sound(samples=waveform[0].float(), rate=int(audio["sample_rate"]))


def _container(path: Any, choice: str) -> Container:
    check_choice("The format of the video", choice, _CONTAINERS)
    if choice == "auto":
        suffix = Path(path).suffix.lower()[1:] if isinstance(path, (str, os.PathLike)) else ""
        choice = suffix if suffix in _CONTAINERS[1:] else "mp4"
    return cast("Container", choice)


def _codec(container: Container, choice: str) -> Codec:
    check_choice("The codec of the video", choice, _CODECS)
    if choice == "auto":
        choice = "av1" if container == "webm" else "h264"
    return cast("Codec", choice)
