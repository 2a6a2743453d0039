"""IV-VAE (family `iv-vae`): keyframe temporal compression with grouped causal convolutions.

Source: "Improved Video VAE for Latent Video Diffusion Model" (Wu et al., 2024). Every feature map is
[2-D half | 3-D half] along channels; widths below count one half. One call handles one group: the first frame alone,
then four frames at a time (one latent each). What passes from group to group lives in a `Memory` of the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .iv_layers import (
    PUBLISHED,
    AblatedConv,
    GroupedCausalConv3d,
    IVParts,
    ResidualBlock,
    RMSNorm,
    separated_conv,
)
from .layers import (
    builds_graph,
    clip_of,
    concatenated,
    enlarging_kernel,
    forget_prepared,
    frames_of,
    parts_to_frames,
    per_frame,
    prepared,
    single_head_attention,
)
from .memory import Memory, StreamingLayer, name_slots, run_block

GROUP = 4  # frames of every group but the first, which is one frame
DILATIONS = (3, 6, 9, 12)
ENCODER_FINE = 9  # stages of the encoder down to latent resolution


@dataclass(frozen=True, kw_only=True)
class IVVAEConfig:
    """What the weights need, and the scaling that belongs to them.

    dim: width of one half at the finest level; the four levels have dim, 2 dim, 4 dim, 4 dim.
    latent_channels: z, an even number.
    scale_factor, shift_factor: latent = scale_factor * (mean - shift_factor).
    parts: other than the published ones only for ablations.
    """

    dim: int
    latent_channels: int
    scale_factor: float
    shift_factor: float
    parts: IVParts = PUBLISHED

    def __post_init__(self) -> None:
        if self.dim < 1 or self.latent_channels < 2 or self.latent_channels % 2:
            raise ValueError(
                f"IV-VAE needs dim of at least 1 and an even number of latent channels; got dim={self.dim}, "
                f"latent_channels={self.latent_channels}. Published: dim 64 or 96 with 4, 8 or 16 channels."
            )
        if not (math.isfinite(self.scale_factor) and math.isfinite(self.shift_factor)) or self.scale_factor == 0:
            raise ValueError(
                f"IV-VAE needs a finite, nonzero scale_factor and a finite shift_factor; got {self.scale_factor} "
                f"and {self.shift_factor}."
            )


class FrameAttention(nn.Module):
    """Attention over the positions of each frame, of one half; adds nothing to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width, halves=1, dims=2)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, h, w) to the same."""
        q, k, v = rearrange(self.to_qkv(self.norm(x)), "n (part c) h w -> part n (h w) c", part=3)
        y = rearrange(single_head_attention(q, k, v), "n (h w) c -> n c h w", h=x.shape[-2])
        return self.proj(y)


class AttentionBlock(nn.Module):
    """One attention per half, or one over both where there is one branch, plus the input."""

    def __init__(self, width: int, *, branches: int = 2) -> None:
        super().__init__()
        self.attention_2d = FrameAttention(width) if branches == 2 else None
        self.attention_3d = FrameAttention(2 * width // branches)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        if self.attention_2d is None:
            return x + per_frame(self.attention_3d, x)
        first, second = x.chunk(2, dim=1)
        return x + torch.cat((per_frame(self.attention_2d, first), per_frame(self.attention_3d, second)), dim=1)


class Downsample(nn.Module):
    """Space / 2 by a strided convolution per half; then, with `halve_time`, time / 2 except for the first frame.

    In time the 2-D half keeps every other frame, the 3-D half merges pairs by `time_conv`.
    """

    def __init__(self, width: int, *, halve_time: bool, branches: int = 2) -> None:
        super().__init__()
        self.conv_2d = nn.Conv2d(width, width, 3, stride=2) if branches == 2 else None
        width = 2 * width // branches
        self.conv_3d = nn.Conv2d(width, width, 3, stride=2)
        self.time_conv = nn.Conv3d(width, width, (2, 1, 1), stride=(2, 1, 1)) if halve_time else None

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """(b, 2 width, t, h, w) to (b, 2 width, t or t / 2, h / 2, w / 2)."""
        x = F.pad(x, (0, 1, 0, 1))
        if self.conv_2d is None:
            y = per_frame(self.conv_3d, x)
            return y if self.time_conv is None or x.shape[2] == 1 else self.time_conv(y)
        if self.time_conv is None or x.shape[2] == 1:
            y = F.conv2d(
                frames_of(x), *_side_by_side(self, self.conv_2d, self.conv_3d, enlarging=False), stride=2, groups=2
            )
            return clip_of(y, x.shape[0])
        first, second = x.chunk(2, dim=1)
        first = per_frame(self.conv_2d, first[:, :, ::2])
        return torch.cat((first, self.time_conv(per_frame(self.conv_3d, second))), dim=1)


class Upsample(nn.Module):
    """With `double_time`, time x2 except for the first frame; then space x2 with half the width out."""

    def __init__(self, width: int, *, double_time: bool, branches: int = 2) -> None:
        super().__init__()
        self.conv_2d = nn.Conv2d(width, width // 2, 3, padding=1) if branches == 2 else None
        width = 2 * width // branches
        self.conv_3d = nn.Conv2d(width, width // 2, 3, padding=1)
        self.time_conv = nn.Conv3d(width, 2 * width, 1) if double_time else None

    def forward(self, x: Tensor, memory: Memory, *, first_group: bool) -> Tensor:
        """(b, 2 width, t, h, w) to (b, width, t or 2t, 2h, 2w)."""
        if self.conv_2d is None:
            if self.time_conv is not None and not first_group:
                x = parts_to_frames(self.time_conv(x), 2)
            return _enlarged(x, _enlarging(self.conv_3d), self.conv_3d.bias)
        if self.time_conv is None or first_group:
            return _enlarged(x, *_side_by_side(self, self.conv_2d, self.conv_3d, enlarging=True), groups=2)
        first, second = x.chunk(2, dim=1)
        first = _enlarged(first, _enlarging(self.conv_2d), self.conv_2d.bias)  # once for both frames of a pair
        second = _enlarged(parts_to_frames(self.time_conv(second), 2), _enlarging(self.conv_3d), self.conv_3d.bias)
        return torch.cat((first.repeat_interleave(2, dim=2), second), dim=1)


def _side_by_side(layer: nn.Module, first: nn.Conv2d, second: nn.Conv2d, *, enlarging: bool) -> tuple[Tensor, Tensor]:
    """Weight and bias of one convolution in two groups that does what the two do to their halves."""
    assert first.bias is not None
    assert second.bias is not None
    make = _enlarging_groups if enlarging else concatenated
    return (
        prepared(layer, "weight", (first.weight, second.weight), make),
        prepared(layer, "bias", (first.bias, second.bias), concatenated),
    )


def _enlarging(conv: nn.Conv2d) -> Tensor:
    return prepared(conv, "enlarging", (conv.weight,), enlarging_kernel)


def _enlarging_groups(*weights: Tensor) -> Tensor:
    return torch.cat([enlarging_kernel(weight) for weight in weights])


def _enlarged(x: Tensor, kernel: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
    """Nearest x2 in space and a 3x3 convolution, as a transposed convolution."""
    y = F.conv_transpose2d(frames_of(x), kernel, bias, stride=2, padding=1, groups=groups)
    return clip_of(y, x.shape[0])


class ParallelAtrousConv(nn.Module):
    """1x1, 3x3 and dilated 3x3 convolutions side by side, merged by a 1x1: the motion perception of the encoder's head.

    `width_in` and `width_out` count both halves.
    """

    def __init__(self, width_in: int, width_out: int, *, halves: int = 2) -> None:
        super().__init__()
        self.halves = halves
        self.branches = nn.ModuleList([nn.Conv2d(width_in, width_out, 1), nn.Conv2d(width_in, width_out, 3, padding=1)])
        self.branches.extend(nn.Conv2d(width_in, width_out, 3, padding=d, dilation=d) for d in DILATIONS)
        self.merge = nn.Conv2d(len(self.branches) * width_out, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, width_in, h, w) to (n, width_out, h, w)."""
        outputs = [branch(x) for branch in self.branches]
        halves = [y.chunk(self.halves, dim=1) for y in outputs]
        return self.merge(torch.cat([half for same_half in zip(*halves, strict=True) for half in same_half], dim=1))


class Encoder(nn.Module):
    def __init__(self, config: IVVAEConfig) -> None:
        super().__init__()
        dim, parts = config.dim, config.parts

        def block(width_in: int, width: int, *, two_d: bool = False) -> ResidualBlock:
            return ResidualBlock(width_in, width, two_d=two_d, parts=parts)

        def attention() -> AttentionBlock:
            return AttentionBlock(4 * dim, branches=parts.branches)

        self.conv_in = separated_conv(3, dim, kernel=3, parts=parts)
        self.stages = nn.ModuleList()
        for width_in, width, halve_time in ((dim, dim, False), (dim, 2 * dim, True), (2 * dim, 4 * dim, True)):
            self.stages.extend((block(width_in, width), block(width, width)))
            self.stages.append(Downsample(width, halve_time=halve_time, branches=parts.branches))
        if parts.motion_perception:
            self.stages.append(attention())
        for _ in range(2):
            self.stages.append(block(4 * dim, 4 * dim, two_d=True))
            if parts.motion_perception:
                self.stages.append(attention())
        self.middle = nn.ModuleList(
            [block(4 * dim, 4 * dim, two_d=True), attention(), block(4 * dim, 4 * dim, two_d=True)]
        )
        self.norm_out = RMSNorm(8 * dim, halves=parts.branches, dims=3)
        width_out = 2 * config.latent_channels
        if parts.motion_perception:
            self.pac: nn.Module = ParallelAtrousConv(8 * dim, width_out, halves=parts.branches)
        else:
            self.pac = nn.Conv2d(8 * dim, width_out, 3, padding=1)

    @property
    def fine_layers(self) -> list[nn.Module]:
        """The layers that see no more than their neighbourhood, in order."""
        return [self.conv_in, *self.stages[:ENCODER_FINE]]

    def fine_layer(self, i: int, x: Tensor, memory: Memory, *, checkpointing: bool = False) -> Tensor:
        """The i-th layer of the convolutions down to latent resolution: (b, 3, t, h, w) to (b, 8 dim, 1, h/8, w/8)."""
        return run_block(self.fine_layers[i], x, memory, checkpointing=checkpointing and i > 0)

    def coarse(self, x: Tensor, memory: Memory, *, checkpointing: bool = False) -> Tensor:
        """The rest, attention included: (b, 8 dim, 1, h, w) to (b, 2z, 1, h, w)."""
        for block in (*self.stages[ENCODER_FINE:], *self.middle):
            x = run_block(block, x, memory, checkpointing=checkpointing)
        return per_frame(self.pac, self.norm_out.activated(x))

    def forward(self, x: Tensor, memory: Memory, *, checkpointing: bool = False) -> Tensor:
        """(b, 3, 1 or 4, h, w) to (b, 2z, 1, h/8, w/8)."""
        for i in range(len(self.fine_layers)):
            x = self.fine_layer(i, x, memory, checkpointing=checkpointing)
        return self.coarse(x, memory, checkpointing=checkpointing)


class Decoder(nn.Module):
    def __init__(self, config: IVVAEConfig) -> None:
        super().__init__()
        dim, parts = config.dim, config.parts

        def block(width_in: int, width: int, *, two_d: bool = False) -> ResidualBlock:
            return ResidualBlock(width_in, width, two_d=two_d, parts=parts)

        def attention() -> AttentionBlock:
            return AttentionBlock(4 * dim, branches=parts.branches)

        self.conv_in = nn.Conv2d(config.latent_channels, 8 * dim, 3, padding=1)
        self.middle = nn.ModuleList(
            [block(4 * dim, 4 * dim, two_d=True), attention(), block(4 * dim, 4 * dim, two_d=True)]
        )
        self.stages = nn.ModuleList()
        for _ in range(3):
            self.stages.append(block(4 * dim, 4 * dim, two_d=True))
            if parts.motion_perception:
                self.stages.append(attention())
        self.coarse_stages = len(self.stages)
        self.stages.append(Upsample(4 * dim, double_time=True, branches=parts.branches))
        for width_in, width, double_time in ((2 * dim, 4 * dim, True), (2 * dim, 2 * dim, False)):
            self.stages.extend((block(width_in, width), block(width, width), block(width, width)))
            self.stages.append(Upsample(width, double_time=double_time, branches=parts.branches))
        self.stages.extend(block(dim, dim) for _ in range(3))
        self.norm_out = RMSNorm(2 * dim, halves=parts.branches, dims=3)
        if parts.branches == 2:
            self.conv_out = separated_conv(2 * dim, 3, kernel=3, parts=parts)
        else:
            self.conv_out = AblatedConv(2 * dim, 3, kernel=3, parts=parts)

    @property
    def fine_layers(self) -> list[nn.Module]:
        """The layers that see no more than their neighbourhood, in order."""
        return [*self.stages[self.coarse_stages :], self.conv_out]

    def coarse(self, z: Tensor, memory: Memory, *, checkpointing: bool = False) -> Tensor:
        """Everything up to the last attention, at latent resolution: (b, z, 1, h, w) to (b, 8 dim, 1, h, w)."""
        x = per_frame(self.conv_in, z)
        for block in (*self.middle, *self.stages[: self.coarse_stages]):
            x = run_block(block, x, memory, checkpointing=checkpointing)
        return x

    def fine_layer(self, i: int, x: Tensor, memory: Memory, *, checkpointing: bool = False) -> Tensor:
        """The i-th layer of the rest, only convolutions: (b, 8 dim, 1, h, w) to (b, 3, 1 or 4, 8h, 8w)."""
        block = self.fine_layers[i]
        if isinstance(block, Upsample):
            last = cast("StreamingLayer", self.conv_out.conv_3d)
            return block(x, memory, first_group=last.slot not in memory)
        if block is not self.conv_out:
            return run_block(block, x, memory, checkpointing=checkpointing)
        return self._pixels(self.norm_out.activated(x), memory)

    def _pixels(self, x: Tensor, memory: Memory) -> Tensor:
        """The first frame of a group by the 2-D kernel, the others by the 3-D one, which sees no earlier group.

        Where there is one branch, all of them are its."""
        conv = self.conv_out
        if conv.conv_2d is None:
            return conv(x, memory)
        if isinstance(conv, AblatedConv) or builds_graph(x, conv):  # every weight takes part, as trainers expect
            keyframe, others = conv(x, memory).chunk(2, dim=1)
            return torch.cat((keyframe[:, :, :1], others[:, :, 1:]), dim=2)
        conv_3d = cast("GroupedCausalConv3d", conv.conv_3d)
        b, _, _, h, w = x.shape
        memory.put(conv_3d.slot, x.new_empty(b, 0, 1, h, w))  # only to say that the first group is over
        keyframe = per_frame(conv.conv_2d, x[:, :, :1])
        others = conv_3d.pieces(x) if x.shape[2] > 1 else []
        return torch.cat((keyframe, *(piece.x for piece in others)), dim=2)

    def forward(self, z: Tensor, memory: Memory, *, checkpointing: bool = False) -> Tensor:
        """(b, z, 1, h, w) to (b, 3, 1 or 4, 8h, 8w): one frame for the first latent, four for a later one."""
        x = self.coarse(z, memory, checkpointing=checkpointing)
        for i in range(len(self.fine_layers)):
            x = self.fine_layer(i, x, memory, checkpointing=checkpointing)
        return x


class IVVAE(nn.Module):
    """Encoder and decoder of one group; differentiable, and free of state but for the caller's `Memory`."""

    def __init__(self, config: IVVAEConfig) -> None:
        super().__init__()
        z = config.latent_channels
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.to_moments = separated_conv(2 * z, z, kernel=1, parts=config.parts)
        self.from_latent = separated_conv(z, z // 2, kernel=1, parts=config.parts)
        name_slots(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IVVAE:
        forget_prepared(self)
        return super()._apply(fn, recurse)

    def encode(self, group: Tensor, memory: Memory, *, checkpointing: bool = False) -> tuple[Tensor, Tensor]:
        """Moments of the next group of a video.

        group: (b, 3, t, h, w) in [-1, 1], t = 1 for the first group that `memory` sees, else 4; h and w multiples
        of 8. With `checkpointing`, activations of the blocks are computed again in the backward pass instead of kept.
        Returns (mean, logvar), each (b, z, 1, h/8, w/8), unscaled, logvar not clamped.
        """
        return self.moments_of(self.encoder(group, memory, checkpointing=checkpointing), memory)

    def moments_of(self, x: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """(mean, logvar) of what the encoder gave, (b, 2z, 1, h, w)."""
        y = self.to_moments(x, memory)
        if self.config.parts.branches == 1:
            mean, logvar = y.chunk(2, dim=1)
            return mean, logvar
        a, b, c, d = y.chunk(4, dim=1)
        return torch.cat((a, c), dim=1), torch.cat((b, d), dim=1)

    def decode(self, latent: Tensor, memory: Memory, *, checkpointing: bool = False) -> Tensor:
        """Frames of the next latent of a video: (b, z, 1, h, w), unscaled, to (b, 3, t, 8h, 8w), nominally in [-1, 1].

        t is 1 for the first latent that `memory` sees, else 4.
        """
        return self.decoder(self.from_latent(latent, memory), memory, checkpointing=checkpointing)

    def forward(self, video: Tensor) -> Tensor:
        """Reconstruction of (b, 3, 1 + 4n, h, w) through the posterior mean, group by group; for short clips."""
        encoder_memory, decoder_memory = Memory(), Memory()
        starts = (0, *range(1, video.shape[2], GROUP))
        groups = (video[:, :, start : start + GROUP if start else 1] for start in starts)
        means = (self.encode(group, encoder_memory)[0] for group in groups)
        return torch.cat([self.decode(mean, decoder_memory) for mean in means], dim=2)
