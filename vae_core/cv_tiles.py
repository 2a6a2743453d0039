"""CV-VAE whole, in exact tiles or in the official ones, chunk by chunk.

The statistics of a GroupNorm run over the whole chunk, so tiles advance together, layer by layer: a layer runs over all
tiles, each with the pixels around it that the layer's one convolution reads, and its output waits on a canvas, together
with its statistics, until the next layer runs. Attention and the layers beside it run whole, at latent resolution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from .conv_input import Piece
from .cv_vae import CVVAE, ResidualBlock, Statistics, Upsample, activated
from .layers import PaddedConv3d, builds_graph, channels_last, join, per_frame
from .regions import ENLARGE, HALVE_LEFT, HALVE_RIGHT, Reach, Region, full, grid, same
from .shelves import Shelf
from .tiles import AnyPlan, ReferencePlan, TilePlan, run_tiled
from .windows import SPACE

Layer = Callable[[Tensor], Tensor]
Pieces = list[tuple[int, Tensor]]  # (first frame, frames)
STRIPS_ABOVE = 320 * 2**20  # bytes of a layer's activations from which on a whole chunk runs in strips of rows
STRIP_BYTES, MOST_STRIPS = 256 * 2**20, 6


class Canvas:
    """The activations of a whole chunk, written and read part by part, and their statistics."""

    def __init__(self, shelf: Shelf, size: tuple[int, int], data: Tensor | None = None) -> None:
        self.shelf = shelf
        self.size = size  # height, width
        self.data = data  # b c t h w
        self._statistics = Statistics()

    def write(self, region: Region, pieces: Pieces, *, plus: Tensor | None = None, measure: bool = True) -> None:
        """Write pieces (first frame, frames), in order, of this part of the frame, with `plus` added to them."""
        first, x = pieces[-1]
        here = x.device.type == self.shelf.home.type
        if self.data is None and plus is None and len(pieces) == 1 and here and region == full(self.size):
            self.data = x  # measured when it is asked for
            return
        if self.data is None:
            self.data = self.shelf.empty((*x.shape[:2], first + x.shape[2], *self.size), x)
        out = region.of(self.data)
        if plus is None and here:
            join([x for _, x in pieces], out)
        else:
            x = pieces[0][1] if len(pieces) == 1 else torch.cat([x for _, x in pieces], dim=2)
            if plus is not None and here:
                torch.add(x, plus, out=out)
            else:
                out.copy_(x if plus is None else x.add_(plus))
        if measure:
            for x in [out] if here else [x for _, x in pieces]:
                self._statistics.add(x)

    def read(self, region: Region, device: torch.device) -> Tensor:
        assert self.data is not None
        return self.shelf.fetch(region.of(self.data), device)

    def statistics(self, device: torch.device) -> Statistics:
        """Those of what was written."""
        if not self._statistics.count:
            self._statistics.add(self.read(full(self.size), device))
        return self._statistics


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
        self.spare: Tensor | None = None  # what a block of this level used, for the next

    def parts(self, source: Canvas, size: tuple[int, int]) -> list[Region]:
        """The parts in which a layer makes its output of `size`."""
        return [tile.scaled(size[0] // self.size[0]) for tile in self.tiles]

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
        """`layer` over all parts of `source`, behind `norm` and SiLU where given; `add` is added to its output.

        onto: where to write instead of a new tensor. measure: whether the next layer needs the statistics.
        """
        size = reach.out_size(source.size[0]), reach.out_size(source.size[1])
        out = Canvas(self.shelf, size, onto)
        statistics = None if norm is None else source.statistics(self.device)
        for core in self.parts(source, size):
            region = core.needed(reach, source.size)
            x = source.read(region, self.device)
            if norm is not None and statistics is not None:
                x = statistics.input([Piece(None, 0, x)], norm)
            pieces = layer.pieces(layer.padded_in_space(x)) if isinstance(layer, PaddedConv3d) else [(0, layer(x))]
            del x
            pieces = [(first, core.of(y, region.covered(reach))) for first, y in pieces]
            out.write(core, pieces, plus=None if add is None else add(core), measure=measure)
            del pieces  # not while the next part runs
        return out

    def residual(self, x: Canvas, block: ResidualBlock) -> Canvas:
        """A residual block. Its output replaces its input where it is not wider."""
        assert x.data is not None
        width = block.conv1.out_channels
        fits = self.spare is not None and self.spare.shape[1:] == (width, *x.data.shape[2:])
        spare, self.spare = self.spare, None
        y = self.run(x, block.conv1, same(1), norm=block.norm1, onto=spare if fits else None)
        self.spare = y.data
        return self.run(
            y,
            lambda h: per_frame(block.conv2, h),
            same(1),
            norm=block.norm2,
            add=lambda core: block.shortcut(x.read(core, self.device)),
            onto=x.data[:, :width] if width <= x.data.shape[1] else None,
        )

    def enlarge(self, x: Canvas, layer: Upsample) -> Canvas:
        """Twice the size in space."""
        return self.run(x, layer, ENLARGE)

    def level(self, x: Canvas, blocks: nn.Module) -> Canvas:
        """The blocks of one level, and the layer that changes the size behind them."""
        for block in blocks.children():
            if not isinstance(block, ResidualBlock):
                self.spare = None
            if isinstance(block, ResidualBlock):
                x = self.residual(x, block)
            elif isinstance(block, Upsample):
                x = self.enlarge(x, block)
            else:
                down = cast("PaddedConv3d", block)
                x = self.run(x, down, reach_of_down(down))
        return x


class WholeChunk(TiledChunk):
    """One chunk as a whole; where a layer's activations are large, in strips of rows, so that little else is held."""

    def __init__(self, size: tuple[int, int], device: torch.device) -> None:
        super().__init__([full(size)], size, Shelf(device), device)

    def parts(self, source: Canvas, size: tuple[int, int]) -> list[Region]:
        assert source.data is not None
        nbytes = source.data.nbytes * (size[0] * size[1]) // (source.size[0] * source.size[1])
        strips = min(MOST_STRIPS, -(-nbytes // STRIP_BYTES))
        rows = -(-size[0] // strips) if nbytes > STRIPS_ABOVE else size[0]
        return grid(full(size), (rows, size[1]))

    def enlarge(self, x: Canvas, layer: Upsample) -> Canvas:
        y = layer(x.read(full(x.size), self.device))  # it writes all of its output, and holds a quarter of it besides
        return Canvas(self.shelf, (y.shape[-2], y.shape[-1]), y)

    def residual(self, x: Canvas, block: ResidualBlock) -> Canvas:
        if len(self.parts(x, x.size)) > 1:
            return super().residual(x, block)
        return Canvas(self.shelf, x.size, block(x.read(full(x.size), self.device)))


def decode_tiled(model: CVVAE, latent: Tensor, chunk: TiledChunk) -> Tensor:
    """As `CVVAE.decode`; the result lies where the chunk's canvases wait."""
    decoder = model.decoder
    middle = chunk.shelf.keep(decoder.middle(decoder.conv_in(channels_last(latent))))
    x = Canvas(chunk.shelf, (latent.shape[-2], latent.shape[-1]), middle)
    for blocks in decoder.levels:
        x = chunk.level(x, blocks)
    out = chunk.run(x, decoder.conv_out, same(1), norm=decoder.norm_out, measure=False)
    assert out.data is not None
    return out.data


def encode_tiled(model: CVVAE, video: Tensor, chunk: TiledChunk) -> Tensor:
    """Moments of a chunk, as `CVVAE.encode` but not yet cut into mean and logvar."""
    encoder = model.encoder
    x = Canvas(Shelf(video.device), (video.shape[-2], video.shape[-1]), channels_last(video))
    x = chunk.run(x, encoder.conv_in, same(1))
    for blocks in encoder.levels:
        x = chunk.level(x, blocks)
    y = encoder.middle(x.read(full(x.size), video.device))
    return encoder.conv_out(activated([(0, y)], encoder.norm_out))


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
        if self.plan is None:
            return self._run_whole(piece)
        latents, pixels = self.plan.latents, self.plan.pixels
        source, target = (latents, pixels) if self.decoding else (pixels, latents)
        return run_tiled(piece, self._run_whole, source=source, target=target)

    def _run_whole(self, piece: Tensor) -> Tensor:
        if builds_graph(piece, self.model):
            return self.model.decode(piece) if self.decoding else torch.cat(self.model.encode(piece), dim=1)
        factor = 1 if self.decoding else SPACE
        chunk = WholeChunk((piece.shape[-2] // factor, piece.shape[-1] // factor), piece.device)
        return (decode_tiled if self.decoding else encode_tiled)(self.model, piece, chunk)

    def _run_tiled(self, piece: Tensor, plan: TilePlan) -> Tensor:
        factor = 1 if self.decoding else SPACE
        size = piece.shape[-2] // factor, piece.shape[-1] // factor
        chunk = self.tiled_chunk(plan, size, piece.device)
        return (decode_tiled if self.decoding else encode_tiled)(self.model, piece, chunk)

    def tiled_chunk(self, plan: TilePlan, size: tuple[int, int], device: torch.device) -> TiledChunk:
        """The tiles of a frame of `size` latents, and where their activations wait."""
        shelf = Shelf(torch.device("cpu") if plan.offload else device)
        return TiledChunk(grid(full(size), plan.sides), size, shelf, device)
