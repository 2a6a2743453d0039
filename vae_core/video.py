"""Reading and writing video files with PyAV: lazily, with bounded memory, every frame at its true size.

Tensors are (1, 3, t, H, W), RGB, float32 in [-1, 1]. Sizes are (height, width), as in the rest of the package.
"""

import contextlib
import errno
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import cast

import av
import numpy as np
import torch
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError
from av.sidedata.sidedata import SideData
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream

from .errors import VideoError
from .video_audio import AudioTrack

_UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED, the same number for primaries and transfer
_BT709 = 1
_HDR_TRANSFERS = (16, 18)  # PQ, HLG
_IMAGE_FORMATS = ("image2", "_pipe")
_DEFAULT_FPS = Fraction(25)  # of a still image, which has no rate of its own
# flags of swscale.h: bicubic, accurate rounding, full chroma in and out, bit-exact (older PyAV lacks the names)
_EXACT = 0x4 | 0x40000 | 0x2000 | 0x4000 | 0x80000
_VIDEO_CODECS = {".mp4": "libx264", ".m4v": "libx264", ".mov": "libx264", ".mkv": "libx264", ".webm": "libvpx-vp9"}
OUTPUT_SUFFIXES = tuple(_VIDEO_CODECS)


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video file says of itself, after its rotation is applied.

    `frames` is the container's own count and None where it keeps none; `fps` is the average rate in frames per second;
    `aspect` is width to height of one pixel (1 for square pixels); `hdr` marks PQ and HLG material, which is read as it
    is stored, without tone mapping.
    """

    width: int
    height: int
    fps: Fraction
    frames: int | None
    duration: float | None
    aspect: Fraction
    codec: str
    audio_codec: str | None
    hdr: bool

    @property
    def has_audio(self) -> bool:
        """Whether there is a sound track."""
        return self.audio_codec is not None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.height, self.width

    @property
    def expected_frames(self) -> int | None:
        """The frame count, or an estimate from duration and rate, for progress bars only."""
        if self.frames is not None:
            return self.frames
        return None if self.duration is None else max(1, round(self.duration * self.fps))


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Look at a video or image file and decode its first frame.

    Raises `VideoError` where the file is missing, is a folder, cannot be read as video or has no picture.
    """
    with _open(Path(path)) as container:
        stream = _picture_stream(container, Path(path))
        first = next(_decode(container, stream, Path(path)), None)
        if first is None:
            raise VideoError(f"{path}: holds a video stream without a single readable frame; choose another file.")
        turned = _Orientation(first, Path(path))
        height, width = turned.size(first.height, first.width)
        still = any(mark in container.format.name for mark in _IMAGE_FORMATS)
        duration = _duration(container, stream)
        aspect = stream.sample_aspect_ratio or Fraction(1)
        audio = container.streams.audio[0] if container.streams.audio else None
        return VideoInfo(
            width=width,
            height=height,
            fps=_DEFAULT_FPS if still else stream.average_rate or stream.guessed_rate or _DEFAULT_FPS,
            frames=1 if still else stream.frames or None,
            duration=None if still else duration,
            aspect=1 / aspect if turned.swaps_axes else aspect,
            codec=stream.codec_context.name,
            audio_codec=None if audio is None else audio.codec_context.name,
            hdr=stream.codec_context.color_trc in _HDR_TRANSFERS,
        )


def read_frames(
    path: str | os.PathLike[str], start: int = 0, frames: int | None = None, piece: int = 4
) -> Iterator[torch.Tensor]:
    """Read frames lazily, at most `piece` at a time, as (1, 3, t, H, W) float32 RGB in [-1, 1].

    `start` counts frames from 0; the frames before it are decoded and passed over, so it is exact in every file.
    `frames` None reads to the end, and a file that ends earlier gives fewer. The rotation the file asks for is applied.
    YUV is converted by the matrix and range the file states (where it states none: BT.709 from 720 lines or 1280
    columns on, else BT.601); more than 8 bits per channel are kept; alpha is dropped.

    Raises `VideoError` where the file is not a readable video, `start` is beyond its end, a frame is damaged, or the
    picture changes size on the way.
    """
    source = Path(path)
    if start < 0 or (frames is not None and frames < 1) or piece < 1:
        raise VideoError(
            f"got start={start}, frames={frames}, piece={piece}; start must be 0 or more, frames and piece 1 or more."
        )
    with _open(source) as container:
        stream = _picture_stream(container, source)
        stream.thread_type = "AUTO"
        converter: _ToRGB | None = None
        held: list[torch.Tensor] = []
        count = 0
        for index, frame in enumerate(_decode(container, stream, source)):
            count = index + 1
            if index < start:
                continue
            if frames is not None and index >= start + frames:
                break
            converter = converter or _ToRGB(frame, source)
            held.append(converter(frame, index))
            if len(held) == piece:
                yield torch.stack(held, 1)[None]  # 1 c t h w
                held = []
        if count <= start:
            raise VideoError(f"{source}: has {count} frames, numbered from 0; a start at frame {start} is beyond them.")
        if held:
            yield torch.stack(held, 1)[None]  # 1 c t h w


def frame_times(path: str | os.PathLike[str], start: int = 0, frames: int | None = None) -> list[Fraction]:
    """When each frame is shown, in seconds on the file's own clock, from `start` on; nothing is decoded.

    Empty where the file carries no times (a still image, a raw stream).
    """
    source, times = Path(path), list[Fraction]()
    wanted = None if frames is None else start + frames + 64  # packets come in coding order: read a little further
    with _open(source) as container:
        stream = _picture_stream(container, source)
        with contextlib.suppress(FFmpegError):  # a damaged tail is the reader's business
            for packet in container.demux(stream):
                if packet.pts is None:
                    if packet.size:
                        return []
                    continue
                if not packet.is_discard:
                    times.append(packet.pts * packet.time_base)
                if wanted is not None and len(times) >= wanted:
                    break
    return sorted(times)[start : None if frames is None else start + frames]


def is_variable(times: Sequence[Fraction], fps: Fraction) -> bool:
    """Whether these frame times (seconds) leave the even grid of `fps` by more than half a frame anywhere."""
    return any(abs((time - times[0]) * fps - index) > Fraction(1, 2) for index, time in enumerate(times))


def to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """[-1, 1] floats to 0..255, rounded and clamped, of the same shape."""
    return frames.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


class VideoWriter:
    """Writes one video, seen under its name only when it is complete.

    A context manager: frames go to a hidden `.part` file beside `path`, which takes its name when the block ends, and
    is removed when the block ends in an error. H.264 (VP9 for .webm), tagged and converted as BT.709, limited range; a
    size with an odd side is stored as 4:4:4, because 4:2:0 H.264 has only even sizes. No picture is scaled or cut.

    `size` is (height, width); `fps` in frames per second; `times` the time of each frame in seconds where the rate
    varies (from `frame_times`); `aspect` the shape of a pixel; `audio_from` a file whose first sound track goes along,
    cut to `audio_range` = (first, end) in seconds of that file's clock, end None for all the rest. An existing file is
    replaced.

    Raises `VideoError` for a name, folder or size it cannot write, a wrong shape or no frame at all; `OSError` when the
    disk is full.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fps: Fraction,
        size: tuple[int, int],
        times: Sequence[Fraction] | None = None,
        aspect: Fraction = Fraction(1),
        audio_from: str | os.PathLike[str] | None = None,
        audio_range: tuple[Fraction, Fraction | None] = (Fraction(0), None),
        crf: int = 16,
    ) -> None:
        self.path = Path(path)
        self.frames = 0
        self._part = self.path.with_name(f".{self.path.stem}.{os.getpid()}.part{self.path.suffix}")
        self._fps, self._size, self._aspect, self._crf = Fraction(fps), size, aspect, crf
        self._times = times if times and is_variable(times, self._fps) else None
        self._audio_from, self._audio_range = audio_from, audio_range
        self._stack = contextlib.ExitStack()
        self._container: OutputContainer | None = None
        self._last_pts = -1
        self._reformatter = VideoReformatter()
        check_output_name(self.path)
        if min(size) < 16:
            raise VideoError(f"{path}: a picture of {size[1]}x{size[0]} is too small to store; 16x16 is the least.")

    def __enter__(self) -> "VideoWriter":
        try:
            self._part.open("wb").close()  # PyAV opens it at the first packet only
            options = {"movflags": "faststart"} if self.path.suffix.lower() in (".mp4", ".m4v", ".mov") else {}
            container = av.open(str(self._part), mode="w", options=options)
        except (OSError, FFmpegError) as error:
            self._remove_part()
            if error.errno == errno.ENOSPC:
                raise
            raise VideoError(
                f"{self.path}: cannot be written there ({_reason(error)}); choose another place."
            ) from error
        self._container = container
        try:
            self._stream = self._add_picture(container)
            self._audio = None
            if self._audio_from is not None:
                self._audio = self._stack.enter_context(AudioTrack(self._audio_from, container, *self._audio_range))
        except BaseException:
            self._abandon()
            raise
        return self

    def _add_picture(self, container: OutputContainer) -> VideoStream:
        height, width = self._size
        codec = _VIDEO_CODECS[self.path.suffix.lower()]
        effort = {"preset": "medium"} if codec == "libx264" else {"b": "0", "cpu-used": "4"}
        quality = {"crf": str(self._crf)} | effort
        stream = container.add_stream(codec, rate=self._fps, options=quality)
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        context = stream.codec_context
        context.color_range, context.colorspace = ColorRange.MPEG, _BT709
        context.color_primaries = context.color_trc = _BT709
        if self._aspect != 1:
            context.sample_aspect_ratio = self._aspect
        context.time_base = Fraction(1, 90000) if self._times else 1 / self._fps
        return stream

    def write(self, frames: torch.Tensor) -> None:
        """Append (1, 3, t, H, W) or (3, t, H, W) frames, RGB in [-1, 1]; values outside are clamped."""
        batch = frames[None] if frames.ndim == 4 else frames
        if batch.ndim != 5 or batch.shape[:2] != (1, 3) or tuple(batch.shape[3:]) != self._size:
            raise VideoError(
                f"{self.path}: got frames of shape {tuple(frames.shape)}, this file takes "
                f"(1, 3, t, {self._size[0]}, {self._size[1]})."
            )
        assert self._container is not None, "write() belongs inside the with block"
        for image in to_uint8(batch[0].detach()).permute(1, 2, 3, 0).cpu():  # h w c
            picture = self._reformatter.reformat(
                VideoFrame.from_ndarray(np.ascontiguousarray(image.numpy()), format="rgb24"),
                format=self._stream.pix_fmt,
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
                interpolation=_EXACT,
            )
            picture.pts, time = self._next_time()
            picture.time_base = self._stream.codec_context.time_base or 1 / self._fps
            self.frames += 1
            self._container.mux(self._stream.encode(picture))
            if self._audio is not None:
                self._audio.advance(time)

    def _next_time(self) -> tuple[int, Fraction]:
        if self._times is None:
            return self.frames, self.frames / self._fps
        known = min(self.frames, len(self._times) - 1)
        time = self._times[known] - self._times[0] + (self.frames - known) / self._fps
        self._last_pts = max(self._last_pts + 1, round(time * 90000))
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
                raise VideoError(f"{self.path}: no frame was given to write.")
            self._container.mux(self._stream.encode(None))
            if self._audio is not None:
                self._audio.finish()
            self._container.close()
            self._stack.close()
            os.replace(self._part, self.path)
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        with contextlib.suppress(Exception):
            self._stack.close()
        if self._container is not None:
            with contextlib.suppress(Exception):
                self._container.close()
        self._remove_part()

    def _remove_part(self) -> None:
        with contextlib.suppress(OSError):
            self._part.unlink(missing_ok=True)


def check_output_name(path: Path) -> None:
    """Raise `VideoError` unless the name ends in a suffix that can be written."""
    if path.suffix.lower() not in _VIDEO_CODECS:
        raise VideoError(
            f"{path}: cannot tell which kind of video to write; end the name in one of {', '.join(OUTPUT_SUFFIXES)}."
        )


def _open(path: Path) -> InputContainer:
    if path.is_dir():
        raise VideoError(f"{path}: is a folder; give a video file.")
    if not path.exists():
        raise VideoError(f"{path}: no such file.")
    try:
        return av.open(str(path), mode="r", metadata_errors="replace")
    except PermissionError as error:
        raise VideoError(f"{path}: may not be read (permission denied).") from error
    except (FFmpegError, OSError) as error:
        raise VideoError(
            f"{path}: cannot be read as video ({_reason(error)}); it is damaged, cut short, or another kind of file."
        ) from error


def _picture_stream(container: InputContainer, path: Path) -> VideoStream:
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            if stream.codec_context is None:  # pyright: ignore[reportUnnecessaryComparison]
                raise VideoError(f"{path}: its video is of a kind this PyAV has no decoder for; convert it to H.264.")
            return stream
    kind = "only sound" if container.streams.audio else "no picture"
    raise VideoError(f"{path}: holds {kind}; give a file with a video stream.")


def _decode(container: InputContainer, stream: VideoStream, path: Path) -> Iterator[VideoFrame]:
    count = 0
    try:
        for frame in container.decode(stream):
            yield frame
            count += 1
    except FFmpegError as error:
        advice = f"only the {count} frames before it can be used" if count else "choose another file"
        raise VideoError(f"{path}: is damaged at frame {count} ({_reason(error)}); {advice}.") from error


def _duration(container: InputContainer, stream: VideoStream) -> float | None:
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / av.time_base


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error).lower()


class _Orientation:
    """The quarter turns and mirrorings of a frame's display matrix, as row and column operations."""

    def __init__(self, frame: VideoFrame, path: Path) -> None:
        entries = cast("Iterable[SideData]", frame.side_data)
        found = next((data for data in entries if data.type.name == "DISPLAYMATRIX"), None)
        a, b, c, d = 1, 0, 0, 1
        if found is not None:
            values = struct.unpack("=9i", bytes(found)[:36])
            scale = max(abs(values[i]) for i in (0, 1, 3, 4)) or 1
            a, b, c, d = (round(values[i] / scale, 2) for i in (0, 1, 3, 4))
        if sorted(map(abs, (a, b, c, d))) != [0, 0, 1, 1] or abs(a) != abs(d):
            raise VideoError(
                f"{path}: asks to be shown turned by {frame.rotation} degrees; only quarter turns can be applied."
            )
        self.swaps_axes = a == 0
        # a pixel (x, y) is shown at (a x + c y, b x + d y)
        self.flip_x = (c if self.swaps_axes else a) < 0
        self.flip_y = (b if self.swaps_axes else d) < 0

    def size(self, height: int, width: int) -> tuple[int, int]:
        return (width, height) if self.swaps_axes else (height, width)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        turned = image.transpose(-1, -2) if self.swaps_axes else image  # c h w
        dims = [dim for dim, flip in ((-1, self.flip_x), (-2, self.flip_y)) if flip]
        return turned.flip(dims) if dims else turned


class _ToRGB:
    """Converts frames like the first to (3, H, W) float32 in [-1, 1]."""

    def __init__(self, first: VideoFrame, path: Path) -> None:
        self._path, self._reformatter = path, VideoReformatter()
        self._shape = first.height, first.width
        self._turn = _Orientation(first, path)
        self._deep = any(part.bits > 8 for part in first.format.components)

    def __call__(self, frame: VideoFrame, index: int) -> torch.Tensor:
        if (frame.height, frame.width) != self._shape:
            raise VideoError(
                f"{self._path}: changes from {self._shape[1]}x{self._shape[0]} to {frame.width}x{frame.height} at "
                f"frame {index}; one size is needed: use the frames before it, or convert it first."
            )
        space = frame.colorspace
        if space == _UNSPECIFIED:
            space = _BT709 if frame.height >= 720 or frame.width >= 1280 else Colorspace.ITU601
        array = self._reformatter.reformat(
            frame,
            format="rgb48le" if self._deep else "rgb24",
            src_colorspace=space,
            # without meaning for RGB, but older PyAV takes no notice of the source's matrix where the two are equal
            dst_colorspace=Colorspace.ITU601 if space == _BT709 else Colorspace.ITU709,
            src_color_range=ColorRange.JPEG if frame.format.name.startswith("yuvj") else frame.color_range,
            dst_color_range=ColorRange.JPEG,
            interpolation=_EXACT,
        ).to_ndarray()
        peak = 65535 if self._deep else 255
        image = torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1)  # c h w
        return self._turn(image.mul_(2 / peak).sub_(1)).contiguous()
