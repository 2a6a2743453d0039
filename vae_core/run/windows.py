"""How a clip is cut in time, and padded to what a network takes: pure functions, tested with an identity model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..families import Compression, Windows


def rechunk(clips: Iterable[Tensor], windows: Windows) -> Iterator[Tensor]:
    """Cut a stream of clips (b, c, t, h, w), of any t, into chunks; the last may be shorter.

    Holds one chunk. A chunk that lies within one clip is a view of it. A clip may be written over once the next is
    asked for.
    """
    held: list[Tensor] = []
    count, need, fresh = 0, windows.first, False
    for clip in clips:
        held.append(clip)
        count += clip.shape[2]
        fresh = fresh or clip.shape[2] > 0
        while count >= need:
            joined = held[0] if len(held) == 1 else torch.cat(held, dim=2)
            yield joined[:, :, :need]
            rest = joined[:, :, need - windows.overlap :]
            held = [rest if len(held) == 1 else rest.clone()]  # a clone, so that `joined` is not kept alive
            count, fresh = rest.shape[2], rest.shape[2] > windows.overlap
            need = windows.overlap + windows.step
            del joined, rest
        if held:
            held[-1] = held[-1].clone()  # whoever gives the clips may write the next one where this one lies
        del clip
    if fresh:
        yield held[0] if len(held) == 1 else torch.cat(held, dim=2)


def check_whole(frames: int, height: int, width: int, compression: Compression) -> None:
    """Raise ValueError unless the clip has 1 + time * N frames and sides that are multiples of `space`."""
    time, space = compression.time, compression.space
    padded = compression.pixel_frames(compression.latent_frames(frames))
    if frames == padded and height % space == 0 and width % space == 0:
        return
    counts = f"1 + {time}N frames ({', '.join(str(1 + time * n) for n in range(3))}, ...)" if time > 1 else "any frames"
    raise ValueError(
        f"The video has {frames} frames of {width}x{height}; needed are {counts} and sides that are multiples of "
        f"{space}. Pass pad=True to repeat the last frame and the edge up to {padded} frames of "
        f"{-(-width // space) * space}x{-(-height // space) * space}, and give frames={frames}, size=({height}, "
        f"{width}) to decode, which then returns exactly what went in."
    )


def pad_space(frames: Tensor, space: int) -> Tensor:
    """Replicate the right and bottom edge of (b, c, t, h, w) up to multiples of `space`; the same tensor if it fits."""
    bottom, right = -frames.shape[-2] % space, -frames.shape[-1] % space
    return F.pad(frames, (0, right, 0, bottom, 0, 0), mode="replicate") if bottom or right else frames


def pad_stream(clips: Iterable[Tensor], compression: Compression) -> Iterator[Tensor]:
    """Pad every clip in space and, when the stream ends, repeat its last frame up to 1 + time * N frames."""
    count, last = 0, None
    for clip in clips:
        if clip.shape[2]:
            padded = pad_space(clip, compression.space)
            count += padded.shape[2]
            last = padded[:, :, -1:].clone()
            yield padded
    if last is not None:
        missing = compression.pixel_frames(compression.latent_frames(count)) - count
        if missing:
            yield last.expand(-1, -1, missing, -1, -1)


def whole_stream(clips: Iterable[Tensor], compression: Compression) -> Iterator[Tensor]:
    """Pass clips on, and raise ValueError at the first odd size, or at the end if the frames are not 1 + time * N."""
    count, height, width = 0, 0, 0
    for clip in clips:
        height, width = clip.shape[-2:]
        check_whole(1, height, width, compression)
        count += clip.shape[2]
        yield clip
    if count:
        check_whole(count, height, width, compression)
