"""CV-VAE (families `cv-vae` and `cv-vae-sd3`): a video VAE in the latent space of an image VAE.

Source: "CV-VAE: A Compatible Video VAE for Latent Generative Video Models" (Zhao et al., 2024). One call handles one
chunk of 1 + 4n frames or 1 + n latents; a longer clip is cut into chunks of 16 + 1 frames by the codec.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .conv_input import Piece, group_input
from .fused_norm import group_statistics
from .layers import (
    PaddedConv3d,
    SpacePadding,
    add,
    builds_graph,
    channels_last,
    convolve_in_time,
    forget_prepared,
    join,
    new_clip,
    per_frame,
    phase_kernels,
    prepared,
    single_head_attention,
)
from .memory import run_plain

GROUPS = 32
LEVELS = 4
TIME_LEVELS = (0, 2)  # the encoder halves time after these levels; the decoder doubles it at the same depths


@dataclass(frozen=True, kw_only=True)
class CVVAEConfig:
    """What the weights need.

    widths: channels of the four levels, finest first, each a multiple of 32.
    blocks_per_level: residual blocks of an encoder level; the decoder has one more.
    latent_channels: z.
    sd3: the SD3 family pads by replication everywhere, has norm eps 1e-6 and no attention over time.
    """

    widths: tuple[int, ...]
    blocks_per_level: int
    latent_channels: int
    sd3: bool

    def __post_init__(self) -> None:
        if len(self.widths) != LEVELS or any(width < GROUPS or width % GROUPS for width in self.widths):
            raise ValueError(
                f"CV-VAE needs {LEVELS} level widths that are multiples of {GROUPS} (its GroupNorm has {GROUPS} "
                f"groups); got {self.widths}. Choose widths such as (128, 256, 512, 512)."
            )
        if self.blocks_per_level < 1 or self.latent_channels < 1:
            raise ValueError(
                f"CV-VAE needs at least one block per level and one latent channel; got blocks_per_level="
                f"{self.blocks_per_level}, latent_channels={self.latent_channels}."
            )

    @property
    def norm_eps(self) -> float:
        return 1e-6 if self.sd3 else 1e-5

    @property
    def space_padding(self) -> SpacePadding:
        return "replicate" if self.sd3 else "zeros"


def _norm(width: int, config: CVVAEConfig) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, width, eps=config.norm_eps)


def activated(pieces: list[tuple[int, Tensor]], norm: nn.GroupNorm) -> Tensor:
    """Norm and SiLU of a clip in pieces, (first frame, frames) in order; they are let go."""
    if any(builds_graph(x, norm) for _, x in pieces):
        return F.silu(norm(torch.cat([x for _, x in pieces], dim=2)))
    statistics = Statistics.of([x for _, x in pieces])
    y = statistics.input([Piece(None, start, x) for start, x in pieces], norm)
    pieces.clear()
    return y


class Statistics:
    """Mean and variance of every norm group of every batch row, pooled over parts in float32 or better."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.empty(0)  # b groups
        self.variance = torch.empty(0)  # b groups

    @classmethod
    def of(cls, parts: Iterable[Tensor]) -> Statistics:
        statistics = cls()
        for x in parts:
            statistics.add(x)
        return statistics

    def add(self, x: Tensor) -> None:
        """Pool with the values of (b, c, t, h, w)."""
        mean, variance, count = group_statistics(x, GROUPS)
        if self.count:
            share, difference = count / (self.count + count), mean - self.mean
            mean = self.mean + difference * share
            spread = self.variance * (1 - share) + variance * share
            variance = spread + difference.square() * (share * (1 - share))
        self.mean, self.variance = mean, variance
        self.count += count

    def input(self, pieces: list[Piece], norm: nn.GroupNorm) -> Tensor:
        """The pieces by these statistics, the norm's weight and bias, and SiLU, as one tensor."""
        return group_input(pieces, self.mean, torch.rsqrt(self.variance + norm.eps), norm.weight, norm.bias)


def _encoder_conv(width_in: int, width_out: int, config: CVVAEConfig) -> PaddedConv3d:
    """Causal in time: two copies of the first frame in front."""
    return PaddedConv3d(width_in, width_out, time=(2, 0), time_replicate=True, space_padding=config.space_padding)


def _decoder_conv(width_in: int, width_out: int, config: CVVAEConfig) -> PaddedConv3d:
    """Sees one frame to each side in time."""
    return PaddedConv3d(width_in, width_out, time=(1, 1), time_replicate=config.sd3, space_padding=config.space_padding)


class ResidualBlock(nn.Module):
    """The half-3D block: a 3x3x3 convolution, then a 3x3 convolution frame by frame."""

    def __init__(self, width_in: int, conv1: PaddedConv3d, config: CVVAEConfig) -> None:
        super().__init__()
        width = conv1.out_channels
        self.norm1 = _norm(width_in, config)
        self.conv1 = conv1
        self.norm2 = _norm(width, config)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv3d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(b, width_in, t, h, w) to (b, width_out, t, h, w)."""
        y = self.conv1.pieces(self.conv1.padded_in_space(activated([(0, x)], self.norm1)))
        y = per_frame(self.conv2, activated(y, self.norm2))
        return add(y, self.shortcut(x))


class TemporalAttention(nn.Module):
    """Attention over the frames at each pixel, without a residual of its own."""

    def __init__(self, width: int, config: CVVAEConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(pixels, frames, width) to the same."""
        x = self.norm(x)
        return self.proj_out(single_head_attention(self.q(x), self.k(x), self.v(x)))


class AttentionBlock(nn.Module):
    """Attention over the positions of each frame, followed by `temporal` where it is given; one residual for both."""

    def __init__(self, width: int, config: CVVAEConfig, temporal: TemporalAttention | None = None) -> None:
        super().__init__()
        self.norm = _norm(width, config)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj_out = nn.Linear(width, width)
        self.temporal = temporal

    def forward(self, x: Tensor) -> Tensor:
        b, _, _, height, width = x.shape
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        y = rearrange(self.norm(frames), "n c h w -> n (h w) c")
        y = self.proj_out(single_head_attention(self.q(y), self.k(y), self.v(y)))
        if self.temporal is not None:
            y = self.temporal(rearrange(y, "(b t) p c -> (b p) t c", b=b))
            return x + rearrange(y, "(b h w) t c -> b c t h w", h=height, w=width)
        return x + rearrange(y, "(b t) (h w) c -> b c t h w", b=b, h=height)


class Upsample(nn.Module):
    """Space x2; with `double_time` also T -> 2T - 1: every frame becomes two and the very first is dropped."""

    def __init__(self, width: int, config: CVVAEConfig, *, double_time: bool) -> None:
        super().__init__()
        self.parts = 2 if double_time else 1
        self.replicate = config.space_padding == "replicate"
        self.conv = PaddedConv3d(
            width, width * self.parts, time=(1, 1), time_replicate=True, space_padding=config.space_padding
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, width, t, h, w) to (b, width, t or 2t - 1, 2h, 2w)."""
        b, c, t, h, w = x.shape
        n, dropped = self.parts, self.parts - 1
        out = new_clip(x, (b, c, n * t - dropped, 2 * h, 2 * w))
        if self.replicate:
            x = F.pad(x, (1, 1, 1, 1, 0, 0), mode="replicate")
        padding = (0, 0) if self.replicate else (1, 1)
        make = partial(phase_kernels, dtype=x.dtype)
        kernels, bias = prepared(self, "phases", (self.conv.weight,), make), self.conv.bias
        for phase, kernel in enumerate(kernels):
            i, j = divmod(phase, 2)
            pieces = convolve_in_time(
                x, kernel, bias, (1, 1), (1, 1, 1), padding, replicate=True, skipped=c if dropped else 0
            )
            pieces = [y[..., i : i + h, j : j + w] for _, y in pieces]
            for part in range(n):
                # of the first frame the first part is dropped, and may not have been computed
                frames = [y[:, -c:] if part else y[:, :c] for y in pieces]
                if part < dropped:
                    frames = [frames[0][:, :, 1:], *frames[1:]]
                join(frames, out[:, :, (part - dropped) % n :: n, i::2, j::2])
                del frames
            del pieces  # not while the next phase is computed
        return out


def _run(blocks: Iterable[nn.Module], x: Tensor, *, checkpointing: bool) -> Tensor:
    for block in blocks:
        x = run_plain(block, x, checkpointing=checkpointing)
    return x


class Encoder(nn.Module):
    def __init__(self, config: CVVAEConfig) -> None:
        super().__init__()
        self.conv_in = _encoder_conv(3, config.widths[0], config)
        self.levels = nn.ModuleList()
        width = config.widths[0]
        for i, width_out in enumerate(config.widths):
            level = nn.Sequential()
            for j in range(config.blocks_per_level):
                level.add_module(f"block_{j}", ResidualBlock(width, _encoder_conv(width, width_out, config), config))
                width = width_out
            if i < LEVELS - 1:
                down = PaddedConv3d(
                    width,
                    width,
                    stride=(2 if i in TIME_LEVELS else 1, 2, 2),
                    time=(2, 0),
                    time_replicate=True,
                    space=(1, 1) if config.sd3 else (0, 1),
                    space_padding=config.space_padding,
                )
                level.add_module("down", down)
            self.levels.append(level)
        self.middle = nn.Sequential(
            ResidualBlock(width, _encoder_conv(width, width, config), config),
            AttentionBlock(width, config),
            ResidualBlock(width, _encoder_conv(width, width, config), config),
        )
        self.norm_out = _norm(width, config)
        self.conv_out = _encoder_conv(width, 2 * config.latent_channels, config)

    def forward(self, x: Tensor, *, checkpointing: bool = False) -> Tensor:
        """(b, 3, 1 + 4n, h, w) to moments (b, 2z, 1 + n, h/8, w/8)."""
        x = self.conv_in(channels_last(x))
        for level in self.levels:
            x = _run(level.children(), x, checkpointing=checkpointing)
        x = _run(self.middle, x, checkpointing=checkpointing)
        return self.conv_out(activated([(0, x)], self.norm_out))


class Decoder(nn.Module):
    def __init__(self, config: CVVAEConfig) -> None:
        super().__init__()
        width = config.widths[-1]
        self.conv_in = _decoder_conv(config.latent_channels, width, config)
        self.middle = nn.Sequential(
            ResidualBlock(width, _decoder_conv(width, width, config), config),
            AttentionBlock(width, config, None if config.sd3 else TemporalAttention(width, config)),
            ResidualBlock(width, _decoder_conv(width, width, config), config),
        )
        self.levels = nn.ModuleList()  # in the order they run: coarsest first
        for i, width_out in enumerate(reversed(config.widths)):
            level = nn.Sequential()
            for j in range(config.blocks_per_level + 1):
                level.add_module(f"block_{j}", ResidualBlock(width, _decoder_conv(width, width_out, config), config))
                width = width_out
            if i < LEVELS - 1:
                level.add_module("up", Upsample(width, config, double_time=i in TIME_LEVELS))
            self.levels.append(level)
        self.norm_out = _norm(width, config)
        self.conv_out = _decoder_conv(width, 3, config)

    def forward(self, z: Tensor, *, checkpointing: bool = False) -> Tensor:
        """(b, z, 1 + n, h, w) to (b, 3, 1 + 4n, 8h, 8w)."""
        x = self.conv_in(channels_last(z))
        x = _run(self.middle, x, checkpointing=checkpointing)
        for level in self.levels:
            x = _run(level.children(), x, checkpointing=checkpointing)
        return self.conv_out(activated([(0, x)], self.norm_out))


class CVVAE(nn.Module):
    """Encoder and decoder of one chunk; differentiable, and free of state."""

    def __init__(self, config: CVVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CVVAE:
        forget_prepared(self)
        return super()._apply(fn, recurse)

    def encode(self, chunk: Tensor, *, checkpointing: bool = False) -> tuple[Tensor, Tensor]:
        """Moments of one chunk.

        chunk: (b, 3, 1 + 4n, h, w) in [-1, 1], h and w multiples of 8. With `checkpointing`, activations of the blocks
        are computed again in the backward pass instead of kept. Returns (mean, logvar), each (b, z, 1 + n, h/8, w/8);
        logvar is as the network gives it, not clamped.
        """
        mean, logvar = self.encoder(chunk, checkpointing=checkpointing).chunk(2, dim=1)
        return mean, logvar

    def decode(self, latent: Tensor, *, checkpointing: bool = False) -> Tensor:
        """Frames of one chunk: (b, z, 1 + n, h, w), unscaled, to (b, 3, 1 + 4n, 8h, 8w), nominally in [-1, 1]."""
        return self.decoder(latent, checkpointing=checkpointing)

    def forward(self, chunk: Tensor) -> Tensor:
        """Reconstruction of one chunk through the posterior mean."""
        return self.decode(self.encode(chunk)[0])
