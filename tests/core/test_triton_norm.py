"""The Triton kernels against the torch path: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1) on a CPU."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vae_core.nn import norm

pytest.importorskip("triton", reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("there is no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

from vae_core.nn import triton_norm  # noqa: E402, only where Triton can run

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "cut": lambda x: F.pad(x, (1, 2, 2, 1))[..., 2:-1, 1:-2],
    "time first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}
CASES = [  # few, since the interpreter takes a good part of a second for a call
    ((2, 6, 2, 2, 20), torch.float16, "contiguous"),
    ((2, 6, 2, 2, 20), torch.bfloat16, "channels last"),
    ((1, 6, 2, 2, 20), torch.float32, "cut"),
    ((2, 6, 2, 2, 3), torch.float32, "time first"),
]


def drawn(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    torch.manual_seed(0)
    return LAYOUTS[layout](torch.randn(shape).to(DEVICE, dtype))


def assert_near(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(got.dtype).eps, atol=2e-6)


@pytest.mark.parametrize(("shape", "dtype", "layout"), CASES)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    x, gain = drawn(shape, dtype, layout), torch.linspace(-1, 3, shape[1], device=DEVICE)
    for halves, silu in ((1, True), (2, True), (2, False)):
        expected = torch.empty_like(x)
        norm.rms_norm(x, gain, halves, silu, expected)
        buffer = torch.full((*shape[:2], shape[2] + 1, *shape[3:]), torch.nan, dtype=dtype, device=DEVICE)
        out = buffer[:, :, 1:]
        triton_norm.rms_norm(x, gain, halves, silu, out)
        assert_near(out, expected)
        assert buffer[:, :, 0].isnan().all()
        same = x.clone(memory_format=torch.preserve_format)
        triton_norm.rms_norm(same, gain, halves, silu, same)
        assert_near(same, expected)


@pytest.mark.parametrize(("shape", "dtype", "layout"), CASES)
def test_group_norm(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    x = drawn(shape, dtype, layout)
    scale = torch.linspace(-1, 3, shape[0] * shape[1], device=DEVICE).view(shape[:2])
    mean, bias = scale.flip(1), scale / 2
    for silu in (True, False):
        expected = torch.empty_like(x)
        norm.group_norm(x, mean, scale, bias, silu, expected)
        out = torch.empty(2, *shape, dtype=dtype, device=DEVICE)[1]
        triton_norm.group_norm(x, mean, scale, bias, silu, out)
        assert_near(out, expected)
        same = x.clone(memory_format=torch.preserve_format)
        triton_norm.group_norm(same, mean, scale, bias, silu, same)
        assert_near(same, expected)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((1, 3, 1, 100, 90), "contiguous"), ((2, 6, 2, 5, 7), "channels last"), ((2, 6, 2, 2, 7), "cut")],
)
def test_moments_far_from_zero(shape: tuple[int, ...], layout: str) -> None:
    x = drawn(shape, torch.float32, layout) + 1000
    mean, variance = norm.pool(*triton_norm.channel_moments(x), 3)
    values = x.double().unflatten(1, (3, -1)).flatten(2)
    torch.testing.assert_close(mean.double(), values.mean(2), rtol=2e-7, atol=0)
    torch.testing.assert_close(variance.double(), values.var(2, correction=0), rtol=1e-5, atol=0)


def test_squares_beyond_float16() -> None:
    x = torch.full((1, 8, 1, 2, 2), 60000.0, dtype=torch.float16, device=DEVICE)
    x[..., 0] = 0
    out = torch.empty_like(x)
    triton_norm.rms_norm(x, torch.full((8,), 2.0, device=DEVICE), 2, False, out)
    assert (out[..., 0] == 0).all()
    expected = torch.empty_like(x)
    norm.rms_norm(x, torch.full((8,), 2.0, device=DEVICE), 2, False, expected)
    assert_near(out, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_first_use_checks_the_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    triton_norm.check(DEVICE, dtype)
    monkeypatch.setattr(triton_norm, "group_norm", lambda *_: None)
    with pytest.raises(ArithmeticError, match="wrong numbers"):
        triton_norm.check(DEVICE, dtype)
