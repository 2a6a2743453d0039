"""Out of memory: caught, freed, gone on at what failed by a smaller plan; the result is that of an undisturbed run."""

from __future__ import annotations

import gc
import weakref
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vae_core
from vae_core import StripPlan, TilePlan, VideoVAE
from vae_core.run import tiling
from vae_core.run.executor import Pass
from vae_core.run.stream import is_out_of_memory

Make = Callable[..., vae_core.VideoVAE]
RUNGS = [TilePlan(tile=(2, 2)), TilePlan(tile=(1, 2), offload=True), TilePlan(tile=1)]
STRIPS = [StripPlan(strips=2), StripPlan(strips=4, room=20_000), StripPlan(strips=8, room=0, again=2)]


class Faults(TorchDispatchMode):
    """Writes down convolutions, and makes the given ones run out of memory.

    log: of every convolution what tells it from others: the sums of its input and of its kernel.
    """

    def __init__(self, at: set[int] | None = None) -> None:
        super().__init__()
        self.at = set() if at is None else at
        self.log: list[tuple[float, float]] = []
        self.inputs: list[weakref.ref[Tensor]] = []

    @property
    def calls(self) -> int:
        return len(self.log)

    @property
    def failed(self) -> int:
        return len(self.inputs)

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "convolution" in func.name():
            self.log.append((args[0].sum().item(), args[1].sum().item()))
            if self.calls - 1 in self.at:
                self.inputs.append(weakref.ref(args[0]))
                raise torch.cuda.OutOfMemoryError("injected")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "HIP out of memory. Tried to allocate 2.00 GiB.",
        "MPS backend out of memory (MPS allocated: 5.95 GB).",
        "Invalid buffer size: 19.07 GB",
        "Could not allocate tensor with 1073741824 bytes. There is not enough GPU video memory available!",
        "Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
        "Native API failed. Native API returns: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)",
        "GET was unable to find an engine to execute this computation",
        "FIND was unable to find an engine to execute this computation",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Expected canUse32BitIndexMath(input) to be true: input tensor must fit into 32-bit index math",
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory. Error code 12",
    ],
)
def test_every_name_of_too_little_memory_is_known(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(ValueError(text))


def test_other_errors_are_not_taken_for_it() -> None:
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"))


def down_the_rungs(rungs: list[TilePlan]) -> Callable[[Exception, Any], Any]:
    left = list(rungs)

    def recover(error: Exception, plan: Any) -> Any:
        assert is_out_of_memory(error)
        assert error.__traceback__ is None
        return left.pop(0) if left else plan

    return recover


def clip(vae: vae_core.VideoVAE, decoding: bool) -> Tensor:
    """Two chunks, three groups, or two frames."""
    torch.manual_seed(0)
    latents = {"iv-vae": 3, "image-vae": 2}.get(vae.family, 6)
    if decoding:
        return torch.randn(1, vae.info.latent_channels, latents, 2, 3, dtype=torch.float64)
    return torch.rand(1, 3, vae.info.compression.pixel_frames(latents), 16, 24, dtype=torch.float64) * 2 - 1


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
    with Faults() as faults:
        expected = run(vae, x, decoding)
    for n in range(0, faults.calls, max(1, faults.calls // 9)):
        first = [None, *RUNGS][n % 4]
        with Faults({n}) as faults:
            got = run(vae, x, decoding, plan=first, recover=down_the_rungs(RUNGS[n % 4 :]))
        assert faults.failed == 1
        close(got, expected)


def test_an_error_in_any_strip_changes_nothing(
    small_vae: Make, decoding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "LEAST_ROWS", 1)
    vae = small_vae("cv-vae")
    x = clip(vae, decoding)
    calls: list[int] = []
    for plan in STRIPS:
        with Faults() as faults:
            expected = run(vae, x, decoding, plan=plan)
        calls.append(faults.calls)
    for n in range(9):
        first = n % 3
        with Faults({1 + n * (calls[first] - 1) // 9}) as faults:
            got = run(vae, x, decoding, plan=STRIPS[first], recover=down_the_rungs(STRIPS[first + 1 :]))
        assert faults.failed == 1
        close(got, expected)


def test_errors_all_the_way_down_change_nothing(family: str, small_vae: Make, decoding: bool) -> None:
    vae = small_vae(family)
    x = clip(vae, decoding)
    with Faults() as plain:
        expected = run(vae, x, decoding)
    start = plain.calls // 2
    with Faults({start, start + 5, start + 31}) as faults:
        close(run(vae, x, decoding, recover=down_the_rungs(RUNGS)), expected)
    assert faults.failed == 3


def test_the_same_plan_may_go_on(family: str, small_vae: Make, decoding: bool) -> None:
    """`recover` may free memory elsewhere and give back the plan that ran."""
    vae = small_vae(family)
    x = clip(vae, decoding)
    plan = TilePlan(tile=2)
    expected = run(vae, x, decoding, plan=plan)
    with Faults({20, 21, 22, 80}) as faults:
        got = run(vae, x, decoding, plan=plan, recover=lambda error, plan: plan)
    assert faults.failed == 4
    assert torch.equal(got, expected)


def undisturbed(
    vae: vae_core.VideoVAE, x: Tensor, decoding: bool, plan: TilePlan | None
) -> tuple[list[tuple[float, float]], list[int]]:
    """The convolutions of a run, and how many were done when each began of what one error takes back.

    That is a chunk where chunks do not depend on each other; else a run of steps of one tile that begins and ends
    outside of any skip, or the steps of one group that see whole frames.
    """
    begun: list[int] = []
    names = ("_steps", "_whole") if vae.family == "iv-vae" else ("run",)

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            begun.append(faults.calls)
            return original(*args, **keywords)

        return call

    with pytest.MonkeyPatch.context() as patch, Faults() as faults:
        for name in names:
            patch.setattr(Pass, name, watched(getattr(Pass, name)))
        run(vae, x, decoding, plan=plan)
    return faults.log, begun


@pytest.mark.parametrize(
    ("plan", "then"),
    [(None, TilePlan(tile=50)), (TilePlan(tile=2), TilePlan(tile=2)), (RUNGS[1], RUNGS[1])],
    ids=["whole", "tiles", "offloaded"],
)
def test_only_what_failed_runs_again(
    family: str, small_vae: Make, decoding: bool, plan: TilePlan | None, then: TilePlan
) -> None:
    """Convolution by convolution: as undisturbed up to the error, and then what it took back, by the other plan."""
    vae = small_vae(family)
    x = clip(vae, decoding)
    before, begun = undisturbed(vae, x, decoding, plan)
    after, begun_after = undisturbed(vae, x, decoding, then)
    assert len(begun) == len(begun_after) > 1
    for n in (len(before) // 3, len(before) // 2, len(before) - 3):
        with Faults({n}) as faults:
            run(vae, x, decoding, plan=plan, recover=lambda error, plan: then)
        last = bisect_right(begun, n) - 1
        assert faults.log == before[: n + 1] + after[begun_after[last] :]


def test_finished_chunks_are_out_before_an_error_is_raised(family: str, small_vae: Make) -> None:
    vae = small_vae(family)
    latent = clip(vae, True)
    with Faults() as plain:
        expected = vae.decode(latent)
    asked: list[Any] = []

    def give_up(error: Exception, plan: Any) -> None:
        asked.append(plan)

    done: list[Tensor] = []
    with Faults({plain.calls - 3}), pytest.raises(torch.cuda.OutOfMemoryError, match="injected"):
        done.extend(vae.decode_stream(latent, recover=give_up))
    assert asked == [None]
    frames = torch.cat(done, dim=2)
    last = vae.info.compression.time
    assert frames.shape[2] == expected.shape[2] - last
    assert torch.equal(frames, expected[:, :, :-last])


def test_what_failed_is_freed_before_recover_is_called(family: str, small_vae: Make, decoding: bool) -> None:
    """Outside the handler: neither the error nor a frame of its traceback keeps the failed layer's input."""
    vae = small_vae(family)
    x = clip(vae, decoding)
    freed: list[bool] = []
    faults = Faults({37})

    def recover(error: Exception, plan: Any) -> Any:
        gc.collect()
        freed.append(faults.inputs[0]() is None)
        return TilePlan(tile=2)

    with faults:
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


def test_the_official_tiling_is_refused_on_the_way_too(small_vae: Make) -> None:
    vae = small_vae("iv-vae")
    with Faults({5}), pytest.raises(ValueError, match="whose official code does not tile"):
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


def test_memory_that_runs_out_while_tiles_are_cut_is_survived(
    small_vae: Callable[..., VideoVAE], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = small_vae("iv-vae")
    latent = torch.randn(1, vae.info.latent_channels, 4, 4, 4, dtype=torch.float64)
    whole, steps, placed, asked = vae.decode(latent), 0, 0, list[object]()
    place = Pass._placed

    def fail() -> None:
        nonlocal steps
        steps += 1
        if steps == 130:
            raise torch.OutOfMemoryError("injected")

    def placing(self: Pass, x: torch.Tensor) -> torch.Tensor:
        nonlocal placed
        placed += 1
        if placed == 7:
            raise torch.OutOfMemoryError("injected while the tiles are cut")
        return place(self, x)

    def recover(error: Exception, plan: object) -> TilePlan:
        asked.append(plan)
        return TilePlan(tile=3 - len(asked))

    monkeypatch.setattr(Pass, "_placed", placing)
    got = torch.cat(list(vae.decode_stream(latent, between=fail, recover=recover)), dim=2)
    assert asked == [None, TilePlan(tile=2)]
    assert (got - whole).abs().max() <= 1e-12 * whole.std()
