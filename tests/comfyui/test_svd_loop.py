"""Loops: windows that go round, and a decode that closes."""

from __future__ import annotations

import itertools
import math
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
    conditions,
    empty,
    function_svd,
    indices,
    ksampler,
    long_model,
    random_images,
    spread,
)
from .weights import SMALL

FRAMES = 32  # of a video that goes round


def periodic() -> Tensor:
    """An IMAGE (32, 64, 64, 3): a soft pattern that moves round and comes back."""
    angle = 2 * math.pi * torch.arange(FRAMES) / FRAMES
    y, x = torch.meshgrid(torch.linspace(0, 2 * math.pi, 64), torch.linspace(0, 2 * math.pi, 64), indexing="ij")
    channels = [0.5 + 0.35 * torch.sin(x + turn + angle.reshape(-1, 1, 1)) * torch.cos(y) for turn in (0.0, 1.0, 2.0)]
    return torch.stack(channels, -1)


def steps(images: Tensor) -> Tensor:
    """The mean change from each frame to the next; the last is that from the end to the beginning."""
    return (images.roll(-1, 0) - images).abs().mean((1, 2, 3))


def loop_latent(comfy: Comfy, vae: Any) -> dict[str, Any]:
    """The periodic video as eight latents that go round, each of four frames."""
    video = periodic()
    latent, _ = encode(comfy, vae, torch.cat((video[-13:], video)), fps=24.0)
    return {"samples": latent["samples"][4:], "cviv": {"family": "cv-vae", "fps": "24", "layout": "frames"}}


def test_a_loop_closes(comfy: Comfy, load_vae: LoadVAE) -> None:
    vae = load_vae("demo-cv-vae")
    latent = loop_latent(comfy, vae)
    assert latent["samples"].shape[0] == 8
    plain, _, _ = decode(comfy, vae, latent)
    assert plain.shape[0] == 29
    broken = steps(plain)
    assert broken[-1] > 1.5 * broken[:-1].max()
    images, fps, report = comfy.call("CVIV_DecodeLoop", vae=vae, samples=latent, memory_budget_gb=0.0, preview=False)
    assert images.shape == (FRAMES, 64, 64, 3)
    assert fps == 24
    closed = steps(images)
    assert closed[-1] <= closed[:-1].max()
    assert "32 frames go round" in report
    told = float(report.rpartition("beginning is ")[2].partition(" times")[0])
    assert told == pytest.approx(float(closed[-1] / closed[:-1].mean()), abs=0.06)


def test_the_frames_are_those_of_an_endless_clip(comfy: Comfy, load_vae: LoadVAE) -> None:
    """Decoding three rounds in one go gives, in the third, what the loop gives, where its chunks lie alike."""
    vae = load_vae(SMALL["cv"])
    samples = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(4))
    latent = {"samples": samples, "cviv": {"family": "cv-vae", "layout": "frames"}}
    images, _, _ = comfy.call("CVIV_DecodeLoop", vae=vae, samples=latent, memory_budget_gb=0.0, preview=False)
    rounds, _, _ = decode(comfy, vae, {**latent, "samples": torch.cat((samples[-1:], samples.repeat(3, 1, 1, 1)))})
    assert images.shape[0] == 32
    assert (images - rounds[-32:]).abs().max() < 1e-5


@pytest.mark.parametrize("latents", [12, 20, 25])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
def test_windows_go_round(comfy: Comfy, latents: int, sampler: str) -> None:
    """Beyond the end is the beginning: every pair of neighbours is seen together, the last and the first included."""
    model, network = function_svd(comfy, lambda call: spread(call.image * SCALE, call))
    conds = conditions(indices(latents))
    patched = long_model(comfy, model, latents, mode="loop", window_schedule="moving")
    ksampler(comfy, patched, conds, empty(latents), sampler, steps=10, cfg=1.0)
    pairs: dict[tuple[int, int], int] = {}
    for call in network.calls:
        seen = [round(float(value)) - 1 for value in call.image]
        for one, other in itertools.pairwise(seen):
            assert other == (one + 1) % latents
            pairs[one, other] = pairs.get((one, other), 0) + 1
    assert len(pairs) == latents
    assert min(pairs.values()) > 0.5 * max(pairs.values())


def test_turning_the_clip_turns_the_loop(comfy: Comfy) -> None:
    """With windows that move over the whole ring no latent is a beginning: what is far from it is sampled alike."""
    model, conds = small_svd(comfy), conditions(random_images())
    patched = long_model(comfy, model, 16, mode="loop", window_schedule="moving", fuse="pyramid")
    result = ksampler(comfy, patched, conds, empty(16, 8), steps=6)
    change = (result.roll(-1, 0) - result).square().mean((1, 2, 3)).sqrt()
    assert change[-1] < 1.5 * change[:-1].max()
    plain = ksampler(comfy, model, conds, empty(16, 8), steps=6)
    assert not torch.allclose(result, plain, rtol=1e-2)


def test_a_small_loop_decodes(comfy: Comfy, load_vae: LoadVAE) -> None:
    model = long_model(comfy, small_svd(comfy), 8, mode="loop", window_schedule="moving")
    samples = ksampler(comfy, model, conditions(random_images()), empty(8, 8), steps=1)
    widgets = {"memory_budget_gb": 0.0, "preview": False}
    for count in (2, 3, 8):
        images, _, _ = comfy.call(
            "CVIV_DecodeLoop", vae=load_vae(SMALL["cv"]), samples={"samples": samples[:count]}, **widgets
        )
        assert images.shape == (4 * count, 64, 64, 3)
    with pytest.raises(NodeError, match="a loop is one clip of two latents or more"):
        comfy.call("CVIV_DecodeLoop", vae=load_vae(SMALL["cv"]), samples={"samples": samples[:1]}, **widgets)


def test_report_of_a_loop(comfy: Comfy) -> None:
    from .svd_model import LONG

    widgets = {**LONG, "mode": "loop", "window_schedule": "moving", "window_length": 25, "overlap": 6}
    _, picture, report = comfy.call("CVIV_SVDLongVideo", model=small_svd(comfy), samples=empty(49), **widgets)
    assert "a loop of 49 latents: Decode Loop makes 196 frames" in report
    assert "up to 3 windows in every step, 25 latents each" in report
    assert picture.shape[3] == 3


def test_one_call_of_a_loop(comfy: Comfy) -> None:
    def place(call: Call) -> Tensor:
        return spread(call.image * SCALE, call)

    model, network = function_svd(comfy, place)
    patched = long_model(comfy, model, 25, mode="loop", window_length=25, window_schedule="still")
    ksampler(comfy, patched, conditions(indices(25)), empty(25), steps=1, cfg=1.0)
    assert [call.start for call in network.calls] == [0, 12]
