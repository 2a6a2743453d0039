"""How much a halo costs: convolution work of tiles against that of whole frames, by arithmetic alone."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import nn

from .cv_tiles import reach_of_down
from .cv_vae import CVVAE, ResidualBlock
from .cv_vae import Upsample as CVUpsample
from .iv_tiles import reach_of
from .iv_vae import GROUP, IVVAE, Downsample, Upsample
from .keys import Config
from .layers import PaddedConv3d
from .prediction import CHUNK_LATENTS, meta_model
from .regions import ENLARGE, Reach, chain, same, scaled, sizes, split
from .tiles import TilePlan
from .windows import SPACE, pixel_frames

Work = tuple[Reach, int]  # a layer, and its multiplications per pixel that it puts out


def halo_overhead(config: Config, size: tuple[int, int], plan: TilePlan, *, decoding: bool) -> float:
    """Extra convolution work in the tiled part, as a share of that part's work on whole frames of `size` latents."""
    work = _work(config, decoding=decoding)
    reaches = [reach for reach, _ in work]
    # IV-VAE carries a tile through all layers; CV-VAE cuts every layer's output anew
    lengths = _chained if isinstance(meta_model(config, torch.float32), IVVAE) else _layer_by_layer
    rows, columns = (lengths(reaches, n, side, decoding=decoding) for n, side in zip(size, plan.sides, strict=True))
    whole_rows, whole_columns = (sizes(reaches, n if decoding else SPACE * n)[1:] for n in size)
    tiled = sum(weight * r * c for (_, weight), r, c in zip(work, rows, columns, strict=True))
    whole = sum(weight * r * c for (_, weight), r, c in zip(work, whole_rows, whole_columns, strict=True))
    return tiled / whole - 1


def _chained(reaches: list[Reach], size: int, tile: int, *, decoding: bool) -> list[int]:
    """Pixels along one axis that every layer computes, all tiles together."""
    before, behind = (1, SPACE) if decoding else (SPACE, 1)
    totals = [0] * len(reaches)
    for span in split((0, size), tile):
        spans = chain(reaches, before * size, scaled(span, behind))
        for i, reach in enumerate(reaches):
            start, stop = reach.covered(spans[i])
            totals[i] += stop - start
    return totals


def _layer_by_layer(reaches: list[Reach], size: int, tile: int, *, decoding: bool) -> list[int]:
    """As `_chained`, where every layer starts from complete neighbours."""
    at = sizes(reaches, size if decoding else SPACE * size)
    totals = [0] * len(reaches)
    for span in split((0, size), tile):
        for i, reach in enumerate(reaches):
            start, stop = reach.covered(reach.needed(scaled(span, at[i + 1] // size), at[i]))
            totals[i] += stop - start
    return totals


@lru_cache(maxsize=16)
def _work(config: Config, *, decoding: bool) -> tuple[Work, ...]:
    """The layers of the tiled part."""
    model = meta_model(config, torch.float32)
    return tuple(_cv_work(model, decoding=decoding) if isinstance(model, CVVAE) else _iv_work(model, decoding=decoding))


def _iv_work(model: IVVAE, *, decoding: bool) -> list[Work]:
    frames = 1 if decoding else GROUP
    work: list[Work] = []
    for layer in (model.decoder if decoding else model.encoder).fine_layers:
        if isinstance(layer, Upsample) and layer.time_conv is not None:
            frames *= 2
        work.append((reach_of(layer), frames * _weights(layer)))
        if isinstance(layer, Downsample) and layer.time_conv is not None:
            frames //= 2
    return work


def _cv_work(model: CVVAE, *, decoding: bool) -> list[Work]:
    coder = model.decoder if decoding else model.encoder
    frames = CHUNK_LATENTS if decoding else pixel_frames(CHUNK_LATENTS)
    work: list[Work] = [] if decoding else [(same(1), frames * _weights(model.encoder.conv_in))]
    for layer in (layer for level in coder.levels for layer in level.children()):
        if isinstance(layer, ResidualBlock):
            work.append((same(1), frames * (_weights(layer.conv1) + _weights(layer.shortcut))))
            work.append((same(1), frames * _weights(layer.conv2)))
        elif isinstance(layer, CVUpsample):
            work.append((ENLARGE, frames * _weights(layer)))
            frames = layer.parts * frames - (layer.parts - 1)
        else:
            assert isinstance(layer, PaddedConv3d)
            frames = -(-frames // layer.stride[0])
            work.append((reach_of_down(layer), frames * _weights(layer)))
    return [*work, (same(1), frames * _weights(model.decoder.conv_out))] if decoding else work


def _weights(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters() if p.ndim > 1)
