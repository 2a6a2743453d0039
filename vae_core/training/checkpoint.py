"""Checkpoints of a run: all that going on needs, in one file for each, complete or not there at all."""

from __future__ import annotations

import errno
import logging
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ..run.stream import is_out_of_memory
from ..weights.writing import write_torch

logger = logging.getLogger("cviv_vae.training")
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

    def newest_step(self) -> int:
        """The step of the last one, -1 where there is none."""
        found = self.all()
        return found[-1][0] if found else -1

    def try_save(self, step: int, state: dict[str, Any], write_weights: Callable[[Path], None]) -> bool:
        """`save`, and the VAE's weights beside it. False, which is logged, where the disk has no room."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            if shutil.disk_usage(self.folder).free < _size(state):
                raise OSError(errno.ENOSPC, "no room")
            path = self.save(step, state)
            write_weights(path.with_suffix(WEIGHTS))
        except OSError as error:
            if not is_full(error):
                raise
            logger.warning("%s Its size is %.2f GiB. It is tried again.", self.no_room(step), _size(state) / 2**30)
            return False
        return True

    def no_room(self, step: int) -> str:
        """What to say where the disk has no room for the checkpoint of `step`."""
        last = self.newest()
        have = f"the last one is {last}" if last else "there is none yet"
        return (
            f"The disk of {self.folder} is full, and the checkpoint of step {step} is not written; {have}. Make room."
        )

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write `state` as the checkpoint of `step`, then remove the oldest ones beyond `keep`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{step:08d}.ckpt"
        write_torch(path, {"format": FORMAT, "step": step, **state})  # on the disk before the older ones are removed
        for _, old in self.all()[: -self.keep]:
            old.unlink()
            old.with_suffix(WEIGHTS).unlink(missing_ok=True)
        return path


def is_full(error: BaseException) -> bool:
    """Whether `error` says that a disk has no room left."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def why_it_ended(error: Exception) -> str:
    """What to say of an error that is not of the training itself; nothing for an unknown one."""
    if is_out_of_memory(error):
        return "memory ran out (docs/training.md says what to make smaller)"
    if "DataLoader worker" in str(error):
        return "a process that decodes clips ended, maybe for want of RAM (fewer data.workers need less)"
    return ""


def _size(state: object) -> int:
    """Bytes of the tensors in a state."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    if isinstance(state, dict):
        return sum(_size(value) for value in cast("dict[object, object]", state).values())
    if isinstance(state, list | tuple):
        return sum(_size(value) for value in cast("list[object]", state))
    return 0


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
