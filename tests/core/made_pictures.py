"""Noise and texture for measures of quality."""

import torch
import torch.nn.functional as F
from torch import Tensor


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def textured(frames: int, height: int, width: int, seed: int = 0) -> Tensor:
    """A picture with detail that optical flow can follow: (1, 3, t, h, w), standing still."""
    small = noise(1, 3, height // 4, width // 4, seed=seed)
    picture = F.interpolate(small, (height, width), mode="bicubic").clamp(-2, 2) / 2.5
    return picture[:, :, None].expand(-1, -1, frames, -1, -1).contiguous()
