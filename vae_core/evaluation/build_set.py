"""An evaluation set cut from a folder of videos, even in how much they move."""

import csv
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..atomic import remove
from ..errors import VideoError
from ..media.video import VideoInfo, VideoWriter, probe, read_frames
from ..metrics import optical_flow
from .protocols import Protocol, cover

LOOK = 256  # pixels, the shorter side on which motion is measured
PAIRS = 8  # pairs of frames that are looked at in each clip, evenly
MANIFEST = "manifest.json"
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A place from which a clip can be cut. motion: mean length of the optical flow, in shares of the shorter side per
    second: 0 is a still picture, 1 crosses it in a second."""

    name: str
    start: int
    motion: float


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A clip of the set, as the manifest has it. sha256: of the clip; source_sha256: of the video it is from."""

    file: str
    source: str
    start: int
    frames: int
    fps: str
    width: int
    height: int
    motion: float
    sha256: str
    source_sha256: str


@dataclass(kw_only=True)
class BuiltSet:
    """What was made, and why videos were passed over."""

    cuts: list[Cut]
    broken: dict[str, str]
    too_small: list[str]


def build_set(
    videos: Mapping[str, Path],
    folder: Path,
    *,
    count: int,
    size: tuple[int, int] = (1080, 1920),
    frames: int = 97,
    per_video: int = 1,
    crf: float = 8,
    progress: Progress | None = None,
) -> BuiltSet:
    """Score `videos` by motion, choose `count` clips evenly over the range of motion, cut them, write the manifest.

    Clips of a set that was in `folder` before go.

    videos: files by name. size: (height, width) of the clips; a larger video is scaled down until it just covers it and
    cut to its centre, a smaller one is passed over. frames: length of a clip. per_video: clips of one video at most,
    evenly along it. crf: quality of the H.264 clips, 0 is lossless. Videos that cannot be read, or are shorter than a
    clip, are named in `broken`. Fewer clips are cut where there are fewer. Raises VideoError where none can be cut.
    """
    scored: list[Scored] = []
    built = BuiltSet(cuts=[], broken={}, too_small=[])
    for name, path in videos.items():
        try:
            info = probe(path)
            if info.height < size[0] or info.width < size[1]:
                built.too_small.append(name)
                continue
            scored += score(name, path, info, frames=frames, per_video=per_video)
        except VideoError as error:
            built.broken[name] = str(error)
        if progress is not None:
            progress(f"scored {name}")
    if not scored:
        raise VideoError(
            f"None of {len(videos)} videos can be cut to {size[1]}x{size[0]} with {frames} frames: "
            f"{len(built.too_small)} are too small, {len(built.broken)} cannot be used"
            f"{''.join(f' ({why})' for why in list(built.broken.values())[:1])}. Give others, or a smaller --size."
        )
    folder.mkdir(parents=True, exist_ok=True)
    before = clips_of(folder)
    for index, chosen in enumerate(evenly(scored, count)):
        path = videos[chosen.name]
        built.cuts.append(_cut(index, chosen, path, folder, size=size, frames=frames, crf=crf))
        if progress is not None:
            progress(f"cut {built.cuts[-1].file}")
    _write_manifest(built, folder)
    for old in before - {cut.file for cut in built.cuts}:
        remove(folder / Path(old).name)
    return built


def score(name: str, path: Path, info: VideoInfo, *, frames: int, per_video: int) -> list[Scored]:
    """Up to `per_video` clips of a video with their motion, in one pass over it; holds two small frames.

    Raises VideoError where the video is damaged or shorter than a clip.
    """
    length = _length(path, info, frames)
    fit = min(per_video, length // frames)
    starts = [i * (length - frames) // max(fit - 1, 1) for i in range(fit)]
    wanted: dict[int, list[int]] = {}  # the second frame of a pair: the clips it counts for
    for index, start in enumerate(starts):
        for pair in range(PAIRS):
            wanted.setdefault(start + 1 + pair * (frames - 2) // PAIRS, []).append(index)
    found: list[list[float]] = [[] for _ in starts]
    last: Tensor | None = None
    at = 0
    for chunk in read_frames(path):
        for frame in chunk[0].unbind(1):
            if at in wanted and last is not None:
                here = _look(frame)
                length_of_flow = float(optical_flow(_look(last), here).square().sum(0).sqrt().mean())
                for index in wanted[at]:
                    found[index].append(length_of_flow / min(here.shape[-2:]) * float(info.fps))
            last = frame if at + 1 in wanted else None
            at += 1
    if at < starts[-1] + frames:
        raise VideoError(f"{path}: has {at} frames, fewer than its header says; cut it anew.")
    return [
        Scored(name=name, start=start, motion=sum(motion) / len(motion))
        for start, motion in zip(starts, found, strict=True)
        if motion
    ]


def evenly(scored: Sequence[Scored], count: int) -> list[Scored]:
    """`count` of them, evenly over the range of motion, from least to most; all where there are fewer.

    For each of `count` even steps from least to most, the nearest that is left is taken; ties go to the earlier name.
    """
    left = sorted(scored, key=lambda one: (one.motion, one.name, one.start))
    if len(left) <= count:
        return left
    low, high = left[0].motion, left[-1].motion
    chosen: list[Scored] = []
    for step in range(count):
        target = low + (high - low) * (step / (count - 1) if count > 1 else 0.5)
        nearest = min(left, key=lambda one: abs(one.motion - target))
        left.remove(nearest)
        chosen.append(nearest)
    return sorted(chosen, key=lambda one: one.motion)


def _length(path: Path, info: VideoInfo, frames: int) -> int:
    length = info.frames
    if length is None:
        length = sum(chunk.shape[2] for chunk in read_frames(path))
    if length < frames:
        raise VideoError(f"{path}: has {length} frames; a clip needs {frames}. Ask for fewer with --frames.")
    return length


def _look(frame: Tensor) -> Tensor:
    """(3, h, w) in [-1, 1] to levels of 0 to 255, the shorter side at most 256 pixels."""
    scale = min(1.0, LOOK / min(frame.shape[-2:]))
    size = [max(16, round(side * scale)) for side in frame.shape[-2:]]
    small = F.interpolate(frame[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
    return (small.clamp(-1, 1) + 1) * 127.5


def _cut(
    index: int, chosen: Scored, path: Path, folder: Path, *, size: tuple[int, int], frames: int, crf: float
) -> Cut:
    stem = "".join(letter if letter.isalnum() else "_" for letter in Path(chosen.name).stem)[:40]
    file = folder / f"{index:03d}_{stem}_{chosen.start}.mp4"
    fps = probe(path).fps
    with VideoWriter(file, fps=Fraction(fps), size=size, crf=crf) as writer, torch.no_grad():
        for chunk in Protocol(name="cut", frames=frames, start=chosen.start).read(path):
            writer.write(cover(chunk, size))
    return Cut(
        file=file.name,
        source=chosen.name,
        start=chosen.start,
        frames=frames,
        fps=str(fps),
        width=size[1],
        height=size[0],
        motion=round(chosen.motion, 6),
        sha256=digest(file),
        source_sha256=digest(path),
    )


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def clips_of(folder: Path) -> set[str]:
    """Names of the clips of the set in `folder`, by its manifest; none where there is no set."""
    try:
        document: Any = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {str(clip["file"]) for clip in document["clips"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def without_sets(videos: Mapping[str, Path]) -> dict[str, Path]:
    """`videos` but for the clips of sets that were cut before. Raises VideoError where none is left."""
    sets = {folder: clips_of(folder) for folder in {path.parent for path in videos.values()}}
    left = {name: path for name, path in videos.items() if path.name not in sets[path.parent]}
    if videos and not left:
        raise VideoError("All videos that were found are clips of a set that was cut before; give their sources.")
    return left


def check_set(folder: Path) -> list[str]:
    """Names of the clips of a built set that are missing or changed; empty for a set that is whole."""
    document: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    clips = [(folder / clip["file"], clip["sha256"]) for clip in document["clips"]]
    return [path.name for path, known in clips if not path.is_file() or digest(path) != known]


def _write_manifest(built: BuiltSet, folder: Path) -> None:
    clips = [asdict(cut) for cut in built.cuts]
    motions = [cut.motion for cut in built.cuts]
    document = {
        "motion": "mean length of the optical flow (OpenCV DIS), in shares of the shorter side per second",
        "least_motion": min(motions, default=math.nan),
        "most_motion": max(motions, default=math.nan),
        "clips": clips,
        "left_out": built.broken,
        "too_small": built.too_small,
    }
    (folder / MANIFEST).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(clips[0]))
        writer.writeheader()
        writer.writerows(clips)
