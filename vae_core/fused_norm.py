"""Norm and SiLU in one step: RMS norm of IV-VAE, group norm of CV-VAE with given statistics.

Without gradients each function is one operator of torch's dispatcher (`cviv::...`): Triton kernels on a GPU that has
Triton, else torch in slabs small enough for a cache, so that no temporary is as large as the tensor. Statistics and
arithmetic are float32 or better; the result is rounded once. With gradients, or under `torch.compile`, which fuses
by itself, plain torch runs instead. Tensors are (b, c, t, h, w) or (n, c, h, w), with any strides.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12  # shortest length that the RMS norm divides by
CPU_SLAB = 2**19  # elements; 2 MB of float32 stay in a cache
SLAB = 2**23  # elements; 32 MB of float32
TRITON_TYPES = (torch.float16, torch.bfloat16, torch.float32)

_log = logging.getLogger("cviv-vae")


def rms_norm_silu(x: Tensor, gain: Tensor, *, halves: int, silu: bool = True, out: Tensor | None = None) -> Tensor:
    """L2-normalise `halves` equal parts of the channels at every position, times `gain`, then SiLU where `silu`.

    x: (b, c, t, h, w) or (n, c, h, w), any floating type. gain: (c,), the norm's gamma times sqrt(c / halves).
    out: where to write, of the shape, type and device of `x`, with any strides: `x` itself, or memory that shares no
    element with it. Not with gradients. Without it the result has the strides of `x`.
    Raises ValueError where the shapes do not fit, or where gradients are wanted with `out`.
    """
    _check(x, out, _wants_gradient(x, gain))
    c = x.shape[1]
    if gain.shape != (c,) or halves < 1 or c % halves:
        raise ValueError(
            f"rms_norm_silu needs one gain per channel, and channels that `halves` divides; got {c} channels, gain "
            f"{tuple(gain.shape)} and halves={halves}. Pass gamma * sqrt(channels / halves), flattened."
        )
    if _plainly(x, gain):
        return _onto(_plain_rms(x, gain, halves, silu), out)
    if out is None:
        return torch.ops.cviv.rms_norm_silu(x, gain, halves=halves, silu=silu)
    return torch.ops.cviv.rms_norm_silu_(x, gain, halves=halves, silu=silu, out=out)


def group_norm_silu(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    silu: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Group norm with given statistics, then SiLU where `silu`.

    x: (b, c, t, h, w) or (b, c, h, w). mean, rstd: (b, groups), of float32 or better; rstd is 1 / sqrt(variance + eps).
    weight, bias: (c,). out: as for `rms_norm_silu`. Raises ValueError where the shapes do not fit, or where gradients
    are wanted with `out`.
    """
    _check(x, out, _wants_gradient(x, mean, rstd, weight, bias))
    b, c = x.shape[:2]
    fits = mean.shape == rstd.shape and mean.ndim == 2 and mean.shape[0] == b and mean.shape[1] > 0
    if not fits or c % mean.shape[1] or weight.shape != (c,) or bias.shape != (c,):
        raise ValueError(
            f"group_norm_silu needs mean and rstd (b, groups), with groups that divide the channels, and weight and "
            f"bias (c,); got x {tuple(x.shape)}, mean {tuple(mean.shape)}, rstd {tuple(rstd.shape)}, weight "
            f"{tuple(weight.shape)} and bias {tuple(bias.shape)}."
        )
    if _plainly(x, mean, rstd, weight, bias):
        return _onto(_plain_group(x, mean, rstd, weight, bias, silu), out)
    if out is None:
        return torch.ops.cviv.group_norm_silu(x, mean, rstd, weight, bias, silu=silu)
    return torch.ops.cviv.group_norm_silu_(x, mean, rstd, weight, bias, silu=silu, out=out)


def group_statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor, int]:
    """Mean and variance of every group of channels of every batch row, and how many values each group has.

    x: (b, c, t, h, w) or (b, c, h, w). Returns mean and variance (not corrected), each (b, groups), of float32, or of
    float64 for such input; they pool over tiles by Chan's formula. Raises ValueError where `groups` does not divide c.
    """
    _check(x, None, False)
    if groups < 1 or x.shape[1] % groups or not x.numel():
        raise ValueError(
            f"group_statistics needs groups that divide the channels, and at least one value in each; got x "
            f"{tuple(x.shape)} and groups={groups}."
        )
    if _plainly(x):
        variance, mean = torch.var_mean(_grouped(x.to(_wide(x)), groups), dim=_behind(x, 2), correction=0)
    else:
        mean, variance = torch.ops.cviv.group_statistics(x, groups)
    return mean, variance, x[0].numel() // groups


def _check(x: Tensor, out: Tensor | None, gradient: bool) -> None:
    if x.ndim not in (4, 5) or not x.is_floating_point():
        raise ValueError(
            f"Fused norms take floating tensors (b, c, t, h, w) or (n, c, h, w); got {tuple(x.shape)} of {x.dtype}."
        )
    if out is None:
        return
    if (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"`out` must have the shape, type and device of x, {tuple(x.shape)} of {x.dtype} on {x.device}; got "
            f"{tuple(out.shape)} of {out.dtype} on {out.device}."
        )
    if gradient:
        raise ValueError("A fused norm cannot write into `out` where gradients are wanted; leave `out` away there.")


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _plainly(*tensors: Tensor) -> bool:
    """Whether autograd or a compiler must see every step."""
    return torch.compiler.is_compiling() or _wants_gradient(*tensors)


def _onto(y: Tensor, out: Tensor | None) -> Tensor:
    return y if out is None else out.copy_(y)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _behind(x: Tensor, first: int) -> tuple[int, ...]:
    """The dimensions of grouped `x` from `first` on."""
    return tuple(range(first, x.ndim + 1))


def _grouped(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(1, (groups, -1))


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(c,) or (b, c), against the dimensions of `x`, in its type."""
    return values.to(x.dtype)[(..., *(None,) * (x.ndim - 2))]


def _scale_and_shift(mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The norm as x * scale + shift, each (b, c) in the type of the statistics."""
    width = weight.shape[0] // mean.shape[1]
    scale = rstd.repeat_interleave(width, dim=1) * weight.to(rstd.dtype)
    return scale, bias.to(rstd.dtype) - mean.repeat_interleave(width, dim=1) * scale


def _plain_rms(x: Tensor, gain: Tensor, halves: int, silu: bool) -> Tensor:
    wide = x.to(_wide(x))
    parts = _grouped(wide, halves)
    y = (parts * parts.square().sum(dim=2, keepdim=True).clamp_min(EPS**2).rsqrt()).flatten(1, 2)
    y = y * _per_channel(gain, wide)
    return (F.silu(y) if silu else y).to(x.dtype)


def _plain_group(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
    wide = x.to(_wide(x))
    scale, shift = _scale_and_shift(mean, rstd, weight, bias)
    y = wide * _per_channel(scale, wide) + _per_channel(shift, wide)
    return (F.silu(y) if silu else y).to(x.dtype)


# --- the operators -----------------------------------------------------------------------------------------------


def as_clip(x: Tensor) -> Tensor:
    """Frames (n, c, h, w) as a view (1, c, n, h, w); clips as they are. For per-position work only."""
    return x if x.ndim == 5 else x.transpose(0, 1)[None]


def _slabs(x: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """(b, c, t, h, w) cut into (batch row, frames, rows) of all channels and bounded size."""
    limit = CPU_SLAB if x.device.type == "cpu" else SLAB
    b, c, t, h, w = x.shape
    frames, rows = max(1, limit // max(1, c * h * w)), h
    if c * h * w > limit:
        rows = max(1, limit // (c * w))
    for i in range(b):
        for f in range(0, t, frames):
            for r in range(0, h, rows):
                yield i, slice(f, f + frames), slice(r, r + rows)


def _store(y: Tensor, silu: bool, out: Tensor) -> None:
    """`y`, or its SiLU, into `out`; `y` is lost."""
    if silu and y.dtype == out.dtype:
        torch.ops.aten.silu.out(y, out=out)
    else:
        out.copy_(F.silu(y, inplace=True) if silu else y)


def _slabs_rms(x: Tensor, gain: Tensor, halves: int, silu: bool, out: Tensor) -> None:
    x, out = as_clip(x), as_clip(out)
    gain = gain.to(_wide(x)).view(halves, -1, 1, 1, 1)
    for i, frames, rows in _slabs(x):
        part = x[i, :, frames, rows].unflatten(0, (halves, -1)).to(gain.dtype)  # halves c/halves t h w
        y = part.square()
        scale = y.sum(dim=1, keepdim=True).clamp_min_(EPS**2).rsqrt_()
        torch.mul(part, scale, out=y).mul_(gain)
        _store(y.flatten(0, 1), silu, out[i, :, frames, rows])


def _slabs_group(x: Tensor, scale: Tensor, shift: Tensor, silu: bool, out: Tensor) -> None:
    for i, frames, rows in _slabs(x):
        y = x[i, :, frames, rows] * scale[i, :, None, None, None]
        _store(y.add_(shift[i, :, None, None, None]), silu, out[i, :, frames, rows])


def _slabs_statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Every channel of every slab around its own mean, then all of a group around theirs."""
    counts: list[int] = []
    moments: list[list[Tensor]] = [[] for _ in x]
    for i, frames, rows in _slabs(x):
        part = x[i, :, frames, rows].to(_wide(x))
        mean = part.mean(dim=(1, 2, 3), keepdim=True)
        squares = (part - mean).square_().sum(dim=(1, 2, 3))
        moments[i].append(torch.stack((mean.flatten(), squares)))
        counts.append(part[0].numel())
    means, squares = torch.stack([torch.stack(row) for row in moments]).unbind(2)  # each b slabs c
    return pool_channels(means, squares, means.new_tensor(counts[: means.shape[1]]), groups)


def pool_channels(means: Tensor, squares: Tensor, counts: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance, each (b, groups), from those of every channel of pieces, by Chan's formula.

    means: (b, pieces, c). squares: the sums of squared differences from them. counts: (pieces,), values per channel.
    """
    means, squares = (v.unflatten(2, (groups, -1)) for v in (means, squares))  # b pieces groups c/groups
    share = (counts / (counts.sum() * means.shape[3]))[:, None, None]
    mean = (means * share).sum(dim=(1, 3), keepdim=True)
    spread = squares * (share / counts[:, None, None]) + (means - mean).square() * share
    return mean[:, 0, :, 0], spread.sum(dim=(1, 3))


def _rms_norm_silu(x: Tensor, gain: Tensor, *, halves: int, silu: bool, out: Tensor) -> Tensor:
    if (kernels := _kernels_for(x)) is not None:
        kernels.rms_norm_silu(x, gain, halves=halves, silu=silu, out=out)
    else:
        _slabs_rms(x, gain, halves, silu, out)
    return out


def _group_norm_silu(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, *, silu: bool, out: Tensor
) -> Tensor:
    if x.device.type != "mps":  # which has no float64: a mean far from zero would cost the shift its last digits
        mean, rstd = mean.double(), rstd.double()
    scale, shift = (v.to(_wide(x)) for v in _scale_and_shift(mean, rstd, weight, bias))
    if (kernels := _kernels_for(x)) is not None:
        kernels.scale_shift_silu(x, scale, shift, silu=silu, out=out)
        return out
    if x.ndim == 4:  # here the first dimension is the batch, not time
        _slabs_group(x[:, :, None], scale, shift, silu, out[:, :, None])
    else:
        _slabs_group(x, scale, shift, silu, out)
    return out


def _group_statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    x = x if x.ndim == 5 else x[:, :, None]
    kernels = _kernels_for(x)
    return _slabs_statistics(x, groups) if kernels is None else kernels.group_statistics(x, groups)


def _nothing(*_: Tensor, out: Tensor, **__: int) -> Tensor:
    return out


def _no_statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    empty = x.new_empty(x.shape[0], groups, dtype=_wide(x))
    return empty, torch.empty_like(empty)


def _into_new(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`run` with a new tensor like its first argument as `out`."""

    def fresh(x: Tensor, *others: Tensor, **options: int) -> Tensor:
        return run(x, *others, **options, out=torch.empty_like(x))

    return fresh


def define(schema: str, run: Callable[..., object], shape: Callable[..., object]) -> None:
    """Register an operator, once per process, however often this file is loaded."""
    name = schema.split("(")[0]
    if hasattr(torch.ops.cviv, name):
        return
    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    _library.impl(name, shape, "Meta")


# the same one when this file is read again: operators live as long as their library
_library: torch.library.Library = globals().get("_library") or torch.library.Library("cviv", "FRAGMENT")
_RMS = "Tensor x, Tensor gain, *, int halves, bool silu"
_GROUP = "Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, *, bool silu"
define(f"rms_norm_silu({_RMS}) -> Tensor", _into_new(_rms_norm_silu), _into_new(_nothing))
define(f"rms_norm_silu_({_RMS}, Tensor(a!) out) -> Tensor(a!)", _rms_norm_silu, _nothing)
define(f"group_norm_silu({_GROUP}) -> Tensor", _into_new(_group_norm_silu), _into_new(_nothing))
define(f"group_norm_silu_({_GROUP}, Tensor(a!) out) -> Tensor(a!)", _group_norm_silu, _nothing)
define("group_statistics(Tensor x, int groups) -> (Tensor, Tensor)", _group_statistics, _no_statistics)


# --- Triton ------------------------------------------------------------------------------------------------------


def _kernels_for(x: Tensor) -> ModuleType | None:
    """The Triton kernels where they run on the device of `x` and in its type."""
    if not x.is_cuda or x.dtype not in TRITON_TYPES or not x.numel():
        return None
    return _working_kernels(x.device)


@functools.cache
def _working_kernels(device: torch.device) -> ModuleType | None:
    """The kernels, once each has given what torch gives on a few numbers of this device."""
    if importlib.util.find_spec("triton") is None:
        _log.info("Norm and SiLU on %s: torch, since Triton is not installed.", device)
        return None
    try:
        from . import triton_norm

        triton_norm.check(device)
    except torch.cuda.OutOfMemoryError:  # says nothing about the kernels
        raise
    except Exception as error:  # whatever a compiler, a driver or an import may raise: torch does the same, slower
        _log.warning("Norm and SiLU on %s: torch, since the Triton kernels do not work here (%s).", device, error)
        return None
    _log.info("Norm and SiLU on %s: Triton kernels.", device)
    return triton_norm
