"""Our nodes in ComfyUI's executor: any length and size goes in and comes back out, with what was known of it."""

from __future__ import annotations

import copy
import json
import os
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from ..core.clips import as_pictures, moving_picture, with_sound, write_av
from .calls import (
    DECODE_TO_VIDEO,
    ENCODE_PART,
    LOAD_LATENT,
    LOAD_VAE,
    SAVE_LATENT,
    SAVE_VIDEO,
    decode,
    decode_to_video,
    encode,
    play,
    saved_path,
    tone,
    video_of,
)
from .conftest import LoadVAE
from .inprocess import Comfy
from .weights import SMALL, picture

SMALL_LAYOUTS = [
    (SMALL["cv"], "clip as frame batch"),
    (SMALL["cv"], "video 5-D"),
    (SMALL["cv"], "separate images"),
    (SMALL["sd3"], "clip as frame batch"),
    (SMALL["iv"], "video 5-D"),
    (SMALL["iv"], "separate images"),
    (SMALL["image"], "clip as frame batch"),
    (SMALL["image"], "video 5-D"),
    (SMALL["image"], "separate images"),
    (SMALL["image16"], "clip as frame batch"),
]


@pytest.fixture(params=SMALL_LAYOUTS, ids=", ".join)
def small(request: pytest.FixtureRequest, load_vae: LoadVAE) -> Any:
    """A small VAE in each layout."""
    return load_vae(*request.param)


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 16, 16), (6, 30, 50), (18, 17, 33)])
def test_any_length_and_size_comes_back(comfy: Comfy, small: Any, frames: int, height: int, width: int) -> None:
    latent, report = encode(comfy, small, picture(frames, height, width), fps=12.5)
    assert latent["cviv"] == {
        "family": small.codec.family,
        "fps": "25/2",
        "frames": frames,
        "height": height,
        "width": width,
        "layout": small.layout,
    }
    assert report.startswith(f"{frames} frame{'s' * (frames > 1)} {width}x{height}, ")
    images, fps, report = decode(comfy, small, latent)
    assert images.shape == (frames, height, width, 3)
    assert images.min() >= 0
    assert images.max() <= 1
    assert fps == 12.5
    assert report.startswith(f"{frames} frame{'s' * (frames > 1)} {width}x{height}, ")
    assert ", exact" in report.splitlines()[0]


@pytest.mark.parametrize(("height", "width"), [(71, 125), (570, 1000)])
def test_96_frames_come_back(comfy: Comfy, load_vae: LoadVAE, height: int, width: int) -> None:
    if height > 100 and not os.environ.get("CVIV_FULL_SIZE"):
        pytest.skip("takes many minutes without a GPU: set CVIV_FULL_SIZE=1 to run it")
    vae = load_vae(SMALL["cv"])
    latent, _ = encode(comfy, vae, torch.rand(96, height, 1, 3).expand(-1, -1, width, -1))
    assert latent["samples"].shape == (25, 4, -(-height // 8), -(-width // 8))
    images, _, _ = decode(comfy, vae, latent)
    assert images.shape == (96, height, width, 3)


def test_images_of_other_channels(comfy: Comfy, load_vae: LoadVAE) -> None:
    vae = load_vae(SMALL["cv"])
    colour = picture(5, 16, 24)
    plain, _ = encode(comfy, vae, colour)
    with_alpha, _ = encode(comfy, vae, torch.cat([colour, torch.rand(5, 16, 24, 1)], dim=-1))
    torch.testing.assert_close(with_alpha["samples"], plain["samples"])
    grey, _ = encode(comfy, vae, colour[..., :1])
    assert grey["samples"].shape == plain["samples"].shape


def test_sample_is_seeded(comfy: Comfy, load_vae: LoadVAE) -> None:
    vae, images = load_vae(SMALL["cv"]), picture(9, 24, 32)
    mean, _ = encode(comfy, vae, images)
    first, report = encode(comfy, vae, images, mode="sample", sample_seed=7)
    again, _ = encode(comfy, vae, images, mode="sample", sample_seed=7)
    other, _ = encode(comfy, vae, images, mode="sample", sample_seed=8)
    assert "seed 7" in report
    assert torch.equal(first["samples"], again["samples"])
    assert not torch.allclose(first["samples"], other["samples"])
    assert not torch.allclose(first["samples"], mean["samples"])


def test_a_video_is_encoded_as_its_frames(comfy: Comfy, load_vae: LoadVAE) -> None:
    vae, images = load_vae(SMALL["iv"]), picture(10, 24, 32)
    video = video_of(comfy, images, Fraction(24000, 1001))
    plain, _ = encode(comfy, vae, images)
    latent, _ = encode(comfy, vae, video)
    torch.testing.assert_close(latent["samples"], plain["samples"])
    assert latent["cviv"]["fps"] == "24000/1001"
    named, _ = encode(comfy, vae, video, fps=10.0)
    assert named["cviv"]["fps"] == "10"


def test_encode_video_reads_a_part_of_a_file(comfy: Comfy, load_vae: LoadVAE) -> None:
    vae = load_vae(SMALL["cv"])
    write_av(comfy.base / "input" / "clip.mp4", as_pictures(moving_picture(20, 32, 48)), rate=Fraction(10))
    (video,) = comfy.call("LoadVideo", file="clip.mp4")
    images = video.get_components().images
    latent, report, fps, audio = comfy.call("CVIV_Encode", vae=vae, images=video, **ENCODE_PART)
    assert latent["cviv"]["frames"] == 20
    assert (fps, audio) == (10.0, None)
    assert report.startswith("20 frames 48x32, ")
    whole, _ = encode(comfy, vae, images)
    # readers turn the file's colours into RGB in slightly different ways
    backwards, _ = encode(comfy, vae, images.flip(0))
    off, far = ((one["samples"] - latent["samples"]).abs().mean() for one in (whole, backwards))
    assert off < 0.5 * far

    part = {**ENCODE_PART, "first_frame": 6, "frame_count": 5}
    latent, *_ = comfy.call("CVIV_Encode", vae=vae, images=video, **part)
    assert latent["cviv"]["frames"] == 5
    cut, _ = encode(comfy, vae, images[6:11])
    shifted, _ = encode(comfy, vae, images[7:12])
    assert (cut["samples"] - latent["samples"]).abs().mean() < (shifted["samples"] - latent["samples"]).abs().mean()


def test_encode_video_gives_the_sound_of_the_part(comfy: Comfy, load_vae: LoadVAE) -> None:
    with_sound(comfy.base / "input" / "tone.mp4", 25)
    (video,) = comfy.call("LoadVideo", file="tone.mp4")
    part = {**ENCODE_PART, "first_frame": 5, "frame_count": 10}
    _, _, fps, audio = comfy.call("CVIV_Encode", vae=load_vae(SMALL["iv"]), images=video, **part)
    assert fps == 25.0
    assert audio["waveform"].shape[-1] / audio["sample_rate"] == pytest.approx(10 / 25, abs=0.01)
    assert audio["waveform"].abs().max() > 0.1


def test_strips_and_tiles_give_whole_frames(comfy: Comfy, load_vae: LoadVAE) -> None:
    """Less than whole frames need makes strips or tiles; both are exact."""
    for name in ("cv", "iv", "image"):
        vae = load_vae(SMALL[name])
        latent, _ = encode(comfy, vae, picture(5, 64, 96))
        plain, _, report = decode(comfy, vae, latent)
        budget = 0.93 * vae.codec.decode_bytes(8, 12, frames=5) / 2**30
        tiled, _, tiled_report = decode(comfy, vae, latent, memory_budget_gb=budget)
        assert "Whole frames" in report
        assert re.search(r"^Exact (strips|tiles) of .*[ ,]([2-9]|\d\d+) per chunk", tiled_report, re.MULTILINE)
        torch.testing.assert_close(tiled, plain, atol=1e-3, rtol=0)


def test_decode_shows_progress_and_the_newest_frame(
    comfy: Comfy, load_vae: LoadVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    # newer ComfyUI leaves out reports that follow closely
    monkeypatch.setattr(comfy.module("comfy.utils"), "PROGRESS_THROTTLE_MIN_INTERVAL", 0, raising=False)
    vae = load_vae(SMALL["cv"])
    latent, _ = encode(comfy, vae, picture(49, 24, 32))
    decode(comfy, vae, latent, preview=True)
    assert [(report.value, report.total) for report in comfy.progress] == [(17, 49), (33, 49), (49, 49)]
    form, shown, side = comfy.progress[-1].preview
    assert form == "JPEG"
    assert shown.size == (32, 24)
    assert side == 32  # a larger number would enlarge the picture
    assert {report.node_id for report in comfy.progress} == {"1"}
    decode(comfy, vae, latent, preview=False)
    assert all(report.preview is None for report in comfy.progress)


def test_latent_layout_there_and_back(comfy: Comfy, load_vae: LoadVAE) -> None:
    vae = load_vae(SMALL["cv"], "clip as frame batch")
    latent, _ = encode(comfy, vae, picture(10, 20, 28), fps=8.0)
    (video,) = comfy.call("CVIV_LatentLayout", samples=latent, layout="video 5-D", clips=1)
    assert video["samples"].shape == (1, 4, 4, 3, 4)
    assert video["cviv"] == {**latent["cviv"], "layout": "video"}
    (back,) = comfy.call("CVIV_LatentLayout", samples=video, layout="clip as frame batch", clips=1)
    assert torch.equal(back["samples"], latent["samples"])
    assert back["cviv"] == latent["cviv"]
    one, _, _ = decode(comfy, vae, latent)
    other, _, _ = decode(comfy, vae, video)
    torch.testing.assert_close(one, other)

    (pair,) = comfy.call("CVIV_LatentLayout", samples={"samples": torch.randn(6, 4, 3, 4)}, layout="video 5-D", clips=2)
    assert pair["samples"].shape == (2, 4, 3, 3, 4)


def test_info_says_what_is_loaded(comfy: Comfy, load_vae: LoadVAE) -> None:
    (text,) = comfy.call("CVIV_VideoVAEInfo", vae=load_vae(SMALL["sd3"]))
    for fact in ("cv-vae-sd3", "latent channels  16", "float32", "video 5-D", "1.5305"):
        assert fact in text
    assert list(comfy.ui["1"]["text"]) == [text]


def test_a_cv_vae_of_16_channels_is_none_of_stable_diffusion_1(comfy: Comfy, load_vae: LoadVAE) -> None:
    """As `inflate` makes one of an image VAE of 16 channels."""
    (text,) = comfy.call("CVIV_VideoVAEInfo", vae=load_vae(SMALL["cv16"]))
    for fact in ("family           cv-vae\n", "latent channels  16", "video 5-D", "1.5305 * (latent -0.0609)"):
        assert fact in text


def test_save_and_load_video_latent(comfy: Comfy, load_vae: LoadVAE) -> None:
    vae = load_vae(SMALL["iv"])
    latent, _ = encode(comfy, vae, picture(18, 20, 28), fps=8.0)
    passed, path = comfy.call("CVIV_SaveVideoLatent", samples=latent, **SAVE_LATENT)
    assert torch.equal(passed["samples"], latent["samples"])
    file = _choice(comfy, path)
    back, fps, info = comfy.call("CVIV_LoadVideoLatent", file=file, **LOAD_LATENT)
    assert torch.equal(back["samples"], latent["samples"])
    assert back["cviv"] == latent["cviv"]
    assert fps == 8.0
    assert "iv-vae" in info
    images, _, _ = decode(comfy, vae, back)
    assert images.shape == (18, 20, 28, 3)

    part, *_ = comfy.call("CVIV_LoadVideoLatent", file=file, **{**LOAD_LATENT, "first_latent": 1, "latent_count": 2})
    assert torch.equal(part["samples"], latent["samples"][:, :, 1:3])
    _, second = comfy.call("CVIV_SaveVideoLatent", samples=latent, **SAVE_LATENT)
    assert second != path


def test_demo_clip(comfy: Comfy) -> None:
    (video,) = comfy.call("CVIV_DemoClip")
    parts = video.get_components()
    assert parts.images.shape == (49, 192, 320, 3)
    assert parts.frame_rate == 24


def test_decode_to_video_decodes_nothing_yet(comfy: Comfy, load_vae: LoadVAE) -> None:
    vae = load_vae(SMALL["iv"])
    latent, _ = encode(comfy, vae, picture(6, 18, 26), fps=10.0)
    video = decode_to_video(comfy, vae, latent, audio=tone(0.6))
    assert comfy.progress == []
    assert video.get_dimensions() == (26, 18)
    assert video.get_duration() == pytest.approx(0.6)
    parts = video.get_components()
    images, _, _ = decode(comfy, vae, latent)
    torch.testing.assert_close(parts.images, images)
    assert parts.frame_rate == 10
    assert parts.audio["waveform"].shape == (1, 2, 19200)


def _choice(comfy: Comfy, path: str) -> str:
    """The entry of Load Video Latent's list that stands for a saved file."""
    schema = comfy.nodes["CVIV_LoadVideoLatent"].define_schema()
    options = next(one for one in schema.inputs if one.id == "file").options
    name = path.replace("\\", "/").rpartition("/")[2]
    (found,) = [option for option in options if name in option]
    return found


@pytest.mark.parametrize("name", ["cv", "iv", "image"])
def test_save_video_decodes_into_the_file(comfy: Comfy, load_vae: LoadVAE, name: str) -> None:
    """Latent, Video VAE Decode to Video, Save Video, in one graph: what a player then finds in the file."""
    vae = load_vae(SMALL[name])
    images = picture(6, 35, 51)
    latent, _ = encode(comfy, vae, images, fps=23.976)
    prompt: dict[str, Any] = {}
    inputs = {"vae": comfy.give(prompt, vae), "samples": comfy.give(prompt, latent), **DECODE_TO_VIDEO}
    prompt["decode"] = {
        "class_type": "CVIV_DecodeToVideo",
        "inputs": {**inputs, "crf": 0, "audio": comfy.give(prompt, tone(6 / 23.976))},
    }
    prompt["save"] = {
        "class_type": "SaveVideo",
        "inputs": {"video": ["decode", 0], "filename_prefix": f"video/{name}", **SAVE_VIDEO},
    }
    comfy.run(prompt, extra={"extra_pnginfo": {"workflow": {"nodes": []}}})
    found = play(saved_path(comfy.base, comfy.ui["save"]))
    assert found["frames"].shape == (6, 35, 51, 3)
    assert float(found["fps"]) == pytest.approx(23.976, abs=0.001)
    assert found["sound"] == pytest.approx(6 / 23.976, abs=0.1)
    assert found["loudest"] > 0.2
    assert json.loads(found["metadata"]["workflow"]) == {"nodes": []}
    assert json.loads(found["metadata"]["prompt"])["save"]["class_type"] == "SaveVideo"
    decoded, _, _ = decode(comfy, vae, latent)
    shown = torch.from_numpy(found["frames"]) / 255
    assert (shown - decoded).abs().mean() < 0.05  # colours share pixels in the file
    assert (shown.flip(0) - decoded).abs().mean() > (shown - decoded).abs().mean()


@pytest.mark.parametrize("name", ["cv", "iv", "image"])
@pytest.mark.parametrize("inference", [False, True])
def test_weights_that_are_changed_in_place_are_used(
    comfy: Comfy, load_vae: LoadVAE, models: Path, name: str, inference: bool
) -> None:
    """ComfyUI patches weights so; nothing made of the old ones may be left over."""
    from safetensors.torch import load_file

    told = {"vae_name": SMALL[name], **LOAD_VAE}
    (vae,) = comfy.call("CVIV_LoadVideoVAE", **told)
    latent, _ = encode(comfy, vae, picture(9, 40, 48))
    before, _, _ = decode(comfy, vae, latent)
    with torch.inference_mode(inference):
        for parameter in vae.codec.model.parameters():
            parameter.data.mul_(0.9)
    changed, _, _ = decode(comfy, vae, latent)
    (stock,) = comfy.call("VAEDecode", samples=latent, vae=vae)
    again, _ = encode(comfy, vae, picture(9, 40, 48))

    state = {key: tensor * 0.9 for key, tensor in load_file(models / SMALL[name]).items()}
    scaling = {"scale_factor": 1.3, "shift_factor": 0.1} if name == "iv" else {}
    fresh = comfy.pack("vae_core").load(state, **scaling)
    expected = fresh.decode(vae.video_latent(latent), frames=9, size=(40, 48)).add(1).div(2).clamp(0, 1)
    torch.testing.assert_close(changed, expected[0].movedim(0, -1), atol=1e-4, rtol=0)
    torch.testing.assert_close(stock[:9], changed, atol=1e-5, rtol=0)
    assert (changed - before).abs().mean() > 1e-3
    mean = fresh.encode(picture(9, 40, 48).movedim(-1, 0)[None] * 2 - 1, pad=True)
    torch.testing.assert_close(vae.video_latent(again), mean, atol=1e-4, rtol=1e-4)


def test_weights_that_comfyui_patches_are_used(comfy: Comfy, load_vae: LoadVAE) -> None:
    """By its own patcher on a clone, as LoRA loaders do; the VAE itself stays as it was."""
    (vae,) = comfy.call("CVIV_LoadVideoVAE", vae_name=SMALL["cv"], **LOAD_VAE)
    latent, _ = encode(comfy, vae, picture(5, 24, 32))
    before, _, _ = decode(comfy, vae, latent)
    other = copy.copy(vae)
    other.patcher = vae.patcher.clone()
    name = "model.decoder.conv_in.weight"
    change = torch.full(vae.first_stage_model.get_parameter(name).shape, 0.05)
    assert other.patcher.add_patches({name: ("diff", (change,))}) == [name]
    patched, _, _ = decode(comfy, other, latent)
    assert (patched - before).abs().mean() > 1e-3
    back, _, _ = decode(comfy, vae, latent)
    torch.testing.assert_close(back, before, atol=1e-6, rtol=0)


def test_a_run_of_many_passes_has_one_clock(comfy: Comfy) -> None:
    """Separate images are a pass each, and the report is of all of them."""
    running = comfy.pack("nodes.bridge.running")
    run = running.Run(2)
    run.begin(torch.device("cpu"))
    start = run._start
    run.begin(torch.device("cpu"))
    assert run._start == start
