"""What a run writes for people: log.jsonl, TensorBoard events and sample grids."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..media.video import to_uint8

MOST_COLUMNS = 6


class Journal:
    """log.jsonl (one line for each entry), events for TensorBoard and samples/ in `folder`.

    What was written after step `resumed`, by a run that went further than its last checkpoint, is taken back.
    TensorBoard's events are left out where the package tensorboard is not installed; log.jsonl has all of it.
    """

    def __init__(self, folder: Path, resumed: int) -> None:
        self.folder = folder
        self.path = folder / "log.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(self.path) if line["step"] <= resumed]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._events: Any = None
        if has_tensorboard():
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed + 1)

    def write(self, step: int, figures: Mapping[str, float], group: str = "training") -> None:
        """One entry: figures by name, in a group ("training" or "validation")."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "group": group, **figures}) + "\n")
        if self._events is not None:
            for name, value in figures.items():
                self._events.add_scalar(f"{group}/{name}", value, step)

    def show(self, step: int, grid: Tensor) -> Path:
        """Keep a picture (3, h, w) in [-1, 1] as samples/step_N.png."""
        path = self.folder / "samples" / f"step_{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = to_uint8(grid)
        Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(path)
        if self._events is not None:
            self._events.add_image("samples", pixels, step)
        return path

    def close(self) -> None:
        """Write out what is still held."""
        if self._events is not None:
            self._events.close()


def has_tensorboard() -> bool:
    """Whether the package tensorboard is installed."""
    return importlib.util.find_spec("tensorboard") is not None


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log.jsonl; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def sample_grid(rows: Sequence[Tensor]) -> Tensor:
    """Clips (3, t, h, w) of one height and width, each a row of up to six of its frames; (3, rows * h, columns * w).

    A clip of fewer frames than the first, such as what an image VAE decodes, is spread under it.
    """
    columns = min(MOST_COLUMNS, rows[0].shape[1])
    lines: list[Tensor] = []
    for clip in rows:
        picked = torch.linspace(0, clip.shape[1] - 1, columns).round().long()
        lines.append(torch.cat(list(clip.cpu().float().clamp(-1, 1)[:, picked].unbind(1)), dim=-1))
    return torch.cat(lines, dim=-2)
