"""Colour at half the resolution of brightness: enlarged, and made smaller so that enlarging gives it back.

Along each axis a coded colour sample lies either on every other pixel ("cosited", as MPEG-2 and later place it along a
row) or in the middle between two ("centred"). Enlarging is linear between the samples. Making smaller is its
least-squares inverse: what was enlarged comes back as the same samples, so that a video does not change by being read
and written again and again.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Enlarging back and forth is a filter of three taps, which falls into one forward and one backward recursion; of each,
# 2 ** doublings terms are taken. The taps' outer value, the recursion's root, doublings; for cosited and centred.
_INVERSE = {True: (0.25, 2 * 2**0.5 - 3, 3), False: (0.375, -1 / 3, 4)}


def enlarged(planes: Tensor, height: int, width: int, *, down: int, across: int, cosited: tuple[bool, bool]) -> Tensor:
    """(c, height, width) of (c, h, w), whose samples stand for `down` rows and `across` columns each.

    cosited: (vertically, horizontally).
    """
    return _up(_up(planes, 1, height, down, cosited[0]), 2, width, across, cosited[1])


def halved(planes: Tensor, *, down: bool, across: bool, cosited: tuple[bool, bool]) -> Tensor:
    """(c, h, w) at half the height and, or, width, rounded up: the samples that, enlarged, come nearest."""
    if across:
        planes = _half(planes, 2, cosited[1])
    return _half(planes, 1, cosited[0]) if down else planes


def _up(x: Tensor, dim: int, length: int, ratio: int, cosited: bool) -> Tensor:
    """Enlarge one axis."""
    if ratio == 1:
        return x.narrow(dim, 0, length)
    last = x.shape[dim] - 1
    if ratio != 2:
        place = torch.arange(length) / ratio if cosited else (torch.arange(length) + 0.5) / ratio - 0.5
        low, high = (n.long().clamp(0, last) for n in (place.floor(), place.floor() + 1))
        weight = (place - place.floor()).to(x.dtype).view([-1 if axis == dim else 1 for axis in range(x.ndim)])
        return torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight)
    shape = list(x.shape)
    shape.insert(dim + 1, 2)
    pairs = x.new_empty(shape)
    first, second = pairs.unbind(dim + 1)
    after = torch.cat((x.narrow(dim, min(1, last), last), x.narrow(dim, last, 1)), dim)
    if cosited:
        first.copy_(x)
        torch.lerp(x, after, 0.5, out=second)
    else:
        before = torch.cat((x.narrow(dim, 0, 1), x.narrow(dim, 0, last)), dim)
        torch.lerp(x, before, 0.25, out=first)
        torch.lerp(x, after, 0.25, out=second)
    return pairs.flatten(dim, dim + 1).narrow(dim, 0, length)


def _half(x: Tensor, dim: int, cosited: bool) -> Tensor:
    """Halve one axis: collect what each sample was spread over, then undo that this counts neighbours, too."""
    outer, root, doublings = _INVERSE[cosited]
    if x.shape[dim] % 2:
        x = torch.cat((x, _beyond(x, dim, cosited)), dim)
    half = x.shape[dim] // 2
    even, odd = x.unflatten(dim, (half, 2)).unbind(dim + 1)
    if cosited:
        before = torch.cat((odd.narrow(dim, 0, 1), odd.narrow(dim, 0, half - 1)), dim)
        spread = even + (before + odd) * 0.5
    else:
        before = torch.cat((even.narrow(dim, 0, 1), odd.narrow(dim, 0, half - 1)), dim)
        after = torch.cat((even.narrow(dim, min(1, half - 1), half - 1), odd.narrow(dim, half - 1, 1)), dim)
        spread = (even + odd) * 0.75 + (before + after) * 0.25
    reach = 2**doublings
    spread = _mirrored(spread, dim, reach, cosited)
    for step in (2**n for n in range(doublings)):
        rest = spread.shape[dim] - step
        spread = spread.narrow(dim, step, rest).add(spread.narrow(dim, 0, rest), alpha=root**step)
    for step in (2**n for n in range(doublings)):
        rest = spread.shape[dim] - step
        spread = spread.narrow(dim, 0, rest).add(spread.narrow(dim, step, rest), alpha=root**step)
    return spread.narrow(dim, 1, half).mul(-root / outer)


def _beyond(x: Tensor, dim: int, cosited: bool) -> Tensor:
    """The pixel after the last one of an odd axis, as enlarging would have made it."""
    count = x.shape[dim]
    last = x.narrow(dim, count - 1, 1)
    if cosited or count == 1:
        return last
    return last * 1.5 - x.narrow(dim, count - 2, 1) * 0.5


def _mirrored(x: Tensor, dim: int, reach: int, cosited: bool) -> Tensor:
    """`reach` more samples on both sides, as enlarging continues beyond the edges.

    A cosited row is mirrored about its first sample and, as the last pixel lies beyond it, after its last one.
    """
    n = x.shape[dim]
    reached = torch.cat((torch.arange(-reach, 0), torch.arange(n, n + reach)))
    period = 2 * n - 1 if cosited else 2 * n  # ... 2 1 0 1 2 ... n-1 n-1 n-2 ..., or ... 1 0 0 1 ... n-1 n-1 ...
    place = reached % period
    ends = x.index_select(dim, torch.where(place < n, place, 2 * n - 1 - place))
    return torch.cat((ends.narrow(dim, 0, reach), x, ends.narrow(dim, reach, reach)), dim)
