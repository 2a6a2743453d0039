"""Chunk after chunk through a network, and going on by another plan where memory ran out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypedDict, cast

import torch
from torch import Tensor

from ..nn.clip import laid_out
from .executor import Pass
from .tiling import AnyPlan

# called with the error and the plan that ran; gives the plan to go on by, or None to give up
Recover = Callable[[Exception, AnyPlan], AnyPlan]
Between = Callable[[], None]


class RunOptions(TypedDict, total=False):
    """How a clip runs.

    plan: None for whole frames, a `TilePlan` or `StripPlan` for exact tiles or strips, a `ReferencePlan` for the
    official tiling of CV-VAE; `plan_decode` and `plan_encode` choose one.
    recover: called with the error and the plan when memory runs out; it returns the plan by which to go on at the
    failed chunk, or None to give up, and the error is raised. What was done before stays; the tensors of the failed
    chunk are freed by then.
    between: called after every step of the network on every tile, in the middle of a chunk, on a CPU in the middle of
    large steps, too; what it raises ends the run: for progress and cancelling.
    """

    plan: AnyPlan
    recover: Recover | None
    between: Between | None


OUT_OF_MEMORY_TEXTS = (
    "out of memory",  # CUDA, ROCm, MPS
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED
    "can't allocate memory",  # DefaultCPUAllocator, also in brackets with the error's number
    "cannot allocate memory",
    "not enough memory",
    "not enough gpu video memory",  # DirectML
    "invalid buffer size",  # MPS
    "out_of_device_memory",  # Level Zero, of Intel GPUs
    "out_of_host_memory",
    "out_of_resources",
    "unable to find an engine",  # cuDNN, where no engine's workspace finds room: GET and FIND
    "cudnn_status_internal_error",  # cuDNN, likewise
    "32-bit index math",  # a tensor that is too large for a kernel: smaller ones are not
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether `error` says that a device, or RAM, has no room left."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):  # under this name in every torch
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in OUT_OF_MEMORY_TEXTS)


def run_chunks(
    chunks: Iterable[Tensor],
    work: Pass,
    *,
    device: torch.device,
    dtype: torch.dtype,
    recover: Recover | None,
    bring_back: bool = True,
) -> Iterator[Tensor]:
    """What `work` makes of every chunk; `recover` as in `VideoVAE.decode`.

    bring_back: to the device of the chunk; without, it is left where it was made.
    """
    for chunk in chunks:
        done = _uncompiled()(chunk, work, recover, device=device, dtype=dtype)
        yield done.to(chunk.device) if bring_back else done
        del done


def _run_chunk(
    chunk: Tensor, work: Pass, recover: Recover | None, *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Run one chunk; when memory runs out, ask `recover` for another plan and run it again by that."""
    while True:
        try:
            return work.run(laid_out(chunk.to(device, dtype)))
        except Exception as error:
            if recover is None or not is_out_of_memory(error):
                raise
            failure: Exception | None = error
        while failure is not None:
            # Outside the handler, and without the traceback, whose frames keep the tensors of the failed chunk alive.
            failure = failure.with_traceback(None)
            failure.__context__ = failure.__cause__ = None
            plan = recover(failure, work.plan)
            if plan is None:
                raise failure
            failure = _switched(work, plan)


def _switched(work: Pass, plan: AnyPlan) -> Exception | None:
    """Go on by a plan; the error, where memory runs out over that."""
    try:
        work.switch(plan)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return error
    return None


def _uncompiled() -> Callable[..., Tensor]:
    """`_run_chunk`, on whose bookkeeping a compiler from outside would break; `VideoVAE.compile` is the way. Nobody
    compiles where torch has not loaded its compiler, which takes seconds."""
    if "torch._dynamo" not in sys.modules:
        return _run_chunk
    return cast("Callable[..., Tensor]", torch.compiler.disable(_run_chunk))
