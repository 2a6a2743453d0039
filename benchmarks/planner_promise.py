"""Does the planner keep its promise? Predicted against measured memory, as two tables.

    python benchmarks/planner_promise.py [--tables 1 2] [--frames 10001] [--families cv-vae iv-vae]

1. Narrow models with random weights decode a long clip of tiny frames on the CPU, whole and by the plan for a budget
   that whole frames would not fit. Counted: live tensors, by an operator hook over the first 201 frames, every tile of
   every chunk; resident: growth of the process, over all frames, beyond what it held after a few chunks. In that are
   the copies that kernels make for themselves.
2. Models of the published widths decode 17 frames of 3840x2160 by the plan for 8 GB, in bfloat16 on the meta device:
   every operator of every tile of every chunk runs, on tensors without data. Nothing is computed.

Predicted: what the planner expects of one chunk and one tile, without its margin.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]
# malloc keeps what it is given back, and would hide the peak behind what earlier chunks took
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}

from vae_core import Plan, TilePlan, VideoVAE  # noqa: E402
from vae_core.families import DIRECTIONS, FAMILIES  # noqa: E402
from vae_core.families.cv_vae import CVVAEConfig  # noqa: E402
from vae_core.families.iv_vae import IVVAEConfig  # noqa: E402
from vae_core.nn.clip import Clip  # noqa: E402
from vae_core.nn.region import Region  # noqa: E402
from vae_core.nn.steps import Memory  # noqa: E402
from vae_core.plan.footprint import META, meta_network  # noqa: E402
from vae_core.plan.planner import MARGIN  # noqa: E402
from vae_core.plan.profile import Profile  # noqa: E402
from vae_core.run import executor  # noqa: E402
from vae_core.run.store import Canvas, Store  # noqa: E402
from vae_core.run.windows import rechunk  # noqa: E402

MIB, GB = 2**20, 10**9
RAM = torch.device("cpu")
NARROW: dict[str, CVVAEConfig | IVVAEConfig] = {
    "cv-vae": CVVAEConfig(widths=(32, 32, 64, 64), blocks_per_level=1, latent_channels=4, sd3=False),
    "iv-vae": IVVAEConfig(dim=32, latent_channels=16, scale_factor=1.0, shift_factor=0.0),
}
FULL: dict[str, CVVAEConfig | IVVAEConfig] = {
    "cv-vae": CVVAEConfig(widths=(128, 256, 512, 512), blocks_per_level=2, latent_channels=4, sd3=False),
    "iv-vae": IVVAEConfig(dim=64, latent_channels=16, scale_factor=1.0, shift_factor=0.0),
}


def status(name: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


class CountedStore(Store):
    """What waits in RAM, without data, and counted apart."""

    profile: Profile

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        if self.home != RAM:
            return super().take(shape, like)
        self.home = META
        with self.profile.on_host():
            data = super().take(shape, like)
        self.home = RAM
        return data


class CountedCanvas(Canvas):
    """What is read from RAM is a copy on the device."""

    def read(self, region: Region, device: torch.device) -> Clip:
        clip = super().read(region, device)
        in_ram = self._data is not None and self._store.home == RAM
        return Clip([x.clone() for x in clip.tensors], clip.places) if in_ram else clip


class CountedMemory(Memory):
    """What layers remember, in RAM."""

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        self.profile = profile

    def get(self, slot: str, device: torch.device) -> Tensor | None:
        frames = super().get(slot, device)
        return None if frames is None else frames.clone()

    def put(self, slot: str, frames: Tensor) -> None:
        with self.profile.on_host():
            super().put(slot, frames.clone())


class CountedPass(executor.Pass):
    """A pass over tensors without data."""

    def _memory(self) -> Memory:
        return CountedMemory(CountedStore.profile) if self._home == RAM else Memory()


def chunks(vae: VideoVAE, latents: int, size: tuple[int, int]) -> Iterator[Tensor]:
    for _ in range(latents):
        yield torch.zeros(1, vae.info.latent_channels, 1, *size, dtype=vae.dtype, device=vae.device)


def run(vae: VideoVAE, latents: int, size: tuple[int, int], plan: Plan) -> int:
    """Frames that came out; none is kept."""
    frames = 0
    for chunk in vae.decode_stream(chunks(vae, latents, size), plan=plan.tiles):
        frames += chunk.shape[2]
        del chunk
    return frames


def counted(vae: VideoVAE, latents: int, size: tuple[int, int], plan: Plan) -> int:
    """Most bytes of live tensors."""
    with Profile() as profile:
        run(vae, latents, size, plan)
    return profile.device.peak


def counted_without_data(vae: VideoVAE, latents: int, size: tuple[int, int], plan: Plan) -> tuple[int, int]:
    """Most bytes of live tensors on the device and in RAM."""
    with (
        Profile() as profile,
        patch.object(executor, "Store", CountedStore),
        patch.object(executor, "Canvas", CountedCanvas),
        patch.object(CountedStore, "profile", profile, create=True),
    ):
        work = CountedPass(vae.model, "decode", plan.tiles)
        for chunk in rechunk(chunks(vae, latents, size), vae.model.family.latents):
            work.run(chunk)
            del chunk
    return profile.device.peak, profile.host.peak


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
    vae = VideoVAE(FAMILIES[family].network(NARROW[family]).requires_grad_(False).eval())
    size, latents = (2, 12), vae.info.compression.latent_frames(frames)
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
    config, latents, size = FULL[family], 5, (270, 480)
    vae = VideoVAE(meta_network(FAMILIES[family], config, DIRECTIONS, torch.bfloat16))
    plan = vae.plan_decode((1, config.latent_channels, latents, *size), budget_bytes=8 * GB, device="cuda")
    assert isinstance(plan.tiles, TilePlan)
    (device, host), predicted = counted_without_data(vae, latents, size, plan), plan.device_bytes / MARGIN
    rows, columns = plan.tiles.sides[0], plan.tiles.sides[1] or size[1]
    print(
        f"| {family} | {plan.tile_count} of at most {8 * columns}x{8 * rows} | {plan.device_bytes / GB:.2f} | "
        f"{predicted / GB:.3f} | {device / GB:.3f} ({percent(device, predicted)}) | "
        f"{plan.host_bytes / GB:.2f} | {host / GB:.2f} ({percent(host, plan.host_bytes)}) |",
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
