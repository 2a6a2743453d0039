"""From records to tables: means over the set, FVD, JSON and CSV."""

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..metrics import Moments, frechet_distance
from .measure import PICTURES, mean
from .records import Record, plain, unpack
from .runner import Outcome

FVD_ENOUGH = 400  # clips below which the covariance of 400 features cannot be known
COMPATIBILITY = ("distance", "nearest", "video_to_image", "image_to_video")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One VAE over the set. figures: means over videos, and fvd, frames_per_second; NaN where there is none."""

    name: str
    facts: dict[str, str]
    videos: int
    clips: int  # that FVD looked at
    figures: dict[str, float]
    phases: dict[str, list[float]]


def rows(outcome: Outcome) -> list[Row]:
    """One row for each VAE that has any record, in the order they were named."""
    found: list[Row] = []
    for name in outcome.names:
        records = [record for record in outcome.records if record.vae == name]
        if not records:
            continue
        figures = {key: mean(record.figures.get(key, math.nan) for record in records) for key in PICTURES}
        for key in COMPATIBILITY:
            figures[key] = mean((record.compatibility or {}).get(key, math.nan) for record in records)
        figures["fvd"], clips = _fvd(records)
        seconds = sum(record.seconds for record in records)
        figures["frames_per_second"] = sum(record.count for record in records) / max(seconds, 1e-9)
        phases = {key: _columns([record.phases[key] for record in records]) for key in ("psnr", "ssim")}
        found.append(
            Row(name=name, facts=records[0].facts, videos=len(records), clips=clips, figures=figures, phases=phases)
        )
    return found


def _columns(lists: Sequence[Sequence[float]]) -> list[float]:
    return [mean(column) for column in zip(*lists, strict=True)]


def _fvd(records: Iterable[Record]) -> tuple[float, int]:
    theirs, ours = Moments(), Moments()
    for record in records:
        if record.features is not None:
            theirs.add(unpack(record.features[0]))
            ours.add(unpack(record.features[1]))
    return (frechet_distance(ours, theirs) if ours.count > 1 else math.nan), ours.count


def write_tables(outcome: Outcome, folder: Path) -> list[Path]:
    """Write report.json, summary.csv (one row per VAE) and videos.csv (one per VAE and video)."""
    table = rows(outcome)
    names = [*PICTURES, "fvd", "frames_per_second", *COMPATIBILITY]
    files = [folder / name for name in ("report.json", "summary.csv", "videos.csv")]
    document: dict[str, Any] = {
        "protocol": {"name": outcome.protocol.name, "reads": str(outcome.protocol), "note": outcome.protocol.note},
        "vaes": [
            {"name": row.name, "facts": row.facts, "videos": row.videos, "fvd_clips": row.clips}
            | {"figures": row.figures, "phases": row.phases}
            for row in table
        ],
        "videos": [
            {"video": record.video, "vae": record.vae, "frames": record.count, "figures": record.figures}
            | {"phases": record.phases, "per_frame": record.frames, "latent_compatibility": record.compatibility}
            for record in outcome.records
        ],
        "left_out": outcome.broken,
        "notes": outcome.notes,
    }
    files[0].write_text(json.dumps(plain(document), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    with files[1].open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["vae", "videos", *names])
        writer.writerows([row.name, row.videos, *(_cell(row.figures.get(key)) for key in names)] for row in table)
    with files[2].open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "vae", "frames", *PICTURES])
        for record in outcome.records:
            cells = [_cell(record.figures.get(key)) for key in PICTURES]
            writer.writerow([record.video, record.vae, record.count, *cells])
    return files


def _cell(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.6g}"
