"""How much a clip moves, measured in its latents, and the motion bucket that keeps it so over chunks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FEWEST, MOST = 1, 255  # motion buckets that SVD knows
_LARGEST_FACTOR = 2.0  # by which a bucket changes from one chunk to the next


def motion_of(latents: Tensor) -> float:
    """The change from latent to latent over what a latent holds; changes of brightness do not count. 0 for one latent.

    latents: (t, c, h, w).
    """
    if latents.shape[0] < 2:
        return 0.0
    change = torch.std(latents.float().diff(dim=0), dim=(2, 3), correction=0).square().mean().sqrt()
    content = torch.std(latents.float(), dim=(2, 3), correction=0).square().mean().sqrt()
    return float(change / content.clamp_min(1e-6))


def bucket_for(bucket: int, motions: Sequence[float]) -> int:
    """The motion bucket of the next chunk, of that of the first chunk and the motions measured so far."""
    told = float(bucket)
    for motion in motions[1:]:
        if motions[0] > 0 and motion > 0:
            factor = min(max(motions[0] / motion, 1 / _LARGEST_FACTOR), _LARGEST_FACTOR)
            told = min(max(told * factor, FEWEST), max(MOST, bucket))
    return round(told)
