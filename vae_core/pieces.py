"""Piece by piece through a model, and going on by another plan where memory ran out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from .cv_tiles import CVPass
from .cv_vae import CVVAE
from .iv_tiles import IVPass
from .keys import Model
from .tiles import AnyPlan, ReferencePlan, TilePlan

# called with the error and the plan that ran; gives the plan to go on by, or None to give up
Recover = Callable[[Exception, AnyPlan], AnyPlan]

OUT_OF_MEMORY_TEXTS = ("out of memory", "alloc_failed", "can't allocate memory", "not enough memory")


class Pass(Protocol):
    """One direction of one video through a model, piece by piece in order."""

    plan: Any

    def begin(self, piece: Tensor) -> None: ...

    def finish(self) -> Tensor: ...

    def switch(self, plan: TilePlan | ReferencePlan) -> None: ...


def make_pass(model: Model, plan: AnyPlan, *, decoding: bool) -> Pass:
    """The pass of a model; raises ValueError for a plan that the model does not know."""
    if isinstance(model, CVVAE):
        return CVPass(model, plan, decoding=decoding)
    return IVPass(model, plan, decoding=decoding)


def is_out_of_memory(error: Exception) -> bool:
    """Whether `error` says that a device, or RAM, has no room left."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):  # under this name in every torch
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in OUT_OF_MEMORY_TEXTS)


def run_pieces(
    pieces: Iterable[Tensor],
    work: Pass,
    *,
    device: torch.device,
    dtype: torch.dtype,
    recover: Recover | None,
    bring_back: bool = True,
) -> Iterator[Tensor]:
    """What `work` makes of every piece; `recover` as in `VideoVAE.decode`.

    bring_back: to the device of the piece; without, it is left where it was made.
    """
    for piece in pieces:
        done = _run_piece(piece, work, recover, device=device, dtype=dtype)
        yield done.to(piece.device) if bring_back else done
        del done


def _run_piece(
    piece: Tensor, work: Pass, recover: Recover | None, *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Run one piece; when memory runs out, ask `recover` for another plan and go on by that."""
    begun = False
    while True:
        try:
            if not begun:
                work.begin(piece.to(device, dtype))
                begun = True
            return work.finish()
        except Exception as error:
            if recover is None or not is_out_of_memory(error):
                raise
            failure = error
        # Outside the handler, and without the traceback, whose frames keep the tensors of the failed piece alive.
        failure = failure.with_traceback(None)
        failure.__context__ = failure.__cause__ = None
        plan = recover(failure, work.plan)
        if plan is None:
            raise failure
        del failure
        work.switch(plan)
