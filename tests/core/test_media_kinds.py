"""More files of each kind that failed once, made here: side data, times, damage, values, losses, what is no file."""

from __future__ import annotations

import os
import socket
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from vae_core.media.hdr import HLG, PQ, to_sdr
from vae_core.media.latents import open_latent
from vae_core.media.video import frame_times, losses, probe, timeline_of
from vae_core.training.clip_decoding import random_clip, read_picked
from vae_core.training.clip_files import ClipFile

from .clips import same_sound, tone, with_sound
from .media_reading import as_bytes, copied, numbered, read_all, run

RATE = Fraction(25)


# --------------------------------------------------------------------------------------------------- side data


def _corner(height: int = 48, width: int = 64) -> np.ndarray:
    """Light at the top left."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:16, :32] = 255
    return picture


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_profiles_and_exif_harm_nothing(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x010F] = "maker"
    if suffix != ".tif":  # where Pillow cannot write it
        exif[0x8769] = {0x9003: "2026:01:01 00:00:00"}
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = tmp_path / f"a{suffix}"
    Image.fromarray(_corner()).save(path, exif=exif, icc_profile=profile)
    np.testing.assert_allclose(as_bytes(read_all(path))[0], _corner(), atol=40)
    assert probe(path).size == (48, 64)
    clip = ClipFile(path=path, key="", kind="image")
    assert next(read_picked(clip, lambda _: [0])).shape == (3, 48, 64)
    assert random_clip(
        clip, frames=1, stride=(1, 1), size=(16, 16), short_side=None, random=np.random.default_rng(0)
    ).shape == (3, 1, 16, 16)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_and_mirrored_as_their_exif_asks(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    Image.fromarray(_corner()).save(path, exif=exif)
    with Image.open(path) as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    assert probe(path).size == expected.shape[:2]
    np.testing.assert_allclose(as_bytes(read_all(path))[0], expected, atol=40)


# --------------------------------------------------------------------------------------------------- losses


def test_what_is_lost_is_said(tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 48, 4), 90, np.uint8), "RGBA").save(tmp_path / "alpha.png")
    assert losses(probe(tmp_path / "alpha.png")) == ["has an alpha channel: it is left out"]
    Image.fromarray(np.full((32, 48, 4), 255, np.uint8), "RGBA").save(tmp_path / "opaque.png")
    assert losses(probe(tmp_path / "opaque.png")) == []
    fields = {"flags": "+ildct+ilme", "x264-params": "tff=1"}
    numbered(tmp_path / "fields.mkv", 4, options=fields)
    assert "is interlaced" in losses(probe(tmp_path / "fields.mkv"))[0]
    with av.open(str(tmp_path / "two.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        tones = [tone(container, "aac") for _ in range(2)]
        for index in range(10):
            frame = av.VideoFrame(64, 48, "yuv420p")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        for write in tones:
            write(0.4)
    assert losses(probe(tmp_path / "two.mkv")) == ["has 2 sound tracks: the first is used"]


def _hdr(path: Path, transfer: str, levels: tuple[float, ...]) -> Path:
    """Grey frames of these code values, 0 to 1, tagged as HDR."""
    params = f"colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "0", "x264-params": params})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p10le"
        for level in levels:
            frame = av.VideoFrame(64, 48, "yuv420p10le")
            for number, plane in enumerate(frame.planes):
                code = 512 if number else round(64 + 876 * level)
                plane.update(np.full(plane.buffer_size // 2, code, np.uint16).tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(("transfer", "white"), [("smpte2084", 0.5806), ("arib-std-b67", 0.75)])
def test_hdr_is_tone_mapped_refused_or_kept(tmp_path: Path, transfer: str, white: float) -> None:
    path = _hdr(tmp_path / "hdr.mkv", transfer, (0.0, 0.3, white, 1.0))
    info = probe(path)
    assert (info.hdr, info.gamut) == (True, "BT.2020")
    assert "is HDR" in losses(info)[0]
    mapped = read_all(path)[0].mean((0, 2, 3)).add(1).div(2)
    assert float(mapped[0]) == pytest.approx(0, abs=0.01)
    assert 0.8 < float(mapped[2]) < 0.96  # the reference white, with room for what is brighter
    assert float(mapped[3]) == pytest.approx(1, abs=0.02)
    assert all(mapped[1:] > mapped[:-1])
    kept = read_all(path, hdr="keep")[0].mean((0, 2, 3)).add(1).div(2)  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(kept.numpy(), [0.0, 0.3, white, 1.0], atol=0.002)
    refused = run("encode", path, "-o", tmp_path / "a.latent.safetensors", "--hdr", "refuse")
    assert refused.exit_code == 2
    assert "which was to be refused" in refused.stderr


def test_the_curve_keeps_hues_and_what_is_dark() -> None:
    dim = torch.full((3, 4, 4), 0.3) * 2 - 1
    pq = to_sdr(dim, PQ, 1)
    light = 10000 * (max(0.3 ** (32 / 2523) - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * 0.3 ** (32 / 2523))) ** (
        16384 / 2610
    )
    assert float(pq.mean().add(1).div(2)) == pytest.approx((light / 203) ** (1 / 2.4), abs=1e-4)
    bright = torch.tensor([0.9, 0.6, 0.6]).view(3, 1, 1).expand(3, 2, 2) * 2 - 1
    out = to_sdr(bright.contiguous(), HLG, 1).add(1).div(2)
    assert out[0].mean() > out[1].mean()
    assert torch.equal(out[1], out[2])


# --------------------------------------------------------------------------------------------------- readers


@pytest.mark.parametrize("rate", [Fraction(30), Fraction(24000, 1001), Fraction(50)])
def test_a_raw_stream_has_the_rate_that_is_coded_in_it(tmp_path: Path, rate: Fraction) -> None:
    path = numbered(tmp_path / "a.h264", 12, rate=rate)
    timeline = timeline_of(path)
    assert (len(timeline), timeline.fps) == (12, rate)
    assert probe(path).fps == rate
    assert timeline.time(12) == 12 / rate


def test_59_94_in_matroska(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.mkv", 30, rate=Fraction(60000, 1001))
    assert timeline_of(path).fps == Fraction(60000, 1001)
    assert run("encode", path, "-o", tmp_path / "a.latent.safetensors").exit_code == 0
    assert open_latent(tmp_path / "a.latent.safetensors").meta.fps == Fraction(60000, 1001)


def test_a_name_with_a_colon_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    numbered(tmp_path / "plain.mp4", 3)
    Path("plain.mp4").rename("12:30 meeting.mp4")
    for name in ("12:30 meeting.mp4", "./12:30 meeting.mp4"):
        assert probe(name).size == (48, 64)
    done = run("reconstruct", "./12:30 meeting.mp4", "-o", "concat:out.mp4")
    assert done.exit_code == 0, done.output
    assert Path("concat:out.mp4").exists()


def test_ycgco_is_read(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (60, 90, 200)]
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        params = {"qp": "0", "x264-params": "colormatrix=YCgCo:fullrange=on"}
        stream = container.add_stream("libx264", rate=25, options=params)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p"
        for r, g, b in colours:
            y, cg, co = r / 4 + g / 2 + b / 4, -r / 4 + g / 2 - b / 4 + 128, r / 2 - b / 2 + 128
            frame = av.VideoFrame(64, 48, "yuv444p")
            for plane, value in zip(frame.planes, (y, cg, co), strict=True):
                plane.update(np.full(plane.buffer_size, min(255, round(value)), np.uint8).tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    np.testing.assert_allclose(as_bytes(read_all(path)).mean((1, 2)), colours, atol=2)


@pytest.mark.parametrize(
    ("codec", "target", "kept", "said"),
    [
        ("libmp3lame", ".mp4", "mp3", ""),
        ("libmp3lame", ".mov", "mp3", ""),
        ("libmp3lame", ".m4v", "aac", "the sound (mp3) is re-encoded as aac, for M4V does not hold it"),
        ("libopus", ".mp4", "opus", ""),
        ("libopus", ".mov", "aac", "the sound (opus) is re-encoded as aac, for MOV does not hold it"),
        ("libopus", ".m4v", "aac", "re-encoded"),
        ("flac", ".mp4", "flac", ""),
        ("flac", ".mov", "aac", "re-encoded"),
        ("flac", ".m4v", "aac", "re-encoded"),
        ("eac3", ".mp4", "eac3", ""),
        ("eac3", ".m4v", "aac", "re-encoded"),
        ("pcm_s16le", ".mov", "pcm_s16le", ""),
        ("pcm_s16le", ".mp4", "aac", "re-encoded"),
        ("ac3", ".m4v", "ac3", ""),
    ],
)
def test_sound_is_copied_where_the_container_takes_it(
    tmp_path: Path, codec: str, target: str, kept: str, said: str
) -> None:
    source = with_sound(tmp_path / "source.mkv", 50, codec)
    told = " ".join(copied(source, tmp_path / f"copy{target}"))
    assert probe(tmp_path / f"copy{target}").audio_codec == kept
    assert (said in told) if said else ("re-encoded" not in told)
    first = float(frame_times(source)[0] - frame_times(tmp_path / f"copy{target}")[0])
    same_sound(source, tmp_path / f"copy{target}", offset=first, length=1.8)


def test_channels_are_kept_where_sound_is_encoded_anew(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        sound = container.add_stream("pcm_s16le", rate=48000, layout="5.1")
        for index in range(10):
            frame = av.VideoFrame(64, 48, "yuv420p")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        samples = np.zeros((1, 6 * 19200), np.int16)
        samples[0, 4::6] = 9000
        frame = av.AudioFrame.from_ndarray(samples, "s16", "5.1")
        frame.sample_rate, frame.pts = 48000, 0
        container.mux(sound.encode(frame))
    copied(tmp_path / "a.mkv", tmp_path / "a.mp4")
    assert probe(tmp_path / "a.mp4").channels == 6


@pytest.mark.parametrize("name", ["a.png", "a.gif", "a.avi", "a.ts", "a.h264", "a.webp"])
def test_info_looks_at_everything_that_encode_takes(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name in ("a.png", "a.webp", "a.gif"):
        Image.fromarray(_corner()).save(path)
    else:
        numbered(path, 5, codec="mpeg4" if name == "a.avi" else "libx264")
    said = run("info", path)
    assert said.exit_code == 0, said.output
    assert "64x48" in said.stdout


# --------------------------------------------------------------------------------------------------- no files


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX has pipes and devices among its files")
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.mp4"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    for words in (("encode", path), ("reconstruct", path), ("info", path)):
        refused = run(*words)
        assert refused.exit_code == 2
        assert "no regular file" in refused.stderr or "not a regular file" in refused.stderr
    source = with_sound(tmp_path / "source.mp4", 5)
    assert run("encode", source, "-o", tmp_path / "b.latent.safetensors").exit_code == 0
    sound = tmp_path / "b.latent.sound.mka"
    sound.unlink()
    path.rename(sound)
    done = run("decode", tmp_path / "b.latent.safetensors", "-o", tmp_path / "b.mp4")
    assert done.exit_code == 0
    assert "The sound is left out" in done.stderr
    assert "no regular file" in done.stderr
