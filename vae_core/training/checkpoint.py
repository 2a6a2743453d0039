"""Checkpoints of a run: all that going on needs, in one file for each, complete or not there at all."""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ..weights.writing import write_torch

FORMAT = "cviv-vae training 1"
WEIGHTS = ".safetensors"  # ending of the VAE's weights that lie beside a checkpoint


class TrainingError(ValueError):
    """A training run cannot begin, go on or continue."""


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """The checkpoints in `folder`, named by their step; the newest `keep` stay."""

    folder: Path
    keep: int

    def all(self) -> list[tuple[int, Path]]:
        """(step, file) of each, oldest first."""
        found = ((re.fullmatch(r"step_(\d+)\.ckpt", path.name), path) for path in self.folder.glob("step_*.ckpt"))
        return sorted((int(match[1]), path) for match, path in found if match)

    def newest(self) -> Path | None:
        """The last one, or None."""
        found = self.all()
        return found[-1][1] if found else None

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write `state` as the checkpoint of `step`, then remove the oldest ones beyond `keep`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{step:08d}.ckpt"
        write_torch(path, {"format": FORMAT, "step": step, **state})  # on the disk before the older ones are removed
        for _, old in self.all()[: -self.keep]:
            old.unlink()
            old.with_suffix(WEIGHTS).unlink(missing_ok=True)
        return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `Checkpoints.save` wrote; code in the file is never run. Raises TrainingError for any other file."""
    try:
        state = cast("dict[str, Any]", torch.load(path, map_location="cpu", weights_only=True))
        if state["format"] != FORMAT:
            raise KeyError("format")
    except (RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise TrainingError(
            f"{path} is no checkpoint of this training, or is damaged. Remove it to go on from the one before it."
        ) from error
    return state
