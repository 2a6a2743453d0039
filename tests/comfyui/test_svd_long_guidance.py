"""SVD Long Video: noise, positions in time and CFG that windows and chunks are given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .inprocess import Comfy, NodeError
from .svd import small_svd
from .svd_model import (
    LATENTS,
    SPANS,
    conditions,
    empty,
    function_svd,
    image_itself,
    indices,
    ksampler,
    long_model,
    random_images,
)


@pytest.mark.parametrize("mode", ["windows", "continuation"])
def test_shuffled_noise_reaches_the_network(comfy: Comfy, mode: str) -> None:
    model, network = function_svd(comfy, image_itself)
    patched = long_model(comfy, model, LATENTS, mode=mode, noise="FreeNoise")
    ksampler(comfy, patched, conditions(indices(1)), empty(LATENTS), steps=1)
    first, *others = [sorted(call.x[:, 0, 0, 0].tolist()) for call in network.calls]
    if mode == "windows":
        assert all(other == first for other in others)
    else:  # kept latents are clean plus noise
        assert all(len(set(other) & set(first)) == 6 for other in others)


@pytest.mark.parametrize("mode", ["windows", "continuation"])
def test_time_offset(comfy: Comfy, mode: str) -> None:
    model, conds = small_svd(comfy), conditions(random_images())
    attention = comfy.module("comfy.ldm.modules.attention")
    embedding = comfy.module("comfy.ldm.modules.diffusionmodules.util").timestep_embedding
    module = next(m for m in model.model.diffusion_model.modules() if isinstance(m, attention.SpatialVideoTransformer))
    seen: list[Tensor] = []
    layer = module.time_pos_embed[0]
    watch = layer.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0][:8].clone()))
    try:
        patched = long_model(comfy, model, LATENTS, mode=mode, time_offset=True)
        moved = ksampler(comfy, patched, conds, empty(LATENTS, 8), steps=1)
    finally:
        watch.remove()
    for told, (start, stop) in zip(seen, SPANS, strict=True):
        assert torch.equal(told, embedding(torch.arange(float(start), stop), module.in_channels, max_period=10000))
    plain = long_model(comfy, model, LATENTS, mode=mode)
    still = ksampler(comfy, plain, conds, empty(LATENTS, 8), steps=1)
    if mode == "continuation":
        assert torch.equal(moved[:8], still[:8])
    assert not torch.equal(moved[8:], still[8:])
    again = long_model(comfy, patched, LATENTS, mode=mode)  # a second node without it takes it away
    assert not again.object_patches
    assert torch.equal(ksampler(comfy, again, conds, empty(LATENTS, 8), steps=1), still)


def test_cfg_ramp_of_one_window_is_the_stock_ramp(comfy: Comfy) -> None:
    model, conds = small_svd(comfy), conditions(random_images())
    (stock,) = comfy.call("VideoLinearCFGGuidance", model=model, min_cfg=1.0)
    ours = long_model(comfy, model, 8, min_cfg=1.0)
    wanted = ksampler(comfy, stock, conds, empty(8, 8))
    assert (ksampler(comfy, ours, conds, empty(8, 8)) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_cfg_ramp_in_every_window(comfy: Comfy) -> None:
    model, _ = function_svd(comfy, image_itself)
    patched = long_model(comfy, model, 24, min_cfg=1.0, overlap=0)
    result = ksampler(comfy, patched, conditions(indices(1)), empty(24))[:, 0, 0, 0]
    assert torch.allclose(result, torch.linspace(1, 2.5, 8).repeat(3), rtol=1e-4)


def test_cfg_rises_once_in_continuation(comfy: Comfy) -> None:
    model, _ = function_svd(comfy, image_itself)
    patched = long_model(comfy, model, LATENTS, mode="continuation", min_cfg=1.0)
    result = ksampler(comfy, patched, conditions(indices(1)), empty(LATENTS))[:, 0, 0, 0]
    assert torch.allclose(result, torch.cat((torch.linspace(1, 2.5, 8), torch.full((12,), 2.5))), rtol=1e-4)


@pytest.mark.parametrize("latents", [8, 24])
def test_cfg_ramp_at_cfg_1(comfy: Comfy, latents: int) -> None:
    model, _ = function_svd(comfy, image_itself)
    patched = long_model(comfy, model, latents, min_cfg=3.0, overlap=0)
    result = ksampler(comfy, patched, conditions(indices(1)), empty(latents), cfg=1.0)[:, 0, 0, 0]
    assert torch.allclose(result, torch.linspace(3, 1, 8).repeat(latents // 8), rtol=1e-4)


def test_cfg_ramp_with_rescale(comfy: Comfy) -> None:
    model, conds = small_svd(comfy), conditions(random_images())
    (rescaled,) = comfy.call("RescaleCFG", model=model, multiplier=0.7)
    function = rescaled.model_options["sampler_cfg_function"]
    wanted_model = model.clone()
    scale = torch.linspace(1.0, 2.5, 8).reshape(-1, 1, 1, 1)
    wanted_model.set_model_sampler_cfg_function(lambda told: function({**told, "cond_scale": scale}))
    wanted = ksampler(comfy, wanted_model, conds, empty(8, 8))
    ours = ksampler(comfy, long_model(comfy, rescaled, 8, min_cfg=1.0), conds, empty(8, 8))
    assert (ours - wanted).abs().max() < 1e-5 * wanted.abs().max()
    plain = ksampler(comfy, long_model(comfy, model, 8, min_cfg=1.0), conds, empty(8, 8))
    assert not torch.allclose(ours, plain, rtol=1e-2)


def test_two_ramps_of_the_cfg_are_refused(comfy: Comfy) -> None:
    (stock,) = comfy.call("VideoLinearCFGGuidance", model=small_svd(comfy), min_cfg=1.0)
    patched = long_model(comfy, stock, LATENTS, min_cfg=1.0)
    with pytest.raises(NodeError, match="Set min_cfg to 0, or remove that node"):
        ksampler(comfy, patched, conditions(random_images()), empty(LATENTS, 8))


@pytest.mark.parametrize(("node", "count"), [("BasicGuider", "1 condition;"), ("DualCFGGuider", "3 conditions;")])
def test_guiders_whose_cfg_cannot_rise(comfy: Comfy, node: str, count: str) -> None:
    """Without a negative there is nothing to rise from; what came out was not the clip."""
    model, conds = small_svd(comfy), conditions(random_images())
    patched = long_model(comfy, model, LATENTS, min_cfg=1.0)
    if node == "BasicGuider":
        (guider,) = comfy.call(node, model=patched, conditioning=conds[0])
    else:
        widgets = {"cfg_conds": 2.0, "cfg_cond2_negative": 2.0, "style": "regular"}
        (guider,) = comfy.call(node, model=patched, cond1=conds[0], cond2=conds[0], negative=conds[1], **widgets)
    (noise,) = comfy.call("RandomNoise", noise_seed=42)
    (sampler,) = comfy.call("KSamplerSelect", sampler_name="euler")
    (sigmas,) = comfy.call("BasicScheduler", model=patched, scheduler="karras", steps=1, denoise=1.0)
    inputs = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas}
    with pytest.raises(NodeError, match=f"the guider has {count}.*Set min_cfg to 0, or use KSampler"):
        comfy.call("SamplerCustomAdvanced", latent_image=empty(LATENTS, 8), **inputs)
