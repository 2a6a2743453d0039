"""SVD Extend Clip: what is kept, what the sampler is given, and that only new latents are sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .calls import decode, encode
from .conftest import LoadVAE
from .inprocess import Comfy, NodeError
from .svd import small_svd
from .svd_model import (
    SCALE,
    Call,
    function_svd,
    ksampler,
    long_model,
    small_clip_vision,
    small_image_vae,
    spread,
)
from .weights import SMALL, picture

EXTEND = {"added_frames": 24, "carry": 2, "motion_bucket_id": 127, "augmentation_level": 0.0, "augmentation_seed": 0}


@pytest.fixture(scope="module")
def readers(loaded: Comfy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("clip")
    return {"image_vae": small_image_vae(loaded), "clip_vision": small_clip_vision(loaded, folder)}


def extended(comfy: Comfy, readers: dict[str, Any], latent: Any, **changes: Any) -> tuple[Any, Any, Any, str]:
    positive, negative, longer, report = comfy.call(
        "CVIV_SVDExtendClip", samples=latent, **readers, **{**EXTEND, **changes}
    )
    return positive, negative, longer, report


def clip_of(latents: int, **facts: Any) -> dict[str, Any]:
    samples = torch.randn(latents, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    return {"samples": samples, "cviv": {"family": "cv-vae", "fps": "24", "layout": "frames", **facts}}


def test_what_the_sampler_is_given(comfy: Comfy, readers: dict[str, Any]) -> None:
    clip = clip_of(10, frames=37, height=64, width=64)
    positive, negative, longer, report = extended(comfy, readers, clip)
    assert torch.equal(longer["samples"][:10], clip["samples"])
    assert longer["samples"].shape == (16, 4, 8, 8)
    assert not longer["samples"][10:].any()
    assert longer["noise_mask"][:, 0, 0, 0].tolist() == [0.0] * 10 + [1.0] * 6
    assert longer["cviv"]["frames"] == 61
    ((embeds, told),) = positive
    with torch.inference_mode():
        shown = readers["image_vae"].decode(clip["samples"][8:9])[..., :3]  # the first of the two that are carried
        assert torch.allclose(told["concat_latent_image"], readers["image_vae"].encode(shown), atol=1e-4)
        assert torch.allclose(embeds[0, 0], readers["clip_vision"].encode_image(shown).image_embeds[0], atol=1e-4)
    assert (told["fps"], told["motion_bucket_id"]) == (6, 127)
    assert not negative[0][1]["concat_latent_image"].any()
    assert "10 latents (37 frames) are kept as they are" in report
    assert "6 new ones" in report


def test_only_new_latents_are_sampled(comfy: Comfy, readers: dict[str, Any]) -> None:
    def rising(call: Call) -> Tensor:
        return spread((call.image + 0.1 * torch.arange(call.frames)) * SCALE, call)

    model, network = function_svd(comfy, rising)
    clip = clip_of(30)
    positive, negative, longer, _ = extended(comfy, readers, clip, added_frames=48)
    patched = long_model(comfy, model, 42, mode="continuation", anchor="moving")
    result = ksampler(comfy, patched, (positive, negative), longer, cfg=1.0)
    assert torch.allclose(result[:30], clip["samples"], atol=1e-5)
    assert [call.start for call in network.calls] == [28] * 3 + [34] * 3  # of 42 latents 14, in chunks of 8
    first = network.calls[0].image
    assert torch.allclose(first, clip["samples"][28, 0, 0, 0].expand(8), atol=1e-5)  # the clip's own latent
    assert result[30:].abs().sum() > 0


@pytest.mark.parametrize("anchor", ["first", "all carried"])
def test_other_anchors(comfy: Comfy, readers: dict[str, Any], anchor: str) -> None:
    model, network = function_svd(comfy, lambda call: spread(call.image * SCALE, call))
    clip = clip_of(30)
    positive, negative, longer, _ = extended(comfy, readers, clip)
    patched = long_model(comfy, model, 36, mode="continuation", anchor=anchor)
    ksampler(comfy, patched, (positive, negative), longer, steps=1, cfg=1.0)
    given = positive[0][1]["concat_latent_image"][0, 0, 0, 0]
    wanted = given if anchor == "first" else clip["samples"][28, 0, 0, 0]
    assert network.calls[0].image[0] == pytest.approx(float(wanted), abs=1e-5)


def test_a_real_video(comfy: Comfy, readers: dict[str, Any], load_vae: LoadVAE) -> None:
    vae, video = load_vae(SMALL["cv"]), picture(39, 64, 64)
    latent, _ = encode(comfy, vae, video, fps=24.0)
    positive, negative, longer, report = extended(comfy, readers, latent)
    assert "the last 2 frames are left out: their latent is filled up with repeated frames" in report
    assert longer["samples"].shape[0] == 10 + 6
    patched = long_model(comfy, small_svd(comfy), 16, mode="continuation")
    samples = ksampler(comfy, patched, (positive, negative), longer, steps=1)
    images, fps, _ = decode(comfy, vae, {**longer, "samples": samples})
    assert images.shape == (61, 64, 64, 3)
    assert fps == 24
    kept, _, _ = decode(comfy, vae, latent)
    assert torch.allclose(images[:33], kept[:33], atol=2e-3)  # the chunk after them has new latents, too


def test_layouts(comfy: Comfy, readers: dict[str, Any]) -> None:
    clip = clip_of(10)
    as_video = {"samples": clip["samples"].movedim(0, 1)[None], "cviv": {"family": "cv-vae", "layout": "video"}}
    _, _, one, _ = extended(comfy, readers, clip)
    _, _, other, _ = extended(comfy, readers, as_video)
    assert torch.equal(one["samples"], other["samples"])
    _, _, short, report = extended(comfy, readers, clip_of(1), added_frames=1)
    assert short["samples"].shape[0] == 2
    assert "latent 0" in report


@pytest.mark.parametrize(
    ("latent", "message"),
    [
        ({"samples": torch.zeros(9, 16, 8, 8)}, r"shape \(9, 16, 8, 8\); SVD goes on from those of a CV-VAE"),
        ({"samples": torch.zeros(9, 4, 8, 8), "cviv": {"family": "iv-vae"}}, "was made by iv-vae"),
        ({"samples": torch.zeros(2, 4, 9, 8, 8)}, "holds 2 clips"),
    ],
)
def test_refusals(comfy: Comfy, readers: dict[str, Any], latent: Any, message: str) -> None:
    with pytest.raises(NodeError, match=message):
        extended(comfy, readers, latent)
