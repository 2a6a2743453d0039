"""Files that people have and that failed once, each at its right value: read, through the commands, written again."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from vae_core.cli import app as commands
from vae_core.cli.outputs import Form
from vae_core.cli.work import open_clip
from vae_core.errors import VideoError
from vae_core.media.latents import open_latent
from vae_core.media.video import frame_times, probe, read_frames

from .media_checks import beep, flash, lengths, shown

CASES = Path(__file__).parents[1] / "cases"


def run(*words: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(commands.app, [str(word) for word in words])


def read_all(path: Path, **choice: bool) -> torch.Tensor:
    return torch.cat(list(read_frames(path, **choice)), 2)


def copied(path: Path, target: Path, **choice: bool) -> Path:
    """The file read and written again, as the commands do it but without a VAE between."""
    clip = open_clip(path, **choice)
    with clip.writer(target, Form()) as writer:
        for chunk in clip.read():
            writer.write(chunk)
    return target


def through_the_vae(folder: Path, path: Path, *choice: str) -> tuple[Path, str]:
    """The file through encode and decode, after its source is gone; and what was said."""
    source = folder / path.name
    source.write_bytes(path.read_bytes())
    first = run("encode", source, "-o", folder / "a.latent.safetensors", *choice)
    assert first.exit_code == 0, first.output
    source.unlink()
    target = folder / (
        "decoded.png" if open_latent(folder / "a.latent.safetensors").meta.frames == 1 else "decoded.mp4"
    )
    second = run("decode", folder / "a.latent.safetensors", "-o", target)
    assert second.exit_code == 0, second.output
    return target, first.stderr + second.stderr


# ------------------------------------------------------------------------------------------------- every case


@pytest.mark.parametrize("name", ["icc.png", "exif_plain.jpg"])
def test_pictures_with_side_data_encode(tmp_path: Path, name: str) -> None:
    picture = read_all(CASES / name)
    assert picture.shape == (1, 3, 1, 96, 160)
    decoded, _ = through_the_vae(tmp_path, CASES / name)
    assert probe(decoded).still
    assert probe(decoded).size == (96, 160)
    done = run("reconstruct", CASES / name, "-o", tmp_path / "back.png")
    assert done.exit_code == 0, done.output


def test_an_animated_webp_is_read(tmp_path: Path) -> None:
    frames = read_all(CASES / "a.webp")
    assert frames.shape == (1, 3, 24, 96, 160)
    assert frame_times(CASES / "a.webp")[:3] == [0, Fraction(41, 1000), Fraction(83, 1000)]
    decoded, said = through_the_vae(tmp_path, CASES / "a.webp")
    assert len(shown(decoded)) == 24
    assert lengths(decoded)[0] == pytest.approx(1, abs=0.01)
    assert "damaged" not in said


def test_a_gif_keeps_its_length_and_times(tmp_path: Path) -> None:
    decoded, _ = through_the_vae(tmp_path, CASES / "n_anim.gif")
    times = [time for time, _ in shown(decoded)]
    assert len(times) == 24
    np.testing.assert_allclose(times, [float(time) for time in frame_times(CASES / "n_anim.gif")], atol=0.001)
    assert lengths(decoded)[0] == pytest.approx(2.01, abs=0.005)


def test_a_variable_rate_keeps_flash_and_beep_together(tmp_path: Path) -> None:
    copy = copied(CASES / "fb_vfr.mp4", tmp_path / "copy.mp4")
    assert (flash(copy), beep(copy)) == (pytest.approx(4, abs=0.01), pytest.approx(4, abs=0.01))
    decoded, said = through_the_vae(tmp_path, CASES / "fb_vfr.mp4")
    times = [time for time, _ in shown(decoded)]
    np.testing.assert_allclose(times, [float(time) for time in frame_times(CASES / "fb_vfr.mp4")], atol=0.001)
    assert beep(decoded) == pytest.approx(4, abs=0.01)
    assert lengths(decoded) == (pytest.approx(6, abs=0.01), pytest.approx(6, abs=0.05))
    assert "has a varying frame rate; every frame keeps its time" in said


def test_a_stream_cut_inside_a_group_of_pictures_keeps_its_sound(tmp_path: Path) -> None:
    copy = copied(CASES / "fb_cut.ts", tmp_path / "copy.mp4")
    assert (flash(copy), beep(copy)) == (pytest.approx(1, abs=0.01), pytest.approx(1, abs=0.01))
    decoded, said = through_the_vae(tmp_path, CASES / "fb_cut.ts")
    assert len(shown(decoded)) == 36
    assert beep(decoded) == pytest.approx(1, abs=0.01)
    assert lengths(decoded) == (pytest.approx(3, abs=0.01), pytest.approx(3, abs=0.05))
    assert "its first 27 frames cannot be decoded, and it is used from 4.567 s" in said


def test_joined_streams_play_one_after_another(tmp_path: Path) -> None:
    levels = read_all(CASES / "disc.ts").mean((0, 1, 3, 4))
    torch.testing.assert_close(levels[:48], levels[48:])  # both are the same two seconds
    copy = copied(CASES / "disc.ts", tmp_path / "copy.mp4")
    assert len(shown(copy)) == 96
    assert lengths(copy) == (pytest.approx(4, abs=0.01), pytest.approx(4, abs=0.05))
    assert beep(copy) == pytest.approx(0.5, abs=0.01)
    _, said = through_the_vae(tmp_path, CASES / "disc.ts")
    assert "time stamps that start again once: its sections are joined one after another" in said


def test_the_usable_range_of_a_damaged_film_works(tmp_path: Path) -> None:
    damaged = CASES / "corrupt_long.mp4"
    refused = run("encode", damaged, "-o", tmp_path / "a.latent.safetensors")
    assert refused.exit_code == 2
    assert len(refused.stderr.strip().splitlines()) == 1
    assert "is damaged from frame 25 on (invalid data found" in refused.stderr
    assert "of frames 0 to 47, 2 are missing and 21 have errors in them" in refused.stderr
    found = re.search(r"\((--start \d+ --frames \d+)\)", refused.stderr)
    assert found is not None
    used = run("encode", damaged, "-o", tmp_path / "a.latent.safetensors", *found[1].split())
    assert used.exit_code == 0, used.output
    assert open_latent(tmp_path / "a.latent.safetensors").meta.frames == 25
    assert not list(tmp_path.glob(".*"))


def test_damage_is_skipped_and_times_stay(tmp_path: Path) -> None:
    damaged = CASES / "corrupt_long.mp4"
    frames = read_all(damaged, skip_damage=True)
    assert frames.shape[2] == 48
    assert torch.equal(frames[:, :, 29], frames[:, :, 28])
    assert torch.equal(frames[:, :, 42], frames[:, :, 41])
    copy = copied(damaged, tmp_path / "copy.mp4", skip_damage=True)
    assert lengths(copy) == (pytest.approx(2, abs=0.01), pytest.approx(2, abs=0.05))
    decoded, said = through_the_vae(tmp_path, damaged, "--skip-damage")
    assert len(shown(decoded)) == 48
    assert "2 frames are missing, and the one before stands in" in said
    with pytest.raises(VideoError, match="With --skip-damage"):
        read_all(damaged)


def test_a_cut_tail_comes_through_and_is_said(tmp_path: Path) -> None:
    decoded, said = through_the_vae(tmp_path, CASES / "cut_tail.mp4")
    assert len(shown(decoded)) == 36
    assert "is cut short: 12 frames at its end are missing" in said


def test_the_shape_of_pixels_is_kept(tmp_path: Path) -> None:
    decoded, _ = through_the_vae(tmp_path, CASES / "sar.mp4")
    assert probe(decoded).aspect == 2
    with av.open(str(decoded)) as file:
        assert file.streams.video[0].sample_aspect_ratio == 2


def test_white_of_10_bits_is_white_both_ways(tmp_path: Path) -> None:
    frame = read_all(CASES / "white10.mkv")
    torch.testing.assert_close(frame, torch.ones_like(frame), atol=1e-6, rtol=0)
    clip = open_clip(CASES / "white10.mkv")
    with clip.writer(tmp_path / "back.mkv", Form(codec="h264", bits=10, crf=0)) as writer:
        for chunk in clip.read():
            writer.write(chunk)
    with av.open(str(tmp_path / "back.mkv")) as file:
        plane = next(file.decode(video=0)).planes[0]
        assert set(np.frombuffer(plane, np.uint16).reshape(64, -1)[:, :64].ravel().tolist()) == {940}
