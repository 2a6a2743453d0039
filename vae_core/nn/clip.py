"""Activations on their way from layer to layer, and how they lie in memory. Tensors are (b, c, t, h, w)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from einops import rearrange
from torch import Tensor

from .region import Region


class Clip:
    """Activations (b, c, t, h, w): one tensor, or several that lie in it from some channel and frame on.

    A convolution that has several kernels leaves what each gives by itself; who reads it next puts it together while it
    computes, so nothing is copied for that alone.
    """

    __slots__ = ("places", "tensors")

    def __init__(self, tensors: Iterable[Tensor], places: Iterable[tuple[int, int]] = ((0, 0),)) -> None:
        self.tensors = list(tensors)
        self.places = list(places)  # (channel, frame) of each tensor's first

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(b, c, t, h, w) of the whole."""
        b, _, _, h, w = self.tensors[0].shape
        pairs = list(zip(self.tensors, self.places, strict=True))
        return b, max(c + x.shape[1] for x, (c, _) in pairs), max(t + x.shape[2] for x, (_, t) in pairs), h, w

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.numel() * x.element_size() for x in self.tensors)

    def shared(self) -> Clip:
        """The same tensors; to `clear` one of the two leaves the other as it is."""
        return Clip(self.tensors, self.places)

    def clear(self) -> None:
        """Let go of the tensors, which the next layer has read."""
        self.tensors.clear()

    def crop(self, region: Region, whole: Region) -> Clip:
        """The part of every tensor that shows `region`, where it shows `whole`; views."""
        return self if region == whole else Clip((region.of(x, whole) for x in self.tensors), self.places)

    def of(self, whole: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each tensor, and where it lies in (b, c, t, h, w), as a view, which autograd wants made just before it is
        written."""
        for x, (c, t) in zip(self.tensors, self.places, strict=True):
            yield x, whole[:, c : c + x.shape[1], t : t + x.shape[2]]

    def plus(self, other: Clip) -> Clip:
        """The sum, in this clip's memory where it is one tensor, else in one tensor for each run of channels."""
        if len(self.tensors) == 1:
            for x, place in other.of(self.tensors[0]):
                place.add_(x)
            return self
        b, _, t, h, w = self.shape
        sums: dict[int, Tensor] = {}
        for x, (channel, frame) in zip(self.tensors, self.places, strict=True):
            if channel not in sums:
                sums[channel] = empty((b, x.shape[1], t, h, w), x)
            frames = slice(frame, frame + x.shape[2])
            torch.add(x, other.block(channel, x.shape[1])[:, :, frames], out=sums[channel][:, :, frames])
        return Clip(sums.values(), ((channel, 0) for channel in sums))

    def block(self, channel: int, width: int) -> Tensor:
        """`width` channels from `channel` on, of all frames; a view where they lie in one tensor."""
        for x, (first, frame) in zip(self.tensors, self.places, strict=True):
            if first <= channel and channel + width <= first + x.shape[1] and not frame and x.shape[2] == self.shape[2]:
                return x[:, channel - first : channel - first + width]
        return self.tensor()[:, channel : channel + width]

    def tensor(self) -> Tensor:
        """All in one tensor; the same where it is one."""
        if len(self.tensors) == 1:
            return self.tensors[0]
        out = empty(self.shape, self.tensors[0])
        for x, place in self.of(out):
            place.copy_(x)
        return out


def memory_format(device: torch.device) -> torch.memory_format:
    """How clips lie on a device: with the channels of a pixel side by side, but on a CPU, whose convolutions sum in
    shorter chains, and so more exactly, where each channel lies by itself."""
    return torch.contiguous_format if device.type == "cpu" else torch.channels_last_3d


def laid_out(x: Tensor) -> Tensor:
    """A clip, or the kernel of a convolution, as it should lie in memory."""
    last = memory_format(x.device) == torch.channels_last_3d
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim) if last else None
    return x.contiguous() if form is None else x.contiguous(memory_format=form)


def empty(shape: Iterable[int], like: Tensor) -> Tensor:
    """An uninitialised clip of the type and device of `like`."""
    format_ = memory_format(like.device)
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=format_)


def frames_of(x: Tensor) -> Tensor:
    """(b, c, t, h, w) as (b t, c, h, w): a view of a single clip whose channels lie side by side."""
    return rearrange(x, "b c t h w -> (b t) c h w")


def clip_of(frames: Tensor, b: int) -> Tensor:
    """(b t, c, h, w) as (b, c, t, h, w): a view."""
    return rearrange(frames, "(b t) c h w -> b c t h w", b=b)
