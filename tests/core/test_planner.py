"""The memory model against the models themselves, and the choice of plans."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import vae_core
from vae_core import Plan, ReferencePlan, TilePlan, cv_tiles, fused_norm, iv_layers
from vae_core.cv_vae import CVVAEConfig
from vae_core.door.vae import VideoVAE
from vae_core.iv_vae import IVVAEConfig
from vae_core.keys import build
from vae_core.planner import LEAST_MEASURED, MARGIN, SLACK, budget_for, measured_margin, with_margin
from vae_core.prediction import Task, count, meta_model, predict
from vae_core.profiler import MemoryProfile

from .meta_profile import MetaProfile

FULL = {
    "cv-vae": CVVAEConfig(widths=(128, 256, 512, 512), blocks_per_level=2, latent_channels=4, sd3=False),
    "cv-vae-sd3": CVVAEConfig(widths=(128, 256, 512, 512), blocks_per_level=2, latent_channels=16, sd3=True),
    "iv-vae": IVVAEConfig(dim=64, latent_channels=16, scale_factor=1.0, shift_factor=0.0),
}
GIB = 2**30
SHAPE = (25, 90, 160)  # 97 frames of 720x1280


@pytest.fixture
def full_vae(family: str) -> VideoVAE:
    """A model of the published widths, without data; as if on a GPU."""
    return VideoVAE(meta_model(FULL[family], torch.bfloat16))


def latent_shape(vae: VideoVAE, frames: int = 25, height: int = 90, width: int = 160) -> tuple[int, ...]:
    return (1, vae.info.latent_channels, frames, height, width)


# ---------------------------------------------------------------------------------------------------- profiler


def test_the_profiler_counts_what_lives_at_one_time() -> None:
    with MemoryProfile() as profile:
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
    with MemoryProfile() as profile:
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
    with MemoryProfile() as profile:
        F.scaled_dot_product_attention(q, q, q)
    assert profile.device.peak == 4 * q.numel()


@pytest.mark.parametrize(
    "mode", [nullcontext, torch.inference_mode, torch.no_grad], ids=["plain", "inference", "no_grad"]
)
def test_a_prediction_does_not_depend_on_the_mode_of_the_caller(family: str, mode: Callable[[], Any]) -> None:
    predict.cache_clear()
    meta_model.cache_clear()
    with mode():
        vae = VideoVAE(meta_model(FULL[family], torch.bfloat16))
        got = vae.decode_bytes(30, 20), vae.encode_bytes(240, 160, plan=TilePlan(tile=8))
    predict.cache_clear()
    meta_model.cache_clear()
    vae = VideoVAE(meta_model(FULL[family], torch.bfloat16))
    assert got == (vae.decode_bytes(30, 20), vae.encode_bytes(240, 160, plan=TilePlan(tile=8)))


# ---------------------------------------------------------------------------------------------------- prediction


def counted(vae: VideoVAE, shape: tuple[int, ...], decoding: bool, plan: Any) -> int:
    """Peak of a real stream on the meta device, counted by the other profiler, all tiles and pieces run."""
    x = torch.empty(shape, dtype=vae.dtype, device="meta")
    with MetaProfile() as profile:
        stream = vae.decode_stream(x, plan=plan) if decoding else vae.encode_stream([x], plan=plan)
        for piece in stream:
            del piece
    return profile.peak_bytes - x.numel() * x.element_size()  # the whole input, which lies in RAM otherwise


@pytest.mark.parametrize("plan", [None, TilePlan(tile=16), TilePlan(tile=(10, 8))], ids=["whole", "16", "10x8"])
@pytest.mark.parametrize("decoding", [True, False], ids=["decode", "encode"])
def test_the_prediction_is_what_a_run_needs(full_vae: VideoVAE, plan: Any, decoding: bool) -> None:
    """The model of memory runs one tile; a stream runs them all, over several pieces."""
    shape = latent_shape(full_vae, 6, 20, 24) if decoding else (1, 3, 21, 160, 192)
    described = full_vae.describe_plan(plan, shape, "decode" if decoding else "encode")
    predicted = described.device_bytes / MARGIN
    counted(full_vae, latent_shape(full_vae, 2, 2, 2) if decoding else (1, 3, 5, 16, 16), decoding, None)  # kernels
    real = counted(full_vae, shape, decoding, plan)
    assert real <= 1.001 * predicted
    assert predicted <= 1.05 * real


@pytest.mark.parametrize("plan", [None, TilePlan(tile=8)], ids=["whole", "8"])
def test_the_promise_holds_for_real_tensors(
    family: str, small_vae: Callable[..., VideoVAE], plan: TilePlan | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With data, on the CPU, every tile of every piece of a stream: live tensors are within 10 % of the prediction."""
    monkeypatch.setattr(fused_norm, "CPU_SLAB", 2**12)  # what norms hold in between is small against real frames only
    vae = small_vae(family, torch.float32)
    channels, latents, size = vae.info.latent_channels, 6, (9, 10)
    vae.decode(torch.zeros(1, channels, 2, 2, 2))  # prepares kernels
    predicted = vae.describe_plan(plan, (1, channels, latents, *size), "decode").device_bytes / MARGIN
    pieces = (torch.zeros(1, channels, 1, *size) for _ in range(latents))
    with MemoryProfile() as profile:
        frames = sum(piece.shape[2] for piece in vae.decode_stream(pieces, plan=plan))
    assert frames == 1 + 4 * (latents - 1)
    assert profile.device.peak == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize("decoding", [True, False], ids=["decode", "encode"])
def test_one_tile_tells_what_all_need_off_the_device_too(full_vae: VideoVAE, decoding: bool) -> None:
    task = Task(
        config=full_vae.model.config, dtype=torch.bfloat16, decoding=decoding, batch=1, latents=3, size=(20, 26)
    )
    plan = TilePlan(tile=8, offload=True)
    need, every = predict(task.piece, plan), count(task, plan)
    assert every.device == pytest.approx(need.device, rel=0.1)
    assert every.host == pytest.approx(need.host, rel=0.1)
    assert every.largest_convolution == need.largest_convolution


def test_ram_is_counted_for_what_waits_there(full_vae: VideoVAE) -> None:
    shape = latent_shape(full_vae)
    kept = full_vae.describe_plan(TilePlan(tile=32), shape, "decode")
    moved = full_vae.describe_plan(TilePlan(tile=32, offload=True), shape, "decode")
    result = 2 * 3 * 97 * 720 * 1280
    assert kept.host_bytes == 0
    assert kept.result_bytes == moved.result_bytes == result
    assert moved.host_bytes > GIB
    assert moved.device_bytes < 0.8 * kept.device_bytes
    # what leaves the device is what RAM takes
    left = (kept.device_bytes - moved.device_bytes) / MARGIN
    assert left == pytest.approx(moved.host_bytes, rel=0.25)


def test_bytes_follow_size_dtype_length_and_plan(full_vae: VideoVAE) -> None:
    whole = full_vae.decode_bytes(45, 80)
    # larger frames run in strips, which need less
    assert 1.1 * whole <= full_vae.decode_bytes(90, 80) <= 2.01 * whole
    assert 1.1 * whole <= full_vae.decode_bytes(45, 80, dtype=torch.float32) <= 2.01 * whole
    assert full_vae.decode_bytes(45, 80, frames=1) < 0.6 * whole
    assert full_vae.decode_bytes(45, 80, frames=1001) == whole
    assert full_vae.decode_bytes(45, 80, plan=TilePlan(tile=16)) < 0.9 * whole
    assert full_vae.decode_bytes(45, 80, plan=TilePlan(tile=16, offload=True)) < 0.6 * whole
    assert full_vae.encode_bytes(360, 640) < 1.1 * whole
    assert full_vae.encode_bytes(353, 640) == full_vae.encode_bytes(360, 640)


@pytest.mark.parametrize(
    ("above", "slack"),
    [
        (2**62, {"cv-vae": (0.025, 0.001), "cv-vae-sd3": (0.025, 0.001), "iv-vae": (0.01, 0.001)}),
        (0, {"cv-vae": (0.035, 0.001), "cv-vae-sd3": (0.035, 0.001), "iv-vae": (0.07, 0.06)}),
    ],
    ids=["never in strips", "always in strips"],
)
def test_bytes_are_in_proportion_where_layers_run_one_way(
    full_vae: VideoVAE, above: int, slack: dict[str, tuple[float, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the rows, or twice the bytes of a number: twice the memory. A strip of IV-VAE does not grow with them."""
    for module in (cv_tiles, iv_layers):
        monkeypatch.setattr(module, "STRIPS_ABOVE", above)
    predict.cache_clear()
    whole, taller = full_vae.decode_bytes(45, 80), full_vae.decode_bytes(90, 80)
    wider = full_vae.decode_bytes(45, 80, dtype=torch.float32)
    predict.cache_clear()
    assert taller == pytest.approx(2 * whole, rel=slack[full_vae.family][0])
    assert wider == pytest.approx(2 * whole, rel=slack[full_vae.family][1])


# ---------------------------------------------------------------------------------------------------- planning


def test_plans_get_smaller_with_the_budget(full_vae: VideoVAE) -> None:
    shape = latent_shape(full_vae)
    plans = [full_vae.plan_decode(shape, budget_bytes=int(gib * GIB)) for gib in (64, 16, 8, 4, 2, 1)]
    assert all(plan.fits and plan.exact for plan in plans)
    assert all(plan.device_bytes <= int(gib * GIB) for plan, gib in zip(plans, (64, 16, 8, 4, 2, 1), strict=True))
    needs = [plan.device_bytes for plan in plans]
    assert needs == sorted(needs, reverse=True)
    assert plans[-1].tile_count > 1
    assert plans[-1].halo_overhead > 0


def test_a_measured_margin_takes_the_place_of_the_usual_one(full_vae: VideoVAE) -> None:
    """A plan made for a device that takes twice the live tensors keeps within the budget at that rate."""
    shape = latent_shape(full_vae)
    margin = measured_margin(2 * GIB, GIB)
    assert margin == SLACK * 2
    usual = full_vae.plan_decode(shape, budget_bytes=4 * GIB)
    plan = with_margin(full_vae.plan_decode(shape, budget_bytes=budget_for(4 * GIB, margin)), margin)
    assert plan.fits
    assert plan.device_bytes <= 4 * GIB
    assert plan.tiles != usual.tiles
    assert plan.device_bytes == pytest.approx(margin * predict_of(full_vae, shape, plan.tiles), rel=1e-6)
    assert with_margin(usual, MARGIN) == usual


def test_a_margin_is_never_below_the_live_tensors_nor_from_small_pieces() -> None:
    assert measured_margin(GIB // 2, GIB) == SLACK
    assert measured_margin(10 * LEAST_MEASURED, LEAST_MEASURED - 1) is None
    assert measured_margin(10 * LEAST_MEASURED, LEAST_MEASURED) == pytest.approx(10 * SLACK)
    assert budget_for(1, 100.0) == 1


def predict_of(vae: VideoVAE, shape: tuple[int, ...], plan: Any) -> float:
    """Live tensors alone."""
    return vae.describe_plan(plan, shape, "decode").device_bytes / MARGIN


def test_a_budget_that_nothing_fits_is_said(full_vae: VideoVAE) -> None:
    plan = full_vae.plan_decode(latent_shape(full_vae), budget_bytes=2**20)
    assert not plan.fits
    assert isinstance(plan.tiles, TilePlan)
    assert "does not fit the budget" in str(plan)


def test_ram_may_be_limited_too(full_vae: VideoVAE) -> None:
    shape = latent_shape(full_vae)
    free = full_vae.plan_decode(shape, budget_bytes=3 * GIB)
    assert isinstance(free.tiles, TilePlan)
    assert free.tiles.offload
    assert free.fits
    limited = full_vae.plan_decode(shape, budget_bytes=3 * GIB, ram_bytes=free.host_bytes // 2)
    assert not limited.fits
    assert full_vae.plan_decode(shape, budget_bytes=64 * GIB, ram_bytes=GIB).fits


def test_whole_frames_come_first(full_vae: VideoVAE) -> None:
    plan = full_vae.plan_decode(latent_shape(full_vae, 9, 32, 32))
    assert (plan.tiles, plan.tile_count, plan.exact, plan.fits, plan.halo_overhead) == (None, 1, True, True, 0.0)
    assert plan.chunks == (9 if full_vae.family == "iv-vae" else 2)
    assert str(plan).startswith("Whole frames; ")


def test_convolutions_stay_below_two_to_the_31_elements() -> None:
    vae = VideoVAE(meta_model(FULL["cv-vae"], torch.bfloat16))
    plan = vae.plan_decode(latent_shape(vae, 5, 270, 480))  # whole: 128 channels x 17 x 2160 x 3840 elements
    assert isinstance(plan.tiles, TilePlan)


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
    vae = VideoVAE(meta_model(FULL["cv-vae"], torch.bfloat16))
    shape = latent_shape(vae)
    plan = vae.describe_plan(ReferencePlan(), shape, "decode")
    assert (plan.exact, plan.tile_count) == (False, 6)
    assert "not exact: blended" in str(plan)
    assert "Official tiles of 576 px, 6 per piece" in str(plan)
    one = vae.describe_plan(ReferencePlan(), latent_shape(vae, 5, 64, 64), "decode")
    assert (one.exact, one.tile_count) == (True, 1)
    assert isinstance(vae.smaller_plan(ReferencePlan(), shape, "decode"), TilePlan)


def test_on_a_cpu_nothing_is_moved_to_ram(small_vae: Callable[..., VideoVAE], family: str) -> None:
    vae = small_vae(family, torch.float32)
    plan = vae.plan_decode((1, vae.info.latent_channels, 5, 90, 160), budget_bytes=2**26, device="cpu")
    assert isinstance(plan.tiles, TilePlan)
    assert not plan.tiles.offload
    on_gpu = vae.plan_decode((1, vae.info.latent_channels, 5, 90, 160), budget_bytes=2**26, device="cuda")
    assert isinstance(on_gpu.tiles, TilePlan)
    assert on_gpu.tiles.offload


def test_halos_cost_what_the_arithmetic_says(small_vae: Callable[..., VideoVAE]) -> None:
    """In the middle of a large frame a tile of 72 latents costs an IV-VAE decoder about 10 %, one of 32 about 22 %."""
    vae = VideoVAE(meta_model(FULL["iv-vae"], torch.bfloat16))
    shape = latent_shape(vae, 5, 720, 720)
    overhead = {
        side: vae.describe_plan(TilePlan(tile=side), shape, "decode").halo_overhead for side in (16, 32, 72, 720)
    }
    assert overhead[720] == 0
    assert 0.08 < overhead[72] < 0.14
    assert 0.2 < overhead[32] < 0.3
    assert 0.4 < overhead[16] < 0.7


def test_a_plan_reads_as_words(full_vae: VideoVAE) -> None:
    text = str(full_vae.describe_plan(TilePlan(tile=32, offload=True), latent_shape(full_vae), "decode"))
    assert (
        "Exact tiles of at most 32x32 latents (256x256 px), 15 per piece, with what waits between tiles in RAM" in text
    )
    assert "pieces in time" in text
    assert "beside the weights" in text
    assert "Result: exact." in text


def test_every_way_to_run_says_whether_it_is_exact(full_vae: VideoVAE) -> None:
    shape = latent_shape(full_vae)
    ways = {plan: full_vae.describe_plan(plan, shape, "decode").way for plan in (None, TilePlan(tile=32))}
    assert ways[None] == "Whole frames, exact"
    assert ways[TilePlan(tile=32)] == "Exact tiles of at most 32x32 latents (256x256 px), 15 per piece, exact"
    if full_vae.family != "iv-vae":
        way = full_vae.describe_plan(ReferencePlan(), shape, "decode").way
        assert way == "Official tiles of 576 px, 6 per piece, not exact: blended"


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (1, 5, 1, 4, 4), (1, 4, 0, 4, 4)])
def test_a_wrong_shape_is_refused(small_vae: Callable[..., VideoVAE], shape: tuple[int, ...]) -> None:
    vae = small_vae("cv-vae")
    with pytest.raises(ValueError, match=r"needs \(batch, 4, frames, height, width\), none of them 0"):
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
    assert plan.tiles == TilePlan(tile=8)
    torch.testing.assert_close(vae.decode(latent, plan=plan.tiles), vae.decode(latent), rtol=0, atol=1e-9)


def test_the_meta_model_is_the_model(family: str) -> None:
    with torch.device("meta"):
        expected = build(FULL[family])
    got = meta_model(FULL[family], torch.bfloat16)
    assert {name: p.shape for name, p in got.named_parameters()} == {n: p.shape for n, p in expected.named_parameters()}
    assert not any(p.requires_grad for p in got.parameters())
    assert vae_core.VideoVAE(got).dtype == torch.bfloat16
