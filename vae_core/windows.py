"""How a clip is cut in time: pure functions, tested with an identity model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TIME = 4  # pixel frames per latent, after the first
SPACE = 8  # pixels per latent, in height and in width


@dataclass(frozen=True, kw_only=True)
class Windowing:
    """Windows over time: `first` frames, then `step` new ones at a time behind `overlap` old ones."""

    first: int
    step: int
    overlap: int


def rechunk(pieces: Iterable[Tensor], windowing: Windowing) -> Iterator[Tensor]:
    """Cut a stream of (b, c, t, h, w) pieces, of any t, into the windows of `windowing`; the last may be shorter.

    Holds one window. A window that lies within one piece is a view of it.
    """
    held: list[Tensor] = []
    count, need, fresh = 0, windowing.first, False
    for piece in pieces:
        held.append(piece)
        count += piece.shape[2]
        fresh = fresh or piece.shape[2] > 0
        while count >= need:
            joined = held[0] if len(held) == 1 else torch.cat(held, dim=2)
            yield joined[:, :, :need]
            rest = joined[:, :, need - windowing.overlap :]
            held = [rest if len(held) == 1 else rest.clone()]  # a clone, so that `joined` is not kept alive
            count, fresh = rest.shape[2], rest.shape[2] > windowing.overlap
            need = windowing.overlap + windowing.step
            del joined, rest
    if fresh:
        yield held[0] if len(held) == 1 else torch.cat(held, dim=2)


def latent_frames(frames: int) -> int:
    """Latents of a clip of `frames` pixel frames, once it is padded to 1 + 4N."""
    return 1 + -(-(frames - 1) // TIME)


def pixel_frames(latents: int) -> int:
    """Pixel frames that `latents` latents decode to."""
    return 1 + TIME * (latents - 1)


def check_whole(frames: int, height: int, width: int) -> None:
    """Raise ValueError unless the clip has 1 + 4N frames and sides that are multiples of 8."""
    if frames == pixel_frames(latent_frames(frames)) and height % SPACE == 0 and width % SPACE == 0:
        return
    padded = pixel_frames(latent_frames(frames))
    raise ValueError(
        f"The video has {frames} frames of {width}x{height}; needed are 1 + 4N frames (1, 5, 9, ...) and sides that "
        f"are multiples of {SPACE}. Pass pad=True to repeat the last frame and the edge up to {padded} frames of "
        f"{-(-width // SPACE) * SPACE}x{-(-height // SPACE) * SPACE}, and give frames={frames}, size=({height}, "
        f"{width}) to decode, which then returns exactly what went in."
    )


def pad_space(frames: Tensor) -> Tensor:
    """Replicate the right and bottom edge of (b, c, t, h, w) up to multiples of 8; the same tensor if it fits."""
    bottom, right = -frames.shape[-2] % SPACE, -frames.shape[-1] % SPACE
    return F.pad(frames, (0, right, 0, bottom, 0, 0), mode="replicate") if bottom or right else frames


def pad_stream(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Pad every piece in space and, when the stream ends, repeat its last frame up to 1 + 4N frames."""
    count, last = 0, None
    for piece in pieces:
        if piece.shape[2]:
            piece = pad_space(piece)
            count += piece.shape[2]
            last = piece[:, :, -1:]
            yield piece
    if last is not None:
        missing = pixel_frames(latent_frames(count)) - count
        if missing:
            yield last.expand(-1, -1, missing, -1, -1)


def whole_stream(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Pass pieces on, and raise ValueError at the first odd size, or at the end if the frames are not 1 + 4N."""
    count, height, width = 0, 0, 0
    for piece in pieces:
        height, width = piece.shape[-2:]
        check_whole(1, height, width)
        count += piece.shape[2]
        yield piece
    if count:
        check_whole(count, height, width)
