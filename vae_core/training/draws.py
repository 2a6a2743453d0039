"""Random numbers that follow from a seed and a clip's place alone: not from what was drawn before, nor by whom.

So a run that was stopped and resumed draws what it would have drawn, and two processes draw what one would.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..families import VIDEO
from .regularization import draw_frames

_NOISE = 1


def generator_for(seed: int, *place: int) -> torch.Generator:
    """A generator of its own for every `place`, numbers of 0 or more."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, *place)).generate_state(1)[0]))


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What a batch needs at random: posterior noise (b, z, t', h', w'), (b, t' - 1) choices of the random mapping."""

    noise: Tensor
    frames: Tensor


def draw(shape: tuple[int, ...], latent_channels: int, *, seed: int, index: int, first: int) -> Draws:
    """The draws for clips of `shape` (b, 3, t, h, w): those of numbers `first`, `first` + 1, ... in batch `index`."""
    b, _, t, h, w = shape
    length = VIDEO.latent_frames(t)
    noise: list[Tensor] = []
    frames: list[Tensor] = []
    for number in range(first, first + b):
        generator = generator_for(seed, _NOISE, index, number)
        noise.append(torch.randn(latent_channels, length, h // VIDEO.space, w // VIDEO.space, generator=generator))
        frames.append(draw_frames(length - 1, generator))
    return Draws(noise=torch.stack(noise), frames=torch.stack(frames))
