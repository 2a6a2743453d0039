"""What runs have shown since ComfyUI started: tiles that worked where memory ran out, and how much it really takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

import torch

from ...vae_core import AnyPlan, Plan
from ...vae_core.plan.planner import MARGIN, measured_margin
from ...vae_core.plan.rates import Rates

TIMED = 3  # chunks


class Session:
    """Facts by key: of a job (device, model, direction, size of the frame) or of a setting (device, dtype, family)."""

    def __init__(self) -> None:
        self._tiles: dict[Hashable, tuple[Hashable, AnyPlan]] = {}
        self._margins: dict[Hashable, float] = {}
        self._paces: dict[Hashable, float] = {}

    def worked(self, job: Hashable, asked: Hashable, tiles: AnyPlan) -> None:
        """`tiles` are what went on where memory ran out; asked: what the user had asked for."""
        self._tiles[job] = asked, tiles

    def tiles_for(self, job: Hashable, asked: Hashable) -> AnyPlan:
        """The tiles that went on the last time; forgotten as soon as something else is asked for."""
        if job in self._tiles and self._tiles[job][0] != asked:
            del self._tiles[job]
        return self._tiles[job][1] if job in self._tiles else None

    def failed(self, job: Hashable) -> None:
        """Even the smallest tiles found no memory: the next run plans anew."""
        self._tiles.pop(job, None)

    def measured(self, setting: Hashable, margin: float) -> None:
        """What to multiply predictions by from now on."""
        self._margins[setting] = margin

    def margin(self, setting: Hashable) -> float:
        """What to multiply predictions by: as measured, else what is usual."""
        return self._margins.get(setting, MARGIN)

    def paced(self, setting: Hashable, times: float) -> None:
        """Runs take so many times as long as the rates of the device say."""
        self._paces[setting] = times * self._paces.get(setting, 1.0)

    def rates(self, setting: Hashable, rates: Rates) -> Rates:
        """The rates of the device, corrected by what ran."""
        return rates.slower(self._paces[setting]) if setting in self._paces else rates

    def clear(self) -> None:
        """Forget everything."""
        self._tiles.clear()
        self._margins.clear()
        self._paces.clear()


class Gauge:
    """Compares memory and time that a run takes with what was predicted, once its first chunks are done.

    plan: what runs. chunks: how many reach the peak. peak: reads the most bytes in use since the run began, beyond
    those from before; None where nothing can be measured. clock: seconds.
    """

    def __init__(
        self,
        session: Session,
        setting: Hashable,
        *,
        plan: Plan,
        chunks: int,
        peak: Callable[[], int] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock, self._times = clock, list[float]()
        self._session, self._setting, self._plan = session, setting, plan
        self._left, self._peak = chunks, peak

    def chunk_done(self) -> None:
        """One chunk more; what it took is kept when enough are done."""
        self._times.append(self._clock())
        if len(self._times) == TIMED + 1:  # the first chunk is often shorter, and warms up
            took = (self._times[-1] - self._times[0]) / TIMED
            self._session.paced(self._setting, took * self._plan.chunks / self._plan.seconds)
        self._left -= 1
        if self._peak is None or self._left != 0:
            return
        margin = measured_margin(self._peak(), self._plan)
        if margin is not None:
            self._session.measured(self._setting, margin)

    def spoil(self) -> None:
        """Memory ran out, and neither peak nor time are those of what was predicted."""
        self._peak, self._times = None, [0.0] * (TIMED + 1)


def peak_reader(device: torch.device) -> Callable[[], int] | None:
    """For `Gauge`: reads what torch has given out on `device` beyond what it had now; None for other than CUDA."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    return lambda: torch.cuda.max_memory_allocated(device) - before


SESSION = Session()
