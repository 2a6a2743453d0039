"""IV-VAE whole or in exact tiles, group by group.

Attention runs over whole frames at latent resolution, where it is cheap. Everything else is convolutions: a tile takes
what they read around it (7 latents when decoding, 29 to 36 pixels when encoding), and after every layer drops what the
rest of the tile does not need. Each tile has a `Memory` of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .iv_layers import AblatedConv, ResidualBlock, SeparatedConv
from .iv_vae import IVVAE, Downsample, Upsample
from .memory import Memory, StreamingLayer
from .regions import ENLARGE, HALVE_RIGHT, Reach, Region, chain_regions, full, grid, same
from .shelves import Shelf, ShelvedMemory
from .tiles import AnyPlan, ReferencePlan, TilePlan
from .windows import SPACE


def reach_of(layer: nn.Module) -> Reach:
    """What a layer of the fine part reads around its output."""
    if isinstance(layer, Upsample):
        return ENLARGE
    if isinstance(layer, Downsample):
        return HALVE_RIGHT
    if isinstance(layer, ResidualBlock):
        return same(2)  # two convolutions
    assert isinstance(layer, (SeparatedConv, AblatedConv))
    return same(1)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A part of the frame. core: what it owns, in latents. regions: what it works on in front of every fine layer,
    each in pixels of that layer; the last is what it gives."""

    core: Region
    regions: tuple[Region, ...]


@dataclass
class Track:
    """The way of one tile through the video. layer: how many fine layers the current group has behind it; x: what goes
    into the next of them."""

    tile: Tile
    memory: Memory
    layer: int = 0
    x: Tensor | None = None


class IVPass:
    """One direction of one video through IV-VAE, a group at a time. State: a track per tile, one in all for whole
    frames, and how far the current group has come."""

    def __init__(self, model: IVVAE, plan: AnyPlan, *, decoding: bool) -> None:
        self.model = model
        self.decoding = decoding
        self.coder = model.decoder if decoding else model.encoder
        self.layers = self.coder.fine_layers
        self.reaches = [reach_of(layer) for layer in self.layers]
        self.plan: TilePlan | None = _allowed(plan)
        self.size = (0, 0)  # of a frame, in latents
        self.device = torch.device("cpu")
        self.tracks: list[Track] = []
        self.piece: Tensor | None = None
        self.fine_input: Tensor | None = None
        self.fine_output: Tensor | None = None

    # ---------------------------------------------------------------------------------------------- running

    def begin(self, piece: Tensor) -> None:
        """Take the next group: (b, 3, 1 or 4, h, w), or a scaled latent (b, z, 1, h, w)."""
        if not self.tracks:
            factor = 1 if self.decoding else SPACE
            self.size, self.device = (piece.shape[-2] // factor, piece.shape[-1] // factor), piece.device
            self.tracks = [Track(self.tile(core), self.new_memory()) for core in self.cores()]
        self.piece = piece

    def finish(self) -> Tensor:
        """Moments (b, 2z, 1, h/8, w/8) of the group, or its frames.

        If it raises, it may be called again, by another plan too, and goes on at the layer that failed.
        """
        assert self.piece is not None
        if self.fine_input is None:
            self.fine_input = self._decode_coarse(self.piece) if self.decoding else self.piece
        for track in self.tracks:
            self._run_track(track, self.fine_input)
        assert self.fine_output is not None
        out = self.fine_output if self.decoding else self._encode_coarse(self.fine_output)
        self.piece = self.fine_input = self.fine_output = None
        for track in self.tracks:
            track.layer = 0
        return out

    def _decode_coarse(self, piece: Tensor) -> Tensor:
        config, memory = self.model.config, Memory()  # these layers keep nothing
        z = self.model.from_latent(piece / config.scale_factor + config.shift_factor, memory)
        return self.model.decoder.coarse(z, memory)

    def _encode_coarse(self, x: Tensor) -> Tensor:
        memory = Memory()
        return torch.cat(self.model.moments_of(self.model.encoder.coarse(x, memory), memory), dim=1)

    def _run_track(self, track: Track, source: Tensor) -> None:
        """Run what is left of the current group, and write the tile's part of the output."""
        regions = track.tile.regions
        if track.layer == 0:
            track.x = regions[0].of(source)
        while track.layer < len(self.layers):
            assert track.x is not None
            kept = track.memory.snapshot()
            try:
                y = self.coder.fine_layer(track.layer, track.x.to(self.device), track.memory)
            except Exception:
                track.memory.restore(kept)
                raise
            del kept
            given = regions[track.layer].covered(self.reaches[track.layer])
            track.layer += 1
            track.x = regions[track.layer].of(y, given)
            del y
        if track.x is not None:
            self._write(regions[-1], track.x)
            track.x = None

    def _write(self, region: Region, y: Tensor) -> None:
        factor = SPACE if self.decoding else 1
        height, width = factor * self.size[0], factor * self.size[1]
        if (region.height, region.width) == (height, width):
            self.fine_output = y
            return
        if self.fine_output is None:
            self.fine_output = y.new_empty(*y.shape[:3], height, width)
        region.of(self.fine_output).copy_(y)

    # ---------------------------------------------------------------------------------------------- layout

    def cores(self) -> list[Region]:
        """What the tiles own, in latents."""
        return [full(self.size)] if self.plan is None else grid(full(self.size), self.plan.sides)

    def tile(self, core: Region) -> Tile:
        """The tile that owns `core`."""
        before, behind = (1, SPACE) if self.decoding else (SPACE, 1)
        size = before * self.size[0], before * self.size[1]
        return Tile(core=core, regions=tuple(chain_regions(self.reaches, size, core.scaled(behind))))

    def new_memory(self) -> Memory:
        """A memory for one tile."""
        if self.plan is None or not self.plan.offload:
            return Memory()
        return ShelvedMemory(Shelf(torch.device("cpu")), self.device)

    def switch(self, plan: TilePlan | ReferencePlan) -> None:
        """Go on by another plan: every tile is cut into tiles of its size, wherever it is on its way.

        Tiles that are smaller than the new ones stay as they are.
        """
        self.plan = _allowed(plan)
        assert self.plan is not None
        tracks, self.tracks = self.tracks, []
        while tracks:
            self.tracks += self._cut(tracks.pop(0), self.plan.sides)

    def _cut(self, track: Track, sides: tuple[int, int]) -> list[Track]:
        """The tracks of the parts of a tile. What the tile holds goes through RAM, since the device is full."""
        old = track.tile.regions
        parts = [Track(self.tile(core), self.new_memory(), track.layer) for core in grid(track.tile.core, sides)]
        if track.x is not None:
            x, track.x = track.x.cpu(), None
            for part in parts:
                part.x = part.tile.regions[track.layer].of(x, old[track.layer])
        kept = track.memory.snapshot()
        track.memory.clear()
        for i, layer in enumerate(self.layers):
            for slot in [m.slot for m in layer.modules() if isinstance(m, StreamingLayer) and m.slot in kept]:
                frames = kept.pop(slot).cpu()
                for part in parts:
                    part.memory.put(slot, part.tile.regions[i].of(frames, old[i]).clone().to(self.device))
        return parts


def _allowed(plan: AnyPlan) -> TilePlan | None:
    if isinstance(plan, ReferencePlan):
        raise ValueError(
            "A ReferencePlan is the official tiling of CV-VAE, and this is iv-vae, whose official code does not tile. "
            "Leave plan out, or give a TilePlan."
        )
    return plan
