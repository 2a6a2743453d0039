"""Does the planner keep its promise? Predicted against measured memory, as two tables.

    python benchmarks/planner_promise.py [--tables 1 2] [--frames 10001] [--families cv-vae iv-vae]

1. Narrow models with random weights decode a long clip of tiny frames on the CPU, whole and by the plan for a budget
   that whole frames would not fit. Counted: live tensors, by an operator hook over the first 201 frames, every tile of
   every piece; resident: growth of the process, over all frames, beyond what it held after a few pieces. In that are
   the copies that kernels make for themselves.
2. Models of the published widths decode 17 frames of 3840x2160 by the plan for 8 GB, in bfloat16 on the meta device:
   every operator of every tile of every piece runs, on tensors without data. Nothing is computed.

Predicted: what the planner expects of one piece and one tile, without its margin.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]
# malloc keeps what it is given back, and would hide the peak behind what earlier pieces took
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}

from vae_core import TilePlan, VideoVAE  # noqa: E402
from vae_core.cv_vae import CVVAEConfig  # noqa: E402
from vae_core.iv_vae import IVVAEConfig  # noqa: E402
from vae_core.keys import Config, build  # noqa: E402
from vae_core.planner import MARGIN, Plan  # noqa: E402
from vae_core.prediction import Task, count, meta_model  # noqa: E402
from vae_core.profiler import MemoryProfile  # noqa: E402

MIB, GB = 2**20, 10**9
NARROW: dict[str, Config] = {
    "cv-vae": CVVAEConfig(widths=(32, 32, 64, 64), blocks_per_level=1, latent_channels=4, sd3=False),
    "iv-vae": IVVAEConfig(dim=32, latent_channels=16, scale_factor=1.0, shift_factor=0.0),
}
FULL: dict[str, Config] = {
    "cv-vae": CVVAEConfig(widths=(128, 256, 512, 512), blocks_per_level=2, latent_channels=4, sd3=False),
    "iv-vae": IVVAEConfig(dim=64, latent_channels=16, scale_factor=1.0, shift_factor=0.0),
}


def status(name: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def pieces(vae: VideoVAE, latents: int, size: tuple[int, int]) -> Iterator[Tensor]:
    for _ in range(latents):
        yield torch.zeros(1, vae.info.latent_channels, 1, *size, dtype=vae.dtype, device=vae.device)


def run(vae: VideoVAE, latents: int, size: tuple[int, int], plan: Plan) -> int:
    """Frames that came out; none is kept."""
    frames = 0
    for piece in vae.decode_stream(pieces(vae, latents, size), plan=plan.tiles):
        frames += piece.shape[2]
        del piece
    return frames


def counted(vae: VideoVAE, latents: int, size: tuple[int, int], plan: Plan) -> int:
    """Most bytes of live tensors."""
    with MemoryProfile() as profile:
        run(vae, latents, size, plan)
    return profile.device.peak


def resident(vae: VideoVAE, latents: int, size: tuple[int, int], plan: Plan) -> tuple[int, int]:
    """(frames, growth of the resident set at its peak)."""
    with torch.inference_mode():
        run(vae, 6, size, plan)
        gc.collect()
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        frames = run(vae, latents, size, plan)
    return frames, status("VmHWM") - before


def percent(measured: float, predicted: float) -> str:
    return f"{100 * (measured / predicted - 1):+.1f} %"


def long_clip(family: str, frames: int) -> None:
    torch.manual_seed(0)
    vae = VideoVAE(build(NARROW[family]).requires_grad_(False).eval())
    size, latents = (2, 12), 1 + (frames - 1) // 4
    with torch.no_grad():
        vae.decode(torch.zeros(1, vae.info.latent_channels, 2, 2, 2))  # so that kernels are prepared: they are weights
    shape = (1, vae.info.latent_channels, latents, *size)
    whole = vae.plan_decode(shape, device="cpu")
    tiles = vae.plan_decode(shape, budget_bytes=whole.device_bytes * 9 // 10, device="cpu")
    for plan in (whole, tiles):
        predicted = plan.device_bytes / MARGIN
        live = counted(vae, min(latents, 51), size, plan)
        out, grown = resident(vae, latents, size, plan)
        how = "whole" if plan.tiles is None else f"{plan.tile_count} tiles"
        print(
            f"| {family} | {out} of {8 * size[1]}x{8 * size[0]} | {how} | {predicted / MIB:.2f} | {live / MIB:.2f} "
            f"({percent(live, predicted)}) | {grown / MIB:.1f} ({percent(grown, predicted)}) |",
            flush=True,
        )


def large_frames(family: str) -> None:
    config, latents, (height, width) = FULL[family], 5, (270, 480)
    vae = VideoVAE(meta_model(config, torch.bfloat16))
    shape = (1, config.latent_channels, latents, height, width)
    plan = vae.plan_decode(shape, budget_bytes=8 * GB, device="cuda")
    task = Task(config=config, dtype=vae.dtype, decoding=True, batch=1, latents=latents, size=(height, width))
    assert isinstance(plan.tiles, TilePlan)
    need, predicted, (rows, columns) = count(task, plan.tiles), plan.device_bytes / MARGIN, plan.tiles.sides
    print(
        f"| {family} | {plan.tile_count} of at most {8 * columns}x{8 * rows} | {plan.device_bytes / GB:.2f} | "
        f"{predicted / GB:.3f} | {need.device / GB:.3f} ({percent(need.device, predicted)}) | "
        f"{plan.host_bytes / GB:.2f} | {need.host / GB:.2f} ({percent(need.host, plan.host_bytes)}) |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=10001)
    parser.add_argument("--tables", type=int, nargs="+", choices=[1, 2], default=[2, 1])
    parser.add_argument("--families", nargs="+", choices=list(FULL), default=list(FULL))
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread\n")
    if 2 in options.tables:
        print("| family | tiles, px | plan, GB | predicted, GB | counted, GB | RAM predicted, GB | RAM counted, GB |")
        print("|---|---|---|---|---|---|---|")
        for family in options.families:
            large_frames(family)
    if 1 in options.tables:
        print("\n| family | frames | plan | predicted, MiB | counted, MiB | resident, MiB |")
        print("|---|---|---|---|---|---|")
        for family in options.families:
            long_clip(family, options.frames)


if __name__ == "__main__":
    main()
