"""The 2-D image VAEs that the video VAEs start from. Tensors are (b, c, h, w), pixels in [-1, 1], compression 8 x 8.

The first has the tensor names of the Stable Diffusion VAE, which are CV-VAE's too; the second is laid out like IV-VAE.
Inflation maps both from name to name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

GROUPS = 32
LEVELS = 4
BLOCKS = 2  # residual blocks of an IV-VAE encoder level; the decoder has one more
DILATIONS = (3, 6, 9, 12)


class ImageVAE(Protocol):
    """What the training loop needs of an image VAE."""

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(b, 3, h, w) to mean and logvar, each (b, z, h/8, w/8)."""
        ...

    def decode(self, latent: Tensor) -> tuple[Tensor, ...]:
        """(b, z, h/8, w/8) to one or more reconstructions (b, 3, h, w) of the same image."""
        ...


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Single head over the positions of an image; all (b, c, h, w)."""
    height = q.shape[-2]
    q, k, v = (rearrange(part, "b c h w -> b 1 (h w) c") for part in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b 1 (h w) c -> b c h w", h=height)


# ---------------------------------------------------------------------------------------------------------- CV-VAE


@dataclass(frozen=True, kw_only=True)
class CVImageConfig:
    """Widths of the four levels, finest first (multiples of 32), residual blocks per encoder level, and z."""

    widths: tuple[int, ...]
    blocks_per_level: int
    latent_channels: int


def _group_norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, width, eps=1e-5)


class CVBlock(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.norm1 = _group_norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = _group_norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class CVAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _group_norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.proj_out(_attention(self.q(y), self.k(y), self.v(y)))


class CVMiddle(nn.Module):
    def __init__(self, width: int, *, attention: bool) -> None:
        super().__init__()
        self.block_1 = CVBlock(width, width)
        self.attn_1 = CVAttention(width) if attention else nn.Identity()
        self.block_2 = CVBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class CVResample(nn.Module):
    """Space / 2 with zeros on the right and the bottom, or nearest x2; then a 3x3 convolution."""

    def __init__(self, width: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(width, width, 3, stride=2) if down else nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2.0, mode="nearest"))


class CVLevel(nn.Module):
    def __init__(self, width_in: int, width: int, blocks: int, **resample: nn.Module) -> None:
        super().__init__()
        self.block = nn.Sequential(*(CVBlock(width_in if j == 0 else width, width) for j in range(blocks)))
        for name, module in resample.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


class CVEncoder(nn.Module):
    def __init__(self, config: CVImageConfig) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, config.widths[0], 3, padding=1)
        self.down = nn.Sequential()
        width = config.widths[0]
        for i, width_out in enumerate(config.widths):
            resample = {"downsample": CVResample(width_out, down=True)} if i < LEVELS - 1 else {}
            self.down.append(CVLevel(width, width_out, config.blocks_per_level, **resample))
            width = width_out
        self.mid = CVMiddle(width, attention=True)
        self.norm_out = _group_norm(width)
        self.conv_out = nn.Conv2d(width, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class CVDecoder(nn.Module):
    """No attention in the middle: inflation silences that path (see `inflation.py`), so nothing may rest on it."""

    def __init__(self, config: CVImageConfig) -> None:
        super().__init__()
        width = config.widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.mid = CVMiddle(width, attention=False)
        levels: list[nn.Module] = []
        for i in reversed(range(LEVELS)):
            width_out = config.widths[i]
            resample = {"upsample": CVResample(width_out, down=False)} if i > 0 else {}
            levels.append(CVLevel(width, width_out, config.blocks_per_level + 1, **resample))
            width = width_out
        self.up = nn.ModuleList(reversed(levels))  # named finest first, run coarsest first
        self.norm_out = _group_norm(width)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class CVImageVAE(nn.Module):
    """The Stable Diffusion layout, without quant convolutions and without attention in the decoder."""

    def __init__(self, config: CVImageConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = CVEncoder(config)
        self.decoder = CVDecoder(config)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(b, 3, h, w) in [-1, 1] to mean and logvar, each (b, z, h/8, w/8)."""
        mean, logvar = self.encoder(image).chunk(2, dim=1)
        return mean, logvar

    def decode(self, latent: Tensor) -> tuple[Tensor]:
        """(b, z, h/8, w/8) to the image, (b, 3, h, w), nominally in [-1, 1]."""
        return (self.decoder(latent),)


# ---------------------------------------------------------------------------------------------------------- IV-VAE


@dataclass(frozen=True, kw_only=True)
class IVImageConfig:
    """`halves` image VAEs side by side, each of `latent_channels` / `halves` channels.

    dim: width of one half at the finest level. halves: 1 is the image VAE of z/2 channels; 2 is the layout of the
    video model, where every convolution reads both halves (kernels from half to half are zero where two separate
    image VAEs were joined), while norms, attention and the changes of resolution stay inside a half.
    """

    dim: int
    latent_channels: int
    halves: int


class HalvesNorm(nn.Module):
    """L2-normalise each half along channels at every position, times sqrt(width of a half), times gamma."""

    def __init__(self, width: int, halves: int) -> None:
        super().__init__()
        self.halves = halves
        self.gamma = nn.Parameter(torch.ones(width * halves, 1, 1))
        self.scale = math.sqrt(width)

    def forward(self, x: Tensor) -> Tensor:
        if self.halves == 1:
            return F.normalize(x, dim=1) * (self.scale * self.gamma)
        parts = x.chunk(self.halves, dim=1)
        return torch.cat([F.normalize(part, dim=1) for part in parts], dim=1) * (self.scale * self.gamma)


class IVBlock(nn.Module):
    def __init__(self, width_in: int, width: int, halves: int) -> None:
        super().__init__()
        a, b = width_in * halves, width * halves
        self.norm1 = HalvesNorm(width_in, halves)
        self.conv1 = nn.Conv2d(a, b, 3, padding=1)
        self.norm2 = HalvesNorm(width, halves)
        self.conv2 = nn.Conv2d(b, b, 3, padding=1)
        self.shortcut = nn.Conv2d(a, b, 1) if a != b else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return self.shortcut(x) + y


class IVAttention(nn.Module):
    """One attention per half, plus the input."""

    def __init__(self, width: int, halves: int) -> None:
        super().__init__()
        self.norm = HalvesNorm(width, halves)
        self.to_qkv = nn.ModuleList(nn.Conv2d(width, 3 * width, 1) for _ in range(halves))
        self.proj = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(halves))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.norm(x).chunk(len(self.proj), dim=1)
        outputs = [
            proj(_attention(*to_qkv(part).chunk(3, dim=1)))
            for to_qkv, proj, part in zip(self.to_qkv, self.proj, parts, strict=True)
        ]
        return x + torch.cat(outputs, dim=1)


class IVResample(nn.Module):
    """Space / 2, or nearest x2 and half the width; one 3x3 convolution per half."""

    def __init__(self, width: int, halves: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.ModuleList(
            nn.Conv2d(width, width, 3, stride=2) if down else nn.Conv2d(width, width // 2, 3, padding=1)
            for _ in range(halves)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2.0, mode="nearest")
        parts = x.chunk(len(self.conv), dim=1)
        return torch.cat([conv(part) for conv, part in zip(self.conv, parts, strict=True)], dim=1)


class IVHead(nn.Module):
    """The encoder's parallel atrous convolutions, merged by a 1x1."""

    def __init__(self, width: int, width_out: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Conv2d(width, width_out, 1), nn.Conv2d(width, width_out, 3, padding=1)])
        self.branches.extend(nn.Conv2d(width, width_out, 3, padding=d, dilation=d) for d in DILATIONS)
        self.merge = nn.Conv2d(len(self.branches) * width_out, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(torch.cat([branch(x) for branch in self.branches], dim=1))


def _encoder_stages(dim: int, halves: int) -> nn.Sequential:
    stages = nn.Sequential()
    width = dim
    for level, multiple in enumerate((1, 2, 4, 4)):
        for _ in range(BLOCKS):
            stages.append(IVBlock(width, dim * multiple, halves))
            width = dim * multiple
            if level == LEVELS - 1:
                stages.append(IVAttention(width, halves))
        if level < LEVELS - 1:
            stages.append(IVResample(width, halves, down=True))
        if level == LEVELS - 2:
            stages.append(IVAttention(width, halves))
    return stages


def _decoder_stages(dim: int, halves: int) -> nn.Sequential:
    stages = nn.Sequential()
    width = 4 * dim
    for level, multiple in enumerate((4, 4, 2, 1)):
        for _ in range(BLOCKS + 1):
            stages.append(IVBlock(width, dim * multiple, halves))
            width = dim * multiple
            if level == 0:
                stages.append(IVAttention(width, halves))
        if level < LEVELS - 1:
            stages.append(IVResample(width, halves, down=False))
            width //= 2
    return stages


def _middle(width: int, halves: int) -> nn.Sequential:
    return nn.Sequential(IVBlock(width, width, halves), IVAttention(width, halves), IVBlock(width, width, halves))


class IVImageVAE(nn.Module):
    """The IV-VAE with its 3-D kernels cut to one tap: one image VAE of z/2 channels, or two side by side."""

    def __init__(self, config: IVImageConfig) -> None:
        super().__init__()
        dim, halves, z = config.dim, config.halves, config.latent_channels
        self.config = config
        self.conv_in = nn.Conv2d(3, dim * halves, 3, padding=1)
        self.encoder = _encoder_stages(dim, halves)
        self.encoder_middle = _middle(4 * dim, halves)
        self.encoder_norm = HalvesNorm(4 * dim, halves)
        self.head = IVHead(4 * dim * halves, 2 * z)
        self.to_moments = nn.Conv2d(2 * z, 2 * z, 1)
        self.from_latent = nn.Conv2d(z, z, 1)
        self.conv_latent = nn.Conv2d(z, 4 * dim * halves, 3, padding=1)
        self.decoder_middle = _middle(4 * dim, halves)
        self.decoder = _decoder_stages(dim, halves)
        self.decoder_norm = HalvesNorm(dim, halves)
        self.conv_out = nn.Conv2d(dim * halves, 3 * halves, 3, padding=1)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(b, 3, h, w) in [-1, 1] to mean and logvar, each (b, z, h/8, w/8)."""
        x = self.encoder_middle(self.encoder(self.conv_in(image)))
        x = self.to_moments(self.head(F.silu(self.encoder_norm(x))))
        parts = [part.chunk(2, dim=1) for part in x.chunk(self.config.halves, dim=1)]
        return torch.cat([mean for mean, _ in parts], dim=1), torch.cat([logvar for _, logvar in parts], dim=1)

    def decode(self, latent: Tensor) -> tuple[Tensor, ...]:
        """(b, z, h/8, w/8) to the image as each half gives it, (b, 3, h, w), nominally in [-1, 1]."""
        x = self.decoder(self.decoder_middle(self.conv_latent(self.from_latent(latent))))
        return self.conv_out(F.silu(self.decoder_norm(x))).chunk(self.config.halves, dim=1)
