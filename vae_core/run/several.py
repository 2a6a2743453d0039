"""Chunks that stand alone, on several devices at once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from ..families import Direction, Network
from .executor import Pass
from .stream import Between, Recover, is_out_of_memory, run_chunks
from .tiling import AnyPlan


def run_on_several(
    chunks: Iterable[Tensor],
    networks: Sequence[Network],
    direction: Direction,
    plan: AnyPlan,
    *,
    recover: Recover | None,
    between: Between | None,
) -> Iterator[Tensor]:
    """What networks of the same weights make of the chunks, in turn, each on its device and in a thread of its own.

    Results come in order, on the device of the chunks; as many chunks as there are devices are under way. recover,
    between: as in `RunOptions`; they are called by one thread at a time, and what `between` raises ends all of them.
    """
    ended, lock = threading.Event(), threading.Lock()

    def checked() -> None:
        with lock:
            if ended.is_set():
                raise _EndedError
            if between is None:
                return
            try:
                between()
            except BaseException as error:
                if not (isinstance(error, Exception) and is_out_of_memory(error)):  # which ends nothing yet
                    ended.set()
                raise

    def recovered(error: Exception, plan: AnyPlan) -> AnyPlan:
        with lock:
            return None if recover is None else recover(error, plan)

    works = [Pass(network, direction, plan, between=checked) for network in networks]
    graph, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def run(chunk: Tensor, work: Pass) -> Tensor:
        weight = next(work.network.parameters())
        with torch.inference_mode(inference), torch.set_grad_enabled(graph and not inference):
            answer = None if recover is None else recovered
            (done,) = run_chunks([chunk], work, device=weight.device, dtype=weight.dtype, recover=answer)
            return done

    under_way: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(len(works)) as pool:
        try:
            for number, chunk in enumerate(chunks):
                if len(under_way) == len(works):
                    yield under_way.popleft().result()
                # what it lies in may be written over when the next is asked for
                under_way.append(pool.submit(partial(run, chunk.clone(), works[number % len(works)])))
            while under_way:
                yield under_way.popleft().result()
        except _EndedError:
            raise _first_error(under_way) from None
        finally:
            ended.set()


class _EndedError(Exception):
    """Another device has failed, or nobody wants the rest."""


def _first_error(under_way: Iterable[Future[Tensor]]) -> BaseException:
    """What ended the others."""
    errors = [error for future in under_way if (error := future.exception()) is not None]
    return next((error for error in errors if not isinstance(error, _EndedError)), _EndedError())
