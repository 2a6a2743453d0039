"""One direction of one video through a network, chunk by chunk, in whole frames or in tiles.

Between two points of waiting it goes deep: a tile through all steps up to the next, with what it must see around it. At
a point of waiting it goes wide: what all tiles gave lies on a `Canvas` before any goes on. Steps that must see whole
frames run on those. A whole frame is a single tile, cut into strips where a step that waits would hold much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..families import Direction, Network
from ..nn.clip import Clip, laid_out
from ..nn.convolution import interruptible
from ..nn.region import Region, Size, chain, full, grid
from ..nn.steps import Context, Kernels, Memory, Step, add, skips, walk
from .segments import Segment, made_again, segments, strips
from .store import Again, AnyCanvas, Canvas, Store
from .tiling import AnyPlan, ReferencePlan, StripPlan, TilePlan, run_blended

Compiled = Callable[..., tuple[Tensor, dict[str, Tensor]]]


@dataclass
class Track:
    """One tile on its way. core: what it owns, in latents. done: how many of a segment's runs of steps are through;
    clip: what they gave."""

    core: Region
    memory: Memory
    done: int = 0
    clip: Clip | None = None

    def leave(self, home: torch.device) -> None:
        """Have everything on another device."""
        self.memory.move(home)
        self.clip = None if self.clip is None else Clip([self.clip.tensor().to(home)])


@dataclass
class Progress:
    """How far a chunk has come. source: what goes into the next segment; kept: what that, or a later one, will add;
    out: what the tiles that are through have given."""

    segments: list[Segment]
    source: AnyCanvas
    done: int = 0
    kept: AnyCanvas | None = None
    out: AnyCanvas | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """A segment, what goes into it, what is added to what it gives, and where that goes."""

    segment: Segment
    source: AnyCanvas
    kept: AnyCanvas | None
    out: AnyCanvas


class Pass:
    """One direction of one video. State: a track for each tile, and the progress of the current chunk.

    plan: None for whole frames. compiled: `Network.chunk`, compiled; whole frames then run by it. between: called after
    every step of every tile, on a CPU in the middle of large ones, too; after every chunk where steps are not seen,
    which is compiled or for gradients. Where
    gradients are asked for, torch's own operators run over whole frames.
    Raises ValueError for a plan that the family does not know.
    """

    def __init__(
        self,
        network: Network,
        direction: Direction,
        plan: AnyPlan,
        *,
        compiled: Compiled | None = None,
        between: Callable[[], None] | None = None,
    ) -> None:
        self.network = network
        self.direction: Direction = direction
        self.steps = network.steps(direction)
        self.plan = _allowed(plan, network)
        self._compiled = compiled
        self._between = between or (lambda: None)
        self._told = between
        self._streams = any(step.slots() for step in self.steps)
        self._kernels = Kernels()
        self._first = True
        self._recalled: dict[str, Tensor] = {}
        self._device = torch.device("cpu")
        self._latent: Size = (0, 0)  # of a frame
        self._segments: list[Segment] = []
        self._tracks: list[Track] = []
        self._progress: Progress | None = None
        self._waiting: Store | None = None

    def run(self, chunk: Tensor) -> Tensor:
        """Moments (b, 2z, t', h', w') of the next chunk, or its frames; `chunk` is laid out as clips are on its device.

        If it raises, it may be called again with the same chunk, by another plan too. Where chunks depend on each other
        it then goes on at what failed, since what its layers remember is of this chunk already.
        """
        self._device = chunk.device
        graph = needs_graph(chunk, self.network)
        if graph and (self.plan is not None or len(self._tracks) > 1):
            raise ValueError(
                "Tiles keep nothing for gradients, and the input or the model requires them. Leave plan out, or run "
                "under torch.no_grad()."
            )
        compiled = self._compiled if self.plan is None and len(self._tracks) < 2 and not graph else None
        try:
            if graph:
                out = self._plain(chunk, self.network.chunk)
            else:
                with _no_autocast(chunk.device), interruptible(self._told):
                    out = self._run(chunk) if compiled is None else self._plain(chunk, compiled)
        except BaseException:
            self._store.bus.settle()
            if not self._streams:
                self._progress = self._waiting = None
            raise
        self._first, self._progress = False, None
        return out

    def switch(self, plan: AnyPlan) -> None:
        """Go on by another plan, or by the same one."""
        if plan == self.plan:
            return
        self.plan = _allowed(plan, self.network)
        self._waiting = None
        if isinstance(self.plan, TilePlan) and self._streams:
            for track in self._tracks:
                track.leave(torch.device("cpu"))  # the device is full
            self._tracks = [track for old in self._tracks for track in self._cut(old, self.plan)]

    def remembered(self) -> dict[str, Tensor]:
        """What layers remember of the chunks so far, of whole frames, in RAM; empty where chunks stand alone."""
        found: dict[str, Tensor] = {}
        for slot, size, pairs in self._slots(self._tracks):
            for track, region in pairs:
                frames = track.memory.get(slot, torch.device("cpu"))
                if frames is not None:
                    if slot not in found:
                        found[slot] = frames.new_empty(*frames.shape[:3], *size)
                    region.of(found[slot]).copy_(frames)
        return found

    def recall(self, remembered: dict[str, Tensor]) -> None:
        """Begin after the chunks of which layers remembered this."""
        self._recalled, self._first = remembered, False

    def _slots(self, tracks: Sequence[Track]) -> Iterator[tuple[str, Size, list[tuple[Track, Region]]]]:
        """Every slot, the size of its frames, and the region of them that each track remembers."""
        for segment in self._segments:
            regions = [] if segment.whole else [segment.regions(track.core, self._latent) for track in tracks]
            for i, step in enumerate(segment.steps):
                for slot in step.slots() if regions else ():
                    yield slot, segment.sizes[i], [(t, r[i]) for t, r in zip(tracks, regions, strict=True)]

    def _run(self, chunk: Tensor) -> Tensor:
        if not isinstance(self.plan, ReferencePlan):
            return self._frame(chunk)
        latents, pixels = self.plan.latents, self.plan.pixels
        source, target = (latents, pixels) if self.direction == "decode" else (pixels, latents)
        return run_blended(chunk, lambda tile: self._frame(laid_out(tile)), source=source, target=target)

    def _plain(self, chunk: Tensor, run: Compiled) -> Tensor:
        """Whole frames by torch's own operators, which tell of no step; layers remember what they do otherwise, too."""
        if not self._streams:
            out, _ = run(self.direction, chunk, {}, True)  # to them every chunk is the same kind
        else:
            if not self._tracks:
                self._lay_out(segments(self.steps, (chunk.shape[-2], chunk.shape[-1])))
            (track,) = self._tracks
            out, held = run(self.direction, chunk, track.memory.snapshot(), self._first)
            track.memory.restore(held)
        self._between()
        return out

    def _frame(self, chunk: Tensor) -> Tensor:
        size = chunk.shape[-2], chunk.shape[-1]
        progress = self._progress
        if progress is None:
            source = Canvas(size, Store(self._device))
            source.write(full(size), Clip([chunk]))
            progress = Progress(segments(self.steps, size), source)
        if not (self._streams and self._tracks):
            self._lay_out(progress.segments)
        self._progress = progress if self._streams else None
        while progress.done < len(progress.segments):
            self._segment(progress)
        return progress.source.tensor()

    def _lay_out(self, found: list[Segment]) -> None:
        """Make the tiles."""
        first, last = found[0].sizes[0], found[-1].sizes[-1]
        self._segments, self._latent = found, first if self.direction == "decode" else last
        whole = full(self._latent)
        cores = self.plan.tiles(whole) if isinstance(self.plan, TilePlan) else [whole]
        self._tracks = self._new_tracks(cores)
        for slot, _, pairs in self._slots(self._tracks):
            for track, region in pairs:
                if slot in self._recalled:
                    track.memory.put(slot, self._placed(region.of(self._recalled[slot])))
        self._recalled = {}

    @property
    def _store(self) -> Store:
        """Memory for what waits between tiles and steps, kept from chunk to chunk."""
        if self._waiting is None:
            room = self.plan.room if isinstance(self.plan, (TilePlan, StripPlan)) else None
            self._waiting = Store(self._device, 0 if self._streams and room is not None else room)
        return self._waiting

    def _new_tracks(self, cores: Sequence[Region], done: int = 0) -> list[Track]:
        """Tiles, whose memories wait in RAM if the plan says so, but for what there is room for."""
        if not (isinstance(self.plan, TilePlan) and self.plan.offload):
            return [Track(core, Memory(), done) for core in cores]
        home, claim = torch.device("cpu"), Store(self._device, self.plan.resident).claim
        return [Track(core, Memory(home, claim), done) for core in cores]

    def _context(self, memory: Memory) -> Context:
        return Context(memory=memory, kernels=self._kernels, first=self._first)

    # ------------------------------------------------------------------------------------------------- running

    def _segment(self, progress: Progress) -> None:
        """Run the next segment, or what is left of it."""
        segment, source, kept = progress.segments[progress.done], progress.source, progress.kept
        ends = segment.waits and segment.steps[-1].adds is not None
        if not segment.waits:
            self._store.clear()
        if progress.out is None:
            progress.out = self._out(progress, kept if ends else None)
        job = Job(segment=segment, source=source, kept=kept if ends else None, out=progress.out)
        if isinstance(job.out, Again):
            job.out.make = lambda region: self._again(job, region)
        if segment.whole:
            job.out.write(full(job.out.size), self._whole(job))
        elif self._streams:
            for track in self._tracks:
                self._tile(job, track, segment.regions(track.core, self._latent))
        else:
            self._wide(job, self._regions(job))
        for track in self._tracks:
            track.done = 0
        if not ends and segment.waits and segment.steps[0].keeps:
            progress.kept = source
        else:
            if progress.kept is not None:
                progress.kept.free(again=False)
            progress.kept = None
            if not isinstance(job.out, Again):
                source.free()
        progress.source, progress.out, progress.done = job.out, None, progress.done + 1

    def _out(self, progress: Progress, kept: AnyCanvas | None) -> AnyCanvas:
        """Where the next segment writes to. kept: what will be added."""
        segment, last = progress.segments[progress.done], progress.done + 1 == len(progress.segments)
        following = None if last else progress.segments[progress.done + 1]
        measure = following.steps[0].moments if following is not None and following.waits else None
        again = self.plan.again if isinstance(self.plan, StripPlan) else 0
        if measure is not None and progress.done in made_again(progress.segments, again):
            return Again(segment.sizes[-1], progress.source, measure)
        store = Store(self._device) if segment.whole or last else self._store
        own = kept if isinstance(kept, Canvas) and progress.done > 1 else None  # else it is the chunk itself
        return Canvas(segment.sizes[-1], store, measure=measure, onto=own)

    def _wide(self, job: Job, tiles: list[list[Region]]) -> None:
        """A segment over all tiles or strips; what waits in RAM for the next is fetched meanwhile."""
        for n, regions in enumerate(tiles):
            for following in tiles[n + 1 : n + 2]:
                job.source.ahead(following[0])
                if job.kept is not None:
                    job.kept.ahead(following[-1])
            self._tile(job, Track(regions[-1], Memory()), regions)

    def _again(self, job: Job, region: Region) -> Clip:
        """A region of what a segment gives, whose output does not wait."""
        steps = job.segment.steps
        regions = chain([step.reach for step in steps], job.segment.sizes[0], region)
        clip = job.source.read(regions[0])
        return self._steps(job, list(steps), 0, regions, clip, Memory())[0]

    def _whole(self, job: Job) -> Clip:
        """What steps give that must see whole frames."""
        clip = job.source.read(full(job.source.size))
        return walk(job.segment.steps, clip, self._context(Memory()), between=self._between)

    def _regions(self, job: Job) -> list[list[Region]]:
        """Those of every tile, or of the strips of a whole frame, before every step and after the last."""
        segment = job.segment
        if len(self._tracks) > 1:
            return [segment.regions(track.core, self._latent) for track in self._tracks]
        plan = None if isinstance(self.plan, ReferencePlan) else self.plan
        size, reaches = segment.sizes[-1], [step.reach for step in segment.steps]
        rows = -(-size[0] // strips(segment, plan, job.source.nbytes))
        return [chain(reaches, segment.sizes[0], out) for out in grid(full(size), (rows, size[1]))]

    def _tile(self, job: Job, track: Track, regions: Sequence[Region]) -> None:
        """What is left of a tile's way through a segment. regions: before every step and after the last."""
        runs = list(skips(job.segment.steps))
        plus: Clip | None = None
        while track.done < len(runs):
            if track.clip is None:
                track.clip = job.source.read(regions[0])
            before = track.memory.snapshot()
            try:
                first = sum(map(len, runs[: track.done]))
                clip, plus = self._steps(job, runs[track.done], first, regions, track.clip.shared(), track.memory)
            except BaseException:
                track.memory.restore(before)
                raise
            del before  # which holds what was remembered
            track.clip, track.done = clip, track.done + 1
        if track.clip is not None:
            job.out.write(regions[-1], track.clip, plus)
            track.clip = None

    def _steps(
        self, job: Job, steps: list[Step], first: int, regions: Sequence[Region], clip: Clip, memory: Memory
    ) -> tuple[Clip, Clip | None]:
        """A run of steps, the first being number `first` of the segment; and what of a canvas is yet to be added."""
        at = self._context(memory)
        held: tuple[Clip, Region] | None = None
        plus: Clip | None = None
        for i, step in enumerate(steps, first):
            size, region, wanted = job.segment.sizes[i], regions[i], regions[i + 1]
            given = region.given(step.reach, size)
            at.border = region.border(size)
            if step.keeps and step.adds is None:
                held = clip.shared(), region
            clip = step.run(clip, at, job.source.moments if step.waits else None)
            if step.adds is not None and job.kept is not None:
                plus = step.adds(job.kept.read(wanted), at)
            elif step.adds is not None and held is not None:
                clip, held = add(clip, step.adds(held[0].crop(given, held[1]), at), at), None
            clip = clip.crop(wanted, given)
            self._between()
        return clip, plus

    def _cut(self, old: Track, plan: TilePlan) -> list[Track]:
        """A tile cut into smaller ones, wherever it is; what it holds lies in RAM, and stays as it is."""
        tracks = self._new_tracks(plan.tiles(old.core), old.done)
        for (slot, _, ((_, before),)), (_, _, after) in zip(self._slots([old]), self._slots(tracks), strict=True):
            frames = old.memory.get(slot, torch.device("cpu"))
            if frames is not None:
                for track, region in after:
                    track.memory.put(slot, self._placed(region.of(frames, before)))
        if old.clip is not None:
            segment = next(segment for segment in self._segments if not segment.whole)
            done = sum(map(len, list(skips(segment.steps))[: old.done]))
            before = segment.regions(old.core, self._latent)[done]
            for track in tracks:
                region = segment.regions(track.core, self._latent)[done]
                track.clip = Clip([self._placed(region.of(old.clip.tensor(), before))])
        return tracks

    def _placed(self, x: Tensor) -> Tensor:
        """A region of a tensor in RAM, as a tensor of its own on the device."""
        return laid_out(x.clone().to(self._device))


def _allowed(plan: AnyPlan, network: Network) -> AnyPlan:
    if plan is not None and not isinstance(plan, (TilePlan, StripPlan, ReferencePlan)):  # type: ignore[reportUnnecessaryIsInstance]
        raise ValueError(
            f"The plan is a {type(plan).__name__}; needed is a TilePlan, a StripPlan, a ReferencePlan or None for "
            "whole frames. Of what plan_decode or plan_encode returns, give `.tiles`."
        )
    if isinstance(plan, StripPlan) and any(step.slots() for d in network.halves for step in network.steps(d)):
        raise ValueError(
            f"A StripPlan is for networks in which activations of a whole chunk wait, and those of {network.family.id} "
            "do not. Give a TilePlan."
        )
    if isinstance(plan, ReferencePlan) and not network.family.reference_tiles:
        raise ValueError(
            f"A ReferencePlan is the official tiling of CV-VAE, and this is {network.family.id}, whose official code "
            "does not tile. Leave plan out, or give a TilePlan."
        )
    return plan


def needs_graph(x: Tensor, network: Network) -> bool:
    """Whether autograd follows what a network makes of `x`."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in network.parameters()))


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Layers get the types that they are given, whatever the caller wraps them in."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
