"""SVD End Image: a step in two passes, one with time turned round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .inprocess import Comfy, NodeError
from .svd import small_svd
from .svd_model import (
    SCALE,
    Call,
    conditions,
    empty,
    function_svd,
    ksampler,
    long_model,
    random_images,
    small_clip_vision,
    small_image_vae,
    spread,
)
from .weights import picture

LATENTS = 12


@pytest.fixture(scope="module")
def readers(loaded: Comfy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("clip")
    return {"image_vae": small_image_vae(loaded), "clip_vision": small_clip_vision(loaded, folder)}


def with_end(comfy: Comfy, readers: dict[str, Any], model: Any, positive: Any, image: Tensor, **changes: Any) -> Any:
    (patched,) = comfy.call(
        "CVIV_SVDEndImage",
        model=model,
        positive=positive,
        image=image,
        **readers,
        **{"first_pass": "start image", **changes},
    )
    return patched


def told_of(comfy: Comfy, readers: dict[str, Any], image: Tensor) -> tuple[Any, Any]:
    """Conditions of a picture, as SVD's own node makes them."""
    widgets = {
        "width": 64,
        "height": 64,
        "video_frames": LATENTS,
        "motion_bucket_id": 127,
        "fps": 6,
        "augmentation_level": 0.0,
    }
    positive, negative, _ = comfy.call(
        "SVD_img2vid_Conditioning",
        clip_vision=readers["clip_vision"],
        init_image=image,
        vae=readers["image_vae"],
        **widgets,
    )
    return positive, negative


def seen_of(comfy: Comfy, readers: dict[str, Any], image: Tensor) -> float:
    """The value of a picture's latent that a `Function` goes by."""
    return float(told_of(comfy, readers, image)[0][0][1]["concat_latent_image"][0, 0, 0, 0])


def sampled(comfy: Comfy, model: Any, conds: tuple[Any, Any], noise: Tensor, latents: Any, steps: int = 4) -> Tensor:
    """Samples of given noise, by SamplerCustomAdvanced."""

    class Given:
        seed = 5

        def generate_noise(self, _: Any) -> Tensor:
            return noise.clone()

    (linear,) = comfy.call("VideoLinearCFGGuidance", model=model, min_cfg=1.0)
    (guider,) = comfy.call("CFGGuider", model=linear, positive=conds[0], negative=conds[1], cfg=2.5)
    (chosen,) = comfy.call("KSamplerSelect", sampler_name="euler")
    (sigmas,) = comfy.call("BasicScheduler", model=linear, scheduler="karras", steps=steps, denoise=1.0)
    output, _ = comfy.call(
        "SamplerCustomAdvanced", noise=Given(), guider=guider, sampler=chosen, sigmas=sigmas, latent_image=latents
    )
    return output["samples"]


def test_turning_time_and_swapping_the_images_turns_the_clip(comfy: Comfy, readers: dict[str, Any]) -> None:
    model, (start, end) = small_svd(comfy), (picture(1, 64, 64), picture(2, 64, 64)[1:].flip(2))
    noise = torch.randn(LATENTS, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    from_start, from_end = told_of(comfy, readers, start), told_of(comfy, readers, end)
    forth = with_end(comfy, readers, model, from_start[0], end)
    back = with_end(comfy, readers, model, from_end[0], start, first_pass="end image")
    one = sampled(comfy, forth, from_start, noise, empty(LATENTS, 8))
    other = sampled(comfy, back, from_end, noise.flip(0), empty(LATENTS, 8))
    most = one.abs().max()
    assert (one - other.flip(0)).abs().max() < 1e-4 * most
    plain = sampled(comfy, model, from_start, noise, empty(LATENTS, 8))
    assert (one - plain).abs().max() > 0.05 * most


@pytest.mark.parametrize("patched_by_long", ["before", "after", "not"])
def test_passes(comfy: Comfy, readers: dict[str, Any], patched_by_long: str) -> None:
    """A network that believes in its image and rises from it: the clip leads from one picture to the other."""

    def rising(call: Call) -> Tensor:
        return spread((call.image + 0.1 * torch.arange(call.frames)) * SCALE, call)

    start, end = torch.zeros(1, 32, 32, 3), torch.ones(1, 32, 32, 3)
    model, network = function_svd(comfy, rising)
    conds = told_of(comfy, readers, start)
    widgets = {"window_length": 25, "mode": "continuation"}
    if patched_by_long == "before":
        model = long_model(comfy, model, LATENTS, **widgets)
    patched = with_end(comfy, readers, model, conds[0], end)
    if patched_by_long == "after":
        patched = long_model(comfy, patched, LATENTS, **widgets)
    result = ksampler(comfy, patched, conds, empty(LATENTS, 8), steps=3, cfg=1.0)
    scaled = [seen_of(comfy, readers, image) for image in (start, end)]
    seen = [float(call.image[0]) for call in network.calls]
    assert len(seen) == 6
    order = [0, 1, 1, 0, 0, 1]  # they take turns
    assert seen == pytest.approx([scaled[index] for index in order], abs=1e-4)
    share = torch.linspace(0, 1, LATENTS)
    forth = scaled[0] + 0.1 * torch.arange(LATENTS)
    back = scaled[1] + 0.1 * torch.arange(LATENTS).flip(0)
    assert torch.allclose(result[:, 0, 0, 0], forth + (back - forth) * share, atol=1e-3)


def test_one_picture_for_both_comes_back(comfy: Comfy, readers: dict[str, Any]) -> None:
    def rising(call: Call) -> Tensor:
        return spread((call.image + 0.1 * torch.arange(call.frames)) * SCALE, call)

    model, _ = function_svd(comfy, rising)
    image = picture(1, 64, 64)
    conds = told_of(comfy, readers, image)
    result = ksampler(comfy, with_end(comfy, readers, model, conds[0], image), conds, empty(LATENTS, 8), cfg=1.0)
    assert torch.allclose(result[0], result[-1], atol=1e-3)
    assert not torch.allclose(result[0], result[LATENTS // 2], atol=1e-1)


def test_a_long_clip_ends_at_it(comfy: Comfy, readers: dict[str, Any]) -> None:
    """By continuation only the last chunk is led to the end image."""
    model, network = function_svd(comfy, lambda call: spread(call.image * SCALE, call))
    start, end = torch.zeros(1, 64, 64, 3), picture(1, 64, 64)
    conds = told_of(comfy, readers, start)
    patched = long_model(comfy, model, 20, mode="continuation", anchor="moving")
    result = ksampler(comfy, with_end(comfy, readers, patched, conds[0], end), conds, empty(20, 8), cfg=1.0)
    assert [call.start for call in network.calls] == [0] * 3 + [6] * 3 + [12] * 6
    first, last = seen_of(comfy, readers, start), seen_of(comfy, readers, end)
    assert abs(last - first) > 0.05
    led = first + (last - first) * torch.linspace(0, 1, 8)[2:]  # two are carried over as they were
    assert torch.allclose(result[:, 0, 0, 0], torch.cat((torch.full((14,), first), led)), atol=1e-3)


@pytest.mark.parametrize("mode", ["windows", "loop"])
def test_in_windows(comfy: Comfy, readers: dict[str, Any], mode: str) -> None:
    model, network = function_svd(comfy, lambda call: spread(call.image * SCALE, call))
    start, end = torch.zeros(1, 64, 64, 3), picture(1, 64, 64)
    conds = told_of(comfy, readers, start)
    patched = long_model(comfy, model, 20, mode=mode)
    result = ksampler(comfy, with_end(comfy, readers, patched, conds[0], end), conds, empty(20, 8), cfg=1.0)
    assert len(network.calls) == 3 * 2 * (3 if mode == "windows" else 4)
    first, last = seen_of(comfy, readers, start), seen_of(comfy, readers, end)
    assert abs(last - first) > 0.05
    led = first + (last - first) * torch.linspace(0, 1, 20)
    assert torch.allclose(result[:, 0, 0, 0], led, atol=1e-3)


def test_refusals(comfy: Comfy, readers: dict[str, Any]) -> None:
    conds = conditions(random_images())
    patched = with_end(comfy, readers, small_svd(comfy), conds[0], picture(1, 64, 64))
    with pytest.raises(
        NodeError, match=r"The sampler is dpmpp_2m, and SVD End Image makes every step in several rounds.*euler"
    ):
        ksampler(comfy, patched, conds, empty(8, 8), "dpmpp_2m")
    bare = [[torch.zeros(1, 1, 1024), {}]]
    with pytest.raises(NodeError, match="conditioning has no image: connect positive of SVD Image to Long Video"):
        with_end(comfy, readers, small_svd(comfy), bare, picture(1, 64, 64))
