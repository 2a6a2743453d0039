"""Frames from the middle of a clip: those of the whole, and of CV-VAE and image VAEs only their chunks are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vae_core import AnyPlan, BudgetError, TilePlan, VideoVAE
from vae_core.run.snapshots import Snapshots

Make = Callable[..., VideoVAE]


@pytest.mark.parametrize(("start", "stop"), [(0, 21), (3, 7), (16, 18), (17, 21), (20, 21)])
def test_frames_from_the_middle(family: str, small_vae: Make, start: int, stop: int) -> None:
    vae = small_vae(family)
    torch.manual_seed(0)
    latents = 21 if family == "image-vae" else 6
    latent = torch.randn(1, vae.info.latent_channels, latents, 2, 1, dtype=torch.float64)
    whole = vae.decode(latent)
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    got = torch.cat(list(vae.decode_stream(latent, start=start, frames=stop, between=count)), dim=2)
    assert torch.equal(got, whole[:, :, start:stop])
    some, steps = steps, 0
    list(vae.decode_stream(latent, frames=stop, between=count))
    if start > 16 and family != "iv-vae":
        assert some <= 0.6 * steps  # the first chunk of two, or sixteen frames of twenty-one, were left out
    else:
        assert some <= steps


def test_frames_beyond_the_end_are_said(small_vae: Make) -> None:
    vae = small_vae("cv-vae")
    latent = torch.zeros(1, 4, 6, 1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="decode to 21 frames"):
        list(vae.decode_stream(latent, start=18, frames=30))
    assert list(vae.decode_stream(latent, start=40)) == []


def test_a_vae_keeps_within_its_limits(family: str, small_vae: Make) -> None:
    vae = small_vae(family)
    torch.manual_seed(0)
    latent = torch.randn(1, vae.info.latent_channels, 2, 8, 8, dtype=torch.float64)
    whole = vae.decode(latent)
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    list(vae.decode_stream(latent, between=count))
    plain, calls = calls, 0
    vae.within(budget_bytes=int(0.95 * vae.plan_decode(latent.shape).device_bytes))
    got = torch.cat(list(vae.decode_stream(latent, between=count)), dim=2)
    assert calls > plain  # in strips or tiles
    assert (got - whole).abs().max() <= 1e-10 * whole.std()
    vae.within(budget_bytes=2**10)
    with pytest.raises(BudgetError, match="smallest budget in which it can be done exactly is"):
        vae.decode(latent)


@pytest.mark.parametrize("kept_in", [None, TilePlan(tile=2), TilePlan(tile=3, offload=True)])
@pytest.mark.parametrize("read_in", [None, TilePlan(tile=2), TilePlan(tile=(1, 4), offload=True)])
def test_snapshots_let_a_streaming_network_begin_near(small_vae: Make, kept_in: AnyPlan, read_in: AnyPlan) -> None:
    vae, snapshots, steps = small_vae("iv-vae"), Snapshots(every=2), 0
    torch.manual_seed(0)
    latent = torch.randn(1, vae.info.latent_channels, 8, 4, 5, dtype=torch.float64)
    whole = torch.cat(list(vae.decode_stream(latent, plan=kept_in, snapshots=snapshots)), dim=2)
    assert sorted(snapshots.held) == [2, 4, 6, 8]

    def count() -> None:
        nonlocal steps
        steps += 1

    list(vae.decode_stream(latent, plan=read_in, between=count))
    everything, steps = steps, 0
    got = torch.cat(list(vae.decode_stream(latent, start=22, plan=read_in, snapshots=snapshots, between=count)), dim=2)
    assert got.shape[2] == 7
    assert (got - whole[:, :, 22:]).abs().max() <= 1e-12 * whole.std()
    assert 0.2 < steps / everything < 0.3  # two groups of eight: that of frame 22, after a snapshot, and one more


def test_snapshots_are_nothing_where_chunks_stand_alone(small_vae: Make) -> None:
    vae, snapshots = small_vae("cv-vae"), Snapshots(every=1)
    list(vae.decode_stream(torch.zeros(1, 4, 6, 1, 1, dtype=torch.float64), snapshots=snapshots))
    assert not snapshots.held
    with pytest.raises(ValueError, match="every 0 chunks"):
        Snapshots(every=0)


@pytest.mark.parametrize("start", [-1, 2.5, True])
def test_a_start_is_the_number_of_a_frame(small_vae: Make, start: Any) -> None:
    with pytest.raises(ValueError, match="frames are counted from 0"):
        list(small_vae("cv-vae").decode_stream(torch.zeros(1, 4, 2, 1, 1, dtype=torch.float64), start=start))


def test_a_short_clip_needs_only_what_it_takes(family: str, small_vae: Make) -> None:
    vae = small_vae(family)
    latent = torch.randn(1, vae.info.latent_channels, 1, 12, 16, dtype=torch.float64)
    budget = vae.plan_decode(latent.shape).device_bytes + 2**16
    assert torch.equal(vae.within(budget_bytes=budget).decode(latent), vae.within().decode(latent))
    if family == "image-vae":
        return  # whose chunks are frames
    long = latent.expand(-1, -1, 9, -1, -1)
    with pytest.raises(BudgetError, match="would take"):
        vae.within(TilePlan(tile=100), budget_bytes=budget).decode(long)
