"""Out of memory: caught, freed, gone on at what failed by a smaller plan; the result is that of an undisturbed run."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vae_core
from vae_core import TilePlan
from vae_core.pieces import is_out_of_memory

Make = Callable[..., vae_core.VideoVAE]
RUNGS = [TilePlan(tile=(2, 2)), TilePlan(tile=(1, 2), offload=True), TilePlan(tile=1)]


class Faults:
    """Counts the calls of every convolution in a model, and makes the given ones run out of memory."""

    def __init__(self, model: nn.Module, at: set[int] | None = None) -> None:
        self.at = set() if at is None else at
        self.calls = 0
        self.inputs: list[weakref.ref[Tensor]] = []
        self.failed = 0
        self.per_layer: Counter[str] = Counter()
        self.model = model

    def _before(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            n, self.calls = self.calls, self.calls + 1
            self.per_layer[name] += 1
            if n in self.at:
                self.failed += 1
                self.inputs.append(weakref.ref(args[0]))
                raise torch.cuda.OutOfMemoryError("injected")

        return hook

    @contextmanager
    def active(self) -> Iterator[Faults]:
        layers = {
            name: m for name, m in self.model.named_modules() if next(m.parameters(recurse=False), None) is not None
        }
        handles = [layer.register_forward_pre_hook(self._before(name)) for name, layer in layers.items()]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


def down_the_rungs(rungs: list[TilePlan]) -> Callable[[Exception, Any], Any]:
    left = list(rungs)

    def recover(error: Exception, plan: Any) -> Any:
        assert is_out_of_memory(error)
        assert error.__traceback__ is None
        return left.pop(0) if left else plan

    return recover


def clip(vae: vae_core.VideoVAE, decoding: bool) -> Tensor:
    """Two chunks or three groups."""
    torch.manual_seed(0)
    latents = 3 if vae.family == "iv-vae" else 6
    if decoding:
        return torch.randn(1, vae.info.latent_channels, latents, 2, 3, dtype=torch.float64)
    return torch.rand(1, 3, 4 * latents - 3, 16, 24, dtype=torch.float64) * 2 - 1


def run(vae: vae_core.VideoVAE, x: Tensor, decoding: bool, **kwargs: Any) -> Tensor:
    return vae.decode(x, **kwargs) if decoding else vae.encode(x, **kwargs)


def close(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-10 * expected.std()


@pytest.fixture(params=[True, False], ids=["decode", "encode"])
def decoding(request: pytest.FixtureRequest) -> bool:
    return request.param


def test_an_error_at_any_layer_changes_nothing(family: str, small_vae: Make, decoding: bool) -> None:
    """One error at a time, spread over the whole run, in front of every rung."""
    vae = small_vae(family)
    x = clip(vae, decoding)
    with Faults(vae.model).active() as faults:
        expected = run(vae, x, decoding)
    for n in range(0, faults.calls, max(1, faults.calls // 9)):
        first = [None, *RUNGS][n % 4]
        with Faults(vae.model, {n}).active() as faults:
            got = run(vae, x, decoding, plan=first, recover=down_the_rungs(RUNGS[n % 4 :]))
        assert faults.failed == 1
        close(got, expected)


def test_errors_all_the_way_down_change_nothing(family: str, small_vae: Make, decoding: bool) -> None:
    vae = small_vae(family)
    x = clip(vae, decoding)
    with Faults(vae.model).active() as plain:
        expected = run(vae, x, decoding)
    start = plain.calls // 2
    with Faults(vae.model, {start, start + 5, start + 31}).active() as faults:
        close(run(vae, x, decoding, recover=down_the_rungs(RUNGS)), expected)
    assert faults.failed == 3


def test_the_same_plan_may_go_on(family: str, small_vae: Make, decoding: bool) -> None:
    """`recover` may free memory elsewhere and give back the plan that ran."""
    vae = small_vae(family)
    x = clip(vae, decoding)
    plan = TilePlan(tile=2)
    expected = run(vae, x, decoding, plan=plan)
    with Faults(vae.model, {20, 21, 22, 80}).active() as faults:
        got = run(vae, x, decoding, plan=plan, recover=lambda error, plan: plan)
    assert faults.failed == 4
    assert torch.equal(got, expected)


def test_no_finished_piece_is_run_again(family: str, small_vae: Make, decoding: bool) -> None:
    """Only the chunk that failed runs its layers again; IV-VAE not even that, only the layer of the tile."""
    vae = small_vae(family)
    x = clip(vae, decoding)
    coder = "decoder" if decoding else "encoder"
    first = f"{coder}.conv_in" + (".conv_2d" if family == "iv-vae" and not decoding else "")
    with Faults(vae.model).active() as plain:
        run(vae, x, decoding)
    with Faults(vae.model, {plain.calls - 3}).active() as faults:  # in the last piece
        run(vae, x, decoding, recover=lambda error, plan: vae_core.TilePlan(tile=50))
    assert faults.failed == 1
    pieces = 3 if family == "iv-vae" else 2
    assert plain.per_layer[first] == pieces
    assert faults.per_layer[first] == pieces + (0 if family == "iv-vae" else 1)
    if family == "iv-vae":
        again = faults.per_layer - plain.per_layer
        assert len([name for name in again if "conv_3d" in name and "to_moments" not in name]) <= 1


def test_finished_pieces_are_out_before_an_error_is_raised(family: str, small_vae: Make) -> None:
    vae = small_vae(family)
    latent = clip(vae, True)
    with Faults(vae.model).active() as plain:
        expected = vae.decode(latent)
    asked: list[Any] = []

    def give_up(error: Exception, plan: Any) -> None:
        asked.append(plan)

    done: list[Tensor] = []
    with Faults(vae.model, {plain.calls - 3}).active(), pytest.raises(torch.cuda.OutOfMemoryError, match="injected"):
        done.extend(vae.decode_stream(latent, recover=give_up))
    assert asked == [None]
    frames = torch.cat(done, dim=2)
    assert frames.shape[2] == expected.shape[2] - 4
    assert torch.equal(frames, expected[:, :, :-4])


def test_what_failed_is_freed_before_recover_is_called(family: str, small_vae: Make, decoding: bool) -> None:
    """Outside the handler: neither the error nor a frame of its traceback keeps the failed layer's input."""
    vae = small_vae(family)
    x = clip(vae, decoding)
    freed: list[bool] = []
    faults = Faults(vae.model, {37})

    def recover(error: Exception, plan: Any) -> Any:
        gc.collect()
        freed.append(faults.inputs[0]() is None)
        return TilePlan(tile=2)

    with faults.active():
        run(vae, x, decoding, recover=recover)
    assert freed == [True]


def test_other_errors_pass_through(small_vae: Make) -> None:
    vae = small_vae("iv-vae")

    def recover(error: Exception, plan: Any) -> Any:
        raise AssertionError("only memory is recovered from")

    handle = vae.model.decoder.conv_in.register_forward_pre_hook(lambda *_: _raise(RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        vae.decode(clip(vae, True), recover=recover)
    handle.remove()


def _raise(error: Exception) -> None:
    raise error


def test_the_official_tiling_is_refused_for_iv_vae_on_the_way_too(small_vae: Make) -> None:
    vae = small_vae("iv-vae")
    with Faults(vae.model, {5}).active(), pytest.raises(ValueError, match="whose official code does not tile"):
        vae.decode(clip(vae, True), recover=lambda error, plan: vae_core.ReferencePlan(64, 0.25))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError("x"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
