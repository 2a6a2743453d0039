"""Results in every form that people ask for: codecs, qualities, depths, pictures, batches, and names of any length."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from vae_core.door.output import to_uint8
from vae_core.media.latents import LatentFile, LatentWriter, open_latent
from vae_core.media.video import probe

from .clips import as_pictures, moving_picture, with_sound, write_av
from .command_line import fail, files, read_all, run, succeed

Weights = dict[str, Path]


@pytest.fixture
def latent(here: Path, weights: Weights) -> LatentFile:
    """The latent file of a clip of 5 frames with sound, in the current folder."""
    with_sound(here / "clip.mp4", 5)
    succeed("encode", "clip.mp4", "-w", weights["cv-vae"])
    (here / "clip.mp4").unlink()
    return open_latent(here / "clip.latent.safetensors")


def _decode(weights: Weights, output: str, *choice: object) -> str:
    result = run("decode", "clip.latent.safetensors", "-w", weights["cv-vae"], "-o", output, *choice)
    assert result.exit_code == 0, result.output
    return result.stderr


def _stream(path: str) -> tuple[str, str, int]:
    """Codec, pixel format and frames of a video."""
    with av.open(path) as file:
        stream = file.streams.video[0]
        return stream.codec_context.codec.canonical_name, stream.format.name, sum(1 for _ in file.decode(stream))


@pytest.mark.parametrize(
    ("output", "choice", "codec", "form"),
    [
        ("a.mp4", ("--crf", 0), "h264", "yuv420p"),
        ("a.mp4", ("--bits", 10), "h264", "yuv420p10le"),
        ("a.mkv", ("--pix-fmt", "yuv444p10le", "--crf", 20), "h264", "yuv444p10le"),
        ("a.mov", ("--codec", "prores"), "prores", "yuv422p10le"),
        ("a.mkv", ("--codec", "ffv1"), "ffv1", "bgr0"),
        ("a.mkv", ("--codec", "ffv1", "--bits", 16), "ffv1", "gbrp16le"),
        ("a.webm", ("--codec", "vp9", "--crf", 30), "vp9", "yuv420p"),
        ("a.mp4", ("--codec", "av1"), "av1", "yuv420p"),
    ],
)
def test_a_decode_is_stored_as_asked(
    latent: LatentFile, weights: Weights, output: str, choice: tuple[object, ...], codec: str, form: str
) -> None:
    _decode(weights, output, *choice)
    assert _stream(output) == (codec, form, 5)
    assert probe(output).has_audio


def test_a_reconstruction_is_stored_as_asked(here: Path, weights: Weights) -> None:
    write_av(here / "clip.mp4", as_pictures(moving_picture(5, 32, 40)))
    succeed("reconstruct", "clip.mp4", "-w", weights["cv-vae"], "-o", "a.mkv", "--codec", "ffv1", "--bits", 16)
    assert _stream("a.mkv") == _stream("a_side_by_side.mkv") == ("ffv1", "gbrp16le", 5)
    succeed("reconstruct", "clip.mp4", "-w", weights["cv-vae"], "-o", "a_%02d.png", "--bits", 16)
    frames = read_all(here / "a.mkv")
    for number in range(5):
        torch.testing.assert_close(read_all(here / f"a_{number:02d}.png")[:, :, 0], frames[:, :, number])
        assert probe(here / f"a_{number:02d}_side_by_side.png").size == (32, 80)


def test_a_lower_crf_is_nearer(latent: LatentFile, weights: Weights) -> None:
    _decode(weights, "exact.mkv", "--codec", "ffv1", "--bits", 16)
    _decode(weights, "fine.mp4", "--crf", 4)
    _decode(weights, "coarse.mp4", "--crf", 45)
    exact, fine, coarse = (read_all(Path(name)) for name in ("exact.mkv", "fine.mp4", "coarse.mp4"))
    assert (coarse - exact).square().mean() > 2 * (fine - exact).square().mean()


@pytest.mark.parametrize(("suffix", "bits"), [("png", 8), ("png", 16), ("tif", 16), ("webp", 8), ("jpg", 8)])
def test_frames_are_numbered_pictures(latent: LatentFile, weights: Weights, suffix: str, bits: int) -> None:
    _decode(weights, "exact.mkv", "--codec", "ffv1", "--bits", 16)
    said = _decode(weights, f"out_%05d.{suffix}", *(("--bits", bits) if bits == 16 else ()))
    assert "Note: Pictures hold no sound; it is left out." in said
    names = [f"out_{number:05d}.{suffix}" for number in range(5)]
    assert names == sorted(name for name in files(Path()) if name.startswith("out_"))
    exact = read_all(Path("exact.mkv"))
    for number, name in enumerate(names):
        frame, made = exact[0, :, number], read_all(Path(name))[0, :, 0]
        if bits == 16:
            torch.testing.assert_close(made, frame, atol=1e-6, rtol=0)
        else:
            levels = np.asarray(Image.open(name).convert("RGB")).astype(int)
            assert np.abs(levels - to_uint8(frame).permute(1, 2, 0).numpy()).mean() < (1 if suffix == "png" else 16)


def test_a_picture_comes_back_as_a_picture(here: Path, weights: Weights) -> None:
    Image.fromarray(np.full((32, 40, 3), 90, np.uint8)).save(here / "photo.jpg")
    succeed("encode", "photo.jpg", "-w", weights["cv-vae"])
    assert "picture: photo_decoded.png" in succeed(
        "decode", "photo.latent.safetensors", "-w", weights["cv-vae"], "--bits", 16
    )
    with av.open("photo_decoded.png") as file:
        assert file.streams.video[0].format.name == "rgb48be"
    assert "reconstruction: photo_reconstruction.png" in succeed("reconstruct", "photo.jpg", "-w", weights["cv-vae"])
    assert probe(here / "photo_side_by_side.png").size == (32, 80)


@pytest.mark.parametrize(
    ("output", "choice", "said"),
    [
        ("a.mp4", ("--bits", 12), "h264 video with 12 bits cannot be written here; choose 8 or 10 bits"),
        ("a.mp4", ("--codec", "ffv1"), "ffv1 video does not go into mp4; choose h264 or av1 or vp9"),
        ("a.mkv", ("--codec", "ffv1", "--crf", 3), "ffv1 has no quality crf; leave it out"),
        ("a.mp4", ("--crf", 60), "the quality crf is 60; h264 takes 0 (lossless) to 51"),
        ("a.mp4", ("--pix-fmt", "rgb24"), "h264 video is not written as rgb24; choose yuv420p, "),
        ("a.gif", (), "cannot tell which kind of video to write"),
        ("a.png", (), "5 frames do not go into one picture; give a numbered name such as a_%05d.png, or a video"),
        ("a_%d_%d.png", (), "has several places for a number"),
        ("a_%d.jpg", ("--bits", 16), "a jpg picture has 8 bits, and 16 were asked for"),
        ("a_%d.png", ("--crf", 3), "is a picture: --crf, --codec and --pix-fmt are of videos; leave them out"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_weights_are_read(
    latent: LatentFile, output: str, choice: tuple[object, ...], said: str
) -> None:
    before = files(Path())
    assert said in fail("decode", "clip.latent.safetensors", "-w", "nowhere.safetensors", "-o", output, *choice)
    assert files(Path()) == before


def test_what_pictures_do_not_hold_is_said(here: Path, weights: Weights) -> None:
    with LatentWriter(
        here / "a.latent.safetensors",
        family="cv-vae",
        fps=Fraction(25),
        height=16,
        width=16,
        aspect=Fraction(16, 11),
        times=[Fraction(number * number, 25) for number in range(6)],
    ) as writer:
        writer.write(torch.zeros(1, 4, 2, 2, 2))
        writer.finish(frames=5)
    done = run("decode", "a.latent.safetensors", "-w", weights["cv-vae"], "-o", "a_%d.png")
    assert done.exit_code == 0, done.output
    assert "Note: Pictures hold no times; those of the frames are left out." in done.stderr
    assert "Note: Pictures hold no pixel shape; the 16:11 of the video is left out." in done.stderr
    done = run("decode", "a.latent.safetensors", "-w", weights["cv-vae"], "-o", "a.webm")
    assert "Note: The pixels of 16:11 are written as square ones, since vp9 in .webm cannot be given" in done.stderr


def test_a_batch_of_two_clips_is_two_clips(latent: LatentFile, weights: Weights) -> None:
    _decode(weights, "one.mkv", "--codec", "ffv1")
    first = latent.read()
    with LatentWriter(
        Path("two.latent.safetensors"), family="cv-vae", fps=Fraction(25), height=48, width=64,
        audio=latent.meta.audio,
    ) as writer:  # fmt: skip
        writer.write(torch.cat([first, first.flip(-1)]))
        writer.finish(frames=5)
    assert "clips            2" in succeed("info", "two.latent.safetensors")
    before = files(Path())
    said = succeed("decode", "two.latent.safetensors", "-w", weights["cv-vae"], "-o", "two.mkv", "--codec", "ffv1")
    assert said.split() == ["video:", "two_1.mkv", "video:", "two_2.mkv"]
    assert files(Path()) - before == {"two_1.mkv", "two_2.mkv"}
    torch.testing.assert_close(read_all(Path("two_1.mkv")), read_all(Path("one.mkv")), atol=0.01, rtol=0)
    assert not torch.equal(read_all(Path("two_1.mkv")), read_all(Path("two_2.mkv")))
    assert probe("two_1.mkv").has_audio
    assert probe("two_2.mkv").has_audio
    refused = fail("decode", "two.latent.safetensors", "-w", weights["cv-vae"], "-o", "two.mkv")
    assert "two_1.mkv exists already; add --overwrite" in refused
    succeed("decode", "two.latent.safetensors", "-w", weights["cv-vae"], "-o", "two_%d.png")
    assert {f"two_{number}_{clip}.png" for number in range(5) for clip in (1, 2)} <= files(Path())


@pytest.mark.parametrize("letter", ["x", "é", "片"])
def test_the_longest_names_work(here: Path, weights: Weights, letter: str) -> None:
    stem = letter * (251 // len(letter.encode()))
    write_av(here / "clip.mp4", as_pictures(moving_picture(5, 32, 40)))
    (here / "clip.mp4").rename(here / f"{stem}.mp4")
    said = succeed("encode", f"{stem}.mp4", "-w", weights["cv-vae"]).splitlines()[0]
    succeed("decode", said, "-w", weights["cv-vae"])
    succeed("decode", said, "-w", weights["cv-vae"], "-o", f"{'y' * 251}.mkv")
    succeed("reconstruct", f"{stem}.mp4", "-w", weights["cv-vae"])
    made = files(here)
    assert len(made) == 6
    assert all(len(os.fsencode(name)) <= 255 for name in made)
    assert any(name.endswith("_decoded.mp4") for name in made)


def test_a_name_keeps_its_dots(here: Path, weights: Weights) -> None:
    write_av(here / "take 2.5.mp4", as_pictures(moving_picture(5, 32, 40)))
    succeed("encode", "take 2.5.mp4", "-w", weights["cv-vae"])
    succeed("decode", "take 2.5.latent.safetensors", "-w", weights["cv-vae"])
    assert "take 2.5_decoded.mp4" in files(here)
