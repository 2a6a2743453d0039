"""Building blocks that both families use. Tensors are (b, c, t, h, w)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import convolution
from .convolution import Triple
from .fused_norm import define

SpacePadding = Literal["zeros", "replicate"]


def single_head_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention with one head and scale 1/sqrt(width); q, k, v and the result are (batch, positions, width)."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)):
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    return torch.ops.cviv.scaled_dot_product_attention(q, k, v)


def _attention_by_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A few rows at a time, since not every device has a kernel that keeps no table of scores for such wide heads."""
    out = torch.empty_like(q)
    rows = max(1, SCORES // k.shape[1])
    for own_q, own_k, own_v, own in zip(q, k, v, out, strict=True) if rows < q.shape[1] else ((q, k, v, out),):
        own_q, own_k, own_v, own = (x.view(-1, 1, *x.shape[-2:]) for x in (own_q, own_k, own_v, own))
        for part, place in zip(own_q.split(rows, dim=2), own.split(rows, dim=2), strict=True):
            place.copy_(F.scaled_dot_product_attention(part, own_k, own_v))
    return out


def _like_the_first(q: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(q)


SCORES = 2**26  # entries of the largest table of scores, which only a device without a fused kernel makes
define("scaled_dot_product_attention(Tensor q, Tensor k, Tensor v) -> Tensor", _attention_by_rows, _like_the_first)


def frames_of(x: Tensor) -> Tensor:
    """(b, c, t, h, w) as (b t, c, h, w): a view of a single channels-last clip."""
    return rearrange(x, "b c t h w -> (b t) c h w")


def clip_of(frames: Tensor, b: int) -> Tensor:
    """(b t, c, h, w) as (b, c, t, h, w): a view."""
    return rearrange(frames, "(b t) c h w -> b c t h w", b=b)


def per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a 2-D layer to every frame of `x`."""
    y: Tensor = layer(frames_of(x))
    return clip_of(y, x.shape[0])


def channels_last(x: Tensor) -> Tensor:
    """(b, c, t, h, w) with the channels of a pixel side by side in memory, as the layers want it."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def new_clip(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised (b, c, t, h, w), with the channels of a pixel side by side in memory."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)


def laid_out(weight: Tensor) -> Tensor:
    """A kernel in the memory layout of the activations, so that no convolution has to change it at every call."""
    if weight.ndim == 4:
        return weight.contiguous(memory_format=torch.channels_last)
    return channels_last(weight) if weight.ndim == 5 else weight


def join(pieces: list[Tensor], out: Tensor) -> None:
    """The pieces one after another in time, written to `out`, which may be a part of a tensor."""
    if torch.is_grad_enabled() and any(piece.requires_grad for piece in pieces):
        out.copy_(torch.cat(pieces, dim=2))
    elif len(pieces) == 1:  # of which torch.cat writes nothing where `out` is one pixel of one frame
        out.copy_(pieces[0])
    else:
        torch.cat(pieces, dim=2, out=out)


def builds_graph(x: Tensor, layer: nn.Module) -> bool:
    """Whether autograd or a compiler follows `layer(x)`, so that nothing may be written in place."""
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in layer.parameters()))


def prepared(layer: nn.Module, name: str, weights: tuple[Tensor, ...], make: Callable[..., Tensor]) -> Tensor:
    """`make(*weights)`, kept with `layer` until a weight changes, and computed anew where a gradient needs it.

    It is no part of the state dict; `forget_prepared` lets it go. Sums are taken in float32 or better and rounded once.
    """
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(w.requires_grad for w in weights)):
        return make(*(weight.to(wide) for weight in weights)).to(weights[0].dtype)
    versions = tuple((w.data_ptr(), w.device, w.dtype, 0 if w.is_inference() else w._version) for w in weights)
    kept: dict[str, tuple[object, Tensor]] = layer.__dict__.setdefault(PREPARED, {})
    if name not in kept or kept[name][0] != versions:
        with torch.inference_mode(False), torch.no_grad():  # a gradient of the layer's input may need it later
            kept[name] = versions, laid_out(make(*(weight.to(wide) for weight in weights)).to(weights[0].dtype))
    return kept[name][1]


PREPARED = "prepared_kernels"


def forget_prepared(model: nn.Module) -> None:
    """Let go of what `prepared` keeps, when the weights move."""
    for layer in model.modules():
        layer.__dict__.pop(PREPARED, None)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: Triple = (1, 1, 1), padding: Triple) -> Tensor:
    """3-D convolution. For small inputs torch leaves its fast CPU library, which is several times slower: we do not."""
    if torch.compiler.is_compiling():
        return F.conv3d(x, weight, bias, stride, padding)
    if x.device.type == "cpu" and _suits_onednn(x, weight):
        return torch.mkldnn_convolution(channels_last(x), channels_last(weight), bias, padding, stride, (1, 1, 1), 1)
    backend = convolution.choose_backend(x.device, x.dtype)
    return convolution.convolve(x, weight, bias, stride=stride, padding=padding, backend=backend)


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    graph = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    plain = min(x.shape[-2:]) > 1  # else strides do not tell how the channels lie, and it reads them wrongly
    fits = x.dtype == torch.float32 and x.numel() <= convolution.LIMIT
    return plain and fits and not graph and torch.backends.mkldnn.is_available()


def concatenated(*weights: Tensor) -> Tensor:
    """Kernels that read the same channels, or the groups of a grouped one, as one kernel."""
    return torch.cat(weights)


def phase_kernels(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(4, out, in, 3, 2, 2): the kernels by which the pixels of rows i, i + 2, ... and columns j, j + 2, ... of a clip
    enlarged by nearest x2 see the small one through `weight` (out, in, 3, 3, 3), (i, j) = (0, 0), (0, 1), (1, 0), ...
    In `dtype`, where it is given.
    """
    sums = _neighbouring_taps(weight).to(dtype or weight.dtype)
    kernels = [sums[..., i::2, j::2].movedim(1, -1) for i in (0, 1) for j in (0, 1)]
    return torch.stack(kernels).movedim(-1, 2)  # each laid out as convolutions want it


def enlarging_kernel(weight: Tensor) -> Tensor:
    """The 4x4 kernel (in, out, 4, 4) of a transposed convolution of stride 2 and padding 1 that does what nearest x2
    and then a convolution by the 3x3 kernel (out, in, 3, 3) do."""
    return _neighbouring_taps(weight).flip(-2, -1).transpose(0, 1)


def _neighbouring_taps(weight: Tensor) -> Tensor:
    """(..., 4, 4): sums of two neighbouring rows and columns of (..., 3, 3), and the first and last alone.

    A pixel behind nearest x2 sees only two rows and columns of the small grid, so taps that meet one pixel are summed.
    """
    sums = F.avg_pool2d(weight.flatten(0, -3)[:, None], 2, stride=1, padding=1, divisor_override=1)
    return sums.view(*weight.shape[:-2], 4, 4)


def parts_to_frames(x: Tensor, parts: int) -> Tensor:
    """Read channels as (parts, c) and interleave the parts into time: frame t, part n becomes frame t * parts + n."""
    return rearrange(x, "b (n c) t h w -> b c (t n) h w", n=parts)


def add(y: Tensor, x: Tensor) -> Tensor:
    """y + x, into `y`, which nobody else needs, unless a gradient needs it."""
    return y + x if y.requires_grad or x.requires_grad else y.add_(x)


class PaddedConv3d(nn.Conv3d):
    """A 3-D convolution with its own padding on every side of time and space.

    `time` is (frames in front, frames behind), `space` is (left, right) and is used for rows and columns alike.
    Time is padded by repeating the first and last frame where `time_replicate`, else by zero frames; space by
    `space_padding`.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        *,
        stride: tuple[int, int, int] = (1, 1, 1),
        time: tuple[int, int],
        time_replicate: bool,
        space: tuple[int, int] = (1, 1),
        space_padding: SpacePadding,
    ) -> None:
        super().__init__(width_in, width_out, 3, stride)
        self.time = time
        self.space = space
        self.time_replicate = time_replicate
        self.space_padding: SpacePadding = space_padding

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002, the base class's name for it
        """(b, width_in, t, h, w) to (b, width_out, t', h', w')."""
        pieces = self.pieces(self.padded_in_space(input))
        return pieces[0][1] if len(pieces) == 1 else torch.cat([y for _, y in pieces], dim=2)

    def padded_in_space(self, x: Tensor) -> Tensor:
        """`x` with the borders that `pieces` does not pad itself."""
        left, right = self.space
        if self.space_padding == "replicate":
            return F.pad(x, (left, right, left, right, 0, 0), mode="replicate")
        return x if left == right else F.pad(x, (left, right, left, right))

    def pieces(self, x: Tensor) -> list[tuple[int, Tensor]]:
        """What a clip padded in space gives: (first frame, frames) in order."""
        left, right = self.space
        own = left if self.space_padding == "zeros" and left == right else 0
        stride = cast("Triple", self.stride)
        return list(convolve_in_time(x, self.weight, self.bias, self.time, stride, (own, own), self.time_replicate))


def convolve_in_time(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    time: tuple[int, int],
    stride: Triple,
    padding: tuple[int, int],
    replicate: bool,
    skipped: int = 0,
) -> Iterator[tuple[int, Tensor]]:
    """A convolution with `time` frames of padding in front and behind, as (first frame, frames) in order.

    skipped: channels of the very first frame that nobody needs; where it stands alone they are not computed.
    Frames at either end, which see repeated frames or zeros, get a kernel of the taps that are left. Where the weights
    are larger than the clip it is padded instead: making such kernels would cost more than it saves.
    """
    if x.numel() < weight.numel():
        x = F.pad(x, (0, 0, 0, 0, *time), mode="replicate" if replicate else "constant")
        yield 0, convolve(x, weight, bias, stride=stride, padding=(0, *padding))
        return
    for part in parts_in_time(x.shape[2], stride[0], time, replicate):
        kernel = weight if part.taps == WHOLE else torch.cat([_summed(weight, taps) for taps in part.taps], dim=2)
        frames = x[:, :, part.source : part.source + stride[0] * (part.length - 1) + len(part.taps)]
        first = skipped if part.start == 0 and part.length == 1 else 0
        own = None if bias is None else bias[first:]
        yield part.start, convolve(frames, kernel[first:], own, stride=stride, padding=(0, *padding))


def _summed(weight: Tensor, taps: tuple[int, ...]) -> Tensor:
    """Taps that see the same frame as one."""
    first, *others = (weight[:, :, tap : tap + 1] for tap in taps)
    return sum(others, first.to(torch.promote_types(weight.dtype, torch.float32))).to(weight.dtype) if others else first


WHOLE = ((0,), (1,), (2,))


class TimePart(NamedTuple):
    """`length` frames from `start` on, of frames from `source` on. taps: those that each frame of the kernel sums."""

    start: int
    length: int
    source: int
    taps: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=256)
def parts_in_time(frames: int, stride: int, padding: tuple[int, int], replicate: bool) -> tuple[TimePart, ...]:
    """The output frames of a kernel of three taps, in runs that see the same taps."""
    parts: list[TimePart] = []
    for start in range((frames + sum(padding) - 3) // stride + 1):
        taps: dict[int, tuple[int, ...]] = {}
        for tap in range(3):
            source = start * stride - padding[0] + tap
            if replicate or 0 <= source < frames:
                source = min(max(source, 0), frames - 1)
                taps[source] = (*taps.get(source, ()), tap)
        part = TimePart(start, 1, min(taps), tuple(taps.values()))
        if parts and parts[-1].taps == part.taps == WHOLE:
            last = parts.pop()
            part = last._replace(length=last.length + 1)
        parts.append(part)
    return tuple(parts)
