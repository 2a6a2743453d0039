"""What commands say: on any console, in one line, without steering a terminal, whatever files are called."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from vae_core.cli import app as commands
from vae_core.cli import guard
from vae_core.media.latents import open_latent

from .clips import as_pictures, moving_picture, with_sound, write_av
from .command_line import fail, files, run, succeed

ROOT = Path(__file__).parents[2]
ESCAPE = "\x1b[31mred\x1b]0;title\x07\x9b2J\u202eback"
SHOWN = r"\x1b[31mred\x1b]0;title\x07\x9b2J\u202eback"
RAW = ("\x1b", "\x07", "\x9b", "\u202e")
posix = pytest.mark.skipif(sys.platform == "win32", reason="names and signals of POSIX")


def _clip(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    return write_av(path, as_pictures(moving_picture(5, 32, 40)))


@pytest.fixture
def clip(here: Path) -> Path:
    return _clip(here / "clip.mp4")


# ------------------------------------------------------------------------------------------- terminal escapes


def test_escapes_in_tensor_names_are_text(here: Path) -> None:
    save_file({f"decoder.{ESCAPE}": torch.ones(1)}, "a.safetensors")
    assert SHOWN in fail("info", "a.safetensors")


def test_escapes_in_the_metadata_of_a_latent_are_text(here: Path, weights: dict[str, Path]) -> None:
    with_sound(here / "clip.mp4", 5)
    succeed("encode", "clip.mp4", "-w", weights["cv-vae"])
    content = (here / "clip.latent.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    for name in ("audio", "family", "fps"):
        header = json.loads(content[8 : 8 + length])
        header["__metadata__"][name] = ESCAPE
        raw = json.dumps(header).encode()
        (here / "b.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])
        told = run("info", "b.safetensors")
        assert SHOWN in told.stdout + told.stderr
        assert not any(sign in told.stdout + told.stderr for sign in RAW)


@posix
def test_escapes_in_names_of_files_are_text(here: Path, weights: dict[str, Path], clip: Path) -> None:
    name = "a\x1b[31mb\x07"
    clip.rename(f"{name}.mp4")
    for words in (("info",), ("encode", "-w", weights["cv-vae"]), ("reconstruct", "-w", weights["cv-vae"])):
        told = run(words[0], f"{name}.mp4", *words[1:])
        assert told.exit_code == 0, told.output
        assert r"a\x1b[31mb\x07" in told.stdout
        assert not any(sign in told.stdout + told.stderr for sign in RAW)
    for wrong in (("decode", f"{name}x"), ("encode", f"{name}.mp4", "--dtype", name), (name,), ("encode", f"--{name}")):
        told = run(*wrong)
        assert told.exit_code == 2
        assert r"\x1b[31m" in told.stderr
        assert not any(sign in told.stderr for sign in RAW)


def test_names_in_tables_are_no_markup(here: Path) -> None:
    _clip(here / "videos" / "[bold]a[nothing].mp4")
    pytest.importorskip("cv2")
    said = succeed("build-set", "videos", "-o", "set", "-n", 1, "--size", "32x32", "--frames", 5)
    assert "000__bold_a_nothing__0.mp4" in said


# ------------------------------------------------------------------------------------------- consoles, widths


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp437"])
def test_consoles_without_most_letters_do_not_crash(
    here: Path, weights: dict[str, Path], clip: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip.rename("片é.mp4")
    for words, code in (
        (("info", "片é.mp4"), 0),
        (("reconstruct", "片é.mp4", "-w", str(weights["cv-vae"])), 0),
        (("encode", "無.mp4"), 2),
        (("encode", "-h"), 0),
        (("encode", "片é.mp4", "--片"), 2),
    ):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "argv", ["cviv-vae", *words])
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            with pytest.raises(SystemExit) as ended:
                commands.run()
        for stream in streams:
            stream.flush()
        told = b"".join(stream.buffer.getvalue() for stream in streams).decode(encoding)  # pyright: ignore
        assert ended.value.code == code, told
        assert told
        if "片é.mp4" in words and "-h" not in words:
            assert r"\u7247" in told


def test_paths_are_not_wrapped_without_a_terminal(here: Path, weights: dict[str, Path]) -> None:
    folder = here / "/".join(["a folder with a long name"] * 8)
    folder.mkdir(parents=True)
    path = _clip(folder / "clip.mp4")
    narrow = CliRunner(env={"COLUMNS": "40"})
    for words in (
        ("info", path),
        ("reconstruct", path, "-w", weights["cv-vae"], "-o", folder / "b.mp4"),
        ("encode", folder / "nowhere.mp4"),
        ("encode", path, "-w", folder / "nowhere.pth"),
        ("encode", path, folder / "one too many"),
    ):
        told = narrow.invoke(commands.app, [str(word) for word in words])
        assert any(str(folder) in line for line in (told.stdout + told.stderr).splitlines()), told.output


def test_tables_without_a_terminal_are_as_wide_as_their_names(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.table import Table

    monkeypatch.setenv("COLUMNS", "40")
    table = Table()
    table.add_column("name")
    table.add_row(guard.cell("x" * 100 + "[b]"))
    guard.show(table)
    assert "x" * 100 + "[b]" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- signals at the start


@posix
@pytest.mark.parametrize("delay", [0.0, 0.4])
def test_ctrl_c_while_it_starts_says_nothing(tmp_path: Path, delay: float) -> None:
    code = "from vae_core.cli import main\nprint('here', flush=True)\nmain()"

    def heard() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell in the background has switched off

    with subprocess.Popen(
        [sys.executable, "-c", code, "info", "nowhere.pth"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heard,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors
    assert process.returncode in (-signal.SIGINT, 130, 1)


# ------------------------------------------------------------------------------------------- names


@posix
def test_names_that_are_no_utf_8_work(here: Path, weights: dict[str, Path], clip: Path) -> None:
    pytest.importorskip("cv2")
    name = os.fsdecode(b"caf\xe9.mp4")
    (here / "videos").mkdir()
    path = f"videos/{name}"
    clip.rename(path)
    assert r"caf\udce9.mp4" in succeed("info", path)
    succeed("encode", path, "-w", weights["cv-vae"])
    assert open_latent(here / "caf_.latent.safetensors").meta.frames == 5
    succeed("reconstruct", path, "-w", weights["cv-vae"])
    wrong = os.fsdecode(b"\xe9.safetensors")
    assert "is a name that is no UTF-8" in fail("encode", path, "-w", weights["cv-vae"], "-o", wrong)
    succeed("build-set", "videos", "-o", "set", "-n", 1, "--size", "32x32", "--frames", 5)
    succeed("encode-dataset", "videos", "-o", "shards", "-w", weights["cv-vae"])
    shutil.copy(weights["cv-vae"], wrong)
    assert "has a name that is no UTF-8, which the safetensors library cannot open: rename it" in fail("info", wrong)


def test_a_list_that_is_no_utf_8_is_named(here: Path, weights: dict[str, Path]) -> None:
    (here / "list.csv").write_bytes(b"path,start\ncaf\xe9.mp4,0\n")
    (here / "list.txt").write_bytes(b"caf\xe9.mp4\n")
    said = fail("encode-dataset", "list.csv", "-o", "shards", "-w", weights["cv-vae"])
    assert "list.csv: is no list in UTF-8; save it in that encoding." in said
    pytest.importorskip("cv2")
    said = fail("build-set", "list.txt", "-o", "set")
    assert "list.txt: is no list in UTF-8; save it in that encoding." in said


# ------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("encode", "clip.mp4", "--budget", "0"), "Invalid value for '--budget'"),
        (("encode", "clip.mp4", "--budget", "nan"), "Invalid value for '--budget'"),
        (("plan", "--size", "64x64", "--frames", 9, "--budget", "0"), "Invalid value for '--budget'"),
        (("encode", "clip.mp4", "--seed", 2**70), "Invalid value for '--seed'"),
        (("train-svd-adapter", "--seed", 2**70), "--seed"),
        (("encode", "clip.mp4", "--start", 10**30), "clip.mp4: has 5 frames, numbered from 0; a start at frame 1000"),
        (("plan", "--frames", 9), "Give --size WIDTHxHEIGHT such as 1280x720, or both of --width and --height"),
        (("plan", "--frames", 9, "--size", "9x9", "--width", 9), "Give --size WIDTHxHEIGHT"),
        (("plan", "--frames", 9, "--size", "large"), "--size large is no size; give WIDTHxHEIGHT such as 1920x1080"),
        (("encode-dataset", "clip.mp4", "-o", "d", "--size", "9999999x64"), "--size 9999999x64 is no size"),
        (("encode", "clip.mp4", "--sead", 1), "No such option: --sead"),
        (("encode",), "Missing argument"),
        (("dance",), "No such command 'dance'"),
    ],
)
def test_wrong_options_are_one_sentence(clip: Path, words: tuple[object, ...], said: str) -> None:
    line = fail(*words)
    assert said in line
    assert "Unexpected" not in line


def test_budgets_beyond_any_machine_are_none(clip: Path, weights: dict[str, Path]) -> None:
    succeed("encode", clip, "-w", weights["cv-vae"], "--budget", "1e300")


def test_a_plan_takes_size_and_sides(here: Path) -> None:
    one = succeed("plan", "--size", "64x48", "--frames", 9)
    assert one == succeed("plan", "--width", 64, "--height", 48, "--frames", 9)
    assert "decode 9 frames of 64x48" in one


@pytest.mark.parametrize("command", ["encode", "decode", "plan", "evaluate", "build-set", "train", "encode-dataset"])
def test_every_command_has_short_help(command: str) -> None:
    assert succeed(command, "-h") == succeed(command, "--help")


def test_a_shell_can_complete_commands_and_options() -> None:
    for typed, found in (("cviv-vae enc", "encode-dataset"), ("cviv-vae decode --co", "--codec")):
        asked = {"_CVIV_VAE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
        told = CliRunner(env=asked).invoke(commands.app, [], prog_name="cviv-vae")
        assert found in told.stdout.split()


# ------------------------------------------------------------------------------------------- sets and reports


def _videos(folder: Path) -> Iterator[Path]:
    for number in range(2):
        yield _clip(folder / f"v{number}.mp4")


def test_a_set_is_not_cut_from_sets(here: Path) -> None:
    pytest.importorskip("cv2")
    list(_videos(here / "all"))
    choice = ("--size", "32x32", "--frames", 5)
    clips = {"000_v0_0.mp4", "001_v1_0.mp4"}
    for output in ("all", "all/set"):
        succeed("build-set", "all", "-o", output, "-n", 2, *choice)
        succeed("build-set", "all", "-o", output, "-n", 5, "--overwrite", *choice)
        assert {name for name in files(here / output) if name.startswith("0")} == clips
    succeed("build-set", "all", "-o", "all/set", "-n", 1, "--overwrite", *choice)
    left = [name for name in files(here / "all/set") if name.startswith("0")]
    assert len(left) == 1  # of a set that was larger nothing stays
    assert "are clips of a set that was cut before; give their sources" in fail("build-set", "all/set", *choice)


def test_a_report_may_lie_beside_above_or_below_its_videos(here: Path) -> None:
    for module in ("cv2", "matplotlib"):
        pytest.importorskip(module)
    (here / "all").mkdir()
    list(_videos(here / "all" / "videos"))
    for output in ("all/videos", "all"):
        done = run("evaluate", "all/videos", "-v", "shrink-8x", "--no-baseline", "-o", output, "--frames", 2)
        assert done.exit_code == 0, done.output
        found = json.loads((here / output / "report.json").read_text())["videos"]
        assert [video["video"] for video in found] == ["v0.mp4", "v1.mp4"]


def test_pictures_are_evaluated_and_what_is_not_of_all_is_said(here: Path, weights: dict[str, Path]) -> None:
    for module in ("cv2", "matplotlib"):
        pytest.importorskip(module)
    (here / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    Image.fromarray(noise).save(here / "images" / "large.png")
    Image.fromarray(noise[:64, :80]).save(here / "images" / "small.jpg")
    tiled = f"{weights['cv-vae']}+reference-tiles"
    choice = ("--no-baseline", "--clips", 0, "-v", tiled)
    done = run("evaluate", "images", *choice, "-o", "report")
    assert done.exit_code == 0, done.output
    found = json.loads((here / "report" / "report.json").read_text())
    assert {video["frames"] for video in found["videos"]} == {1}
    assert "MS-SSIM is the mean of 1 of 2 videos: it needs sides of 161 pixels or more." in done.stderr
    assert "2 of 2 videos are no larger than a tile of 576 px and were not cut; a smaller --tile-px" in done.stderr
    done = run("evaluate", "images", *choice, "-p", "coco", "-o", "report2")
    assert done.exit_code == 0, done.output
    assert json.loads((here / "report2" / "report.json").read_text())["protocol"]["name"] == "coco"


# ------------------------------------------------------------------------------------------- what nobody expected


def test_a_disk_that_is_full_says_so_whoever_meets_it(
    here: Path, weights: dict[str, Path], clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    said = fail("inflate", weights["image-vae"], "-o", "a.pth", code=1)
    assert said == "Error: The disk is full. No unfinished file is left behind; make room, or choose another -o."
    assert files(here) == {"clip.mp4"}
