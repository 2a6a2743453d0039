"""What a plan is asked about, and what it is said to take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from ..families import Direction, Family
from ..nn.region import Size
from ..run.segments import Segment, segments
from .footprint import Footprint, footprint, meta_network

MARGIN = 1.25  # what an allocator's slack and the workspaces of kernels add to live tensors, by published accounts


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
    def streams(self) -> bool:
        """Whether layers remember something from chunk to chunk; else activations wait for norms."""
        return any(step.slots() for segment in segments_of(self) for step in segment.steps)

    @property
    def footprint(self) -> Footprint:
        return footprint(self.family, self.config, self.halves, self.dtype, self.direction, self.chunk.latents)


@dataclass(frozen=True, kw_only=True)
class Work:
    """flops; moved: bytes that operators read and write; bus: bytes between device and RAM, both ways."""

    flops: float = 0.0
    moved: float = 0.0
    bus: float = 0.0

    def plus(self, other: Work, times: float = 1.0) -> Work:
        """Both, the other so many times."""
        return Work(
            flops=self.flops + times * other.flops,
            moved=self.moved + times * other.moved,
            bus=self.bus + times * other.bus,
        )


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one chunk takes. working, waiting: most bytes of live tensors on the device at one time, without weights:
    of all, less what waits between steps; and of that. host: in RAM. stages: work of one segment after another.
    largest_convolution: elements of the largest input or output of a convolution."""

    working: int
    waiting: int
    host: int
    stages: tuple[Work, ...]
    largest_convolution: int

    @property
    def device(self) -> int:
        """Most bytes on the device."""
        return self.working + self.waiting

    @property
    def work(self) -> Work:
        """Of all stages."""
        total = Work()
        for stage in self.stages:
            total = total.plus(stage)
        return total


def segments_of(task: Task) -> tuple[Segment, ...]:
    """The segments that run, with the sizes of their frames."""
    return _cut(replace(task, batch=1, latents=1))  # which they do not depend on


@lru_cache(maxsize=256)
def _cut(task: Task) -> tuple[Segment, ...]:
    network = meta_network(task.family, task.config, task.halves, task.dtype)
    return tuple(segments(network.steps(task.direction), task.input_size))
