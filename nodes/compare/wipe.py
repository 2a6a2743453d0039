"""What the wipe player on a node needs: the frames of two clips as exact pictures, and a value per frame.

The player is web/js/wipe_player.js. It attaches to every node of this pack whose output for the page has the key
`cviv_wipe`. The pictures are lossless WebP files in ComfyUI's temporary folder, so that its difference view shows the
clips and not a codec.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import folder_paths
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...vae_core.media.video import to_uint8
from ..bridge.wire import chunks_of, pixels_of

KEY = "cviv_wipe"
FOLDER = "cviv_wipe"  # in ComfyUI's temporary folder
SIDE, MOST_FRAMES = 768, 240  # largest side in pixels and number of frames that the player is given, if not told
KEPT_SETS = 8  # of pictures, the newest; ComfyUI itself empties the folder only when it starts
DEFAULT_FPS = Fraction(24)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What of a clip the player gets: every `stride`-th of `frames` frames, at `height` x `width` pixels."""

    frames: int
    stride: int
    height: int
    width: int

    @property
    def count(self) -> int:
        """Number of frames in the player."""
        return -(-self.frames // self.stride)


def shown_of(frames: int, size: tuple[int, int], side: int = SIDE, most_frames: int = MOST_FRAMES) -> Shown:
    """What fits: a larger side than `side` is shrunk to it, of more than `most_frames` frames every n-th is taken.

    n is odd, so that the frames shown come from all four places in a latent's group.
    """
    scale = min(1.0, side / max(size))
    stride = -(-frames // most_frames)
    stride += stride > 1 and stride % 2 == 0
    height, width = (max(1, round(length * scale)) for length in size)
    return Shown(frames=frames, stride=stride, height=height, width=width)


class WipeRecorder:
    """Writes the player's pictures while two clips of `frames` frames of `size` = (height, width) pass by.

    labels: of the two clips. fps: to play at; None: 24. side, most_frames: see `shown_of`.
    """

    def __init__(
        self,
        frames: int,
        size: tuple[int, int],
        *,
        labels: tuple[str, str],
        fps: Fraction | None = None,
        side: int = SIDE,
        most_frames: int = MOST_FRAMES,
    ) -> None:
        self.shown = shown_of(frames, size, side, most_frames)
        self._size, self._labels, self._fps = size, labels, fps or DEFAULT_FPS
        self._done = 0
        self._set = uuid.uuid4().hex
        self._folder = Path(folder_paths.get_temp_directory()) / FOLDER / self._set

    def add(self, a: Tensor, b: Tensor) -> None:
        """The next frames of both, (1, 3, t, height, width) in [-1, 1]."""
        if not self._done:
            _remove_old_sets(self._folder.parent)
            self._folder.mkdir(parents=True)
        numbers = range(-self._done % self.shown.stride, a.shape[2], self.shown.stride)
        jobs = [
            (video[0, :, i], self._folder / f"{name}_{(self._done + i) // self.shown.stride:05}.webp")
            for i in numbers
            for name, video in (("a", a), ("b", b))
        ]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(self._write, *zip(*jobs, strict=True)) if jobs else ():
                pass
        self._done += a.shape[2]

    def _write(self, frame: Tensor, path: Path) -> None:
        if tuple(frame.shape[1:]) != (self.shown.height, self.shown.width):
            frame = F.interpolate(frame[None].float(), (self.shown.height, self.shown.width), mode="area")[0]
        picture = Image.fromarray(to_uint8(frame).permute(1, 2, 0).cpu().contiguous().numpy())
        picture.save(path, "WEBP", lossless=True, quality=0, method=0)  # quality: of the search for smaller files

    def payload(self, numbers: Mapping[str, Sequence[float]]) -> dict[str, list[dict[str, Any]]]:
        """The `ui` of the node: what the player needs.

        numbers: named values, one for every frame of the clip, for the line and the curve under the picture; the first
        is the one drawn. Raises ValueError unless all frames were added and every number has a value for each.
        """
        frames = self.shown.frames
        wrong = {name: len(values) for name, values in numbers.items() if len(values) != frames}
        if self._done != frames or wrong:
            raise ValueError(
                f"Got {self._done} frames and numbers for {wrong or frames}; the clip has {frames} frames."
            )
        told = {
            "files": {"subfolder": f"{FOLDER}/{self._set}", "type": "temp"},
            "labels": list(self._labels),
            "frames": frames,
            "stride": self.shown.stride,
            "count": self.shown.count,
            "width": self.shown.width,
            "height": self.shown.height,
            "full_width": self._size[1],
            "full_height": self._size[0],
            "fps": float(self._fps),
            "numbers": [{"name": name, "values": [_plain(one) for one in values]} for name, values in numbers.items()],
        }
        return {KEY: [told]}

    def note(self) -> str:
        """A sentence on what the player shows and what it leaves out."""
        shown, parts = self.shown, list[str]()
        if shown.stride > 1:
            parts.append(f"{shown.count} of {shown.frames} frames, each {shown.stride}. one")
        if (shown.height, shown.width) != self._size:
            parts.append(f"shrunk to {shown.width}x{shown.height}")
        return (
            f"player: {', '.join(parts)}; all figures are of the full clip"
            if parts
            else "player: every frame, full size"
        )


def wipe_payload(
    a: Tensor,
    b: Tensor,
    labels: tuple[str, str],
    numbers: Mapping[str, Sequence[float]],
    *,
    fps: Fraction | None = None,
    side: int = SIDE,
    most_frames: int = MOST_FRAMES,
) -> dict[str, list[dict[str, Any]]]:
    """`WipeRecorder` for two clips that are in memory, IMAGEs (n, h, w, 3) of one shape in 0..1.

    Raises ValueError where the shapes differ.
    """
    a, b = pixels_of(a), pixels_of(b)
    if a.shape != b.shape:
        raise ValueError(
            f"Got clips of shapes {tuple(a.shape)} and {tuple(b.shape)}; the player needs two of one shape."
        )
    frames, height, width, _ = a.shape
    recorder = WipeRecorder(frames, (height, width), labels=labels, fps=fps, side=side, most_frames=most_frames)
    for ours, theirs in zip(chunks_of(a), chunks_of(b), strict=True):
        recorder.add(ours, theirs)
    return recorder.payload(numbers)


def _plain(value: float) -> float | str | None:
    """A number that JSON can hold: None for NaN, "inf" for infinity."""
    if math.isnan(value):
        return None
    return round(float(value), 5) if math.isfinite(value) else "inf"


def _remove_old_sets(folder: Path) -> None:
    """Make room for one more set."""
    with contextlib.suppress(OSError):
        sets = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
        for path in sets[: max(0, len(sets) - KEPT_SETS + 1)]:
            shutil.rmtree(path, ignore_errors=True)
