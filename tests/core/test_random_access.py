"""Frames from the middle of a clip: those of the whole, and of CV-VAE and image VAEs only their chunks are computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vae_core import BudgetError, VideoVAE

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
    vae.within(budget_bytes=int(0.95 * vae.decode_bytes(8, 8)))
    got = torch.cat(list(vae.decode_stream(latent, between=count)), dim=2)
    assert calls > plain  # in strips or tiles
    assert (got - whole).abs().max() <= 1e-10 * whole.std()
    vae.within(budget_bytes=2**10)
    with pytest.raises(BudgetError, match="smallest budget in which it can be done exactly is"):
        vae.decode(latent)
