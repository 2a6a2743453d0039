"""ComfyUI's own nodes with our VAE: every one that takes a VAE or a LATENT, in every layout."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import LoadVAE
from .inprocess import Comfy
from .svd import small_svd
from .svd_model import small_clip_vision
from .weights import SMALL, picture

FRAMES, HEIGHT, WIDTH = 9, 48, 64
LATENTS = 3


@dataclass(frozen=True)
class Case:
    """A VAE with a latent layout, and the shape that the latent of 9 frames of 64x48 then has."""

    name: str
    layout: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}, {self.layout}"


CASES = [
    Case("demo-cv-vae", "clip as frame batch", (LATENTS, 4, 6, 8)),
    Case("demo-cv-vae", "video 5-D", (1, 4, LATENTS, 6, 8)),
    Case("demo-cv-vae", "separate images", (FRAMES, 4, 6, 8)),
    Case("demo-iv-vae", "video 5-D", (1, 16, LATENTS, 6, 8)),
    Case("demo-iv-vae", "separate images", (FRAMES, 16, 6, 8)),
    Case("demo-image-vae", "clip as frame batch", (FRAMES, 4, 6, 8)),
    Case("demo-image-vae", "video 5-D", (1, 4, FRAMES, 6, 8)),
    Case("demo-image-vae", "separate images", (FRAMES, 4, 6, 8)),
    Case(SMALL["sd3"], "video 5-D", (1, 16, LATENTS, 6, 8)),
]
TILED = {"tile_size": 64, "overlap": 0, "temporal_size": 8, "temporal_overlap": 4}


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def vae(case: Case, load_vae: LoadVAE) -> Any:
    return load_vae(case.name, case.layout)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return picture(FRAMES, HEIGHT, WIDTH)


def check_images(images: torch.Tensor, frames: int, height: int = HEIGHT, width: int = WIDTH) -> None:
    """Fail unless these are so many pictures in 0..1, with content."""
    assert images.shape == (frames, height, width, 3)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.02


def test_layout_auto(load_vae: LoadVAE) -> None:
    assert load_vae("demo-cv-vae").layout == "frames"
    assert load_vae("demo-iv-vae").layout == "video"
    assert load_vae(SMALL["sd3"]).layout == "video"
    assert load_vae(SMALL["cv16"]).layout == "video"
    assert load_vae("demo-image-vae").layout == "frames"
    assert load_vae(SMALL["image16"]).layout == "frames"


def test_encode_and_decode(comfy: Comfy, case: Case, vae: Any, images: torch.Tensor) -> None:
    (latent,) = comfy.call("VAEEncode", pixels=images, vae=vae)
    assert latent["samples"].shape == case.shape
    ours, *_ = comfy.call(
        "CVIV_Encode", vae=vae, images=images, mode="mean", sample_seed=0, fps=0.0, memory_budget_gb=0.0
    )
    torch.testing.assert_close(latent["samples"], ours["samples"])

    (decoded,) = comfy.call("VAEDecode", samples=latent, vae=vae)
    check_images(decoded, FRAMES)
    ours_decoded, *_ = comfy.call("CVIV_Decode", vae=vae, samples=latent, memory_budget_gb=0.0, preview=False)
    torch.testing.assert_close(decoded, ours_decoded)


@pytest.mark.parametrize("case", CASES[:8], ids=str)
def test_the_demo_weights_give_the_picture_back(comfy: Comfy, case: Case, vae: Any) -> None:
    (video,) = comfy.call("CVIV_DemoClip")
    clip = video.get_components().images[:5, 64:128, 100:180]
    (latent,) = comfy.call("VAEEncode", pixels=clip, vae=vae)
    (decoded,) = comfy.call("VAEDecode", samples=latent, vae=vae)
    both = torch.stack([decoded.flatten(), clip.flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.8
    assert (decoded - clip).abs().mean() < 0.1


def test_tiled(comfy: Comfy, case: Case, vae: Any) -> None:
    """Tiles are exact: the same picture, but for rounding."""
    wide = picture(5, 80, 96)
    (whole,) = comfy.call("VAEEncode", pixels=wide, vae=vae)
    (tiled,) = comfy.call("VAEEncodeTiled", pixels=wide, vae=vae, **TILED)
    torch.testing.assert_close(tiled["samples"], whole["samples"], atol=1e-3, rtol=1e-3)
    (decoded,) = comfy.call("VAEDecode", samples=whole, vae=vae)
    (decoded_tiled,) = comfy.call("VAEDecodeTiled", samples=whole, vae=vae, **TILED)
    check_images(decoded_tiled, 5, 80, 96)
    torch.testing.assert_close(decoded_tiled, decoded, atol=2e-3, rtol=0)


def test_encode_for_inpainting(comfy: Comfy, case: Case, vae: Any, images: torch.Tensor) -> None:
    mask = torch.zeros(1, HEIGHT, WIDTH)
    mask[:, 8:24, 8:32] = 1
    (latent,) = comfy.call("VAEEncodeForInpaint", pixels=images, vae=vae, mask=mask, grow_mask_by=6)
    assert latent["samples"].shape == case.shape
    assert latent["noise_mask"].shape[-2:] == (HEIGHT, WIDTH)


def test_inpaint_model_conditioning(comfy: Comfy, case: Case, vae: Any, images: torch.Tensor) -> None:
    mask = torch.zeros(1, HEIGHT, WIDTH)
    mask[:, 8:24, 8:32] = 1
    conditioning = [[torch.zeros(1, 4, 8), {}]]
    positive, negative, latent = comfy.call(
        "InpaintModelConditioning",
        positive=conditioning,
        negative=conditioning,
        pixels=images,
        vae=vae,
        mask=mask,
        noise_mask=True,
    )
    assert latent["samples"].shape == case.shape
    for one in (positive, negative):
        assert one[0][1]["concat_latent_image"].shape == case.shape


def test_save_and_load_latent(comfy: Comfy, case: Case, vae: Any, images: torch.Tensor) -> None:
    (latent,) = comfy.call("VAEEncode", pixels=images, vae=vae)
    comfy.call("SaveLatent", samples=latent, filename_prefix="stock")
    (saved,) = next(iter(comfy.ui.values()))["latents"]
    shutil.move(comfy.base / "output" / saved["filename"], comfy.base / "input" / "stock.latent")
    (back,) = comfy.call("LoadLatent", latent="stock.latent")
    torch.testing.assert_close(back["samples"], latent["samples"])
    (decoded,) = comfy.call("VAEDecode", samples=back, vae=vae)
    check_images(decoded, FRAMES)


def test_latent_upscale(comfy: Comfy, case: Case, vae: Any, images: torch.Tensor) -> None:
    """Our facts of size and length are of the small video, and must not cut the large one."""
    latent, *_ = comfy.call(
        "CVIV_Encode", vae=vae, images=images, mode="mean", sample_seed=0, fps=0.0, memory_budget_gb=0.0
    )
    (large,) = comfy.call(
        "LatentUpscale", samples=latent, upscale_method="bilinear", width=96, height=80, crop="disabled"
    )
    assert large["samples"].shape[-2:] == (10, 12)
    (decoded,) = comfy.call("VAEDecode", samples=large, vae=vae)
    check_images(decoded, FRAMES, 80, 96)
    ours, *_ = comfy.call("CVIV_Decode", vae=vae, samples=large, memory_budget_gb=0.0, preview=False)
    torch.testing.assert_close(ours, decoded)


@pytest.mark.parametrize("layout", ["clip as frame batch", "separate images"])
def test_svd_conditioning_and_sampling(
    comfy: Comfy, load_vae: LoadVAE, layout: str, images: torch.Tensor, tmp_path: Path
) -> None:
    """An image becomes N latents and, as one clip, 4N - 3 frames; the sampler shows its previews."""
    vae = load_vae("demo-cv-vae", layout)
    positive, negative, latent = comfy.call(
        "SVD_img2vid_Conditioning",
        clip_vision=small_clip_vision(comfy, tmp_path),
        init_image=images[:1],
        vae=vae,
        width=WIDTH,
        height=HEIGHT,
        video_frames=4,
        motion_bucket_id=127,
        fps=6,
        augmentation_level=0.0,
    )
    assert positive[0][1]["concat_latent_image"].shape == (1, 4, 6, 8)
    assert latent["samples"].shape == (4, 4, 6, 8)
    sampled = _sample(comfy, positive, negative, latent)
    previews = [report.preview for report in comfy.progress if report.preview is not None]
    assert len(previews) == 2
    assert sampled["samples"].shape == (4, 4, 6, 8)
    (decoded,) = comfy.call("VAEDecode", samples=sampled, vae=vae)
    assert decoded.shape[0] == (13 if layout == "clip as frame batch" else 4)


def _sample(comfy: Comfy, positive: Any, negative: Any, latent: Any) -> dict[str, Any]:
    """Two steps of KSampler with a small SVD model, previews on."""
    options = {
        "seed": 1,
        "steps": 2,
        "cfg": 2.5,
        "sampler_name": "euler",
        "scheduler": "karras",
        "denoise": 1.0,
    }
    preview = comfy.module("latent_preview")
    methods, args = comfy.module("comfy.cli_args").LatentPreviewMethod, comfy.module("comfy.cli_args").args
    before = args.preview_method
    names = ("preview_method", "default_preview_method")
    places = [(place, name) for place in (args, preview) for name in names if hasattr(place, name)]
    try:
        for place, name in places:
            setattr(place, name, methods.Latent2RGB)
        (sampled,) = comfy.call(
            "KSampler",
            model=small_svd(comfy),
            positive=positive,
            negative=negative,
            latent_image=latent,
            **options,
        )
    finally:
        for place, name in places:
            setattr(place, name, before)
    return sampled
