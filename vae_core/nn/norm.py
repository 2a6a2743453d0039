"""Norms followed by SiLU, as the input of the next convolution needs them; arithmetic is float32 or better.

An `Activation` is such a norm, ready to be applied to a clip while it is put in place for a convolution. The functions
at the end compute in slabs small enough for a cache; `triton_norm` does the same in one pass on GPUs that have Triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-12  # shortest length that the RMS norm divides by
CPU_SLAB = 2**19  # elements; 2 MB of float32 stay in a cache
SLAB = 2**23  # elements; 32 MB of float32


def wide(dtype: torch.dtype) -> torch.dtype:
    """Float32, or float64 for float64: what sums are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def summed(weight: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """A kernel that sums of a weight make: taken in float32 or better, and rounded once."""
    return make(weight.to(wide(weight.dtype))).to(weight.dtype)


class RMSNorm(nn.Module):
    """L2-normalise `halves` equal runs of the channels at every position, times sqrt(width of a run), times gamma."""

    def __init__(self, width: int, *, halves: int, dims: int) -> None:
        super().__init__()
        self.halves = halves
        self.scale = math.sqrt(width // halves)
        self.gamma = nn.Parameter(torch.ones(width, *(1,) * dims))

    def forward(self, x: Tensor) -> Tensor:
        """(b, width, ...) to the same."""
        y = x.to(wide(x.dtype)).unflatten(1, (self.halves, -1))
        y = (y * y.square().sum(dim=2, keepdim=True).clamp_min(EPS**2).rsqrt()).flatten(1, 2)
        return (y * (self.scale * self.gamma.to(y.dtype)).view(-1, *(1,) * (x.ndim - 2))).to(x.dtype)


Norm = RMSNorm | nn.GroupNorm


@dataclass(frozen=True)
class Moments:
    """Mean and variance of every group of channels of every batch row, each (b, groups), over `count` values."""

    mean: Tensor
    variance: Tensor
    count: int

    def pooled(self, other: Moments | None) -> Moments:
        """With the values of another region, by Chan's formula."""
        if other is None:
            return self
        count = self.count + other.count
        share = self.count / count
        difference = self.mean - other.mean
        spread = self.variance * share + other.variance * (1 - share)
        return Moments(other.mean + difference * share, spread + difference.square() * (share * (1 - share)), count)


@dataclass(frozen=True)
class Activation:
    """A norm and, with `silu`, SiLU. moments: of the whole chunk, for a GroupNorm."""

    norm: Norm
    moments: Moments | None = None
    silu: bool = True

    def plain(self, x: Tensor) -> Tensor:
        """By torch's own operators, of a whole chunk."""
        return F.silu(self.norm(x)) if self.silu else self.norm(x)

    def arguments(self) -> tuple[list[Tensor], int, float, bool]:
        """([gamma] or [mean, variance, weight, bias], halves, scale or eps, silu), as the operators take them."""
        if isinstance(self.norm, RMSNorm):
            return [self.norm.gamma], self.norm.halves, self.norm.scale, self.silu
        assert self.moments is not None
        values = [self.moments.mean, self.moments.variance, self.norm.weight, self.norm.bias]
        return values, 1, self.norm.eps, self.silu


# ------------------------------------------------------------------------------------------------------ in slabs


def slab_size(x: Tensor) -> tuple[int, int]:
    """(frames, rows) of a slab of (b, c, t, h, w): all channels of one batch row, of bounded size."""
    limit = CPU_SLAB if x.device.type == "cpu" else SLAB
    _, c, t, h, w = x.shape
    if c * h * w > limit:
        return 1, max(1, limit // (c * w))
    return min(t, limit // max(1, c * h * w)), h


def slabs(x: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """The slabs of (b, c, t, h, w): (batch row, frames, rows)."""
    b, _, t, h, _ = x.shape
    frames, rows = slab_size(x)
    for i in range(b):
        for f in range(0, t, frames):
            for r in range(0, h, rows):
                yield i, slice(f, f + frames), slice(r, r + rows)


def lengths(total: int, longest: int, like: Tensor) -> Tensor:
    """How long the runs are into which `total` is cut; made on the device of `like`, which need not be waited for."""
    out = torch.full((-(-total // longest),), longest, dtype=like.dtype, device=like.device)
    out[-1] = total - longest * (out.shape[0] - 1)
    return out


def _store(y: Tensor, out: Tensor, silu: bool) -> None:
    """`y`, or its SiLU, into `out`; `y` is lost."""
    if silu and y.dtype == out.dtype:
        torch.ops.aten.silu.out(y, out=out)
    else:
        out.copy_(F.silu(y, inplace=True) if silu else y)


def rms_norm(x: Tensor, gain: Tensor, halves: int, silu: bool, out: Tensor) -> None:
    """RMS norm, and SiLU, of (b, c, t, h, w) into `out`, of the same shape and any strides; gain: (c,)."""
    gain = gain.to(wide(x.dtype)).view(halves, -1, 1, 1, 1)
    for i, frames, rows in slabs(x):
        values = x[i, :, frames, rows].unflatten(0, (halves, -1)).to(gain.dtype)  # halves c/halves t h w
        y = values.square()
        scale = y.sum(dim=1, keepdim=True).clamp_min_(EPS**2).rsqrt_()
        torch.mul(values, scale, out=y).mul_(gain)
        _store(y.flatten(0, 1), out[i, :, frames, rows], silu)


def group_norm(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, silu: bool, out: Tensor) -> None:
    """(x - mean) * scale + bias, each (b, c), and SiLU, into `out`, of the shape of `x` and any strides."""
    for i, frames, rows in slabs(x):
        y = x[i, :, frames, rows] - mean[i, :, None, None, None]
        torch.addcmul(bias[i, :, None, None, None], y, scale[i, :, None, None, None], out=y)
        _store(y, out[i, :, frames, rows], silu)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every slab of (b, c, t, h, w): mean of every channel and squared differences from it, (b, slabs, c) each, and
    how many values of a channel it has, (slabs,)."""
    found: list[list[Tensor]] = [[] for _ in x]
    for i, frames, rows in slabs(x):
        values = x[i, :, frames, rows].to(wide(x.dtype))
        mean = values.mean(dim=(1, 2, 3), keepdim=True)
        squares = (values - mean).square_().sum(dim=(1, 2, 3))
        found[i].append(torch.stack((mean.flatten(), squares)))
    means, squares = torch.stack([torch.stack(row) for row in found]).unbind(2)
    (frames, rows), (_, _, t, h, w) = slab_size(x), x.shape
    counts = lengths(t, frames, means)[:, None] * (lengths(h, rows, means) * w)
    return means, squares, counts.flatten()


def pool(means: Tensor, squares: Tensor, counts: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance, each (b, groups), from those of every channel of several runs, by Chan's formula.

    means: (b, runs, c). squares: the sums of squared differences from them. counts: (runs,), values per channel.
    """
    means, squares = (v.unflatten(2, (groups, -1)) for v in (means, squares))  # b runs groups c/groups
    share = (counts / (counts.sum() * means.shape[3]))[:, None, None]
    mean = (means * share).sum(dim=(1, 3), keepdim=True)
    spread = squares * (share / counts[:, None, None]) + (means - mean).square() * share
    return mean[:, 0, :, 0], spread.sum(dim=(1, 3))
