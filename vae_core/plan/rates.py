"""How fast a device is: measured once for each, in a few milliseconds, or guessed where it is not at hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from ..nn.clip import laid_out
from ..run.stream import is_out_of_memory
from .task import Need

SIDE, FRAMES, WIDTH = 128, 6, 128  # of the clip that is convolved
COPIED = 2**26  # bytes
TIMES = 3  # of which the shortest counts


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device does in a second: FLOPs of convolutions, bytes of its own memory, bytes between it and RAM.

    guessed: nobody measured it.
    """

    flops: float
    memory: float
    bus: float
    guessed: bool = False

    def seconds(self, need: Need) -> float:
        """How long something takes that needs so much: what is copied is copied while the device computes."""
        return sum(max(work.flops / self.flops, work.moved / self.memory, work.bus / self.bus) for work in need.stages)

    def slower(self, times: float) -> Rates:
        """Those of a device on which runs took so many times as long."""
        return Rates(flops=self.flops / times, memory=self.memory / times, bus=self.bus / times)


NOMINAL = Rates(flops=60e12, memory=450e9, bus=12e9, guessed=True)  # a card of the middle class
NOMINAL_CPU = Rates(flops=1e11, memory=2e10, bus=1e10, guessed=True)


@lru_cache(maxsize=16)
def rates_of(device: torch.device, dtype: torch.dtype) -> Rates:
    """Those of a device, for a type of number; guessed where it is not there, or has no memory to be measured in."""
    if not _is_there(device):
        return NOMINAL_CPU if device.type == "cpu" else NOMINAL
    try:
        return _measured(device, dtype)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return NOMINAL


def _is_there(device: torch.device) -> bool:
    """Whether it is a GPU that this torch sees."""
    if device.type == "mps":
        return torch.backends.mps.is_available()
    module = {"cuda": torch.cuda, "xpu": torch.xpu}.get(device.type)
    return module is not None and (device.index or 0) < module.device_count()


def _measured(device: torch.device, dtype: torch.dtype) -> Rates:
    synchronize = getattr(torch, device.type).synchronize
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        x = laid_out(torch.zeros(1, WIDTH, FRAMES, SIDE, SIDE, device=device, dtype=dtype))
        kernel = laid_out(torch.zeros(WIDTH, WIDTH, 3, 3, 3, device=device, dtype=dtype))
        flops = 2 * 27 * WIDTH * WIDTH * (FRAMES - 2) * (SIDE - 2) ** 2
        data = torch.empty(COPIED, dtype=torch.uint8, device=device)
        ram = torch.empty(COPIED, dtype=torch.uint8, pin_memory=device.type == "cuda")
        return Rates(
            flops=flops / _shortest(lambda: F.conv3d(x, kernel), synchronize),
            memory=2 * COPIED / _shortest(data.clone, synchronize),
            bus=COPIED / _shortest(lambda: ram.copy_(data, non_blocking=True), synchronize),
        )


def _shortest(run: Callable[[], object], synchronize: Callable[[], None]) -> float:
    """Seconds of the fastest of some runs."""
    took: list[float] = []
    for _ in range(1 + TIMES):
        synchronize()
        begun = time.perf_counter()
        run()
        synchronize()
        took.append(time.perf_counter() - begun)
    return min(took[1:])
