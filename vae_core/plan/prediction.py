"""How much memory and work one chunk takes by a plan: arithmetic over the same segments that the executor runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from ..families import Direction, Family
from ..nn.region import Region, Size, chain, full, grid
from ..run.executor import Segment, segments, strip_rows
from ..run.tiling import AnyPlan, ReferencePlan, TilePlan
from .footprint import Cost, Footprint, footprint, meta_network


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is asked about: one direction of a clip of `latents` frames of `size` = (height, width), in latents."""

    family: Family
    config: Any
    halves: tuple[Direction, ...]
    dtype: torch.dtype
    direction: Direction
    batch: int
    latents: int
    size: Size

    @property
    def input_size(self) -> Size:
        """Of a frame that goes in."""
        factor = 1 if self.direction == "decode" else self.family.compression.space
        return factor * self.size[0], factor * self.size[1]

    @property
    def chunks(self) -> int:
        """How many run, one after another."""
        compression = self.family.compression
        frames = self.latents if self.direction == "decode" else compression.pixel_frames(self.latents)
        return self.family.windows(self.direction).count(frames)

    @property
    def chunk(self) -> Task:
        """The same with no more latents than the need of memory depends on."""
        windows = self.family.latents
        return replace(self, latents=min(self.latents, windows.first if windows.overlap else 1 + windows.step))

    def frame_bytes(self, *, pixels: bool) -> int:
        """Bytes of one pixel frame or one latent."""
        height, width = self.size
        space = self.family.compression.space
        count = 3 * space * height * space * width if pixels else self.config.latent_channels * height * width
        return self.batch * count * self.dtype.itemsize

    @property
    def result_bytes(self) -> int:
        """Bytes of what comes out for the whole clip."""
        decoding = self.direction == "decode"
        frames = self.family.compression.pixel_frames(self.latents) if decoding else self.latents
        return frames * self.frame_bytes(pixels=decoding)

    @property
    def footprint(self) -> Footprint:
        return footprint(self.family, self.config, self.halves, self.dtype, self.direction, self.chunk.latents)


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one chunk takes. device, host: most bytes of live tensors at one time, without weights. flops; moved: bytes
    that operators read and write; bus: bytes between device and RAM, both ways. largest_convolution: elements of the
    largest input or output of a convolution."""

    device: int
    host: int
    flops: float
    moved: float
    bus: float
    largest_convolution: int


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
    return replace(
        tile,
        device=tile.device + inside + outside,
        flops=count * tile.flops,
        moved=count * tile.moved,
    )


@lru_cache(maxsize=256)
def _segments(task: Task) -> tuple[Segment, ...]:
    network = meta_network(task.family, task.config, task.halves, task.dtype)
    return tuple(segments(network.steps(task.direction), task.input_size))


@dataclass(frozen=True)
class _Regions:
    """The regions of all tiles of a segment, before every step and after the last: heights of the rows of tiles, and
    widths of their columns."""

    heights: tuple[tuple[int, ...], ...]
    widths: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tiles: list[list[Region]]) -> _Regions:
        """Of the regions of every tile of a grid; one row and one column of it tell all."""
        rows = {regions[-1].rows: tuple(region.size[0] for region in regions) for regions in tiles}
        columns = {regions[-1].columns: tuple(region.size[1] for region in regions) for regions in tiles}
        return cls(tuple(rows.values()), tuple(columns.values()))

    @property
    def count(self) -> int:
        return len(self.heights) * len(self.widths)

    def largest(self, step: int) -> Size:
        """The largest region before a step."""
        return max(h[step] for h in self.heights), max(w[step] for w in self.widths)

    def area(self, step: int) -> int:
        """Pixels of all regions together before a step."""
        return sum(h[step] for h in self.heights) * sum(w[step] for w in self.widths)


@dataclass
class _Waiting:
    """Bytes of a canvas. on_device: where. taken: whether its memory is of the store."""

    nbytes: float
    on_device: bool
    taken: bool = False


class _Simulation:
    """The executor's bookkeeping over one chunk, with numbers in place of tensors."""

    def __init__(self, task: Task, plan: TilePlan | None) -> None:
        self.task = task
        self.plan = plan
        self.segments = _segments(replace(task.chunk, batch=1))
        self.offload = plan is not None and plan.offload
        decoding = task.direction == "decode"
        frames = task.chunk.latents if decoding else task.family.compression.pixel_frames(task.chunk.latents)
        if not task.family.latents.overlap and frames > 1:  # a later chunk
            frames = task.family.windows(task.direction).step
        chunk = frames * task.frame_bytes(pixels=not decoding)
        self.always = float(task.footprint.kernels + chunk)  # on the device all the time
        self.source = _Waiting(0.0, on_device=True)  # the chunk itself
        self.kept: _Waiting | None = None
        self.spare = 0.0
        self.device = self.host = self.flops = self.moved = self.bus = self.largest = 0.0

    def run(self) -> Need:
        whole = full(self.task.size)
        tiles = [whole] if self.plan is None else self.plan.tiles(whole)
        axes = [*{t.rows: t for t in tiles}.values(), *{t.columns: t for t in tiles}.values()]
        streams = any(step.slots() for segment in self.segments for step in segment.steps)
        laid_out = [
            None if segment.whole else _Regions.of([segment.regions(core, self.task.size) for core in axes])
            for segment in self.segments
        ]
        if streams:
            self._remember(laid_out)
        for index, (segment, regions) in enumerate(zip(self.segments, laid_out, strict=True)):
            if not segment.waits:
                self.spare = 0.0
            if regions is None:
                self._whole(index, segment)
            elif streams:
                self._stream(index, segment, regions)
            else:
                self._wide(index, segment, regions)
        needs = (self.device, self.host, self.largest)
        device, host, largest = (int(n) for n in needs)
        return Need(
            device=device, host=host, flops=self.flops, moved=self.moved, bus=self.bus, largest_convolution=largest
        )

    # ------------------------------------------------------------------------------------------- one segment

    def _remember(self, laid_out: list[_Regions | None]) -> None:
        """What layers keep from chunk to chunk, of all tiles."""
        total = 0.0
        for costs, regions in zip(self.task.footprint.costs, laid_out, strict=True):
            for step, nbytes in enumerate(n for cost in costs for n in cost.remembered):
                total += 0.0 if regions is None else self.task.batch * nbytes * regions.area(step)
        if self.offload:
            self.host += total
            self.bus += 2 * total
        else:
            self.always += total

    def _whole(self, index: int, segment: Segment) -> None:
        (cost,), size = self.task.footprint.costs[index], segment.sizes[0]
        self._see(self.task.batch * cost.held(size))
        self._work(cost, [area(size) for size in segment.sizes[1:]])
        self.flops += self.task.batch * cost.scores * area(size) ** 2
        self.largest = max(self.largest, self.task.batch * cost.largest * area(size))
        self._next(_Waiting(self._output(index, segment), on_device=True), keeps=False)

    def _stream(self, index: int, segment: Segment, regions: _Regions) -> None:
        """Every tile through all steps, one after another."""
        out = _Waiting(self._output(index, segment), on_device=not self.offload)
        cut = regions.count > 1 or self.offload
        gathered = out.nbytes if cut and out.on_device else 0.0
        clip, step = 0.0, 0
        for cost in self.task.footprint.costs[index]:
            size = regions.largest(step)
            fetched = sum(n * area(regions.largest(step + i)) for i, n in enumerate(cost.remembered))
            self._see(gathered + self.task.batch * (clip + cost.held(size) + (fetched if self.offload else 0.0)))
            self._work(cost, [regions.area(step + 1 + i) for i in range(len(cost.flops))])
            self.largest = max(self.largest, self.task.batch * cost.largest * area(size))
            step += len(cost.flops)
            clip = cost.output * area(regions.largest(step))
        if self.offload:
            self.bus += out.nbytes
            self.host += out.nbytes
        self._next(out, keeps=False)

    def _wide(self, index: int, segment: Segment, regions: _Regions) -> None:
        """One step over all tiles, or over the strips of a whole frame."""
        (cost,) = self.task.footprint.costs[index]
        batch, step = self.task.batch, segment.steps[0]
        if regions.count == 1 and not self.offload and segment.waits:
            height, width = segment.sizes[-1]
            outs = grid(full((height, width)), (strip_rows(height, int(self.source.nbytes)), width))
            regions = _Regions.of([chain([step.reach], segment.sizes[0], out) for out in outs])
        ends = segment.waits and step.adds is not None
        out = _Waiting(self._output(index, segment), on_device=not self.offload)
        given = self.source.nbytes / area(segment.sizes[0])
        fetched = 0.0 if self.source.on_device else given * area(regions.largest(0))
        self.bus += 0.0 if self.source.on_device else given * regions.area(0)
        if ends and self.kept is not None and not self.kept.on_device:
            fetched += self.kept.nbytes / area(segment.sizes[-1]) * area(regions.largest(1))
            self.bus += self.kept.nbytes
        allocated = 0.0
        if regions.count > 1 or self.offload:
            onto = ends and self.kept is not None and self.kept.on_device == out.on_device and index > 1
            if onto and self.kept is not None and self.kept.nbytes >= out.nbytes:
                out = _Waiting(self.kept.nbytes, out.on_device)
                self.kept = _Waiting(0.0, out.on_device)
            elif self.spare == out.nbytes:
                out.taken, self.spare = True, 0.0
            else:
                out.taken, self.spare = True, 0.0
            allocated = out.nbytes
        self.bus += 0.0 if out.on_device else self._output(index, segment)
        self.host = max(self.host, self._held(on_device=False) + (0.0 if out.on_device else allocated))
        self._see(fetched + batch * cost.held(regions.largest(0)) + (allocated if out.on_device else 0.0))
        self._work(cost, [regions.area(1)])
        written = self._output(index, segment)
        self.moved += written * (3.0 if ends else 2.0) if allocated else 0.0  # onto the canvas
        follows = index + 1 < len(self.segments) and self.segments[index + 1].waits
        self.moved += written if follows else 0.0  # its moments
        self.largest = max(self.largest, batch * cost.largest * area(regions.largest(0)))
        self._next(out, keeps=segment.waits and step.keeps and not ends)

    # ------------------------------------------------------------------------------------------- bookkeeping

    def _output(self, index: int, segment: Segment) -> float:
        return self.task.batch * self.task.footprint.outputs[index] * area(segment.sizes[-1])

    def _held(self, *, on_device: bool) -> float:
        """Bytes of what waits."""
        waiting = [w for w in (self.source, self.kept) if w is not None and w.on_device == on_device]
        spare = self.spare if on_device != self.offload else 0.0
        return sum(w.nbytes for w in waiting) + spare

    def _see(self, nbytes: float) -> None:
        """Something needs so many bytes of the device, in addition to what waits."""
        self.device = max(self.device, self.always + self._held(on_device=True) + nbytes)

    def _work(self, cost: Cost, areas: list[int]) -> None:
        self.flops += self.task.batch * sum(f * a for f, a in zip(cost.flops, areas, strict=True))
        self.moved += self.task.batch * sum(m * a for m, a in zip(cost.moved, areas, strict=True))

    def _next(self, out: _Waiting, *, keeps: bool) -> None:
        """The segment is through."""
        if keeps:
            self.kept = self.source
        else:
            self.kept = None
            self.spare = self.source.nbytes if self.source.taken else self.spare
        self.source = out


def area(size: Size) -> int:
    return size[0] * size[1]
