"""Convolution backends and parts against torch's own convolution of the whole, in float64."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vae_core import convolution
from vae_core.convolution import ConvolutionBackend, Cost, choose_backend, convolve, decide, measure

KERNELS = [  # kernel, stride, padding
    ((3, 3, 3), (1, 1, 1), (0, 1, 1)),
    ((3, 3, 3), (1, 1, 1), (1, 1, 1)),
    ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
    ((3, 3, 3), (2, 2, 2), (0, 0, 0)),
    ((2, 1, 1), (2, 1, 1), (0, 0, 0)),
    ((3, 5, 4), (1, 2, 3), (2, 4, 1)),
    ((1, 1, 1), (1, 1, 1), (0, 0, 0)),
]
BACKENDS: list[ConvolutionBackend] = ["conv3d", "taps"]


def drawn(batch: int, kernel: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(batch, 3, 6, 11, 7, dtype=torch.float64)
    return x, torch.randn(4, 3, *kernel, dtype=torch.float64), torch.randn(4, dtype=torch.float64)


@pytest.mark.parametrize(("kernel", "stride", "padding"), KERNELS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_any_backend_in_any_parts_is_the_whole_convolution(kernel, stride, padding, backend, batch, last) -> None:
    x, weight, bias = drawn(batch, kernel)
    if last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    expected = F.conv3d(x, weight, bias, stride, padding)
    whole = convolve(x, weight, bias, stride=stride, padding=padding, backend=backend)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-12)
    largest = max(x[0].numel(), expected[0].numel())
    for limit in (largest * batch - 1, largest - 1, largest * 3 // 4, largest * 2 // 3):
        got = convolve(x, weight, bias, stride=stride, padding=padding, backend=backend, limit=limit)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        if last:
            assert got.is_contiguous(memory_format=torch.channels_last_3d)
    without = convolve(x, weight, stride=stride, padding=padding, backend=backend, limit=largest - 1)
    torch.testing.assert_close(without, F.conv3d(x, weight, None, stride, padding), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("frames", "limit"), [(6, 3 * 4 * 11 * 7), (3, 4 * 3 * 8 * 7)], ids=["frames", "rows"])
def test_no_part_is_over_the_limit(backend, frames, limit, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = drawn(1, (3, 3, 3))
    x = x[:, :, :frames]
    expected = F.conv3d(x, weight, bias, padding=(0, 1, 1))
    sizes: list[int] = []

    def watched(name: str):
        run = getattr(F, name)

        def convolution_of(x: Tensor, *args, **kwargs) -> Tensor:
            y = run(x, *args, **kwargs)
            sizes.extend((x.numel(), y.numel()))
            return y

        return convolution_of

    for name in ("conv2d", "conv3d"):
        monkeypatch.setattr(F, name, watched(name))
    got = convolve(x, weight, bias, padding=(0, 1, 1), backend=backend, limit=limit)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert len(sizes) >= 4
    assert max(sizes) <= limit < max(x.numel(), expected.numel())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("limit", [convolution.LIMIT, 700])
def test_gradients(backend: ConvolutionBackend, limit: int) -> None:
    inputs = [t.requires_grad_() for t in drawn(1, (3, 3, 3))]

    def gradients(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y.square().sum(), inputs)

    x, weight, bias = inputs
    expected = gradients(F.conv3d(x, weight, bias, padding=1))
    got = gradients(convolve(x, weight, bias, padding=(1, 1, 1), backend=backend, limit=limit))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_over_two_billion_elements_on_the_meta_device(backend: ConvolutionBackend) -> None:
    with torch.device("meta"):
        x = torch.empty(1, 256, 9, 1080, 1920, dtype=torch.bfloat16)
        weight = torch.empty(128, 256, 3, 3, 3, dtype=torch.bfloat16)
    assert x.numel() > convolution.LIMIT
    y = convolve(x, weight, padding=(1, 1, 1), backend=backend)
    assert (y.shape, y.dtype, y.device.type) == ((1, 128, 9, 1080, 1920), torch.bfloat16, "meta")


def test_half_precision_taps_are_rounded_once() -> None:
    x, weight, bias = (t.bfloat16() for t in drawn(1, (3, 3, 3)))
    exact = F.conv3d(x.double(), weight.double(), bias.double(), padding=1)
    errors = [
        (convolve(x, weight, bias, padding=(1, 1, 1), backend=backend).double() - exact).abs().max()
        for backend in BACKENDS
    ]
    assert errors[1] <= 1.01 * errors[0]


def test_errors_say_what_is_allowed() -> None:
    x, weight, bias = drawn(1, (3, 3, 3))
    with pytest.raises(ValueError, match=r"got \(1, 3, 6, 11\) and \(4, 3, 3, 3, 3\)"):
        convolve(x[..., 0], weight, bias)
    with pytest.raises(ValueError, match=r"got a clip of \(2, 11, 7\) and padding \(0, 0, 0\)"):
        convolve(x[:, :, :2], weight, bias)
    with pytest.raises(ValueError, match=r"larger than the padding; got .* \(3, 0, 0\)"):
        convolve(x, weight, bias, padding=(3, 0, 0))
    with pytest.raises(ValueError, match="frames or rows of at most 100 elements; cut the clip"):
        convolve(x, weight, bias, limit=100)


def cost(seconds: float, mebibytes: float) -> Cost:
    return Cost(seconds=seconds, nbytes=int(mebibytes * 2**20))


@pytest.mark.parametrize(
    ("own", "taps", "backend", "why"),
    [
        (cost(1, 10), cost(1.2, 10), "conv3d", "conv3d 1000.00 ms and 10 MiB, taps 1200.00 ms and 10 MiB"),
        (cost(1.1, 10), cost(1, 10), "conv3d", "1100.00 ms"),
        (cost(1.2, 10), cost(1, 10), "taps", "1200.00 ms"),
        (cost(0.5, 100), cost(1, 10), "taps", "100 MiB"),
        (cost(0.5, 0), cost(1, 0), "conv3d", "0 MiB"),
        (RuntimeError("no conv3d here"), cost(1, 10), "taps", "conv3d fails (no conv3d here)"),
        (cost(1, 10), RuntimeError("full"), "conv3d", "taps fails (full)"),
    ],
)
def test_the_choice(own: Cost | RuntimeError, taps: Cost | RuntimeError, backend: str, why: str) -> None:
    def found(backend: ConvolutionBackend) -> Cost:
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


def test_a_real_measurement_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe of a GPU, run on this CPU."""
    tiny = (1, 2, 4, 3, 3)
    assert math.isfinite(measure("taps", torch.device("cpu"), torch.float32, tiny).seconds)
    monkeypatch.setattr(measure, "__defaults__", (tiny,))
    convolution._measured.cache_clear()
    with caplog.at_level(logging.INFO, "cviv-vae"):
        chosen = [convolution._measured(torch.device("cpu"), torch.float32) for _ in range(2)]
    convolution._measured.cache_clear()
    assert chosen[0] == chosen[1]
    assert [r.getMessage().startswith("3-D convolutions on cpu in torch.float32 by ") for r in caplog.records] == [True]
