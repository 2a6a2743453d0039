"""Convolution backends against torch's own, in float64, and how one is chosen."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vae_core.nn import convolution
from vae_core.nn.convolution import Backend, Cost, choose_backend, convolve, convolve_frames, decide, measure

KERNELS = [  # kernel, stride, padding
    ((3, 3, 3), (1, 1, 1), (0, 1, 1)),
    ((3, 3, 3), (1, 1, 1), (1, 1, 1)),
    ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
    ((3, 3, 3), (2, 2, 2), (0, 0, 0)),
    ((2, 1, 1), (2, 1, 1), (0, 0, 0)),
    ((3, 5, 4), (1, 2, 3), (2, 4, 1)),
    ((1, 1, 1), (1, 1, 1), (0, 0, 0)),
]
CPU = torch.device("cpu")


def drawn(batch: int, kernel: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(batch, 3, 6, 11, 7, dtype=torch.float64)
    return x, torch.randn(4, 3, *kernel, dtype=torch.float64), torch.randn(4, dtype=torch.float64)


@pytest.mark.parametrize(("kernel", "stride", "padding"), KERNELS)
@pytest.mark.parametrize("backend", ["conv3d", "taps"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_any_backend_is_torchs_convolution(kernel, stride, padding, backend, batch, last, monkeypatch) -> None:
    x, weight, bias = drawn(batch, kernel)
    if last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    monkeypatch.setattr(convolution, "choose_backend", lambda device, dtype: backend)
    for given in (bias, None):
        expected = F.conv3d(x, weight, given, stride, padding)
        got = convolve(x, weight, given, stride=stride, padding=padding)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(2, 2), (6, 5), (1, 7), (7, 1)])
def test_small_clips_in_float32(size: tuple[int, int]) -> None:
    """A CPU's library is called without torch's own choice where that would be slow, and where it is right."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 16, 4, *size), torch.randn(8, 16, 3, 3, 3), torch.randn(8)
    expected = F.conv3d(x.double(), weight.double(), bias.double(), 1, (0, 1, 1))
    got = convolve(x, weight, bias, padding=(0, 1, 1))
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_frames_are_convolved_one_by_one(frames: int, stride: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(2, 3, frames, 9, 8).double(),
        torch.randn(4, 3, 3, 3).double(),
        torch.randn(4).double(),
    )
    each = [F.conv2d(x[:, :, t], weight, bias, stride, 1) for t in range(frames)]
    got = convolve_frames(x, weight, bias, stride=stride, padding=(1, 1))
    torch.testing.assert_close(got, torch.stack(each, dim=2), rtol=0, atol=1e-12)


def test_half_precision_taps_are_rounded_once() -> None:
    x, weight, bias = (t.bfloat16() for t in drawn(1, (3, 3, 3)))
    exact = F.conv3d(x.double(), weight.double(), bias.double(), padding=1)
    own = F.conv3d(x, weight, bias, 1, 1)
    taps = convolution._by_taps(x, weight, bias, (1, 1, 1), (1, 1, 1))
    assert (taps.double() - exact).abs().max() <= 1.01 * (own.double() - exact).abs().max()


def cost(seconds: float, mebibytes: float, error: float = 1e-3) -> Cost:
    return Cost(seconds=seconds, nbytes=int(mebibytes * 2**20), error=error)


@pytest.mark.parametrize(
    ("own", "taps", "backend", "why"),
    [
        (cost(1, 10), cost(1.2, 10), "conv3d", "conv3d 1000.00 ms and 10 MiB, taps 1200.00 ms and 10 MiB"),
        (cost(1.1, 10), cost(1, 10), "conv3d", "1100.00 ms"),
        (cost(1.2, 10), cost(1, 10), "taps", "1200.00 ms"),
        (cost(0.5, 100), cost(1, 10), "taps", "100 MiB"),
        (cost(0.5, 0), cost(1, 0), "conv3d", "0 MiB"),
        (RuntimeError("no conv3d here"), cost(1, 10), "taps", "conv3d fails (no conv3d here)"),
        (cost(1, 10), RuntimeError("no conv2d"), "conv3d", "taps fails (no conv2d)"),
        (cost(0.1, 10, error=2.0), cost(1, 10), "taps", "conv3d is wrong by 2.0e+00 standard deviations"),
        (cost(1, 10), cost(0.1, 10, error=math.nan), "conv3d", "taps is wrong by nan"),
    ],
)
def test_the_choice(own: Cost | RuntimeError, taps: Cost | RuntimeError, backend: str, why: str) -> None:
    def found(backend: Backend) -> Cost:
        result = own if backend == "conv3d" else taps
        if isinstance(result, RuntimeError):
            raise result
        return result

    chosen, reason = decide(found)
    assert chosen == backend
    assert why in reason


def test_a_cpu_is_not_measured(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cviv-vae"):
        for device in ("cpu", "meta"):
            assert choose_backend(torch.device(device), torch.bfloat16) == "conv3d"
    assert not caplog.records


@pytest.fixture
def tiny_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "__defaults__", ((1, 4, 4, 6, 6),))
    convolution._measured.cache_clear()


@pytest.mark.usefixtures("tiny_probe")
def test_a_real_measurement_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """The probe of a GPU, run on this CPU."""
    for dtype in (torch.float32, torch.bfloat16):
        found = measure("taps", CPU, dtype)
        assert math.isfinite(found.seconds)
        assert found.error < convolution.FARTHEST
    with caplog.at_level(logging.INFO, "cviv-vae"):
        chosen = [convolution._measured(CPU, torch.float32) for _ in range(2)]
    convolution._measured.cache_clear()
    assert chosen[0] == chosen[1]
    assert [r.getMessage().startswith("3-D convolutions on cpu in torch.float32 by ") for r in caplog.records] == [True]


@pytest.mark.usefixtures("tiny_probe")
def test_wrong_numbers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library whose conv3d gives rubbish, as has been seen of some, is not chosen."""
    right = F.conv3d

    def wrong(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        y = right(x, *args, **kwargs)
        return y if x.shape[-1] == 5 else y.roll(1, 1)  # the exact result is taken of a corner

    monkeypatch.setattr(F, "conv3d", wrong)
    assert measure("conv3d", CPU, torch.float32).error > 0.5
    assert convolution._measured(CPU, torch.float32) == "taps"
    convolution._measured.cache_clear()


@pytest.mark.usefixtures("tiny_probe")
def test_out_of_memory_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    right = convolution.measure

    def full(*_: object) -> Cost:
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(convolution, "measure", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        convolution._measured(CPU, torch.float32)
    monkeypatch.setattr(convolution, "measure", right)
    assert convolution._measured(CPU, torch.float32) in ("conv3d", "taps")
    convolution._measured.cache_clear()


@pytest.mark.usefixtures("tiny_probe")
def test_the_probe_reads_what_networks_read_and_outside_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.dtype, bool]] = []
    original = F.conv3d

    def watched(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        y = original(x, *args, **kwargs)
        seen.append((y.dtype, convolution.laid_out(x).stride() == x.stride()))
        return y

    monkeypatch.setattr(F, "conv3d", watched)
    with torch.autocast("cpu", torch.bfloat16):
        measure("conv3d", CPU, torch.float32)
    assert {dtype for dtype, _ in seen} == {torch.float32}
    assert all(laid_out for _, laid_out in seen[1:])  # the first is the exact one
