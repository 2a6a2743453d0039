"""Finished chunks of a decode, kept on the disk until its file is complete, so that it goes on after a crash."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from ..atomic import sweep
from ..errors import CheckpointError, VideoError
from ..run.snapshots import Remembered, Snapshots
from ..weights.headers import UnreadableError, read_header
from ..weights.tensors import digest, read_tensors, write_tensors

_ANY_SIZE = 1 << 62
_CHUNK, _SNAPSHOT = "chunk", "snapshot"
_NAME = re.compile(rf"({_CHUNK}|{_SNAPSHOT})_(\d{{6,}})\.safetensors")
_log = logging.getLogger("cviv-vae")


class DecodeStore:
    """The finished chunks of one decode in a folder of their own, each complete or not there at all.

    folder: made when something is kept. key: a hash of all that makes the frames; what lies there under another one
    goes. every: chunks from one snapshot of a streaming network to the next; the latest two are kept.
    """

    def __init__(self, folder: Path, key: str, *, every: int = 8) -> None:
        self.folder = folder
        self.snapshots = Snapshots(every, _Held(folder, key))
        self._key = key
        self._counts: list[int] = []  # frames of each chunk
        self._keeps = True
        sweep(folder)
        for path in sorted(_files(folder)):
            count = _frames(path, key)
            damaged = path.name.startswith(_SNAPSHOT) and _read(path) is None
            if count is None or damaged or (path.name.startswith(_CHUNK) and path != self._path(len(self._counts))):
                path.unlink(missing_ok=True)
            elif path.name.startswith(_CHUNK):
                self._counts.append(count)
        self.found = self.frames

    @property
    def frames(self) -> int:
        """How many are kept."""
        return sum(self._counts)

    def check_room(self, nbytes: int) -> None:
        """Raise VideoError where the disk has not so much room for frames."""
        place = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        free = shutil.disk_usage(place).free
        if free < nbytes:
            raise VideoError(
                f"To go on after a crash, {nbytes / 2**30:.1f} GiB of frames are kept in {self.folder} until the video "
                f"is complete, and the disk has {free / 2**30:.1f} GiB left. Make room, or decode without it."
            )

    def all(self, decode: Callable[[int, Snapshots], Iterable[Tensor]], total: int, *, dim: int) -> Iterator[Tensor]:
        """The chunks that are kept, then those of decode(first frame, snapshots), each kept before it comes.

        total: frames of the whole. dim: the axis of time.
        """
        for number, count in enumerate(list(self._counts)):
            chunk = (_read(self._path(number)) or {}).get("frames")
            if chunk is None or chunk.shape[dim] != count:
                _log.warning("%s is damaged: goes on from frame %d.", self._path(number), sum(self._counts[:number]))
                del self._counts[number:]
                break
            yield chunk
        if self.frames < total:
            for chunk in decode(self.frames, self.snapshots):
                self._keep(chunk, chunk.shape[dim])
                yield chunk

    def remove(self) -> None:
        """Keep nothing any more."""
        for path in _files(self.folder):
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not self.folder.is_symlink() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _keep(self, chunk: Tensor, frames: int) -> None:
        if not self._keeps:
            return
        try:
            self.folder.mkdir(exist_ok=True)
            _write(self._path(len(self._counts)), {"frames": chunk}, self._key, frames)
            self._counts.append(frames)
        except (OSError, SafetensorError) as error:  # the video can be finished all the same
            self._keeps = False
            _log.warning("from frame %d on nothing is kept for a later run: %s", self.frames, error)

    def _path(self, number: int) -> Path:
        return self.folder / f"{_CHUNK}_{number:06}.safetensors"


class _Held(MutableMapping[int, Remembered]):
    """Snapshots in a folder; the latest two."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key

    def __getitem__(self, number: int) -> Remembered:
        if number not in self:
            raise KeyError(number)
        return read_tensors(self._path(number), _ANY_SIZE)[0]

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and self._path(number).is_file()

    def __setitem__(self, number: int, remembered: Remembered) -> None:
        try:
            self._folder.mkdir(exist_ok=True)
            _write(self._path(number), remembered, self._key, 0)
        except (OSError, SafetensorError) as error:
            _log.warning("what chunk %d leaves could not be kept for a later run: %s", number, error)
            return
        for old in sorted(self)[:-2]:
            del self[old]

    def __delitem__(self, number: int) -> None:
        self._path(number).unlink()

    def __iter__(self) -> Iterator[int]:
        for path in _files(self._folder):
            found = _NAME.fullmatch(path.name)
            if found is not None and found[1] == _SNAPSHOT:
                yield int(found[2])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, number: int) -> Path:
        return self._folder / f"{_SNAPSHOT}_{number:06}.safetensors"


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_file()]


def _write(path: Path, tensors: Remembered, key: str, frames: int) -> None:
    write_tensors(path, tensors, {"key": key, "frames": str(frames), "sha256": _sum(tensors)})


def _read(path: Path) -> Remembered | None:
    """What was written; None where anything of it has changed."""
    try:
        tensors, texts = read_tensors(path, _ANY_SIZE)
    except CheckpointError:
        return None
    return tensors if texts.get("sha256") == _sum(tensors) else None


def _sum(tensors: Remembered) -> str:
    return digest(dict(sorted(tensors.items())))


def _frames(path: Path, key: str) -> int | None:
    """Frames of a kept file; None where it is damaged or of another decode."""
    try:
        texts = read_header(path).metadata
        return int(texts["frames"]) if texts["key"] == key else None
    except (UnreadableError, CheckpointError, OSError, KeyError, ValueError):
        return None
