"""Triton kernels of the functions of `norm`: one read and one write per element, several positions per program.

Tensors are (b, c, t, h, w) of any strides, contiguous or channels last, float16, bfloat16 or float32; arithmetic is
float32. Positions whose distance in memory is even are run through in one line: whole frames, or rows. Import this
only where Triton is installed.
"""

# ruff: noqa: ANN001, ANN202
# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false, reportIndexIssue=false
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# (Triton may not be installed, and it reads annotations of kernels as its own)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import norm

EPS_SQUARED = tl.constexpr(norm.EPS**2)
SIZES = ["frames", "rows", "length", "tiles", "blocks"]  # of which no kernel is compiled again when they change
TILE = 8192  # elements that one program holds at once
REPEATS = 8  # tiles that one program of the moments runs through


@triton.jit
def _base(pointer, line, frames, rows, s_b, s_t, s_r):
    """Where line `line` begins; lines count rows in frames in batch rows."""
    row = (line % rows).to(tl.int64)
    frame = (line // rows % frames).to(tl.int64)
    batch = (line // rows // frames).to(tl.int64)
    return pointer + batch * s_b + frame * s_t + row * s_r


@triton.jit(do_not_specialize=SIZES)
def _norm_kernel(
    x, mean, scale, bias, out, frames, rows, length, tiles, blocks, width, per_block, per_row,
    x_b, x_c, x_t, x_r, x_p, out_b, out_c, out_t, out_r, out_p,
    rms: tl.constexpr, silu: tl.constexpr, channels: tl.constexpr, positions: tl.constexpr,
) -> None:  # fmt: skip
    """A block of channels at a few positions of one line: with `rms` divided by their length, else less `mean`; then
    times `scale`, plus `bias`, and SiLU. The three are read `per_row` further on for every batch row."""
    program = tl.program_id(0)
    p = (program % tiles * positions + tl.arange(0, positions)).to(tl.int64)[None, :]
    own = tl.arange(0, channels)
    channel = program // tiles % blocks * per_block + own
    line = program // tiles // blocks
    inside = (own < per_block) & (channel < width)
    mask = inside[:, None] & (p < length)
    c = channel.to(tl.int64)[:, None]
    values = tl.load(_base(x, line, frames, rows, x_b, x_t, x_r) + c * x_c + p * x_p, mask=mask, other=0.0)
    values = values.to(tl.float32)
    entry = line // rows // frames * per_row + channel
    scales = tl.load(scale + entry, mask=inside, other=0.0)[:, None]
    if rms:
        squares = tl.maximum(tl.sum(values * values, axis=0), EPS_SQUARED)
        y = values * (1.0 / tl.sqrt(squares))[None, :] * scales
    else:
        means = tl.load(mean + entry, mask=inside, other=0.0)[:, None]
        y = (values - means) * scales + tl.load(bias + entry, mask=inside, other=0.0)[:, None]
    if silu:
        y = y / (1.0 + tl.exp(-y))
    tl.store(_base(out, line, frames, rows, out_b, out_t, out_r) + c * out_c + p * out_p, y, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _moments_kernel(
    x, means, squares, frames, rows, length, tiles, blocks, width,
    x_b, x_c, x_t, x_r, x_p,
    channels: tl.constexpr, positions: tl.constexpr, repeats: tl.constexpr,
) -> None:  # fmt: skip
    """Mean and squared differences from it, per channel, over `repeats` tiles of one line.

    Tiles are merged by Chan's formula. Results are (lines, tiles, width).
    """
    program = tl.program_id(0)
    channel = program // tiles % blocks * channels + tl.arange(0, channels)
    line = program // tiles // blocks
    inside = channel < width
    start = _base(x, line, frames, rows, x_b, x_t, x_r) + channel.to(tl.int64)[:, None] * x_c
    mean = tl.zeros([channels], tl.float32)
    square = tl.zeros([channels], tl.float32)
    count = 0.0
    for i in range(repeats):
        first = (program % tiles * repeats + i) * positions
        p = (first + tl.arange(0, positions)).to(tl.int64)[None, :]
        mask = inside[:, None] & (p < length)
        values = tl.load(start + p * x_p, mask=mask, other=0.0).to(tl.float32)
        new = tl.minimum(tl.maximum(length - first, 0), positions).to(tl.float32)
        new_mean = tl.sum(values, axis=1) / tl.maximum(new, 1.0)
        difference = tl.where(mask, values - new_mean[:, None], 0.0)
        total = tl.maximum(count + new, 1.0)
        step = new_mean - mean
        square += tl.sum(difference * difference, axis=1) + step * step * (count * new / total)
        mean += step * (new / total)
        count += new
    entry = (line * tiles + program % tiles).to(tl.int64) * width + channel
    tl.store(means + entry, mean, mask=inside)
    tl.store(squares + entry, square, mask=inside)


def _lines(*tensors: Tensor) -> list[Tensor]:
    """(b, c, t, h, w) as views (b, c, frames, rows, positions), with lines as long as the strides of all allow."""
    if all(x.stride(3) == x.shape[4] * x.stride(4) or x.shape[3] == 1 for x in tensors):
        tensors = tuple(_merged(x, 3) for x in tensors)
        if all(x.stride(2) == x.shape[4] * x.stride(4) or x.shape[2] == 1 for x in tensors):
            tensors = tuple(_merged(x, 2) for x in tensors)
    return list(tensors)


def _merged(x: Tensor, dim: int) -> Tensor:
    """Dimension `dim` merged into the last one; where it stood stays a dimension of one."""
    shape, strides = list(x.shape), list(x.stride())
    shape[4] *= shape[dim]
    shape[dim] = 1
    return x.as_strided(shape, strides)


def _tile(x: Tensor, channels: int) -> tuple[int, int]:
    """(channels, positions) of a tile that reads runs of memory: along the channels where those lie together."""
    longest = triton.next_power_of_2(x.shape[4])
    if x.stride(1) != 1:
        channels = 1
    channels = min(triton.next_power_of_2(channels), TILE)
    return channels, max(1, min(TILE // channels, longest, 1024))


def _warps(tile: int) -> int:
    """At most 64 numbers a thread."""
    return 8 if tile > 8192 else 4 if tile > 1024 else 1


def rms_norm(x: Tensor, gain: Tensor, halves: int, silu: bool, out: Tensor) -> None:
    """`norm.rms_norm`; `out` may be `x`."""
    x, out = _lines(x, out)
    width = x.shape[1] // halves
    channels = triton.next_power_of_2(width)
    positions = min(max(TILE // channels, 16), 64, triton.next_power_of_2(x.shape[4]))
    _run_norm(x, (gain, gain, gain), out, (channels, positions), blocks=halves, per_block=width, rms=True, silu=silu)


def group_norm(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, silu: bool, out: Tensor) -> None:
    """`norm.group_norm`; `out` may be `x`."""
    x, out = _lines(x, out)
    channels, positions = _tile(x, min(x.shape[1], 128))
    blocks = triton.cdiv(x.shape[1], channels)
    tile = channels, positions
    _run_norm(x, (mean, scale, bias), out, tile, blocks=blocks, per_block=channels, rms=False, silu=silu)


def _run_norm(
    x: Tensor,
    values: tuple[Tensor, ...],
    out: Tensor,
    tile: tuple[int, int],
    *,
    blocks: int,
    per_block: int,
    rms: bool,
    silu: bool,
) -> None:
    b, width, frames, rows, length = x.shape
    tiles = triton.cdiv(length, tile[1])
    with torch.cuda.device_of(x):
        _norm_kernel[(b * frames * rows * blocks * tiles,)](
            x, *(v.float().contiguous() for v in values), out, frames, rows, length, tiles, blocks, width, per_block,
            0 if rms else width, *x.stride(), *out.stride(),
            rms=rms, silu=silu, channels=tile[0], positions=tile[1], num_warps=_warps(tile[0] * tile[1]),
        )  # fmt: skip


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`norm.channel_moments`, with runs of its own instead of slabs."""
    (x,) = _lines(x)
    b, width, frames, rows, length = x.shape
    channels, positions = _tile(x, min(width, 128))
    tiles = triton.cdiv(length, positions * REPEATS)
    blocks = triton.cdiv(width, channels)
    means = x.new_empty(b, frames * rows * tiles, width, dtype=torch.float32)
    squares = torch.empty_like(means)
    with torch.cuda.device_of(x):
        _moments_kernel[(b * frames * rows * blocks * tiles,)](
            x, means, squares, frames, rows, length, tiles, blocks, width, *x.stride(),
            channels=channels, positions=positions, repeats=REPEATS, num_warps=_warps(channels * positions),
        )  # fmt: skip
    return means, squares, norm.lengths(length, positions * REPEATS, means).repeat(frames * rows)


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Run every kernel at widths that networks have; raises what fails, or ArithmeticError where numbers are wrong."""
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for width, layout in ((8, torch.contiguous_format), (64, torch.channels_last_3d), (512, torch.channels_last_3d)):
        x = torch.linspace(-3, 5, 2 * width * 3 * 4 * 5, device=device).view(2, width, 3, 4, 5).to(dtype)
        x = x.contiguous(memory_format=layout)
        gain = torch.linspace(1, 2, width, device=device)
        shift = torch.linspace(-1, 1, 2 * width, device=device).view(2, width)
        found: list[list[Tensor]] = []
        for rms, group, moments in (
            (rms_norm, group_norm, channel_moments),
            (norm.rms_norm, norm.group_norm, norm.channel_moments),
        ):
            normed, scaled = torch.zeros_like(x), torch.zeros_like(x)
            rms(x, gain, 2, True, normed)
            group(x, shift, shift + 2, shift, True, scaled)
            found.append([normed, scaled, *norm.pool(*moments(x), 4)])
        if not all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(*found, strict=True)):
            raise ArithmeticError(f"the kernels compute wrong numbers for {width} channels")
