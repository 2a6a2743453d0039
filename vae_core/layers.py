"""Building blocks that both families use. Tensors are (b, c, t, h, w)."""

from __future__ import annotations

from typing import Literal

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


def upsample_space(x: Tensor) -> Tensor:
    """Nearest-neighbour enlargement by two in height and width, frame by frame."""
    return x.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)  # b c t 2h 2w


def parts_to_frames(x: Tensor, parts: int) -> Tensor:
    """Read channels as (parts, c) and interleave the parts into time: frame t, part n becomes frame t * parts + n."""
    return rearrange(x, "b (n c) t h w -> b c (t n) h w", n=parts)


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
