"""The input of a convolution, made in one step: norm, SiLU, and the frame or rows beside it, in one tensor.

Parts come in pieces, as the convolution before gave them. Each function is one operator of torch, so that a plan counts
what a GPU does: one pass reads the activations and writes them where the convolution wants them. No gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .fused_norm import define, group_norm_silu, rms_norm_silu


class Piece(NamedTuple):
    """Part of a clip's activations: one half of the channels (0 or 1), or all (None), from a frame and a row on."""

    half: int | None
    start: int
    x: Tensor  # b, c or 2c, frames, rows, w
    top: int = 0

    def of(self, whole: Tensor) -> Tensor:
        """The part of (b, 2c, t, h, w) that this is."""
        if self.half is not None:
            whole = whole.chunk(2, dim=1)[self.half]
        return whole[:, :, self.start : self.start + self.x.shape[2], self.top : self.top + self.x.shape[3]]


def neighbouring(strips: list[list[Piece]], i: int) -> list[Piece]:
    """The pieces of strip `i`, with the last row of the strip before and the first row of the one behind."""
    pieces = [piece._replace(x=piece.x[..., -1:, :]) for piece in strips[i - 1]] if i else []
    below = (1 if i else 0) + strips[i][0].x.shape[3]
    pieces += [piece._replace(top=1 if i else 0) for piece in strips[i]]
    if i + 1 < len(strips):
        pieces += [piece._replace(x=piece.x[..., :1, :], top=below) for piece in strips[i + 1]]
    return pieces


def rms_input(
    pieces: list[Piece],
    gain: Tensor,
    *,
    front: Tensor | None = None,
    kept: Tensor | None = None,
    rows: int | None = None,
    blank: tuple[int, int] = (0, 0),
) -> Tensor:
    """(b, c, 1 + t, rows, w): `front` (b, c, 1, rows - blanks, w), where it is given, and behind it the pieces, each
    half of their channels by an RMS norm, then SiLU.

    gain: (c,), sqrt(c / 2) included. kept: gets the last frame, but the first and last row where it has two fewer.
    rows: those of a piece where it is not given. blank: zero rows at the top and at the bottom.
    """
    rows = pieces[-1].x.shape[3] if rows is None else rows
    return torch.ops.cviv.rms_input([p.x for p in pieces], _places(pieces), rows, blank, gain, front, kept)


def group_input(
    pieces: list[Piece],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    rows: int | None = None,
    blank: tuple[int, int] = (0, 0),
) -> Tensor:
    """(b, c, t, rows, w): the pieces by a group norm of these statistics, (b, groups) each, then SiLU.

    weight, bias: (c,). rows, blank: as for `rms_input`.
    """
    rows = pieces[-1].x.shape[3] if rows is None else rows
    return torch.ops.cviv.group_input([p.x for p in pieces], _places(pieces), rows, blank, mean, rstd, weight, bias)


def _places(pieces: list[Piece]) -> list[int]:
    return [n for p in pieces for n in (-1 if p.half is None else p.half, p.start, p.top)]


def _pieces(tensors: list[Tensor], places: list[int]) -> list[Piece]:
    triples = zip(tensors, places[::3], places[1::3], places[2::3], strict=True)
    return [Piece(None if half < 0 else half, start, x, top) for x, half, start, top in triples]


def _rms_input(
    tensors: list[Tensor],
    places: list[int],
    rows: int,
    blank: list[int],
    gain: Tensor,
    front: Tensor | None,
    kept: Tensor | None,
) -> Tensor:
    out = _new_rms_input(tensors, places, rows, blank, gain, front, kept)
    inner = _blanked(out, blank)
    if front is not None:
        inner[:, :, :1].copy_(front)
        inner = inner[:, :, 1:]
    for piece in _pieces(tensors, places):
        own, halves = (gain, 2) if piece.half is None else (gain.chunk(2)[piece.half], 1)
        rms_norm_silu(piece.x, own, halves=halves, out=piece.of(inner))
    if kept is not None:
        margin = (rows - kept.shape[3]) // 2
        kept.copy_(out[:, :, -1:, margin : rows - margin])
    return out


def _group_input(
    tensors: list[Tensor],
    places: list[int],
    rows: int,
    blank: list[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    out = _new_group_input(tensors, places, rows, blank, mean, rstd, weight, bias)
    inner = _blanked(out, blank)
    for piece in _pieces(tensors, places):
        group_norm_silu(piece.x, mean, rstd, weight, bias, out=piece.of(inner))
    return out


def _blanked(out: Tensor, blank: list[int]) -> Tensor:
    """`out` without its blank rows, which are set to zero."""
    top, bottom = blank[0], out.shape[3] - blank[1]
    out[..., :top, :].zero_()
    out[..., bottom:, :].zero_()
    return out[..., top:bottom, :]


def _new(tensors: list[Tensor], places: list[int], channels: int, ahead: int, rows: int) -> Tensor:
    x = tensors[-1]
    frames = ahead + max(start + piece.shape[2] for piece, start in zip(tensors, places[1::3], strict=True))
    shape = (x.shape[0], channels, frames, rows, x.shape[-1])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)


def _new_rms_input(
    tensors: list[Tensor],
    places: list[int],
    rows: int,
    blank: list[int],
    gain: Tensor,
    front: Tensor | None,
    kept: Tensor | None,
) -> Tensor:
    return _new(tensors, places, gain.numel(), int(front is not None), rows)


def _new_group_input(
    tensors: list[Tensor],
    places: list[int],
    rows: int,
    blank: list[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    return _new(tensors, places, weight.numel(), 0, rows)


_PIECES = "Tensor[] pieces, int[] places, int rows, int[] blank"
define(
    f"rms_input({_PIECES}, Tensor gain, Tensor? front, Tensor(a!)? kept) -> Tensor",
    _rms_input,
    _new_rms_input,
)
define(
    f"group_input({_PIECES}, Tensor mean, Tensor rstd, Tensor weight, Tensor bias) -> Tensor",
    _group_input,
    _new_group_input,
)
