"""Exact tiles give what whole frames give: in float64 at borders and inside, and closely in lower precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import vae_core
from vae_core import TilePlan
from vae_core.conv_input import Piece
from vae_core.cv_vae import Statistics
from vae_core.iv_tiles import IVPass
from vae_core.regions import ENLARGE, HALVE_LEFT, HALVE_RIGHT, Region, chain, full, grid, same, split

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
]


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    error = float((got - expected).abs().max() / expected.std())
    assert error <= tolerance, error


@pytest.fixture
def tolerance(family: str) -> float:
    """Largest difference in units of the standard deviation; CV-VAE sums its statistics in another order."""
    return 1e-12 if family == "iv-vae" else 1e-10


@pytest.mark.parametrize(("size", "tile"), LAYOUTS)
def test_decoding_gives_what_whole_frames_give(
    family: str, small_vae: Make, tolerance: float, size: tuple[int, int], tile: Any
) -> None:
    vae = small_vae(family)
    torch.manual_seed(0)
    latent = torch.randn(1, vae.info.latent_channels, 2, *size, dtype=torch.float64)
    close(vae.decode(latent, plan=TilePlan(tile=tile)), vae.decode(latent), tolerance)


@pytest.mark.parametrize(("size", "tile"), LAYOUTS)
def test_encoding_gives_what_whole_frames_give(
    family: str, small_vae: Make, tolerance: float, size: tuple[int, int], tile: Any
) -> None:
    vae = small_vae(family)
    torch.manual_seed(0)
    video = torch.rand(1, 3, 5, 8 * size[0], 8 * size[1], dtype=torch.float64) * 2 - 1
    plan = TilePlan(tile=tile)
    for got, expected in zip(vae.moments(video, plan=plan), vae.moments(video), strict=True):
        close(got, expected, tolerance)


@pytest.mark.parametrize("offload", [False, True])
def test_batches_and_several_chunks(family: str, small_vae: Make, tolerance: float, offload: bool) -> None:
    vae = small_vae(family)
    torch.manual_seed(0)
    video = torch.rand(2, 3, 37, 24, 16, dtype=torch.float64) * 2 - 1
    plan = TilePlan(tile=(2, 1), offload=offload)
    latent = vae.encode(video)
    close(vae.encode(video, plan=plan), latent, tolerance)
    close(vae.decode(latent, plan=plan, frames=35, size=(23, 15)), vae.decode(latent)[:, :, :35, :23, :15], tolerance)


def test_streams_take_a_plan(family: str, small_vae: Make) -> None:
    vae = small_vae(family)
    video = torch.rand(1, 3, 21, 16, 16, dtype=torch.float64)
    plan = TilePlan(tile=1)
    latent = vae.encode(video, plan=plan)
    streamed = torch.cat(list(vae.encode_stream(video.split([2, 19], dim=2), plan=plan)), dim=2)
    assert torch.equal(streamed, latent)
    frames = torch.cat(list(vae.decode_stream(latent.split([5, 1], dim=2), plan=plan)), dim=2)
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


@pytest.mark.parametrize("tile", [0, (3, 0), -1, (2.5, 3), (1, 2, 3)])
def test_a_tile_that_is_none_is_refused(tile: Any) -> None:
    with pytest.raises(ValueError, match=r"at least 1 \(8 pixels\).*tile=32"):
        TilePlan(tile=tile)


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


def test_halos_are_the_ones_of_the_networks(small_vae: Make) -> None:
    """7 latents for the IV-VAE decoder; 29 px left and 36 right for its encoder. One less is not enough: see below."""
    model = small_vae("iv-vae").model
    decoder, encoder = IVPass(model, None, decoding=True), IVPass(model, None, decoding=False)  # type: ignore[arg-type]
    assert chain(decoder.reaches, 1000, (8 * 100, 8 * 110))[0] == (93, 117)
    assert chain(encoder.reaches, 8000, (100, 110))[0] == (800 - 29, 880 + 36)
    assert chain(decoder.reaches, 110, (0, 8 * 110))[0] == (0, 110)
    assert chain(encoder.reaches, 8 * 12, (3, 12))[0] == (0, 96)


REACHES = {
    "3x3": (same(1), lambda: nn.Conv1d(1, 1, 3, padding=1)),
    "nearest x2 and 3x3": (ENLARGE, lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv1d(1, 1, 3, padding=1))),
    "halved, padded right": (
        HALVE_RIGHT,
        lambda: nn.Sequential(nn.ConstantPad1d((0, 1), 0), nn.Conv1d(1, 1, 3, stride=2)),
    ),
    "halved, padded left and right": (HALVE_LEFT, lambda: nn.Conv1d(1, 1, 3, stride=2, padding=1)),
}


@pytest.mark.parametrize("name", list(REACHES))
def test_a_layer_reads_what_its_reach_says_and_no_less(name: str) -> None:
    """Every span of the output comes out of the needed span of the input; of no shorter one."""
    reach, make = REACHES[name]
    torch.manual_seed(0)
    layer, size = make().double().requires_grad_(False), 14
    x = torch.randn(1, 1, size, dtype=torch.float64)
    whole = layer(x)
    spoilt = [layer(_spoilt(x, n)) for n in range(size)]
    for start in range(whole.shape[-1]):
        for stop in range(start + 1, whole.shape[-1] + 1):
            first, last = reach.needed((start, stop), size)
            covered = reach.covered((first, last))
            part = layer(x[..., first:last])[..., start - covered[0] : stop - covered[0]]
            torch.testing.assert_close(part, whole[..., start:stop], rtol=0, atol=1e-14)
            read = [n for n, y in enumerate(spoilt) if not torch.equal(y[..., start:stop], whole[..., start:stop])]
            assert first <= min(read) <= first + (1 if reach == HALVE_LEFT else 0)
            assert max(read) == last - 1


def _spoilt(x: Tensor, at: int) -> Tensor:
    x = x.clone()
    x[..., at] = 9
    return x


# ---------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_pooled_statistics_count_the_difference_between_parts(offset: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 64, 3, 5, 8, dtype=torch.float64) + offset
    x[..., 4:] += 3  # parts with different means
    norm = nn.GroupNorm(32, 64).double().requires_grad_(False)
    norm.weight.normal_()
    norm.bias.normal_()
    statistics = Statistics()
    for part in grid(full((5, 8)), (2, 3)):
        statistics.add(part.of(x))
    got = statistics.input([Piece(None, 0, x)], norm)
    torch.testing.assert_close(got, F.silu(norm(x)), rtol=0, atol=1e-12 if not offset else 1e-8)


def test_statistics_of_half_precision_are_in_single() -> None:
    x = (torch.randn(1, 32, 2, 16, 16) + 100).half()
    statistics = Statistics()
    for part in grid(full((16, 16)), (5, 7)):
        statistics.add(part.of(x))
    assert statistics.mean.dtype == torch.float32
    norm = nn.GroupNorm(32, 32).requires_grad_(False)
    got = statistics.input([Piece(None, 0, x)], norm.half())
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), F.silu(norm.float()(x.float())), rtol=2e-3, atol=2e-3)
