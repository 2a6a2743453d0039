"""Convolutions of clips, by whatever suits the device.

"conv3d" is torch's own. "taps" makes every output frame by one 2-D convolution whose channels are those of all frames
that it reads, side by side: the same sums, rounded once. It is for torch builds that compute half precision conv3d by a
huge matrix of columns (2.9), for AMD and for MPS. Which of the two a device and type gets is measured once.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .clip import clip_of, empty, frames_of, laid_out, memory_format

Backend = Literal["conv3d", "taps"]
BACKENDS: tuple[Backend, Backend] = ("conv3d", "taps")
Triple = tuple[int, int, int]
Pair = tuple[int, int]

SLOWER = 1.15  # conv3d may take this much longer than taps, which copies its input
LARGER = 3.0  # conv3d may need this much more memory than taps
FARTHEST = 0.05  # from the exact result, in units of its standard deviation; bfloat16 stays below a fifth of it
PROBE = (1, 128, 4, 128, 128)  # b c t h w
REPEATS = 3
LONGEST = 10**10  # FLOP on a CPU between two moments at which a run can be ended
LEAST_ROWS = 32

_between: ContextVar[Callable[[], None] | None] = ContextVar("between", default=None)

_log = logging.getLogger("cviv-vae")


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: Triple = (1, 1, 1),
    padding: Triple = (0, 0, 0),
    plain: bool = False,
) -> Tensor:
    """`torch.nn.functional.conv3d` of (b, c, t, h, w) with zero padding. plain: autograd or a compiler follows."""
    if plain:
        return F.conv3d(x, weight, bias, stride, padding)
    if x.device.type == "cpu":
        return _on_cpu(x, weight, bias, stride, padding)
    if choose_backend(x.device, x.dtype) == "taps":
        return _by_taps(x, weight, bias, stride, padding)
    return F.conv3d(x, weight, bias, stride, padding)


def convolve_frames(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    plain: bool = False,
) -> Tensor:
    """A 2-D convolution of every frame of (b, c, t, h, w); weight: (c', c, kh, kw)."""
    contiguous = memory_format(x.device) == torch.contiguous_format
    if contiguous and (x.shape[2] > 1 or _asked(x) is not None):  # frames would have to be copied
        return convolve(x, weight[:, :, None], bias, stride=(1, *stride), padding=(0, *padding), plain=plain)
    return clip_of(F.conv2d(frames_of(x), weight, bias, stride, padding), x.shape[0])


def enlarge_frames(x: Tensor, kernel: Tensor, bias: Tensor | None, *, padding: Pair) -> Tensor:
    """A transposed 2-D convolution of stride 2 of every frame of (b, c, t, h, w); kernel: (c, c', 4, 4).

    padding: rows and columns that are left out of the result, on both sides.
    """
    between = _asked(x)
    frames = frames_of(x).contiguous(memory_format=torch.channels_last)  # twice as fast, on a CPU too
    parts: list[Tensor] = []
    for several in frames.split(1 if between else frames.shape[0]):
        parts.append(F.conv_transpose2d(several, kernel, bias, 2, padding))
        if between:
            between()
    return clip_of(parts[0] if len(parts) == 1 else torch.cat(parts), x.shape[0])


@contextmanager
def interruptible(between: Callable[[], None] | None) -> Generator[None]:
    """Call `between` now and then while a convolution runs on a CPU, where a large one takes seconds; what it raises
    ends the convolution. None: convolutions run in one go."""
    token = _between.set(between)
    try:
        yield
    finally:
        _between.reset(token)


def _asked(x: Tensor) -> Callable[[], None] | None:
    """What is to be called in the middle of a convolution of `x`."""
    return None if x.device.type != "cpu" or torch.compiler.is_compiling() else _between.get()


def _on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Triple, padding: Triple) -> Tensor:
    """In one go or, where it may be interrupted, so many frames or rows at a time as take some tenths of a second."""
    between, (b, _, t, h, w) = _asked(x), x.shape
    counts = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip((t, h, w), weight.shape[2:], stride, padding, strict=True)]
    row = 2 * weight.numel() * b * counts[2]  # FLOP
    frames = counts[0] if padding[0] else max(1, LONGEST // (row * counts[1]))
    rows = max(LEAST_ROWS, LONGEST // (row * min(frames, counts[0])))
    if between is None or (frames >= counts[0] and rows >= counts[1]):
        return _in_one_go(x, weight, bias, stride, padding)
    out = x.new_empty((b, weight.shape[0], *counts))
    for f in range(0, counts[0], frames):
        some = out[:, :, f : f + frames]
        source = (
            x if padding[0] else x[:, :, f * stride[0] :][:, :, : (some.shape[2] - 1) * stride[0] + weight.shape[2]]
        )
        for r in range(0, counts[1], rows):
            target = some[..., r : r + rows, :]
            first = r * stride[1] - padding[1]
            stop = first + (target.shape[3] - 1) * stride[1] + weight.shape[3]
            seen = F.pad(source[..., max(0, first) : stop, :], (0, 0, max(0, -first), max(0, stop - h)))
            target.copy_(_in_one_go(seen, weight, bias, stride, (padding[0], 0, padding[2])))
            between()
    return out


def _in_one_go(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Triple, padding: Triple) -> Tensor:
    if _suits_onednn(x):
        return torch.mkldnn_convolution(x.contiguous(), weight.contiguous(), bias, padding, stride, (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, stride, padding)


def _suits_onednn(x: Tensor) -> bool:
    """Whether torch would leave its fast CPU library for an input this small, where it is several times slower."""
    small = x.shape[0] * x.shape[1] * x.shape[2] * x.shape[3] <= 20480
    plain = min(x.shape[-2:]) > 1  # it reads frames of one row or column wrongly
    return small and plain and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _by_taps(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Triple, padding: Triple) -> Tensor:
    taps = weight.transpose(1, 2)  # c' kt c kh kw
    b, _, t, h, w = x.shape
    counts = ((n + 2 * p - k) // s + 1 for n, k, s, p in zip((t, h, w), weight.shape[2:], stride, padding, strict=True))
    out = empty((b, weight.shape[0], *counts), x)
    for i in range(out.shape[2]):
        first = i * stride[0] - padding[0]
        inside = range(max(0, -first), min(weight.shape[2], t - first))  # frames of zeros add nothing
        window = torch.cat([x[:, :, first + tap] for tap in inside], dim=1)  # b kt*c h w
        kernel = taps[:, inside.start : inside.stop].flatten(1, 2)
        out[:, :, i] = F.conv2d(window, kernel, bias, stride[1:], padding[1:])
    return out


# ------------------------------------------------------------------------------------------------ the choice


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one convolution took. seconds: the best of a few runs. nbytes: memory beyond what was held before. error:
    largest difference from the exact result, in units of its standard deviation."""

    seconds: float
    nbytes: int
    error: float


def choose_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend that suits a device and type: measured once per process on GPUs, "conv3d" on a CPU.

    Takes some milliseconds and 100 MB at the first call for a device and type; logs what was found.
    """
    if device.type in ("cpu", "meta"):
        return "conv3d"
    return _measured(device, dtype)


def decide(measure: Callable[[Backend], Cost]) -> tuple[Backend, str]:
    """The better backend by what `measure` finds, and why. A measurement may raise RuntimeError: that one is unfit."""
    found: dict[Backend, Cost] = {}
    why: list[str] = []
    for backend in BACKENDS:
        try:
            cost = measure(backend)
        except torch.cuda.OutOfMemoryError:  # says nothing about the backend, and must not be remembered
            raise
        except RuntimeError as error:
            why.append(f"{backend} fails ({error})")
            continue
        if cost.error <= FARTHEST:
            found[backend] = cost
            why.append(f"{backend} {cost.seconds * 1e3:.2f} ms and {cost.nbytes / 2**20:.0f} MiB")
        else:
            why.append(f"{backend} is wrong by {cost.error:.1e} standard deviations")
    own, taps = found.get("conv3d"), found.get("taps")
    better = taps and (not own or own.seconds > SLOWER * taps.seconds or own.nbytes > LARGER * taps.nbytes)
    return ("taps" if better else "conv3d"), ", ".join(why)


def measure(backend: Backend, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...] = PROBE) -> Cost:
    """Run a 3x3x3 convolution of (b, c, t, h, w) = `shape` to as many channels, laid out as in a network."""
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        random = torch.Generator().manual_seed(0)
        exact_x = torch.randn(shape, generator=random)
        exact_weight = torch.randn(shape[1], shape[1], 3, 3, 3, generator=random) / (27 * shape[1]) ** 0.5
        x, weight = (laid_out(value.to(device, dtype)) for value in (exact_x, exact_weight))
        run = functools.partial(_by_taps if backend == "taps" else F.conv3d, x, weight, None, (1, 1, 1), (0, 1, 1))
        corner = (..., slice(0, 4), slice(0, 4))
        exact = F.conv3d(exact_x[..., :5, :5], exact_weight, None, 1, (0, 1, 1))[corner]
        error = float((run()[corner].float().cpu() - exact).abs().max() / exact.std())  # libraries load here, too
        seconds: list[float] = []
        held = _memory(device, reset=True)
        for _ in range(REPEATS):
            start = time.perf_counter()
            run()
            wait_for(device)
            seconds.append(time.perf_counter() - start)
        return Cost(seconds=min(seconds), nbytes=_memory(device, reset=False) - held, error=error)


@functools.cache
def _measured(device: torch.device, dtype: torch.dtype) -> Backend:
    backend, found = decide(lambda backend: measure(backend, device, dtype))
    _log.info("3-D convolutions on %s in %s by %s (torch %s): %s.", device, dtype, backend, torch.__version__, found)
    return backend


def wait_for(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type != "cpu" and (module := torch.get_device_module(device)) and hasattr(module, "synchronize"):
        module.synchronize()


def _memory(device: torch.device, *, reset: bool) -> int:
    """Bytes held now (`reset`) or at most since then; 0 where nothing counts peaks. Waits for the device."""
    wait_for(device)
    if device.type not in ("cuda", "xpu"):
        return 0
    module = torch.get_device_module(device)
    if not reset:
        return module.max_memory_allocated(device)
    module.reset_peak_memory_stats(device)
    return module.memory_allocated(device)
