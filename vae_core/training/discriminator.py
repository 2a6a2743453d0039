"""The 3-D patch discriminator of the adversarial loss: one score for every patch of a clip."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from ..weights.files import read_weights

GROUPS, EPS = 32, 1e-6
HALVED = 2  # of the blocks, the first ones
SLOPE = 0.2


class DiscriminatorBlock(nn.Module):
    """Norm, SiLU, 3x3x3, twice, plus the input. With `down`, the first convolution's output and the input are averaged
    over 2x2x2.
    """

    def __init__(self, width_in: int, width: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        self.norm1 = nn.GroupNorm(GROUPS, width_in, eps=EPS)
        self.conv1 = nn.Conv3d(width_in, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, width, eps=EPS)
        self.conv2 = nn.Conv3d(width, width, 3, padding=1)
        self.nin_shortcut = nn.Conv3d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        if self.down:
            x, y = halve(x), halve(y)
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


def halve(x: Tensor) -> Tensor:
    """Averages over 2x2x2; an odd number of frames is padded in front by its first frame, an odd side by its last."""
    bottom, right = x.shape[-2] % 2, x.shape[-1] % 2
    x = F.pad(x, (0, right, 0, bottom, x.shape[2] % 2, 0), mode="replicate")
    return F.avg_pool3d(x, 2)


class PatchDiscriminator(nn.Module):
    """(b, 3, t, h, w) in [-1, 1] to scores (b, 1, t', h/8, w/8), t' about t/8; images have t = 1.

    width: of the first layer, a multiple of 32; published 64. Real patches are to score above 1, others below -1. Names
    and order are those of the published training code, so that its weights load (`load_official`).
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        if width < GROUPS or width % GROUPS:
            raise ValueError(f"discriminator.width is {width}; needed is a multiple of {GROUPS}, published is 64.")
        layers: list[nn.Module] = [nn.Conv3d(3, width, 3, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        widths = [width, 2 * width, 4 * width, 8 * width, 8 * width]
        for number, (width_in, width_out) in enumerate(pairwise(widths)):
            layers.append(DiscriminatorBlock(width_in, width_out, down=number < HALVED))
            layers += [nn.GroupNorm(GROUPS, width_out, eps=EPS), nn.LeakyReLU(SLOPE)]
        self.main = nn.Sequential(*layers, nn.Conv3d(widths[-1], 1, 3, padding=1))
        for layer in self.modules():
            if isinstance(layer, nn.Conv3d):
                nn.init.normal_(layer.weight, 0.0, 0.02)

    def forward(self, video: Tensor) -> Tensor:
        return self.main(video)

    def load_official(self, path: Path) -> None:
        """Take the discriminator of a checkpoint of the published training code, or of one saved alone.

        Raises CheckpointError where there is none, or one of another size.
        """
        found = {
            name[name.index("main.") :]: tensor.float()
            for name, tensor in read_weights(path).tensors.items()
            if re.match(r"(.*\bdiscriminator\.)?main\.", name) and ".temb_proj." not in name  # of no use there either
        }
        wanted = self.state_dict()
        if {name: t.shape for name, t in found.items()} != {name: t.shape for name, t in wanted.items()}:
            have = f"one of width {found['main.0.weight'].shape[0]}" if "main.0.weight" in found else "none"
            raise CheckpointError(
                f"{path}: needed is the published 3-D patch discriminator of width {wanted['main.0.weight'].shape[0]}, "
                f"and the file holds {have}. Correct discriminator.width, or leave discriminator.weights out."
            )
        self.load_state_dict(found)
