"""Exact tiles give what whole frames give: in float64 at borders and inside, and closely in lower precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import vae_core
from vae_core import TilePlan
from vae_core.nn.region import (
    ENLARGE,
    HALVE_BOTH,
    HALVE_RIGHT,
    NEIGHBOURS,
    Reach,
    Region,
    chain,
    grid,
    sizes,
    split,
)
from vae_core.run import executor

Make = Callable[..., vae_core.VideoVAE]

# (height, width) of a frame in latents, tile: odd counts, rests, single latents, tiles larger than the frame
LAYOUTS: list[tuple[tuple[int, int], Any]] = [
    ((5, 7), 2),
    ((4, 9), 4),
    ((3, 3), 1),
    ((17, 2), (8, 1)),
    ((2, 17), 16),
    ((2, 3), 50),
    ((1, 40), (1, 13)),
    ((33, 1), (11, 1)),
    ((7, 5), (3, None)),
]


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    error = float((got - expected).abs().max() / expected.std())
    assert error <= tolerance, error


TOLERANCE = 1e-12


@pytest.mark.parametrize(("size", "tile"), LAYOUTS)
def test_decoding_gives_what_whole_frames_give(family: str, small_vae: Make, size: tuple[int, int], tile: Any) -> None:
    vae = small_vae(family)
    torch.manual_seed(0)
    latent = torch.randn(1, vae.info.latent_channels, 2, *size, dtype=torch.float64)
    close(vae.decode(latent, plan=TilePlan(tile=tile)), vae.decode(latent), TOLERANCE)


@pytest.mark.parametrize(("size", "tile"), LAYOUTS)
def test_encoding_gives_what_whole_frames_give(family: str, small_vae: Make, size: tuple[int, int], tile: Any) -> None:
    vae = small_vae(family)
    torch.manual_seed(0)
    video = torch.rand(1, 3, 5, 8 * size[0], 8 * size[1], dtype=torch.float64) * 2 - 1
    plan = TilePlan(tile=tile)
    for got, expected in zip(vae.moments(video, plan=plan), vae.moments(video), strict=True):
        close(got, expected, TOLERANCE)


@pytest.mark.parametrize("offload", [False, True])
def test_batches_and_several_chunks(family: str, small_vae: Make, offload: bool) -> None:
    vae = small_vae(family)
    torch.manual_seed(0)
    video = torch.rand(2, 3, 37, 24, 16, dtype=torch.float64) * 2 - 1
    plan = TilePlan(tile=(2, 1), offload=offload)
    latent = vae.encode(video)
    close(vae.encode(video, plan=plan), latent, TOLERANCE)
    close(vae.decode(latent, plan=plan, frames=35, size=(23, 15)), vae.decode(latent)[:, :, :35, :23, :15], TOLERANCE)


def test_streams_take_a_plan(family: str, small_vae: Make) -> None:
    vae = small_vae(family)
    video = torch.rand(1, 3, 21, 16, 16, dtype=torch.float64)
    plan = TilePlan(tile=1)
    latent = vae.encode(video, plan=plan)
    streamed = torch.cat(list(vae.encode_stream(video.split([2, 19], dim=2), plan=plan)), dim=2)
    assert torch.equal(streamed, latent)
    frames = torch.cat(list(vae.decode_stream(latent.split([5, latent.shape[2] - 5], dim=2), plan=plan)), dim=2)
    assert torch.equal(frames, vae.decode(latent, plan=plan))


def test_half_precision_stays_close(family: str, small_vae: Make) -> None:
    vae = small_vae(family, torch.bfloat16)
    torch.manual_seed(0)
    video = (torch.rand(1, 3, 9, 24, 32) * 2 - 1).to(torch.bfloat16)
    plan = TilePlan(tile=2)
    latent = vae.encode(video)
    close(vae.encode(video, plan=plan), latent, 0.1)
    close(vae.decode(latent, plan=plan), vae.decode(latent), 0.1)


def test_tiles_are_not_the_official_ones(small_vae: Make) -> None:
    """Exact tiles leave no trace where the official ones do."""
    vae = small_vae("cv-vae")
    torch.manual_seed(0)
    latent = torch.randn(1, 4, 2, 4, 12, dtype=torch.float64)
    whole = vae.decode(latent)
    official = vae.decode(latent, plan=vae_core.ReferencePlan(64, 0.25))
    assert (official - whole).abs().max() > 0.01 * whole.std()


def test_a_graph_is_refused_with_the_way_out(family: str, small_vae: Make) -> None:
    vae = small_vae(family)
    latent = torch.rand(1, vae.info.latent_channels, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"keep nothing for gradients.*torch\.no_grad"):
        vae.decode(latent, plan=TilePlan(tile=1))
    with torch.no_grad():
        vae.decode(latent, plan=TilePlan(tile=1))
    with torch.inference_mode():
        got = vae.decode(latent, plan=TilePlan(tile=1))
        close(got, vae.decode(latent), 1e-10)


@pytest.mark.parametrize("tile", [0, (3, 0), -1, (2.5, 3), (1, 2, 3), 8.0, None, True, (None, 3), (8.0, None), "8"])
def test_a_tile_that_is_none_is_refused(tile: Any) -> None:
    with pytest.raises(ValueError, match=r"at least 1 \(8 pixels\).*tile=32"):
        TilePlan(tile=tile)


def test_a_tile_may_be_a_list() -> None:
    assert TilePlan(tile=[3, 4]) == TilePlan(tile=(3, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("plan", ["tiles", 16, object()])
def test_a_plan_that_is_none_is_refused(small_vae: Make, plan: Any) -> None:
    vae = small_vae("cv-vae")
    latent = torch.zeros(1, 4, 1, 2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"needed is a TilePlan, .* give `\.tiles`"):
        vae.decode(latent, plan=plan)
    with pytest.raises(ValueError, match="The plan is a Plan; needed"):
        vae.decode(latent, plan=vae.plan_decode(latent.shape))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- regions


@given(st.integers(1, 200), st.integers(1, 60), st.integers(0, 50))
def test_a_split_covers_everything_once_in_few_parts(size: int, tile: int, start: int) -> None:
    spans = split((start, start + size), tile)
    assert [n for span in spans for n in range(*span)] == list(range(start, start + size))
    lengths = [stop - first for first, stop in spans]
    assert max(lengths) <= tile
    assert max(lengths) - min(lengths) <= 1
    assert len(spans) == -(-size // tile)


def test_a_grid_covers_a_part_of_a_frame_once() -> None:
    seen = torch.zeros(9, 11)
    for tile in grid(Region(rows=(2, 9), columns=(0, 5)), (3, 2)):
        tile.of(seen).add_(1)
    assert torch.equal(seen[2:9, :5], torch.ones(7, 5))
    assert seen.sum() == 35


def reach_of(vae: vae_core.VideoVAE, direction: str, size: int, out: tuple[int, int]) -> tuple[int, int]:
    """What the last segment, where tiles go through all steps in a row, reads of a square frame of `size`."""
    last = executor.segments(vae.model.steps(direction), (size, size))[0 if direction == "encode" else -1]  # type: ignore[arg-type]
    reaches = [step.reach for step in last.steps]
    return chain(reaches, last.sizes[0], Region(rows=out, columns=out))[0].rows


def test_halos_are_the_ones_of_the_networks(small_vae: Make) -> None:
    """7 latents for the IV-VAE decoder; 29 px left and 36 right for its encoder. One less is not enough: see below."""
    vae = small_vae("iv-vae")
    assert reach_of(vae, "decode", 1000, (8 * 100, 8 * 110)) == (93, 117)
    assert reach_of(vae, "encode", 8000, (100, 110)) == (800 - 29, 880 + 36)
    assert reach_of(vae, "decode", 110, (0, 8 * 110)) == (0, 110)
    assert reach_of(vae, "encode", 8 * 12, (3, 12)) == (0, 96)


REACHES = {
    "3x3": NEIGHBOURS,
    "nearest x2 and 3x3": ENLARGE,
    "halved, padded right": HALVE_RIGHT,
    "halved, padded left and right": HALVE_BOTH,
}


@pytest.mark.parametrize("name", list(REACHES))
def test_a_layer_reads_what_its_reach_says_and_no_less(name: str) -> None:
    """Every span of the output comes out of the needed span of the input; of no shorter one."""
    reach = REACHES[name]
    torch.manual_seed(0)
    kernel, size = torch.randn(1, 1, 3, dtype=torch.float64), 14
    x = torch.randn(1, 1, size, dtype=torch.float64)

    def layer(x: Tensor, *, left: bool = True, right: bool = True) -> Tensor:
        """It pads only where the frame ends."""
        x = x.repeat_interleave(reach.zoom, dim=2)
        padded = nn.functional.pad(x, (reach.before * left, min(reach.after, 1) * right))
        return nn.functional.conv1d(padded, kernel, stride=reach.stride)

    whole = layer(x)
    assert whole.shape[2] == reach.size(size)
    spoilt = [layer(_spoilt(x, n)) for n in range(size)]
    for start in range(whole.shape[-1]):
        for stop in range(start + 1, whole.shape[-1] + 1):
            first, last = reach.needed((start, stop), size)
            given = reach.given((first, last), size)
            y = layer(x[..., first:last], left=first == 0, right=last == size)
            assert given[1] - given[0] == y.shape[2]
            torch.testing.assert_close(y, whole[..., slice(*given)], rtol=0, atol=1e-14)
            assert given[0] <= start
            assert stop <= given[1]
            read = [n for n, y in enumerate(spoilt) if not torch.equal(y[..., start:stop], whole[..., start:stop])]
            assert (first, last - 1) == (min(read), max(read))


def _spoilt(x: Tensor, at: int) -> Tensor:
    x = x.clone()
    x[..., at] = 9
    return x


def test_sizes_follow_the_reaches() -> None:
    assert sizes([ENLARGE, NEIGHBOURS, HALVE_BOTH, Reach()], (3, 5)) == [(3, 5), (6, 10), (6, 10), (3, 5), (3, 5)]


@pytest.mark.parametrize("offload", [False, True])
def test_tiles_in_autocast_are_the_same(family: str, small_vae: Make, offload: bool) -> None:
    """Whatever a caller wraps a call in: layers get the types that they are given."""
    vae = small_vae(family, torch.float32)
    torch.manual_seed(0)
    video = torch.rand(1, 3, 9, 16, 24) * 2 - 1
    for plan in (None, TilePlan(tile=1, offload=offload)):
        latent = vae.encode(video, plan=plan)
        frames = vae.decode(latent, plan=plan)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(vae.encode(video, plan=plan), latent)
            assert torch.equal(vae.decode(latent, plan=plan), frames)
