"""How much memory one piece of a clip needs: the models themselves, run on the meta device under a profiler."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from .cv_tiles import CVPass, TiledChunk
from .cv_vae import CVVAE
from .iv_tiles import IVPass, Tile
from .iv_vae import GROUP, IVVAE, IVVAEConfig
from .keys import Config, Model, build
from .memory import Memory, StreamingLayer
from .profiler import MemoryProfile
from .regions import Region, chain, full, grid, scaled, split
from .shelves import Shelf, ShelvedMemory
from .tiles import AnyPlan, ReferencePlan, TilePlan
from .windows import SPACE, pixel_frames

CHUNK_LATENTS = 5  # of CV-VAE
META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is asked about: one direction of a clip of `latents` frames of `size` = (height, width), in latents."""

    config: Config
    dtype: torch.dtype
    decoding: bool
    batch: int
    latents: int
    size: tuple[int, int]

    @property
    def piece(self) -> Task:
        """The same with no more latents than the need of memory depends on."""
        return replace(self, latents=min(self.latents, 2 if isinstance(self.config, IVVAEConfig) else CHUNK_LATENTS))

    @property
    def result_bytes(self) -> int:
        """Bytes of what comes out for the whole clip: frames, or latents."""
        height, width = self.size
        if self.decoding:
            count = 3 * pixel_frames(self.latents) * SPACE * height * SPACE * width
        else:
            count = self.config.latent_channels * self.latents * height * width
        return self.batch * count * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Need:
    """Most bytes of live tensors at one time, without weights. device, host: where they lie. largest_convolution:
    elements of the largest input or output of a convolution."""

    device: int
    host: int
    largest_convolution: int


class _CountingShelf(Shelf):
    """RAM, as the profiler sees it."""

    def __init__(self, profile: MemoryProfile) -> None:
        super().__init__(META)
        self.profile = profile

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        with self.profile.on_host():
            return super().empty(shape, like)

    def keep(self, x: Tensor) -> Tensor:
        with self.profile.on_host():
            return x.clone()

    def fetch(self, x: Tensor, device: torch.device) -> Tensor:
        return x.clone()


def _largest(tiles: list[Region], size: tuple[int, int]) -> list[Region]:
    """The tile that needs most, twice: the second run finds the place for the output taken. The others need no more."""
    tile = max(tiles, key=lambda tile: _with_halo(tile, size).area)
    return [tile] if len(tiles) == 1 else [tile, tile]


class _SampleCV(CVPass):
    """A pass in which only the largest tile runs, unless `every_tile`."""

    profile: MemoryProfile
    every_tile: bool

    def tiled_chunk(self, plan: TilePlan, size: tuple[int, int], device: torch.device) -> TiledChunk:
        shelf = _CountingShelf(self.profile) if plan.offload else Shelf(META)
        tiles = grid(full(size), plan.sides)
        return TiledChunk(tiles if self.every_tile else _largest(tiles, size), size, shelf, device)


class _SampleIV(IVPass):
    """A pass in which only the largest tile runs, unless `every_tile`; what the others remember is added by
    arithmetic."""

    profile: MemoryProfile
    every_tile: bool

    def cores(self) -> list[Region]:
        return super().cores() if self.every_tile else _largest(super().cores(), self.size)

    def new_memory(self) -> Memory:
        if self.plan is not None and self.plan.offload:
            return ShelvedMemory(_CountingShelf(self.profile), META)
        return Memory()

    def remembered_by_others(self) -> int:
        """Bytes that the tiles remember that did not run."""
        if self.every_tile:
            return 0
        tile, kept = self.tracks[0].tile, self.tracks[0].memory.snapshot()
        others = 0
        for i, layer in enumerate(self.layers):
            slots = [m.slot for m in layer.modules() if isinstance(m, StreamingLayer)]
            held = sum(kept[slot].numel() * kept[slot].element_size() for slot in slots)
            area = tile.regions[i].area
            others += held // area * (self._area(i, tile) - len(self.tracks) * area)
        return others

    def _area(self, i: int, tile: Tile) -> int:
        """Pixels in front of layer `i` that all tiles work on, halos counted."""
        if self.plan is None:
            return tile.regions[i].area
        before, behind = (1, SPACE) if self.decoding else (SPACE, 1)
        lengths = (
            sum(
                stop - start
                for span in split((0, size), side)
                for start, stop in [chain(self.reaches, before * size, scaled(span, behind))[i]]
            )
            for size, side in zip(self.size, self.plan.sides, strict=True)
        )
        height, width = lengths
        return height * width


def _with_halo(tile: Region, size: tuple[int, int], halo: int = 7) -> Region:
    """A tile with the halo that fits into the frame."""
    rows = max(0, tile.rows[0] - halo), min(size[0], tile.rows[1] + halo)
    return Region(rows=rows, columns=(max(0, tile.columns[0] - halo), min(size[1], tile.columns[1] + halo)))


@lru_cache(maxsize=16)
def meta_model(config: Config, dtype: torch.dtype) -> Model:
    """The model without data."""
    with torch.inference_mode(False), META:
        model = build(config).to(dtype).requires_grad_(False).eval()
        for decoding in (True, False):  # so that the kernels that layers prepare are there, as weights are
            _run_tiny(model, decoding=decoding)
        return model


def _run_tiny(model: Model, *, decoding: bool) -> None:
    cv = isinstance(model, CVVAE)
    work = CVPass(model, None, decoding=decoding) if cv else IVPass(model, None, decoding=decoding)
    task = Task(
        config=model.config, dtype=next(model.parameters()).dtype, decoding=decoding, batch=1, latents=2, size=(2, 2)
    )
    for n in range(1 if cv else 2):
        work.begin(_piece(task, first=n == 0, latents=2 if cv else 1))
        work.finish()


@lru_cache(maxsize=4096)
def predict(task: Task, plan: AnyPlan) -> Need:
    """What one piece of the clip needs while it runs, from its largest tile alone."""
    model = meta_model(task.config, task.dtype)
    if isinstance(model, CVVAE):
        return _predict_reference(task, plan) if isinstance(plan, ReferencePlan) else _count_cv(model, task, plan)
    return _count_iv(model, task, plan)


def count(task: Task, plan: TilePlan | None) -> Need:
    """What a clip needs, with every tile of every piece run: slow, and what `predict` is checked against."""
    model = meta_model(task.config, task.dtype)
    if isinstance(model, CVVAE):
        return _count_cv(model, task, plan, every_tile=True)
    return _count_iv(model, task, plan, every_tile=True)


def _count_iv(model: IVVAE, task: Task, plan: AnyPlan, *, every_tile: bool = False) -> Need:
    work = _SampleIV(model, plan, decoding=task.decoding)
    work.every_tile = every_tile
    with MemoryProfile() as profile:
        work.profile = profile
        for n in range(task.latents):
            work.begin(_piece(task, first=n == 0, latents=1))
            work.finish()
    others = work.remembered_by_others()
    offload = isinstance(plan, TilePlan) and plan.offload
    return Need(
        device=profile.device.peak + (0 if offload else others),
        host=profile.host.peak + (others if offload else 0),
        largest_convolution=profile.largest_convolution,
    )


def _count_cv(model: CVVAE, task: Task, plan: AnyPlan, *, every_tile: bool = False) -> Need:
    work = _SampleCV(model, plan, decoding=task.decoding)
    work.every_tile = every_tile
    with MemoryProfile() as profile:
        work.profile = profile
        work.begin(_piece(task, first=True, latents=task.latents))
        work.finish()
    return Need(device=profile.device.peak, host=profile.host.peak, largest_convolution=profile.largest_convolution)


def _predict_reference(task: Task, plan: ReferencePlan) -> Need:
    """One tile by itself, and beside it what goes in and what comes out."""
    side = plan.latents.tile
    height, width = task.size
    tile = predict(replace(task, size=(min(side, height), min(side, width))), None)
    values = (task.config.latent_channels * task.latents, 3 * SPACE**2 * pixel_frames(task.latents))
    beside = task.batch * height * width * (values[0] * (1 if task.decoding else 3) + values[1]) * task.dtype.itemsize
    return replace(tile, device=tile.device + beside)


def _piece(task: Task, *, first: bool, latents: int) -> Tensor:
    """An input of one piece."""
    height, width = task.size
    if task.decoding:
        shape = (task.batch, task.config.latent_channels, latents, height, width)
    else:
        frames = pixel_frames(latents) if first else GROUP
        shape = (task.batch, 3, frames, SPACE * height, SPACE * width)
    return torch.empty(shape, dtype=task.dtype, device=META)
