"""SVD Long Video with nodes that keep or compile things: EasyCache, LazyCache, TorchCompileModel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .inprocess import Comfy, NodeError
from .svd import small_svd
from .svd_model import Call, conditions, empty, function_svd, indices, ksampler, long_model, random_images, spread

LATENTS = 20
CACHES = {
    "EasyCache": {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False},
    "LazyCache": {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False},
}


def cached(comfy: Comfy, model: Any, node: str, threshold: float) -> Any:
    (patched,) = comfy.call(node, model=model, **{**CACHES[node], "reuse_threshold": threshold})
    return patched


@pytest.mark.parametrize("node", sorted(CACHES))
@pytest.mark.parametrize("mode", ["windows", "continuation"])
@pytest.mark.parametrize("before", [True, False])
def test_a_cache_that_skips_nothing_changes_nothing(comfy: Comfy, node: str, mode: str, before: bool) -> None:
    model, conds = small_svd(comfy), conditions(random_images())
    plain = ksampler(comfy, long_model(comfy, model, LATENTS, mode=mode), conds, empty(LATENTS, 8), steps=4)
    if before:
        patched = long_model(comfy, cached(comfy, model, node, 0.0), LATENTS, mode=mode)
    else:
        patched = cached(comfy, long_model(comfy, model, LATENTS, mode=mode), node, 0.0)
    result = ksampler(comfy, patched, conds, empty(LATENTS, 8), steps=4)
    assert torch.allclose(result, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("node", sorted(CACHES))
@pytest.mark.parametrize("mode", ["windows", "continuation"])
@pytest.mark.parametrize("before", [True, False])
def test_a_cache_skips_by_window(comfy: Comfy, node: str, mode: str, before: bool) -> None:
    """Every window has its own picture: a cache that mixed them up would show in the result."""

    def image_itself(call: Call) -> Tensor:
        return spread(call.image * 0.18215, call)

    model, network = function_svd(comfy, image_itself)
    conds = conditions(indices(LATENTS))
    plain = ksampler(comfy, long_model(comfy, model, LATENTS, mode=mode), conds, empty(LATENTS), steps=12, cfg=1.0)
    calls, most = len(network.calls), plain.abs().max()
    network.calls.clear()
    if before:
        patched = long_model(comfy, cached(comfy, model, node, 3.0), LATENTS, mode=mode)
    else:
        patched = cached(comfy, long_model(comfy, model, LATENTS, mode=mode), node, 3.0)
    result = ksampler(comfy, patched, conds, empty(LATENTS), steps=12, cfg=1.0)
    assert len(network.calls) < calls
    assert (result - plain).abs().max() < 0.05 * most
    if mode == "windows":  # all windows of a step are skipped together
        starts = [call.start for call in network.calls]
        assert len({starts.count(start) for start in set(starts)}) == 1


def test_a_cache_by_window_needs_windows_that_stay(comfy: Comfy) -> None:
    patched = long_model(comfy, cached(comfy, small_svd(comfy), "EasyCache", 0.2), LATENTS, window_schedule="moving")
    with pytest.raises(NodeError, match=r"EasyCache keeps what a window gave.*window_schedule to still"):
        ksampler(comfy, patched, conditions(random_images()), empty(LATENTS, 8))
    lazy = long_model(comfy, cached(comfy, small_svd(comfy), "LazyCache", 0.2), LATENTS, window_schedule="moving")
    assert torch.isfinite(ksampler(comfy, lazy, conditions(random_images()), empty(LATENTS, 8))).all()


@pytest.mark.parametrize(("mode", "before"), [("windows", True)])
def test_time_offset_of_a_compiled_model(comfy: Comfy, mode: str, before: bool) -> None:
    helper = comfy.module("comfy_api.torch_helpers")
    model, conds = small_svd(comfy), conditions(random_images())
    wanted = ksampler(
        comfy, long_model(comfy, model, LATENTS, mode=mode, time_offset=True), conds, empty(LATENTS, 8), steps=1
    )
    still = ksampler(comfy, long_model(comfy, model, LATENTS, mode=mode), conds, empty(LATENTS, 8), steps=1)

    def compiled(one: Any) -> Any:
        one = one.clone()
        # as TorchCompileModel does it, with a backend that needs no compiler
        options = {"guard_filter_fn": lambda guards: [("transformer_options" not in guard.name) for guard in guards]}
        helper.set_torch_compile_wrapper(model=one, backend="eager", options=options)
        return one

    torch._dynamo.reset()
    if before:
        patched = long_model(comfy, compiled(model), LATENTS, mode=mode, time_offset=True)
    else:
        patched = compiled(long_model(comfy, model, LATENTS, mode=mode, time_offset=True))
    result = ksampler(comfy, patched, conds, empty(LATENTS, 8), steps=1)
    torch._dynamo.reset()
    assert not torch.allclose(wanted, still, rtol=1e-3)
    assert torch.allclose(result, wanted, rtol=1e-3, atol=1e-3)
