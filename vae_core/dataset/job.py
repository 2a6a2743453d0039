"""The job: which clips, into which shards, what is done, and what is left.

A clip that is finished is a file of its own at once, so that nothing finished is lost or done again, whatever ends the
job and when. When all clips of a shard are finished or found broken, their files become the shard, and a record beside
it says what is in it; the record is the last to appear. The plan of clips is kept in the folder and only grows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..door.limits import NO_LIMITS, Limits
from ..door.loading import DEMO_WEIGHTS, load
from ..door.vae import VideoVAE
from ..errors import BudgetError, VideoError
from ..evaluation.protocols import cover
from ..training.clip_decoding import clip_rate, damage_of, read_picked
from ..training.clip_files import ClipFile, list_clips
from ..training.data import TrainingDataError
from ..weights.files import SUFFIXES
from .shards import (
    SUFFIX,
    ClipInfo,
    EncodeJobError,
    ShardFormat,
    check_finite,
    read_info,
    read_json,
    write_bytes,
    write_clip,
    write_json,
    write_shard,
)

logger = logging.getLogger("cviv_vae.dataset")
VERSION = 1
CHUNK = 4  # frames that are read at once
Progress = Callable[["Counts"], None]


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """What decides the latents and their files; a folder holds the latents of one such choice.

    weights: a file, a folder or the name of demo weights. dtype: of the computation; stored: of the latents. size:
    (height, width) that pictures are made to cover and cut to, never enlarged; None leaves them. frames: of each video,
    from its beginning; None takes all. stride: every so manyth frame. seed: draws from the posterior; None takes its
    mean. form: of the shards. clips_per_shard: at most. limits: of memory.
    """

    weights: str
    dtype: torch.dtype = torch.float32
    stored: torch.dtype = torch.float32
    size: tuple[int, int] | None = None
    frames: int | None = None
    stride: int = 1
    seed: int | None = None
    form: ShardFormat = "safetensors"
    clips_per_shard: int = 256
    limits: Limits = NO_LIMITS

    def __post_init__(self) -> None:
        numbers = (self.stride, self.frames or 1, self.clips_per_shard, *(self.size or (1, 1)))
        if min(numbers) < 1 or self.form not in SUFFIX or self.stored not in (
            torch.float32, torch.float16, torch.bfloat16
        ):  # fmt: skip
            raise EncodeJobError(
                f"Got size {self.size}, {self.frames} frames, stride {self.stride}, {self.clips_per_shard} clips per "
                f"shard, form {self.form}, stored as {self.stored}; numbers are 1 or more, the form is "
                f"{' or '.join(SUFFIX)}, latents are stored as float32, float16 or bfloat16."
            )

    def described(self) -> dict[str, Any]:
        """For the folder: what must be the same when the job goes on."""
        texts = {name: str(value) if isinstance(value, torch.dtype) else value for name, value in asdict(self).items()}
        del texts["limits"]
        blended = {"blended": True} if self.limits.blended else {}
        return json.loads(json.dumps(texts | blended | {"weights": _digest(self.weights)}))

    def load(self, device: torch.device | str) -> VideoVAE:
        """The VAE that encodes, within its limits."""
        return self.limits.keep(load(self.weights, device=device, dtype=self.dtype))


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

    sources: see `list_clips`; clips that are new since the earlier run are added. Raises EncodeJobError where the
    folder holds the latents of other settings, TrainingDataError where a source is wrong, VideoError never: a clip that
    cannot be read is counted and named in the manifest.
    """

    def __init__(self, sources: Sequence[str | Path], folder: str | Path, settings: EncodeSettings) -> None:
        self.folder, self.settings = Path(folder), settings
        listing = list_clips(sources)
        self.unlisted = dict(listing.broken)
        self._check_folder()
        self.rows = self._plan({_key(clip, n): clip for clip, n in _numbered(listing.clips)})
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
        self.damaged: dict[str, str] = {}  # clips that were encoded all the same, and what is wrong with them
        for number in self._shards:
            if self._record(number).exists():
                self._take_record(number)
            else:
                self._look(number)

    # ------------------------------------------------------------------------------------------------------- doing

    def run(self, device: torch.device | str, progress: Progress | None = None) -> Counts:
        """Encode what is left, in this process; returns the counts, which the manifest has too."""
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
            },
        )

    # ---------------------------------------------------------------------------------------------------- the folder

    def _check_folder(self) -> None:
        path, self._settings = self.folder / "job.json", self.settings.described()
        wanted = {"version": VERSION, "settings": self._settings}
        if not path.exists():
            if self.folder.is_file() or (self.folder.is_dir() and any(self.folder.iterdir())):
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
            self._broken[row.key] = read_json(path.with_suffix(".json"))["reason"]
            return False
        info = read_info(path)
        self._encoded, self._frames = self._encoded + 1, self._frames + info.frames
        if info.damage:
            self.damaged[row.key] = info.damage
        return True


def _summary(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"file": record["file"], "clips": len(record["clips"]), "broken": len(record["errors"])}


def encode_row(vae: VideoVAE, file: ClipFile | None, key: str, part: Path, settings: EncodeSettings) -> None:
    """Encode one clip into the file `part`, or leave the reason why not, as `.json`; what is there stays as it is."""
    if part.exists() or part.with_suffix(".json").exists():
        return
    try:
        if file is None:
            raise TrainingDataError(f"{key}: is no longer in the sources.")
        latent, info = encode_clip(vae, file, key, part.stem, settings)
    except (VideoError, TrainingDataError, BudgetError) as error:
        logger.warning("Left out: %s", error)
        write_json(part.with_suffix(".json"), {"id": part.stem, "key": key, "reason": str(error)})
        return
    write_clip(part, latent, info)


def encode_clip(
    vae: VideoVAE, file: ClipFile, key: str, identity: str, settings: EncodeSettings
) -> tuple[Tensor, ClipInfo]:
    """The latent of a clip, (z, t, h, w) on the CPU. Raises VideoError or TrainingDataError where it cannot be read."""
    frames = 0
    shape = (0, 0)

    def pick(count: int) -> range:
        last = None if settings.frames is None or file.kind == "image" else 1 + (settings.frames - 1) * settings.stride
        if last is not None and count < last:
            raise TrainingDataError(
                f"{file.name}: has {count} frames; {settings.frames} at stride {settings.stride} need {last}."
            )
        return range(0, count if last is None else last, settings.stride)

    def chunks() -> Iterator[Tensor]:
        nonlocal frames, shape
        held: list[Tensor] = []
        for picture in read_picked(file, pick, whole=True):
            held.append(_fitted(picture, settings.size, file))
            frames, shape = frames + 1, (held[-1].shape[-2], held[-1].shape[-1])
            if len(held) == CHUNK:
                yield torch.cat(held, dim=2)
                held = []
        if held:
            yield torch.cat(held, dim=2)

    seed = settings.seed
    generator = None if seed is None else torch.Generator().manual_seed((seed * 10**8 + int(identity)) % 2**63)
    stream = vae.encode_stream(chunks(), pad=True, sample=seed is not None, generator=generator)
    latent = torch.cat([chunk.cpu() for chunk in stream], dim=2)[0].to(settings.stored)  # z t h w
    check_finite(latent, file.name, vae.dtype)
    info = ClipInfo(
        id=identity,
        key=key,
        frames=frames,
        height=shape[0],
        width=shape[1],
        fps=str(clip_rate(file) / settings.stride),
        damage=damage_of(file),
    )
    return latent, info


def _fitted(picture: Tensor, size: tuple[int, int] | None, file: ClipFile) -> Tensor:
    """(3, H, W) as (1, 3, 1, h, w)."""
    height, width = picture.shape[-2:]
    if size is None:
        return picture[None, :, None]
    if height < size[0] or width < size[1]:
        raise TrainingDataError(f"{file.name}: is {width}x{height}, too small for {size[1]}x{size[0]}.")
    return cover(picture[None, :, None], size)


def _numbered(clips: Sequence[ClipFile]) -> Iterator[tuple[ClipFile, int]]:
    """Clips, and how often their key was there before."""
    seen: dict[str, int] = {}
    for clip in clips:
        yield clip, seen.get(clip.key, 0)
        seen[clip.key] = seen.get(clip.key, 0) + 1


def _key(clip: ClipFile, repeat: int) -> str:
    return f"{clip.key} #{repeat + 1}" if repeat else clip.key


def _digest(weights: str) -> str:
    """A name for weights that follows from their bytes."""
    place = DEMO_WEIGHTS.get(weights, Path(weights))
    if not place.exists():
        raise EncodeJobError(f"{weights}: no such weights; give a file, a folder, or {', '.join(DEMO_WEIGHTS)}.")
    files = sorted(path for path in place.iterdir() if path.suffix in SUFFIXES) if place.is_dir() else [place]
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()[:32]}"
