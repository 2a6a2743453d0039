"""Speed and memory of our models on this machine, as a table.

    python benchmarks/bench.py [--device cuda] [--dtype bfloat16] [--models iv-64 cv] [--directions decode]
                               [--sizes 720x1280] [--frames 33 121] [--caps 8 12] [--rounds 10] [--out FILE]

Weights of the published widths and clips are random. Computing: chunks stay on the device and are thrown away. To RAM:
from a clip in RAM to one tensor there, float32 images of a decoder, latents of an encoder. Both are medians after a run
to warm up. First: time to the first chunk in RAM. Peak: on a GPU, most memory in use, without weights; on a CPU with
Linux, growth of the process. Share: floating-point operations of ours, counted by `profile_meta.py`, per second of
computing, over those of a large matrix product; nominal: those of the official program instead, at 720x1280. Without
options: on a GPU all models and directions at three sizes and lengths, and 17 frames of 2160x3840 under caps of 8 and
12 GB; on a CPU small frames. Nothing is written but to --out.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime as dt
import gc
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from profile_meta import AT_720P, MODELS, OFFICIAL, per_frame, size_of
from torch import Tensor

from vae_core import Plan, VideoVAE
from vae_core.door.output import collect
from vae_core.families import DIRECTIONS, Direction

GB = 10**9
BLOCK = 17  # frames of the random clip that is repeated to any length
MOST_SECONDS = 120  # that a case is repeated for
HEAD = (
    "| | frames | memory | rounds | computing, frames/s | s/frame | to RAM, frames/s | first, s | peak, GB | share | "
    "nominal |\n|" + "---|" * 11
)


def status(name: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row. cap: GB of device memory that may be used, None for all."""

    model: str
    direction: Direction
    size: tuple[int, int]
    frames: int
    cap: float | None = None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where it runs. flops: of a large matrix product, per second; copied: bytes per second."""

    device: torch.device
    dtype: torch.dtype
    flops: float
    copied: float


# ---------------------------------------------------------------------------------------------------- measuring


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds."""
    finish(device)
    start = time.perf_counter()
    work()
    finish(device)
    return time.perf_counter() - start


def look_at(device: torch.device, dtype: torch.dtype) -> Machine:
    on_gpu = device.type == "cuda"
    side, count = (8192, 2 * 10**9) if on_gpu else (1024, 25 * 10**6)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    x = torch.zeros(count, device=device)
    y = torch.empty_like(x)
    product, copy = partial(torch.matmul, a, b), partial(y.copy_, x)
    seconds = [min(timed(work, device) for _ in range(10)) for work in (product, copy)]
    return Machine(device=device, dtype=dtype, flops=2 * side**3 / seconds[0], copied=2 * x.nbytes / seconds[1])


class Peak:
    """Most memory beyond what there was: of the device, or of the process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        elif sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # what earlier cases left would hide what this one takes
            self.before = status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here

    def read(self) -> float:
        """Bytes; NaN where nothing is known."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return status("VmHWM") - self.before if sys.platform == "linux" else math.nan


# ---------------------------------------------------------------------------------------------------- the work


def video(frames: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    block = torch.rand(1, 3, min(BLOCK, frames), *size).mul_(2).sub_(1).to(device, dtype)
    for start in range(0, frames, BLOCK):
        yield block[:, :, : frames - start]


def compute(vae: VideoVAE, case: Case, frames: int, plan: Plan) -> None:
    """On the device, and nothing is kept."""
    if case.direction == "decode":
        latent = torch.randn(_latent_shape(vae, case.size, frames), device=vae.device, dtype=vae.dtype)
        chunks = vae.decode_stream(latent, plan=plan.tiles)
    else:
        chunks = vae.encode_stream(video(frames, case.size, vae.device, vae.dtype), plan=plan.tiles)
    for chunk in chunks:
        del chunk


def to_ram(vae: VideoVAE, case: Case, frames: int, plan: Plan) -> float:
    """From RAM to RAM; seconds to the first chunk."""
    if case.direction == "decode":
        latent = torch.randn(_latent_shape(vae, case.size, frames))
        chunks, total, dim = vae.decode_frames(latent, plan=plan.tiles, lent=True), frames, 1
    else:
        source = video(frames, case.size, torch.device("cpu"), torch.float32)
        chunks, total, dim = vae.encode_stream(source, plan=plan.tiles), vae.info.compression.latent_frames(frames), 2
    start, first = time.perf_counter(), math.nan

    def watched() -> Iterator[Tensor]:
        nonlocal first
        for chunk in chunks:
            first = time.perf_counter() - start if math.isnan(first) else first
            yield chunk
            del chunk

    collect(watched(), total, dim=dim)
    return first


def _latent_shape(vae: VideoVAE, size: tuple[int, int], frames: int) -> tuple[int, ...]:
    compression = vae.info.compression
    height, width = (compression.cells(side) for side in size)
    return 1, vae.info.latent_channels, compression.latent_frames(frames), height, width


def plan_for(vae: VideoVAE, case: Case) -> Plan:
    """By the cap, or what is free; on a CPU without a limit."""
    budget = None if case.cap is None else int(case.cap * GB) - torch.cuda.memory_allocated(vae.device)
    if budget is None and vae.device.type == "cuda":
        budget = torch.cuda.mem_get_info(vae.device)[0] * 9 // 10
    if case.direction == "decode":
        shape = _latent_shape(vae, case.size, case.frames)
        return vae.plan_decode(shape, budget_bytes=budget, device=vae.device)
    return vae.plan_encode((1, 3, case.frames, *case.size), budget_bytes=budget, device=vae.device)


@torch.inference_mode()
def row(vae: VideoVAE, case: Case, machine: Machine, rounds: int) -> str:
    device = machine.device
    plan = plan_for(vae, case)
    peak = Peak(device)
    compute(vae, case, min(case.frames, 33), plan)  # warms up
    computing, through, firsts = [timed(partial(compute, vae, case, case.frames, plan), device)], [], []
    most = peak.read()
    while True:
        begin = time.perf_counter()
        firsts.append(to_ram(vae, case, case.frames, plan))
        through.append(time.perf_counter() - begin)
        if len(through) >= rounds or sum(computing) + sum(through) > MOST_SECONDS:
            break
        computing.append(timed(partial(compute, vae, case, case.frames, plan), device))
    rate = case.frames / statistics.median(computing)
    share = rate * per_frame(case.model, case.direction, case.size).tflop * 1e12 / machine.flops
    official = OFFICIAL.get((case.model, case.direction)) if case.size == AT_720P else None
    nominal = "" if official is None else f"{rate * official.tflop * 1e12 / machine.flops:.0%}"
    memory = plan.way if case.cap is None else f"cap of {case.cap:g} GB: {plan.way}"
    return (
        f"| {case.model} {case.direction} {case.size[0]}x{case.size[1]} | {case.frames} | {memory} | {len(through)} | "
        f"{rate:.2f} | {1 / rate:.3f} | {case.frames / statistics.median(through):.2f} | "
        f"{statistics.median(firsts):.2f} | {most / GB:.2f} | {share:.0%} | {nominal} |"
    )


def rows(cases: list[Case], machine: Machine, rounds: int) -> Iterator[str]:
    device = machine.device
    for model in dict.fromkeys(case.model for case in cases):
        torch.manual_seed(0)
        with device:
            family, config = MODELS[model]
            vae = VideoVAE(family.network(config).to(machine.dtype).requires_grad_(False).eval())
        for case in (case for case in cases if case.model == model):
            _cap(case.cap, device)
            yield row(vae, case, machine, rounds)
            _cap(None, device)
        del vae


def _cap(gigabytes: float | None, device: torch.device) -> None:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0 if gigabytes is None else gigabytes * GB / total, device)


# ---------------------------------------------------------------------------------------------------- the command


def cases_of(options: argparse.Namespace) -> list[Case]:
    on_gpu = torch.device(options.device).type == "cuda"
    sizes = options.sizes or ([(576, 1024), AT_720P, (1080, 1920)] if on_gpu else [(64, 64)])
    lengths = options.frames or ([33, 121, 481] if on_gpu else [17])
    kinds = [(model, direction) for model in options.models for direction in options.directions]
    cases = [
        Case(model=model, direction=direction, size=size, frames=frames)
        for model, direction in kinds
        for size in sizes
        for frames in lengths
    ]
    caps = options.caps if options.caps is not None else ([8, 12] if on_gpu and not options.sizes else [])
    if caps and not on_gpu:
        raise SystemExit("--caps are of GPU memory, and the device is a CPU: leave them out.")
    return cases + [
        Case(model=model, direction=direction, size=(2160, 3840), frames=17, cap=cap)
        for model, direction in kinds
        for cap in caps
    ]


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="bfloat16; on a CPU float32")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--sizes", nargs="+", type=size_of, help="HEIGHTxWIDTH in pixels")
    parser.add_argument("--frames", nargs="+", type=int, help="1 + 4N each")
    parser.add_argument("--caps", nargs="+", type=float, help="GB of GPU memory, for 17 frames of 2160x3840")
    parser.add_argument("--rounds", type=int, help="10; on a CPU 3")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="file for the table")
    options = parser.parse_args()
    if any(frames < 1 or frames % 4 != 1 for frames in options.frames or ()):
        parser.error(f"--frames {options.frames}: needed are 1 + 4N, such as 17, 33 or 121")
    return options


def head_of(machine: Machine) -> str:
    on_gpu = machine.device.type == "cuda"
    name = torch.cuda.get_device_name(machine.device) if on_gpu else platform.processor() or platform.machine()
    where = name if on_gpu else f"{name}, {torch.get_num_threads()} threads"
    kind = str(machine.dtype).removeprefix("torch.")
    return (
        f"{dt.date.today()}, {where}, torch {torch.__version__}, {kind}; matrix product "
        f"{machine.flops / 1e12:.2f} TFLOP/s, copy {machine.copied / 1e9:.0f} GB/s\n\n{HEAD}"
    )


def main() -> None:
    options = read_options()
    cases = cases_of(options)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    machine = look_at(device, getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32")))
    lines = [head_of(machine)]
    print(lines[0], flush=True)
    for line in rows(cases, machine, options.rounds or (10 if on_gpu else 3)):
        lines.append(line)
        print(line, flush=True)
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
