"""Drift control: held to the first chunk without a jump at any seam, for every setting."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from .inprocess import Comfy
from .svd_model import SCALE, Call, conditions, empty, function_svd, ksampler, long_model, random_images, spread

STEP = 0.02  # by which a chunk rises from latent to latent
LATENTS = 109


def climbing(call: Call) -> Tensor:
    """A network whose chunks rise steadily from the image they start from."""
    return spread((call.image[0] + STEP * torch.arange(call.frames)) * SCALE, call)


def steps_of(comfy: Comfy, latents: int = LATENTS, sampler: str = "euler", **changes: Any) -> Tensor:
    """The changes of brightness from latent to latent of a clip by continuation, chunks of 25."""
    model, _ = function_svd(comfy, climbing)
    settings = {"mode": "continuation", "window_length": 25, "carry": 4, "anchor": "moving", **changes}
    patched = long_model(comfy, model, latents, **settings)
    result = ksampler(comfy, patched, conditions(torch.ones(1, 4, 4, 4)), empty(latents), sampler, steps=2, cfg=1.0)
    return result.mean((1, 2, 3)).diff()


def test_off_leaves_every_seam_alone(comfy: Comfy) -> None:
    steps = steps_of(comfy, drift_control=0.0)
    assert torch.allclose(steps, torch.full_like(steps, STEP), atol=1e-4)


@pytest.mark.parametrize("carry", [1, 4, 12, 24])
@pytest.mark.parametrize("crossfade", [0, 2, 24])
def test_no_seam_is_a_jump(comfy: Comfy, carry: int, crossfade: int) -> None:
    latents = LATENTS if carry < 24 else 60
    for strength in (0.05, 0.5, 1.0):
        steps = steps_of(comfy, latents, drift_control=strength, carry=carry, crossfade=crossfade)
        assert steps.abs().max() < 2 * STEP, f"{strength}: {steps.abs().max():.3f}"


def test_one_new_latent(comfy: Comfy) -> None:
    steps = steps_of(comfy, 26, drift_control=1.0, carry=24)
    assert steps.abs().max() < 2 * STEP


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "dpmpp_sde"])
def test_the_clip_is_held(comfy: Comfy, sampler: str) -> None:
    ends = [float(steps_of(comfy, sampler=sampler, drift_control=strength).sum()) for strength in (0.0, 0.5, 1.0)]
    assert ends[0] == pytest.approx(STEP * (LATENTS - 1), rel=1e-3)
    assert ends[2] < ends[1] < 0.5 * ends[0]
    assert ends[2] < 0.3 * ends[0]


def test_a_flash_at_the_seam_goes(comfy: Comfy) -> None:
    def flashing(call: Call) -> Tensor:
        return climbing(call) + (0.5 if call.start else 0.0) * SCALE

    model, _ = function_svd(comfy, flashing)
    worst = []
    for strength in (0.0, 0.5):
        changes = {"mode": "continuation", "window_length": 25, "carry": 4, "anchor": "moving"}
        patched = long_model(comfy, model, LATENTS, drift_control=strength, **changes)
        conds = conditions(torch.ones(1, 4, 4, 4))
        result = ksampler(comfy, patched, conds, empty(LATENTS), steps=2, cfg=1.0)
        worst.append(float(result.mean((1, 2, 3)).diff().abs().max()))
    assert worst[0] > 0.5
    assert worst[1] < 2 * STEP


def test_contrast_is_held(comfy: Comfy) -> None:
    pattern = torch.linspace(-1, 1, 64).reshape(1, 4, 4, 4)

    def stretching(call: Call) -> Tensor:
        grown = 1 + 0.01 * (call.start + torch.arange(float(call.frames)))
        return pattern * grown.reshape(-1, 1, 1, 1) * SCALE

    model, _ = function_svd(comfy, stretching)

    def ends(strength: float) -> list[float]:
        changes = {"mode": "continuation", "window_length": 25, "carry": 4, "drift_control": strength}
        patched = long_model(comfy, model, LATENTS, **changes)
        result = ksampler(comfy, patched, conditions(random_images(size=4)), empty(LATENTS), steps=2, cfg=1.0)
        deviation = result.std((1, 2, 3))
        assert (deviation.diff().abs() < 2 * 0.01 * deviation[0]).all()
        return [float(deviation[-1] / deviation[24])]

    assert ends(0.0)[0] > 1.6
    assert ends(1.0)[0] < 1.15


def test_windows_are_held_without_a_jump(comfy: Comfy) -> None:
    def rising(call: Call) -> Tensor:
        return spread(STEP * (call.start + torch.arange(call.frames)) * SCALE, call)

    model, _ = function_svd(comfy, rising)
    for strength, schedule in itertools.product((0.0, 0.5, 1.0), ("still", "moving")):
        patched = long_model(
            comfy, model, LATENTS, window_length=25, overlap=6, drift_control=strength, window_schedule=schedule
        )
        result = ksampler(comfy, patched, conditions(torch.ones(1, 4, 4, 4)), empty(LATENTS), steps=8, cfg=1.0)
        steps = result.mean((1, 2, 3)).diff()
        assert steps.abs().max() < 2 * STEP
        end = float(steps.sum())
        assert end == pytest.approx(STEP * (12 + (LATENTS - 25) * (1 - strength) + 12), rel=0.02)


def test_levels_of_flat_latents(comfy: Comfy) -> None:
    drift = comfy.pack("nodes.svd.drift")
    flat = torch.ones(3, 4, 3, 5)
    change = drift.Levels(mean=torch.full((1, 4, 1, 1), 2.0), contrast=torch.full((1, 4, 1, 1), 9.0))
    assert torch.equal(drift.moved(flat, change), torch.full((3, 4, 3, 5), 3.0))  # moved, not stretched
    latents = torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(1)) * 3 + 2
    assert torch.allclose(drift.moved(latents, drift.levels(latents).times(0.0)), latents, atol=1e-6)
