"""How much a clip moves, measured in its latents, and what SVD is told so that it stays so over chunks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FEWEST, MOST = 1, 255  # motion buckets that SVD knows
SLOWEST, FASTEST = 5, 30  # frames per second that it knows
_LARGEST_FACTOR = 2.0  # by which what is told changes from one chunk to the next


def motion_of(latents: Tensor) -> float:
    """The change from latent to latent over what a latent holds; changes of brightness do not count. 0 for one latent.

    latents: (t, c, h, w).
    """
    if latents.shape[0] < 2:
        return 0.0
    change = torch.std(latents.float().diff(dim=0), dim=(2, 3), correction=0).square().mean().sqrt()
    content = torch.std(latents.float(), dim=(2, 3), correction=0).square().mean().sqrt()
    return float(change / content.clamp_min(1e-6))


def told_for(bucket: int, rate: int, motions: Sequence[float]) -> tuple[int, int]:
    """(motion bucket, latents per second) that the next chunk is told, of those of the first and the motions so far.

    Where the bucket is at its end the rate goes on: told fewer latents per second, SVD moves more between two.
    """
    most, slowest, fastest = max(MOST, bucket), min(SLOWEST, rate), max(FASTEST, rate)
    wanted = float(bucket)
    for motion in motions[1:]:
        if motions[0] > 0 and motion > 0:
            factor = min(max(motions[0] / motion, 1 / _LARGEST_FACTOR), _LARGEST_FACTOR)
            wanted = min(max(wanted * factor, FEWEST * rate / fastest), most * rate / slowest)
    told = min(max(wanted, FEWEST), most)
    return round(told), round(rate * told / wanted)
