"""What there is to train on or to encode: images and videos in folders, in CSV lists and in tar shards (WebDataset).

A tar shard is read with `tarfile` and not with the webdataset package: an uncompressed shard is listed once, and then
every member is read at its own place like a file. So all shards are shuffled together, and a run goes on exactly where
it was with any number of workers, which a stream through shards cannot do. Shards are local files.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from .data import TrainingDataError

Kind = Literal["image", "video"]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".gif")
COLUMNS = ("path", "weight", "start", "end")


@dataclass(frozen=True, kw_only=True)
class ClipFile:
    """One image or video: a file, or a member of a tar shard.

    key: its place inside the source it was found in, which stays the same when the source is moved. weight: how often
    it is drawn, relative to the others. start, end: the part to use, in seconds of the video's own clock from its first
    frame; end None: all the rest. offset, size: where a member lies in its shard, in bytes; offset None: a plain file.
    """

    path: Path
    key: str
    kind: Kind
    weight: float = 1.0
    start: float = 0.0
    end: float | None = None
    member: str = ""
    offset: int | None = None
    size: int = 0

    @property
    def name(self) -> str:
        """What to call it in a report."""
        part = "" if self.end is None and not self.start else f" from {self.start:g} s"
        part += "" if self.end is None else f" to {self.end:g} s"
        return f"{self.path}{f' ({self.member})' if self.member else ''}{part}"

    def open(self) -> BinaryIO:
        """Its bytes; a member of a shard is read into memory. Raises OSError, or TrainingDataError where it is cut."""
        if self.offset is None:
            return self.path.open("rb")
        with self.path.open("rb") as shard:
            shard.seek(self.offset)
            content = shard.read(self.size)
        if len(content) < self.size:
            raise TrainingDataError(f"{self.name}: the shard ends within it; copy the shard again.")
        return io.BytesIO(content)

    def fingerprint(self) -> str:
        """Size, time of change and SHA-256 of its bytes, "size:time:hash"; empty where it cannot be read."""
        try:
            size, time = self._stamp()
            digest = hashlib.sha256()
            with self.open() as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except (OSError, TrainingDataError):
            return ""
        return f"{size}:{time}:{digest.hexdigest()}"

    def has_changed(self, fingerprint: str) -> bool:
        """Whether its content is another one than `fingerprint` tells of; read only where size or time are others."""
        size, time, digest = fingerprint.split(":")
        try:
            if self._stamp() == (int(size), int(time)):
                return False
        except OSError:
            return False
        now = self.fingerprint()
        return bool(now) and now.rpartition(":")[2] != digest

    def _stamp(self) -> tuple[int, int]:
        found = self.path.stat()
        return (found.st_size if self.offset is None else self.size), found.st_mtime_ns


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The clips of all sources in a fixed order, and what could not be listed with the reason."""

    clips: tuple[ClipFile, ...]
    broken: Mapping[str, str]

    def of(self, kind: Kind) -> tuple[ClipFile, ...]:
        """The images or the videos."""
        return tuple(clip for clip in self.clips if clip.kind == kind)

    def digest(self) -> str:
        """Changes when a clip is added, removed, renamed, cut or weighted differently; not when a source is moved."""
        text = "\n".join(f"{c.key}\t{c.kind}\t{c.weight!r}\t{c.start!r}\t{c.end!r}" for c in self.clips)
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def list_clips(sources: Iterable[str | Path]) -> Listing:
    """Everything in `sources`: folders (searched through, hidden files passed over), CSV lists, tar shards, files.

    A CSV has a header with the column `path` (absolute, or relative to the CSV's folder) and may have `weight`, `start`
    and `end` (seconds); empty cells take the default, other columns are not looked at. A shard that is damaged is
    reported in `broken`, and its members before the damage are used.
    Raises TrainingDataError where a source does not exist, a CSV is wrong, or nothing is found at all.
    """
    places = [Path(source) for source in sources]
    broken: dict[str, str] = {}
    clips: list[ClipFile] = []
    for place in places:
        if place.is_dir():
            inside = sorted(path for path in place.rglob("*") if path.is_file())
            hidden = (any(part.startswith(".") for part in path.relative_to(place).parts) for path in inside)
            for path, is_hidden in zip(inside, hidden, strict=True):
                if not is_hidden:
                    clips += _one(path, f"{place.name}/{path.relative_to(place).as_posix()}", broken)
        elif not place.exists():
            raise TrainingDataError(f"{place}: no such file or folder.")
        elif place.suffix.lower() == ".csv":
            clips += _rows(place)
        else:
            found = list(_one(place, place.name, broken))
            if not found and str(place) not in broken:
                raise TrainingDataError(f"{place}: is no image, video, .csv list or .tar shard{_ALLOWED}.")
            clips += found
    if not clips:
        reasons = "".join(f" {name}: {reason}" for name, reason in broken.items())
        shown = ", ".join(map(str, places)) or "the list of sources, which is empty"
        raise TrainingDataError(f"There is no image and no video in {shown}{_ALLOWED}.{reasons}")
    return Listing(clips=tuple(clips), broken=broken)


_ALLOWED = f" (known are {', '.join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)}, .csv and .tar)"


def _kind(name: str) -> Kind | None:
    suffix = Path(name).suffix.lower()
    return "image" if suffix in IMAGE_SUFFIXES else "video" if suffix in VIDEO_SUFFIXES else None


def _one(path: Path, key: str, broken: dict[str, str]) -> Iterator[ClipFile]:
    if path.suffix.lower() == ".tar":
        yield from _members(path, key, broken)
        return
    kind = _kind(path.name)
    if kind is not None:
        yield ClipFile(path=path, key=key, kind=kind)


def _members(path: Path, key: str, broken: dict[str, str]) -> Iterator[ClipFile]:
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                kind = _kind(member.name)
                if kind is not None and member.isreg() and not member.issparse():
                    yield ClipFile(
                        path=path,
                        key=f"{key}/{member.name}",
                        kind=kind,
                        member=member.name,
                        offset=member.offset_data,
                        size=member.size,
                    )
    except (tarfile.TarError, OSError, EOFError) as error:
        broken[str(path)] = f"is not a whole, uncompressed tar file ({error}); copy it again, or decompress it"


def _rows(path: Path) -> Iterator[ClipFile]:
    try:
        yield from _rows_of(path, path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise TrainingDataError(f"{path}: is no list in UTF-8; save it in that encoding.") from None
    except csv.Error as error:
        raise TrainingDataError(f"{path}: is no list of comma-separated values ({error}).") from error


def _rows_of(path: Path, text: str) -> Iterator[ClipFile]:
    with io.StringIO(text, newline="") as file:
        rows = csv.DictReader(file)
        if "path" not in (rows.fieldnames or ()):
            raise TrainingDataError(
                f"{path}: its first line names the columns {', '.join(rows.fieldnames or ()) or '(none)'}; one of them "
                f"must be path. Known columns: {', '.join(COLUMNS)}."
            )
        for number, row in enumerate(rows, start=2):
            where, place = f"{path}, line {number}", (row["path"] or "").strip()
            if not place:
                raise TrainingDataError(f"{where}: the path is empty.")
            weight, start = _number(row, "weight", 1.0, where), _number(row, "start", 0.0, where)
            end = _number(row, "end", math.inf, where)
            if end <= start:
                raise TrainingDataError(f"{where}: ends at {end:g} s and starts at {start:g} s; end comes after start.")
            yield ClipFile(
                path=path.parent / place,
                key=f"{path.name}/{place}@{start:g}-{end:g}",
                kind=_kind(place) or "video",
                weight=weight,
                start=start,
                end=None if end == math.inf else end,
            )


def _number(row: Mapping[str, str | None], name: str, default: float, where: str) -> float:
    text = (row.get(name) or "").strip()
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise TrainingDataError(f"{where}: {name} is {text!r}; give a number of 0 or more, or leave it empty.")
    return value
