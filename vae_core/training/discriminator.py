"""The 3-D patch discriminator of the adversarial loss: one score for every patch of a clip."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32
SLOPE = 0.2


class DiscriminatorBlock(nn.Module):
    """Norm, LeakyReLU, 3x3x3, twice, plus the input; with `down`, both are then averaged over 2x2x2."""

    def __init__(self, width_in: int, width: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        self.norm1 = nn.GroupNorm(GROUPS, width_in)
        self.conv1 = nn.Conv3d(width_in, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, width)
        self.conv2 = nn.Conv3d(width, width, 3, padding=1)
        self.shortcut = nn.Conv3d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.leaky_relu(self.norm1(x), SLOPE))
        y = self.conv2(F.leaky_relu(self.norm2(y), SLOPE))
        y = y + self.shortcut(x)
        return halve(y) if self.down else y


def halve(x: Tensor) -> Tensor:
    """Averages over 2x2x2; an odd number of frames is padded in front by its first frame, an odd side by its last."""
    bottom, right = x.shape[-2] % 2, x.shape[-1] % 2
    x = F.pad(x, (0, right, 0, bottom, x.shape[2] % 2, 0), mode="replicate")
    return F.avg_pool3d(x, 2)


class PatchDiscriminator(nn.Module):
    """(b, 3, t, h, w) in [-1, 1] to scores (b, 1, t', h/8, w/8), t' about t/8; images have t = 1.

    width: of the first layer, a multiple of 32; published 64. Real patches are to score above 1, others below -1.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        if width < GROUPS or width % GROUPS:
            raise ValueError(f"discriminator.width is {width}; needed is a multiple of {GROUPS}, published is 64.")
        self.conv_in = nn.Conv3d(3, width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(
            DiscriminatorBlock(width, 2 * width, down=True),
            DiscriminatorBlock(2 * width, 4 * width, down=True),
            DiscriminatorBlock(4 * width, 4 * width, down=False),
            DiscriminatorBlock(4 * width, 4 * width, down=False),
        )
        self.norm_out = nn.GroupNorm(GROUPS, 4 * width)
        self.conv_out = nn.Conv3d(4 * width, 1, 3, padding=1)

    def forward(self, video: Tensor) -> Tensor:
        x = self.blocks(self.conv_in(video))
        return self.conv_out(F.leaky_relu(self.norm_out(x), SLOPE))

    def scores(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of two batches of clips, computed together."""
        first, second = self(torch.cat((real, fake))).chunk(2)
        return first, second
