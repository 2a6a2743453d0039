"""The convolutions of IV-VAE, and its residual block, run with few copies.

A norm writes straight into the input of the convolution behind it, next to the frame remembered from the group before.
What a convolution gives stays in pieces, one or more per half, until the next norm or the residual sum writes it where
it belongs. Where such an input would be large, the block runs in strips of rows instead, with the same result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv_input import Piece, neighbouring, rms_input
from .fused_norm import rms_norm_silu
from .layers import add, builds_graph, clip_of, concatenated, convolve, frames_of, new_clip, per_frame, prepared
from .memory import Memory, StreamingLayer
from .regions import split

STRIPS_ABOVE = 640 * 2**20  # bytes of a convolution's input from which on it is made in strips of rows
STRIP_BYTES = 40 * 2**20  # of the input of one strip

TemporalConv = Literal["grouped-causal", "causal"]


@dataclass(frozen=True, kw_only=True)
class IVParts:
    """What the published network is made of, so that its ablation can be trained; the default is that network.

    temporal_conv: whether the frames of a group see each other ("grouped-causal"), or each frame itself and two before.
    branches: 2 for a half for the keyframes beside one for the others; 1 for one branch of twice the width.
    motion_perception: parallel atrous convolutions in the encoder's head, and attention beyond the middle's.
    """

    temporal_conv: TemporalConv = "grouped-causal"
    branches: Literal[1, 2] = 2
    motion_perception: bool = True


PUBLISHED = IVParts()


def write_sum(pieces: list[Piece], x: Tensor, out: Tensor) -> None:
    """Put the pieces together in (b, 2c, t, h, w), with `x` of that shape added."""
    for piece in pieces:
        torch.add(piece.x, piece.of(x), out=piece.of(out))


def _front_taps(weight: Tensor) -> Tensor:
    return weight[:, :, :2].contiguous()


def _first_two_taps(weight: Tensor) -> Tensor:
    return weight[:, :, :1] + weight[:, :, 1:2]


class RMSNorm(nn.Module):
    """L2-normalise `halves` equal parts of the channels at every position, times sqrt(part width), times gamma."""

    def __init__(self, width: int, *, halves: int, dims: int) -> None:
        super().__init__()
        self.halves = halves
        self.scale = math.sqrt(width // halves)
        self.gamma = nn.Parameter(torch.ones(width, *(1,) * dims))

    def forward(self, x: Tensor) -> Tensor:
        """(b, width, ...) to the same."""
        return rms_norm_silu(x, self.gain, halves=self.halves, silu=False)

    def activated(self, x: Tensor) -> Tensor:
        """The norm and then SiLU."""
        if x.ndim < 5 or self.halves != 2 or builds_graph(x, self):
            return rms_norm_silu(x, self.gain, halves=self.halves, silu=True)
        return rms_input([Piece(None, 0, x)], self.gain)

    @property
    def gain(self) -> Tensor:
        return (self.scale * self.gamma.to(torch.promote_types(self.gamma.dtype, torch.float32))).flatten()


class GroupedCausalConv3d(StreamingLayer):
    """3x3x3 over one group: in front the last frame this layer saw before, behind a zero frame; space padded by zeros.

    The first frame of a video is a group of its own and has itself in front.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_out, width_in, 3, 3, 3))
        self.bias = nn.Parameter(torch.zeros(width_out))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """(b, width_in, t, h, w) to (b, width_out, t, h, w)."""
        front = memory.get(self.slot)
        memory.put(self.slot, x[:, :, -1:].clone())
        if front is None:
            return convolve(x, self.alone(), self.bias, padding=(0, 1, 1))
        return torch.cat([piece.x for piece in self.pieces(torch.cat((front, x), dim=2))], dim=2)

    def alone(self) -> Tensor:
        """The kernel, one frame deep, of the first frame: it would stand in front of itself."""
        return prepared(self, "alone", (self.weight,), _first_two_taps)

    def pieces(self, x: Tensor, *, rows: int = 1) -> list[Piece]:
        """What the frames of (b, width_in, 1 + t, h, w) but the first give; rows: of padding at top and bottom."""
        padding, t = (0, rows, 1), x.shape[2] - 1
        front_taps = prepared(self, "front_taps", (self.weight,), _front_taps)  # a zero frame behind adds nothing
        last = convolve(x[:, :, -2:], front_taps, self.bias, padding=padding)
        if t == 1:
            return [Piece(1, 0, last)]
        return [Piece(1, 0, convolve(x, self.weight, self.bias, padding=padding)), Piece(1, t - 1, last)]


class SeparatedConv(nn.Module):
    """Two kernels that both read all channels: `conv_2d` writes the first half, frame by frame, `conv_3d` the second.

    `width_out` counts one half. With `kernel` 1 neither carries anything from frame to frame.
    """

    def __init__(self, width_in: int, width_out: int, *, kernel: int) -> None:
        super().__init__()
        self.width_in = width_in
        self.conv_2d = nn.Conv2d(width_in, width_out, kernel, padding=kernel // 2)
        if kernel == 1:
            self.conv_3d = nn.Conv3d(width_in, width_out, 1)
        else:
            self.conv_3d = GroupedCausalConv3d(width_in, width_out)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """(b, width_in, t, h, w) to (b, 2 width_out, t, h, w)."""
        if not isinstance(self.conv_3d, GroupedCausalConv3d):
            return convolve(x, *self._merged(self.conv_3d.weight), padding=(0, 0, 0))
        front = memory.get(self.slot)
        memory.put(self.slot, x[:, :, -1:].clone())
        return self.join(self.pieces(x if front is None else torch.cat((front, x), dim=2), first=front is None))

    @property
    def slot(self) -> str:
        """Where the frame in front is remembered."""
        assert isinstance(self.conv_3d, GroupedCausalConv3d)
        return self.conv_3d.slot

    def pieces(self, x: Tensor, *, first: bool, rows: int = 1) -> list[Piece]:
        """Pieces of the output for (b, width_in, 1 + t, h, w) that begins with the frame in front, or for the `first`
        frame of a video alone; rows: of padding at top and bottom."""
        assert isinstance(self.conv_3d, GroupedCausalConv3d)
        if first:  # two kernels of one frame: one convolution
            weight, bias = self._merged(self.conv_3d.alone())
            return [Piece(None, 0, convolve(x, weight, bias, padding=(0, rows, 1)))]
        y = F.conv2d(frames_of(x[:, :, 1:]), self.conv_2d.weight, self.conv_2d.bias, padding=(rows, 1))
        return [Piece(0, 0, clip_of(y, x.shape[0])), *self.conv_3d.pieces(x, rows=rows)]

    def join(self, pieces: list[Piece]) -> Tensor:
        """The pieces as one tensor."""
        if len(pieces) == 1:
            return pieces[0].x
        first, *second = (piece.x for piece in pieces)
        return torch.cat((first, second[0] if len(second) == 1 else torch.cat(second, dim=2)), dim=1)

    def _merged(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Both kernels as one that is one frame deep; `weight` is that of the second half."""
        assert self.conv_3d.bias is not None
        assert self.conv_2d.bias is not None
        return (
            prepared(self, "weight", (self.conv_2d.weight[:, :, None], weight), concatenated),
            prepared(self, "bias", (self.conv_2d.bias, self.conv_3d.bias), concatenated),
        )

    # ------------------------------------------------------------------------------------ behind a norm and SiLU

    def behind(self, norm: RMSNorm, source: list[Piece], memory: Memory) -> list[Piece]:
        """Norm, SiLU and this convolution of a group that comes in pieces, which are let go; no gradients."""
        front = memory.get(self.slot)
        b, _, _, h, w = source[-1].x.shape
        kept = new_clip(source[-1].x, (b, self.width_in, 1, h, w))
        x = rms_input(source, norm.gain, front=front, kept=kept)
        source.clear()
        memory.put(self.slot, kept)
        return self.pieces(x, first=front is None)


class CausalConv3d(StreamingLayer):
    """3x3x3 with the two frames before in front, in whatever groups they come; space padded by zeros.

    The first frame of a video is repeated in front of itself.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.causal = nn.Conv3d(width_in, width_out, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """(b, width_in, t, h, w) to (b, width_out, t, h, w)."""
        front = memory.get(self.slot)
        x = torch.cat((x[:, :, :1].expand(-1, -1, 2, -1, -1) if front is None else front, x), dim=2)
        memory.put(self.slot, x[:, :, -2:].clone())
        return self.causal(x)


class AblatedConv(nn.Module):
    """What stands in for `SeparatedConv` where parts are not the published ones; `width_out` counts all branches."""

    def __init__(self, width_in: int, width_out: int, *, kernel: int, parts: IVParts) -> None:
        super().__init__()
        width = width_out // parts.branches
        self.conv_2d = nn.Conv2d(width_in, width, kernel, padding=kernel // 2) if parts.branches == 2 else None
        if kernel == 1:
            self.conv_3d: nn.Module = nn.Conv3d(width_in, width, 1)
        else:
            self.conv_3d = (CausalConv3d if parts.temporal_conv == "causal" else GroupedCausalConv3d)(width_in, width)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """(b, width_in, t, h, w) to (b, width_out, t, h, w)."""
        y = self.conv_3d(x, memory) if isinstance(self.conv_3d, StreamingLayer) else self.conv_3d(x)
        return y if self.conv_2d is None else torch.cat((per_frame(self.conv_2d, x), y), dim=1)


def separated_conv(
    width_in: int, width: int, *, kernel: int, parts: IVParts = PUBLISHED
) -> SeparatedConv | AblatedConv:
    """The convolution of a stage that sees time. `width_in` counts both halves, `width` one."""
    if parts.temporal_conv == "grouped-causal" and parts.branches == 2:
        return SeparatedConv(width_in, width, kernel=kernel)
    return AblatedConv(width_in, 2 * width, kernel=kernel, parts=parts)


class FrameConv(nn.Module):
    """One 3x3 convolution of full width, frame by frame: the purely 2-D stages."""

    def __init__(self, width_in: int, width_out: int, *, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * width_in, 2 * width_out, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """(b, 2 width_in, t, h, w) to (b, 2 width_out, t, h, w)."""
        return clip_of(self.conv(frames_of(x)), x.shape[0])


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, plus the input; `two_d` for the purely 2-D stages. Widths count one half."""

    def __init__(self, width_in: int, width: int, *, two_d: bool, parts: IVParts = PUBLISHED) -> None:
        super().__init__()
        self.norm1 = RMSNorm(2 * width_in, halves=parts.branches, dims=3)
        self.norm2 = RMSNorm(2 * width, halves=parts.branches, dims=3)
        if two_d:
            self.conv1 = FrameConv(width_in, width, kernel=3)
            self.conv2 = FrameConv(width, width, kernel=3)
        else:
            self.conv1 = separated_conv(2 * width_in, width, kernel=3, parts=parts)
            self.conv2 = separated_conv(2 * width, width, kernel=3, parts=parts)
        self.shortcut = separated_conv(2 * width_in, width, kernel=1, parts=parts) if width_in != width else None

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """(b, 2 width_in, t, h, w) to (b, 2 width, t, h, w)."""
        conv1, conv2 = self.conv1, self.conv2
        if not (isinstance(conv1, SeparatedConv) and isinstance(conv2, SeparatedConv)) or builds_graph(x, self):
            y = self.norm2.activated(conv1(self.norm1.activated(x), memory))
            return add(conv2(y, memory), x if self.shortcut is None else self.shortcut(x, memory))
        if x.nbytes // x.shape[1] * max(conv1.width_in, conv2.width_in) > STRIPS_ABOVE:
            return self._in_strips(x, memory)
        pieces = conv2.behind(self.norm2, conv1.behind(self.norm1, [Piece(None, 0, x)], memory), memory)
        if self.shortcut is None:
            y = new_clip(x, tuple(x.shape))
            write_sum(pieces, x, y)
        else:
            y = self.shortcut(x, memory)
            for piece in pieces:
                piece.of(y).add_(piece.x)
        return y

    def _in_strips(self, x: Tensor, memory: Memory) -> Tensor:
        """The same in strips of rows: the second convolution of a strip runs once the first has given the next one."""
        assert isinstance(self.conv1, SeparatedConv)
        assert isinstance(self.conv2, SeparatedConv)
        b, _, t, h, w = x.shape
        out = new_clip(x, (b, self.conv2.width_in, t, h, w))
        conv1 = _Strips(self.norm1, self.conv1, x, memory)
        conv2 = _Strips(self.norm2, self.conv2, out, memory)
        spans = split((0, h), max(1, STRIP_BYTES // (out.nbytes // h)))
        between: list[list[Piece]] = []

        def finish(i: int) -> None:
            start, stop = spans[i]
            y = conv2.run(neighbouring(between, i), start, stop)
            between[i] = [piece._replace(x=piece.x[..., -1:, :].clone()) for piece in between[i]]  # the next needs it
            rows = x[..., start:stop, :]
            write_sum(y, rows if self.shortcut is None else self.shortcut(rows, memory), out[..., start:stop, :])

        for i, (start, stop) in enumerate(spans):
            between.append(conv1.run([Piece(None, 0, x[..., max(0, start - 1) : stop + 1, :])], start, stop))
            if i:
                finish(i - 1)
        finish(len(spans) - 1)
        conv1.remember()
        conv2.remember()
        return out


class _Strips:
    """A norm, SiLU and a convolution of one group, strip by strip. What it remembers is set once all are done."""

    def __init__(self, norm: RMSNorm, conv: SeparatedConv, like: Tensor, memory: Memory) -> None:
        b, _, _, h, w = like.shape
        self.norm = norm
        self.conv = conv
        self.memory = memory
        self.front = memory.get(conv.slot)
        self.kept = new_clip(like, (b, conv.width_in, 1, h, w))

    def run(self, pieces: list[Piece], start: int, stop: int) -> list[Piece]:
        """What rows `start` to `stop` give; the pieces have one row more on either side, but at the border."""
        height = self.kept.shape[3]
        top, bottom = max(0, start - 1), min(height, stop + 1)
        x = rms_input(
            pieces,
            self.norm.gain,
            front=None if self.front is None else self.front[..., top:bottom, :],
            kept=self.kept[..., start:stop, :],
            rows=stop - start + 2,
            blank=(int(top == start), int(bottom == stop)),
        )
        return self.conv.pieces(x, first=self.front is None, rows=0)

    def remember(self) -> None:
        self.memory.put(self.conv.slot, self.kept)
