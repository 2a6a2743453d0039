"""Measures of seams, flicker and motion."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vae_core
from vae_core.door.loading import DEMO_FOLDER
from vae_core.media.video import read_frames
from vae_core.metrics import (
    Borders,
    FlickerMeter,
    SeamMeter,
    WarpMeter,
    chunk_borders,
    optical_flow,
    tile_borders,
)
from vae_core.metrics.flicker import warp
from vae_core.run.tiling import Overlapping, ReferencePlan

from .clips import moving_picture
from .made_pictures import noise, textured


def seams(ours: Tensor, original: Tensor, borders: Borders, chunk: int = 3) -> SeamMeter:
    meter = SeamMeter(borders)
    for a, b in zip(ours.split(chunk, 2), original.split(chunk, 2), strict=True):
        meter.update(a, b)
    return meter


def test_borders_are_where_tiles_meet() -> None:
    assert tile_borders(Overlapping(tile=64, overlap=0), (100, 130)) == Borders(
        rows=((64, 64),), columns=((64, 64), (128, 128))
    )
    assert tile_borders(Overlapping(tile=64, overlap=16), (64, 100)) == Borders(rows=(), columns=((48, 64),))
    assert chunk_borders(34) == (17, 33)
    assert chunk_borders(17) == ()


def test_noise_without_seams_reads_one() -> None:
    original = torch.zeros(1, 3, 40, 96, 128)
    borders = Borders(rows=((48, 48),), columns=((64, 64),), frames=chunk_borders(40))
    reading = seams(0.2 * noise(*original.shape), original, borders).reading
    assert (reading.line, reading.step, reading.time) == pytest.approx((1, 1, 1), abs=0.06)
    assert reading.heat.shape == (12, 16)
    assert reading.heat.median() == pytest.approx(1, rel=0.1)


def test_a_step_reads_as_its_height() -> None:
    """An error whose neighbours differ by d everywhere and by 5 d at the border."""
    ramp = torch.arange(128.0)
    ramp[64:] += 4
    error = (ramp / 500).expand(1, 3, 2, 96, 128)
    reading = seams(error, torch.zeros_like(error), Borders(columns=((64, 64),))).reading
    assert reading.line == pytest.approx(5, rel=1e-3)
    assert reading.step == pytest.approx(12 / 8, rel=1e-3)
    assert reading.space == pytest.approx(5, rel=1e-3)


def test_a_blended_border_shows_in_the_step() -> None:
    """Two tiles of different brightness, faded over 32 pixels: no line at all, but a step."""
    level = ((torch.arange(256.0) - 112) / 32).clamp(0, 1) * 0.2
    error = level + 0.02 * noise(1, 3, 2, 64, 256)
    borders = Borders(columns=((112, 144),))
    reading = seams(error, torch.zeros_like(error), borders).reading
    assert reading.line < 1.2
    assert reading.step > 10
    flat = seams(0.02 * noise(1, 3, 2, 64, 256), torch.zeros_like(error), borders).reading
    assert flat.step == pytest.approx(1, abs=0.25)


def test_a_chunk_border_reads_as_its_height() -> None:
    """The error moves by 1 each frame and by 3 at frame 17."""
    level = torch.arange(40.0)
    level[17:] += 2
    error = (level / 200).view(1, 1, -1, 1, 1).expand(1, 3, -1, 16, 16)
    reading = seams(error, torch.zeros_like(error), Borders(frames=(17,))).reading
    assert reading.time == pytest.approx(3, rel=1e-3)
    assert math.isnan(reading.space)


def test_pieces_do_not_matter_to_the_seam_meter() -> None:
    original, borders = textured(9, 64, 80), Borders(rows=((32, 40),), columns=((40, 40),), frames=(5,))
    ours = (original + 0.2 * noise(*original.shape)).clamp(-1, 1)
    readings = [seams(ours, original, borders, chunk).reading for chunk in (1, 4, 9)]
    for a, b in itertools.pairwise(readings):
        assert (a.line, a.step, a.time) == pytest.approx((b.line, b.step, b.time), rel=1e-6)
        torch.testing.assert_close(a.heat, b.heat)


def _stock_tiles(decode: Callable[[Tensor], Tensor], latent: Tensor, tile: int, overlap: int) -> Tensor:
    """Tiles with feathered edges, averaged, as samplers' front ends do it."""
    height, width = (8 * n for n in latent.shape[-2:])
    total = torch.zeros(1, 3, 1, height, width)
    weight = torch.zeros(1, 1, 1, height, width)
    stride, feather = tile - overlap, 8 * overlap
    ramp = (torch.arange(8 * tile) + 1.0).clamp(max=feather) / feather
    ramp = torch.minimum(ramp, ramp.flip(0))
    for top in range(0, latent.shape[-2] - overlap, stride):
        for left in range(0, latent.shape[-1] - overlap, stride):
            y0, x0 = min(top, latent.shape[-2] - tile), min(left, latent.shape[-1] - tile)
            part = decode(latent[..., y0 : y0 + tile, x0 : x0 + tile])
            mask = torch.outer(ramp, ramp)
            total[..., 8 * y0 : 8 * (y0 + tile), 8 * x0 : 8 * (x0 + tile)] += part * mask
            weight[..., 8 * y0 : 8 * (y0 + tile), 8 * x0 : 8 * (x0 + tile)] += mask
    return total / weight


def test_stock_tiling_reads_clearly_more_than_whole_frames() -> None:
    """A frame of the bundled clip through the demo CV-VAE: whole, in stock tiles, in the official ones."""
    vae = vae_core.load("demo-cv-vae")
    clip = next(read_frames(DEMO_FOLDER / "demo_clip.mp4", 0, 1))
    latent = vae.encode(clip)
    whole = vae.decode(latent)
    cases = {
        "stock": (_stock_tiles(vae.decode, latent, 16, 4), Overlapping(tile=128, overlap=32)),
        "official": (vae.decode(latent, plan=ReferencePlan(tile_px=144)), ReferencePlan(tile_px=144).pixels),
    }
    for tiled, grid in cases.values():
        borders = tile_borders(grid, (clip.shape[-2], clip.shape[-1]))
        plain, seamed = (seams(result, clip, borders).reading.space for result in (whole, tiled))
        assert 0.75 < plain < 1.3
        assert seamed > 1.5 * plain


# ------------------------------------------------------------------------------------------ flicker and warping


def flicker(ours: Tensor, original: Tensor) -> FlickerMeter:
    meter = FlickerMeter()
    for a, b in zip(ours.split(3, 2), original.split(3, 2), strict=True):
        meter.update(a, b)
    return meter


def test_a_still_clip_does_not_flicker() -> None:
    still = textured(7, 32, 48)
    blurred = F.avg_pool3d(still, (1, 3, 3), stride=1, padding=(0, 1, 1))
    meter = flicker(blurred, still)
    assert meter.flicker == 0
    assert math.isnan(meter.change[0])
    assert meter.change[1:] == meter.excess[1:] == [0.0] * 6
    assert math.isnan(flicker(still[:, :, :1], still[:, :, :1]).flicker)


def test_new_noise_flickers_by_its_size_times_root_two() -> None:
    original = moving_picture(20, 64, 64) * 0.5
    meter = flicker(original + 0.1 * noise(*original.shape), original)
    sigma = 0.1 * 255 / 2
    assert meter.flicker == pytest.approx(math.sqrt(2) * sigma, rel=0.01)
    assert np.nanmean(meter.excess) == pytest.approx(2 * sigma**2, rel=0.05)


def test_blurred_motion_has_less_energy_than_the_original() -> None:
    original = moving_picture(9, 32, 48)
    still = original[:, :, :1].expand_as(original)
    assert np.nanmean(flicker(still, original).excess) < 0


def test_optical_flow_finds_a_shift() -> None:
    pytest.importorskip("cv2")
    picture = (textured(1, 96, 128)[0, :, 0] + 1) * 127.5
    moved = torch.roll(picture, (2, -3), (1, 2))  # down 2, left 3
    flow = optical_flow(picture, moved)[:, 20:-20, 20:-20]
    assert flow.mean((1, 2)).tolist() == pytest.approx([-3, 2], abs=0.3)
    back = warp(moved, optical_flow(picture, moved))
    assert (back - picture)[:, 20:-20, 20:-20].abs().mean() < 2.5


def test_warping_by_whole_pixels_is_a_roll() -> None:
    picture = noise(3, 20, 24)
    flow = torch.tensor([4.0, -3.0]).view(2, 1, 1).expand(2, 20, 24)
    torch.testing.assert_close(
        warp(picture, flow)[:, 3:, :-4], picture.roll((3, -4), (1, 2))[:, 3:, :-4], atol=1e-5, rtol=0
    )


def test_warp_error_sees_noise_beyond_motion() -> None:
    pytest.importorskip("cv2")
    picture = textured(1, 112, 144)[:, :, 0]
    original = torch.stack([picture[..., i : i + 96, 2 * i : 2 * i + 128] for i in range(5)], 2)
    meter = WarpMeter()
    meter.update(original, original)
    ours, theirs = meter.means
    assert ours == theirs
    assert len(meter.ours) == 5
    noisy = WarpMeter()
    noisy.update(original + 0.1 * noise(*original.shape), original)
    sigma = 0.1 * 255 / 2
    assert noisy.means[1] == theirs
    # two frames' noise, of which bilinear warping smooths the older
    assert sigma < noisy.means[0] < math.sqrt(2 * sigma**2 + theirs**2) * 1.1
