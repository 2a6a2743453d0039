"""Fused operators, as entries of torch's dispatcher (`cviv::...`), so that what counts operators sees one of each.

They know nothing of plans or networks. On the meta device they only make their results. None of them has gradients:
where autograd or a compiler follows, layers use torch's own operators.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from . import norm
from .clip import Clip, empty
from .norm import Activation, Moments, wide
from .region import NO_PADDING, Padding

TRITON_TYPES = (torch.float16, torch.bfloat16, torch.float32)
SCORES = 2**26  # entries of the largest table of scores, which only a device without a fused kernel makes
MOST_BATCHES = 2**15  # batch rows of one attention: torch before mid-2025 fails from 65,536 on

_log = logging.getLogger("cviv-vae")


def gather(
    clip: Clip,
    activation: Activation | None = None,
    *,
    padding: Padding = NO_PADDING,
    replicate: bool = False,
    front: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """A clip as the input of a convolution, made in one pass, and its last frame; the clip lets go of its tensors.

    activation: is applied. padding: zeros, or copies of the edge where `replicate`. front: a frame (b, c, 1, h, w) that
    is put before the others as it is. keep: whether the last frame is wanted, activated and without padding.
    Returns (b, c, t or 1 + t, h + padding, w + padding) and (b, c, 1, h, w) or None.
    """
    if activation is None and front is None and not keep and not any(padding) and len(clip.tensors) == 1:
        return clip.tensors.pop(), None
    norm_of = ([], 1, 0.0, False) if activation is None else activation.arguments()
    x, last = torch.ops.cviv.gather(clip.tensors, flat(clip), list(padding), replicate, front, keep, *norm_of)
    clip.clear()
    return x, last if keep else None


def put(clip: Clip, out: Tensor, plus: Clip | None = None) -> None:
    """Put a clip together in `out`, of its shape and any strides, with `plus` added to it, in one pass."""
    others = ([], []) if plus is None else (plus.tensors, flat(plus))
    torch.ops.cviv.put(clip.tensors, flat(clip), *others, out=out)


def flat(clip: Clip) -> list[int]:
    """The places of a clip's tensors, as operators take them."""
    return [n for place in clip.places for n in place]


def moments(clip: Clip, groups: int) -> Moments:
    """Mean and variance of every group of channels of every batch row, (b, groups) each, float32 or better.

    Every tensor of the clip has all channels.
    """
    mean, variance = torch.ops.cviv.group_moments(clip.tensors, groups)
    _, c, t, h, w = clip.shape
    return Moments(mean, variance, t * h * w * c // groups)


def attention(q: Tensor, k: Tensor, v: Tensor, *, plain: bool) -> Tensor:
    """Softmax attention with one head and scale 1/sqrt(width); q, k, v and the result are (batch, positions, width)."""
    if plain:
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    return torch.ops.cviv.scaled_dot_product_attention(q, k, v)


# ------------------------------------------------------------------------------------------------ implementations


def _clip(tensors: list[Tensor], places: list[int]) -> Clip:
    return Clip(tensors, zip(places[::2], places[1::2], strict=True))


def _new_input(
    tensors: list[Tensor],
    places: list[int],
    padding: list[int],
    replicate: bool,
    front: Tensor | None,
    keep: bool,
    *_: object,
) -> tuple[Tensor, Tensor]:
    """What `gather` returns, uninitialised."""
    x = tensors[0]
    b, c, t, h, w = _clip(tensors, places).shape
    top, bottom, left, right = padding
    shape = (b, c, t + (front is not None), h + top + bottom, w + left + right)
    kept = (b, c, 1, h, w) if keep else (0, 0, 0, 0, 0)
    return empty(shape, x), empty(kept, x)


def _gather(
    tensors: list[Tensor],
    places: list[int],
    padding: list[int],
    replicate: bool,
    front: Tensor | None,
    keep: bool,
    values: list[Tensor],
    halves: int,
    number: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    out, last = _new_input(tensors, places, padding, replicate, front, keep)
    top, bottom, left, right = padding
    inner = out[..., top : out.shape[3] - bottom, left : out.shape[4] - right]
    if front is not None:
        inner[:, :, :1].copy_(front)
    affine = _affine(values, number)
    later = inner if front is None else inner[:, :, 1:]
    for (x, place), channel in zip(_clip(tensors, places).of(later), places[::2], strict=True):
        channels = slice(channel, channel + x.shape[1])
        if len(affine) == 1:
            own = halves if x.shape[1] == affine[0].shape[0] else 1  # else it is one of them
            _kernels(x).rms_norm(x, affine[0][channels], own, silu, place)
        elif affine:
            _kernels(x).group_norm(x, *(v[:, channels] for v in affine), silu, place)
        else:
            place.copy_(x)
    if keep:
        last.copy_(inner[:, :, -1:])
    for dim, low, high in ((3, top, bottom), (4, left, right)):
        size = out.shape[dim]
        for start, length, edge in ((0, low, low), (size - high, high, size - high - 1)):
            border = out.narrow(dim, start, length)
            if replicate and length:
                border.copy_(out.narrow(dim, edge, 1))
            elif length:
                border.zero_()
    return out, last


def _affine(values: list[Tensor], number: float) -> tuple[Tensor, ...]:
    """(gain,) of an RMS norm, (c,); or (mean, scale, bias) of a group norm per batch row and channel, (b, c) each."""
    if len(values) < 2:
        return tuple((number * gamma.to(wide(gamma.dtype))).flatten() for gamma in values)
    mean, variance, weight, bias = values
    width = weight.shape[0] // mean.shape[1]
    scale = torch.rsqrt(variance + number).repeat_interleave(width, dim=1) * weight.to(mean.dtype)
    return mean.repeat_interleave(width, dim=1), scale, bias.to(mean.dtype).expand_as(scale)


def _put(
    tensors: list[Tensor], places: list[int], others: list[Tensor], other_places: list[int], *, out: Tensor
) -> Tensor:
    plus = _clip(others, other_places) if others else None
    for (x, place), channel, frame in zip(_clip(tensors, places).of(out), places[::2], places[1::2], strict=True):
        if plus is None:
            place.copy_(x)
        else:
            added = plus.block(channel, x.shape[1])[:, :, frame : frame + x.shape[2]]
            torch.add(x, added, out=place)
    return out


def _put_nothing(*_: object, out: Tensor) -> Tensor:
    return out


def _group_moments(tensors: list[Tensor], groups: int) -> tuple[Tensor, Tensor]:
    found = zip(*(_kernels(x).channel_moments(x) for x in tensors), strict=True)
    means, squares, counts = (torch.cat(parts, dim=min(1, parts[0].ndim - 1)) for parts in found)
    return norm.pool(means, squares, counts, groups)


def _no_moments(tensors: list[Tensor], groups: int) -> tuple[Tensor, Tensor]:
    mean = tensors[0].new_empty(tensors[0].shape[0], groups, dtype=wide(tensors[0].dtype))
    return mean, torch.empty_like(mean)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A few rows at a time, since not every device has a kernel that keeps no table of scores for such wide heads."""
    out = torch.empty_like(q)
    rows = max(1, SCORES // k.shape[1])
    batch = 1 if rows < q.shape[1] else MOST_BATCHES
    for several in zip(*(x.split(batch) for x in (q, k, v, out)), strict=True):
        own_q, own_k, own_v, own = (x[:, None] for x in several)
        for some, place in zip(own_q.split(rows, dim=2), own.split(rows, dim=2), strict=True):
            place.copy_(F.scaled_dot_product_attention(some, own_k, own_v))
    return out


def _like_the_first(q: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(q)


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
define(
    "gather(Tensor[] x, int[] places, int[] padding, bool replicate, Tensor? front, bool keep, Tensor[] norm, "
    "int halves, float number, bool silu) -> (Tensor, Tensor)",
    _gather,
    _new_input,
)
define(
    "put(Tensor[] x, int[] places, Tensor[] plus, int[] plus_places, *, Tensor(a!) out) -> Tensor(a!)",
    _put,
    _put_nothing,
)
define("group_moments(Tensor[] x, int groups) -> (Tensor, Tensor)", _group_moments, _no_moments)
define("scaled_dot_product_attention(Tensor q, Tensor k, Tensor v) -> Tensor", _attention, _like_the_first)


# -------------------------------------------------------------------------------------------------------- Triton


def _kernels(x: Tensor) -> ModuleType:
    """Triton kernels where they run on the device of `x` and in its type, else torch in slabs."""
    if not x.is_cuda or x.dtype not in TRITON_TYPES or not x.numel():
        return norm
    return _working_kernels(x.device, x.dtype) or norm


@functools.cache
def _working_kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The kernels, once they have given what torch gives on a few numbers of this device and type."""
    where = f"Norm and SiLU on {device} in {str(dtype).removeprefix('torch.')}"
    try:
        from . import triton_norm

        triton_norm.check(device, dtype)
    except torch.cuda.OutOfMemoryError:  # says nothing about the kernels
        raise
    except ImportError:
        _log.info("%s: torch, since Triton is not installed.", where)
        return None
    except Exception as error:  # whatever a compiler or a driver may raise: torch does the same, slower
        _log.warning("%s: torch, since the Triton kernels do not work here (%s).", where, error)
        return None
    _log.info("%s: Triton kernels.", where)
    return triton_norm
