"""Norms against the plain definition in float64, for every type, layout and way to write; and the fused operators."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_core.nn import norm, operators
from vae_core.nn.clip import Clip
from vae_core.nn.norm import Activation, Moments, RMSNorm
from vae_core.nn.operators import attention, gather, moments, put
from vae_core.nn.region import NO_PADDING, Padding, full, grid

from .meta_profile import MetaProfile

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "cut": lambda x: F.pad(x, (1, 2, 2, 1))[..., 2:-1, 1:-2],
    "time first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}
SHAPE = (2, 12, 3, 5, 4)
GROUPS = 4


def drawn(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    torch.manual_seed(0)
    return LAYOUTS[layout](torch.randn(shape, dtype=torch.float64).to(dtype))


def rms_norm(halves: int, dtype: torch.dtype = torch.float64) -> RMSNorm:
    layer = RMSNorm(12, halves=halves, dims=3).requires_grad_(False).to(dtype)
    layer.gamma.copy_(torch.linspace(-1, 3, 12).view(-1, 1, 1, 1))
    return layer


def group_norm(dtype: torch.dtype = torch.float64, groups: int = GROUPS) -> nn.GroupNorm:
    layer = nn.GroupNorm(groups, 12, eps=1e-5).requires_grad_(False).to(dtype)
    layer.weight.copy_(torch.linspace(-1, 3, 12))
    layer.bias.copy_(torch.linspace(2, 1, 12))
    return layer


def rms_reference(x: Tensor, layer: RMSNorm, silu: bool) -> Tensor:
    halves = [F.normalize(half, dim=1, eps=1e-12) for half in x.double().chunk(layer.halves, dim=1)]
    y = torch.cat(halves, dim=1) * layer.gamma.double() * layer.scale
    return y * torch.sigmoid(y) if silu else y


def group_reference(x: Tensor, layer: nn.GroupNorm, silu: bool) -> Tensor:
    y = F.group_norm(x.double(), layer.num_groups, layer.weight.double(), layer.bias.double(), eps=layer.eps)
    return y * torch.sigmoid(y) if silu else y


def assert_near(got: Tensor, expected: Tensor) -> None:
    """Within one rounding of the result, plus that of float32 (float64) arithmetic."""
    rounding = torch.finfo(got.dtype).eps
    fine = torch.finfo(torch.promote_types(got.dtype, torch.float32)).eps
    torch.testing.assert_close(got.double(), expected, rtol=rounding, atol=32 * fine)


@pytest.fixture(params=["one slab", "many slabs"])
def slabs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many slabs":
        monkeypatch.setattr(norm, "CPU_SLAB", 12 * 4 * 2)  # two rows


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("halves", "silu"), [(1, True), (2, False), (2, True)])
def test_rms_norm(layout: str, dtype: torch.dtype, halves: int, silu: bool) -> None:
    x, layer = drawn(SHAPE, dtype, layout), rms_norm(halves, dtype)
    expected = rms_reference(x, layer, silu)
    y, _ = gather(Clip([x]), Activation(layer, silu=silu))
    assert y.dtype == dtype
    assert_near(y, expected)
    plain = Activation(layer, silu=silu).plain(x)  # which rounds between the two
    torch.testing.assert_close(plain.double(), expected, rtol=3 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("silu", [True, False])
def test_group_norm(layout: str, dtype: torch.dtype, silu: bool) -> None:
    x, layer = drawn(SHAPE, dtype, layout), group_norm(dtype)
    found = moments(Clip([x]), GROUPS)
    assert found.mean.shape == found.variance.shape == (2, GROUPS)
    assert found.mean.dtype == found.variance.dtype == torch.promote_types(dtype, torch.float32)
    assert found.count == x[0].numel() // GROUPS
    y, _ = gather(Clip([x]), Activation(layer, found, silu=silu))
    assert y.dtype == dtype
    assert_near(y, group_reference(x, layer, silu))


@pytest.mark.usefixtures("slabs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_far_from_zero(dtype: torch.dtype, layout: str) -> None:
    """Where the mean is a thousand deviations away, a sum of squares would lose the variance."""
    x = drawn((2, 8, 3, 16, 16), dtype, layout) + 1000
    found = moments(Clip([x]), 2)
    values = x.double().unflatten(1, (2, 4)).flatten(2)
    torch.testing.assert_close(found.mean.double(), values.mean(2), rtol=2 * torch.finfo(dtype).eps, atol=0)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found.variance.double(), values.var(2, correction=0), rtol=tolerance, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_pooled_moments_count_the_difference_between_regions(offset: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 12, 3, 5, 8, dtype=torch.float64) + offset
    x[..., 4:] += 3  # regions with different means
    pooled: Moments | None = None
    for region in grid(full((5, 8)), (2, 3)):
        pooled = moments(Clip([region.of(x)]), GROUPS).pooled(pooled)
    y, _ = gather(Clip([x]), Activation(group_norm(), pooled))
    torch.testing.assert_close(y, group_reference(x, group_norm(), silu=True), rtol=0, atol=1e-8 if offset else 1e-12)


def test_moments_of_half_precision_are_in_single() -> None:
    x = (torch.randn(1, 12, 2, 16, 16) + 100).half()
    pooled: Moments | None = None
    for region in grid(full((16, 16)), (5, 7)):
        pooled = moments(Clip([region.of(x)]), GROUPS).pooled(pooled)
    assert pooled is not None
    assert pooled.mean.dtype == torch.float32
    y, _ = gather(Clip([x]), Activation(group_norm(torch.float16), pooled))
    assert y.dtype == torch.float16
    expected = group_reference(x, group_norm(), silu=True)
    torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-3)


def test_squares_beyond_float16_and_zeros() -> None:
    """60,000 squared overflows; a position of zeros stays zero, and the shortest length counts as such."""
    x = torch.full((1, 12, 1, 2, 2), 60000.0, dtype=torch.float16)
    x[..., 0] = 0
    layer = rms_norm(2, torch.float16)
    layer.gamma.fill_(1)
    y, _ = gather(Clip([x]), Activation(layer, silu=False))
    assert (y[..., 0] == 0).all()
    assert (y[..., 1] == 1).all()
    found = moments(Clip([x]), 2)
    assert (found.mean == 30000).all()
    assert (found.variance == 9e8).all()


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("length", [1e-10, 1e-12, 1e-13])
def test_the_shortest_length_of_an_rms_norm_is_the_published_one(length: float, plain: bool) -> None:
    """Vectors longer than 1e-12 get length sqrt(width of a half), shorter ones less in proportion."""
    x = torch.zeros(1, 12, 1, 1, 2, dtype=torch.float64)
    x[:, 0], x[:, 6] = length, -length
    layer = rms_norm(2)
    layer.gamma.fill_(1)
    activation = Activation(layer, silu=False)
    y = activation.plain(x) if plain else gather(Clip([x]), activation)[0]
    expected = 6**0.5 * min(1.0, length / 1e-12)
    torch.testing.assert_close(y[0, 0], torch.full_like(y[0, 0], expected), rtol=1e-9, atol=0)
    torch.testing.assert_close(y[0, 6], torch.full_like(y[0, 6], -expected), rtol=1e-9, atol=0)


# ---------------------------------------------------------------------------------------------------- operators


def in_tensors(x: Tensor, *, apart: bool = True) -> Clip:
    """Channels 0 to 6 in one tensor; of the others the first frame, then the rest. apart: else all are split so."""
    if not apart:
        return Clip([x[:, :, :1].clone(), x[:, :, 1:].clone()], [(0, 0), (0, 1)])
    return Clip([x[:, :6].clone(), x[:, 6:, :1].clone(), x[:, 6:, 1:].clone()], [(0, 0), (6, 0), (6, 1)])


@pytest.mark.parametrize("replicate", [False, True])
@pytest.mark.parametrize("padding", [NO_PADDING, Padding(1, 1, 1, 1), Padding(0, 1, 2, 0)])
@pytest.mark.parametrize("front", [False, True])
@pytest.mark.parametrize("kind", ["none", "rms", "group"])
def test_a_clip_is_gathered_as_the_steps_one_by_one_would(
    kind: str, front: bool, padding: Padding, replicate: bool
) -> None:
    x, before = drawn(SHAPE, torch.float64, "contiguous"), torch.randn(2, 12, 1, 5, 4, dtype=torch.float64)
    activation: Activation | None = None
    expected = x
    if kind == "rms":
        activation, expected = Activation(rms_norm(2)), rms_reference(x, rms_norm(2), silu=True)
    elif kind == "group":
        activation = Activation(group_norm(), moments(in_tensors(x, apart=False), GROUPS))
        expected = group_reference(x, group_norm(), silu=True)
    last = expected[:, :, -1:]
    if front:
        expected = torch.cat((before, expected), dim=2)
    top, bottom, left, right = padding
    mode = "replicate" if replicate else "constant"
    expected = F.pad(expected, (left, right, top, bottom, 0, 0), mode=mode)
    clip = in_tensors(x, apart=kind != "group")
    y, kept = gather(clip, activation, padding=padding, replicate=replicate, front=before if front else None, keep=True)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert kept is not None
    torch.testing.assert_close(kept, last, rtol=0, atol=1e-12)
    assert not clip.tensors


def test_what_needs_no_change_is_not_copied() -> None:
    x = torch.randn(SHAPE)
    y, last = gather(Clip([x]))
    assert y is x
    assert last is None


def test_clips_are_put_together_and_added() -> None:
    x, other = drawn(SHAPE, torch.float64, "contiguous"), drawn(SHAPE, torch.float64, "channels last") + 1
    room = torch.full((2, 12, 3, 7, 6), torch.nan, dtype=torch.float64)
    put(in_tensors(x), room[..., 1:6, 1:5], Clip([other]))
    assert torch.equal(room[..., 1:6, 1:5], x + other)
    assert room[..., 0, :].isnan().all()
    for clip, plus in ((in_tensors(x), Clip([other])), (Clip([x.clone()]), in_tensors(other))):
        assert torch.equal(clip.plus(plus).tensor(), x + other)
    assert torch.equal(in_tensors(x).tensor(), x)


@pytest.mark.parametrize("rows", [3, 10, 1000])
def test_attention_in_rows_and_batches_is_attention(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 5, 10, 8, dtype=torch.float64)
    monkeypatch.setattr(operators, "SCORES", 10 * rows)
    monkeypatch.setattr(operators, "MOST_BATCHES", 2)
    expected = torch.softmax(q @ k.mT / 8**0.5, dim=-1) @ v
    torch.testing.assert_close(attention(q, k, v, plain=False), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(attention(q, k, v, plain=True), expected, rtol=0, atol=1e-12)


def test_batches_of_attention_are_ones_that_every_torch_can_do() -> None:
    assert operators.MOST_BATCHES < 2**16


def test_one_read_and_one_write() -> None:
    """As the profile counts them: the norm writes straight into the input of the convolution; nothing else is held."""
    with torch.device("meta"):
        x = torch.empty(1, 12, 4, 32, 32, dtype=torch.bfloat16)
        layers = rms_norm(2, torch.bfloat16), group_norm(torch.bfloat16)
    nbytes = x.numel() * 2
    for layer in layers:
        found = moments(Clip([x]), GROUPS)
        with torch.no_grad(), MetaProfile() as profile:
            gather(Clip([x]), Activation(layer, found))
        assert 2 * nbytes <= profile.bytes_moved <= 2.01 * nbytes
    with torch.no_grad(), MetaProfile() as profile:
        moments(Clip([x]), GROUPS)
    assert nbytes <= profile.bytes_moved <= 1.01 * nbytes


# ---------------------------------------------------------------------------------------------------- Triton


def choose(monkeypatch: pytest.MonkeyPatch, kernels: object, dtype: torch.dtype = torch.float16) -> object:
    monkeypatch.setitem(sys.modules, "vae_core.nn.triton_norm", kernels)
    import vae_core.nn

    monkeypatch.setattr(vae_core.nn, "triton_norm", kernels, raising=False)
    return operators._working_kernels.__wrapped__(torch.device("cpu"), dtype)  # not what earlier tests found


def test_torch_runs_where_triton_is_broken(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """For one type or for all: what fails to compile in one leaves the others."""

    def check(device: torch.device, dtype: torch.dtype) -> None:
        if dtype == torch.bfloat16:
            raise RuntimeError(f"no {dtype} on {device}")

    kernels = SimpleNamespace(check=check)
    with caplog.at_level(logging.INFO, "cviv-vae"):
        assert choose(monkeypatch, kernels) is kernels
        assert choose(monkeypatch, kernels, torch.bfloat16) is None
    assert caplog.messages[0] == "Norm and SiLU on cpu in float16: Triton kernels."
    assert "do not work here (no torch.bfloat16 on cpu)" in caplog.messages[1]


def test_torch_runs_where_triton_is_missing_or_a_stub(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Some packs put an empty module of that name in place."""
    for triton in (None, SimpleNamespace(__spec__=None)):
        monkeypatch.setitem(sys.modules, "triton", triton)
        monkeypatch.delitem(sys.modules, "vae_core.nn.triton_norm", raising=False)
        with caplog.at_level(logging.INFO, "cviv-vae"):
            assert operators._working_kernels.__wrapped__(torch.device("cpu"), torch.float32) is None
    assert "Triton is not installed" in caplog.messages[0]
    assert len(caplog.messages) == 2


def test_out_of_memory_is_no_verdict_on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(device: torch.device, dtype: torch.dtype) -> None:
        raise torch.cuda.OutOfMemoryError("full")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        choose(monkeypatch, SimpleNamespace(check=full))


def test_operators_outlive_a_second_load() -> None:
    """ComfyUI loads the package under another name, and may load it again."""
    x = torch.ones(1, 12, 1, 1, 1)
    layer = rms_norm(2, torch.float32)
    layer.gamma.fill_(1)
    for _ in range(2):
        importlib.reload(operators)
        assert operators.gather(Clip([x]), Activation(layer, silu=False))[0].flatten().tolist() == [1] * 12
