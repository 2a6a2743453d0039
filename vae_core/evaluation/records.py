"""What is known of a video and a VAE once measured: one JSON line each, so that a run can be taken up again."""

import base64
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

LINES, PARTS = "results.jsonl", "parts"  # the lines, and the folder of what pages show


@dataclass(frozen=True, kw_only=True)
class Record:
    """One video through one VAE.

    stamp: of the video file and the VAE's weights; a record with another is measured again. figures, frames, phases as
    in `ClipFigures`. features: of original and reconstruction as text, or None. pictures: files beside the lines, by
    what they show. borders: rows and columns at which seams were looked for.
    """

    video: str
    vae: str
    stamp: str
    count: int
    seconds: float
    size: tuple[int, int]
    facts: dict[str, str]
    figures: dict[str, float]
    frames: dict[str, list[float]]
    phases: dict[str, list[float]]
    borders: dict[str, list[list[int]]]
    pictures: dict[str, str]
    worst: int
    features: tuple[str, str] | None = None
    compatibility: dict[str, float] | None = None


class WrongSettingsError(ValueError):
    """The folder holds results of other settings."""


class Records:
    """The lines of a folder. settings: what must be equal for results to stand in one table."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.path = folder / LINES
        self.settings = settings
        self.known: dict[tuple[str, str], Record] = {}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines()
        head = _parsed(lines[0]) if lines else None
        if head is None:
            return
        there = head.get("settings")
        if there != json.loads(json.dumps(self.settings)):
            raise WrongSettingsError(
                f"{self.path} was measured with {_words(there)}; now {_words(self.settings)} is asked for. Choose "
                "another folder with -o, or add --restart to measure all again."
            )
        for line in lines[1:]:
            found = _parsed(line)
            if found is None:  # cut short when the run was ended
                continue
            try:
                record = Record(**_numbers(found))
            except TypeError:
                continue
            self.known[record.video, record.vae] = record

    def get(self, video: str, vae: str, stamp: str) -> Record | None:
        """What was measured before, of the same files."""
        record = self.known.get((video, vae))
        return record if record is not None and record.stamp == stamp else None

    def add(self, record: Record) -> None:
        """Write a record to the disk at once."""
        self.known[record.video, record.vae] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self.path.exists() or not self.path.stat().st_size
        torn = not fresh and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            if fresh:
                file.write(json.dumps({"settings": self.settings}) + "\n")
            elif torn:
                file.write("\n")
            file.write(json.dumps(plain(asdict(record)), allow_nan=False) + "\n")


def pack(features: Tensor) -> str:
    """(n, d) float32 as text."""
    return f"{features.shape[1]}:{base64.b64encode(features.float().numpy().tobytes()).decode()}"


def unpack(text: str) -> Tensor:
    """The reverse of `pack`."""
    width, data = text.split(":", 1)
    values = np.frombuffer(base64.b64decode(data), dtype=np.float32).reshape(-1, int(width))
    return torch.from_numpy(values.copy())


def plain(value: Any) -> Any:  # noqa: ANN401
    """Numbers as JSON has them: NaN becomes null, infinity the text "inf"."""
    if isinstance(value, float):
        return None if math.isnan(value) else value if math.isfinite(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, dict):
        return {key: plain(item) for key, item in cast("dict[str, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in cast("Iterable[Any]", value)]
    return value


def _numbers(found: dict[str, Any]) -> dict[str, Any]:
    """Back from `plain`, where numbers are expected."""
    out = dict(found)
    for key in ("figures", "compatibility"):
        if found.get(key) is not None:
            out[key] = {name: _number(value) for name, value in found[key].items()}
    for key in ("frames", "phases"):
        out[key] = {name: [_number(value) for value in values] for name, values in found.get(key, {}).items()}
    out["size"] = tuple(found.get("size", (0, 0)))
    if found.get("features") is not None:
        out["features"] = tuple(found["features"])
    return out


def _number(value: Any) -> float:  # noqa: ANN401
    return math.nan if value is None else float(value)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return cast("dict[str, Any]", found) if isinstance(found, dict) else None


def _words(settings: Any) -> str:  # noqa: ANN401
    if not isinstance(settings, dict):
        return "unknown settings"
    return ", ".join(f"{key} {value}" for key, value in cast("dict[str, Any]", settings).items())


def by_video(records: Iterable[Record]) -> Iterator[tuple[str, list[Record]]]:
    """Records grouped by their video, in the order of the first."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.video, []).append(record)
    yield from groups.items()
