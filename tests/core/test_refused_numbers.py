"""Values that are no numbers never pass quietly: weights, latents and results, in every command."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import vae_core
from vae_core.cli import app as commands
from vae_core.errors import VideoError
from vae_core.media.video import VideoWriter

from .clips import moving_picture
from .test_media_kinds import numbered

LATENT = "a.latent.safetensors"


def run(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "300"}).invoke(commands.app, [str(word) for word in words])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_vae: Callable[..., vae_core.VideoVAE]) -> Path:
    """good, broken (NaN in both halves) and large (overflows in float16) weights, a clip, pictures, a latent."""
    monkeypatch.chdir(tmp_path)
    vae_core.save(small_vae("cv-vae", torch.float32), "good.safetensors")
    with safe_open("good.safetensors", "pt") as file:
        texts = file.metadata()
    tensors = load_file("good.safetensors")
    broken = {name: torch.full_like(t, torch.nan) if "conv_in" in name else t for name, t in tensors.items()}
    save_file(broken, "broken.safetensors", metadata=texts)
    large = {name: t * 1e6 if "conv_out" in name else t for name, t in tensors.items()}
    save_file(large, "large.safetensors", metadata=texts)
    numbered(tmp_path / "clip.mp4", 6)
    Path("pictures").mkdir()
    Image.new("RGB", (64, 48), (200, 90, 30)).save("pictures/a.png")
    assert run("encode", "clip.mp4", "-w", "good.safetensors", "-o", LATENT).exit_code == 0
    return tmp_path


COMMANDS: dict[str, tuple[str, ...]] = {
    "encode": ("encode", "clip.mp4", "-o", "b.latent.safetensors"),
    "decode": ("decode", LATENT, "-o", "out.mp4"),
    "decode in 10 bits": ("decode", LATENT, "-o", "out.mp4", "--bits", "10"),
    "decode to pictures": ("decode", LATENT, "-o", "out_%03d.png", "--bits", "16"),
    "reconstruct": ("reconstruct", "clip.mp4", "-o", "out.mp4"),
    "encode-dataset": ("encode-dataset", "pictures", "-o", "set"),
    "evaluate": ("evaluate", "pictures", "-o", "report"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("weights", "choice", "remedy"),
    [
        ("broken.safetensors", (), "weights are damaged"),
        ("large.safetensors", ("--dtype", "float16"), "float16"),
    ],
)
def test_every_command_refuses_them(
    here: Path, command: str, weights: str, choice: tuple[str, ...], remedy: str
) -> None:
    before = {path.name for path in here.iterdir()}
    done = run(*COMMANDS[command], "-w", weights, *choice)
    assert done.exit_code == 2, done.output
    assert "NaN or infinity" in done.stderr
    assert remedy in done.stderr
    assert {path.name for path in here.iterdir()} - before <= {"set", "report"}
    assert not list(here.rglob("*.mp4.part")) + list(here.rglob("shard-*.safetensors"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("choice", [(), ("--dtype", "float16"), ("-o", "out_%03d.png")])
def test_a_latent_is_looked_at_before_anything_is_blamed(here: Path, value: float, choice: tuple[str, ...]) -> None:
    with safe_open(LATENT, "pt") as file:
        texts = file.metadata()
    latent = load_file(LATENT)
    latent["latent_tbchw"][1, 0, 0, 0, 0] = value
    save_file(latent, LATENT, metadata=texts)
    done = run("decode", LATENT, "-w", "good.safetensors", *choice)
    assert done.exit_code == 2
    assert "holds NaN or infinity from latent frame 0 on, so it cannot be decoded" in done.stderr
    assert "float16" not in done.stderr


def test_a_video_writer_refuses_them(tmp_path: Path) -> None:
    frames = moving_picture(3, 48, 64)
    frames[0, 0, 1, 5, 5] = torch.nan

    with (
        pytest.raises(VideoError, match="frame 1 holds NaN or infinity"),
        VideoWriter(tmp_path / "a.mp4", fps=Fraction(25), size=(48, 64)) as writer,
    ):
        writer.write(frames)
    assert not list(tmp_path.iterdir())
