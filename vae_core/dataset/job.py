"""The job: which clips, into which shards, what is done, and what is left.

A clip that is finished is a file of its own at once, so that nothing finished is lost or done again, whatever ends the
job and when. When all clips of a shard are finished or found broken, their files become the shard, and a record beside
it says what is in it; the record is the last to appear. The plan of clips is kept in the folder and only grows.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..training.clip_decoding import forget
from ..training.clip_files import ClipFile, list_clips
from .encoding import UNEXPECTED, EncodeSettings, encode_row
from .lock import LOCK, locked
from .shards import (
    SUFFIX,
    EncodeJobError,
    read_info,
    read_json,
    read_record,
    write_bytes,
    write_clip,
    write_json,
    write_shard,
)

logger = logging.getLogger("cviv_vae.dataset")
VERSION = 1
MOST_UNEXPECTED = 10  # clips in a row that may fail in a way that says nothing of the clip
Progress = Callable[["Counts"], None]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """clips = encoded + broken + pending, always; frames: of the encoded ones; now: encoded by this run."""

    clips: int
    encoded: int
    broken: int
    frames: int
    now: int

    @property
    def pending(self) -> int:
        """Clips neither encoded nor found broken so far."""
        return self.clips - self.encoded - self.broken


@dataclass(frozen=True, kw_only=True)
class PlannedClip:
    """A clip of the plan. shard: the number of its shard. file: None where it is no longer in the sources."""

    id: str
    key: str
    shard: int
    file: ClipFile | None


class EncodeJob:
    """Encode every image and video of `sources` into `folder`, or go on where an earlier run stopped.

    sources: see `list_clips`; clips that are new since the earlier run are added, and those whose content is another
    one now are encoded again, `again` of them. retry_broken: try again what could not be encoded. Raises EncodeJobError
    where the folder holds the latents of other settings or another job is at work in it, TrainingDataError where a
    source is wrong, VideoError never: a clip that cannot be read is counted and named in the manifest.
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        folder: str | Path,
        settings: EncodeSettings,
        *,
        retry_broken: bool = False,
    ) -> None:
        self.folder, self.settings = Path(folder), settings
        forget()
        listing = list_clips(sources)
        self.unlisted = dict(listing.broken)
        self._check_folder()
        with self.lock():
            self._open(listing.clips, retry_broken=retry_broken)

    def lock(self) -> AbstractContextManager[None]:
        """Keep other jobs out of the folder; `run` and `run_on_ray` do."""
        return locked(self.folder)

    def _open(self, clips: Sequence[ClipFile], *, retry_broken: bool) -> None:
        self.rows = self._plan({_key(clip, n): clip for clip, n in _numbered(clips)})
        self._shards: dict[int, list[PlannedClip]] = {}
        for row in self.rows:
            self._shards.setdefault(row.shard, []).append(row)
        self._parts = self.folder / ".parts"
        self._parts.mkdir(exist_ok=True)
        for left in self.folder.glob(".*.part"):
            left.unlink(missing_ok=True)
        self._done: dict[int, dict[str, Any]] = {}  # complete shards, as the manifest shows them
        self._found: set[str] = set()  # clips of the other shards that are encoded or broken
        self._encoded = self._frames = self._now = 0
        self._broken: dict[str, str] = {}
        self._unexpected = 0  # clips in a row
        self.damaged: dict[str, str] = {}  # clips that were encoded all the same, and what is wrong with them
        self.again = self._give_up_changed(retry_broken=retry_broken)
        for number in self._shards:
            if self._record(number).exists():
                self._take_record(number)
            else:
                self._look(number)
        self.gone = [row.key for row in self.rows if row.file is None and row.key not in self._broken]

    # ------------------------------------------------------------------------------------------------------- doing

    def run(self, device: torch.device | str, progress: Progress | None = None) -> Counts:
        """Encode what is left, in this process; returns the counts, which the manifest has too."""
        with self.lock():
            try:
                if self.pending():
                    vae = self.settings.load(device)
                    for row in self.pending():
                        encode_row(vae, row.file, row.key, self.part(row), self.settings)
                        self.finished(row.id, progress)
                self.complete()
            finally:
                self.write_manifest()
        return self.counts()

    def pending(self) -> list[PlannedClip]:
        """Clips that are neither encoded nor found broken, in order."""
        left = [rows for number, rows in self._shards.items() if number not in self._done]
        return [row for rows in left for row in rows if row.id not in self._found]

    def part(self, row: PlannedClip) -> Path:
        """Where a finished clip lies until its shard is complete; a broken one has `.json` instead."""
        return self._parts / f"{row.shard:05d}" / f"{row.id}.safetensors"

    def finished(self, identity: str, progress: Progress | None = None) -> None:
        """Take note of what `encode_row` left for this clip; complete its shard where it was the last."""
        row = self.rows[int(identity)]
        self._now += self._take(row)
        if all(other.id in self._found for other in self._shards[row.shard]):
            self._complete(row.shard)
        if progress is not None:
            progress(self.counts())
        if self._unexpected >= MOST_UNEXPECTED:
            raise EncodeJobError(
                f"{self._unexpected} clips in a row failed in a way that says nothing of the clips. The last: "
                f"{self._broken[row.key]} What was finished is kept; mend that, and go on with --retry-broken."
            )

    def complete(self) -> None:
        """Make the shards whose clips are all there: an earlier run may have ended just before."""
        for number, rows in self._shards.items():
            if number not in self._done and all(row.id in self._found for row in rows):
                self._complete(number)

    def _complete(self, number: int) -> None:
        parts = [self.part(row) for row in self._shards[number]]
        whole = [part for part in parts if part.exists()]
        path = self.folder / f"shard-{number:05d}{SUFFIX[self.settings.form]}"
        infos = write_shard(path, whole, self.settings.form) if whole else []
        errors = [read_json(part.with_suffix(".json")) for part in parts if not part.exists()]
        record = {"file": path.name if whole else None, "clips": [asdict(info) for info in infos], "errors": errors}
        write_json(self._record(number), record)
        self._done[number] = _summary(record)
        shutil.rmtree(self._parts / f"{number:05d}", ignore_errors=True)
        self.write_manifest()

    # ---------------------------------------------------------------------------------------------------- counting

    def counts(self) -> Counts:
        """How far the job is."""
        return Counts(
            clips=len(self.rows),
            encoded=self._encoded,
            broken=len(self._broken),
            frames=self._frames,
            now=self._now,
        )

    def errors(self) -> dict[str, str]:
        """Clips that cannot be read, with the reason, and shards of the sources that cannot be listed."""
        return self.unlisted | self._broken

    def write_manifest(self) -> None:
        """manifest.json: the counts, the shards and the errors."""
        counts = self.counts()
        write_json(
            self.folder / "manifest.json",
            {
                "clips": counts.clips,
                "encoded": counts.encoded,
                "broken": counts.broken,
                "pending": counts.pending,
                "frames": counts.frames,
                "settings": self._settings,
                "shards": [summary for _, summary in sorted(self._done.items())],
                "errors": self.errors(),
                "damaged": self.damaged,
                "gone": self.gone,
            },
        )

    # ---------------------------------------------------------------------------------------------------- the folder

    def _check_folder(self) -> None:
        path, self._settings = self.folder / "job.json", self.settings.described()
        wanted = {"version": VERSION, "settings": self._settings}
        if not path.exists():
            if self.folder.is_file() or (
                self.folder.is_dir() and any(path.name != LOCK for path in self.folder.iterdir())
            ):
                raise EncodeJobError(f"{self.folder} holds other things and no job; choose a new or an empty folder.")
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, wanted)
            return
        there = read_json(path)
        if there != wanted:
            old: Mapping[str, Any] = there.get("settings", {})
            names = [name for name, value in self._settings.items() if old.get(name) != value] or ["version"]
            parts = ", ".join(f"{name} is {self._settings.get(name)} and was {old.get(name)}" for name in names)
            raise EncodeJobError(
                f"{self.folder} holds latents of other settings: {parts}. Use those again, or choose another folder."
            )

    def _plan(self, files: Mapping[str, ClipFile]) -> tuple[PlannedClip, ...]:
        """The rows that the folder knows, and after them those that are new."""
        path = self.folder / "clips.jsonl"
        known: list[tuple[str, int]] = []
        if path.exists():
            known = [(row["key"], row["shard"]) for row in map(json.loads, path.read_text("utf-8").splitlines())]
        already = {key for key, _ in known}
        fresh = [key for key in files if key not in already]
        first = 1 + max((shard for _, shard in known), default=-1)
        rows = known + [(key, first + i // self.settings.clips_per_shard) for i, key in enumerate(fresh)]
        if fresh:
            lines = (json.dumps({"id": f"{i:08d}", "key": key, "shard": s}) for i, (key, s) in enumerate(rows))
            write_bytes(path, ("\n".join(lines) + "\n").encode())
        return tuple(
            PlannedClip(id=f"{i:08d}", key=key, shard=shard, file=files.get(key)) for i, (key, shard) in enumerate(rows)
        )

    def _record(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.json"

    def _take_record(self, number: int) -> None:
        """A shard that an earlier run completed."""
        record = read_json(self._record(number))
        self._done[number] = _summary(record)
        self._encoded += len(record["clips"])
        self._frames += sum(info["frames"] for info in record["clips"])
        self._broken |= {error["key"]: error["reason"] for error in record["errors"]}
        self.damaged |= {info["key"]: info["damage"] for info in record["clips"] if info.get("damage")}
        shutil.rmtree(self._parts / f"{number:05d}", ignore_errors=True)

    def _look(self, number: int) -> None:
        """What an earlier run has finished of a shard."""
        folder = self._parts / f"{number:05d}"
        folder.mkdir(exist_ok=True)
        there = {path.name for path in folder.iterdir()}
        for row in self._shards[number]:
            if f"{row.id}.safetensors" in there or f"{row.id}.json" in there:
                self._take(row)

    def _take(self, row: PlannedClip) -> bool:
        """Count a clip that is finished, True, or broken, False."""
        path = self.part(row)
        self._found.add(row.id)
        if not path.exists():
            error = read_json(path.with_suffix(".json"))
            self._broken[row.key] = error["reason"]
            self._unexpected = self._unexpected + 1 if error.get("kind") == UNEXPECTED else 0
            return False
        info, self._unexpected = read_info(path), 0
        self._encoded, self._frames = self._encoded + 1, self._frames + info.frames
        if info.damage:
            self.damaged[row.key] = info.damage
        return True

    # ------------------------------------------------------------------------------------------------ encoding again

    def _give_up_changed(self, *, retry_broken: bool) -> int:
        """Forget what was made of clips whose content is another one now, and of broken ones if asked; how many."""
        count = 0
        for number, rows in self._shards.items():
            made = self._made(number, rows)
            again = {row.id for row in rows if row.id in made and self._is_due(row, made[row.id], retry_broken)}
            if again and self._record(number).exists():
                self._reopen(number, again)
            for row in rows:
                if row.id in again:
                    self.part(row).unlink(missing_ok=True)
                    self.part(row).with_suffix(".json").unlink(missing_ok=True)
            count += len(again)
        return count

    def _made(self, number: int, rows: Sequence[PlannedClip]) -> dict[str, dict[str, Any]]:
        """What is known of the clips of a shard that are encoded or broken, by their ids."""
        if self._record(number).exists():
            record = read_json(self._record(number))
            return {found["id"]: found for found in (*record["clips"], *record["errors"])}
        found: dict[str, dict[str, Any]] = {}
        for row in rows:
            part = self.part(row)
            if part.exists():
                found[row.id] = asdict(read_info(part))
            elif part.with_suffix(".json").exists():
                found[row.id] = read_json(part.with_suffix(".json"))
        return found

    def _is_due(self, row: PlannedClip, made: Mapping[str, Any], retry_broken: bool) -> bool:
        if row.file is None:
            return False
        broken, before = "reason" in made, made.get("source", "")
        if broken and (retry_broken or not before):
            return True
        return bool(before) and row.file.has_changed(before)

    def _reopen(self, number: int, again: set[str]) -> None:
        """Take a complete shard to its clips again, without some; its record goes last of all."""
        record = read_json(self._record(number))
        (self._parts / f"{number:05d}").mkdir(exist_ok=True)
        rows = {row.id: row for row in self._shards[number]}
        for info, latent in read_record(self._record(number)):
            if info.id not in again:
                write_clip(self.part(rows[info.id]), latent, info)
        for error in record["errors"]:
            if error["id"] not in again:
                write_json(self.part(rows[error["id"]]).with_suffix(".json"), error)
        self._record(number).unlink()
        if record["file"] is not None:
            (self.folder / record["file"]).unlink(missing_ok=True)


def _summary(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"file": record["file"], "clips": len(record["clips"]), "broken": len(record["errors"])}


def _numbered(clips: Sequence[ClipFile]) -> Iterator[tuple[ClipFile, int]]:
    """Clips, and how often their key was there before."""
    seen: dict[str, int] = {}
    for clip in clips:
        yield clip, seen.get(clip.key, 0)
        seen[clip.key] = seen.get(clip.key, 0) + 1


def _key(clip: ClipFile, repeat: int) -> str:
    return f"{clip.key} #{repeat + 1}" if repeat else clip.key
