"""Building blocks that both families use. Tensors are (b, c, t, h, w)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

SpacePadding = Literal["zeros", "replicate"]


def single_head_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention with one head and scale 1/sqrt(width); q, k, v and the result are (batch, positions, width)."""
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


def per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a 2-D layer to every frame of `x`."""
    b = x.shape[0]
    y: Tensor = layer(rearrange(x, "b c t h w -> (b t) c h w"))
    return rearrange(y, "(b t) c h w -> b c t h w", b=b)


def enlarged_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[int, int, Tensor]]:
    """Nearest x2 in height and width, then a convolution that is 3x3 there: four convolutions of 2x2 on the small grid.

    x: frames (n, c, h, w) or clips (b, c, t, h, w), padded by one in height and width, clips also in time. Every pixel
    of the large frame sees only two rows and columns of the small one, so taps that meet the same pixel are summed.
    Yields (i, j, pixels of rows i, i + 2, ... and columns j, j + 2, ... of the large frame).
    """
    convolve = F.conv3d if x.ndim == 5 else F.conv2d
    height, width = x.shape[-2] - 1, x.shape[-1] - 1
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))  # sums of taps are rounded once
    for i, rows in enumerate(_shared_taps(wide, -2)):
        for j, kernel in enumerate(_shared_taps(rows, -1)):
            yield i, j, convolve(x[..., i : i + height, j : j + width], kernel.to(weight.dtype), bias)


def _shared_taps(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Three taps as the two of even and the two of odd positions behind nearest x2."""
    before, at, after = weight.unbind(dim)
    return torch.stack((before, at + after), dim), torch.stack((before + at, after), dim)


def parts_to_frames(x: Tensor, parts: int) -> Tensor:
    """Read channels as (parts, c) and interleave the parts into time: frame t, part n becomes frame t * parts + n."""
    return rearrange(x, "b (n c) t h w -> b c (t n) h w", n=parts)


def activate(x: Tensor) -> Tensor:
    """SiLU of a tensor that nobody else needs: in place, unless a gradient needs it."""
    return F.silu(x, inplace=not x.requires_grad)


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
        x = input
        left, right = self.space
        space = (left, right, left, right)
        if self.time_replicate and self.space_padding == "replicate":
            x = F.pad(x, (*space, *self.time), mode="replicate")
            return super().forward(x)
        if self.time_replicate:
            x = F.pad(x, (0, 0, 0, 0, *self.time), mode="replicate")
            if left == right:  # the convolution pads zeros itself, without a copy
                return F.conv3d(x, self.weight, self.bias, self.stride, (0, left, right))
            return super().forward(F.pad(x, (*space, 0, 0)))
        if self.space_padding == "zeros" and left == right and self.time[0] == self.time[1]:
            return F.conv3d(x, self.weight, self.bias, self.stride, (self.time[0], left, left))
        raise AssertionError("no published layer pads this way")
