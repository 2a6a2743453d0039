"""How to run a clip in a given amount of memory, and how long that takes: predictions only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from ..run.tiling import AnyPlan, ReferencePlan, TilePlan
from .prediction import Need, Task, predict

MARGIN = 1.25  # what an allocator's slack and the workspaces of kernels add to live tensors, by published accounts
SIDES = (128, 96, 64, 48, 32, 24, 16, 12, 8)  # sides of square tiles that are tried, in latents
STRIPS = (2, 3, 4, 6, 8, 12, 16)  # full-width strips that are tried
LARGEST_CONVOLUTION = 2**31 - 1  # elements; above, GPU libraries leave their fast and safe paths
SLACK = 1.1  # the part of MARGIN that stays once a device was measured: what an allocator loses between its blocks
LEAST_MEASURED = 2**28  # bytes; below, workspaces of a fixed size say nothing about larger frames
CLEARLY_LESS = 0.85  # of the memory of a plan that failed is what the next one may need


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes that may be taken of the device and of RAM; None is no limit."""

    device: int | None = None
    ram: int | None = None


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device does in a second: FLOPs of convolutions, bytes of its own memory, bytes between it and RAM."""

    flops: float
    memory: float
    bus: float

    def seconds(self, need: Need) -> float:
        """How long something takes that needs so much."""
        return max(need.flops / self.flops, need.moved / self.memory) + need.bus / self.bus


NOMINAL = Rates(flops=60e12, memory=450e9, bus=8e9)  # a card of the middle class, and RAM that is not page-locked


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a clip would run, and what that is predicted to need. `str(plan)` says it in words.

    tiles: what to hand to `decode` or `encode` as `plan`; None for whole frames.
    chunks: how many run in time, one after another. tile_count: tiles of a chunk, 1 for whole frames.
    device_bytes: peak on the device, without weights, with what is kept from chunk to chunk, and with a margin on top
    for what an allocator and kernels take: MARGIN, unless `with_margin` put another in its place.
    host_bytes: RAM for what waits between tiles off the device.
    result_bytes: the whole result in the network's number format, for those who keep it whole.
    exact: whether the result is that of whole frames (to rounding).
    fits: whether device_bytes, and host_bytes where RAM is limited, stay within the budget; True without one.
    halo_overhead: extra work because tiles overlap; 0.12 is 12 %.
    """

    tiles: AnyPlan
    chunks: int
    tile_count: int
    device_bytes: int
    host_bytes: int
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
                f"{self._how()}; {chunks}.",
                f"Device memory: about {_size(self.device_bytes)} in addition to the weights.{fits}",
                f"RAM: {self._ram()}.",
                f"Result: {self._exact()}. Extra work for halos: {100 * self.halo_overhead:.0f} %.",
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
        return f"about {_size(self.host_bytes)} while it runs, {result}" if self.host_bytes else f"about {result}"

    def _how(self) -> str:
        if self.tiles is None:
            return "Whole frames"
        if isinstance(self.tiles, ReferencePlan):
            return f"Official tiles of {self.tiles.tile_px} px, {self.tile_count} per chunk"
        height, width = self.tiles.sides
        waits = ", with what waits between tiles in RAM" if self.tiles.offload else ""
        if width is None:
            return f"Exact strips of at most {self.latent_px * height} rows, {self.tile_count} per chunk{waits}"
        return (
            f"Exact tiles of at most {height}x{width} latents ({self.latent_px * height}x{self.latent_px * width} px), "
            f"{self.tile_count} per chunk{waits}"
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def tile_plans(task: Task, *, on_cpu: bool) -> list[TilePlan]:
    """Exact strips and tiles for frames of this size, the fastest first."""
    height, width = task.size
    rows = sorted({-(-height // n) for n in STRIPS} - {height})
    sides = [side for side in SIDES if side < max(height, width)]
    places = (False,) if on_cpu else (False, True)
    plans = [TilePlan(tile=tile, offload=place) for tile in (*((n, None) for n in rows), *sides) for place in places]
    return sorted(plans, key=lambda plan: (NOMINAL.seconds(predict(task, plan)), plan.count(task.size)))


def device_bytes(task: Task, tiles: AnyPlan) -> int:
    """Predicted peak of one chunk on the device, margin included, without weights."""
    return ceil(MARGIN * predict(task, tiles).device)


def measured_margin(in_use: int, predicted: int) -> float | None:
    """What to multiply predictions by, in place of MARGIN, once a chunk has run.

    in_use: most bytes that the device's allocator had given out while it ran, beyond those from before; workspaces of
    kernels are in them. predicted: live tensors, without a margin. None where the chunk is too small to say.
    """
    return SLACK * max(1.0, in_use / predicted) if predicted >= LEAST_MEASURED else None


def budget_for(budget_bytes: int, margin: float) -> int:
    """The budget by which `plan_decode` and `plan_encode` keep within `budget_bytes` at this margin, not MARGIN."""
    return max(1, int(budget_bytes * MARGIN / margin))


def with_margin(plan: Plan, margin: float) -> Plan:
    """A plan made with MARGIN, as it is at another margin."""
    return replace(plan, device_bytes=ceil(plan.device_bytes / MARGIN * margin))


def choose(task: Task, budget: Budget, *, on_cpu: bool) -> Plan:
    """The fastest plan that fits; the one with the least device memory where none does."""
    plans: list[AnyPlan] = [None, *tile_plans(task, on_cpu=on_cpu)]
    for tiles in plans:
        sound = on_cpu or predict(task, tiles).largest_convolution <= LARGEST_CONVOLUTION
        if sound and _fits(task, tiles, budget):
            return describe(task, tiles, budget)
    return describe(task, min(plans, key=lambda tiles: device_bytes(task, tiles)), budget)


def _fits(task: Task, tiles: AnyPlan, budget: Budget) -> bool:
    device = budget.device is None or device_bytes(task, tiles) <= budget.device
    return device and (budget.ram is None or predict(task, tiles).host <= budget.ram)


def smaller(task: Task, tiles: AnyPlan, *, on_cpu: bool) -> TilePlan | None:
    """The fastest plan that needs clearly less memory than `tiles`; None where there is none."""
    limit = CLEARLY_LESS * device_bytes(task, tiles)
    return next((plan for plan in tile_plans(task, on_cpu=on_cpu) if device_bytes(task, plan) <= limit), None)


def describe(task: Task, tiles: AnyPlan, budget: Budget) -> Plan:
    """What running by `tiles` means."""
    need = predict(task, tiles)
    count = tile_count(task, tiles)
    return Plan(
        tiles=tiles,
        chunks=task.chunks,
        tile_count=count,
        device_bytes=device_bytes(task, tiles),
        host_bytes=need.host,
        result_bytes=task.result_bytes,
        exact=not isinstance(tiles, ReferencePlan) or count == 1,
        fits=_fits(task, tiles, budget),
        halo_overhead=max(0.0, need.flops / predict(task, None).flops - 1) if isinstance(tiles, TilePlan) else 0.0,
        latent_px=task.family.compression.space,
    )


def tile_count(task: Task, tiles: AnyPlan) -> int:
    """Tiles of a frame."""
    if tiles is None:
        return 1
    if isinstance(tiles, TilePlan):
        return tiles.count(task.size)
    counts = [len(tiles.latents.spans(n)) for n in task.size]
    return counts[0] * counts[1]
