"""The command `evaluate` in this process, and small clips for it."""

import json
from pathlib import Path

import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from vae_core.cli import app as commands
from vae_core.media.video import read_frames

from .clips import as_pictures, moving_picture, write_av


def video(path: Path, frames: int = 9, height: int = 48, width: int = 64) -> Path:
    path.parent.mkdir(exist_ok=True)
    return write_av(path, as_pictures(moving_picture(frames, height, width)))


def read_all(path: Path) -> Tensor:
    return torch.cat(list(read_frames(path)), 2)


def run(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(commands.app, ["evaluate", *(str(word) for word in words)])


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())
