"""The command line in this process, and small clips for it."""

from pathlib import Path

import torch
from typer.testing import CliRunner, Result

from vae_core.cli import app as commands
from vae_core.media.video import read_frames

from .clips import as_pictures, moving_picture, write_av


def run(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(commands.app, [str(word) for word in words])


def succeed(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*words: object, code: int = 2) -> str:
    """The one line on stderr of a command that fails."""
    result = run(*words)
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    return lines[0]


def clip(path: Path, frames: int, height: int, width: int) -> Path:
    pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
    return write_av(path, as_pictures(moving_picture(frames, height, width)), pix_fmt=pix_fmt)


def read_all(path: Path, **choice: int) -> torch.Tensor:
    return torch.cat(list(read_frames(path, **choice)), 2)


def files(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}
