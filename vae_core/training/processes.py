"""What several training processes need of each other. All functions do nothing where there is one process alone."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean(x: Tensor) -> Tensor:
    """The mean of `x` over all processes."""
    if world() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / world()


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set in any process; all get the same answer."""
    if world() == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)


def wait() -> None:
    """Until all processes are here."""
    if world() > 1:
        dist.barrier()


@contextmanager
def joined(device: str) -> Generator[torch.device, None, None]:
    """Join the processes that torchrun started, if it did; gives the device of this one.

    device: "auto" (a GPU of its own, else the CPU), "cpu", "cuda" or "cuda:0".
    """
    on_gpu = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield torch.device(("cuda" if on_gpu else "cpu") if device == "auto" else device)
        return
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield own
    finally:
        dist.destroy_process_group()
