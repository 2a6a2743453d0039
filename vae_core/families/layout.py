"""The layout of Stable Diffusion's autoencoder, which CV-VAE took over: four levels of residual blocks, and a middle.

A `Kit` says which layers a family puts into it. Official names come in two spellings: that of the original program, and
that of diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..nn.layers import FrameAttention, FrameConv
from ..nn.steps import Layer, ResidualBlock, Step, steps_of
from .family import Shapes, substituted

GROUPS = 32
LEVELS = 4
CLAMP = (-30.0, 20.0)  # of logvar
# what the diffusion models of so many channels apply to an unscaled latent: scale * (latent - shift)
SAMPLER_SCALING = {4: (0.18215, 0.0), 16: (1.5305, 0.0609)}  # SD 1.x, SD 2.x and SVD; SD3 and SD3.5


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """Sizes of the layout; raises ValueError for such as it cannot have.

    widths: channels of the four levels, finest first, each a multiple of 32. blocks_per_level: residual blocks of an
    encoder level; the decoder has one more. latent_channels: z.
    """

    kind: ClassVar[str]
    widths: tuple[int, ...]
    blocks_per_level: int
    latent_channels: int

    def __post_init__(self) -> None:
        if len(self.widths) != LEVELS or any(width < GROUPS or width % GROUPS for width in self.widths):
            raise ValueError(
                f"{self.kind} needs {LEVELS} level widths that are multiples of {GROUPS} (its GroupNorm has {GROUPS} "
                f"groups); got {self.widths}. Choose widths such as (128, 256, 512, 512)."
            )
        if self.blocks_per_level < 1 or self.latent_channels < 1:
            raise ValueError(
                f"{self.kind} needs at least one block per level and one latent channel; got blocks_per_level="
                f"{self.blocks_per_level}, latent_channels={self.latent_channels}."
            )


def widths_in_words(config: LayoutConfig) -> str:
    """Of a config's levels and blocks."""
    return f"{', '.join(map(str, config.widths))}; {config.blocks_per_level} residual block(s) per level"


# ------------------------------------------------------------------------------------------------------- layers


@dataclass(frozen=True, kw_only=True)
class Kit:
    """The layers of one half. eps: of its group norms.

    conv: the 3x3 convolution between two widths. shortcut: the skip between two widths. resample: what changes the size
    after the level that is run as number 0, 1, 2, for a width. attention: of the middle, for a width, if there is one.
    """

    eps: float
    conv: Callable[[int, int], Layer]
    shortcut: Callable[[int, int], Layer]
    resample: Callable[[int, int], Layer]
    attention: Callable[[int], FrameAttention] | None

    def norm(self, width: int) -> nn.GroupNorm:
        return nn.GroupNorm(GROUPS, width, eps=self.eps)

    def block(self, width_in: int, width: int, *, whole: bool = False) -> ResidualBlock:
        """A residual block, whose second convolution sees single frames."""
        convolutions = self.conv(width_in, width), FrameConv(width, width)
        shortcut = None if width_in == width else self.shortcut(width_in, width)
        return ResidualBlock((self.norm(width_in), self.norm(width)), convolutions, shortcut, whole=whole)

    def middle(self, width: int) -> nn.ModuleDict:
        """What lies at latent resolution."""
        attention = {} if self.attention is None else {"attention": self.attention(width)}
        before, after = (self.block(width, width, whole=True) for _ in range(2))
        return nn.ModuleDict({"before": before, **attention, "after": after})

    def levels(self, width: int, widths: Iterable[int], blocks: int, resample: str) -> nn.ModuleList:
        """Levels of `widths`, in the order they run, after something of `width`."""
        levels = nn.ModuleList()
        for i, width_out in enumerate(widths):
            level = nn.ModuleDict()
            for j in range(blocks):
                level[f"block_{j}"] = self.block(width, width_out)
                width = width_out
            if i < LEVELS - 1:
                level[resample] = self.resample(width, i)
            levels.append(level)
        return levels


class Encoder(nn.Module):
    """Pixels to moments. quantize: a 1x1 convolution after the last, which some image VAEs have."""

    def __init__(self, config: LayoutConfig, kit: Kit, *, quantize: bool = False) -> None:
        super().__init__()
        widths, channels = config.widths, 2 * config.latent_channels
        self.conv_in = kit.conv(3, widths[0])
        self.levels = kit.levels(widths[0], widths, config.blocks_per_level, "down")
        self.middle = kit.middle(widths[-1])
        self.norm_out = kit.norm(widths[-1])
        self.conv_out = kit.conv(widths[-1], channels)
        self.quant = FrameConv(channels, channels, 1) if quantize else None

    def steps(self) -> list[Step]:
        layers = (layer for level in self.levels for layer in level.children())
        steps = steps_of((self.conv_in, *layers, *self.middle.children()))
        steps.append(Step(layer=self.conv_out, norm=self.norm_out, whole=True))
        return steps if self.quant is None else [*steps, Step(layer=self.quant, whole=True)]


class Decoder(nn.Module):
    """Latents to pixels. quantize: a 1x1 convolution before the first, which some image VAEs have."""

    def __init__(self, config: LayoutConfig, kit: Kit, *, quantize: bool = False) -> None:
        super().__init__()
        widths, channels = config.widths, config.latent_channels
        self.quant = FrameConv(channels, channels, 1) if quantize else None
        self.conv_in = kit.conv(channels, widths[-1])
        self.middle = kit.middle(widths[-1])
        self.levels = kit.levels(widths[-1], reversed(widths), config.blocks_per_level + 1, "up")  # coarsest first
        self.norm_out = kit.norm(widths[0])
        self.conv_out = kit.conv(widths[0], 3)

    def steps(self) -> list[Step]:
        first = [Step(layer=layer, whole=True) for layer in (self.quant, self.conv_in) if layer is not None]
        layers = (layer for level in self.levels for layer in level.children())
        last = Step(layer=self.conv_out, norm=self.norm_out)
        return [*first, *steps_of((*self.middle.children(), *layers)), last]


# -------------------------------------------------------------------------------------------------------- names

_ORIGINAL = (
    (r"\.levels\.(\d)\.block_", r".levels.\1.block."),
    (r"\.down\.(?=weight|bias)", r".downsample.conv."),
    (r"\.up\.(?:conv\.)?(?=weight|bias)", r".upsample.conv."),
    (r"^encoder\.levels\.", r"encoder.down."),
    (r"^decoder\.levels\.", r"decoder.up."),
    (r"\.middle\.before\.", r".mid.block_1."),
    (r"\.middle\.after\.", r".mid.block_2."),
    (r"\.middle\.attention\.temporal\.(\w+)\.", r".mid.attn_1.\1_t."),
    (r"\.middle\.attention\.", r".mid.attn_1."),
    (r"\.shortcut\.", r".nin_shortcut."),
    (r"^encoder\.quant\.", r"quant_conv."),
    (r"^decoder\.quant\.", r"post_quant_conv."),
)
# runs of names in the original program, and in diffusers
_SPELLINGS = (
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.norm.", ".mid_block.attentions.0.group_norm."),
    (".mid.attn_1.proj_out.", ".mid_block.attentions.0.to_out.0."),
    (".mid.attn_1.q.", ".mid_block.attentions.0.to_q."),
    (".mid.attn_1.k.", ".mid_block.attentions.0.to_k."),
    (".mid.attn_1.v.", ".mid_block.attentions.0.to_v."),
    (".down.", ".down_blocks."),
    (".up.", ".up_blocks."),
    (".block.", ".resnets."),
    (".downsample.", ".downsamplers.0."),
    (".upsample.", ".upsamplers.0."),
    (".nin_shortcut.", ".conv_shortcut."),
    (".norm_out.", ".conv_norm_out."),
)
LINEAR = re.compile(r"\.attn_1\.(q|k|v|proj_out)\.weight$")  # in the original program 1x1 convolutions


def upside_down(name: str) -> str:
    """The decoder's levels counted from the other end, in the original spelling."""
    return re.sub(r"^decoder\.up\.(\d)\.", lambda m: f"decoder.up.{LEVELS - 1 - int(m[1])}.", name)


def original(config: LayoutConfig, name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Name and shape of our tensor in the original program."""
    name = upside_down(substituted(name, _ORIGINAL))
    return name, (*shape, 1, 1) if LINEAR.search(name) else shape


def diffusers_name(name: str) -> str:
    """The name of our tensor in diffusers."""
    name = substituted(name, _ORIGINAL)
    for theirs, diffusers in _SPELLINGS:
        name = name.replace(theirs, diffusers)
    return name


def from_diffusers(name: str) -> str:
    """A name of diffusers in the original spelling."""
    for theirs, diffusers in _SPELLINGS:
        name = name.replace(diffusers, theirs)
    return upside_down(name)


def sizes_in(shapes: Shapes, down: str, up: str, block: str, *, upward: bool) -> dict[str, Any]:
    """The fields of a `LayoutConfig` that shapes imply. down, up, block: what they call levels and their blocks.
    upward: whether they count the decoder's levels as they run. Raises KeyError where a tensor is missing."""
    if "encoder.conv_in.weight" in shapes:
        first, order, more = f"encoder.{down}", range(LEVELS), 0
        channels = shapes["encoder.conv_out.weight"][0] // 2
    else:
        first, order, more = f"decoder.{up}", range(LEVELS)[:: -1 if upward else 1], 1
        channels = shapes["decoder.conv_in.weight"][1]
    blocks = 0
    while f"{first}.0.{block}.{blocks}.conv1.weight" in shapes:
        blocks += 1
    widths = tuple(shapes[f"{first}.{i}.{block}.0.conv1.weight"][0] for i in order)
    return {"widths": widths, "blocks_per_level": blocks - more, "latent_channels": channels}
