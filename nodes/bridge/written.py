"""The files that a lazy video was written to: who asks for the same once more gets a copy, and nothing is decoded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
from av.container import InputContainer, OutputContainer

from ...vae_core.atomic import atomic_write

_MOVIES = ("mp4", "mov")
_MUXERS = {"mkv": "matroska"}  # where the muxer has another name than the container


@dataclass(frozen=True, kw_only=True)
class Form:
    """What decides the pictures and sound in a file: container, codec, quality and bits per channel."""

    container: str
    codec: str
    crf: float
    bits: int


class WrittenFiles:
    """Where a video was written, by form. A file that was changed, moved or deleted since then counts no more."""

    def __init__(self) -> None:
        self._files: dict[Form, tuple[Path, tuple[int, int]]] = {}

    def add(self, form: Form, path: Path) -> None:
        """`path` holds the whole video in `form` now."""
        self._files[form] = path, _stamp(path)

    def find(self, form: Form) -> Path | None:
        """A file that holds the whole video in `form`, if there is one still."""
        path, stamp = self._files.get(form, (None, None))
        try:
            return path if path is not None and _stamp(path) == stamp else None
        except OSError:
            return None


def copy_video(
    source: Path, target: str | os.PathLike[str] | BinaryIO, container: str, texts: Mapping[str, str]
) -> None:
    """Write what is in `source` to `target`, as it is, with other texts; a path gets its name when it is complete."""
    if not isinstance(target, (str, os.PathLike)):
        _remux(source, target, container, texts, [])
        return
    with atomic_write(Path(target)) as part:
        _remux(source, str(part), container, texts, ["faststart"])


def _remux(source: Path, target: str | BinaryIO, container: str, texts: Mapping[str, str], flags: list[str]) -> None:
    flags = flags + ["use_metadata_tags"] * bool(texts)
    options = {"movflags": "+".join(flags)} if flags and container in _MOVIES else {}
    with (
        av.open(str(source)) as reader,
        av.open(target, mode="w", format=_MUXERS.get(container, container), options=options) as writer,
    ):
        writer.metadata.update(texts)
        _copy_packets(reader, writer)


def _copy_packets(reader: InputContainer, writer: OutputContainer) -> None:
    # opaque: by the decoder's name, where PyAV finds no encoder of that name
    streams = {one.index: writer.add_stream_from_template(one, opaque=True) for one in reader.streams}
    for packet in reader.demux():
        if not packet.size:  # the end of a stream
            continue
        if packet.dts is None and packet.pts is not None:  # Matroska leaves the first ones out
            packet.dts = min(packet.pts, 0)
        packet.stream = streams[packet.stream.index]
        writer.mux(packet)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size
