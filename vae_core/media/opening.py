"""Opening a media file: a regular file only, under a name that no protocol can catch; and its tracks."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition, Stream
from av.video.stream import VideoStream

from ..errors import VideoError
from ..weights.headers import dangling, seen_as_text

_STILL_FORMATS = ("image2", "_pipe")
_NO_TIMES, _TIMES_JUMP = 0x80, 0x200  # AVFMT_NOTIMESTAMPS, AVFMT_TS_DISCONT


def check_file(path: Path) -> os.stat_result:
    """What the system knows of a regular file. Raises VideoError for anything else, without opening it."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise VideoError(f"{path}: {dangling(path) or 'no such file.'}") from None
    except (OSError, ValueError) as error:
        raise VideoError(f"{path}: cannot be opened ({reason(error)}).") from error
    if stat.S_ISDIR(status.st_mode):
        raise VideoError(f"{path}: is a folder; give a video file.")
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(
            f"{path}: is no regular file but a pipe, a socket or a device, which cannot be read twice; copy what comes "
            "out of it into a file."
        )
    return status


def open_media(path: Path) -> InputContainer:
    """The file, opened. Raises VideoError where that cannot be."""
    check_file(path)
    try:
        return av.open(media_url(path), mode="r", metadata_errors="replace")
    except PermissionError as error:
        raise VideoError(f"{path}: may not be read (permission denied).") from error
    except (FFmpegError, OSError, ValueError) as error:
        why = f"cannot be read as video ({reason(error)}); it is damaged, cut short, or another kind of file."
        raise VideoError(f"{path}: {seen_as_text(path) or why}") from error


def media_url(path: Path) -> str:
    """`path` as the libraries take it: a name with a colon is no protocol."""
    return f"file:{path}"


def picture_stream(container: InputContainer, path: object) -> VideoStream:
    """The first video track that is no cover picture. Raises VideoError where there is none, or no decoder for it."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            if not has_decoder(stream):
                raise VideoError(f"{path}: its video is of a kind this PyAV has no decoder for; convert it to H.264.")
            return stream
    kind = "only sound" if container.streams.audio else "no picture"
    raise VideoError(f"{path}: holds {kind}; give a file with a video stream.")


def sound_stream(container: InputContainer) -> AudioStream | None:
    """The first sound track that can be decoded."""
    return next((stream for stream in container.streams.audio if has_decoder(stream)), None)


def has_decoder(stream: Stream) -> bool:
    """Whether the libraries can decode `stream`; to decode it all the same would end the process."""
    return stream.codec_context is not None  # pyright: ignore[reportUnnecessaryComparison]


def is_still(container: InputContainer) -> bool:
    """Whether the file is one image."""
    return any(mark in container.format.name for mark in _STILL_FORMATS)


def times_may_jump(container: InputContainer) -> bool:
    """Whether time stamps of this format may start again within a file, as in joined transport streams."""
    return bool(int(container.format.flags) & _TIMES_JUMP)


def has_no_times(container: InputContainer) -> bool:
    """Whether this is a raw stream, in which nothing but their order tells when frames are shown."""
    return bool(int(container.format.flags) & _NO_TIMES)


def keeps_order_only(container: InputContainer) -> bool:
    """Whether the format has times for the order of decoding alone; what the libraries make of them is guessed."""
    return container.format.name == "avi"


def reason(error: BaseException) -> str:
    """A few words on what went wrong, for the middle of a sentence."""
    return str(getattr(error, "strerror", None) or error).lower() or type(error).__name__
