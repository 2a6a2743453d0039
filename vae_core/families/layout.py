"""The layout of Stable Diffusion's autoencoder, which CV-VAE took over: four levels of residual blocks, and a middle.

A `Kit` says which layers a family puts into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from ..nn.layers import FrameAttention, FrameConv
from ..nn.region import NEIGHBOURS, POINT, Reach
from ..nn.steps import Layer, Same, Step

GROUPS = 32
LEVELS = 4


@dataclass(frozen=True, kw_only=True)
class Kit:
    """The layers of one half. eps: of its group norms.

    conv: the 3x3 convolution between two widths. shortcut: the skip between two widths. resample: what changes the size
    after the level that is run as number 0, 1, 2, for a width. attention: of the middle, for a width, if there is one.
    reach: of what changes the size.
    """

    eps: float
    conv: Callable[[int, int], Layer]
    shortcut: Callable[[int, int], Layer]
    resample: Callable[[int, int], Layer]
    reach: Reach
    attention: Callable[[int], FrameAttention] | None

    def norm(self, width: int) -> nn.GroupNorm:
        return nn.GroupNorm(GROUPS, width, eps=self.eps)


def check_widths(name: str, widths: tuple[int, ...], blocks_per_level: int, latent_channels: int) -> None:
    """Raise ValueError for a size that the layout cannot have."""
    if len(widths) != LEVELS or any(width < GROUPS or width % GROUPS for width in widths):
        raise ValueError(
            f"{name} needs {LEVELS} level widths that are multiples of {GROUPS} (its GroupNorm has {GROUPS} groups); "
            f"got {widths}. Choose widths such as (128, 256, 512, 512)."
        )
    if blocks_per_level < 1 or latent_channels < 1:
        raise ValueError(
            f"{name} needs at least one block per level and one latent channel; got blocks_per_level="
            f"{blocks_per_level}, latent_channels={latent_channels}."
        )


class ResidualBlock(nn.Module):
    """Norm, SiLU and a convolution, twice, plus the input; the second convolution sees single frames."""

    def __init__(self, width_in: int, width: int, kit: Kit) -> None:
        super().__init__()
        self.norm1 = kit.norm(width_in)
        self.conv1 = kit.conv(width_in, width)
        self.norm2 = kit.norm(width)
        self.conv2 = FrameConv(width, width)
        self.shortcut: Layer = Same() if width_in == width else kit.shortcut(width_in, width)

    def steps(self, *, whole: bool = False) -> list[Step]:
        return [
            Step(layer=self.conv1, reach=NEIGHBOURS, norm=self.norm1, keeps=True, whole=whole),
            Step(layer=self.conv2, reach=NEIGHBOURS, norm=self.norm2, adds=self.shortcut, whole=whole),
        ]


class Half(nn.Module):
    """What encoder and decoder have in common."""

    def __init__(self, kit: Kit) -> None:
        super().__init__()
        self.reach = kit.reach
        self.levels = nn.ModuleList()

    def _add_levels(self, kit: Kit, width: int, widths: Iterable[int], blocks: int, resample: str) -> int:
        """Levels of `widths`, in the order they run, after something of `width`; returns the last width."""
        for i, width_out in enumerate(widths):
            level = nn.ModuleDict()
            for j in range(blocks):
                level[f"block_{j}"] = ResidualBlock(width, width_out, kit)
                width = width_out
            if i < LEVELS - 1:
                level[resample] = kit.resample(width, i)
            self.levels.append(level)
        return width

    def _middle(self, kit: Kit, width: int) -> nn.ModuleList:
        between = nn.Identity() if kit.attention is None else kit.attention(width)
        return nn.ModuleList([ResidualBlock(width, width, kit), between, ResidualBlock(width, width, kit)])

    def _middle_steps(self, middle: nn.ModuleList) -> list[Step]:
        steps: list[Step] = []
        for layer in middle:
            if isinstance(layer, ResidualBlock):
                steps += layer.steps(whole=True)
            elif isinstance(layer, FrameAttention):
                steps.append(Step(layer=layer, whole=True))
        return steps

    def _level_steps(self) -> list[Step]:
        steps: list[Step] = []
        for layer in (layer for level in self.levels for layer in level.children()):
            if isinstance(layer, ResidualBlock):
                steps += layer.steps()
            else:
                assert isinstance(layer, Layer)
                steps.append(Step(layer=layer, reach=self.reach))
        return steps


class Encoder(Half):
    """Pixels to moments. quantize: a 1x1 convolution after the last, which some image VAEs have."""

    def __init__(
        self, widths: tuple[int, ...], blocks: int, channels: int, kit: Kit, *, quantize: bool = False
    ) -> None:
        super().__init__(kit)
        self.conv_in = kit.conv(3, widths[0])
        width = self._add_levels(kit, widths[0], widths, blocks, "down")
        self.middle = self._middle(kit, width)
        self.norm_out = kit.norm(width)
        self.conv_out = kit.conv(width, 2 * channels)
        self.quant = FrameConv(2 * channels, 2 * channels, 1) if quantize else None

    def steps(self) -> tuple[Step, ...]:
        steps = [Step(layer=self.conv_in, reach=NEIGHBOURS), *self._level_steps(), *self._middle_steps(self.middle)]
        steps.append(Step(layer=self.conv_out, reach=NEIGHBOURS, norm=self.norm_out, whole=True))
        return (*steps, *([] if self.quant is None else [Step(layer=self.quant, reach=POINT, whole=True)]))


class Decoder(Half):
    """Latents to pixels. quantize: a 1x1 convolution before the first, which some image VAEs have."""

    def __init__(
        self, widths: tuple[int, ...], blocks: int, channels: int, kit: Kit, *, quantize: bool = False
    ) -> None:
        super().__init__(kit)
        self.quant = FrameConv(channels, channels, 1) if quantize else None
        self.conv_in = kit.conv(channels, widths[-1])
        self.middle = self._middle(kit, widths[-1])
        width = self._add_levels(kit, widths[-1], reversed(widths), blocks + 1, "up")  # coarsest first
        self.norm_out = kit.norm(width)
        self.conv_out = kit.conv(width, 3)

    def steps(self) -> tuple[Step, ...]:
        first = [] if self.quant is None else [Step(layer=self.quant, reach=POINT, whole=True)]
        first += [Step(layer=self.conv_in, reach=NEIGHBOURS, whole=True), *self._middle_steps(self.middle)]
        last = Step(layer=self.conv_out, reach=NEIGHBOURS, norm=self.norm_out)
        return (*first, *self._level_steps(), last)
