"""On a real GPU: exact tiles, running out of memory under a real cap, memory that does not grow, and kept promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from vae_core import StripPlan, TilePlan, VideoVAE
from vae_core.door import output
from vae_core.door.output import collect, host_frames, make_frames
from vae_core.plan.planner import measured_margin
from vae_core.plan.rates import rates_of

from ..conftest import network_of
from .full_size import FULL

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False")

Make = Callable[..., VideoVAE]
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _exact_float32() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@pytest.fixture
def full_vae(family: str) -> Iterator[VideoVAE]:
    """A model of the published widths with weights at random, in bfloat16 on the GPU."""
    torch.manual_seed(0)
    with CUDA:
        model = network_of(FULL[family]).to(torch.bfloat16).requires_grad_(False).eval()
    yield VideoVAE(model)
    del model
    torch.cuda.empty_cache()


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected.float()).abs().max() / expected.float().std())


def latent_of(vae: VideoVAE, frames: int, side: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(1, vae.info.latent_channels, frames, side, side)


def peak_of(vae: VideoVAE, latent: torch.Tensor, plan: Any = None) -> int:
    """Most bytes in use on the GPU while a latent in RAM is decoded chunk by chunk, beyond those from before."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(CUDA)
    before = torch.cuda.memory_allocated(CUDA)
    for chunk in vae.decode_stream(latent, plan=plan):
        assert chunk.device.type == "cpu"
        del chunk
    torch.cuda.synchronize(CUDA)
    return torch.cuda.max_memory_allocated(CUDA) - before


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("plan", [TilePlan(tile=2), TilePlan(tile=(3, 1), offload=True)], ids=["device", "offload"])
def test_exact_tiles_give_what_whole_frames_give(
    family: str, small_vae: Make, dtype: torch.dtype, tolerance: float, plan: TilePlan
) -> None:
    vae = small_vae(family, dtype).to(CUDA)
    video = (torch.rand(1, 3, 21, 40, 48) * 2 - 1).to(dtype)
    latent = vae.encode(video)
    assert difference(vae.encode(video, plan=plan), latent) <= tolerance
    assert difference(vae.decode(latent, plan=plan), vae.decode(latent)) <= tolerance


def test_the_gpu_gives_what_the_cpu_gives(family: str, small_vae: Make) -> None:
    vae = small_vae(family, torch.float32)
    latent = latent_of(vae, 6, 4)
    on_cpu = vae.decode(latent)
    assert difference(vae.to(CUDA).decode(latent), on_cpu) <= 1e-3


def test_a_real_cap_is_recovered_from(full_vae: VideoVAE) -> None:
    """The driver refuses what is above the cap; decoding goes on in smaller tiles, and the result is the same."""
    latent = latent_of(full_vae, 6, 40).to(torch.bfloat16)
    whole = full_vae.decode(latent)
    peak = peak_of(full_vae, latent)
    tried: list[Any] = []

    def recover(error: Exception, plan: Any) -> Any:
        assert isinstance(error, torch.OutOfMemoryError)
        tried.append(plan)
        torch.cuda.empty_cache()
        return full_vae.smaller_plan(plan, latent.shape, "decode")

    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.empty_cache()
    cap = torch.cuda.memory_reserved(CUDA) + int(0.7 * peak)
    torch.cuda.set_per_process_memory_fraction(cap / total, CUDA)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            full_vae.decode(latent)
        torch.cuda.empty_cache()
        got = full_vae.decode(latent, recover=recover)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CUDA)
    assert tried
    assert tried[0] is None
    assert difference(got, whole) <= 0.1


@pytest.mark.parametrize("plan", [None, TilePlan(tile=4)], ids=["whole", "tiles"])
def test_memory_does_not_grow_with_length(family: str, small_vae: Make, plan: Any) -> None:
    vae = small_vae(family, torch.float32).to(CUDA)
    peak_of(vae, latent_of(vae, 9, 8), plan)  # workspaces that stay
    assert peak_of(vae, latent_of(vae, 101, 8), plan) <= peak_of(vae, latent_of(vae, 9, 8), plan) + 2**20


@pytest.mark.parametrize("plan", [None, TilePlan(tile=16)], ids=["whole", "tiles"])
def test_the_planner_keeps_its_promise(full_vae: VideoVAE, plan: Any) -> None:
    latent = latent_of(full_vae, 6, 40).to(torch.bfloat16)
    promised = full_vae.describe_plan(plan, latent.shape, "decode").device_bytes
    assert peak_of(full_vae, latent, plan) <= 1.1 * promised


def test_the_margin_of_this_gpu_is_measured(full_vae: VideoVAE) -> None:
    """What the nodes learn after the first chunks: a figure above 1 that the run itself stays below."""
    latent = latent_of(full_vae, 6, 40).to(torch.bfloat16)
    plan = full_vae.describe_plan(None, latent.shape, "decode")
    in_use = peak_of(full_vae, latent)
    margin = measured_margin(in_use, plan)
    assert margin is not None
    assert in_use < margin * plan.working_bytes


STRIPS = [
    StripPlan(strips=16),
    StripPlan(strips=16, room=2**28),
    StripPlan(strips=8, room=0),
    StripPlan(strips=16, room=2**27, again=1),
]


@pytest.mark.parametrize("plan", STRIPS, ids=["device", "some in RAM", "all in RAM", "again"])
@pytest.mark.parametrize("family", ["cv-vae", "cv-vae-sd3", "image-vae"])
def test_strips_give_what_whole_frames_give(full_vae: VideoVAE, plan: StripPlan) -> None:
    """Copies on streams of their own, at widths and sizes where they really overlap, twice over the same blocks."""
    latent = latent_of(full_vae, 9, 24).to(torch.bfloat16)
    expected = full_vae.decode(latent)
    assert difference(full_vae.decode(latent, plan=plan), expected) <= 0.1
    said = full_vae.describe_plan(plan, latent.shape, "decode")
    assert peak_of(full_vae, latent, plan) <= 1.1 * said.device_bytes


def test_rates_are_measured(full_vae: VideoVAE) -> None:
    rates = rates_of(CUDA, torch.bfloat16)
    assert rates.flops > 1e12
    assert rates.memory > 50e9
    assert rates.bus > 1e9


# ---------------------------------------------------------------------------------------------------- output


def frames_of(vae: VideoVAE, latent: torch.Tensor, dtype: torch.dtype, **choice: Any) -> list[torch.Tensor]:
    """The chunks on the GPU, made into pixels on the CPU."""
    return [make_frames(chunk.cpu(), dtype).pixels for chunk in vae.decode_stream(latent.to(CUDA), **choice)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16], ids=["uint8", "fp32", "fp16"])
@pytest.mark.parametrize("plan", [None, TilePlan(tile=(3, 1), offload=True)], ids=["device", "offload"])
def test_frames_arrive_whole_and_in_order(family: str, small_vae: Make, dtype: torch.dtype, plan: TilePlan) -> None:
    """Kept or lent, page-locked or not, and where the GPU has no room to make pixels."""
    vae = small_vae(family, torch.float32).to(CUDA)
    latent = latent_of(vae, 14, 8)
    expected = frames_of(vae, latent, dtype, frames=50, plan=plan)
    kept = list(vae.decode_frames(latent, dtype=dtype, frames=50, plan=plan, check=True))
    assert not any(chunk.is_pinned() or chunk.is_cuda for chunk in kept)
    lent = [chunk.clone() for chunk in vae.decode_frames(latent, dtype=dtype, frames=50, plan=plan, lent=True)]
    for got in (kept, lent):
        assert [chunk.shape for chunk in got] == [chunk.shape for chunk in expected]
        for chunk, wanted in zip(got, expected, strict=True):
            assert (chunk.float() - wanted.float()).abs().max() <= (1 if dtype == torch.uint8 else 2e-3)


def test_a_late_copy_brings_what_was_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is kept busy, so that copies are asked for long before there is anything to copy."""
    busy = torch.randn(4096, 4096, device=CUDA)

    def chunks() -> Iterator[torch.Tensor]:
        for n in range(9):
            for _ in range(20):
                busy.matmul(busy)
            yield torch.full((1, 3, 4, 256, 256), n / 100, device=CUDA)

    def check() -> None:
        for n, chunk in enumerate(host_frames(chunks(), CUDA, torch.float32, lent=True, check=True)):
            wanted = make_frames(torch.full((1, 3, 1, 1, 1), n / 100), torch.float32).pixels
            torch.testing.assert_close(chunk, wanted.expand_as(chunk))

    check()
    monkeypatch.setattr(output, "MOST_PINNED", 0)
    check()


def test_a_gpu_too_full_for_pixels_has_them_made_in_ram(small_vae: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = small_vae("iv-vae", torch.float32).to(CUDA)
    latent = latent_of(vae, 6, 4)
    expected, failed, original = frames_of(vae, latent, torch.uint8), 0, output.make_frames

    def full(chunk: torch.Tensor, dtype: torch.dtype, *, check: bool = False) -> output.Frames:
        nonlocal failed
        if chunk.is_cuda and failed < 2:
            failed += 1
            raise torch.OutOfMemoryError("injected")
        return original(chunk, dtype, check=check)

    monkeypatch.setattr(output, "make_frames", full)
    got = list(vae.decode_frames(latent, dtype=torch.uint8, check=True))
    assert failed == 2
    for chunk, wanted in zip(got, expected, strict=True):
        assert (chunk.float() - wanted.float()).abs().max() <= 1


def test_not_finite_is_seen_on_the_gpu() -> None:
    chunks = [torch.zeros(1, 3, 2, 8, 8, device=CUDA) for _ in range(4)]
    chunks[2][0, 1, 1, 3, 3] = torch.nan
    got: list[torch.Tensor] = []
    with pytest.raises(output.NotFiniteError, match="Chunk 2 of"):
        got.extend(host_frames(iter(chunks), CUDA, torch.uint8, check=True))
    assert len(got) == 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=["uint8", "fp32"])
def test_frames_on_their_way_take_no_more_with_length(family: str, small_vae: Make, dtype: torch.dtype) -> None:
    """Memory of the GPU: no more with length, and a chunk of pixels beyond what decoding takes."""
    vae = small_vae(family, torch.float32).to(CUDA)

    def peak(latents: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(CUDA)
        before = torch.cuda.memory_allocated(CUDA)
        collect(vae.decode_frames(latent_of(vae, latents, 8), dtype=dtype, lent=True), 4 * latents - 3, dim=1)
        torch.cuda.synchronize(CUDA)
        return torch.cuda.max_memory_allocated(CUDA) - before

    peak(9)  # workspaces that stay
    assert peak(101) <= peak(9) + 2**20
    assert peak(9) <= peak_of(vae, latent_of(vae, 9, 8)) + 17 * 64 * 64 * 3 * dtype.itemsize + 2**20
