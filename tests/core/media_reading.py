"""Videos read and written again, as commands do it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from typer.testing import CliRunner, Result

from vae_core.cli import app as commands
from vae_core.cli.outputs import Form
from vae_core.cli.work import notes_on, open_clip
from vae_core.media.video import read_frames

from .clips import write_av


def run(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(commands.app, [str(word) for word in words])


def read_all(path: Path, **choice: bool) -> torch.Tensor:
    return torch.cat(list(read_frames(path, **choice)), 2)


def as_bytes(video: torch.Tensor) -> np.ndarray:
    """(1, 3, t, H, W) in [-1, 1] to t h w c floats in 0..255."""
    return ((video[0] + 1) * 127.5).permute(1, 2, 3, 0).numpy()


def numbered(path: Path, frames: int, **choice: object) -> Path:
    """Frame i is the grey 8 i."""
    pictures = [np.full((48, 64, 3), 8 * i % 250, np.uint8) for i in range(frames)]
    return write_av(path, pictures, **choice)  # pyright: ignore[reportArgumentType]


def greys(video: torch.Tensor) -> list[int]:
    """The numbers of such frames."""
    return [round(float(level) / 8) for level in as_bytes(video).mean((1, 2, 3))]


def copied(path: Path, target: Path, form: Form | None = None, **choice: bool) -> list[str]:
    """Read and written again, as the commands do it; returns what was said of it."""
    clip = open_clip(path, **choice)
    with clip.writer(target, form or Form()) as writer:
        for chunk in clip.read():
            writer.write(chunk)
    return [*notes_on(clip), *writer.told]
