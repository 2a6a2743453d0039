"""Weights and inputs of the golden cases, drawn from names and shapes, so that no weight file is needed.

Every tensor comes from a NumPy generator seeded with (seed, crc32(official name)). The outputs beside this file were
made with the official implementations in float64 from the same numbers and stored in float32.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, ...]


def draw(name: str, shape: Shape, seed: int) -> Tensor:
    """Standard normal float32 tensor of `shape`, fixed by `name` and `seed`."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def weight(name: str, shape: Shape, seed: int) -> Tensor:
    """Biases 0.05 x, norm scales 1 + 0.1 x, everything else x / sqrt(fan in)."""
    x = draw(name, shape, seed)
    owner, _, leaf = name.rpartition(".")
    if leaf == "bias":
        return 0.05 * x
    if leaf == "gamma" or (leaf == "weight" and "norm" in owner.rpartition(".")[2]):
        return 1 + 0.1 * x
    return x / math.sqrt(max(1, math.prod(shape[1:])))


def state_dict(shapes: Mapping[str, Shape], seed: int) -> dict[str, Tensor]:
    """Weights for official names and shapes."""
    return {name: weight(name, shape, seed) for name, shape in shapes.items()}


def video(shape: Shape, seed: int) -> Tensor:
    """A smooth moving clip in [-1, 1], (b, 3, t, h, w)."""
    b, c, t, h, w = shape
    coarse = draw("video", (b, c, max(2, t // 4 + 1), max(2, h // 8), max(2, w // 8)), seed)
    fine = draw("texture", (b, c, t, h, w), seed)
    smooth = torch.nn.functional.interpolate(coarse, size=(t, h, w), mode="trilinear", align_corners=False)
    return torch.tanh(smooth + 0.15 * fine)


def latent(shape: Shape, seed: int) -> Tensor:
    """A standard normal latent, (b, z, t, h, w)."""
    return draw("latent", shape, seed)
