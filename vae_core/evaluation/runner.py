"""Every VAE over every video, one at a time, and what remains of it on the disk."""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import VideoError
from ..media.video import VideoWriter, to_uint8
from ..metrics import latent_compatibility
from ..metrics.frames import MS_SSIM_LEAST_SIDE
from ..run.tiling import ReferencePlan
from .candidates import TILED, Candidate, Choice, DiffusersImages, Native, borders_of
from .measure import ClipMeters, Networks, NotNumbersError, Pictures, measure
from .protocols import Protocol
from .records import PARTS, Record, Records, pack

Progress = Callable[[str, str, int], None]  # video, VAE, frames that were just done
METERS = 1  # raised when a meter changes: results of older ones do not stand in one table with new ones
TILE = 72  # pixels; sides of reference tiles are multiples


@dataclass(kw_only=True)
class Outcome:
    """What a run came to. records: of the videos that all VAEs have; broken: why each other video was left out."""

    protocol: Protocol
    names: list[str]
    records: list[Record] = field(default_factory=list[Record])
    broken: dict[str, str] = field(default_factory=dict[str, str])
    notes: list[str] = field(default_factory=list[str])
    measured: int = 0  # pairs of video and VAE that were not known before


def evaluate(
    videos: Mapping[str, Path],
    choices: Sequence[Choice],
    folder: Path,
    *,
    protocol: Protocol,
    networks: Networks | None = None,
    tiles: ReferencePlan | None = None,
    image_vae: DiffusersImages | None = None,
    pictures: bool = True,
    restart: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Measure every choice on every video, and keep one JSON line of each pair in `folder`.

    videos: files by name, as `find_videos` gives them. What `folder` already knows of the same files is not measured
    again; `restart` forgets it. tiles: where seams are looked for; None chooses by the size of the picture. image_vae:
    also measures latent compatibility of our VAEs with it. A video that cannot be read is left out and named in
    `broken`. Raises WrongSettingsError where the folder was measured otherwise; what a VAE raises goes through.
    """
    networks = networks or Networks()
    names = [choice.name for choice in choices]
    if len(set(names)) != len(names):
        raise ValueError(f"Two VAEs have the same name: {', '.join(names)}. Rename a file, or name each once.")
    folder.mkdir(parents=True, exist_ok=True)
    records = _records(folder, protocol, networks, tiles, image_vae, restart=restart)
    outcome = Outcome(protocol=protocol, names=names, notes=list(networks.missing))
    for choice in choices:
        candidate: Candidate | None = None
        for name, path in videos.items():
            if name in outcome.broken:
                continue
            try:
                stamp = f"{_stamp(path)}; {choice.identity}"
                if records.get(name, choice.name, stamp) is not None:
                    continue
                candidate = candidate or choice.load()
                job = _Job(name, path, choice.name, candidate, folder, protocol, networks, tiles, pictures)
                record = replace(job.run(progress), stamp=stamp)
                if image_vae is not None and isinstance(candidate, Native):
                    record = _with_compatibility(record, candidate, image_vae, path, protocol, outcome)
            except VideoError as error:
                outcome.broken[name] = str(error)
                continue
            except NotNumbersError as error:
                raise ValueError(f"{choice.name} {error} ({name})") from error
            records.add(record)
            outcome.measured += 1
        del candidate
    outcome.records = [
        records.known[name, vae]
        for name in videos
        if name not in outcome.broken
        for vae in names
        if (name, vae) in records.known
    ]
    outcome.notes += _limits(outcome, tiles or ReferencePlan())
    return outcome


def _limits(outcome: Outcome, tiles: ReferencePlan) -> list[str]:
    """Sentences on figures that are not of all videos, and tiles that there were not."""
    first = [record for record in outcome.records if record.vae == outcome.names[0]]
    small = sum(math.isnan(record.figures["ms_ssim"]) for record in first)
    said: list[str] = []
    if 0 < small < len(first):
        said.append(
            f"MS-SSIM is the mean of {len(first) - small} of {len(first)} videos: it needs sides of "
            f"{MS_SSIM_LEAST_SIDE} pixels or more."
        )
    for name in (name for name in outcome.names if name.endswith(TILED)):
        whole = [record for record in outcome.records if record.vae == name and max(record.size) <= tiles.tile_px]
        if whole:
            said.append(
                f"{name}: {len(whole)} of {len(first)} videos are no larger than a tile of {tiles.tile_px} px and were "
                "not cut; a smaller --tile-px would."
            )
    return said


def _records(
    folder: Path,
    protocol: Protocol,
    networks: Networks,
    tiles: ReferencePlan | None,
    image_vae: DiffusersImages | None,
    *,
    restart: bool,
) -> Records:
    settings: dict[str, Any] = {
        "meters": METERS,
        "protocol": str(protocol),
        "lpips": "none" if networks.lpips is None else f"{networks.lpips.kind} {networks.lpips_file}".strip(),
        "fvd": "none" if networks.video is None else f"I3D {networks.video_file}".strip(),
        "seams": "by size" if tiles is None else f"{tiles.tile_px} px, overlap {tiles.overlap}",
        "image_vae": "none" if image_vae is None else "given",
    }
    if restart:
        (folder / "results.jsonl").unlink(missing_ok=True)
    return Records(folder, settings)


@dataclass
class _Job:
    """One video through one VAE."""

    name: str
    path: Path
    vae: str
    candidate: Candidate
    folder: Path
    protocol: Protocol
    networks: Networks
    tiles: ReferencePlan | None
    pictures: bool

    def run(self, progress: Progress | None) -> Record:
        chunks = self.protocol.read(self.path)
        first = next(chunks)
        size = (first.shape[-2], first.shape[-1])
        tiles = self.tiles or tiles_for(size)
        borders = borders_of(size, self.protocol.frames or 10**6, tiles)
        meters, shown = ClipMeters(borders, self.networks), Pictures()

        def frames() -> Any:  # noqa: ANN401
            yield first
            yield from chunks

        def watch(at: int, original: Tensor, reconstruction: Tensor) -> None:
            shown(at, original, reconstruction)
            if progress is not None:
                progress(self.name, self.vae, original.shape[2])

        began = time.monotonic()
        count = measure(frames(), lambda stream: self.candidate.reconstruct(stream, size), meters, watch)
        seconds = time.monotonic() - began
        result = meters.result
        return Record(
            video=self.name,
            vae=self.vae,
            stamp="",
            count=count,
            seconds=seconds,
            size=size,
            facts=self.candidate.facts,
            figures=result.figures,
            frames=result.frames,
            phases=result.phases,
            borders={"rows": [list(b) for b in borders.rows], "columns": [list(b) for b in borders.columns]},
            pictures=self._keep(shown, result.heat) if self.pictures else {},
            worst=shown.worst[1] if shown.worst else 0,
            features=None if result.features is None else (pack(result.features[0]), pack(result.features[1])),
        )

    def _keep(self, shown: Pictures, heat: Tensor) -> dict[str, str]:
        """Write the pictures of this pair; returns their names within the folder."""
        parts = self.folder / PARTS
        parts.mkdir(exist_ok=True)
        stem = hashlib.sha256(f"{self.name}\0{self.vae}".encode()).hexdigest()[:16]
        kept = {"heat": f"{PARTS}/{stem}.npy"}
        np.save(self.folder / kept["heat"], heat.numpy().astype(np.float32))
        if shown.worst is not None:
            kept["worst"] = f"{PARTS}/{stem}.png"
            _, _, original, reconstruction = shown.worst
            beside = to_uint8(torch.cat([original, reconstruction], dim=-1)).permute(1, 2, 0)
            Image.fromarray(beside.contiguous().numpy()).save(self.folder / kept["worst"])
        if len(shown.beside) > 1:
            kept["clip"] = f"{PARTS}/{stem}.mp4"
            kept["poster"] = f"{PARTS}/{stem}.jpg"
            first = shown.beside[0].permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(first).save(self.folder / kept["poster"], quality=85)
            height, width = shown.beside[0].shape[-2:]
            with VideoWriter(self.folder / kept["clip"], fps=Fraction(12), size=(height, width), crf=20) as writer:
                for frame in shown.beside:
                    writer.write(frame[:, None].float() / 127.5 - 1)
        return kept


def tiles_for(size: tuple[int, int]) -> ReferencePlan:
    """The official tiles of 576 px, or for smaller pictures the largest that cut one into at least two."""
    longest = max(size)
    return ReferencePlan() if longest > 576 else ReferencePlan(tile_px=max(TILE, (longest - 1) // TILE // 2 * TILE))


def _with_compatibility(
    record: Record, candidate: Native, image_vae: DiffusersImages, path: Path, protocol: Protocol, outcome: Outcome
) -> Record:
    try:
        found = latent_compatibility(candidate.vae, image_vae, lambda: protocol.read(path))
    except ValueError as error:
        note = f"{record.vae}: no latent compatibility. {error}"
        if note not in outcome.notes:
            outcome.notes.append(note)
        return record
    return replace(
        record,
        compatibility={
            "distance": found.distance,
            "nearest": found.nearest,
            "video_to_image": found.video_to_image,
            "image_to_video": found.image_to_video,
        },
    )


def _stamp(path: Path) -> str:
    try:
        found = path.stat()
    except OSError as error:
        raise VideoError(f"{path}: no such file.") from error
    return f"{found.st_size}:{found.st_mtime_ns}"
