"""How a long SVD clip is cut and put together: pure functions over latent numbers and tensors, without ComfyUI.

Tensors are SVD latents, (t, c, h, w) with the frames on the batch axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TRAINED = 25  # latents of SVD-XT; the first SVD had 14
FUSES = ("pyramid", "linear", "overlap-linear")
_SMALLEST_DEVIATION = 1e-6  # a flat channel is moved, not stretched


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


def plan_spans(latents: int, length: int, overlap: int) -> list[Span]:
    """Spans of `length` that share at least `overlap` latents; the last is moved back, so that all are equally long."""
    if latents <= length:
        return [Span(0, latents, 0)]
    starts = [*range(0, latents - length, length - overlap), latents - length]
    stops = [0, *(start + length for start in starts)]
    return [Span(start, start + length, max(0, stop - start)) for start, stop in zip(starts, stops, strict=False)]


def fusing_weights(spans: Sequence[Span], fuse: str) -> list[Tensor]:
    """One weight per latent of each span; over all spans, those of one latent sum to one.

    fuse: "pyramid" trusts the middle of a window most; "linear" its first latent most, falling evenly to the last;
    "overlap-linear" cross-fades where windows overlap.
    """
    shapes = [_shape(spans, index, fuse) for index in range(len(spans))]
    total = torch.zeros(spans[-1].stop)
    for span, shape in zip(spans, shapes, strict=True):
        total[span.start : span.stop] += shape
    return [shape / total[span.start : span.stop] for span, shape in zip(spans, shapes, strict=True)]


def _shape(spans: Sequence[Span], index: int, fuse: str) -> Tensor:
    """The weights of one span before they are brought to a sum of one."""
    length = spans[index].length
    rising = torch.arange(1.0, length + 1)
    falling = rising.flip(0)
    if fuse == "pyramid":
        return torch.minimum(rising, falling)
    if fuse == "linear":
        return falling
    before = spans[index].known
    after = spans[index + 1].known if index + 1 < len(spans) else 0
    weight = torch.ones(length)
    weight = torch.minimum(weight, rising / (before + 1))
    return torch.minimum(weight, falling / (after + 1))


def repeat_noise(noise: Tensor, length: int, overlap: int, seed: int) -> Tensor:
    """FreeNoise: latents after the first `length` get the noise of earlier ones, shuffled within each stride.

    Every window then starts from the same noise in another order, which keeps windows alike. A new tensor.
    """
    noise = noise.clone()
    generator = torch.Generator().manual_seed(seed)
    stride = length - overlap
    for start in range(0, noise.shape[0] - length, stride):
        count = min(stride, noise.shape[0] - start - length)
        order = start + torch.randperm(count, generator=generator)
        noise[start + length : start + length + count] = noise[order.to(noise.device)]
    return noise


def carry_mask(latents: int, carried: int, faded: int) -> Tensor:
    """(latents,) how new each latent of a chunk is: 0 kept as carried over, 1 sampled, a ramp over the last `faded`."""
    faded = min(faded, carried)
    mask = torch.ones(latents)
    mask[: carried - faded] = 0
    mask[carried - faded : carried] = torch.arange(1.0, faded + 1) / (faded + 1)
    return mask


def statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over frames and pixels, (1, c, 1, 1)."""
    deviation, mean = torch.std_mean(latents, dim=(0, 2, 3), keepdim=True, correction=0)
    return mean, deviation


def match_statistics(
    latents: Tensor, have: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], strength: float | Tensor
) -> Tensor:
    """`latents` moved and stretched, channel by channel, from the statistics they have towards those wanted.

    strength: 0 leaves them, 1 goes all the way; a tensor gives each latent its own.
    """
    (mean, deviation), (new_mean, new_deviation) = have, want
    matched = (latents - mean) / deviation.clamp_min(_SMALLEST_DEVIATION) * new_deviation + new_mean
    return latents + (matched - latents) * strength


def even_out(latents: Tensor, spans: Sequence[Span], weights: Sequence[Tensor], strength: float) -> Tensor:
    """A clip whose every window has the statistics of the first, as far as `strength` (0 to 1) says."""
    want = statistics(latents[spans[0].start : spans[0].stop])
    out = torch.zeros_like(latents)
    for index, (span, weight) in enumerate(zip(spans, weights, strict=True)):
        part = latents[span.start : span.stop]
        if index:
            part = match_statistics(part, statistics(part), want, strength)
        out[span.start : span.stop] += part * weight.to(part).reshape(-1, 1, 1, 1)
    return out


def describe_spans(spans: Sequence[Span], limit: int = 6) -> str:
    """The spans as text, such as "0-24, 19-43, 38-62"; the middle of a long list is left out."""
    told = [f"{span.start}-{span.stop - 1}" for span in spans]
    if len(told) > limit:
        told = [*told[: limit - 2], "...", told[-1]]
    return ", ".join(told)
