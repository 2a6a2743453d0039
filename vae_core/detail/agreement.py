"""How much of a keyframe's detail a frame should take: told by comparing energies and phases in small tiles.

Tiles overlap by half and are compared frequency by frequency, over the neighbouring tiles, frequencies and the three
colours. Pictures are (3, h, w), spectra (3, rows, columns, 16, 9).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 16  # pixels
_STEP = TILE // 2
_SURE = (0.4, 0.8)  # from which share of certainty some detail, and all of it, is taken
_MORE = (1.1, 1.5)  # energy, as a multiple of the video's own, that is needed for that
_PHASE = (0.5, 0.8)  # likeness to the frame's own detail
_MOST_LEVEL = 2.0  # of a frame's detail, as a multiple of that of the keyframes' frames
_PRIOR = 0.1  # how much the likeness of a whole tile counts for each of its frequencies
_TINY = 1e-8


def verified(own: Tensor, keyframe: Tensor, others: Tensor, caution: float) -> Tensor:
    """The detail (3, h, w) that a keyframe and the `others` around it agree on; the frame's `own` where they do not.

    All are the detail of pictures that lie on the frame. The mean of the two is taken as far as it differs from `own`
    by more than the two differ from each other: a Wiener filter, whose doubt counts `caution` times.
    """
    ours, a, b = _spectra(own), _spectra(keyframe), _spectra(others)
    change = (a + b) / 2 - ours
    doubt = _pooled((a - b).abs().square()) / 4
    sure = 1 - caution * doubt / _pooled(change.abs().square()).clamp(min=_TINY)
    return own + _picture(change * _ramp(sure, _SURE), own.shape[-2:])


def gained(own: Tensor, mean: Tensor, base: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The change (3, h, w) that gives a frame the `mean` detail of two keyframes, only where it gains by it.

    That is, as far as what `first` and `second` have in common has more energy than the frame's `own` detail, and the
    phase of it: it shows the same at the same place. base: the own detail of the keyframes' frames, mixed alike; what
    is new in this frame, and so not in the base, stays as it is.
    """
    ours, theirs, before = _spectra(own), _spectra(mean), _spectra(base)
    common = _pooled((_spectra(first) * _spectra(second).conj()).real)
    more = common / _pooled(ours.abs().square()).clamp(min=_TINY)
    along, energy = (ours * before.conj()).real, before.abs().square()
    level = _over_tiles(along.mean(0)[None]) / _over_tiles(energy.mean(0)[None]).clamp(min=_TINY)
    change = theirs - level.clamp(0, _MOST_LEVEL) * before
    return _picture(change * _ramp(more, _MORE) * _in_phase(theirs, ours), own.shape[-2:])


def _in_phase(theirs: Tensor, ours: Tensor) -> Tensor:
    """0 to 1: whether the keyframes show what the frame shows, at the same place."""
    along, most = _pooled((theirs * ours.conj()).real), _pooled(theirs.abs() * ours.abs())
    along, most = (value + _PRIOR * value.mean((-2, -1), keepdim=True) for value in (along, most))
    return _ramp(along / most.clamp(min=_TINY), _PHASE)


def _ramp(values: Tensor, limits: tuple[float, float]) -> Tensor:
    return ((values - limits[0]) / (limits[1] - limits[0])).clamp(0, 1)


def _over_tiles(values: Tensor) -> Tensor:
    """Mean over 3 x 3 tiles of (1, rows, columns, a, b)."""
    _, rows, columns, a, b = values.shape
    flat = values.reshape(rows, columns, a * b).permute(2, 0, 1)
    return F.avg_pool2d(flat, 3, 1, 1, count_include_pad=False).permute(1, 2, 0).reshape(1, rows, columns, a, b)


def _pooled(values: Tensor) -> Tensor:
    """Mean over colours, 3 x 3 tiles and 3 x 3 frequencies, as (1, rows, columns, 16, 9)."""
    _, rows, columns, a, b = values.shape
    near = values.mean(0).reshape(rows * columns, 1, a, b)
    near = torch.cat([near[:, :, -1:], near, near[:, :, :1]], 2)  # frequencies go round
    near = F.pad(near, (1, 1, 0, 0), mode="replicate")
    return _over_tiles(F.avg_pool2d(near, 3, 1).reshape(1, rows, columns, a, b))


def _spectra(picture: Tensor) -> Tensor:
    height, width = picture.shape[-2:]
    padding = _STEP, _STEP + -width % _STEP, _STEP, _STEP + -height % _STEP
    tiles = F.pad(picture, padding).unfold(1, TILE, _STEP).unfold(2, TILE, _STEP)
    return torch.fft.rfft2(tiles * _window(picture))


def _picture(spectra: Tensor, size: torch.Size) -> Tensor:
    """What `_spectra` was made of, of (height, width) `size`."""
    channels, rows, columns = spectra.shape[:3]
    tiles = torch.fft.irfft2(spectra, s=(TILE, TILE)) * _window(spectra.real)
    columns_of = tiles.permute(0, 3, 4, 1, 2).reshape(channels, TILE * TILE, rows * columns)
    whole = F.fold(columns_of, ((rows + 1) * _STEP, (columns + 1) * _STEP), TILE, stride=_STEP)[:, 0]
    return whole[:, _STEP : _STEP + size[0], _STEP : _STEP + size[1]]


def _window(like: Tensor) -> Tensor:
    """Its square, laid over itself at half a tile, sums to 1."""
    root = torch.sin(torch.pi * (torch.arange(TILE, dtype=like.dtype, device=like.device) + 0.5) / TILE)
    return root[:, None] * root
