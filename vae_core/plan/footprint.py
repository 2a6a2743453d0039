"""What the steps of a network take, for each pixel that they run over: found once, by walking them without data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ..families import Direction, Family, Network
from ..nn.clip import Clip
from ..nn.region import Region, Size
from ..nn.steps import Kernels, Memory, Step
from ..run.executor import Job, Pass
from ..run.segments import Segment
from .profile import Profile

META = torch.device("meta")
PROBES: tuple[Size, Size] = ((32, 32), (64, 64))  # frames that are walked, in latents
LEAST: Size = (4, 4)  # so small that what is held does not depend on the size: layers make kernels of their weights


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run of steps, or a segment of whole frames, takes over a region of (height, width) pixels of its input.

    area, edge, fixed: bytes that it holds at most in addition to its input, for each pixel, for each pixel of height
    plus width, and at least. flops, moved: of each of its steps, for each pixel of output; bytes that
    operators read and write. scores: FLOPs for each pair of input pixels, of attention. remembered: bytes that each
    step keeps for the next chunk, for each pixel of its input. output: bytes of what it gives, for each pixel of that.
    largest: elements of the largest tensor of a convolution, for each pixel.
    """

    area: float
    edge: float
    fixed: float
    flops: tuple[float, ...]
    moved: tuple[float, ...]
    scores: float
    remembered: tuple[float, ...]
    output: float
    largest: float

    def held(self, size: Size) -> float:
        """Bytes that it holds at most in addition to its input."""
        return max(self.fixed, self.area * size[0] * size[1] + self.edge * (size[0] + size[1]))


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """costs: of the runs of every segment. outputs: bytes of what every segment gives, for each pixel of it. kernels:
    bytes that layers make of their weights for the run."""

    costs: tuple[tuple[Cost, ...], ...]
    outputs: tuple[float, ...]
    kernels: int


@lru_cache(maxsize=16)
def meta_network(family: Family, config: Any, halves: tuple[Direction, ...], dtype: torch.dtype) -> Network:
    """The network of a config, without data."""
    with torch.inference_mode(False), META:
        return family.network(config, halves).to(dtype).requires_grad_(False).eval()


@lru_cache(maxsize=64)
def footprint(
    family: Family,
    config: Any,
    halves: tuple[Direction, ...],
    dtype: torch.dtype,
    direction: Direction,
    latents: int,
) -> Footprint:
    """Of one chunk of a clip of `latents` latents, one of the later ones where these are different."""
    network = meta_network(family, config, halves, dtype)
    kernels = Kernels()
    least, small, large = (_walked(network, dtype, direction, size, latents, kernels) for size in (LEAST, *PROBES))
    costs = [
        tuple(_fitted(*seen) for seen in zip(*runs, strict=True))
        for runs in zip(least.runs, small.runs, large.runs, strict=True)
    ]
    return Footprint(costs=tuple(costs), outputs=tuple(large.outputs), kernels=large.kernels)


@dataclass
class Seen:
    """What a run took at one size. size: of its input; areas: of every step's output."""

    size: Size
    held: int
    areas: list[int]
    flops: list[int]
    moved: list[int]
    remembered: list[float]
    output: int
    largest: int


class _Watched(Pass):
    """A pass over whole frames that writes down what every run of steps takes."""

    def __init__(self, network: Network, direction: Direction, profile: Profile, kernels: Kernels) -> None:
        super().__init__(network, direction, None, between=self._note)
        self._kernels = kernels
        self.profile = profile
        self.runs: list[list[Seen]] = []
        self.outputs: list[float] = []
        self._work: list[tuple[int, int]] = []

    @property
    def kernels(self) -> int:
        return sum(kernel.numel() * kernel.element_size() for kernel in self._kernels.made())

    def _note(self) -> None:
        self._work.append((self.profile.flops, self.profile.moved))

    def _segment(self, progress: Any) -> None:
        self.runs.append([])
        super()._segment(progress)
        height, width = progress.source.size
        self.outputs.append(progress.source.nbytes / (height * width))

    def _regions(self, job: Job) -> list[list[Region]]:
        return [job.segment.regions(track.core, self._latent) for track in self._tracks]  # no strips

    def _whole(self, job: Job) -> Clip:
        before = self._begin()
        clip = super()._whole(job)
        self._end(before, job.segment, 0, job.segment.steps, None, clip)
        return clip

    def _steps(
        self, job: Job, steps: list[Step], first: int, regions: Sequence[Region], clip: Clip, memory: Memory
    ) -> tuple[Clip, Clip | None]:
        before = self._begin()
        out = super()._steps(job, steps, first, regions, clip, memory)
        self._end(before, job.segment, first, steps, memory, out[0])
        return out

    def _begin(self) -> int:
        ledger = self.profile.device
        ledger.peak = ledger.live()
        self.profile.largest_convolution = 0
        self._work = [(self.profile.flops, self.profile.moved)]
        return ledger.peak

    def _end(
        self, before: int, segment: Segment, first: int, steps: Sequence[Step], memory: Memory | None, out: Clip
    ) -> None:
        sizes = segment.sizes[first : first + len(steps) + 1]
        kept = {} if memory is None else memory.snapshot()
        self.runs[-1].append(
            Seen(
                size=sizes[0],
                held=self.profile.device.peak - before,
                areas=[height * width for height, width in sizes[1:]],
                flops=[b[0] - a[0] for a, b in zip(self._work, self._work[1:], strict=False)],
                moved=[b[1] - a[1] for a, b in zip(self._work, self._work[1:], strict=False)],
                remembered=[
                    sum(kept[slot].numel() * kept[slot].element_size() for slot in step.slots() if slot in kept)
                    / (size[0] * size[1])
                    for step, size in zip(steps, sizes, strict=False)
                ],
                output=out.nbytes,
                largest=self.profile.largest_convolution,
            )
        )


def _walked(
    network: Network, dtype: torch.dtype, direction: Direction, size: Size, latents: int, kernels: Kernels
) -> _Watched:
    family, config = network.family, network.config
    windows, compression = family.windows(direction), family.compression
    frames = latents if direction == "decode" else compression.pixel_frames(latents)
    channels, factor = (config.latent_channels, 1) if direction == "decode" else (3, compression.space)
    with Profile() as profile:
        watched = _Watched(network, direction, profile, kernels)
        lengths = [min(frames, windows.first)]
        if frames > windows.first and not windows.overlap:
            lengths.append(windows.step)  # a later chunk, which is another than the first
        for length in lengths:
            watched.runs.clear()
            watched.outputs.clear()
            shape = (1, channels, length, factor * size[0], factor * size[1])
            watched.run(torch.empty(shape, dtype=dtype, device=META))
    return watched


def _fitted(least: Seen, one: Seen, two: Seen) -> Cost:
    """held = area * (height * width) + edge * (height + width); flops of whole frames = linear + scores * area^2."""
    (a1, e1), (a2, e2) = ((h * w, h + w) for h, w in (one.size, two.size))
    area = (two.held * e1 - one.held * e2) / (a2 * e1 - a1 * e2)
    scores = (sum(two.flops) / a2 - sum(one.flops) / a1) / (a2 - a1)
    linear = 1 - scores * a2 * a2 / max(1, sum(two.flops))
    return Cost(
        area=area,
        edge=(two.held - area * a2) / e2,
        fixed=least.held,
        flops=tuple(linear * flops / out for flops, out in zip(two.flops, two.areas, strict=True)),
        moved=tuple(moved / out for moved, out in zip(two.moved, two.areas, strict=True)),
        scores=scores,
        remembered=tuple(two.remembered),
        output=two.output / two.areas[-1],
        largest=two.largest / a2,
    )
