"""IV-VAE: keyframe temporal compression with grouped causal convolutions.

Source: "Improved Video VAE for Latent Video Diffusion Model" (Wu et al., 2024). A chunk is one group: the first frame
alone, then four frames at a time (one latent each). What passes from group to group lies in the `Memory` of the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...nn.clip import Clip
from ...nn.layers import FrameConv
from ...nn.norm import Activation, RMSNorm
from ...nn.steps import Context, Layer, ResidualBlock, Step, steps_of
from ..family import Direction, Network
from .layers import (
    PUBLISHED,
    AttentionBlock,
    Downsample,
    IVParts,
    ParallelAtrousConv,
    PixelConv,
    SeparatedConv,
    Upsample,
)


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


def block(width_in: int, width: int, parts: IVParts, *, two_d: bool = False) -> ResidualBlock:
    """A residual block; `two_d` for the purely 2-D ones, among attention, which run whole. Widths count one half."""

    def conv(width_in: int) -> Layer:
        if two_d:
            return FrameConv(2 * width_in, 2 * width)
        return SeparatedConv(2 * width_in, width, kernel=3, parts=parts)

    first, second = (RMSNorm(2 * w, halves=parts.branches, dims=3) for w in (width_in, width))
    convolutions = conv(width_in), conv(width)
    shortcut = None if width_in == width else SeparatedConv(2 * width_in, width, kernel=1, parts=parts)
    return ResidualBlock((first, second), convolutions, shortcut, whole=two_d)


class ToMoments(SeparatedConv):
    """A 1x1 separated convolution, whose output is put in the order (mean, logvar)."""

    def forward(self, clip: Clip, at: Context, activation: Activation | None = None) -> Clip:
        """(b, 2z, t, h, w) to the same."""
        y = super().forward(clip, at, activation).tensor()
        if self.conv_2d is None:
            return Clip([y])
        a, b, c, d = y.chunk(4, dim=1)
        return Clip([torch.cat((a, c, b, d), dim=1)])


def attention(dim: int, parts: IVParts) -> list[nn.Module]:
    """That beyond the middle's, if there is any."""
    return [AttentionBlock(4 * dim, branches=parts.branches)] if parts.motion_perception else []


def coarse_stages(count: int, dim: int, parts: IVParts) -> Iterator[nn.Module]:
    """Purely 2-D blocks at latent resolution, with attention after each."""
    for _ in range(count):
        yield block(4 * dim, 4 * dim, parts, two_d=True)
        yield from attention(dim, parts)


def middle(dim: int, parts: IVParts) -> nn.ModuleList:
    """Residual block, attention, residual block, at latent resolution."""
    blocks = [block(4 * dim, 4 * dim, parts, two_d=True) for _ in range(2)]
    return nn.ModuleList([blocks[0], AttentionBlock(4 * dim, branches=parts.branches), blocks[1]])


class Encoder(nn.Module):
    def __init__(self, config: IVVAEConfig) -> None:
        super().__init__()
        dim, parts = config.dim, config.parts
        self.conv_in = SeparatedConv(3, dim, kernel=3, parts=parts)
        self.stages = nn.ModuleList()
        for width_in, width, halve_time in ((dim, dim, False), (dim, 2 * dim, True), (2 * dim, 4 * dim, True)):
            self.stages.extend((block(width_in, width, parts), block(width, width, parts)))
            self.stages.append(Downsample(width, halve_time=halve_time, branches=parts.branches))
        self.stages.extend(attention(dim, parts))
        self.stages.extend(coarse_stages(2, dim, parts))
        self.middle = middle(dim, parts)
        self.norm_out = RMSNorm(8 * dim, halves=parts.branches, dims=3)
        width_out = 2 * config.latent_channels
        if parts.motion_perception:
            self.pac: Layer = ParallelAtrousConv(8 * dim, width_out, halves=parts.branches)
        else:
            self.pac = FrameConv(8 * dim, width_out)

    def steps(self) -> list[Step]:
        """(b, 3, 1 or 4, h, w) to (b, 2z, 1, h/8, w/8)."""
        return [
            *steps_of((self.conv_in, *self.stages, *self.middle)),
            Step(layer=self.pac, norm=self.norm_out, whole=True),
        ]


class Decoder(nn.Module):
    def __init__(self, config: IVVAEConfig) -> None:
        super().__init__()
        dim, parts = config.dim, config.parts
        self.conv_in = FrameConv(config.latent_channels, 8 * dim)
        self.middle = middle(dim, parts)
        self.stages = nn.ModuleList(coarse_stages(3, dim, parts))
        self.stages.append(Upsample(4 * dim, double_time=True, branches=parts.branches))
        for width_in, width, double_time in ((2 * dim, 4 * dim, True), (2 * dim, 2 * dim, False)):
            self.stages.append(block(width_in, width, parts))
            self.stages.extend(block(width, width, parts) for _ in range(2))
            self.stages.append(Upsample(width, double_time=double_time, branches=parts.branches))
        self.stages.extend(block(dim, dim, parts) for _ in range(3))
        self.norm_out = RMSNorm(2 * dim, halves=parts.branches, dims=3)
        self.conv_out = PixelConv(2 * dim, parts=parts)

    def steps(self) -> list[Step]:
        """(b, z, 1, h, w) to (b, 3, 1 or 4, 8h, 8w): one frame for the first latent, four for a later one."""
        return [
            Step(layer=self.conv_in, whole=True),
            *steps_of((*self.middle, *self.stages)),
            Step(layer=self.conv_out, norm=self.norm_out),
        ]


class IVVAE(Network):
    """Encoder and decoder of one group."""

    def __init__(self, config: IVVAEConfig, halves: Sequence[Direction] = ("encode", "decode")) -> None:
        super().__init__()
        z = config.latent_channels
        self.config = config
        self.encoder = Encoder(config) if "encode" in halves else None
        self.decoder = Decoder(config) if "decode" in halves else None
        if "encode" in halves:
            self.to_moments = ToMoments(2 * z, z, kernel=1, parts=config.parts)
        if "decode" in halves:
            self.from_latent = SeparatedConv(z, z // 2, kernel=1, parts=config.parts)

    def way(self, direction: Direction) -> tuple[Step, ...]:
        steps = super().way(direction)
        if direction == "encode":
            return (*steps, Step(layer=self.to_moments, whole=True))
        return (Step(layer=self.from_latent, whole=True), *steps)
