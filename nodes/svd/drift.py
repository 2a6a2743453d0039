"""Drift of brightness and contrast over a long SVD clip, and its slow correction: pure functions, without ComfyUI.

Tensors are SVD latents, (t, c, h, w). A level is the mean of a channel over the pixels of one latent, and the logarithm
of its deviation. A correction grows from nothing at a seam and is never a jump; a jump that is there it takes away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .windows import Span

_SMALLEST_DEVIATION = 1e-6  # a flat channel is moved, not stretched


@dataclass(frozen=True, kw_only=True)
class Levels:
    """mean, contrast: (t, c, 1, 1); contrast is the logarithm of the deviation."""

    mean: Tensor
    contrast: Tensor

    def __getitem__(self, which: int | slice) -> Levels:
        which = slice(which, which + 1 or None) if isinstance(which, int) else which
        return Levels(mean=self.mean[which], contrast=self.contrast[which])

    def __sub__(self, other: Levels) -> Levels:
        return Levels(mean=self.mean - other.mean, contrast=self.contrast - other.contrast)

    def __add__(self, other: Levels) -> Levels:
        return Levels(mean=self.mean + other.mean, contrast=self.contrast + other.contrast)

    def times(self, factor: float | Tensor) -> Levels:
        """Both times `factor`."""
        return Levels(mean=self.mean * factor, contrast=self.contrast * factor)

    def average(self) -> Levels:
        """(1, c, 1, 1): of all latents."""
        return Levels(mean=self.mean.mean(0, keepdim=True), contrast=self.contrast.mean(0, keepdim=True))

    def usual_step(self) -> Levels:
        """(1, c, 1, 1): the median change from latent to latent; nothing for fewer than two."""
        if self.mean.shape[0] < 2:
            return self.times(0.0)[0]
        return Levels(
            mean=self.mean.diff(dim=0).abs().median(0, keepdim=True).values,
            contrast=self.contrast.diff(dim=0).abs().median(0, keepdim=True).values,
        )

    def beyond(self, most: Levels) -> Levels:
        """What exceeds `most` in either direction."""
        return Levels(
            mean=self.mean - torch.maximum(torch.minimum(self.mean, most.mean), -most.mean),
            contrast=self.contrast - torch.maximum(torch.minimum(self.contrast, most.contrast), -most.contrast),
        )


def levels(latents: Tensor) -> Levels:
    """The levels of each latent."""
    deviation, mean = torch.std_mean(latents, dim=(2, 3), keepdim=True, correction=0)
    return Levels(mean=mean, contrast=deviation.clamp_min(_SMALLEST_DEVIATION).log())


def moved(latents: Tensor, change: Levels) -> Tensor:
    """Latents with `change`, one for each or one for all, added to their levels."""
    mean = latents.mean((2, 3), keepdim=True)
    return (latents - mean) * change.contrast.exp() + mean + change.mean


def chunk_change(chunk: Tensor, known: Tensor, first: Tensor, length: int, strength: float) -> Levels:
    """The change that holds a chunk to the first one, for each of its latents.

    chunk: as sampled. known: its first latents as the chunk before left them. first: the first chunk. length: of a
    chunk. strength: 0 to 1, how much of the difference between the two chunks is taken away by the end. In addition a
    jump at the seam that is larger than the usual step of the first chunk is cut down to it. Latents that were kept as
    they were take none of it, those that were faded a share: that is for the caller to weigh.
    """
    start, have, want = known.shape[0], levels(chunk), levels(first)
    jump = (have[start] - levels(known[-1:])).beyond(want.usual_step())
    new = chunk.shape[0] - start
    offset = have.average() - jump.times(new / chunk.shape[0]) - want.average()
    # a chunk with few new latents is corrected by as little for each of them as one with many
    ramp = torch.arange(1.0 - start, new + 1).clamp(min=0) / max(new, length // 2)
    return (jump + offset.times(strength * ramp.reshape(-1, 1, 1, 1).to(chunk))).times(-1.0)


def clip_change(clip: Tensor, spans: Sequence[Span], strength: float) -> Levels:
    """The change that holds every window of a clip to the first: in full in its middle, between two a mixture."""
    have = levels(clip)
    each = [have[span.start : span.stop].average() - have[spans[0].start : spans[0].stop].average() for span in spans]
    middles = torch.tensor([span.start + (span.length - 1) / 2 for span in spans], device=clip.device)
    where = torch.arange(clip.shape[0], dtype=torch.float32, device=clip.device)
    after = torch.searchsorted(middles, where).clamp(1, len(spans) - 1)
    share = ((where - middles[after - 1]) / (middles[after] - middles[after - 1])).clamp(0, 1).reshape(-1, 1, 1, 1)

    def between(values: Tensor) -> Tensor:
        return values[after - 1] + (values[after] - values[after - 1]) * share.to(values)

    return Levels(
        mean=between(torch.cat([one.mean for one in each])), contrast=between(torch.cat([one.contrast for one in each]))
    ).times(-strength)
