"""CV-VAE whole, in exact tiles or in the official ones, chunk by chunk.

The statistics of a GroupNorm run over the whole chunk, so tiles advance together, layer by layer: a layer runs over all
tiles, each with the pixels around it that the layer's one convolution reads, and its output waits on a canvas, together
with its statistics, until the next layer runs. Attention and the layers beside it run whole, at latent resolution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cv_vae import CVVAE, GROUPS, ResidualBlock, Upsample
from .layers import PaddedConv3d, per_frame
from .regions import ENLARGE, HALVE_LEFT, HALVE_RIGHT, Reach, Region, full, grid, same
from .shelves import Shelf
from .tiles import AnyPlan, ReferencePlan, TilePlan, run_tiled
from .windows import SPACE

Layer = Callable[[Tensor], Tensor]


class Statistics:
    """Mean and variance of every norm group of every batch row, pooled over parts in float32 or better."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None  # b groups
        self.squares: Tensor | None = None  # b groups; sum of squared differences from the mean

    def add(self, x: Tensor) -> None:
        """Pool with the values of (b, c, t, h, w)."""
        values = x.reshape(x.shape[0], GROUPS, -1).to(torch.promote_types(x.dtype, torch.float32))
        count = values.shape[-1]
        variance, mean = torch.var_mean(values, dim=-1, correction=0)
        squares = variance * count
        if self.mean is not None and self.squares is not None:
            total = self.count + count
            difference = mean - self.mean
            squares = self.squares + squares + difference.square() * (self.count * count / total)
            mean = self.mean + difference * (count / total)
        self.mean, self.squares = mean, squares
        self.count += count

    def normalise(self, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        """(b, c, t, h, w) by these statistics, then the norm's weight and bias."""
        assert self.mean is not None
        assert self.squares is not None
        b, c = x.shape[:2]
        mean = self.mean.repeat_interleave(c // GROUPS, dim=1).flatten()
        variance = (self.squares / self.count).repeat_interleave(c // GROUPS, dim=1).flatten()
        weight, bias = (p.to(mean.dtype).repeat(b) for p in (norm.weight, norm.bias))
        # a batch norm with given statistics does this in one pass, in the precision of the statistics
        y = F.batch_norm(x.reshape(1, b * c, *x.shape[2:]), mean, variance, weight, bias, eps=norm.eps)
        return y.view(b, c, *x.shape[2:])


class Canvas:
    """The activations of a whole chunk, written and read part by part, and their statistics."""

    def __init__(self, shelf: Shelf, size: tuple[int, int], data: Tensor | None = None) -> None:
        self.shelf = shelf
        self.size = size  # height, width
        self.data = data  # b c t h w
        self.statistics = Statistics()

    @classmethod
    def of(cls, x: Tensor, shelf: Shelf) -> Canvas:
        """A canvas that shows `x`, measured."""
        canvas = cls(shelf, (x.shape[-2], x.shape[-1]), shelf.keep(x))
        canvas.statistics.add(x)
        return canvas

    def write(self, region: Region, x: Tensor) -> None:
        if self.data is None:
            self.data = self.shelf.empty((*x.shape[:3], *self.size), x)
        region.of(self.data).copy_(x)

    def read(self, region: Region, device: torch.device) -> Tensor:
        assert self.data is not None
        return self.shelf.fetch(region.of(self.data), device)


def reach_of_down(layer: PaddedConv3d) -> Reach:
    """What a layer that halves the size reads: padded on both sides it begins left of the first pixel."""
    return HALVE_LEFT if layer.space[0] else HALVE_RIGHT


class TiledChunk:
    """One chunk in tiles. tiles: the parts of the frame, in latents; size: of the frame, in latents."""

    def __init__(self, tiles: list[Region], size: tuple[int, int], shelf: Shelf, device: torch.device) -> None:
        self.tiles = tiles
        self.size = size
        self.shelf = shelf
        self.device = device

    def run(
        self,
        source: Canvas,
        layer: Layer,
        reach: Reach,
        *,
        norm: nn.GroupNorm | None = None,
        add: Callable[[Region], Tensor] | None = None,
        onto: Tensor | None = None,
        measure: bool = True,
    ) -> Canvas:
        """`layer` over all tiles of `source`, behind `norm` and SiLU where given; `add` is added to its output.

        onto: where to write instead of a new tensor. measure: whether the next layer needs the statistics.
        """
        size = reach.out_size(source.size[0]), reach.out_size(source.size[1])
        out = Canvas(self.shelf, size, onto)
        for tile in self.tiles:
            core = tile.scaled(size[0] // self.size[0])
            region = core.needed(reach, source.size)
            x = source.read(region, self.device)
            if norm is not None:
                x = F.silu(source.statistics.normalise(x, norm), inplace=True)
            y = core.of(layer(x), region.covered(reach))
            del x
            if add is not None:
                y = y.add_(add(core))
            out.write(core, y)
            if measure:
                out.statistics.add(y)
            del y  # not while the next tile runs
        return out

    def residual(self, x: Canvas, block: ResidualBlock) -> Canvas:
        """A residual block. Its output replaces its input where it is not wider."""
        assert x.data is not None
        y = self.run(x, block.conv1, same(1), norm=block.norm1)
        width = block.conv1.out_channels
        return self.run(
            y,
            lambda h: per_frame(block.conv2, h),
            same(1),
            norm=block.norm2,
            add=lambda core: block.shortcut(x.read(core, self.device)),
            onto=x.data[:, :width] if width <= x.data.shape[1] else None,
        )

    def level(self, x: Canvas, blocks: nn.Module) -> Canvas:
        """The blocks of one level, and the layer that changes the size behind them."""
        for block in blocks.children():
            if isinstance(block, ResidualBlock):
                x = self.residual(x, block)
            elif isinstance(block, Upsample):
                x = self.run(x, block, ENLARGE)
            else:
                down = cast("PaddedConv3d", block)
                x = self.run(x, down, reach_of_down(down))
        return x


def decode_tiled(model: CVVAE, latent: Tensor, chunk: TiledChunk) -> Tensor:
    """As `CVVAE.decode`; the result lies where the chunk's canvases wait."""
    decoder = model.decoder
    x = Canvas.of(decoder.middle(decoder.conv_in(latent)), chunk.shelf)
    for blocks in decoder.levels:
        x = chunk.level(x, blocks)
    out = chunk.run(x, decoder.conv_out, same(1), norm=decoder.norm_out, measure=False)
    assert out.data is not None
    return out.data


def encode_tiled(model: CVVAE, video: Tensor, chunk: TiledChunk) -> Tensor:
    """Moments of a chunk, as `CVVAE.encode` but not yet cut into mean and logvar."""
    encoder = model.encoder
    x = Canvas(Shelf(video.device), (video.shape[-2], video.shape[-1]), video)
    x = chunk.run(x, encoder.conv_in, same(1))
    for blocks in encoder.levels:
        x = chunk.level(x, blocks)
    y = encoder.middle(x.read(full(x.size), video.device))
    return encoder.conv_out(F.silu(encoder.norm_out(y)))


class CVPass:
    """One direction of one video through CV-VAE, a chunk at a time. Nothing is carried from chunk to chunk."""

    def __init__(self, model: CVVAE, plan: AnyPlan, *, decoding: bool) -> None:
        self.model = model
        self.decoding = decoding
        self.plan = plan
        self.piece: Tensor | None = None

    def begin(self, piece: Tensor) -> None:
        """Take the next chunk: (b, 3, 1 + 4n, h, w), or latents (b, z, 1 + n, h, w)."""
        self.piece = piece

    def finish(self) -> Tensor:
        """Moments (b, 2z, 1 + n, h/8, w/8) of the chunk, or its frames. If it raises, it may be called again."""
        assert self.piece is not None
        out = self._run(self.piece)
        self.piece = None
        return out

    def switch(self, plan: TilePlan | ReferencePlan) -> None:
        """Go on by another plan; a chunk in progress begins again."""
        self.plan = plan

    def _run(self, piece: Tensor) -> Tensor:
        if isinstance(self.plan, TilePlan):
            return self._run_tiled(piece, self.plan)
        run = self.model.decode if self.decoding else self._moments
        if self.plan is None:
            return run(piece)
        latents, pixels = self.plan.latents, self.plan.pixels
        source, target = (latents, pixels) if self.decoding else (pixels, latents)
        return run_tiled(piece, run, source=source, target=target)

    def _moments(self, piece: Tensor) -> Tensor:
        return torch.cat(self.model.encode(piece), dim=1)

    def _run_tiled(self, piece: Tensor, plan: TilePlan) -> Tensor:
        factor = 1 if self.decoding else SPACE
        size = piece.shape[-2] // factor, piece.shape[-1] // factor
        chunk = self.tiled_chunk(plan, size, piece.device)
        return (decode_tiled if self.decoding else encode_tiled)(self.model, piece, chunk)

    def tiled_chunk(self, plan: TilePlan, size: tuple[int, int], device: torch.device) -> TiledChunk:
        """The tiles of a frame of `size` latents, and where their activations wait."""
        shelf = Shelf(torch.device("cpu") if plan.offload else device)
        return TiledChunk(grid(full(size), plan.sides), size, shelf, device)
