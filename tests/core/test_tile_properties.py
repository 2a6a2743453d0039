"""Exact tiles of any shape, for clips of any length and size, against whole frames."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import vae_core
from vae_core import TilePlan

# Largest difference in units of the standard deviation
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

CASES = pytest.mark.parametrize(
    ("dtype", "smallest", "examples"),
    # in frames of a latent or two a GroupNorm has a handful of values, and blows up their rounding in float32
    [(torch.float64, 1, 4), (torch.float32, 21, 2)],
    ids=["float64", "float32"],
)
lengths = st.integers(1, 7)  # frames: whole latents and not; the examples given outright have two chunks
tiles = st.builds(TilePlan, tile=st.tuples(st.integers(1, 4), st.integers(1, 4)), offload=st.booleans())


def sizes(smallest: int) -> st.SearchStrategy[tuple[int, int]]:
    """(height, width) in pixels, multiples of 8 or not."""
    return st.tuples(st.integers(smallest, 28), st.integers(smallest, 28))


def difference(got: Tensor, expected: Tensor) -> float:
    """Largest, in units of the standard deviation."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    return float((got - expected).abs().max() / expected.std())


@CASES
def test_any_tiles_decode_any_clip_as_whole_frames_do(
    family: str, small_vae: Callable[..., vae_core.VideoVAE], dtype: torch.dtype, smallest: int, examples: int
) -> None:
    vae = small_vae(family, dtype)

    @settings(deadline=None, derandomize=True, database=None, max_examples=examples)
    @given(frames=lengths, size=sizes(smallest), plan=tiles, batch=st.integers(1, 2))
    @example(frames=18, size=(25, 15), plan=TilePlan(tile=(3, 1), offload=True), batch=1)
    def check(frames: int, size: tuple[int, int], plan: TilePlan, batch: int) -> None:
        torch.manual_seed(frames)
        shape = vae.info.compression.latent_frames(frames), *(-(-side // 8) for side in size)
        latent = torch.randn(batch, vae.info.latent_channels, *shape, dtype=dtype)
        whole = vae.decode(latent, frames=frames, size=size)
        assert whole.shape == (batch, 3, frames, *size)
        assert difference(vae.decode(latent, frames=frames, size=size, plan=plan), whole) <= TOLERANCE[dtype]

    check()


@CASES
def test_any_tiles_encode_any_clip_as_whole_frames_do(
    family: str, small_vae: Callable[..., vae_core.VideoVAE], dtype: torch.dtype, smallest: int, examples: int
) -> None:
    vae = small_vae(family, dtype)

    @settings(deadline=None, derandomize=True, database=None, max_examples=examples)
    @given(frames=lengths, size=sizes(smallest), plan=tiles, batch=st.integers(1, 2))
    @example(frames=18, size=(15, 25), plan=TilePlan(tile=(1, 3), offload=True), batch=1)
    def check(frames: int, size: tuple[int, int], plan: TilePlan, batch: int) -> None:
        torch.manual_seed(frames)
        video = torch.rand(batch, 3, frames, *size, dtype=dtype) * 2 - 1
        both = zip(vae.moments(video, pad=True, plan=plan), vae.moments(video, pad=True), strict=True)
        for got, whole in both:
            assert difference(got, whole) <= TOLERANCE[dtype]

    check()
