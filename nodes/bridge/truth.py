"""What a decode gives back: the true length and size where they are known, and a sentence where not; finite values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...vae_core import NotFiniteError
from ...vae_core.families import FAMILIES, Compression
from .latent import MOVED
from .wire import FACTS, Facts, Layout, read_facts, samples_of


def decoded_facts(latent: Mapping[str, Any], z: Tensor, layout: Layout, family: str) -> tuple[Facts, list[str]]:
    """The facts of `latent` with count and size of each decoded clip, and sentences on what a user may not expect.

    z: (b, z, t, h, w), the latent laid out as `layout` says. family: of the VAE that decodes it.
    """
    made, compression = read_facts(latent), FAMILIES[family].compression
    facts, told = made.decoded_by(family), list[str]()
    if facts is not made:
        told.append(f"the latent was made by {made.family}; {family} makes {compression.time} frame(s) of each latent")
    clips, _, count, rows, columns = z.shape
    available, space = compression.pixel_frames(count), compression.space
    remembered = latent[FACTS] if isinstance(latent.get(FACTS), Mapping) else {}
    frames = facts.frames
    if layout == "images":
        frames = 1
        if facts.layout == "frames":
            told.append(
                f"{clips} separate images, as latent_layout in Load Video VAE says, of a latent that was encoded as "
                "one clip"
            )
    elif layout == "frames" and facts.layout == "images":
        frames = None
        told.append(
            f"one clip of {available} frames, as latent_layout in Load Video VAE says, of a latent that was "
            "encoded as separate images"
        )
    elif frames is None and facts is made and isinstance(remembered.get("frames"), int):
        told.append(_other_length(remembered["frames"], count, compression))
    if remembered.get(MOVED):
        told.append(
            f"the latent was mirrored or turned, so that padding may lie on any side: all {columns * space}x"
            f"{rows * space} pixels are given"
        )
    elif facts.size is None and _was_padded(remembered, space):
        told.append(
            f"the latent is of {columns * space}x{rows * space} pixels now, and was made of "
            f"{remembered['width']}x{remembered['height']}: what padding it has is not known, and all is given"
        )
    if clips > 1 and layout != "images":
        told.append(f"{clips} clips of {frames or available} frames, one after another")
    height, width = facts.size or (rows * space, columns * space)
    return replace(facts, frames=frames or available, height=height, width=width), told


def _was_padded(remembered: Mapping[str, Any], space: int) -> bool:
    """Whether the video had a side that is no whole number of latents, so that it was padded."""
    sides = [remembered.get(side) for side in ("height", "width")]
    return all(isinstance(side, int) for side in sides) and any(side % space for side in sides)


def check_finite(latent: Mapping[str, Any]) -> None:
    """Raise ValueError, with the remedy, where the latent itself holds NaN or infinity."""
    samples = samples_of(latent)
    axis = 2 if samples.ndim == 5 else 0
    broken = (~torch.isfinite(samples)).movedim(axis, 0).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"The latent holds NaN or infinity in {len(broken)} of its {samples.shape[axis]} latents, the first being "
            f"number {broken[0]}: the node before made it so. A sampler does with too strong a guidance or an fp16 "
            "model; latent arithmetic does where it divides by zero. Change that node; the VAE is not the cause."
        )


def _other_length(frames: int, count: int, compression: Compression) -> str:
    """The sentence for a latent of `count` latents that says it is of `frames` frames."""
    made = compression.latent_frames(frames)
    available = compression.pixel_frames(count)
    sentence = f"the latent has {count} latents now, and was made with {made}: all {available} frames are given"
    if count % made == 0:
        sentence += (
            f"; taken as one clip. If these are {count // made} clips, put Latent Layout before this node, with clips "
            f"{count // made}"
        )
    return sentence


def guarded(stream: Iterator[Tensor]) -> Iterator[Tensor]:
    """Pass chunks on; raise NotFiniteError at the first that is not finite."""
    for index, chunk in enumerate(stream):
        if not torch.isfinite(chunk).all():
            raise NotFiniteError(index)
        yield chunk


def explained(stream: Iterator[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Pass chunks on; where they are not finite, raise ValueError with the remedy."""
    try:
        yield from stream
    except NotFiniteError as error:
        remedy = (
            "float16 overflowed: choose bf16 or fp32 as dtype in Load Video VAE."
            if dtype == torch.float16
            else "The input holds NaN or infinity already: look at the node before, or lower its strength."
        )
        raise ValueError(f"Chunk {error.chunk} of the result holds NaN or infinity. {remedy}") from error
