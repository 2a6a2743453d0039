"""3-D convolutions on devices whose own are slow, missing or wrong, and over more elements than their indices reach.

Backends: "conv3d" is torch's own. "taps" makes every output frame by one 2-D convolution whose channels are those of
all frames that it reads, side by side: the same sums, rounded once, for torch builds that compute half precision
conv3d by a huge matrix of columns (2.9), for AMD and for MPS. `choose_backend` measures which one suits a device.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ConvolutionBackend = Literal["conv3d", "taps"]
Triple = tuple[int, int, int]

LIMIT = 2**31 - 1  # elements of one tensor that convolutions of GPU libraries can count
SLOWER = 1.15  # conv3d may take this much longer than taps, which copies its input
LARGER = 3.0  # conv3d may need this much more memory than taps
PROBE = (1, 128, 4, 128, 128)  # b c t h w
REPEATS = 3

_log = logging.getLogger("cviv-vae")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one convolution took. seconds: the best of a few runs. nbytes: memory beyond what was held before."""

    seconds: float
    nbytes: int


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Triple = (1, 1, 1),
    padding: Triple = (0, 0, 0),
    backend: ConvolutionBackend = "conv3d",
    limit: int = LIMIT,
) -> Tensor:
    """`torch.nn.functional.conv3d` with zero padding, by `backend`, in parts where a tensor has over `limit` elements.

    x: (b, c, t, h, w). weight: (c', c, kt, kh, kw). bias: (c',). Returns (b, c', t', h', w'); gradients pass. Parts are
    batch rows, then frames, then rows; they give the same values as the whole.
    Raises ValueError where shapes do not fit, the padding is as large as the kernel, or no part is within the limit.
    """
    if x.ndim != 5 or weight.ndim != 5 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"convolve takes x (b, c, t, h, w) and weight (c', c, kt, kh, kw) with the same c; got "
            f"{tuple(x.shape)} and {tuple(weight.shape)}."
        )
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)
    shape = (x.shape[0], weight.shape[0], *((n + 2 * p - k) // s + 1 for n, k, s, p in sizes))
    if min(shape[2:]) < 1 or any(p >= k for p, k in zip(padding, weight.shape[2:], strict=True)):
        raise ValueError(
            f"A kernel of {tuple(weight.shape[2:])} (t, h, w) must fit into the padded clip and be larger than the "
            f"padding; got a clip of {tuple(x.shape[2:])} and padding {padding}."
        )
    if max(x.numel(), math.prod(shape)) > limit:
        return _in_parts(x, weight, bias, stride, padding, backend, limit, shape)
    if backend == "taps":
        return _by_taps(x, weight, bias, stride, padding, shape)
    return F.conv3d(x, weight, bias, stride, padding)


def choose_backend(device: torch.device, dtype: torch.dtype) -> ConvolutionBackend:
    """The backend that suits a device and type: measured once per process on GPUs, "conv3d" on a CPU.

    Takes some milliseconds and 100 MB at the first call for a device and type; logs what was found.
    """
    if device.type in ("cpu", "meta"):
        return "conv3d"
    return _measured(device, dtype)


def decide(measure: Callable[[ConvolutionBackend], Cost]) -> tuple[ConvolutionBackend, str]:
    """The better backend by what `measure` finds, and why. A measurement may raise RuntimeError: that one is unfit."""
    try:
        taps = measure("taps")
    except RuntimeError as error:
        return "conv3d", f"taps fails ({error})"
    try:
        own = measure("conv3d")
    except RuntimeError as error:
        return "taps", f"conv3d fails ({error})"
    found = (
        f"conv3d {own.seconds * 1e3:.2f} ms and {own.nbytes / 2**20:.0f} MiB, "
        f"taps {taps.seconds * 1e3:.2f} ms and {taps.nbytes / 2**20:.0f} MiB"
    )
    fit = own.seconds <= SLOWER * taps.seconds and own.nbytes <= LARGER * taps.nbytes
    return ("conv3d" if fit else "taps"), found


def measure(
    backend: ConvolutionBackend, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int, int] = PROBE
) -> Cost:
    """Run a 3x3x3 convolution of (b, c, t, h, w) = `shape` to as many channels; raises RuntimeError where it fails."""
    with torch.inference_mode():
        x = torch.randn(shape, dtype=torch.float32).to(device, dtype)
        weight = torch.randn(shape[1], shape[1], 3, 3, 3).to(device, dtype)
        run = functools.partial(convolve, x, weight, padding=(0, 1, 1), backend=backend)
        run()  # libraries load and choose here
        seconds: list[float] = []
        held = _memory(device, reset=True)
        for _ in range(REPEATS):
            start = time.perf_counter()
            run()
            _wait(device)
            seconds.append(time.perf_counter() - start)
        return Cost(seconds=min(seconds), nbytes=_memory(device, reset=False) - held)


@functools.cache
def _measured(device: torch.device, dtype: torch.dtype) -> ConvolutionBackend:
    backend, found = decide(lambda backend: measure(backend, device, dtype))
    _log.info("3-D convolutions on %s in %s by %s (torch %s): %s.", device, dtype, backend, torch.__version__, found)
    return backend


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _memory(device: torch.device, *, reset: bool) -> int:
    """Bytes held now (`reset`) or at most since then; 0 where nothing counts peaks. Waits for the device."""
    _wait(device)
    if device.type != "cuda":
        return 0
    if not reset:
        return torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _by_taps(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Triple, padding: Triple, shape: tuple[int, ...]
) -> Tensor:
    taps = weight.transpose(1, 2)  # c' kt c kh kw

    def frames() -> Iterator[Tensor]:
        for i in range(shape[2]):
            first = i * stride[0] - padding[0]
            inside = range(max(0, -first), min(weight.shape[2], x.shape[2] - first))  # frames of zeros add nothing
            window = torch.cat([x[:, :, first + tap] for tap in inside], dim=1)  # b kt*c h w
            kernel = taps[:, inside.start : inside.stop].flatten(1, 2)
            yield F.conv2d(window, kernel, bias, stride[1:], padding[1:])

    return _joined((frame[:, :, None] for frame in frames()), 2, shape, x)


def _in_parts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Triple,
    padding: Triple,
    backend: ConvolutionBackend,
    limit: int,
    shape: tuple[int, ...],
) -> Tensor:
    """Batch rows one by one, or one batch row in as few parts of its output frames, else of its rows, as fit.

    A part keeps the padding on all sides; what it computes from padding that is not at a border is dropped.
    """
    run = functools.partial(
        convolve, weight=weight, bias=bias, stride=stride, padding=padding, backend=backend, limit=limit
    )
    if shape[0] > 1:
        return _joined((run(row[None]) for row in x), 0, shape, x)
    for dim in (2, 3):
        cuts = _Cuts(x.shape[dim], shape[dim], weight.shape[dim], stride[dim - 2], padding[dim - 2])
        reads, gives = x.numel() // x.shape[dim], math.prod(shape) // shape[dim]  # elements of one frame or row
        for count in range(2, shape[dim] + 1):
            length = -(-shape[dim] // count)
            if max(reads * cuts.longest_source(length), gives * cuts.longest_result(length)) <= limit:
                parts = (run(source).narrow(dim, at, n) for source, at, n in cuts.parts(x, dim, length))
                return _joined(parts, dim, shape, x)
    raise ValueError(
        f"A convolution of {tuple(x.shape)} to {shape} cannot be cut into frames or rows of at most {limit} elements; "
        f"cut the clip into tiles or shorter groups."
    )


@dataclass(frozen=True)
class _Cuts:
    """One dimension of a convolution, cut into parts of its output; `size` and `result` are of input and output."""

    size: int
    result: int
    kernel: int
    step: int
    pad: int

    @property
    def margin(self) -> int:
        """Output positions that the padding of a part can spoil on one side."""
        return -(-self.pad // self.step)

    def longest_source(self, length: int) -> int:
        return min(self.size, (length - 1 + self.margin) * self.step - self.pad + self.kernel)

    def longest_result(self, length: int) -> int:
        return min(self.result, length + 2 * self.margin)

    def parts(self, x: Tensor, dim: int, length: int) -> Iterator[tuple[Tensor, int, int]]:
        """(what a part reads, where what it should give begins in what it gives, how long that is)."""
        for start in range(0, self.result, length):
            stop = min(start + length, self.result)
            skipped = max(0, start - self.margin)
            first, end = skipped * self.step, min(self.size, (stop - 1) * self.step - self.pad + self.kernel)
            yield x.narrow(dim, first, end - first), start - skipped, stop - start


def _joined(parts: Iterable[Tensor], dim: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Parts along `dim`, written one by one into the whole unless gradients need them all."""
    parts = iter(parts)
    first = next(parts)
    if first.requires_grad:
        return torch.cat([first, *parts], dim=dim)
    last = like.stride(1) == 1 and like.shape[1] > 1
    memory_format = torch.channels_last_3d if last else torch.contiguous_format
    out = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=memory_format)
    start = 0
    for part in itertools.chain([first], parts):
        out.narrow(dim, start, part.shape[dim]).copy_(part)
        start += part.shape[dim]
    return out
