"""What a run writes for people: log.jsonl, TensorBoard events and sample grids."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .. import __version__
from ..atomic import atomic_write
from ..media.video import to_uint8
from .checkpoint import is_full

MOST_COLUMNS = 6
LABEL = 14  # pixels of a row's name
logger = logging.getLogger("cviv_vae.training")


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What the caller is told, and asked, between steps.

    step: (steps done, steps in all, figures of the step). validation: (steps done, figures). pace: (steps done, figures
    of `Pace`), as often as the log is written. should_stop: asked after each step; when it says yes, a checkpoint is
    written and the run ends.
    """

    step: Callable[[int, int, Mapping[str, float]], None]
    validation: Callable[[int, Mapping[str, float]], None]
    should_stop: Callable[[], bool]
    pace: Callable[[int, Mapping[str, float]], None] = lambda step, figures: None


class Pace:
    """How fast a run is since the last time that it was asked."""

    def __init__(self) -> None:
        self._begun, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def waited(self, seconds: float) -> None:
        """So long was waited for a batch."""
        self._waited += seconds

    def stepped(self) -> None:
        """A step is done."""
        self._steps += 1

    def figures(self, left: int) -> dict[str, float]:
        """steps_per_second; data_wait, a share of the time; seconds_left for so many steps; memory_gib at its peak, of
        the GPU where one is used, else of this process. Then it begins anew.
        """
        spent = max(time.perf_counter() - self._begun, 1e-9)
        rate = self._steps / spent
        figures = {"steps_per_second": rate, "data_wait": self._waited / spent, "memory_gib": _peak_gib()}
        self._begun, self._steps, self._waited = time.perf_counter(), 0, 0.0
        return figures | ({"seconds_left": left / rate} if rate else {})


def _peak_gib() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # not on Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Means:
    """The means of figures by name over the steps since they were last taken; a step need not have them all."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}
        self.last: dict[str, float] = {}  # the newest value of each figure

    def add(self, figures: Mapping[str, float]) -> None:
        """One step's figures."""
        self.last = {**self.last, **figures}
        for name, value in figures.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + value, count + 1

    def take(self) -> dict[str, float]:
        """The means, in alphabetical order; then it begins anew."""
        means = {name: total / count for name, (total, count) in sorted(self._sums.items())}
        self._sums = {}
        return means

    def state_dict(self) -> dict[str, list[float]]:
        """Sums and counts, for a checkpoint between two entries."""
        return {name: [total, count] for name, (total, count) in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on from `state_dict`."""
        self._sums = {name: (total, int(count)) for name, (total, count) in state.items()}


class Journal:
    """log.jsonl (one line for each entry), events for TensorBoard and samples/ in `folder`.

    What was written after step `resumed`, by a run that went further than its last checkpoint, is taken back.
    TensorBoard's events are left out where the package tensorboard is not installed; log.jsonl has all of it.
    """

    def __init__(self, folder: Path, resumed: int) -> None:
        self.folder = folder
        self.path = folder / "log.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._held: list[str] = []  # lines that the disk had no room for
        self.back_to(resumed)
        self._events: Any = None
        if has_tensorboard():
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed + 1)

    def back_to(self, step: int) -> None:
        """Take back the entries after `step`."""
        kept = [line for line in read_log(self.path) if line["step"] <= step]
        with atomic_write(self.path) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def write(self, step: int, figures: Mapping[str, float], group: str = "training") -> None:
        """One entry: figures by name, in a group ("training", "validation" or "running"). A full disk holds it back."""
        self._held.append(json.dumps({"step": step, "group": group, **figures}) + "\n")
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(self._held))
        except OSError as error:
            if not is_full(error):
                raise
            os.truncate(self.path, size)  # a line that was cut off would hide those after it
        else:
            self._held = []
        if self._events is not None:
            for name, value in figures.items():
                self._events.add_scalar(f"{group}/{name}", value, step)

    def describe(self, config: Mapping[str, Any], device: torch.device) -> None:
        """run.json: the config as it is used, and what runs it; the newest start of a run counts."""
        versions = {"cviv-vae": __version__, "torch": torch.__version__, "python": platform.python_version()}
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        text = {"config": config, "versions": versions, "device": f"{device} ({name})", "system": platform.platform()}
        with atomic_write(self.folder / "run.json") as part:
            part.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")

    def show(self, step: int, grid: Tensor) -> Path:
        """Keep a picture (3, h, w) in [-1, 1] as samples/step_N.png."""
        path = self.folder / "samples" / f"step_{step:08d}.png"
        pixels = to_uint8(grid)
        try:
            path.parent.mkdir(exist_ok=True)
            with atomic_write(path) as part:
                Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(part)
        except OSError as error:
            if not is_full(error):
                raise
            logger.warning("There was no room for %s: it is left out.", path)
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


def read_log(path: Path, *groups: str) -> list[dict[str, Any]]:
    """The entries of a log.jsonl, of some groups or of all; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return [line for line in lines if not groups or line["group"] in groups]


def sample_grid(rows: Sequence[tuple[str, Tensor]]) -> Tensor:
    """Clips (3, t, h, w) of one height and width with what to call them, each a row of up to six of its frames under
    its name; (3, rows * (LABEL + h), columns * w).

    A clip of fewer frames than the first, such as what an image VAE decodes, is spread under it.
    """
    columns = min(MOST_COLUMNS, rows[0][1].shape[1])
    lines: list[Tensor] = []
    for name, clip in rows:
        picked = torch.linspace(0, clip.shape[1] - 1, columns).round().long()
        line = torch.cat(list(clip.cpu().float().clamp(-1, 1)[:, picked].unbind(1)), dim=-1)
        lines += [_label(name, line.shape[-1]), line]
    return torch.cat(lines, dim=-2)


def _label(text: str, width: int) -> Tensor:
    """A strip (3, LABEL, width) with a line of text."""
    strip = Image.new("RGB", (width, LABEL), (255, 255, 255))
    ImageDraw.Draw(strip).text((2, 1), text, fill=(0, 0, 0))
    pixels = torch.frombuffer(bytearray(strip.tobytes()), dtype=torch.uint8).view(LABEL, width, 3)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1
