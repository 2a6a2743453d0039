"""Files that people have, through the nodes: times, sound, pixel shape, damage and what is lost."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from .calls import ENCODE_PART, LOAD_LATENT, SAVE_LATENT, decode_to_video
from .conftest import LoadVAE
from .inprocess import Comfy, NodeError

CASES = Path(__file__).parents[1] / "cases"


def _video(comfy: Comfy, path: Path) -> Any:
    return comfy.module("comfy_api.latest").InputImpl.VideoFromFile(str(path))


def _source(comfy: Comfy, path: Path, **choice: bool) -> Any:
    return comfy.pack("nodes.bridge.video_source").open_video(_video(comfy, path), **choice)


def _encode(comfy: Comfy, vae: Any, path: Path, **changes: Any) -> tuple[dict[str, Any], float, Any, str]:
    """(latent, fps, audio, report) of Video VAE Encode."""
    choices = {**ENCODE_PART, "preview": False, **changes}
    latent, report, fps, audio = comfy.call("CVIV_Encode", vae=vae, images=_video(comfy, path), **choices)
    return latent, fps, audio, report


def _read(source: Any) -> torch.Tensor:
    return torch.cat(list(source.frames()), dim=2)[0]  # c t h w


def _flash_and_beep(source: Any) -> tuple[float, float]:
    """Seconds at which the picture turns bright and the sound loud."""
    levels = _read(source).mean((0, 2, 3))
    bright = int(torch.nonzero(levels > (levels.min() + levels.max()) / 2)[0])
    audio = source.audio()
    wave = audio["waveform"][0].abs().amax(0)
    return bright / float(source.fps), int(torch.nonzero(wave > 0.3 * wave.max())[0]) / audio["sample_rate"]


@pytest.mark.parametrize(("name", "at"), [("fb_vfr.mp4", 4.0), ("fb_cut.ts", 1.0)])
def test_flash_and_beep_are_together(comfy: Comfy, name: str, at: float) -> None:
    source = _source(comfy, CASES / name)
    flash, beep = _flash_and_beep(source)
    assert abs(flash - beep) <= 1 / float(source.fps)
    assert beep == pytest.approx(at, abs=0.01)
    assert flash == pytest.approx(at, abs=1 / float(source.fps))
    audio = source.audio()
    assert audio["waveform"].shape[-1] / audio["sample_rate"] == pytest.approx(
        float(source.total / source.fps), abs=0.06
    )


def test_a_variable_rate_says_what_was_dropped_and_repeated(comfy: Comfy, load_vae: LoadVAE) -> None:
    latent, fps, _, report = _encode(comfy, load_vae("demo-cv-vae"), CASES / "fb_vfr.mp4")
    assert fps == 12
    assert latent["cviv"]["frames"] == 72  # six seconds
    assert "of its frames 0 are dropped and 18 shown again at 12 per second, so that sound stays in time" in report


@pytest.mark.parametrize(("first", "count"), [(0, 10), (40, 20), (65, 0)])
def test_a_part_of_a_variable_rate_is_that_of_the_whole(comfy: Comfy, first: int, count: int) -> None:
    source = _source(comfy, CASES / "fb_vfr.mp4")
    whole = torch.cat(list(source.frames()), dim=2)
    part = torch.cat(list(_source(comfy, CASES / "fb_vfr.mp4").frames(first, count or None)), dim=2)
    assert torch.equal(part, whole[:, :, first : first + count if count else None])


def test_joined_streams_are_four_seconds(comfy: Comfy) -> None:
    source = _source(comfy, CASES / "disc.ts")
    assert (source.total, source.fps) == (96, 24)
    levels = _read(source).mean((0, 2, 3))
    torch.testing.assert_close(levels[:48], levels[48:])
    audio = source.audio()
    assert audio["waveform"].shape[-1] / audio["sample_rate"] == pytest.approx(4, abs=0.2)
    assert "time stamps that start again once" in " ".join(source.told())


@pytest.mark.parametrize(("name", "frames", "seconds"), [("n_anim.gif", 24, 2.01), ("a.webp", 24, 1.0)])
def test_animations_keep_their_length(comfy: Comfy, name: str, frames: int, seconds: float) -> None:
    source = _source(comfy, CASES / name)
    assert source.total == frames
    assert float(source.total / source.fps) == pytest.approx(seconds, abs=0.005)
    assert _read(source).shape[1] == frames


@pytest.mark.parametrize("name", ["icc.png", "exif_plain.jpg"])
def test_pictures_with_side_data_are_read(comfy: Comfy, load_vae: LoadVAE, name: str) -> None:
    assert _read(_source(comfy, CASES / name)).shape == (3, 1, 96, 160)
    latent, *_ = _encode(comfy, load_vae("small_cv.safetensors"), CASES / name)
    assert latent["cviv"]["frames"] == 1


def test_damage_is_an_error_with_a_range_or_skipped(comfy: Comfy, load_vae: LoadVAE) -> None:
    vae = load_vae("small_cv.safetensors")
    with pytest.raises(NodeError, match=r"frames 0 to 24 can be used.*skip_damage on a node"):
        _encode(comfy, vae, CASES / "corrupt_long.mp4")
    latent, _, audio, _ = _encode(comfy, vae, CASES / "corrupt_long.mp4", frame_count=25)
    assert latent["cviv"]["frames"] == 25
    latent, _, audio, report = _encode(comfy, vae, CASES / "corrupt_long.mp4", skip_damage=True)
    assert latent["cviv"]["frames"] == 48
    assert audio["waveform"].shape[-1] / audio["sample_rate"] == pytest.approx(2, abs=0.05)
    assert "corrupt_long.mp4 is damaged: 2 frames are missing, and the one before stands in" in report


def test_a_cut_tail_is_said(comfy: Comfy, load_vae: LoadVAE) -> None:
    latent, _, _, report = _encode(comfy, load_vae("small_cv.safetensors"), CASES / "cut_tail.mp4")
    assert latent["cviv"]["frames"] == 36
    assert "cut_tail.mp4 is cut short: 12 frames at its end are missing" in report


def test_the_shape_of_pixels_goes_through(comfy: Comfy, load_vae: LoadVAE, tmp_path: Path) -> None:
    vae = load_vae("small_cv.safetensors")
    latent, *_ = _encode(comfy, vae, CASES / "sar.mp4")
    video = decode_to_video(comfy, vae, latent)
    video.save_to(str(tmp_path / "sar.mp4"))
    with av.open(str(tmp_path / "sar.mp4")) as file:
        assert file.streams.video[0].sample_aspect_ratio == 2
    part = video.as_trimmed(0, 0.5)
    assert part.get_pixel_aspect() == Fraction(2)
    assert comfy.pack("nodes.bridge.video_source").open_video(part).aspect == 2
    saved, path = comfy.call("CVIV_SaveVideoLatent", samples=latent, **SAVE_LATENT)
    name = Path(path).relative_to(comfy.base).as_posix()
    loaded, _, _ = comfy.call("CVIV_LoadVideoLatent", file=name, **LOAD_LATENT)
    joined, _ = comfy.call("CVIV_JoinLatents", latent_1=loaded, latent_2=loaded, crossfade=0)
    for one in (saved, loaded, joined):
        assert decode_to_video(comfy, vae, one).get_pixel_aspect() == 2


def test_values_of_10_bits_and_of_comfyuis_own_files(comfy: Comfy, tmp_path: Path) -> None:
    assert torch.equal(_read(_source(comfy, CASES / "white10.mkv")), torch.ones(3, 1, 64, 64))
    api = comfy.module("comfy_api.latest")
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.8, 0.2, 0.4]])
    images = colours.repeat_interleave(320, 0).view(1, 1, 1280, 3).expand(4, 720, -1, -1)
    video = api.InputImpl.VideoFromComponents(api.Types.VideoComponents(images=images, frame_rate=Fraction(24)))
    video.save_to(str(tmp_path / "own.mp4"), metadata={"prompt": {"1": {}}})
    again = _read(_source(comfy, tmp_path / "own.mp4"))[:, 0].movedim(0, -1).add(1).div(2)
    middles = again[360, 160::320]
    np.testing.assert_allclose(middles.numpy() * 255, colours.numpy() * 255, atol=4)
