"""How a long SVD clip is cut and fused: the pure functions behind SVD Long Video."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from .inprocess import Comfy

FUSES = ["pyramid", "overlap-linear", "random"]


def schedule_of(comfy: Comfy, **changes: Any) -> Any:
    settings = {"length": 25, "overlap": 6, "fuse": "pyramid", "moving": True, "loop": False, **changes}
    return comfy.pack("nodes.svd.schedule").Schedule(**settings)


@pytest.mark.parametrize("fuse", FUSES)
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("moving", [False, True])
def test_every_latent_in_every_step(comfy: Comfy, fuse: str, loop: bool, moving: bool) -> None:
    for latents, overlap, wide in itertools.product((20, 26, 45, 60, 109), (0, 6, 13, 24), (False, True)):
        schedule = schedule_of(comfy, overlap=overlap, fuse=fuse, moving=moving, loop=loop)
        for step in range(6):
            total, seen = torch.zeros(latents), set[int]()
            windows = schedule.windows(latents, step, 7, wide=wide)
            for window in windows:
                assert len(set(window.latents)) == len(window.latents) <= 25
                assert [place % latents for place in window.places] == list(window.latents) or wide
                total[list(window.latents)] += window.weights
                seen.update(window.latents)
            assert seen == set(range(latents))
            assert (total - 1).abs().max() < 1e-5
            assert wide or len(windows) <= schedule.most_windows(latents)


def seams(windows: Any, latents: int) -> torch.Tensor:
    """(latents,) how far the clip changes from window to window between a latent and the next; 1 for a cut."""
    shares = torch.zeros(len(windows), latents)
    for share, window in zip(shares, windows, strict=True):
        share[list(window.latents)] = window.weights
    return (shares.roll(-1, 1) - shares).abs().sum(0) / 2


@pytest.mark.parametrize("fuse", FUSES)
@pytest.mark.parametrize(("latents", "loop"), [(109, False), (60, False), (76, True), (49, True)])
def test_seams_lie_evenly_over_the_steps(comfy: Comfy, fuse: str, latents: int, loop: bool) -> None:
    schedule = schedule_of(comfy, fuse=fuse, loop=loop)
    stride = 19 if not loop else -(-latents // schedule.most_windows(latents))
    rounds = 40 if fuse == "random" else 1  # where cuts lie is drawn
    total = torch.zeros(latents)
    for step, seed in itertools.product(range(stride), range(rounds)):
        total += seams(schedule.windows(latents, step, seed), latents) / stride / rounds
    within = total if loop else total[6:-7]  # a latent near an end has no second window
    assert float(within.max()) < 1.45 * float(within.mean())
    assert float(within.min()) > 0.5 * float(within.mean())
    still = schedule_of(comfy, fuse=fuse, loop=loop, moving=False)
    assert float(seams(still.windows(latents, 0, 0), latents).max()) > 1.45 * float(within.mean())


def test_wide_windows_span_twice_the_time(comfy: Comfy) -> None:
    windows = schedule_of(comfy, moving=False).windows(49, 0, 0, wide=True)
    assert [window.latents for window in windows] == [tuple(range(0, 49, 2)), tuple(range(1, 49, 2))]
    assert [window.places for window in windows] == [window.latents for window in windows]


def test_a_random_cut_gives_each_latent_to_one_window(comfy: Comfy) -> None:
    cuts = set()
    for step in range(20):
        schedule = schedule_of(comfy, fuse="random", moving=False)
        first, second = schedule.windows(44, step, 3)
        assert set(first.weights.tolist()) | set(second.weights.tolist()) == {0.0, 1.0}
        cuts.add(int(first.weights.sum()))
        again = schedule.windows(44, step, 3)
        assert torch.equal(first.weights, again[0].weights)
    assert cuts == set(range(19, 26))  # anywhere in the overlap of six
    other = [
        int(schedule_of(comfy, fuse="random", moving=False).windows(44, step, 4)[0].weights.sum()) for step in range(20)
    ]
    ours = [
        int(schedule_of(comfy, fuse="random", moving=False).windows(44, step, 3)[0].weights.sum()) for step in range(20)
    ]
    assert ours != other


def test_a_cross_fade_is_gentle(comfy: Comfy) -> None:
    for fuse, most in (("pyramid", 0.15), ("overlap-linear", 0.15)):
        first, second = schedule_of(comfy, fuse=fuse, moving=False).windows(44, 0, 0)
        shares = torch.zeros(44)
        shares[list(first.latents)] = first.weights
        assert float(shares.diff().abs().max()) < most, fuse
        assert second.weights[-1] == 1


def test_spans(comfy: Comfy) -> None:
    plan = comfy.pack("nodes.svd.windows")

    def spans(latents: int, overlap: int, first: int = 0) -> list[tuple[int, int, int]]:
        return [(s.start, s.stop, s.known) for s in plan.plan_spans(latents, 25, overlap, first)]

    assert spans(45, 6) == [(0, 25, 0), (10, 35, 15), (20, 45, 15)]
    assert spans(44, 6) == [(0, 25, 0), (19, 44, 6)]
    assert spans(25, 6) == [(0, 25, 0)]
    assert spans(50, 4) == [(0, 25, 0), (13, 38, 12), (25, 50, 13)]
    assert spans(70, 4, 20) == [(20, 45, 0), (33, 58, 12), (45, 70, 13)]
    for latents, overlap in itertools.product(range(26, 200), (0, 1, 4, 13, 24)):
        found = plan.plan_spans(latents, 25, overlap)
        assert found[0].start == 0
        assert found[-1].stop == latents
        assert all(span.length == 25 for span in found)
        assert all(span.known >= overlap for span in found[1:])
        assert len(found) == plan.count_spans(latents, 25, overlap)
        assert plan.most_latents(len(found) - 1, 25, overlap) < latents <= plan.most_latents(len(found), 25, overlap)
        gaps = [after.start - before.start for before, after in itertools.pairwise(found)]
        assert max(gaps) - min(gaps) <= 1


def test_carry_mask(comfy: Comfy) -> None:
    plan = comfy.pack("nodes.svd.windows")
    assert plan.carry_mask(8, 4, 2).tolist() == pytest.approx([0, 0, 1 / 3, 2 / 3, 1, 1, 1, 1])


@pytest.mark.parametrize("latents", [20, 21, 29])
def test_shuffled_noise(comfy: Comfy, latents: int) -> None:
    plan = comfy.pack("nodes.svd.windows")
    noise = torch.arange(float(latents)).reshape(latents, 1, 1, 1)
    kept, spans = noise.clone(), plan.plan_spans(latents, 8, 2)
    shuffled = plan.repeat_noise(noise, spans, 7)
    assert torch.equal(noise, kept)
    assert torch.equal(shuffled, plan.repeat_noise(noise, spans, 7))
    assert not torch.equal(shuffled, plan.repeat_noise(noise, spans, 8))
    assert torch.equal(shuffled[:8], noise[:8])
    for span in spans:  # every window has the noise of the first
        assert sorted(shuffled[span.start : span.stop].flatten().tolist()) == list(range(8))
