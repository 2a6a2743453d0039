"""Writing video files with PyAV: every frame at its true size and its own time, with sound."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import av
import torch
from av.container import OutputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from ..atomic import give_name, hidden, remove
from ..errors import VideoError
from .audio import AudioTrack, SoundTrack
from .codecs import ENCODERS, MUXERS, Codec, Container, check_output_name, choose
from .colour import BT709
from .opening import media_url, reason
from .pixels import FromRGB
from .sound import Sound
from .timeline import Shifts

_TICKS = 90000  # per second, where frames have times of their own
_MATROSKA = (".mkv", ".webm")  # PyAV cannot set the display size of their tracks; h264 keeps the shape itself


class VideoWriter:
    """Writes one video, seen under its name only when it is complete.

    A context manager: frames go to a hidden `.part` file beside `path`, which takes its name when the block ends, and
    is removed when the block ends in an error. Tagged and converted as BT.709, limited range; a size with an odd side
    is stored as 4:4:4 (AV1: 4:2:0), because 4:2:0 H.264 has only even sizes. No picture is scaled or cut.

    `path` may also be a seekable binary file, which then needs `container` and is emptied after an error. `size` is
    (height, width); `fps` in frames per second; `times` the time of each frame in seconds where they are not 1 / fps
    apart, `end` when the last one ends; `aspect` the shape of a pixel. The sound is either the first track of the file
    `audio_from`, cut to `audio_range` = (first, end) in seconds of that file's clock, end None for all the rest,
    `audio_shifts` those of its timeline; or `audio`, cut to the length of the picture. `container` goes before the
    suffix of `path`; `codec` None is H.264, VP9 in WebM; ProRes goes into MOV and MKV, FFV1 (lossless RGB) into MKV.
    `crf` is the encoder's quality, 0 (lossless) to 51 for H.264 and 63 for VP9 and AV1, lower is better; None is 16.
    `bits` is 8 or 10, for FFV1 also 16; `pix_fmt` names the pixel format instead. `metadata` are texts for the file. An
    existing file is replaced. `told` says what did not come through as it was.

    Raises `VideoError` for a name, folder, size or choice it cannot write, a wrong shape, values that are no numbers or
    no frame at all; `OSError` when the disk is full.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | BinaryIO,
        *,
        fps: Fraction,
        size: tuple[int, int],
        times: Sequence[Fraction] | None = None,
        end: Fraction | None = None,
        aspect: Fraction = Fraction(1),
        audio_from: str | os.PathLike[str] | None = None,
        audio_range: tuple[Fraction, Fraction | None] = (Fraction(0), None),
        audio_shifts: Mapping[int, Shifts] | None = None,
        audio: Sound | None = None,
        crf: float | None = None,
        container: Container | None = None,
        codec: Codec | None = None,
        bits: int | None = None,
        pix_fmt: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        named = isinstance(path, (str, os.PathLike))
        self._name = str(path) if named else "the video"
        self._path = Path(path) if named else None
        self._suffix = f".{container}" if container else Path(self._name).suffix.lower()
        self._output = self._part if named else path
        self.frames = 0
        self._fps, self._size, self._aspect = Fraction(fps), size, aspect
        self._times = times or None
        self._last_end = end
        self._audio_from, self._audio_range, self._sound = audio_from, audio_range, audio
        self._audio_shifts = audio_shifts or {}
        self._audio: AudioTrack | SoundTrack | None = None
        self._metadata = dict(metadata or {})
        self._stack = contextlib.ExitStack()
        self._container: OutputContainer | None = None
        self._last_pts = -1
        self._end = Fraction(0)
        check_output_name(Path(self._name + self._suffix) if container else Path(self._name))
        if min(size) < 16:
            raise VideoError(
                f"{self._name}: a picture of {size[1]}x{size[0]} is too small to store; 16x16 is the least."
            )
        if not 0 < self._fps <= 1000:
            raise VideoError(
                f"{self._name}: a rate of {float(self._fps):g} frames per second; above 0 to 1000 can be stored."
            )
        self._choice = choose(self._name, self._suffix, size, codec, bits, pix_fmt, crf)
        self._convert = FromRGB(self._choice.made, size, settled=self._choice.lossless)
        self._repacked = VideoReformatter()

    @property
    def told(self) -> list[str]:
        """What did not come through as it was, known once the block is entered."""
        told = [] if self._audio is None else [*self._audio.told]
        if self._aspect != 1 and self._suffix in _MATROSKA and self._choice.codec != "h264":
            others = "" if self._suffix == ".webm" else ", or h264"
            told.append(
                f"the pixels of {self._aspect.numerator}:{self._aspect.denominator} are written as square ones, since "
                f"{self._choice.codec} in {self._suffix} cannot be given their shape; choose .mp4 or .mov{others}"
            )
        return told

    @property
    def _part(self) -> Path:
        assert self._path is not None
        return hidden(self._path)

    def __enter__(self) -> VideoWriter:
        flags = ["faststart"] * (self._path is not None) + ["use_metadata_tags"] * bool(self._metadata)
        movie = self._suffix in (".mp4", ".m4v", ".mov") and flags
        try:
            if self._path is not None:
                self._part.open("wb").close()  # PyAV opens it at the first packet only
            target = self._output if self._path is None else media_url(self._part)
            options = {"movflags": "+".join(flags)} if movie else {}
            container = av.open(target, mode="w", format=MUXERS[self._suffix], options=options)
        except (OSError, FFmpegError) as error:
            self._remove_part()
            if error.errno == errno.ENOSPC:
                raise
            raise VideoError(
                f"{self._name}: cannot be written there ({reason(error)}); choose another place."
            ) from error
        self._container = container
        try:
            container.metadata.update(self._metadata)
            self._stream = self._add_picture(container)
            if self._sound is not None:
                self._audio = SoundTrack(self._sound, container)
            elif self._audio_from is not None:
                track = AudioTrack(self._audio_from, container, *self._audio_range, self._audio_shifts)
                self._audio = self._stack.enter_context(track)
        except BaseException:
            self._abandon()
            raise
        return self

    def _add_picture(self, container: OutputContainer) -> VideoStream:
        height, width = self._size
        codec = self._choice.codec
        stream = container.add_stream(ENCODERS[codec], rate=self._fps, options=self._choice.options)
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = height, width
        stream.pix_fmt = self._choice.pix_fmt
        context = stream.codec_context
        if self._choice.pix_fmt.startswith("yuv"):
            context.color_range, context.colorspace = ColorRange.MPEG, BT709
        context.color_primaries = context.color_trc = BT709
        if self._aspect != 1:
            context.sample_aspect_ratio = self._aspect
        context.time_base = Fraction(1, _TICKS) if self._times else 1 / self._fps
        try:
            context.open(strict=False)
        except FFmpegError as error:
            raise VideoError(
                f"{self._name}: {codec} video of {width}x{height} at {float(self._fps):g} per second cannot be "
                f"written by this PyAV ({reason(error)}); choose another codec or size."
            ) from error
        return stream

    def write(self, frames: Tensor) -> None:
        """Append (1, 3, t, H, W) or (3, t, H, W) frames, RGB in [-1, 1]; values outside are clamped."""
        batch = frames[None] if frames.ndim == 4 else frames
        if batch.ndim != 5 or batch.shape[:2] != (1, 3) or tuple(batch.shape[3:]) != self._size:
            raise VideoError(
                f"{self._name}: got frames of shape {tuple(frames.shape)}, this file takes "
                f"(1, 3, t, {self._size[0]}, {self._size[1]})."
            )
        for image in batch[0].detach().unbind(1):  # c h w
            self._add(checked(image, self._name, self.frames))

    def write_pixels(self, frames: Tensor) -> None:
        """Append (t, H, W, 3) frames, RGB, uint8; nothing of them is kept."""
        if frames.dtype != torch.uint8 or frames.ndim != 4 or tuple(frames.shape[1:]) != (*self._size, 3):
            raise VideoError(
                f"{self._name}: got {frames.dtype} pixels of shape {tuple(frames.shape)}, this file takes torch.uint8, "
                f"(t, {self._size[0]}, {self._size[1]}, 3)."
            )
        for image in frames.cpu().unbind(0):  # h w c
            self._add(image.permute(2, 0, 1).float().mul_(2 / 255).sub_(1))

    def _add(self, rgb: Tensor) -> None:
        assert self._container is not None, "frames are written inside the with block"
        picture = self._convert(rgb)
        if self._choice.made != self._choice.pix_fmt:
            picture = self._repacked.reformat(picture, format=self._choice.pix_fmt)
        picture.pts, time = self._next_time()
        picture.time_base = self._stream.codec_context.time_base or 1 / self._fps
        self.frames += 1
        self._end = time + 1 / self._fps
        self._mux(picture)
        if self._audio is not None:
            self._audio.advance(time)

    def _mux(self, picture: VideoFrame | None) -> None:
        assert self._container is not None
        packets: list[Packet[VideoStream]] = self._stream.encode(picture)
        if picture is None and self._times and self._last_end is not None:
            for packet in packets:
                if packet.pts == self._last_pts:
                    length = round((self._last_end - self._times[0]) * _TICKS) - self._last_pts
                    packet.duration = max(1, length)
                    self._end = max(self._end, self._last_end - self._times[0])
        self._container.mux(packets)

    def _next_time(self) -> tuple[int, Fraction]:
        if self._times is None:
            return self.frames, self.frames / self._fps
        known = min(self.frames, len(self._times) - 1)
        time = self._times[known] - self._times[0] + (self.frames - known) / self._fps
        self._last_pts = max(self._last_pts + 1, round(time * _TICKS))
        return self._last_pts, time

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            assert self._container is not None
            if not self.frames:
                raise VideoError(f"{self._name}: no frame was given to write.")
            self._mux(None)
            if self._audio is not None:
                self._audio.advance(self._end)
                self._audio.finish()
            self._container.close()
            self._stack.close()
        except BaseException:
            self._abandon()
            raise
        if self._path is not None:
            give_name(self._part, self._path)

    def _abandon(self) -> None:
        with contextlib.suppress(Exception):
            self._stack.close()
        if self._container is not None:
            with contextlib.suppress(Exception):
                self._container.close()
        self._remove_part()

    def _remove_part(self) -> None:
        with contextlib.suppress(OSError):
            if self._path is not None:
                remove(self._part)
            elif not isinstance(self._output, Path):
                self._output.seek(0)
                self._output.truncate()


def checked(image: Tensor, name: str, number: int) -> Tensor:
    """The same frame. Raises VideoError where it holds values that are no numbers."""
    if not torch.isfinite(image).all():
        raise VideoError(
            f"{name}: frame {number} holds NaN or infinity and is not written; in float16, load the VAE in bfloat16 or "
            "float32."
        )
    return image
