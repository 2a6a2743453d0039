"""How commands fail: in one line on stderr that names what is wrong, and with a code."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vae_core.cli.guard import guarded

from .clips import tone_file
from .command_line import clip, fail, files, run, succeed


def _cut(weights: dict[str, Path], here: Path) -> str:
    whole = weights["cv-vae"].read_bytes()
    (here / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    return "cut.safetensors"


def _wan(weights: dict[str, Path], here: Path) -> str:
    shapes = {
        "encoder.conv1.weight": (96, 3, 3, 3, 3),
        "encoder.downsamples.0.residual.0.gamma": (96, 1, 1, 1),
        "encoder.downsamples.0.residual.2.weight": (96, 96, 3, 3, 3),
        "decoder.conv1.weight": (384, 16, 3, 3, 3),
        "decoder.upsamples.0.residual.0.gamma": (384, 1, 1, 1),
        "decoder.middle.0.residual.0.gamma": (384, 1, 1, 1),
        "conv1.weight": (32, 32, 1, 1, 1),
        "conv2.weight": (16, 16, 1, 1, 1),
    }
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, here / "wan.pth")
    return "wan.pth"


@pytest.mark.parametrize(
    ("choose", "words"),
    [
        (_cut, "cut"),
        (_wan, "a Wan 2.1 VAE"),
        (lambda weights, here: "nowhere.safetensors", "nowhere.safetensors"),
        (lambda weights, here: "clip.mp4", "a video"),
    ],
)
def test_wrong_weights_are_named(
    here: Path, weights: dict[str, Path], choose: Callable[[dict[str, Path], Path], str], words: str
) -> None:
    clip(here / "clip.mp4", 1, 32, 48)
    assert words in fail("reconstruct", "clip.mp4", "-w", choose(weights, here))
    assert not {name for name in files(here) if "recon" in name or "part" in name}


def _text(here: Path) -> str:
    (here / "text.mp4").write_text("this is not a video\n" * 50)
    return "text.mp4"


def _sound(here: Path) -> str:
    return tone_file(here / "tone.m4a", 0.3).name


@pytest.mark.parametrize("command", ["reconstruct", "encode"])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_text, "text.mp4: is a text file"),
        (_sound, "tone.m4a: holds only sound"),
        (lambda here: "nowhere.mp4", "nowhere.mp4: no such file"),
        (lambda here: ".", "is a folder; give a video file"),
    ],
)
def test_wrong_videos_are_named(
    here: Path, weights: dict[str, Path], command: str, make: Callable[[Path], str], words: str
) -> None:
    name = make(here)
    before = files(here)
    assert words in fail(command, name, "-w", weights["cv-vae"])
    assert files(here) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-o", "nowhere/out.mp4"), "nowhere is no folder; make it first"),
        (("-o", "out.txt"), "end the name in one of .mp4"),
        (("-o", "clip.mp4", "--overwrite"), "clip.mp4 is the input itself"),
        (("-o", "folder.mp4"), "folder.mp4 is a folder"),
        (("--device", "abacus"), "--device abacus is no device"),
        (("--device", "cuda:99"), "--device cuda:99 is not there"),
        (("--device", "meta"), "--device meta is no device"),
        (("--start", 5), "has 5 frames, numbered from 0; a start at frame 5 is beyond them"),
    ],
)
def test_wrong_choices_are_named(here: Path, weights: dict[str, Path], words: tuple[object, ...], said: str) -> None:
    clip(here / "clip.mp4", 5, 32, 48)
    (here / "folder.mp4").mkdir()
    assert said in fail("reconstruct", "clip.mp4", "-w", weights["cv-vae"], *words)
    assert files(here) == {"clip.mp4", "folder.mp4"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("dance",), "No such command"),
        (("reconstruct",), "Missing argument"),
        (("reconstruct", "clip.mp4", "--frames", "0"), "--frames"),
        (("reconstruct", "clip.mp4", "--start", "-1"), "--start"),
        (("reconstruct", "clip.mp4", "--dtype", "int8"), "int8"),
        (("reconstruct", "clip.mp4", "--sead", "1"), "--sead"),
    ],
)
def test_a_wrong_command_line_ends_in_2(here: Path, words: tuple[str, ...], said: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_latent_of_another_vae_is_refused(here: Path, weights: dict[str, Path]) -> None:
    clip(here / "clip.mp4", 5, 32, 48)
    succeed("encode", "clip.mp4", "-w", weights["iv-vae"], "-o", "z.safetensors")
    said = fail("decode", "z.safetensors", "-w", weights["cv-vae"])
    assert "was made by iv-vae with 4 latent channels" in said
    assert "is cv-vae with 4" in said
    assert "there are no demo weights; name the weights" in fail("decode", "z.safetensors")
    assert "weights of a VAE" in fail("decode", weights["cv-vae"])
    assert "nowhere.safetensors" in fail("decode", "nowhere.safetensors")
    assert "end the name z.txt in .safetensors" in fail("encode", "clip.mp4", "-w", weights["cv-vae"], "-o", "z.txt")
    assert files(here) == {"clip.mp4", "z.safetensors"}


def test_a_damaged_latent_file_is_named(here: Path, weights: dict[str, Path]) -> None:
    clip(here / "clip.mp4", 5, 32, 48)
    succeed("encode", "clip.mp4", "-w", weights["cv-vae"], "-o", "z.safetensors")
    data = (here / "z.safetensors").read_bytes()
    (here / "z.safetensors").write_bytes(data[:-10])
    assert "z.safetensors" in fail("decode", "z.safetensors", "-w", weights["cv-vae"])
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["frames"] = "50"
    text = json.dumps(header).encode().ljust(length)
    (here / "z.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert "is said to have 50" in fail("decode", "z.safetensors", "-w", weights["cv-vae"])


def test_unknown_downloads_are_named(here: Path) -> None:
    assert "choose one of vae3d, vae3d_v1-1, vae3d_sd3, ivvae_z4_dim64" in fail("download", "vae9d")
    assert not files(here)


def test_what_nobody_expected_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    @guarded
    def broken() -> None:
        raise ZeroDivisionError("division by zero\nsecond line")

    with pytest.raises(Exception, match="1"):
        broken()
    said = capsys.readouterr().err
    assert said == "Error: Unexpected ZeroDivisionError: division by zero (cviv-vae --debug ... shows where)\n"
