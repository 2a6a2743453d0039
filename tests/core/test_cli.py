"""The command line on real small videos: what it writes, what it says, and how it ends."""

import json
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

import vae_core
from vae_core.cli import app as commands
from vae_core.cli import report
from vae_core.cli.guard import guarded
from vae_core.cli.work import Quality
from vae_core.door.loading import DEMO_WEIGHTS
from vae_core.families import FAMILIES
from vae_core.media.latents import open_latent
from vae_core.media.video import frame_times, probe, read_frames
from vae_core.metrics import frame_quality

from .clips import as_pictures, moving_picture, same_sound, tone_file, with_sound, write_av


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory, small_vae: Callable[..., vae_core.VideoVAE]) -> dict[str, Path]:
    """A small checkpoint file of each family."""
    folder = tmp_path_factory.mktemp("weights")
    files = {family: folder / f"{family}.safetensors" for family in FAMILIES}
    for family, path in files.items():
        vae_core.save(small_vae(family, torch.float32), path)
    return files


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


# ------------------------------------------------------------------------------------------------- what it makes


@pytest.mark.parametrize(
    ("family", "frames", "height", "width"),
    [
        ("cv-vae", 96, 57, 100),
        ("iv-vae", 10, 48, 64),
        ("cv-vae-sd3", 1, 33, 25),
        ("iv-vae", 18, 51, 33),
        ("image-vae", 6, 51, 33),
    ],
)
def test_reconstruct_gives_back_frames_and_size(
    here: Path, weights: dict[str, Path], family: str, frames: int, height: int, width: int
) -> None:
    clip(here / "clip.mkv", frames, height, width)
    said = succeed("reconstruct", "clip.mkv", "-w", weights[family])
    assert files(here) == {"clip.mkv", "clip_reconstruction.mp4", "clip_side_by_side.mp4"}
    plain, beside = read_all(here / "clip_reconstruction.mp4"), read_all(here / "clip_side_by_side.mp4")
    assert plain.shape == (1, 3, frames, height, width)
    assert beside.shape == (1, 3, frames, height, 2 * width)
    original = read_all(here / "clip.mkv")
    assert (beside[..., :width] - original).abs().mean() < 0.03  # the left half is the original
    assert (beside[..., width:] - plain).abs().mean() < 0.15  # noise, as random weights make it, stored twice
    assert f"mean of {frames} frame{'s' * (frames > 1)}: PSNR " in said
    assert len(re.findall(r"(?<![\d.])\d+ +\d+\.\d\d +-?\d\.\d{4}", said)) == frames


@pytest.mark.parametrize("family", ["cv-vae", "iv-vae"])
def test_the_figures_are_those_of_the_package(here: Path, weights: dict[str, Path], family: str) -> None:
    clip(here / "clip.mp4", 7, 40, 56)
    said = succeed("reconstruct", "clip.mp4", "-w", weights[family])
    video, vae = read_all(here / "clip.mp4"), vae_core.load(weights[family])
    result = vae.decode(vae.encode(video, pad=True), frames=7, size=(40, 56))
    psnr, ssim = frame_quality(result, video)
    by_hand = -10 * ((result.clamp(-1, 1) - video) / 2).pow(2).mean((0, 1, 3, 4)).log10()
    torch.testing.assert_close(psnr, by_hand)
    assert f"mean of 7 frames: PSNR {psnr.mean():.2f} dB, SSIM {ssim.mean():.4f}" in said
    for frame in range(7):
        assert re.search(rf"(?<![\d.]){frame} +{psnr[frame]:.2f} +{ssim[frame]:.4f}", said)


def test_start_frames_and_sound_go_together(here: Path, weights: dict[str, Path]) -> None:
    with_sound(here / "clip.mp4", 75)
    succeed("reconstruct", "clip.mp4", "-w", weights["cv-vae"], "--start", 25, "--frames", 25, "-o", "part.mkv")
    assert files(here) == {"clip.mp4", "part.mkv", "part_side_by_side.mkv"}
    for name in ("part.mkv", "part_side_by_side.mkv"):
        assert read_all(here / name).shape[2] == 25
        assert probe(here / name).audio_codec == "aac"
        same_sound(here / "clip.mp4", here / name, offset=1.0, length=0.9)
    left = read_all(here / "part_side_by_side.mkv")[..., :64]
    assert (left - read_all(here / "clip.mp4", start=25, frames=25)).abs().mean() < 0.02


@pytest.mark.parametrize("family", ["iv-vae", "image-vae"])
def test_encode_then_decode_is_reconstruct(here: Path, weights: dict[str, Path], family: str) -> None:
    with_sound(here / "clip.mp4", 30)
    chosen = ("-w", weights[family], "--start", 3, "--frames", 22)
    said = succeed("encode", "clip.mp4", *chosen, "-o", "clip.safetensors")
    assert f"family           {family}" in said
    meta = open_latent(here / "clip.safetensors").meta
    assert (meta.family, meta.fps, meta.frames, meta.height, meta.width) == (family, Fraction(25), 22, 48, 64)
    assert (meta.audio, meta.start) == ("clip.sound.mka", 3)
    assert succeed("info", "clip.safetensors") == said
    succeed("decode", "clip.safetensors", "-w", weights[family], "-o", "decoded.mp4", "--crf", 0)
    succeed("reconstruct", "clip.mp4", *chosen, "-o", "direct.mp4", "--crf", 0)
    torch.testing.assert_close(read_all(here / "decoded.mp4"), read_all(here / "direct.mp4"), atol=0.03, rtol=0)
    same_sound(here / "clip.mp4", here / "decoded.mp4", offset=3 / 25, length=0.8)


def test_frames_that_are_not_finite_are_not_written(here: Path, weights: dict[str, Path]) -> None:
    clip(here / "clip.mkv", 5, 32, 40)
    succeed("encode", "clip.mkv", "-w", weights["iv-vae"])
    vae = vae_core.load(weights["iv-vae"])
    with torch.no_grad():
        next(vae.model.decoder.parameters()).fill_(float("nan"))
    vae_core.save(vae, here / "broken.safetensors")
    line = fail("decode", "clip.latent.safetensors", "-w", "broken.safetensors")
    assert "Chunk 0 of the result holds NaN or infinity. In float16, load the VAE in bfloat16 or float32" in line
    assert files(here) == {"clip.mkv", "clip.latent.safetensors", "broken.safetensors"}


def test_a_latent_outlives_its_source(here: Path, weights: dict[str, Path]) -> None:
    with_sound(here / "clip.mp4", 9)
    succeed("encode", "clip.mp4", "-w", weights["cv-vae"])
    assert (here / "clip.latent.sound.mka").exists()
    (here / "clip.mp4").rename(here / "source.mp4")
    succeed("decode", "clip.latent.safetensors", "-w", weights["cv-vae"])
    assert probe(here / "clip_decoded.mp4").audio_codec == "aac"
    same_sound(here / "source.mp4", here / "clip_decoded.mp4", offset=0, length=0.36)
    (here / "clip.latent.sound.mka").unlink()
    result = run("decode", "clip.latent.safetensors", "-w", weights["cv-vae"], "--overwrite")
    assert result.exit_code == 0
    assert "Note: The sound is left out: clip.latent.sound.mka: no such file." in result.stderr
    assert not probe(here / "clip_decoded.mp4").has_audio
    assert read_all(here / "clip_decoded.mp4").shape[2] == 9


def test_a_varying_frame_rate_survives_the_latent_file(here: Path, weights: dict[str, Path]) -> None:
    pts = [0, 40, 80, 400, 440, 1000, 1040]
    write_av(here / "uneven.mp4", as_pictures(moving_picture(7, 32, 48)), pts=pts)
    succeed("encode", "uneven.mp4", "-w", weights["cv-vae"])
    succeed("decode", "uneven.latent.safetensors", "-w", weights["cv-vae"])
    assert [round(1000 * time) for time in frame_times(here / "uneven_decoded.mp4")] == pts


def test_the_seed_decides_the_draw(here: Path, weights: dict[str, Path]) -> None:
    clip(here / "clip.mp4", 9, 32, 48)
    latents: dict[str, torch.Tensor] = {}
    for name, words in {"mean": (), "one": ("--seed", 1), "again": ("--seed", 1), "two": ("--seed", 2)}.items():
        succeed("encode", "clip.mp4", "-w", weights["cv-vae"], "-o", f"{name}.safetensors", *words)
        latents[name] = open_latent(here / f"{name}.safetensors").read()
    mean = vae_core.load(weights["cv-vae"]).encode(read_all(here / "clip.mp4"))
    torch.testing.assert_close(latents["mean"], mean)
    assert torch.equal(latents["one"], latents["again"])
    assert not torch.equal(latents["one"], latents["two"])
    assert not torch.equal(latents["one"], latents["mean"])


def test_dtype_is_obeyed(here: Path, weights: dict[str, Path]) -> None:
    clip(here / "clip.mp4", 5, 32, 48)
    succeed("encode", "clip.mp4", "-w", weights["iv-vae"], "--dtype", "bfloat16", "--device", "cpu")
    assert open_latent(here / "clip.latent.safetensors").dtype == torch.bfloat16


def test_info_tells_files_apart(here: Path, weights: dict[str, Path]) -> None:
    said = succeed("info", weights["cv-vae-sd3"])
    assert "family           cv-vae-sd3" in said
    assert "stored as        float32" in said
    with_sound(here / "clip.mp4", 5)
    said = succeed("info", "clip.mp4")
    assert "64x48, h264" in said
    assert "sound            aac" in said


def test_a_shorter_clip_than_asked_is_said(here: Path, weights: dict[str, Path]) -> None:
    clip(here / "clip.mp4", 5, 32, 48)
    result = run("reconstruct", "clip.mp4", "-w", weights["cv-vae"], "--frames", 9)
    assert result.exit_code == 0
    assert "Note: clip.mp4 has 5 frames from frame 0 on, fewer than --frames 9." in result.stderr


def test_overwrite_is_asked_for(here: Path, weights: dict[str, Path]) -> None:
    clip(here / "clip.mp4", 1, 32, 48)
    (here / "clip_side_by_side.mp4").write_bytes(b"mine")
    words = ("reconstruct", "clip.mp4", "-w", weights["cv-vae"])
    assert "clip_side_by_side.mp4 exists already; add --overwrite to replace it" in fail(*words)
    assert (here / "clip_side_by_side.mp4").read_bytes() == b"mine"
    succeed(*words, "--overwrite")
    assert read_all(here / "clip_side_by_side.mp4").shape[-1] == 96


# ------------------------------------------------------------------------------------------------- the demo


def check_demo(folder: Path, said: str) -> None:
    names = {"contact_sheet.png"}
    for name in ("demo-cv-vae", "demo-iv-vae"):
        names |= {f"{name}.mp4", f"{name}_side_by_side.mp4"}
        assert name in said
    assert files(folder) == names
    assert all(f"{folder.name}/{name}" in said.replace("\\", "/") for name in names)
    sheet = Image.open(folder / "contact_sheet.png")
    assert sheet.mode == "RGB"
    assert sheet.width == 1800
    assert np.asarray(sheet).std() > 10


def test_demo_on_small_weights(here: Path, weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEMO_WEIGHTS, "demo-cv-vae", weights["cv-vae"])
    monkeypatch.setitem(DEMO_WEIGHTS, "demo-iv-vae", weights["iv-vae"])
    monkeypatch.setattr(commands, "DEMO_CLIP", clip(here / "clip.mp4", 9, 48, 64))
    check_demo(here / "cviv_vae_demo", succeed("demo"))
    assert "exists already; add --overwrite" in fail("demo")
    check_demo(here / "other", succeed("demo", "-o", "other", "--frames", 2))


@pytest.mark.skipif(
    not all(path.exists() for path in (commands.DEMO_CLIP, *DEMO_WEIGHTS.values())),
    reason="the demo weights are not made yet",
)
def test_demo_as_it_is_shipped(here: Path) -> None:
    said = succeed("demo", "--frames", 5)
    check_demo(here / "cviv_vae_demo", said)
    figures = [float(value) for value in re.findall(r"\(z \d+\) +(\d+\.\d+)", said)]
    assert len(figures) == 2
    assert min(figures) > 18  # random weights give about 10 dB


# ------------------------------------------------------------------------------------------------- how it fails


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
        (_text, "text.mp4: cannot be read as video"),
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


def test_version_and_help() -> None:
    assert succeed("--version") == f"cviv-vae {vae_core.__version__}\n"
    said = succeed("--help")
    for command in ("info", "encode", "decode", "reconstruct", "download", "demo"):
        assert command in said
        assert "Usage: " in succeed(command, "--help")


def test_very_long_clips_are_shown_in_spans() -> None:
    quality = Quality(psnr=[float(index % 7) for index in range(5000)], ssim=[0.5] * 5000)
    console = Console(width=80, record=True)
    console.print(report.quality_table(quality, 80))
    said = console.export_text()
    assert "means of 21 frames each" in said
    assert "4998-4999" in said
    assert "…" not in said
    assert len(said.splitlines()) < 130
