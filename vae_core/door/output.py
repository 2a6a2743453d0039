"""Decoded frames on their way out: made into pixels where they are, and copied to RAM while the next chunk is computed.

On a GPU, two buffers of page-locked RAM take the chunks in turn, on a stream of their own, and a chunk comes out when
the next is on its way. Elsewhere, and where no RAM can be page-locked, chunks are copied one by one, at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..run.stream import is_out_of_memory

MOST_PINNED = 2**29  # bytes of one buffer of page-locked RAM, which nothing else can use; larger chunks go without
UNIT_DTYPES = (torch.float32, torch.float16)


class NotFiniteError(ValueError):
    """A result holds NaN or infinity. chunk: the number of its first chunk that does, from 0."""

    def __init__(self, chunk: int) -> None:
        super().__init__(
            f"Chunk {chunk} of the result holds NaN or infinity. In float16, load the VAE in bfloat16 or float32; in "
            "these, look at what made the latent."
        )
        self.chunk = chunk


@dataclass(frozen=True)
class Frames:
    """pixels: (b, t, h, w, 3). finite: whether all values were, before they were clamped; None where nobody asked."""

    pixels: Tensor
    finite: Tensor | None

    def in_ram(self) -> Frames:
        """The same on the CPU."""
        return Frames(self.pixels.cpu(), None if self.finite is None else self.finite.cpu())


class Courier(Protocol):
    """Carries frames to RAM through two places. What came to a place is overwritten by what is sent there next."""

    def send(self, place: int, frames: Frames) -> None: ...

    def receive(self, place: int) -> Frames: ...


# ---------------------------------------------------------------------------------------------------- pixels


def trimmed(
    chunks: Iterable[Tensor],
    overlap: int,
    frames: int | None,
    size: tuple[int, int] | None,
    *,
    start: int = 0,
    gone: int = 0,
) -> Iterator[Tensor]:
    """Decoded chunks (b, 3, t, h, w), less the `overlap` frames that each repeats of the one before.

    frames: where to stop, None for the end; size: of what comes out; what padding added goes. start: frames before this
    one are left out, gone: so many of them never came. Raises ValueError where the clip ends before `frames`.
    """
    done = gone
    for y in chunks:
        y = y[:, :, overlap if done else 0 :]
        first, stop = max(0, start - done), None if frames is None else max(0, frames - done)
        done += y.shape[2]
        y = y[:, :, first:stop]
        if y.shape[2]:
            yield y if size is None else y[..., : size[0], : size[1]]
        del y  # not while the next chunk runs
        if frames is not None and done >= frames:
            return
    if frames is not None:
        raise ValueError(
            f"frames={frames} were asked for, but the latents decode to {done} frames; give a smaller number, or "
            "leave it out."
        )


def to_uint8(frames: Tensor) -> Tensor:
    """[-1, 1] floats to 0..255, rounded and clamped, of the same shape."""
    return frames.float().clamp(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8)


def make_frames(chunk: Tensor, dtype: torch.dtype, *, check: bool = False) -> Frames:
    """Frames (b, 3, t, h, w) in [-1, 1] as pixels (b, t, h, w, 3) on the same device, clamped.

    dtype: torch.uint8 for 0 to 255, torch.float32 or torch.float16 for 0 to 1. check: note whether all values are
    finite. Made a frame at a time, so that nothing as large as the chunk is held but the result.
    """
    chunk = chunk.detach()
    b, _, t, h, w = chunk.shape
    pixels = chunk.new_empty((b, t, h, w, 3), dtype=dtype)
    finite: list[Tensor] = []
    for index, frame in enumerate(chunk.unbind(2)):  # b c h w
        if check:
            finite.append(torch.isfinite(frame).all())
        frame = frame.movedim(1, -1)  # b h w c
        pixels[:, index] = to_uint8(frame) if dtype == torch.uint8 else frame.float().add(1).div_(2).clamp_(0, 1)
    return Frames(pixels, torch.stack(finite).all() if finite else None)


def _made(chunk: Tensor, dtype: torch.dtype, check: bool) -> Frames:
    """`make_frames`, in RAM where the device is too full for it."""
    try:
        return make_frames(chunk, dtype, check=check)
    except Exception as error:
        if chunk.device.type == "cpu" or not is_out_of_memory(error):
            raise
    return make_frames(chunk.cpu(), dtype, check=check)


# ---------------------------------------------------------------------------------------------------- to RAM


class PinnedCourier:
    """Carries frames of a CUDA device, while the device computes the next."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._buffers: list[Tensor | None] = [None, None]
        self._sent: dict[int, tuple[Frames, torch.cuda.Event | None]] = {}
        self._pins = True

    def send(self, place: int, frames: Frames) -> None:
        """Begin to copy after what computes `frames`; their memory is free again once that is done."""
        room = self._room(place, frames)
        if room is None:
            self._sent[place] = frames.in_ram(), None
            return
        event = torch.cuda.Event()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for source, target in ((frames.pixels, room.pixels), (frames.finite, room.finite)):
                if source is not None and target is not None:
                    target.copy_(source, non_blocking=True)
                    source.record_stream(self._stream)
            event.record(self._stream)
        self._sent[place] = room, event

    def receive(self, place: int) -> Frames:
        """Wait for what was sent to `place`."""
        frames, event = self._sent.pop(place)
        if event is not None:
            event.synchronize()
        return frames

    def _room(self, place: int, frames: Frames) -> Frames | None:
        """Page-locked RAM for `frames`, the flag after the pixels; None where there is none."""
        pixels = frames.pixels
        nbytes = pixels.nbytes
        if not pixels.is_cuda or nbytes >= MOST_PINNED or not self._pins:
            return None
        buffer = self._buffers[place]
        if buffer is None or buffer.numel() <= nbytes:
            self._buffers[place] = buffer = None
            try:
                with torch.inference_mode(False):  # so that it can be written in any mode
                    buffer = torch.empty(nbytes + 1, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:  # the system lets nobody lock so much
                self._pins = False
                return None
            self._buffers[place] = buffer
        flag = None if frames.finite is None else buffer[nbytes].view(torch.bool)
        return Frames(buffer[:nbytes].view(pixels.dtype).view(pixels.shape), flag)


def in_turn(made: Iterator[Frames], courier: Courier) -> Iterator[Frames]:
    """What `courier` brings of `made`, in order; each comes when the next is sent, or can never be.

    It may be overwritten as soon as the next is asked for.
    """
    sent = 0
    while True:
        try:
            frames = next(made, None)
        except Exception:
            if sent:
                yield courier.receive((sent - 1) % 2)
            raise
        if frames is None:
            break
        courier.send(sent % 2, frames)
        del frames  # not while the next is made
        sent += 1
        if sent > 1:
            yield courier.receive(sent % 2)  # the one before
    if sent:
        yield courier.receive((sent - 1) % 2)


def host_frames(
    chunks: Iterable[Tensor], device: torch.device, dtype: torch.dtype, *, lent: bool = False, check: bool = False
) -> Iterator[Tensor]:
    """Chunks (b, 3, t, h, w) in [-1, 1] of `device` as (b, t, h, w, 3) in RAM, as `make_frames` makes them.

    lent: a chunk is good until the next is asked for, and not copied again for who keeps it. check: raise
    NotFiniteError at the first chunk that holds NaN or infinity. Raises ValueError for another `dtype`.
    """
    if dtype not in (torch.uint8, *UNIT_DTYPES):
        raise ValueError(
            f"Frames of {dtype} were asked for; allowed are torch.uint8 (0 to 255), torch.float32 and torch.float16 (0 "
            "to 1)."
        )
    made = map(partial(_made, dtype=dtype, check=check), chunks)  # unlike a loop, it keeps no chunk
    arrived = in_turn(made, PinnedCourier(device)) if device.type == "cuda" else map(Frames.in_ram, made)
    numbers = itertools.count()  # unlike enumerate, which keeps a chunk
    for frames in arrived:
        number = next(numbers)
        if frames.finite is not None and not bool(frames.finite):
            raise NotFiniteError(number)
        pinned = device.type == "cuda" and frames.pixels.is_pinned()
        yield frames.pixels.clone() if pinned and not lent else frames.pixels
        del frames  # not while the next is computed


def collect(
    chunks: Iterable[Tensor], total: int, *, dim: int, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Write chunks, `total` long in all along `dim`, into one tensor, allocated once; chunks may be lent.

    progress: called with (done, total) after every chunk.
    """
    out: Tensor | None = None
    done = 0
    for chunk in chunks:
        if out is None:
            out = chunk.new_empty(*chunk.shape[:dim], total, *chunk.shape[dim + 1 :])
        out.narrow(dim, done, chunk.shape[dim]).copy_(chunk)
        done += chunk.shape[dim]
        del chunk  # not while the next is computed
        if progress is not None:
            progress(done, total)
    assert out is not None
    assert done == total
    return out
