"""How a long SVD clip is cut and fused: the pure functions behind SVD Long Video."""

from __future__ import annotations

import pytest
import torch

from .inprocess import Comfy

FUSES = ["pyramid", "linear", "overlap-linear"]


@pytest.mark.parametrize("fuse", FUSES)
@pytest.mark.parametrize(
    ("latents", "length", "overlap"), [(20, 8, 2), (21, 8, 2), (100, 25, 6), (9, 8, 7), (50, 25, 0)]
)
def test_weights(comfy: Comfy, fuse: str, latents: int, length: int, overlap: int) -> None:
    plan = comfy.pack("nodes.svd.windows")
    spans = plan.plan_spans(latents, length, overlap)
    assert all(span.length == length for span in spans)
    assert spans[-1].stop == latents
    total = torch.zeros(latents)
    for span, weight in zip(spans, plan.fusing_weights(spans, fuse), strict=True):
        assert (weight > 0).all()
        total[span.start : span.stop] += weight
    assert (total - 1).abs().max() < 1e-6


def test_spans(comfy: Comfy) -> None:
    plan = comfy.pack("nodes.svd.windows")
    assert [(s.start, s.stop, s.known) for s in plan.plan_spans(45, 25, 6)] == [(0, 25, 0), (19, 44, 6), (20, 45, 24)]
    assert [(s.start, s.stop, s.known) for s in plan.plan_spans(25, 25, 6)] == [(0, 25, 0)]
    assert plan.carry_mask(8, 4, 2).tolist() == pytest.approx([0, 0, 1 / 3, 2 / 3, 1, 1, 1, 1])


def test_shuffled_noise(comfy: Comfy) -> None:
    plan = comfy.pack("nodes.svd.windows")
    noise = torch.arange(20.0).reshape(20, 1, 1, 1)
    kept = noise.clone()
    shuffled = plan.repeat_noise(noise, 8, 2, 7)
    assert torch.equal(noise, kept)
    assert torch.equal(shuffled, plan.repeat_noise(noise, 8, 2, 7))
    assert not torch.equal(shuffled, plan.repeat_noise(noise, 8, 2, 8))
    assert torch.equal(shuffled[:8], noise[:8])
    for start in (6, 12):  # every window has the noise of the first
        assert sorted(shuffled[start : start + 8].flatten().tolist()) == list(range(8))


def test_statistics(comfy: Comfy) -> None:
    plan = comfy.pack("nodes.svd.windows")
    latents = torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(1)) * 3 + 2
    want = torch.zeros(1, 4, 1, 1), torch.ones(1, 4, 1, 1)
    have = plan.statistics(latents)
    mean, deviation = plan.statistics(plan.match_statistics(latents, have, want, 1.0))
    assert mean.abs().max() < 1e-6
    assert (deviation - 1).abs().max() < 1e-6
    assert torch.equal(plan.match_statistics(latents, have, want, 0.0), latents)
    spans = plan.plan_spans(6, 3, 0)
    even = plan.even_out(latents, spans, plan.fusing_weights(spans, "linear"), 1.0)
    assert torch.equal(even[:3], latents[:3])
    for one, other in zip(plan.statistics(even[3:]), plan.statistics(latents[:3]), strict=True):
        assert (one - other).abs().max() < 1e-6
    flat = plan.match_statistics(torch.ones(2, 4, 3, 5), plan.statistics(torch.ones(2, 4, 3, 5)), want, 1.0)
    assert torch.equal(flat, torch.zeros(2, 4, 3, 5))  # moved, not stretched
