"""SVD Image to Long Video: what the sampler is given, and that the decode gives exactly what was asked for."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .calls import decode
from .conftest import LoadVAE
from .inprocess import Comfy, NodeError
from .svd import small_svd
from .svd_model import ksampler, small_clip_vision, small_image_vae
from .weights import SMALL, picture

WIDGETS: dict[str, Any] = {
    "width": 64,
    "height": 48,
    "frames": 97,
    "fps": 24.0,
    "motion_bucket_id": 127,
    "augmentation_level": 0.0,
    "augmentation_seed": 0,
}


@pytest.fixture(scope="module")
def clip_vision(loaded: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("clip")
    return small_clip_vision(loaded, folder)


@pytest.fixture(scope="module")
def image_vae(loaded: Comfy) -> Any:
    return small_image_vae(loaded)


def condition(comfy: Comfy, clip_vision: Any, vae: Any, image: Tensor, **changes: Any) -> tuple[Any, Any, Any, str]:
    """(positive, negative, latent, report)"""
    widgets = {**WIDGETS, **changes}
    positive, negative, latent, report = comfy.call(
        "CVIV_SVDConditioning", clip_vision=clip_vision, image=image, image_vae=vae, **widgets
    )
    return positive, negative, latent, report


def stock(comfy: Comfy, clip_vision: Any, vae: Any, image: Tensor, **changes: Any) -> tuple[Any, Any, Any]:
    """What ComfyUI's own node gives for 25 latents at 6 per second."""
    widgets = {
        "width": 64, "height": 48, "video_frames": 25, "motion_bucket_id": 127, "fps": 6, "augmentation_level": 0.0,
    }  # fmt: skip
    positive, negative, latent = comfy.call(
        "SVD_img2vid_Conditioning", clip_vision=clip_vision, init_image=image, vae=vae, **{**widgets, **changes}
    )
    return positive, negative, latent


def check_same(ours: Any, theirs: Any) -> None:
    """Fail unless two CONDITIONINGs are the same bit for bit."""
    ((embeds, told),), ((their_embeds, their_told),) = ours, theirs
    assert torch.equal(embeds, their_embeds)
    assert told.keys() == their_told.keys()
    assert torch.equal(told.pop("concat_latent_image"), their_told.pop("concat_latent_image"))
    assert told == their_told


@pytest.mark.parametrize("size", [(48, 64), (30, 90), (200, 100)])
def test_like_the_stock_node(comfy: Comfy, clip_vision: Any, image_vae: Any, size: tuple[int, int]) -> None:
    image = picture(1, *size)
    positive, negative, latent, _ = condition(comfy, clip_vision, image_vae, image)
    theirs = stock(comfy, clip_vision, image_vae, image)
    check_same(positive, theirs[0])
    check_same(negative, theirs[1])
    assert torch.equal(latent["samples"], theirs[2]["samples"])


def test_noise_on_the_image(comfy: Comfy, clip_vision: Any, image_vae: Any) -> None:
    image = picture(1, 48, 64)
    level = {"augmentation_level": 0.2}
    positive, negative, _, _ = condition(comfy, clip_vision, image_vae, image, **level, augmentation_seed=5)
    again, _, _, _ = condition(comfy, clip_vision, image_vae, image, **level, augmentation_seed=5)
    other, _, _, _ = condition(comfy, clip_vision, image_vae, image, **level, augmentation_seed=6)
    assert torch.equal(again[0][1]["concat_latent_image"], positive[0][1]["concat_latent_image"])
    assert not torch.equal(other[0][1]["concat_latent_image"], positive[0][1]["concat_latent_image"])
    noise = torch.randn(1, 48, 64, 3, generator=torch.Generator().manual_seed(5))
    wanted = image_vae.encode(image + 0.2 * noise)
    assert (positive[0][1]["concat_latent_image"] - wanted).abs().max() < 1e-4
    assert positive[0][1]["augmentation_level"] == negative[0][1]["augmentation_level"] == 0.2


@pytest.mark.parametrize(
    ("frames", "fps", "latents", "rate"),
    [(97, 24.0, 25, 6), (53, 24.0, 14, 6), (96, 30.0, 25, 8), (1, 24.0, 1, 6), (98, 1.0, 26, 1), (193, 23.976, 49, 6)],
)
def test_frames_and_rate(
    comfy: Comfy, clip_vision: Any, image_vae: Any, frames: int, fps: float, latents: int, rate: int
) -> None:
    positive, negative, latent, report = condition(
        comfy, clip_vision, image_vae, picture(1, 48, 64), frames=frames, fps=fps
    )
    assert latent["samples"].shape == (latents, 4, 6, 8)
    assert not latent["samples"].any()
    assert positive[0][1]["fps"] == negative[0][1]["fps"] == rate
    assert latent["cviv"]["frames"] == frames
    assert Fraction(latent["cviv"]["fps"]) == Fraction(fps).limit_denominator(1001)
    assert f"{latents} latents" in report
    assert ("connect SVD Long Video" in report) == (latents > 25)
    assert ("which Video VAE Decode leaves out" in report) == (frames in (96, 98))


@pytest.mark.parametrize("layout", ["clip as frame batch", "video 5-D", "separate images"])
def test_our_vae_and_keyframes(comfy: Comfy, clip_vision: Any, load_vae: LoadVAE, layout: str) -> None:
    images = picture(9, 48, 64)[::4]
    vae = load_vae("demo-cv-vae", layout)
    positive, negative, latent, report = condition(comfy, clip_vision, vae, images)
    embeds, told = positive[0]
    assert latent["samples"].shape == (25, 4, 6, 8)
    assert embeds.shape == (25, 1, 1024)  # one for each latent, held like the images
    assert [int((embeds[i] != embeds[i + 1]).any()) for i in range(24)] == [int(i in (7, 16)) for i in range(24)]
    assert told["concat_latent_image"].shape == (3, 4, 6, 8)
    assert not negative[0][1]["concat_latent_image"].any()
    assert "3 images" in report
    for number in range(3):  # as pictures of their own, not as a clip
        alone, _, _, _ = condition(comfy, clip_vision, vae, images[number : number + 1])
        assert torch.equal(alone[0][1]["concat_latent_image"][0], told["concat_latent_image"][number])
        assert alone[0][0].shape == (1, 1, 1024)


def test_alpha_and_grey(comfy: Comfy, clip_vision: Any, image_vae: Any) -> None:
    image = picture(1, 48, 64)
    plain, _, _, _ = condition(comfy, clip_vision, image_vae, image, augmentation_level=0.1)
    alpha = torch.cat([image, torch.rand(1, 48, 64, 1)], dim=-1)
    seen, _, _, _ = condition(comfy, clip_vision, image_vae, alpha, augmentation_level=0.1)
    difference = plain[0][1]["concat_latent_image"] - seen[0][1]["concat_latent_image"]
    assert difference.abs().max() < 1e-4
    assert torch.equal(plain[0][0], seen[0][0])
    grey, _, _, _ = condition(comfy, clip_vision, image_vae, image[..., :1])
    assert torch.isfinite(grey[0][1]["concat_latent_image"]).all()


@pytest.mark.parametrize(("frames", "width", "height"), [(97, 64, 48), (94, 61, 43)])
def test_sampled_and_decoded(
    comfy: Comfy, clip_vision: Any, image_vae: Any, load_vae: LoadVAE, frames: int, width: int, height: int
) -> None:
    image = picture(1, 48, 64)
    changes = {"frames": frames, "width": width, "height": height}
    positive, negative, latent, report = condition(comfy, clip_vision, image_vae, image, **changes)
    assert positive[0][1]["concat_latent_image"].shape == (1, 4, 6, 8)
    widgets = {"seed": 1, "steps": 2, "cfg": 2.5, "sampler_name": "euler", "scheduler": "karras", "denoise": 1.0}
    (sampled,) = comfy.call(
        "KSampler", model=small_svd(comfy), positive=positive, negative=negative, latent_image=latent, **widgets
    )
    assert sampled["samples"].shape == (25, 4, 6, 8)
    images, fps, _ = decode(comfy, load_vae(SMALL["cv"]), sampled)
    assert images.shape == (frames, height, width, 3)
    assert fps == 24
    assert torch.isfinite(images).all()
    assert f"{frames} frames of {width}x{height}" in report


def test_long_video(comfy: Comfy, clip_vision: Any, image_vae: Any, load_vae: LoadVAE) -> None:
    positive, negative, latent, _ = condition(comfy, clip_vision, image_vae, picture(1, 48, 64), frames=193)
    long = {
        "mode": "continuation", "window_length": 25, "overlap": 6, "fuse": "pyramid", "carry": 4, "crossfade": 2,
        "anchor": "moving", "noise": "as given", "drift_control": 1.0, "time_offset": False, "min_cfg": 1.0,
    }  # fmt: skip
    model, _, report = comfy.call("CVIV_SVDLongVideo", model=small_svd(comfy), samples=latent, **long)
    assert "49 latents, 193 frames" in report
    samples = ksampler(comfy, model, (positive, negative), latent, steps=2)
    images, _, _ = decode(comfy, load_vae(SMALL["cv"]), {**latent, "samples": samples})
    assert images.shape == (193, 48, 64, 3)


def test_what_svd_does_not_know_is_said(comfy: Comfy, clip_vision: Any, image_vae: Any) -> None:
    image = picture(1, 48, 64)
    for changes, said in (
        ({"fps": 12.0}, "SVD was trained on 5 to 30 per second: choose an fps of 20 to 120"),
        ({"fps": 240.0}, "SVD was trained on 5 to 30 per second"),
        ({"motion_bucket_id": 300}, "motion_bucket_id 300 is above 255, the most that SVD was trained on"),
    ):
        _, _, _, report = condition(comfy, clip_vision, image_vae, image, **changes)
        assert said in report
    _, _, _, report = condition(comfy, clip_vision, image_vae, image, fps=24.0, motion_bucket_id=255)
    assert "trained on" not in report


def test_refusals(comfy: Comfy, clip_vision: Any, image_vae: Any, load_vae: LoadVAE) -> None:
    image = picture(1, 48, 64)
    with pytest.raises(NodeError, match=r"image VAE is iv-vae, whose latent space is not SVD's.*Image Only Checkpoint"):
        condition(comfy, clip_vision, load_vae("demo-iv-vae"), image)
    with pytest.raises(NodeError, match=r"image VAE is cv-vae-sd3"):
        condition(comfy, clip_vision, load_vae(SMALL["sd3"]), image)
    with pytest.raises(NodeError, match=r"no CLIP vision model.*Load CLIP Vision"):
        condition(comfy, None, image_vae, image)
