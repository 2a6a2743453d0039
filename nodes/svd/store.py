"""Finished chunks on disk: a run that was cancelled, or ran out of memory, goes on where it stopped.

A chunk lies under a hash of all that made it, so that nothing stale is ever used; the list of the latest run says
which chunks a user sees, who may keep the first of them whatever made them.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

import folder_paths
from safetensors import SafetensorError
from torch import Tensor

from ...vae_core.atomic import atomic_write
from ...vae_core.errors import CheckpointError
from ...vae_core.weights.tensors import read_tensors, write_tensors

STORE = "cviv_svd_store"  # in transformer_options: a StoreSettings
_LIST = "chunks.json"
_FORMAT = "cviv-vae svd chunk"
_LARGEST = 1 << 30  # bytes of a chunk; 25 latents of 1024x576 have 4 MB
_TEMPORARY = 200  # chunks that are kept where no store is named
_SEED = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*")
_log = logging.getLogger("cviv-vae")


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """folder: where chunks lie. keep: so many of the first chunks are taken as the latest run left them, whatever
    made them. seeds: of single chunks, by number, counted from 1.
    """

    folder: str
    keep: int = 0
    seeds: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A finished chunk. key: the hash of what made it. result, clean: its latents from the first new one on, as
    ComfyUI hands them over; clean without noise. motion: per latent, for a steady motion.
    """

    key: str
    result: Tensor
    clean: Tensor
    motion: float


def temporary_store() -> StoreSettings:
    """Where chunks lie for as long as ComfyUI runs."""
    return StoreSettings(folder=str(Path(folder_paths.get_temp_directory()) / "cviv_svd_chunks"))


def parse_seeds(text: str) -> dict[int, int]:
    """Seeds of chunks, such as "3: 77, 4: 1234". Raises ValueError for anything else."""
    seeds: dict[int, int] = {}
    for item in filter(str.strip, text.split(",")):
        found = _SEED.fullmatch(item)
        if found is None or not int(found[1]) or int(found[2]) >= 1 << 64:
            raise ValueError(
                f"A seed of a chunk is {item.strip()[:40]!r}: give the number of the chunk, counted from 1, a colon "
                "and a seed below 2^64, and commas between several, such as 3: 77, 4: 1234."
            )
        seeds[int(found[1])] = int(found[2])
    return seeds


class ChunkStore:
    """The chunks of one run, in order."""

    def __init__(self, settings: StoreSettings) -> None:
        self.settings, self._folder = settings, Path(settings.folder)
        self._before, self._now = self._listed(), list[str]()

    def kept(self, number: int, shape: tuple[int, ...]) -> Chunk | None:
        """Chunk `number`, from 0 on, of the latest run where the user keeps it. Raises ValueError where it is gone."""
        if number >= self.settings.keep:
            return None
        names = self._before[number : number + 1]
        found = self._read(self._folder / names[0]) if names else None
        if found is None or found.result.shape != shape:
            lies = "has none" if found is None else f"has one of shape {tuple(found.result.shape)}"
            raise ValueError(
                f"Chunk {number + 1} is to be kept as it is and must have the shape {shape}, but the chunk store "
                f"{lies}. Set regenerate_from to {number + 1}, or make the clip as it was: same length, size, "
                "window_length and carry."
            )
        self._now.append(names[0])
        return found

    def find(self, number: int, key: str) -> Chunk | None:
        """The chunk that was made of exactly this, or None."""
        name = _name(number, key)
        found = self._read(self._folder / name)
        if found is None or found.key != key:
            return None
        self._note(name)
        return found

    def put(self, number: int, chunk: Chunk, texts: dict[str, str]) -> None:
        """Keep a finished chunk. A disk that does not take it costs a warning, not the run."""
        name = _name(number, chunk.key)
        tensors = {"result": chunk.result.float()}
        if chunk.clean is not chunk.result:
            tensors["clean"] = chunk.clean.float()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            texts = {**texts, "format": _FORMAT, "key": chunk.key, "motion": repr(chunk.motion)}
            write_tensors(self._folder / name, tensors, texts)
            self._note(name)
            if self.settings.folder == temporary_store().folder:
                self._forget_oldest()
        except (OSError, SafetensorError) as error:
            _log.warning("chunk %d could not be kept: %s", number + 1, error)

    def _note(self, name: str) -> None:
        self._now.append(name)
        count = len(self._now)  # the rest of an older run follows only where it began the same
        listed = [*self._now, *(self._before[count:] if self._before[:count] == self._now else [])]
        try:
            with atomic_write(self._folder / _LIST) as hidden:
                hidden.write_text(json.dumps({"chunks": listed}), encoding="utf-8")
        except OSError as error:
            _log.warning("the list of chunks could not be written: %s", error)

    def _listed(self) -> list[str]:
        try:
            told = json.loads((self._folder / _LIST).read_text(encoding="utf-8"))["chunks"]
        except (OSError, ValueError, KeyError, TypeError):
            return []
        return [name for name in told if isinstance(name, str) and Path(name).name == name]

    def _read(self, path: Path) -> Chunk | None:
        try:
            tensors, texts = read_tensors(path, _LARGEST)
            result = tensors["result"]
            return Chunk(
                key=texts["key"], result=result, clean=tensors.get("clean", result), motion=float(texts["motion"])
            )
        except (CheckpointError, KeyError, ValueError):
            return None

    def _forget_oldest(self) -> None:
        files = sorted(self._folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
        for file in files[:-_TEMPORARY]:
            file.unlink(missing_ok=True)


def _name(number: int, key: str) -> str:
    return f"{number + 1:04d}-{key[:24]}.safetensors"
