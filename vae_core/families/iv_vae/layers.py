"""The layers of IV-VAE. Every feature map is [2-D half | 3-D half] along channels; widths count one half.

The halves stay tensors of their own from layer to layer, so that each is dense where a layer reads one alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from ...nn.clip import Clip, clip_of, empty, frames_of, memory_format
from ...nn.convolution import convolve
from ...nn.layers import FrameConv, FrameEnlarge, conv_input, in_time
from ...nn.norm import Activation, RMSNorm, summed
from ...nn.operators import attention
from ...nn.region import ENLARGE, HALVE_RIGHT, NEIGHBOURS, POINT
from ...nn.steps import Context, Layer, Streaming

DILATIONS = (3, 6, 9, 12)
TemporalConv = Literal["grouped-causal", "causal"]


@dataclass(frozen=True, kw_only=True)
class IVParts:
    """What the published network is made of, so that its ablation can be trained; the default is that network.

    temporal_conv: whether the frames of a group see each other ("grouped-causal"), or each frame itself and two before.
    branches: 2 for a half for the keyframes and one for the others; 1 for one branch of twice the width.
    motion_perception: parallel atrous convolutions in the encoder's head, and attention beyond the middle's.
    """

    temporal_conv: TemporalConv = "grouped-causal"
    branches: Literal[1, 2] = 2
    motion_perception: bool = True


PUBLISHED = IVParts()


def halved(first: Tensor | None, second: Clip, at: Context) -> Clip:
    """A clip of a first half and of a second one, which is all where there is no first."""
    if first is None:
        return second
    if at.plain:
        return Clip([torch.cat((first, second.tensor()), dim=1)])
    width = first.shape[1]
    return Clip((first, *second.tensors), ((0, 0), *((width + c, t) for c, t in second.places)))


class GroupedCausalConv3d(Streaming):
    """3x3x3 over one group: in front the last frame this layer saw before, after it a zero frame; zeros around.

    The first frame of a video is a group of its own and has itself in front.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_out, width_in, 3, 3, 3))
        self.bias = nn.Parameter(torch.zeros(width_out))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def later(self, x: Tensor, padding: tuple[int, int], at: Context) -> Clip:
        """What the frames of (b, width_in, 1 + t, h, w) but the first give."""
        space, t = (0, *padding), x.shape[2] - 1
        # the zero frame after the last adds nothing to it
        front = at.kernel(self, "front", lambda: self.weight[:, :, :2])
        runs = [(t - 1, convolve(x[:, :, -2:], front, self.bias, padding=space, plain=at.plain))]
        if t > 1:
            runs.insert(0, (0, convolve(x, self.weight, self.bias, padding=space, plain=at.plain)))
        return in_time(runs, at)


class CausalConv3d(Streaming):
    """3x3x3 with the two frames before in front, in whatever groups they come; zeros around.

    The first frame of a video is repeated in front of itself. For the ablation.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.causal = nn.Conv3d(width_in, width_out, 3)

    def run(self, x: Tensor, at: Context) -> Tensor:
        """(b, width_in, t, h, w), without padding, to what its frames give."""
        front = at.memory.get(self.slot, x.device)
        x = torch.cat((x[:, :, :1].expand(-1, -1, 2, -1, -1) if front is None else front, x), dim=2)
        at.memory.put(self.slot, x[:, :, -2:].clone())
        x, _, own = conv_input(Clip([x]), at, None, NEIGHBOURS)
        return convolve(x, self.causal.weight, self.causal.bias, padding=(0, *own), plain=at.plain)


class SeparatedConv(Layer):
    """Two kernels that both read all channels: `conv_2d` writes the first half, frame by frame, `conv_3d` the second.

    `width_out` counts one half; with one branch there is only `conv_3d`, of twice the width. With `kernel` 1 neither
    carries anything from frame to frame.
    """

    def __init__(self, width_in: int, width_out: int, *, kernel: int, parts: IVParts) -> None:
        super().__init__()
        self.conv_2d = FrameConv(width_in, width_out, kernel) if parts.branches == 2 else None
        width = 2 * width_out // parts.branches
        self.reach = POINT if kernel == 1 else NEIGHBOURS
        if kernel == 1:
            self.conv_3d: nn.Module = nn.Conv3d(width_in, width, 1)
        else:
            self.conv_3d = (CausalConv3d if parts.temporal_conv == "causal" else GroupedCausalConv3d)(width_in, width)

    def forward(self, clip: Clip, at: Context, activation: Activation | None = None) -> Clip:
        """(b, width_in, t, h, w) to (b, 2 width_out, t, h, w)."""
        conv, frames = self.conv_3d, self.conv_2d
        if isinstance(conv, CausalConv3d):
            x = conv_input(clip, at, activation, POINT)[0]
            return halved(None if frames is None else frames(Clip([x]), at).tensor(), Clip([conv.run(x, at)]), at)
        if isinstance(conv, nn.Conv3d):
            weight, bias = self._merged(conv.weight, conv.bias)  # small
            return Clip([convolve(clip.tensor(), weight, bias, plain=at.plain)])
        assert isinstance(conv, GroupedCausalConv3d)
        front = at.memory.get(conv.slot, conv.weight.device)
        x, last, own = conv_input(clip, at, activation, NEIGHBOURS, front=front, keep=True)
        assert last is not None
        at.memory.put(conv.slot, last.clone(memory_format=memory_format(x.device)) if at.plain else last)
        if front is not None:
            first = None if frames is None else frames.frames(x[:, :, 1:], own, plain=at.plain)
            return halved(first, conv.later(x, own, at), at)
        # once in a video, so not kept: one frame deep, since the first frame stands in front of itself
        weight, bias = self._merged(summed(conv.weight, lambda w: w[:, :, :1] + w[:, :, 1:2]), conv.bias)
        return Clip([convolve(x, weight, bias, padding=(0, *own), plain=at.plain)])

    def _merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Both kernels as one that is one frame deep; `weight` is that of the second half."""
        two = self.conv_2d
        if two is None or two.bias is None or bias is None:
            return weight, bias
        return torch.cat((two.weight[:, :, None], weight)), torch.cat((two.bias, bias))


class PixelConv(SeparatedConv):
    """The decoder's last: the first frame of a group by the 2-D kernel, the others by the 3-D one.

    The latter then sees no earlier group. Where there is one branch, all frames are its.
    """

    def __init__(self, width_in: int, *, parts: IVParts) -> None:
        super().__init__(width_in, 3, kernel=3, parts=parts)
        if self.conv_2d is None:
            self.conv_3d = type(self.conv_3d)(width_in, 3)  # type: ignore[call-arg]

    def forward(self, clip: Clip, at: Context, activation: Activation | None = None) -> Clip:
        """(b, width_in, t, h, w) to (b, 3, t, h, w)."""
        conv = self.conv_3d
        if self.conv_2d is None:
            return super().forward(clip, at, activation)
        if at.plain or not isinstance(conv, GroupedCausalConv3d):  # every weight takes part, as trainers expect
            if not at.first and isinstance(conv, GroupedCausalConv3d) and conv.slot not in at.memory:
                x = clip.tensor()  # any frame will do: only the keyframe, which is left out, would see it
                at.memory.put(conv.slot, torch.zeros_like(x[:, :, :1]))
            y = super().forward(clip, at, activation)
            return Clip([torch.cat((y.block(0, 3)[:, :, :1], y.block(3, 3)[:, :, 1:]), dim=2)])
        x, _, own = conv_input(clip, at, activation, NEIGHBOURS)
        keyframe = self.conv_2d.frames(x[:, :, :1], own, plain=at.plain)
        if x.shape[2] == 1:
            return Clip([keyframe])
        others = conv.later(x, own, at)
        return Clip((keyframe, *others.tensors), ((0, 0), *((0, 1 + frame) for _, frame in others.places)))


class HalfAttention(nn.Module):
    """Attention with one head over the positions of each frame, of one half; adds nothing to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width, halves=1, dims=2)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def over_space(self, x: Tensor, at: Context) -> Tensor:
        """(b, width, t, h, w) to the same."""
        y, _, _ = conv_input(Clip([x]), at, Activation(self.norm, silu=False), POINT)
        q, k, v = rearrange(self.to_qkv(frames_of(y)), "n (part c) h w -> part n (h w) c", part=3)
        y = rearrange(attention(q, k, v, plain=at.plain), "n (h w) c -> n c h w", h=x.shape[-2])
        return clip_of(self.proj(y), x.shape[0])


class AttentionBlock(Layer):
    """One attention per half, or one over both where there is one branch, plus the input."""

    whole = True

    def __init__(self, width: int, *, branches: int = 2) -> None:
        super().__init__()
        self.attention_2d = HalfAttention(width) if branches == 2 else None
        self.attention_3d = HalfAttention(2 * width // branches)

    def forward(self, clip: Clip, at: Context, activation: Activation | None = None) -> Clip:
        x = clip.tensor()
        halves = [attention for attention in (self.attention_2d, self.attention_3d) if attention is not None]
        own = zip(halves, x.chunk(len(halves), dim=1), strict=True)
        return Clip([x + torch.cat([attention.over_space(half, at) for attention, half in own], dim=1)])


def halves_of(clip: Clip, branches: int) -> tuple[Tensor, Tensor]:
    """Both halves of a clip, or twice all of it where there is one branch."""
    width = clip.shape[1] // branches
    return clip.block(0, width), clip.block((branches - 1) * width, width)


class Downsample(Layer):
    """Space / 2 by a strided convolution per half; then, with `halve_time`, time / 2 except for the first frame.

    `width` counts one half. In time the 2-D half keeps every other frame, the 3-D half merges pairs by `time_conv`.
    """

    reach = HALVE_RIGHT

    def __init__(self, width: int, *, halve_time: bool, branches: int = 2) -> None:
        super().__init__()
        self.branches = branches
        width = 2 * width // branches
        self.conv_2d = FrameConv(width, width, reach=HALVE_RIGHT, stride=2) if branches == 2 else None
        self.conv_3d = FrameConv(width, width, reach=HALVE_RIGHT, stride=2)
        self.time_conv = nn.Conv3d(width, width, (2, 1, 1), stride=(2, 1, 1)) if halve_time else None

    def forward(self, clip: Clip, at: Context, activation: Activation | None = None) -> Clip:
        """(b, 2 width, t, h, w) to (b, 2 width, t or t / 2, h / 2, w / 2)."""
        first, second = halves_of(clip, self.branches)
        merge = None if second.shape[2] == 1 else self.time_conv
        y = self.conv_3d(Clip([second]), at)
        if merge is not None:
            y = Clip([convolve(y.tensor(), merge.weight, merge.bias, stride=(2, 1, 1), plain=at.plain)])
        if self.conv_2d is None:
            return y
        return halved(self.conv_2d(Clip([first if merge is None else first[:, :, ::2]]), at).tensor(), y, at)


class Upsample(Layer):
    """With `double_time`, time x2 except for the first frame; then space x2 with half the width out.

    `width` counts one half.
    """

    reach = ENLARGE

    def __init__(self, width: int, *, double_time: bool, branches: int = 2) -> None:
        super().__init__()
        self.branches = branches
        width = 2 * width // branches
        self.conv_2d = FrameEnlarge(width, width // 2) if branches == 2 else None
        self.conv_3d = FrameEnlarge(width, width // 2)
        self.time_conv = nn.Conv3d(width, 2 * width, 1) if double_time else None

    def forward(self, clip: Clip, at: Context, activation: Activation | None = None) -> Clip:
        """(b, 2 width, t, h, w) to (b, width, t or 2t, 2h, 2w)."""
        first, second = halves_of(clip, self.branches)
        doubled = None if at.first else self.time_conv
        if doubled is not None:
            pairs = convolve(second, doubled.weight, doubled.bias, plain=at.plain)  # channels are (2, c)
            earlier, later = pairs.chunk(2, dim=1)
            second = interleaved(earlier, later, at)
        y = self.conv_3d(Clip([second]), at)
        if self.conv_2d is None:
            return y
        first = self.conv_2d(Clip([first]), at).tensor()  # once for both frames of a pair
        return halved(first if doubled is None else interleaved(first, first, at), y, at)


def interleaved(first: Tensor, second: Tensor, at: Context) -> Tensor:
    """The frames of both in turn: (b, c, t, h, w) each to (b, c, 2t, h, w)."""
    if at.plain:
        return torch.stack((first, second), dim=3).flatten(2, 3)
    b, c, t, h, w = first.shape
    out = empty((b, c, 2 * t, h, w), first)
    out[:, :, ::2].copy_(first)
    out[:, :, 1::2].copy_(second)
    return out


class ParallelAtrousConv(Layer):
    """1x1, 3x3 and dilated 3x3 convolutions side by side, merged by a 1x1: the motion perception of the encoder's head.

    `width_in` and `width_out` count both halves.
    """

    def __init__(self, width_in: int, width_out: int, *, halves: int = 2) -> None:
        super().__init__()
        self.halves = halves
        self.branches = nn.ModuleList([nn.Conv2d(width_in, width_out, 1), nn.Conv2d(width_in, width_out, 3, padding=1)])
        self.branches.extend(nn.Conv2d(width_in, width_out, 3, padding=d, dilation=d) for d in DILATIONS)
        self.merge = nn.Conv2d(len(self.branches) * width_out, width_out, 1)

    def forward(self, clip: Clip, at: Context, activation: Activation | None = None) -> Clip:
        """(b, width_in, t, h, w) to (b, width_out, t, h, w), of whole frames."""
        x, _, _ = conv_input(clip, at, activation, POINT)
        outputs = [branch(frames_of(x)) for branch in self.branches]
        halves = [y.chunk(self.halves, dim=1) for y in outputs]
        merged = self.merge(torch.cat([half for same_half in zip(*halves, strict=True) for half in same_half], dim=1))
        return Clip([clip_of(merged, x.shape[0])])
