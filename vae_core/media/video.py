"""Reading and writing video files with PyAV: lazily, with bounded memory, every frame at its true size.

Tensors are (1, 3, t, H, W), RGB, float32 in [-1, 1]. Sizes are (height, width), as in the rest of the package.
"""

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal

import av
import numpy as np
import torch
from av.codec.codec import UnknownCodecError
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream

from ..atomic import give_name, hidden, remove
from ..errors import VideoError
from ..run.output import to_uint8
from .audio import AudioTrack, Sound, SoundTrack
from .pixels import BT709, EXACT, Orientation, ToRGB

_HDR_TRANSFERS = (16, 18)  # PQ, HLG
_IMAGE_FORMATS = ("image2", "_pipe")
_DEFAULT_FPS = Fraction(25)  # of a still image, which has no rate of its own
Codec = Literal["h264", "vp9", "av1"]
Container = Literal["mp4", "mov", "mkv", "webm"]
_ENCODERS: dict[Codec, str] = {"h264": "libx264", "vp9": "libvpx-vp9", "av1": "libsvtav1"}
_MUXERS = {"mkv": "matroska"}  # where the muxer has another name than the container
_CODECS: dict[str, tuple[Codec, ...]] = {  # the first is the default
    ".mp4": ("h264", "av1", "vp9"),
    ".m4v": ("h264",),
    ".mov": ("h264",),
    ".mkv": ("h264", "av1", "vp9"),
    ".webm": ("vp9", "av1"),
}
OUTPUT_SUFFIXES = tuple(_CODECS)


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
        turned = Orientation(first, Path(path))
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
        converter: ToRGB | None = None
        held: list[torch.Tensor] = []
        count = 0
        for index, frame in enumerate(_decode(container, stream, source)):
            count = index + 1
            if index < start:
                continue
            if frames is not None and index >= start + frames:
                break
            converter = converter or ToRGB(frame, source)
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


class VideoWriter:
    """Writes one video, seen under its name only when it is complete.

    A context manager: frames go to a hidden `.part` file beside `path`, which takes its name when the block ends, and
    is removed when the block ends in an error. Tagged and converted as BT.709, limited range; a size with an odd side
    is stored as 4:4:4 (AV1: 4:2:0), because 4:2:0 H.264 has only even sizes. No picture is scaled or cut.

    `path` may also be a seekable binary file, which then needs `container` and is emptied after an error. `size` is
    (height, width); `fps` in frames per second; `times` the time of each frame in seconds where the rate varies (from
    `frame_times`); `aspect` the shape of a pixel. The sound is either the first track of the file `audio_from`, cut to
    `audio_range` = (first, end) in seconds of that file's clock, end None for all the rest; or `audio`, cut to the
    length of the picture. `container` goes before the suffix of `path`; `codec` None is H.264, VP9 in WebM. `crf` is
    the encoder's quality, 0 (lossless) to 51 for H.264 and 63 for VP9 and AV1, lower is better. `bits` is 8 or 10.
    `metadata` are texts for the file. An existing file is replaced.

    Raises `VideoError` for a name, folder, size or choice it cannot write, a wrong shape or no frame at all; `OSError`
    when the disk is full.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | BinaryIO,
        *,
        fps: Fraction,
        size: tuple[int, int],
        times: Sequence[Fraction] | None = None,
        aspect: Fraction = Fraction(1),
        audio_from: str | os.PathLike[str] | None = None,
        audio_range: tuple[Fraction, Fraction | None] = (Fraction(0), None),
        audio: Sound | None = None,
        crf: float = 16,
        container: Container | None = None,
        codec: Codec | None = None,
        bits: int = 8,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        named = isinstance(path, (str, os.PathLike))
        self._name = str(path) if named else "the video"
        self._path = Path(path) if named else None
        self._suffix = f".{container}" if container else Path(self._name).suffix.lower()
        self._output = self._part if named else path
        self._format = _MUXERS.get(container or "", container)
        self.frames = 0
        self._fps, self._size, self._aspect = Fraction(fps), size, aspect
        self._times = times if times and is_variable(times, self._fps) else None
        self._audio_from, self._audio_range, self._sound = audio_from, audio_range, audio
        self._metadata = dict(metadata or {})
        self._stack = contextlib.ExitStack()
        self._container: OutputContainer | None = None
        self._last_pts = -1
        self._end = Fraction(0)
        self._reformatter = VideoReformatter()
        check_output_name(Path(self._name + self._suffix) if container else Path(self._name))
        if min(size) < 16:
            raise VideoError(
                f"{self._name}: a picture of {size[1]}x{size[0]} is too small to store; 16x16 is the least."
            )
        self._codec: Codec = self._checked_codec(codec)
        self._pix_fmt = self._checked_format(bits)
        self._options = _quality(self._codec, crf, self._name)

    @property
    def _part(self) -> Path:
        assert self._path is not None
        return hidden(self._path)

    def _checked_codec(self, codec: Codec | None) -> Codec:
        allowed = _CODECS[self._suffix]
        if codec is not None and codec not in allowed:
            raise VideoError(
                f"{self._name}: {codec} video does not go into {self._suffix[1:]}; choose {' or '.join(allowed)}, or "
                "another container."
            )
        return codec or allowed[0]

    def _checked_format(self, bits: int) -> str:
        odd = any(side % 2 for side in self._size) and self._codec != "av1"
        name = ("yuv444p" if odd else "yuv420p") + ("10le" if bits == 10 else "")
        try:
            known = [form.name for form in av.Codec(_ENCODERS[self._codec], "w").video_formats or ()]
        except UnknownCodecError as error:
            raise VideoError(
                f"{self._name}: this PyAV cannot write {self._codec}; choose another codec or update av."
            ) from error
        if bits not in (8, 10) or name not in known:
            raise VideoError(
                f"{self._name}: {self._codec} video with {bits} bits cannot be written here; choose 8 bits."
            )
        return name

    def __enter__(self) -> "VideoWriter":
        flags = ["faststart"] * (self._path is not None) + ["use_metadata_tags"] * bool(self._metadata)
        movie = self._suffix in (".mp4", ".m4v", ".mov") and flags
        try:
            if self._path is not None:
                self._part.open("wb").close()  # PyAV opens it at the first packet only
            target = self._output if self._path is None else str(self._output)
            options = {"movflags": "+".join(flags)} if movie else {}
            container = av.open(target, mode="w", format=self._format, options=options)
        except (OSError, FFmpegError) as error:
            self._remove_part()
            if error.errno == errno.ENOSPC:
                raise
            raise VideoError(
                f"{self._name}: cannot be written there ({_reason(error)}); choose another place."
            ) from error
        self._container = container
        try:
            container.metadata.update(self._metadata)
            self._stream = self._add_picture(container)
            self._audio: AudioTrack | SoundTrack | None = None
            if self._sound is not None:
                self._audio = SoundTrack(self._sound, container)
            elif self._audio_from is not None:
                self._audio = self._stack.enter_context(AudioTrack(self._audio_from, container, *self._audio_range))
        except BaseException:
            self._abandon()
            raise
        return self

    def _add_picture(self, container: OutputContainer) -> VideoStream:
        height, width = self._size
        stream = container.add_stream(_ENCODERS[self._codec], rate=self._fps, options=self._options)
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = height, width
        stream.pix_fmt = self._pix_fmt
        context = stream.codec_context
        context.color_range, context.colorspace = ColorRange.MPEG, BT709
        context.color_primaries = context.color_trc = BT709
        if self._aspect != 1:
            context.sample_aspect_ratio = self._aspect
        context.time_base = Fraction(1, 90000) if self._times else 1 / self._fps
        try:
            context.open(strict=False)
        except FFmpegError as error:
            raise VideoError(
                f"{self._name}: {self._codec} video of {width}x{height} at {float(self._fps):g} per second cannot be "
                f"written by this PyAV ({_reason(error)}); choose another codec or size."
            ) from error
        return stream

    def write(self, frames: torch.Tensor) -> None:
        """Append (1, 3, t, H, W) or (3, t, H, W) frames, RGB in [-1, 1]; values outside are clamped."""
        batch = frames[None] if frames.ndim == 4 else frames
        if batch.ndim != 5 or batch.shape[:2] != (1, 3) or tuple(batch.shape[3:]) != self._size:
            raise VideoError(
                f"{self._name}: got frames of shape {tuple(frames.shape)}, this file takes "
                f"(1, 3, t, {self._size[0]}, {self._size[1]})."
            )
        for image in batch[0].detach().unbind(1):  # c h w
            self._add(_as_picture(image, deep=self._pix_fmt.endswith("10le")))

    def write_pixels(self, frames: torch.Tensor) -> None:
        """Append (t, H, W, 3) frames, RGB, uint8; nothing of them is kept."""
        if frames.dtype != torch.uint8 or frames.ndim != 4 or tuple(frames.shape[1:]) != (*self._size, 3):
            raise VideoError(
                f"{self._name}: got {frames.dtype} pixels of shape {tuple(frames.shape)}, this file takes torch.uint8, "
                f"(t, {self._size[0]}, {self._size[1]}, 3)."
            )
        for image in frames.cpu().unbind(0):  # h w c
            self._add(VideoFrame.from_ndarray(image.contiguous().numpy(), format="rgb24"))

    def _add(self, rgb: VideoFrame) -> None:
        assert self._container is not None, "frames are written inside the with block"
        picture = self._reformatter.reformat(
            rgb,
            format=self._pix_fmt,
            dst_colorspace=Colorspace.ITU709,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            interpolation=EXACT,
        )
        picture.pts, time = self._next_time()
        picture.time_base = self._stream.codec_context.time_base or 1 / self._fps
        self.frames += 1
        self._end = time + 1 / self._fps
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
                raise VideoError(f"{self._name}: no frame was given to write.")
            self._container.mux(self._stream.encode(None))
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


def _as_picture(image: torch.Tensor, *, deep: bool) -> VideoFrame:
    """A frame of 8 or, `deep`, 16 bits per channel from (3, H, W) in [-1, 1]."""
    if deep:
        levels = image.float().clamp(-1, 1).add(1).mul(32767.5).round().permute(1, 2, 0).cpu().numpy()  # h w c
        return VideoFrame.from_ndarray(np.ascontiguousarray(levels.astype(np.uint16)), format="rgb48le")
    return VideoFrame.from_ndarray(to_uint8(image).permute(1, 2, 0).cpu().contiguous().numpy(), format="rgb24")


def _quality(codec: Codec, crf: float, name: str) -> dict[str, str]:
    """The encoder's options."""
    worst = 51 if codec == "h264" else 63
    if not 0 <= crf <= worst:
        raise VideoError(f"{name}: the quality crf is {crf:g}; {codec} takes 0 (lossless) to {worst}.")
    if codec == "h264":
        return {"crf": f"{crf:g}", "preset": "medium"}
    if codec == "vp9":
        return {"crf": f"{crf:g}", "b": "0", "cpu-used": "4"}
    lossless = {} if crf else {"svtav1-params": "lossless=1"}  # crf 0 would be its default
    return {"preset": "8", "crf": f"{crf or 1:g}"} | lossless


def check_output_name(path: Path) -> None:
    """Raise `VideoError` unless the name ends in a suffix that can be written."""
    if path.suffix.lower() not in _CODECS:
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
