"""Strips: whole frames step by step; what waits lies on the device, in RAM or nowhere, and the result is the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vae_core import StripPlan, TilePlan, VideoVAE
from vae_core.run import ram, tiling

Make = Callable[..., VideoVAE]
TOLERANCE = 1e-12
WAITING = ["cv-vae", "cv-vae-sd3", "image-vae"]


@pytest.fixture(autouse=True)
def small_things_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips and blocks as large frames have them."""
    monkeypatch.setattr(tiling, "LEAST_ROWS", 1)
    monkeypatch.setattr(ram, "BLOCK", 5000)


def clip(vae: VideoVAE, decoding: bool, *, chunks: int = 1, batch: int = 1) -> Tensor:
    torch.manual_seed(0)
    latents = chunks if vae.family == "image-vae" else 4 * chunks - 2
    if decoding:
        return torch.randn(batch, vae.info.latent_channels, latents, 5, 1, dtype=torch.float64)
    return torch.rand(batch, 3, vae.info.compression.pixel_frames(latents), 40, 8, dtype=torch.float64) * 2 - 1


def run(vae: VideoVAE, x: Tensor, decoding: bool, plan: StripPlan | TilePlan | None) -> Tensor:
    return vae.decode(x, plan=plan) if decoding else vae.encode(x, plan=plan)


@pytest.mark.parametrize("decoding", [True, False], ids=["decode", "encode"])
@pytest.mark.parametrize("again", [0, 1, 3])
@pytest.mark.parametrize("room", [None, 0, 10_000, 120_000], ids=["device", "ram", "little", "some"])
@pytest.mark.parametrize("family", WAITING)
def test_strips_give_what_whole_frames_give(
    family: str, small_vae: Make, decoding: bool, again: int, room: int | None
) -> None:
    vae = small_vae(family)
    x = clip(vae, decoding, chunks=2 if room == 0 else 1, batch=2 if room == 10_000 else 1)
    got = run(vae, x, decoding, StripPlan(strips=4, room=room, again=again))
    expected = run(vae, x, decoding, None)
    assert (got - expected).abs().max() <= TOLERANCE * expected.std()


@pytest.mark.parametrize("resident", [0, 20_000, 10**9])
@pytest.mark.parametrize("decoding", [True, False], ids=["decode", "encode"])
def test_tiles_keep_some_on_the_device(family: str, small_vae: Make, decoding: bool, resident: int) -> None:
    vae = small_vae(family)
    x = clip(vae, decoding, chunks=2)
    got = run(vae, x, decoding, TilePlan(tile=(2, 1), offload=True, resident=resident))
    expected = run(vae, x, decoding, None)
    assert (got - expected).abs().max() <= TOLERANCE * expected.std()


def test_strips_are_refused_where_nothing_waits(small_vae: Make) -> None:
    vae = small_vae("iv-vae")
    with pytest.raises(ValueError, match=r"those of iv-vae do not. Give a TilePlan"):
        vae.decode(clip(vae, True), plan=StripPlan(strips=2))
    with pytest.raises(ValueError, match="at least one strip"):
        StripPlan(strips=0)
