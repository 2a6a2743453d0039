"""The convolutions of CV-VAE, whose frames at both ends see repeated frames or zeros."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.clip import Clip, empty, laid_out
from ...nn.convolution import Triple, convolve
from ...nn.layers import SpacePadding, conv_input, in_time, neighbouring_taps
from ...nn.norm import Activation, summed, wide
from ...nn.operators import put
from ...nn.region import ENLARGE, NEIGHBOURS, Reach
from ...nn.steps import Context, Layer


class ClipConv(nn.Conv3d, Layer):
    """A 3x3x3 convolution with its own padding in time and space.

    time: frames in front and after, repeated where `time_replicate`, else zeros. space_padding: of the frame's border.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        *,
        time: tuple[int, int],
        time_replicate: bool,
        space_padding: SpacePadding,
        stride: Triple = (1, 1, 1),
        reach: Reach = NEIGHBOURS,
    ) -> None:
        nn.Conv3d.__init__(self, width_in, width_out, 3, stride)
        self.time = time
        self.time_replicate = time_replicate
        self.space_padding: SpacePadding = space_padding
        self.reach = reach

    def forward(self, clip: Clip, at: Context, activation: Activation | None = None) -> Clip:  # type: ignore[override]
        """(b, width_in, t, h, w) to (b, width_out, t', h', w')."""
        x, _, own = conv_input(clip, at, activation, self.reach, self.space_padding)
        return in_time(self.over_time(x, self.weight, own, plain=at.plain), at)

    def over_time(
        self, x: Tensor, weight: Tensor, padding: tuple[int, int], *, plain: bool
    ) -> Iterator[tuple[int, Tensor]]:
        """What `weight` gives for a clip whose other padding in space is there already, as (first frame, frames) in
        order.

        Frames at either end, which see repeated frames or zeros, get a kernel of the taps that are left. Where the
        weights are larger than the clip it is padded instead: making such kernels would cost more than it saves.
        """
        stride = self.stride[0], self.stride[1], self.stride[2]
        run = partial(convolve, bias=self.bias, stride=stride, padding=(0, *padding), plain=plain)
        if x.numel() < weight.numel():
            mode = "replicate" if self.time_replicate else "constant"
            yield 0, run(laid_out(F.pad(x, (0, 0, 0, 0, *self.time), mode=mode)), weight)
            return
        for start, length, source, taps in runs_in_time(x.shape[2], stride[0], self.time, self.time_replicate):
            kernel = weight if taps == WHOLE else torch.cat([_summed(weight, several) for several in taps], dim=2)
            yield start, run(x[:, :, source : source + stride[0] * (length - 1) + len(taps)], kernel)


def _summed(weight: Tensor, taps: tuple[int, ...]) -> Tensor:
    """Taps that see the same frame as one."""
    first, *others = (weight[:, :, tap : tap + 1] for tap in taps)
    return sum(others, first.to(wide(weight.dtype))).to(weight.dtype) if others else first


WHOLE = ((0,), (1,), (2,))


class TimeRun(NamedTuple):
    """`length` frames from `start` on, of frames from `source` on. taps: those that each frame of the kernel sums."""

    start: int
    length: int
    source: int
    taps: tuple[tuple[int, ...], ...]


def runs_in_time(frames: int, stride: int, padding: tuple[int, int], replicate: bool) -> tuple[TimeRun, ...]:
    """The output frames of a kernel of three taps, in runs that see the same taps."""
    runs: list[TimeRun] = []
    for start in range((frames + sum(padding) - 3) // stride + 1):
        taps: dict[int, tuple[int, ...]] = {}
        for tap in range(3):
            source = start * stride - padding[0] + tap
            if replicate or 0 <= source < frames:
                source = min(max(source, 0), frames - 1)
                taps[source] = (*taps.get(source, ()), tap)
        run = TimeRun(start, 1, min(taps), tuple(taps.values()))
        if runs and runs[-1].taps == run.taps == WHOLE:
            last = runs.pop()
            run = last._replace(length=last.length + 1)
        runs.append(run)
    return tuple(runs)


class Upsample(Layer):
    """Space x2; with `double_time` also T -> 2T - 1: every frame becomes two and the very first is dropped."""

    reach = ENLARGE

    def __init__(self, width: int, *, double_time: bool, space_padding: SpacePadding) -> None:
        super().__init__()
        self.parts = 2 if double_time else 1
        self.conv = ClipConv(width, width * self.parts, time=(1, 1), time_replicate=True, space_padding=space_padding)

    def forward(self, clip: Clip, at: Context, activation: Activation | None = None) -> Clip:
        """(b, width, t, h, w) to (b, width, t or 2t - 1, 2h, 2w), less what a side inside the frame cannot give."""
        b, c, t, height, width = clip.shape
        padding = NEIGHBOURS.padding(at.border)
        axes = Phases(height, padding.top, padding.bottom), Phases(width, padding.left, padding.right)
        x, _, own = conv_input(clip, at, activation, NEIGHBOURS, self.conv.space_padding)
        out = empty((b, c, self.parts * t - (self.parts - 1), axes[0].size, axes[1].size), x)
        for phase, kernel in enumerate(at.kernel(self, "phases", lambda: summed(self.conv.weight, phase_kernels))):
            rows, columns = (axis.of(n) for axis, n in zip(axes, divmod(phase, 2), strict=True))
            y = self.conv.over_time(x, kernel, own, plain=at.plain)  # held no longer than until it is put
            self._put(list(y), (rows[0], columns[0]), out[..., rows[1], columns[1]], plain=at.plain)
        return Clip([out])

    def _put(self, y: list[tuple[int, Tensor]], valid: tuple[slice, slice], out: Tensor, *, plain: bool) -> None:
        """One phase of the pixels: channels are read as (n, c), and part n of frame f becomes frame n * f + part, of
        which the very first is dropped."""
        c, n = out.shape[1], self.parts
        for part in range(n):
            dropped = int(part < n - 1)
            target = out[:, :, (part - (n - 1)) % n :: n]
            own = [
                frames[:, part * c : part * c + c, max(0, dropped - start) :, valid[0], valid[1]] for start, frames in y
            ]
            clip = Clip(own, ((0, max(0, start - dropped)) for start, _ in y))
            if plain:
                for x, place in clip.of(target):
                    place.copy_(x)
            else:
                put(clip, target)


class Phases(NamedTuple):
    """One axis of an image twice as large: even and odd pixels, each made by a kernel of two taps.

    n: pixels of the small one. low, high: whether it is padded there by one. A side that is not padded gives no pixel
    that needs a neighbour beyond it.
    """

    n: int
    low: int
    high: int

    @property
    def size(self) -> int:
        """Pixels of the large one."""
        return 2 * self.n - 2 + self.low + self.high

    def of(self, phase: int) -> tuple[slice, slice]:
        """Which of the kernel's results are pixels of this phase, and which pixels they are."""
        start = self.low if phase else 0
        count = self.n - 1 + (self.high if phase else self.low)
        first = self.low if phase else 1 - self.low
        return slice(start, start + count), slice(first, first + 2 * count - 1, 2)


def phase_kernels(weight: Tensor) -> Tensor:
    """(4, out, in, 3, 2, 2): the kernels by which the pixels of rows i, i + 2, ... and columns j, j + 2, ... of a clip
    enlarged by nearest x2 see the small one through `weight` (out, in, 3, 3, 3); (i, j) = (0, 0), (0, 1), (1, 0), then
    (1, 1)."""
    sums = neighbouring_taps(weight)
    return torch.stack([sums[..., i::2, j::2] for i in (0, 1) for j in (0, 1)])
