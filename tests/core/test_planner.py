"""The model of memory against real runs of the networks, and the choice of plans."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from vae_core import BudgetError, Plan, ReferencePlan, StripPlan, TilePlan, VideoVAE
from vae_core.families import DIRECTIONS, FAMILIES
from vae_core.nn import norm
from vae_core.nn.operators import attention
from vae_core.plan.footprint import footprint, meta_network
from vae_core.plan.planner import LEAST_MEASURED, MARGIN, SLACK, measured_margin
from vae_core.plan.prediction import predict
from vae_core.plan.profile import Profile
from vae_core.run import segments

from ..conftest import network_of
from .full_size import FULL, full_size, latent_shape
from .meta_profile import MetaProfile

GIB = 2**30
SHAPE = (25, 90, 160)  # 97 frames of 720x1280


@pytest.fixture
def full_vae(family: str) -> VideoVAE:
    """A model of the published widths, without data; as if on a GPU."""
    return full_size(FULL[family])


def forget() -> None:
    """What was found out before."""
    for found in (predict, footprint, meta_network):
        found.cache_clear()


# ---------------------------------------------------------------------------------------------------- profiler


def test_the_profiler_counts_what_lives_at_one_time() -> None:
    with Profile() as profile:
        a = torch.empty(1000, device="meta")
        b = a + 1  # 8000
        del a
        c = b.view(10, 100) * 2  # 8000 again
        c.mul_(3)
        d = c[:5]
        del b, c
        e = torch.empty(400, device="meta")  # 4000, which `d` keeps, and 1600
        del d, e
    assert profile.device.peak == 8000
    assert profile.host.peak == 0


def test_the_profiler_counts_ram_apart() -> None:
    with Profile() as profile:
        x = torch.empty(100, device="meta")
        with profile.on_host():
            kept = torch.empty(5000, device="meta")
        kept[:100].copy_(x)
        back = kept[:100].clone()
        del back
    assert profile.host.peak == 20000
    assert profile.device.peak == 800


def test_attention_is_counted_without_a_table_of_scores() -> None:
    q = torch.empty(1, 1, 4096, 64, device="meta")
    with Profile() as profile:
        attention(q[0], q[0], q[0], plain=False)
    assert profile.device.peak == 4 * q.numel()
    assert profile.flops == 4 * 4096 * 4096 * 64


@pytest.mark.parametrize(
    "mode", [nullcontext, torch.inference_mode, torch.no_grad], ids=["plain", "inference", "no_grad"]
)
def test_a_prediction_does_not_depend_on_the_mode_of_the_caller(family: str, mode: Callable[[], Any]) -> None:
    forget()
    with mode():
        vae = full_size(FULL[family])
        got = vae.decode_bytes(30, 20), vae.encode_bytes(240, 160, plan=TilePlan(tile=8))
    forget()
    vae = full_size(FULL[family])
    assert got == (vae.decode_bytes(30, 20), vae.encode_bytes(240, 160, plan=TilePlan(tile=8)))


# ---------------------------------------------------------------------------------------------------- prediction


def counted(vae: VideoVAE, shape: tuple[int, ...], decoding: bool, plan: Any) -> int:
    """Peak of a real stream on the meta device, counted by the other profiler, all tiles and chunks run."""
    x = torch.empty(shape, dtype=vae.dtype, device="meta")
    with MetaProfile([x, *vae.model.parameters()]) as profile:
        stream = vae.decode_stream(x, plan=plan) if decoding else vae.encode_stream([x], plan=plan)
        for chunk in stream:
            del chunk
    return profile.peak_bytes


@pytest.mark.parametrize("plan", [None, TilePlan(tile=28), TilePlan(tile=(16, 30))], ids=["whole", "28", "16x30"])
@pytest.mark.parametrize("decoding", [True, False], ids=["decode", "encode"])
def test_the_prediction_is_what_a_run_needs(full_vae: VideoVAE, plan: Any, decoding: bool) -> None:
    """Arithmetic against a stream that runs all tiles, over several chunks."""
    shape = latent_shape(full_vae, 6, 48, 56) if decoding else (1, 3, 21, 384, 448)
    described = full_vae.describe_plan(plan, shape, "decode" if decoding else "encode")
    predicted = described.device_bytes / MARGIN
    real = counted(full_vae, shape, decoding, plan)
    assert real <= 1.01 * predicted
    assert predicted <= 1.07 * real


@pytest.mark.parametrize("plan", [None, TilePlan(tile=8)], ids=["whole", "8"])
def test_the_promise_holds_for_real_tensors(
    family: str, small_vae: Callable[..., VideoVAE], plan: TilePlan | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With data, on the CPU, every tile of every chunk of a stream: live tensors are within 10 % of the prediction."""
    monkeypatch.setattr(norm, "CPU_SLAB", 2**12)  # what norms hold in between is small against real frames only
    vae = small_vae(family, torch.float32)
    channels, latents, size = vae.info.latent_channels, 6, (9, 10)
    predicted = vae.describe_plan(plan, (1, channels, latents, *size), "decode").device_bytes / MARGIN
    clips = (torch.zeros(1, channels, 1, *size) for _ in range(latents))
    with Profile() as profile:
        frames = sum(chunk.shape[2] for chunk in vae.decode_stream(clips, plan=plan))
    assert frames == vae.info.compression.pixel_frames(latents)
    assert profile.device.peak == pytest.approx(predicted, rel=0.1)


def test_ram_is_counted_for_what_waits_there(full_vae: VideoVAE) -> None:
    shape = latent_shape(full_vae)
    kept = full_vae.describe_plan(TilePlan(tile=32), shape, "decode")
    moved = full_vae.describe_plan(TilePlan(tile=32, offload=True), shape, "decode")
    result = 2 * 3 * full_vae.info.compression.pixel_frames(SHAPE[0]) * 720 * 1280
    assert kept.host_bytes == 0
    assert kept.result_bytes == moved.result_bytes == result
    assert moved.host_bytes > 0.6 * GIB
    assert moved.device_bytes < 0.8 * kept.device_bytes
    # what leaves the device is what RAM takes
    left = (kept.device_bytes - moved.device_bytes) / MARGIN
    assert left == pytest.approx(moved.host_bytes, rel=0.25)


def test_bytes_follow_size_dtype_length_and_plan(full_vae: VideoVAE) -> None:
    whole = full_vae.decode_bytes(45, 80)
    # larger frames run in strips, which need less
    assert 1.1 * whole <= full_vae.decode_bytes(90, 80) <= 2.01 * whole
    assert 1.1 * whole <= full_vae.decode_bytes(45, 80, dtype=torch.float32) <= 2.01 * whole
    alone = 0.6 if full_vae.info.time_compression > 1 else 1
    assert full_vae.decode_bytes(45, 80, frames=1) <= alone * whole
    assert full_vae.decode_bytes(45, 80, frames=1001) == whole
    assert full_vae.decode_bytes(45, 80, plan=TilePlan(tile=16)) < 0.92 * whole
    assert full_vae.decode_bytes(45, 80, plan=TilePlan(tile=16, offload=True)) < 0.6 * whole
    assert full_vae.encode_bytes(360, 640) < 1.1 * whole
    assert full_vae.encode_bytes(353, 640) == full_vae.encode_bytes(360, 640)


@pytest.mark.parametrize("above", [2**62, 0], ids=["never in strips", "always in strips"])
def test_bytes_are_in_proportion_where_layers_run_one_way(
    full_vae: VideoVAE, above: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the rows, or twice the bytes of a number: twice the memory."""
    monkeypatch.setattr(segments, "STRIPS_ABOVE", above)
    predict.cache_clear()
    whole, taller = full_vae.decode_bytes(45, 80), full_vae.decode_bytes(90, 80)
    wider = full_vae.decode_bytes(45, 80, dtype=torch.float32)
    predict.cache_clear()
    assert taller == pytest.approx(2 * whole, rel=0.04)
    assert wider == pytest.approx(2 * whole, rel=0.04)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_plan_for_a_new_size_takes_half_a_second_at_most(full_vae: VideoVAE, direction: str) -> None:
    """Processor time; the network is known, its size is not."""

    def plan(height: int, width: int) -> float:
        begun = time.process_time()
        if direction == "decode":
            full_vae.plan_decode(latent_shape(full_vae, 25, height, width), budget_bytes=2 * GIB)
        else:
            full_vae.plan_encode((1, 3, 97, 8 * height, 8 * width), budget_bytes=2 * GIB)
        return time.process_time() - begun

    plan(61, 107)
    assert min(plan(90, 160), plan(91, 161), plan(135, 240)) <= 0.5


# ---------------------------------------------------------------------------------------------------- planning


def test_plans_get_smaller_with_the_budget(full_vae: VideoVAE) -> None:
    shape = latent_shape(full_vae)
    whole = full_vae.decode_bytes(*shape[3:])
    budgets = [64 * GIB, *(int(share * whole) for share in (1, 0.9, 0.7, 0.5, 0.3))]
    plans = [full_vae.plan_decode(shape, budget_bytes=budget) for budget in budgets]
    assert all(plan.fits and plan.exact for plan in plans)
    assert all(plan.device_bytes <= budget for plan, budget in zip(plans, budgets, strict=True))
    needs = [plan.device_bytes for plan in plans]
    assert needs == sorted(needs, reverse=True)
    assert plans[1].tiles is None
    assert all(plan.tile_count > 1 for plan in plans[2:])


def test_a_measured_margin_takes_the_place_of_the_usual_one(full_vae: VideoVAE) -> None:
    """A plan made for a device that takes twice the live tensors keeps within the budget at that rate."""
    shape = latent_shape(full_vae)
    budget = full_vae.decode_bytes(*shape[3:])
    usual = full_vae.plan_decode(shape, budget_bytes=budget)
    margin = measured_margin(2 * usual.working_bytes, usual)
    assert margin == SLACK * 2
    plan = full_vae.plan_decode(shape, budget_bytes=budget, margin=margin)
    assert plan.fits
    assert plan.device_bytes <= budget
    assert plan.tiles != usual.tiles
    assert plan.device_bytes == pytest.approx(plan.waiting_bytes + margin * plan.working_bytes, rel=1e-6)


def test_a_margin_is_never_below_the_live_tensors_nor_from_small_chunks(full_vae: VideoVAE) -> None:
    plan = full_vae.plan_decode(latent_shape(full_vae))
    assert measured_margin(plan.working_bytes // 2, plan) == SLACK
    assert measured_margin(10 * plan.working_bytes, plan) == pytest.approx(10 * SLACK)
    small = replace(plan, working_bytes=LEAST_MEASURED - 1)
    assert measured_margin(10 * LEAST_MEASURED, small) is None
    waiting = replace(plan, waiting_bytes=GIB)
    assert measured_margin(GIB + plan.working_bytes, waiting) == SLACK


def test_a_budget_that_nothing_fits_is_said(full_vae: VideoVAE) -> None:
    plan = full_vae.plan_decode(latent_shape(full_vae), budget_bytes=2**20)
    assert not plan.fits
    assert isinstance(plan.tiles, (TilePlan, StripPlan))
    assert "does not fit the budget" in str(plan)


def test_a_budget_is_a_limit_and_the_error_names_one_that_would_do(full_vae: VideoVAE) -> None:
    shape = latent_shape(full_vae)
    with pytest.raises(BudgetError, match=r"To decode 1280x720 with .* does not fit 50 MiB of device memory") as error:
        full_vae.plan_decode(shape, budget_bytes=50 * 2**20, required=True)
    named = re.search(r"exactly is ([\d.]+) GiB", str(error.value))
    assert named is not None
    least = float(named[1])
    assert full_vae.plan_decode(shape, budget_bytes=int(least * GIB), required=True).fits
    assert not full_vae.plan_decode(shape, budget_bytes=int(0.9 * least * GIB)).fits
    blended = FAMILIES[full_vae.family].reference_tiles
    assert ("allow blended tiling" in str(error.value)) == blended
    with pytest.raises(BudgetError, match=r"1\.0 GiB of RAM"):
        full_vae.plan_decode(
            latent_shape(full_vae, 9, 540, 960), budget_bytes=int(1.2 * least * GIB), ram_bytes=GIB, required=True
        )


def test_ram_may_be_limited_too(full_vae: VideoVAE) -> None:
    shape = latent_shape(full_vae)
    budget = full_vae.decode_bytes(*shape[3:]) // 4
    free = full_vae.plan_decode(shape, budget_bytes=budget)
    assert free.host_bytes
    assert free.fits
    limited = full_vae.plan_decode(shape, budget_bytes=budget, ram_bytes=free.host_bytes // 2)
    assert not limited.fits
    assert full_vae.plan_decode(shape, budget_bytes=64 * GIB, ram_bytes=GIB).fits


def test_whole_frames_come_first(full_vae: VideoVAE) -> None:
    plan = full_vae.plan_decode(latent_shape(full_vae, 9, 32, 32))
    assert (plan.tiles, plan.tile_count, plan.exact, plan.fits, plan.halo_overhead) == (None, 1, True, True, 0.0)
    assert plan.chunks == {"iv-vae": 9, "image-vae": 9}.get(full_vae.family, 2)
    assert str(plan).startswith("Whole frames; ")


def test_convolutions_stay_below_two_to_the_31_elements() -> None:
    vae = full_size(FULL["cv-vae"])
    plan = vae.plan_decode(latent_shape(vae, 5, 270, 480))  # whole: 128 channels x 17 x 2160 x 3840 elements
    assert isinstance(plan.tiles, StripPlan)


def test_4k_fits_8_gib(full_vae: VideoVAE) -> None:
    assert full_vae.plan_decode(latent_shape(full_vae, 5, 270, 480), budget_bytes=8 * GIB).fits
    assert full_vae.plan_encode((1, 3, 17, 2160, 3840), budget_bytes=8 * GIB).fits


def test_smaller_plans_lead_down_to_the_smallest(full_vae: VideoVAE) -> None:
    shape = latent_shape(full_vae)
    plan: Any = None
    needs = [full_vae.describe_plan(plan, shape, "decode").device_bytes]
    while (plan := full_vae.smaller_plan(plan, shape, "decode")) is not None:
        needs.append(full_vae.describe_plan(plan, shape, "decode").device_bytes)
    assert len(needs) > 5
    assert all(b < 0.9 * a for a, b in pairwise(needs))
    assert needs[-1] < 1 * GIB


def test_the_official_tiling_is_described_as_what_it_is() -> None:
    vae = full_size(FULL["cv-vae"])
    shape = latent_shape(vae)
    plan = vae.describe_plan(ReferencePlan(), shape, "decode")
    assert (plan.exact, plan.tile_count) == (False, 6)
    assert "not exact: blended" in str(plan)
    assert "Official tiles of 576 px, 6 per chunk" in str(plan)
    one = vae.describe_plan(ReferencePlan(), latent_shape(vae, 5, 64, 64), "decode")
    assert (one.exact, one.tile_count) == (True, 1)
    assert isinstance(vae.smaller_plan(ReferencePlan(), shape, "decode"), StripPlan)


def test_on_a_cpu_nothing_is_moved_to_ram(small_vae: Callable[..., VideoVAE], family: str) -> None:
    vae = small_vae(family, torch.float32)
    plan = vae.plan_decode((1, vae.info.latent_channels, 5, 90, 160), budget_bytes=2**26, device="cpu")
    assert isinstance(plan.tiles, (TilePlan, StripPlan))
    assert plan.tiles.room is None
    assert plan.host_bytes == plan.transfer_bytes == 0
    on_gpu = vae.plan_decode((1, vae.info.latent_channels, 5, 90, 160), budget_bytes=2**26, device="cuda")
    assert isinstance(on_gpu.tiles, (TilePlan, StripPlan))
    assert on_gpu.tiles.room is not None


def test_halos_cost_what_the_arithmetic_says() -> None:
    """Of an IV-VAE decoder; attention, which sees whole frames, is in what they are compared with."""
    vae = full_size(FULL["iv-vae"])
    shape = latent_shape(vae, 5, 216, 216)
    overhead = {
        side: vae.describe_plan(TilePlan(tile=side), shape, "decode").halo_overhead for side in (16, 36, 72, 216)
    }
    assert overhead[216] == 0
    assert 0.03 < overhead[72] < 0.1
    assert 0.1 < overhead[36] < 0.2
    assert 0.3 < overhead[16] < 0.6


def test_a_plan_reads_as_words(full_vae: VideoVAE) -> None:
    text = str(full_vae.describe_plan(TilePlan(tile=32, offload=True), latent_shape(full_vae), "decode"))
    assert (
        "Exact tiles of at most 32x32 latents (256x256 px), 15 per chunk, with what waits between tiles in RAM" in text
    )
    assert "chunks in time" in text
    assert "in addition to the weights" in text
    assert "Result: exact." in text


def test_every_way_to_run_says_whether_it_is_exact(full_vae: VideoVAE) -> None:
    shape = latent_shape(full_vae)
    ways = {plan: full_vae.describe_plan(plan, shape, "decode").way for plan in (None, TilePlan(tile=32))}
    assert ways[None] == "Whole frames, exact"
    assert ways[TilePlan(tile=32)] == "Exact tiles of at most 32x32 latents (256x256 px), 15 per chunk, exact"
    if FAMILIES[full_vae.family].reference_tiles:
        way = full_vae.describe_plan(ReferencePlan(), shape, "decode").way
        assert way == "Official tiles of 576 px, 6 per chunk, not exact: blended"


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (1, 5, 1, 4, 4), (1, 4, 0, 4, 4)])
def test_a_wrong_shape_is_refused(small_vae: Callable[..., VideoVAE], shape: tuple[int, ...]) -> None:
    vae = small_vae("cv-vae")
    with pytest.raises(
        ValueError, match=r"needs \(batch, 4, frames, height, width\), whole numbers and none of them 0"
    ):
        vae.plan_decode(shape)
    with pytest.raises(ValueError, match=r"needs \(batch, 3, frames, height, width\)"):
        vae.plan_encode((1, 4, 1, 8, 8))
    with pytest.raises(ValueError, match="a number of bytes above 0"):
        vae.plan_decode((1, 4, 1, 4, 4), budget_bytes=0)


def test_a_plan_is_run_as_it_is_given(family: str, small_vae: Callable[..., VideoVAE]) -> None:
    """What the planner hands out goes straight into a call, and the result is that of whole frames."""
    vae = small_vae(family)
    torch.manual_seed(0)
    latent = torch.randn(1, vae.info.latent_channels, 2, 9, 10, dtype=torch.float64)
    plan = vae.plan_decode(latent.shape, budget_bytes=vae.decode_bytes(9, 10, frames=5) - 1)
    assert isinstance(plan, Plan)
    assert isinstance(plan.tiles, (TilePlan, StripPlan))
    assert plan.fits
    torch.testing.assert_close(vae.decode(latent, plan=plan.tiles), vae.decode(latent), rtol=0, atol=1e-9)


def test_the_meta_network_is_the_network(family: str) -> None:
    with torch.device("meta"):
        expected = network_of(FULL[family])
    got = meta_network(FAMILIES[family], FULL[family], DIRECTIONS, torch.bfloat16)
    assert {name: p.shape for name, p in got.named_parameters()} == {n: p.shape for n, p in expected.named_parameters()}
    assert not any(p.requires_grad for p in got.parameters())
    assert VideoVAE(got).dtype == torch.bfloat16
