"""Layers that families share. Each reads a clip, through a norm and SiLU where given, and pads only at the border."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .clip import Clip, frames_of
from .convolution import convolve_frames, enlarge_frames
from .norm import Activation, summed
from .operators import attention, gather
from .region import ENLARGE, Padding, Reach
from .steps import Context, Layer

SpacePadding = Literal["zeros", "replicate"]


def conv_input(
    clip: Clip,
    at: Context,
    activation: Activation | None,
    reach: Reach,
    space_padding: SpacePadding = "zeros",
    *,
    front: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
    """The input of a convolution of this reach, its last frame where `keep`, and the (rows, columns) of zeros that the
    convolution should pad itself, since it can do so on both sides alike.

    front, keep: as in `gather`.
    """
    wanted = reach.padding(at.border)
    own, explicit = (0, 0), wanted
    if space_padding == "zeros":
        top, bottom, left, right = wanted
        own = (top if top == bottom else 0, left if left == right else 0)
        explicit = Padding(top - own[0], bottom - own[0], left - own[1], right - own[1])
    if not at.plain:
        replicate = space_padding == "replicate"
        x, last = gather(clip, activation, padding=explicit, replicate=replicate, front=front, keep=keep)
        return x, last, own
    x = clip.tensor() if activation is None else activation.plain(clip.tensor())
    last = x[:, :, -1:] if keep else None
    x = x if front is None else torch.cat((front, x), dim=2)
    if any(explicit):
        top, bottom, left, right = explicit
        mode = "replicate" if space_padding == "replicate" else "constant"
        x = F.pad(x, (left, right, top, bottom, 0, 0), mode=mode)
    return x, last, own


def in_time(tensors: Iterable[tuple[int, Tensor]], at: Context) -> Clip:
    """A clip of (first frame, frames) in order."""
    starts, frames = zip(*tensors, strict=True)
    if at.plain and len(frames) > 1:
        return Clip([torch.cat(frames, dim=2)])
    return Clip(frames, ((0, start) for start in starts))


class FrameConv(nn.Conv2d, Layer):
    """A 2-D convolution, frame by frame, with zeros around the frame."""

    def __init__(
        self, width_in: int, width_out: int, kernel: int = 3, *, reach: Reach | None = None, stride: int = 1
    ) -> None:
        nn.Conv2d.__init__(self, width_in, width_out, kernel, stride)
        self.reach = Reach(before=kernel // 2, after=kernel // 2) if reach is None else reach

    def forward(self, clip: Clip, at: Context, activation: Activation | None = None) -> Clip:  # type: ignore[override]
        """(b, width_in, t, h, w) to (b, width_out, t, h, w), or half of that with a stride of 2."""
        x, _, own = conv_input(clip, at, activation, self.reach)
        return Clip([self.frames(x, own, plain=at.plain)])

    def frames(self, x: Tensor, padding: tuple[int, int], *, plain: bool) -> Tensor:
        """What it gives for frames whose other padding is there already."""
        stride = self.stride[0], self.stride[1]
        return convolve_frames(x, self.weight, self.bias, stride=stride, padding=padding, plain=plain)


class FrameEnlarge(nn.Conv2d, Layer):
    """Nearest x2 and a 3x3 convolution with zeros around the frame, as one transposed convolution."""

    reach = ENLARGE

    def __init__(self, width_in: int, width_out: int) -> None:
        nn.Conv2d.__init__(self, width_in, width_out, 3, padding=1)

    def forward(self, clip: Clip, at: Context, activation: Activation | None = None) -> Clip:  # type: ignore[override]
        """(b, width_in, t, h, w) to (b, width_out, t, 2h, 2w), less what a side inside the frame cannot give."""
        kernel = at.kernel(self, "enlarging", lambda: summed(self.weight, enlarging_kernel))
        top, bottom, left, right = at.border
        rows, columns = (1 if first or last else 2 for first, last in ((top, bottom), (left, right)))
        y = enlarge_frames(clip.tensor(), kernel, self.bias, padding=(rows, columns))
        height, width = y.shape[-2:]
        y0, y1 = int(rows == 1 and not top), height - int(rows == 1 and not bottom)
        return Clip([y[..., y0:y1, int(columns == 1 and not left) : width - int(columns == 1 and not right)]])


def enlarging_kernel(weight: Tensor) -> Tensor:
    """The 4x4 kernel (in, out, 4, 4) of a transposed convolution of stride 2 that does what nearest x2 and then a
    convolution by the 3x3 kernel (out, in, 3, 3) do."""
    return neighbouring_taps(weight).flip(-2, -1).transpose(0, 1)


def neighbouring_taps(weight: Tensor) -> Tensor:
    """(..., 4, 4): sums of two neighbouring rows and columns of (..., 3, 3), and the first and last alone.

    A pixel after nearest x2 sees only two rows and columns of the small grid, so taps that meet one pixel are summed.
    """
    sums = F.avg_pool2d(weight.flatten(0, -3)[:, None], 2, stride=1, padding=1, divisor_override=1)
    return sums.view(*weight.shape[:-2], 4, 4)


class Attention(nn.Module):
    """A norm and attention with one head over positions, without a residual."""

    def __init__(self, width: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.q, self.k, self.v, self.proj_out = (nn.Linear(width, width) for _ in range(4))

    def attend(self, y: Tensor, *, plain: bool) -> Tensor:
        """(batch, positions, width), after the norm, to the same."""
        return self.proj_out(attention(self.q(y), self.k(y), self.v(y), plain=plain))


class FrameAttention(Attention, Layer):
    """Group norm and attention over the positions of each frame, plus the input."""

    whole = True

    def __init__(self, width: int, *, groups: int, eps: float) -> None:
        super().__init__(width, nn.GroupNorm(groups, width, eps=eps))

    def forward(self, clip: Clip, at: Context, activation: Activation | None = None) -> Clip:
        """(b, width, t, h, w) to the same."""
        x = clip.tensor()
        b, _, _, height, width = x.shape
        y = self.attend(rearrange(self.norm(frames_of(x)), "n c h w -> n (h w) c"), plain=at.plain)
        return Clip([x + rearrange(self.over_time(y, b, at), "(b t) (h w) c -> b c t h w", b=b, h=height, w=width)])

    def over_time(self, y: Tensor, b: int, at: Context) -> Tensor:
        """What follows attention over space, (b t, positions, width) to the same: nothing here."""
        return y
