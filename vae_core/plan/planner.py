"""How to run a clip in a given amount of memory, and how long that takes: predictions only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import TypedDict

import torch

from ..errors import BudgetError
from ..run.tiling import AnyPlan, ReferencePlan, StripPlan, TilePlan
from .prediction import predict
from .rates import NOMINAL, Rates
from .task import MARGIN, Task

SIDES = (128, 96, 64, 48, 32, 24, 16, 12, 8)  # sides of square tiles that are tried, in latents
ROWS = (2, 3, 4, 6, 8, 12, 16)  # full-width tiles that are tried
STRIPS = (4, 8, 16, 32, 64)  # numbers of strips that are tried
AGAIN = (0, 1, 2)  # of the largest activations, that are computed again
BLENDED = (576, 432, 288, 216, 144, 72)  # sides of official tiles that are tried, in pixels
LARGEST_CONVOLUTION = 2**31 - 1  # elements; above, GPU libraries leave their fast and safe paths
SLACK = 1.1  # the part of MARGIN that stays once a device was measured: what an allocator loses between its blocks
LEAST_MEASURED = 2**28  # bytes; below, workspaces of a fixed size say nothing about larger frames
CLEARLY_LESS = 0.85  # of the memory of a plan that failed is what the next one may need
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes that may be taken of the device and of RAM; None is no limit.

    margin: what allocators and kernels add to live tensors that come and go. blended: whether tiles that are not exact
    may be taken where nothing else fits.
    """

    device: int | None = None
    ram: int | None = None
    margin: float = MARGIN
    blended: bool = False


class PlanOptions(TypedDict, total=False):
    """What a plan can be asked for.

    budget_bytes: of device memory, without weights, ram_bytes: of RAM for what waits off the device; no limit, if not
    given. required: raise BudgetError where nothing fits, with the smallest budget that would do. blended: take the
    official tiles, which are not exact, where nothing exact fits. dtype: the model's, if not given. device: where it
    will run; if not given, where the weights lie, or an accelerator if they lie in RAM and there is one. margin: of
    what an allocator takes on top. rates: how fast the device is; measured or guessed, if not given.
    """

    budget_bytes: int | None
    ram_bytes: int | None
    required: bool
    blended: bool
    dtype: torch.dtype | None
    device: torch.device | str | None
    margin: float
    rates: Rates | None


def budget_of(options: PlanOptions) -> Budget:
    """What the options allow. Raises ValueError for numbers of bytes that are none."""
    return Budget(
        device=checked_bytes(options.get("budget_bytes"), "budget_bytes"),
        ram=checked_bytes(options.get("ram_bytes"), "ram_bytes"),
        margin=options.get("margin", MARGIN),
        blended=options.get("blended", False),
    )


def checked_bytes(count: int | None, name: str) -> int | None:
    """The number, if it is one of bytes."""
    if count is not None and not count >= 1:
        raise ValueError(f"{name}={count} was given; it is a number of bytes above 0. Leave it out for no limit.")
    return count


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a clip would run, and what that is predicted to need. `str(plan)` says it in words.

    tiles: what to hand to `decode` or `encode` as `plan`; None for whole frames.
    chunks: how many run in time, one after another. tile_count: tiles of a chunk, 1 for whole frames.
    device_bytes: peak on the device, without weights, with what is kept from chunk to chunk: waiting_bytes, and
    working_bytes with a margin on top for what an allocator and kernels take.
    waiting_bytes: of what waits between steps in memory of its own. working_bytes: of live tensors that come and go.
    host_bytes: RAM for what waits off the device.
    transfer_bytes: between device and RAM, both ways, for the whole clip.
    seconds: how long the whole clip takes, on the device that it was planned for. guessed: whether nobody measured how
    fast that is.
    result_bytes: the whole result in the network's number format, for those who keep it whole.
    exact: whether the result is that of whole frames (to rounding).
    fits: whether device_bytes, and host_bytes where RAM is limited, stay within the budget; True without one.
    halo_overhead: extra work because tiles overlap or are computed again; 0.12 is 12 %.
    """

    tiles: AnyPlan
    chunks: int
    tile_count: int
    device_bytes: int
    waiting_bytes: int
    working_bytes: int
    host_bytes: int
    transfer_bytes: int
    seconds: float
    guessed: bool
    result_bytes: int
    exact: bool
    fits: bool
    halo_overhead: float
    latent_px: int

    def __str__(self) -> str:
        chunks = "1 chunk" if self.chunks == 1 else f"{self.chunks} chunks in time, one after another"
        fits = "" if self.fits else " This does not fit the budget; no smaller way is known."
        return "\n".join(
            (
                f"{self._how()}; {chunks}; about {_time(self.seconds)}{' by guess' if self.guessed else ''}.",
                f"Device memory: about {_size(self.device_bytes)} in addition to the weights.{fits}",
                f"RAM: {self._ram()}.",
                f"Result: {self._exact()}. Extra work: {100 * self.halo_overhead:.0f} %.",
            )
        )

    @property
    def way(self) -> str:
        """The tiles, and whether the result is exact, in a few words."""
        return f"{self._how()}, {self._exact()}"

    def _exact(self) -> str:
        return "exact" if self.exact else "not exact: blended"

    def _ram(self) -> str:
        result = f"{_size(self.result_bytes)} for the result where it is kept whole"
        if not self.host_bytes:
            return f"about {result}"
        moved = f"{_size(self.transfer_bytes)} go to and fro"
        return f"about {_size(self.host_bytes)} while it runs ({moved}), {result}"

    def _how(self) -> str:
        if self.tiles is None:
            return "Whole frames"
        if isinstance(self.tiles, ReferencePlan):
            return f"Official tiles of {self.tiles.tile_px} px, {self.tile_count} per chunk"
        if isinstance(self.tiles, StripPlan):
            where = "" if self.tiles.room is None else ", and the rest of it in RAM"
            again = ", the largest activations computed again" if self.tiles.again else ""
            waits = f"{_size(self.waiting_bytes)} of what waits on the device{where}{again}"
            return f"Exact strips of every step, up to {self.tiles.strips} per chunk, {waits}"
        height, width = self.tiles.sides
        waits = ", with what waits between tiles in RAM" if self.tiles.offload else ""
        if width is None:
            return f"Exact strips of at most {self.latent_px * height} rows, {self.tile_count} per chunk{waits}"
        return (
            f"Exact tiles of at most {height}x{width} latents ({self.latent_px * height}x{self.latent_px * width} px), "
            f"{self.tile_count} per chunk{waits}"
        )


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


def _time(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def exact_plans(task: Task, budget: Budget, *, on_cpu: bool) -> Iterator[AnyPlan]:
    """Exact ways to run, which keep as much on the device as the budget allows; a CPU has no other place."""
    yield None
    streams = task.streams
    pairs: list[tuple[TilePlan | StripPlan, TilePlan | StripPlan]] = []  # all that waits on the device, or nothing
    if streams:
        height, width = task.size
        rows = sorted({-(-height // n) for n in ROWS} - {height})
        sides = [(side, side) for side in SIDES if side < max(height, width)]
        tiles = [*((n, None) for n in rows), *sides]
        pairs = [(TilePlan(tile=tile), TilePlan(tile=tile, offload=True)) for tile in tiles]
    else:
        ways = [(n, again) for again in AGAIN for n in STRIPS]
        pairs = [(StripPlan(strips=n, again=m), StripPlan(strips=n, again=m, room=0)) for n, m in ways]
    for here, away in pairs:
        yield here
        if not on_cpu and budget.device is not None and device_bytes(task, here, budget.margin) > budget.device:
            room = max(0, budget.device - device_bytes(task, away, budget.margin))
            yield replace(away, resident=room) if isinstance(away, TilePlan) else replace(away, room=room)


def device_bytes(task: Task, tiles: AnyPlan, margin: float = MARGIN) -> int:
    """Predicted peak of one chunk on the device, margin included, without weights."""
    need = predict(task, tiles)
    return need.waiting + ceil(margin * need.working)


def measured_margin(in_use: int, plan: Plan) -> float | None:
    """What to multiply predictions by, in place of MARGIN, once a chunk has run.

    in_use: most bytes that the device's allocator had given out while it ran, beyond those from before; workspaces of
    kernels are in them. None where the chunk is too small to say.
    """
    if plan.working_bytes < LEAST_MEASURED:
        return None
    return SLACK * max(1.0, (in_use - plan.waiting_bytes) / plan.working_bytes)


def choose(task: Task, budget: Budget, *, on_cpu: bool, rates: Rates = NOMINAL) -> Plan:
    """The fastest exact plan that fits, or else, where that is allowed, blended tiles; the one with the least device
    memory where none does."""
    plans = list(exact_plans(task, budget, on_cpu=on_cpu))
    fitting = [tiles for tiles in plans if _fits(task, tiles, budget) and (on_cpu or _sound(task, tiles))]
    if not fitting and budget.blended and task.family.reference_tiles:
        fitting = [tiles for tiles in map(ReferencePlan, BLENDED) if _fits(task, tiles, budget)][:1]
    best = min(
        fitting or plans,
        key=lambda tiles: (
            0 if fitting else device_bytes(task, tiles, budget.margin),
            rates.seconds(predict(task, tiles)),
            tile_count(task, tiles),
        ),
    )
    return describe(task, best, budget, rates)


def _sound(task: Task, tiles: AnyPlan) -> bool:
    return predict(task, tiles).largest_convolution <= LARGEST_CONVOLUTION


def _fits(task: Task, tiles: AnyPlan, budget: Budget) -> bool:
    device = budget.device is None or device_bytes(task, tiles, budget.margin) <= budget.device
    return device and (budget.ram is None or predict(task, tiles).host <= budget.ram)


def smallest_budget(task: Task, budget: Budget, *, on_cpu: bool) -> int:
    """The least bytes of device memory for which there is an exact plan, with RAM as in `budget`."""
    least = replace(budget, device=1, blended=False)

    def needed(tiles: AnyPlan) -> int:
        missing = 0 if least.ram is None else max(0, predict(task, tiles).host - least.ram)
        return device_bytes(task, tiles, least.margin) + missing

    count = min(map(needed, exact_plans(task, least, on_cpu=on_cpu)))
    while not choose(task, replace(least, device=count), on_cpu=on_cpu).fits:
        count += count // 50 + 1
    return count


def required(plan: Plan, task: Task, budget: Budget, *, on_cpu: bool) -> Plan:
    """The plan, where it fits. Raises BudgetError otherwise, which names the smallest budget that would do."""
    if plan.fits:
        return plan
    assert budget.device is not None or budget.ram is not None
    height, width = (n * task.family.compression.space for n in task.size)
    ram = "" if budget.ram is None else f" and {_size(budget.ram)} of RAM"
    allowed = "any amount" if budget.device is None else _size(budget.device)
    blended = task.family.reference_tiles and not budget.blended
    least = ceil(1000 * smallest_budget(task, budget, on_cpu=on_cpu) / GIB) / 1000
    raise BudgetError(
        f"To {task.direction} {width}x{height} with {task.family.id} does not fit {allowed} of device memory{ram}: "
        f"the smallest budget in which it can be done exactly is {least:g} GiB. Give that, or smaller frames"
        f"{', or allow blended tiling' if blended else ''}."
    )


def smaller(task: Task, tiles: AnyPlan, budget: Budget, *, on_cpu: bool, rates: Rates = NOMINAL) -> AnyPlan:
    """The fastest plan that needs clearly less memory than `tiles`; None where there is none.

    Exact ones first; after them, where the budget allows it, blended ones.
    """
    limit = int(CLEARLY_LESS * device_bytes(task, tiles, budget.margin))
    plan = choose(task, replace(budget, device=limit), on_cpu=on_cpu, rates=rates)
    return plan.tiles if plan.fits else None


def describe(task: Task, tiles: AnyPlan, budget: Budget, rates: Rates = NOMINAL) -> Plan:
    """What running by `tiles` means."""
    need, whole = predict(task, tiles), predict(task, None)
    count = tile_count(task, tiles)
    return Plan(
        tiles=tiles,
        chunks=task.chunks,
        tile_count=count,
        device_bytes=device_bytes(task, tiles, budget.margin),
        waiting_bytes=need.waiting,
        working_bytes=need.working,
        host_bytes=need.host,
        transfer_bytes=int(task.chunks * need.work.bus),
        seconds=task.chunks * rates.seconds(need),
        guessed=rates.guessed,
        result_bytes=task.result_bytes,
        exact=not isinstance(tiles, ReferencePlan) or count == 1,
        fits=_fits(task, tiles, budget),
        halo_overhead=0.0 if isinstance(tiles, ReferencePlan) else max(0.0, need.work.flops / whole.work.flops - 1),
        latent_px=task.family.compression.space,
    )


def tile_count(task: Task, tiles: AnyPlan) -> int:
    """Tiles of a frame, or the most strips of it."""
    if tiles is None:
        return 1
    if isinstance(tiles, StripPlan):
        return tiles.strips
    if isinstance(tiles, TilePlan):
        return tiles.count(task.size)
    counts = [len(tiles.latents.spans(n)) for n in task.size]
    return counts[0] * counts[1]
