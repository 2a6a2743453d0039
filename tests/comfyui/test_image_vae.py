"""The image VAE of Stable Diffusion through our nodes, frame by frame: what video VAEs get, it gets too."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from .calls import LOAD_LATENT, LOAD_VAE, SAVE_LATENT, SAVE_VIDEO, decode, decode_to_video, encode, play, saved_path
from .conftest import LoadVAE
from .inprocess import Comfy
from .weights import SMALL, picture

CONFIG = {
    "double_z": True, "resolution": 64, "in_channels": 3, "out_ch": 3, "attn_resolutions": [], "dropout": 0.0,
    "ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1,
}  # fmt: skip


@pytest.fixture
def stock(comfy: Comfy, models: Path) -> Callable[[str], Any]:
    """A function: the VAE that ComfyUI makes of one of our small files."""

    def load(name: str) -> Any:
        from safetensors.torch import load_file

        state = load_file(models / SMALL[name])
        channels = state["decoder.conv_in.weight"].shape[1]
        params: dict[str, Any] = {"ddconfig": {**CONFIG, "z_channels": channels}, "embed_dim": channels}
        return comfy.module("comfy.sd").VAE(sd=state, config={"params": params}, dtype=torch.float32)

    return load


def test_it_gives_what_comfyuis_own_vae_gives(comfy: Comfy, load_vae: LoadVAE, stock: Callable[[str], Any]) -> None:
    ours, theirs, images = load_vae(SMALL["image"]), stock("image"), picture(3, 40, 56)
    (latent,) = comfy.call("VAEEncode", pixels=images, vae=ours)
    (expected,) = comfy.call("VAEEncode", pixels=images, vae=theirs)
    assert latent["samples"].shape == (3, 4, 5, 7)
    torch.testing.assert_close(latent["samples"], expected["samples"], atol=1e-4, rtol=1e-4)
    (decoded,) = comfy.call("VAEDecode", samples=latent, vae=ours)
    (expected_images,) = comfy.call("VAEDecode", samples=latent, vae=theirs)
    torch.testing.assert_close(decoded, expected_images, atol=1e-4, rtol=0)


def test_the_loader_offers_demo_weights_of_every_family(comfy: Comfy) -> None:
    schema = comfy.nodes["CVIV_LoadVideoVAE"].define_schema()
    options = next(one for one in schema.inputs if one.id == "vae_name").options
    assert options[:3] == ["demo-cv-vae", "demo-iv-vae", "demo-image-vae"]


def test_info(comfy: Comfy, load_vae: LoadVAE) -> None:
    (text,) = comfy.call("CVIV_VideoVAEInfo", vae=load_vae("demo-image-vae"))
    for fact in ("family           image-vae\n", "1x in time, 8x8 in space", "clip as frame batch", "0.18215"):
        assert fact in text


def test_every_frame_is_by_itself(comfy: Comfy, load_vae: LoadVAE) -> None:
    """A clip gives what its frames give one by one; its length and rate stay with the latent."""
    vae, images = load_vae("demo-image-vae"), picture(5, 30, 50)
    latent, _ = encode(comfy, vae, images, fps=12.0)
    assert latent["samples"].shape == (5, 4, 4, 7)
    assert latent["cviv"] == {
        "family": "image-vae", "fps": "12", "frames": 5, "height": 30, "width": 50, "layout": "frames",
    }  # fmt: skip
    alone, _ = encode(comfy, vae, images[3:4])
    torch.testing.assert_close(latent["samples"][3:4], alone["samples"], atol=1e-5, rtol=1e-5)
    decoded, fps, report = decode(comfy, vae, latent)
    assert (decoded.shape, fps) == ((5, 30, 50, 3), 12.0)
    assert "image-vae, float32" in report
    one, _, _ = decode(comfy, vae, alone)
    torch.testing.assert_close(decoded[3:4], one, atol=1e-5, rtol=0)


def test_a_small_budget_gives_the_same_picture(comfy: Comfy, load_vae: LoadVAE) -> None:
    vae = load_vae("demo-image-vae")
    latent, report = encode(comfy, vae, picture(2, 96, 128))
    tiled, small = encode(
        comfy, vae, picture(2, 96, 128), memory_budget_gb=0.8 * vae.codec.encode_bytes(96, 128) / 2**30
    )
    assert "Whole frames" in report
    assert "Exact " in small
    torch.testing.assert_close(tiled["samples"], latent["samples"], atol=1e-4, rtol=1e-4)
    whole, _, _ = decode(comfy, vae, latent)
    budget = 0.8 * vae.codec.decode_bytes(12, 16) / 2**30
    cut, _, report = decode(comfy, vae, latent, memory_budget_gb=budget)
    assert "Exact " in report
    torch.testing.assert_close(cut, whole, atol=1e-4, rtol=0)


def test_the_video_is_decoded_while_it_is_saved(comfy: Comfy, load_vae: LoadVAE) -> None:
    vae = load_vae("demo-image-vae")
    latent, _ = encode(comfy, vae, picture(7, 34, 50), fps=10.0)
    video = decode_to_video(comfy, vae, latent, crf=0)
    assert comfy.progress == []
    assert (video.get_frame_count(), video.get_dimensions(), video.get_frame_rate()) == (7, (50, 34), 10)
    trimmed = video.as_trimmed(0.2, 0.3)
    assert trimmed is not None
    images, _, _ = decode(comfy, vae, latent)
    torch.testing.assert_close(trimmed.get_components().images, images[2:5])
    comfy.call("SaveVideo", video=video, filename_prefix="image_vae", **SAVE_VIDEO)
    found = play(saved_path(comfy.base, next(ui for ui in comfy.ui.values() if "images" in ui)))
    assert (found["frames"].shape, found["fps"]) == ((7, 34, 50, 3), 10)
    assert (torch.from_numpy(found["frames"]) / 255 - images).abs().mean() < 0.05


def test_plan(comfy: Comfy, load_vae: LoadVAE) -> None:
    told = {"frames": 25, "width": 1024, "height": 576}
    for direction in ("decode", "encode"):
        picture_of, report = comfy.call(
            "CVIV_Plan", vae=load_vae("demo-image-vae"), direction=direction, memory_budget_gb=0.05, **told
        )
        assert picture_of.shape[-1] == 3
        head, loaded, *words = report.splitlines()
        assert head == f"{direction} 25 frames 1024x576: exact"
        assert loaded.startswith("image-vae, float32 on ")
        assert "; 25 chunks in time" in words[0]


@pytest.mark.parametrize("layout", ["auto", "separate images"])
def test_round_trip_and_compare(comfy: Comfy, load_vae: LoadVAE, layout: str) -> None:
    original = comfy.call("CVIV_DemoClip")[0].get_components().images[:3]
    vae = load_vae("demo-image-vae", layout)
    images, _, table, report = comfy.call(
        "CVIV_RoundTrip",
        vae=vae,
        video=original,
        frame_count=0,
        memory_budget_gb=0.9 * vae.codec.decode_bytes(24, 40) / 2**30,
    )
    assert images.shape == original.shape
    assert (images - original).abs().mean() < 0.1
    assert "decoding: 3 frames" in report
    assert "Exact strips" in report
    assert "| tiles" not in table  # each step has strips of its own
    assert "| chunks in time" not in table  # no two chunks share a frame
    told = {"label_a": "a", "label_b": "b", "frames": "must match", "fps": 0.0}
    _, compared = comfy.call("CVIV_Compare", video_a=original, video_b=images, player_side=64, player_frames=3, **told)
    figures = next(line for line in table.splitlines() if line.startswith("| PSNR"))
    assert figures.split("|")[2] in compared


def test_latent_files_and_joining(comfy: Comfy, load_vae: LoadVAE) -> None:
    vae = load_vae(SMALL["image"])
    latent, _ = encode(comfy, vae, picture(4, 20, 28), fps=8.0)
    _, path = comfy.call("CVIV_SaveVideoLatent", samples=latent, **SAVE_LATENT)
    label = Path(path).relative_to(comfy.base).as_posix()
    back, fps, info = comfy.call("CVIV_LoadVideoLatent", file=label, **LOAD_LATENT)
    assert torch.equal(back["samples"], latent["samples"])
    assert (back["cviv"], fps) == (latent["cviv"], 8.0)
    assert "decodes   to 4 frames of 28x20" in info
    joined, report = comfy.call("CVIV_JoinLatents", latent_1=back, latent_2=latent, crossfade=0)
    assert joined["samples"].shape == (8, 4, 3, 4)
    assert "8 frames" in report
    images, _, _ = decode(comfy, vae, joined)
    assert images.shape == (8, 20, 28, 3)
    (five,) = comfy.call("CVIV_LatentLayout", samples=latent, layout="video 5-D", clips=1)
    assert five["samples"].shape == (1, 4, 4, 3, 4)


def test_latents_go_from_one_decoder_into_the_other(comfy: Comfy, load_vae: LoadVAE) -> None:
    """Both demo VAEs share a latent space, as CV-VAE does with Stable Diffusion; a clip lasts as long either way."""
    video_vae, image_vae = load_vae("demo-cv-vae"), load_vae("demo-image-vae")
    clip = comfy.call("CVIV_DemoClip")[0].get_components().images[:9, 64:128, 100:180]
    latent, _ = encode(comfy, video_vae, clip, fps=24.0)
    images, fps, report = decode(comfy, image_vae, latent)
    assert (images.shape, fps) == ((3, 64, 80, 3), 6.0)
    assert "the latent was made by cv-vae; image-vae makes 1 frame(s) of each latent" in report
    assert (images[0] - clip[0]).abs().mean() < 0.1
    back, _ = encode(comfy, image_vae, clip[::4], fps=6.0)
    frames, fps, _ = decode(comfy, video_vae, back)
    assert (frames.shape, fps) == ((9, 64, 80, 3), 24.0)
    assert (frames[0] - clip[0]).abs().mean() < 0.1


def test_keyframe_detail_takes_its_pictures(comfy: Comfy, load_vae: LoadVAE) -> None:
    pytest.importorskip("cv2")
    clip = comfy.call("CVIV_DemoClip")[0].get_components().images[:9, 64:128, 100:180]
    latent, _ = encode(comfy, load_vae("demo-cv-vae"), clip)
    frames, _, _ = decode(comfy, load_vae("demo-cv-vae"), latent)
    keyframes, _, _ = decode(comfy, load_vae("demo-image-vae"), latent)
    told = {"strength": 1.0, "detail_radius": 3.0, "confidence": 0.5}
    images, report = comfy.call("CVIV_DetailFusion", frames=frames, keyframes=keyframes, **told)
    assert images.shape == frames.shape
    assert "detail of 3 keyframes" in report or "nothing was added" in report  # demo pictures are hardly sharper
    assert "hardly look like" not in report


def test_an_encoder_alone(comfy: Comfy, models: Path) -> None:
    """As SVD's VAE has one; its decoder is of another kind."""
    from safetensors.torch import load_file, save_file

    state = {
        name: tensor
        for name, tensor in load_file(models / SMALL["image"]).items()
        if not name.startswith(("decoder.", "post_quant_conv."))
    }
    save_file(state, models / "half.safetensors")
    try:
        (vae,) = comfy.call("CVIV_LoadVideoVAE", vae_name="half.safetensors", **LOAD_VAE)
        (text,) = comfy.call("CVIV_VideoVAEInfo", vae=vae)
        latent, _ = encode(comfy, vae, picture(2, 16, 16))
    finally:
        (models / "half.safetensors").unlink()
    assert "image-vae (can only encode)" in text
    assert latent["samples"].shape == (2, 4, 2, 2)
    with pytest.raises(Exception, match="have no decoder, so they cannot decode"):
        decode(comfy, vae, latent, save_latent_on_failure=False)


def test_svd_takes_it_for_its_image(comfy: Comfy, load_vae: LoadVAE, tmp_path: Path) -> None:
    from .svd_model import small_clip_vision

    told: dict[str, Any] = {"width": 64, "height": 48, "frames": 9, "fps": 24.0, "motion_bucket_id": 127}
    positive, _, latent, _ = comfy.call(
        "CVIV_SVDConditioning",
        clip_vision=small_clip_vision(comfy, tmp_path),
        image=picture(1, 48, 64),
        image_vae=load_vae(SMALL["image"]),
        augmentation_level=0.0,
        augmentation_seed=0,
        **told,
    )
    assert positive[0][1]["concat_latent_image"].shape == (1, 4, 6, 8)
    assert Fraction(latent["cviv"]["fps"]) == 24
