"""How much memory and work one chunk takes by a plan: arithmetic over the same segments that the executor runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

from ..nn.region import Region, Size, chain, full, grid
from ..run.ram import BLOCK
from ..run.segments import Segment, made_again, strips
from ..run.tiling import AnyPlan, ReferencePlan, StripPlan, TilePlan
from .footprint import Cost
from .task import MARGIN, Need, Task, Work, segments_of


@lru_cache(maxsize=4096)
def predict(task: Task, plan: AnyPlan) -> Need:
    """What one chunk of the clip takes while it runs."""
    if isinstance(plan, ReferencePlan):
        return _reference(task, plan)
    return _Simulation(task, plan).run()


def _reference(task: Task, plan: ReferencePlan) -> Need:
    """One tile by itself, and in addition what goes in and what comes out."""
    side, (height, width) = plan.latents.tile, task.size
    tile = predict(replace(task, size=(min(side, height), min(side, width))), None)
    decoding = task.direction == "decode"
    inside = task.chunk.latents * task.frame_bytes(pixels=False) * (1 if decoding else 2)
    outside = task.family.compression.pixel_frames(task.chunk.latents) * task.frame_bytes(pixels=True)
    count = len(plan.latents.spans(height)) * len(plan.latents.spans(width))
    stages = tuple(Work().plus(stage, count) for stage in tile.stages)
    return replace(tile, working=tile.working + inside + outside, stages=stages)


@dataclass(frozen=True)
class _Regions:
    """The regions of all tiles of a segment, before every step and after the last; one row and one column of them tell
    all. heights, widths: of the rows of tiles, and of their columns."""

    axes: tuple[tuple[Region, ...], ...]
    heights: tuple[tuple[int, ...], ...]
    widths: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tiles: Iterable[Sequence[Region]]) -> _Regions:
        """Of the regions of every tile of a grid, or of one row and one column of it."""
        axes = tuple(tuple(regions) for regions in tiles)
        rows = {regions[-1].rows: tuple(region.size[0] for region in regions) for regions in axes}
        columns = {regions[-1].columns: tuple(region.size[1] for region in regions) for regions in axes}
        return cls(axes, tuple(rows.values()), tuple(columns.values()))

    def before(self, segment: Segment, step: int) -> _Regions:
        """What `segment` must run over to give the regions before a step."""
        reaches = [each.reach for each in segment.steps]
        return _Regions.of(chain(reaches, segment.sizes[0], regions[step]) for regions in self.axes)

    @property
    def count(self) -> int:
        return len(self.heights) * len(self.widths)

    def largest(self, step: int) -> Size:
        """The largest region before a step."""
        return max(h[step] for h in self.heights), max(w[step] for w in self.widths)

    def area(self, step: int) -> int:
        """Pixels of all regions together before a step."""
        return sum(h[step] for h in self.heights) * sum(w[step] for w in self.widths)


@dataclass(kw_only=True)
class _Waiting:
    """A canvas. nbytes: of all of it, of which `share` lies on the device, the rest in RAM. area: pixels of a frame.
    memory: bytes of the device that it holds; claimed: of these, what counts as waiting; ram: bytes of RAM. own:
    whether the next canvas may have its memory. made: by which segment, of what, where it is computed again."""

    nbytes: float
    area: int
    share: float = 1.0
    memory: float = 0.0
    claimed: float = 0.0
    ram: float = 0.0
    own: bool = False
    made: tuple[int, _Waiting] | None = None

    @property
    def root(self) -> _Waiting:
        """What really waits."""
        return self if self.made is None else self.made[1].root


class _Simulation:
    """The executor's bookkeeping over one chunk, with numbers in place of tensors."""

    def __init__(self, task: Task, plan: TilePlan | StripPlan | None) -> None:
        self.task = task
        self.plan = plan
        self.segments = segments_of(task)
        self.streams = task.streams
        self.room = None if plan is None else plan.room
        self.again = made_again(self.segments, plan.again) if isinstance(plan, StripPlan) else set[int]()
        decoding = task.direction == "decode"
        frames = task.chunk.latents if decoding else task.family.compression.pixel_frames(task.chunk.latents)
        if not task.family.latents.overlap and frames > 1:  # a later chunk
            frames = task.family.windows(task.direction).step
        chunk = frames * task.frame_bytes(pixels=not decoding)
        self.always = float(task.footprint.kernels + chunk)  # on the device all the time
        self.memories = [0.0, 0.0]  # of streaming layers, on the device and in RAM
        self.source = _Waiting(nbytes=0.0, area=area(task.input_size))  # the chunk itself
        self.kept: _Waiting | None = None
        self.spare = 0.0  # bytes on the device that the next canvas of this size gets
        self.work = Work()
        self.stages: list[Work] = []
        self.working = self.waiting = self.host = self.largest = 0.0

    def run(self) -> Need:
        whole = full(self.task.size)
        tiles = self.plan.tiles(whole) if isinstance(self.plan, TilePlan) else [whole]
        axes = [*{t.rows: t for t in tiles}.values(), *{t.columns: t for t in tiles}.values()]
        laid_out = [
            None if segment.whole else _Regions.of([segment.regions(core, self.task.size) for core in axes])
            for segment in self.segments
        ]
        if self.streams:
            self._remember(laid_out)
        for index, (segment, regions) in enumerate(zip(self.segments, laid_out, strict=True)):
            if not segment.waits:
                self.spare = 0.0
            if regions is None:
                self._whole(index, segment)
            elif self.streams:
                self._stream(index, segment, regions)
            else:
                self._wide(index, segment, regions)
            self.stages.append(self.work)
            self.work = Work()
        return Need(
            working=int(self.working),
            waiting=int(self.waiting),
            host=int(self.host),
            stages=tuple(self.stages),
            largest_convolution=int(self.largest),
        )

    # ------------------------------------------------------------------------------------------- one segment

    def _remember(self, laid_out: list[_Regions | None]) -> None:
        """What layers keep from chunk to chunk, of all tiles."""
        total = 0.0
        for costs, regions in zip(self.task.footprint.costs, laid_out, strict=True):
            for step, nbytes in enumerate(n for cost in costs for n in cost.remembered):
                total += 0.0 if regions is None else self.task.batch * nbytes * regions.area(step)
        here = total if self.room is None else min(total, self.room)
        self.memories = [here, total - here]
        self._add(Work(bus=2 * (total - here)))

    def _whole(self, index: int, segment: Segment) -> None:
        (cost,), size = self.task.footprint.costs[index], segment.sizes[0]
        _, held = self._read(self.source, _Regions.of([[full(size)]]), 0)
        self._see(held + self.task.batch * cost.held(size))
        self._run(cost, [area(size) for size in segment.sizes[1:]])
        self._add(Work(flops=self.task.batch * cost.scores * area(size) ** 2))
        self.largest = max(self.largest, self.task.batch * cost.largest * area(size))
        nbytes = self._output(index, segment)
        self._next(_Waiting(nbytes=nbytes, area=area(segment.sizes[-1]), memory=nbytes), keeps=False)

    def _stream(self, index: int, segment: Segment, regions: _Regions) -> None:
        """Every tile through all steps, one after another."""
        nbytes, offload = self._output(index, segment), self.room is not None
        out = _Waiting(nbytes=nbytes, area=area(segment.sizes[-1]), memory=nbytes)
        if offload and index + 1 < len(self.segments):
            out.share, out.memory, out.ram = 0.0, 0.0, _in_blocks(nbytes)
        gathered = out.memory if regions.count > 1 or offload else 0.0
        (_, clip), step = self._read(self.source, regions, 0), 0
        for cost in self.task.footprint.costs[index]:
            size = regions.largest(step)
            fetched = sum(n * area(regions.largest(step + i)) for i, n in enumerate(cost.remembered))
            self._see(gathered + clip + self.task.batch * (cost.held(size) + (fetched if self.memories[1] else 0.0)))
            self._run(cost, [regions.area(step + 1 + i) for i in range(len(cost.flops))])
            self.largest = max(self.largest, self.task.batch * cost.largest * area(size))
            step += len(cost.flops)
            clip = self.task.batch * cost.output * area(regions.largest(step))
        self._add(Work(bus=(1 - out.share) * nbytes))
        self._see(gathered, ram=out.ram)
        self._next(out, keeps=False)

    def _wide(self, index: int, segment: Segment, regions: _Regions) -> None:
        """One step over all tiles, or over the strips of a whole frame."""
        (cost,) = self.task.footprint.costs[index]
        batch, step = self.task.batch, segment.steps[0]
        if regions.count == 1:
            plan, (height, width) = self.plan if isinstance(self.plan, StripPlan) else None, segment.sizes[-1]
            rows = -(-height // strips(segment, plan, int(self.source.nbytes)))
            reaches = [each.reach for each in segment.steps]
            outs = grid(full((height, width)), (rows, width))
            regions = _Regions.of(chain(reaches, segment.sizes[0], out) for out in outs)
        ends = segment.waits and step.adds is not None
        making, held = self._read(self.source, regions, 0)
        if ends and self.kept is not None:
            held += self._read(self.kept, regions, -1)[1]
        out = self._out(index, segment, regions.count)
        here = 0.0 if regions.count == 1 and out.share == 1 else out.memory  # else it is what the step gives
        self._see(making, here, out.ram)
        self._see(held + batch * cost.held(regions.largest(0)), here)
        self._run(cost, [regions.area(1 + i) for i in range(len(cost.flops))])
        written = self._output(index, segment)
        self._add(Work(bus=(1 - out.share) * written if out.made is None else 0.0))
        self._add(Work(moved=written * (3.0 if ends else 2.0) if regions.count > 1 else 0.0))  # onto the canvas
        follows = index + 1 < len(self.segments) and self.segments[index + 1].waits
        self._add(Work(moved=written if follows else 0.0))  # its moments
        self.largest = max(self.largest, batch * cost.largest * area(regions.largest(0)))
        self._next(out, keeps=segment.waits and step.keeps and not ends)

    def _out(self, index: int, segment: Segment, count: int) -> _Waiting:
        """Where a segment writes to."""
        nbytes, kept = self._output(index, segment), self.kept
        out = _Waiting(nbytes=nbytes, area=area(segment.sizes[-1]), memory=nbytes)
        if index in self.again:
            out.memory, out.made = 0.0, (index, self.source)
            return out
        if index + 1 == len(self.segments):
            return out
        out.claimed = nbytes
        left = float("inf") if self.room is None else self.room - sum(w.root.claimed for w in self._roots())
        if count == 1 and nbytes <= left - self.spare:
            return out
        ends = segment.waits and segment.steps[0].adds is not None
        if ends and index > 1 and kept is not None and kept.made is None and kept.nbytes >= nbytes:
            out.share, out.memory, out.claimed = kept.share, kept.memory, kept.claimed
            out.ram = kept.ram
            kept.memory = kept.claimed = kept.ram = 0.0
            kept.own = False
            return out
        rows = segment.sizes[-1][0]
        out.share = 1.0 if left >= nbytes else max(0.0, left) * rows // nbytes / rows
        out.memory = out.claimed = out.share * nbytes
        out.ram = _in_blocks(nbytes - out.memory)
        out.own = True
        if out.memory:
            self.spare = 0.0  # it is this one's, or not wanted
        return out

    def _read(self, waiting: _Waiting, regions: _Regions, step: int) -> tuple[float, float]:
        """Read all regions before a step: bytes that one needs while it is made, and once it is."""
        if waiting.made is None:
            per_pixel = waiting.nbytes / waiting.area
            self._add(Work(bus=(1 - waiting.share) * per_pixel * regions.area(step)))
            fetched = 0.0 if waiting.share == 1 else 2 * per_pixel * area(regions.largest(step))  # and the next
            return fetched, fetched
        index, source = waiting.made
        (cost,), below = self.task.footprint.costs[index], regions.before(self.segments[index], step)
        making, held = self._read(source, below, 0)
        self._run(cost, [below.area(1 + i) for i in range(len(cost.flops))])
        making = max(making, held + self.task.batch * cost.held(below.largest(0)))
        return making, self.task.batch * cost.output * area(below.largest(-1))

    # ------------------------------------------------------------------------------------------- bookkeeping

    def _output(self, index: int, segment: Segment) -> float:
        return self.task.batch * self.task.footprint.outputs[index] * area(segment.sizes[-1])

    def _roots(self) -> list[_Waiting]:
        """What waits, each once."""
        found = [self.source.root] + ([] if self.kept is None else [self.kept.root])
        return list({id(w): w for w in found}.values())

    def _see(self, nbytes: float, out: float = 0.0, ram: float = 0.0) -> None:
        """A step needs so many bytes of the device, in addition to what waits. out: of what it writes to; ram: of that
        in RAM."""
        waiting = self.memories[0] + self.spare + out + sum(w.memory for w in self._roots())
        self.host = max(self.host, self.memories[1] + ram + sum(w.ram for w in self._roots()))
        working = self.always + nbytes
        if self.room is None and not isinstance(self.plan, StripPlan):  # it comes and goes as everything does
            waiting, working = 0.0, working + waiting
        if waiting + MARGIN * working > self.waiting + MARGIN * self.working:
            self.waiting, self.working = waiting, working

    def _run(self, cost: Cost, areas: list[int]) -> None:
        flops = sum(f * a for f, a in zip(cost.flops, areas, strict=True))
        moved = sum(m * a for m, a in zip(cost.moved, areas, strict=True))
        self._add(Work(flops=self.task.batch * flops, moved=self.task.batch * moved))

    def _add(self, work: Work) -> None:
        self.work = self.work.plus(work)

    def _next(self, out: _Waiting, *, keeps: bool) -> None:
        """The segment is through."""
        self.kept = self.source if keeps else None
        source = self.source.root
        if source.own and not keeps and source is not out.root:
            self.spare = source.memory
        self.source = out


def area(size: Size) -> int:
    return size[0] * size[1]


def _in_blocks(nbytes: float) -> float:
    """RAM for so many bytes."""
    return ceil(nbytes / BLOCK) * BLOCK
