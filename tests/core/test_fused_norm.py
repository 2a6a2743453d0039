"""Fused norms against the plain definition in float64, for every type, layout and way to write."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vae_core
from vae_core import fused_norm
from vae_core.fused_norm import group_norm_silu, group_statistics, rms_norm_silu
from vae_core.iv_vae import RMSNorm

from .meta_profile import MetaProfile

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "cut": lambda x: F.pad(x, (1, 2, 2, 1))[..., 2:-1, 1:-2],
    "time first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}
SHAPES = [(2, 12, 3, 5, 4), (3, 12, 5, 4)]
GROUPS = 4


def drawn(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    torch.manual_seed(0)
    return LAYOUTS[layout](torch.randn(shape, dtype=torch.float64).to(dtype))


def rms_reference(x: Tensor, gain: Tensor, halves: int, silu: bool) -> Tensor:
    parts = [F.normalize(part, dim=1, eps=1e-12) for part in x.double().chunk(halves, dim=1)]
    y = torch.cat(parts, dim=1) * gain.double().view(-1, *(1,) * (x.ndim - 2))
    return y * torch.sigmoid(y) if silu else y


def group_reference(x: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
    y = F.group_norm(x.double(), GROUPS, weight.double(), bias.double(), eps=1e-5)
    return y * torch.sigmoid(y) if silu else y


def assert_near(got: Tensor, expected: Tensor) -> None:
    """Within one rounding of the result, plus that of float32 (float64) arithmetic."""
    rounding = torch.finfo(got.dtype).eps
    fine = torch.finfo(torch.promote_types(got.dtype, torch.float32)).eps
    torch.testing.assert_close(got.double(), expected, rtol=rounding, atol=32 * fine)


@pytest.fixture(params=["one slab", "many slabs"])
def slabs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many slabs":
        monkeypatch.setattr(fused_norm, "CPU_SLAB", 12 * 4 * 2)  # two rows


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize("shape", SHAPES, ids=["clip", "frames"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("halves", "silu"), [(1, True), (2, False), (2, True)])
def test_rms_norm(shape: tuple[int, ...], layout: str, dtype: torch.dtype, halves: int, silu: bool) -> None:
    x, gain = drawn(shape, dtype, layout), torch.linspace(-1, 3, 12).to(dtype)
    expected = rms_reference(x, gain, halves, silu)
    with torch.no_grad():
        y = rms_norm_silu(x, gain, halves=halves, silu=silu)
        assert y.dtype == dtype
        assert_near(y, expected)
        buffer = torch.full((*shape[:-3], shape[-3] + 1, *shape[-2:]), torch.nan, dtype=dtype)
        out = buffer.narrow(-3, 1, shape[-3])  # behind one cached frame, or channel
        assert rms_norm_silu(x, gain, halves=halves, silu=silu, out=out) is out
        assert_near(out, y.double())
        assert buffer.select(-3, 0).isnan().all()
        assert rms_norm_silu(x, gain, halves=halves, silu=silu, out=x) is x
        assert_near(x, y.double())


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize("shape", SHAPES, ids=["clip", "frames"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("silu", [True, False])
def test_group_norm(shape: tuple[int, ...], layout: str, dtype: torch.dtype, silu: bool) -> None:
    x = drawn(shape, dtype, layout)
    weight, bias = torch.linspace(-1, 3, 12).to(dtype), torch.linspace(2, 1, 12).to(dtype)
    expected = group_reference(x, weight, bias, silu)
    with torch.no_grad():
        mean, variance, count = group_statistics(x, GROUPS)
        assert mean.shape == variance.shape == (shape[0], GROUPS)
        assert mean.dtype == variance.dtype == torch.promote_types(dtype, torch.float32)
        assert count == x[0].numel() // GROUPS
        rstd = (variance + 1e-5).rsqrt()
        y = group_norm_silu(x, mean, rstd, weight, bias, silu=silu)
        assert y.dtype == dtype
        assert_near(y, expected)
        out = torch.empty(2, *shape, dtype=dtype)[1]
        assert group_norm_silu(x, mean, rstd, weight, bias, silu=silu, out=out) is out
        assert_near(out, y.double())
        assert group_norm_silu(x, mean, rstd, weight, bias, silu=silu, out=x) is x
        assert_near(x, y.double())


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_far_from_zero(dtype: torch.dtype, layout: str) -> None:
    """Where the mean is a thousand deviations away, a sum of squares would lose the variance."""
    x = drawn((2, 8, 3, 16, 16), dtype, layout) + 1000
    mean, variance, _ = group_statistics(x, 2)
    values = x.double().unflatten(1, (2, 4)).flatten(2)
    torch.testing.assert_close(mean.double(), values.mean(2), rtol=2 * torch.finfo(dtype).eps, atol=0)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(variance.double(), values.var(2, correction=0), rtol=tolerance, atol=0)


def test_squares_beyond_float16_and_zeros() -> None:
    """60,000 squared overflows; a position of zeros stays zero."""
    x = torch.full((1, 8, 1, 2, 2), 60000.0, dtype=torch.float16)
    x[..., 0] = 0
    y = rms_norm_silu(x, torch.full((8,), 2.0), halves=2, silu=False)
    assert (y[..., 0] == 0).all()
    assert (y[..., 1] == 1).all()
    mean, variance, _ = group_statistics(x, 2)
    assert (mean == 30000).all()
    assert (variance == 9e8).all()


def test_the_norm_of_iv_vae_is_this_one() -> None:
    norm = RMSNorm(12, halves=2, dims=3).requires_grad_(False)
    norm.gamma.copy_(torch.linspace(-1, 2, 12).view(-1, 1, 1, 1))
    x = drawn((2, 12, 3, 5, 4), torch.float32, "contiguous")
    y = rms_norm_silu(x, (norm.scale * norm.gamma).flatten(), halves=2)
    torch.testing.assert_close(y, F.silu(norm(x)), rtol=1e-6, atol=1e-6)


def test_gradients() -> None:
    x = torch.randn(2, 4, 2, 2, 1, dtype=torch.float64, requires_grad=True)
    gain, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def grouped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean, variance, _ = group_statistics(x, 2)
        return group_norm_silu(x, mean, (variance + 1e-3).rsqrt(), weight, bias)

    assert torch.autograd.gradcheck(lambda x, gain: rms_norm_silu(x, gain, halves=2), (x, gain))
    assert torch.autograd.gradcheck(grouped, (x, gain, bias))
    with pytest.raises(ValueError, match="cannot write into `out` where gradients are wanted"):
        rms_norm_silu(x, gain, halves=2, out=torch.empty_like(x))
    with torch.no_grad():
        assert not rms_norm_silu(x, gain, halves=2, out=torch.empty_like(x)).requires_grad


def test_a_compiler_sees_plain_steps() -> None:
    x, gain = torch.randn(1, 4, 2, 3, 3), torch.rand(4)

    def run(x: Tensor, gain: Tensor) -> Tensor:
        buffer = torch.zeros(1, 4, 3, 3, 3)
        rms_norm_silu(x, gain, halves=2, out=buffer[:, :, 1:])
        return buffer

    got = torch.compile(run, backend="aot_eager", fullgraph=True)(x, gain)
    torch.testing.assert_close(got, run(x, gain))


def test_results_keep_their_layout_also_on_the_meta_device() -> None:
    for device in ("cpu", "meta"):
        x = torch.randn(1, 4, 2, 3, 3, device=device).contiguous(memory_format=torch.channels_last_3d)
        gain = torch.ones(4, device=device)
        mean, variance, _ = group_statistics(x, 2)
        for y in (rms_norm_silu(x, gain, halves=2), group_norm_silu(x, mean, variance, gain, gain)):
            assert y.stride() == x.stride()
            assert y.device == x.device


def test_one_read_and_one_write() -> None:
    """As the profile counts them: the norm writes straight into a buffer, or in place, and nothing else is held."""
    with torch.device("meta"):
        x, gain = torch.empty(1, 64, 4, 32, 32, dtype=torch.bfloat16), torch.empty(64)
        buffer, statistics = torch.empty(1, 64, 5, 32, 32, dtype=torch.bfloat16), torch.empty(1, 32)
    nbytes = x.numel() * 2
    for out in (None, x, buffer[:, :, 1:]):
        for run in (
            lambda out: rms_norm_silu(x, gain, halves=2, out=out),
            lambda out: group_norm_silu(x, statistics, statistics, gain, gain, out=out),
        ):
            with torch.no_grad(), MetaProfile() as p:
                run(out)
            assert 2 * nbytes <= p.bytes_moved <= 2.01 * nbytes
    with torch.no_grad(), MetaProfile() as p:
        group_statistics(x, 32)
    assert nbytes <= p.bytes_moved <= 1.01 * nbytes


def test_errors_say_what_is_allowed() -> None:
    x, gain = torch.ones(1, 4, 2, 2, 2), torch.ones(4)
    mean = torch.ones(1, 2)
    with pytest.raises(ValueError, match=r"got 4 channels, gain \(3,\) and halves=2"):
        rms_norm_silu(x, gain[:3], halves=2)
    with pytest.raises(ValueError, match="halves=3"):
        rms_norm_silu(x, gain, halves=3)
    with pytest.raises(ValueError, match=r"\(1, 4\) of torch.float32"):
        rms_norm_silu(x[..., 0, 0, 0], gain, halves=2)
    with pytest.raises(ValueError, match=r"got \(1, 4, 1, 2, 2\) of torch.float32 on cpu"):
        rms_norm_silu(x, gain, halves=2, out=x[:, :, :1])
    with pytest.raises(ValueError, match=r"mean \(1, 2\), rstd \(1, 1\)"):
        group_norm_silu(x, mean, mean[:, :1], gain, gain)
    with pytest.raises(ValueError, match="groups=3"):
        group_statistics(x, 3)


def test_torch_runs_where_triton_is_missing_or_broken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(device: torch.device) -> None:
        raise RuntimeError(f"no compiler for {device}")

    kernels = SimpleNamespace(check=broken)
    monkeypatch.setattr(vae_core, "triton_norm", kernels, raising=False)
    choose = fused_norm._working_kernels.__wrapped__  # not what earlier tests found
    with caplog.at_level(logging.INFO, "cviv-vae"):
        for spec in (None, kernels):
            monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
            assert choose(torch.device("cpu")) is None
    assert "Triton is not installed" in caplog.messages[0]
    assert "no compiler for cpu" in caplog.messages[1]


def test_operators_outlive_a_second_load() -> None:
    """ComfyUI loads the package under another name, and may load it again."""
    x, gain = torch.ones(1, 2, 1, 1, 1), torch.ones(2)
    for _ in range(2):
        importlib.reload(fused_norm)
        assert fused_norm.rms_norm_silu(x, gain, halves=2, silu=False).flatten().tolist() == [1, 1]
