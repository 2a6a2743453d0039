"""The command line on real small videos: what it writes, what it says, and how it ends."""

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import vae_core
from vae_core.cli import demo, report
from vae_core.cli.work import Quality
from vae_core.door.loading import DEMO_WEIGHTS
from vae_core.media.latents import open_latent
from vae_core.media.video import frame_times, probe
from vae_core.metrics import frame_quality

from .clips import as_pictures, moving_picture, same_sound, with_sound, write_av
from .command_line import clip, fail, files, read_all, run, succeed

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
    assert "Decoding gives NaN or infinity in chunk 0 of the video. The weights are damaged" in line
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
    monkeypatch.setattr(demo, "DEMO_CLIP", clip(here / "clip.mp4", 9, 48, 64))
    check_demo(here / "cviv_vae_demo", succeed("demo"))
    assert "exists already; add --overwrite" in fail("demo")
    check_demo(here / "other", succeed("demo", "-o", "other", "--frames", 2))


@pytest.mark.skipif(
    not all(path.exists() for path in (demo.DEMO_CLIP, *DEMO_WEIGHTS.values())),
    reason="the demo weights are not made yet",
)
def test_demo_as_it_is_shipped(here: Path) -> None:
    said = succeed("demo", "--frames", 5)
    check_demo(here / "cviv_vae_demo", said)
    figures = [float(value) for value in re.findall(r"\(z \d+\) +(\d+\.\d+)", said)]
    assert len(figures) == 2
    assert min(figures) > 18  # random weights give about 10 dB


# ------------------------------------------------------------------------------------------------- help


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
