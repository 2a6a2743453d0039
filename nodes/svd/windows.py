"""How a long SVD clip is cut into chunks: pure functions over latent numbers and tensors, without ComfyUI.

Tensors are SVD latents, (t, c, h, w) with the frames on the batch axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

TRAINED = 25  # latents of SVD-XT; the first SVD had 14


@dataclass(frozen=True)
class Span:
    """Latents `start` to `stop` of the clip; the first `known` of them belong to the span before, too."""

    start: int
    stop: int
    known: int

    @property
    def length(self) -> int:
        """Latents in the span."""
        return self.stop - self.start


def check_overlap(name: str, length: int, overlap: int, least: int = 0) -> None:
    """Raise ValueError unless spans of `length` that share `overlap` latents get on."""
    if least <= overlap < length:
        return
    raise ValueError(
        f"{name} is {overlap} and window_length {length}; allowed are {least} to {length - 1}. Lower {name} or raise "
        "window_length, so that every window has new latents."
    )


def count_spans(latents: int, length: int, overlap: int) -> int:
    """Spans of `length` that share at least `overlap` latents, for a clip of `latents`."""
    return 1 + max(0, -(-(latents - length) // (length - overlap)))


def most_latents(spans: int, length: int, overlap: int) -> int:
    """The longest clip that `spans` spans cover."""
    return length + (spans - 1) * (length - overlap)


def plan_spans(latents: int, length: int, overlap: int, first: int = 0) -> list[Span]:
    """As few spans of `length` as share at least `overlap` latents, spread evenly from `first` on to the end."""
    rest = latents - first
    if rest <= length:
        return [Span(first, latents, 0)]
    gaps = count_spans(rest, length, overlap) - 1
    starts = [first + (2 * index * (rest - length) + gaps) // (2 * gaps) for index in range(gaps + 1)]
    stops = [first, *(start + length for start in starts)]
    return [Span(start, start + length, max(0, stop - start)) for start, stop in zip(starts, stops, strict=False)]


def repeat_noise(noise: Tensor, spans: Sequence[Span], seed: int) -> Tensor:
    """FreeNoise: the new latents of every span get the noise of those that it leaves behind, shuffled.

    Every span then starts from the same noise in another order, which keeps spans alike. A new tensor.
    """
    noise = noise.clone()
    generator = torch.Generator().manual_seed(seed)
    for before, span in pairwise(spans):
        count = span.stop - before.stop
        order = before.start + torch.randperm(count, generator=generator)
        noise[before.stop : span.stop] = noise[order.to(noise.device)]
    return noise


def carry_mask(latents: int, carried: int, faded: int) -> Tensor:
    """(latents,) how new each latent of a chunk is: 0 kept as carried over, 1 sampled, a ramp over the last `faded`."""
    faded = min(faded, carried)
    mask = torch.ones(latents)
    mask[: carried - faded] = 0
    mask[carried - faded : carried] = torch.arange(1.0, faded + 1) / (faded + 1)
    return mask


def describe_runs(runs: Sequence[tuple[int, int]], limit: int = 6) -> str:
    """(first, last) latents as text, such as "0-24, 19-43, 38-62"; the middle of a long list is left out."""
    told = [f"{first}-{last}" for first, last in runs]
    if len(told) > limit:
        told = [*told[: limit - 2], "...", told[-1]]
    return ", ".join(told)
