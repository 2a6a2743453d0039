"""How long a cancel can take: the longest time between two moments at which a run can be ended.

    python benchmarks/cancel.py [WIDTHxHEIGHT]

One chunk of each family's demo weights is encoded and decoded, in whole frames and in tiles or strips. Prints a
Markdown table of seconds: the whole chunk, and the longest step, after which a cancel takes effect at the latest.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from vae_core import StripPlan, TilePlan, load


def longest(chunks: Iterable[Tensor], marks: list[float]) -> tuple[float, float]:
    """Seconds of all, and the longest from one mark to the next."""
    marks[:] = [time.monotonic()]
    for _ in chunks:
        pass
    marks.append(time.monotonic())
    return marks[-1] - marks[0], max(b - a for a, b in pairwise(marks))


def _mark(marks: list[float]) -> None:
    marks.append(time.monotonic())


def main() -> None:
    """Print the table."""
    width, height = map(int, (sys.argv[1] if len(sys.argv) > 1 else "832x480").split("x"))
    print(f"{width}x{height}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32 on a CPU\n")
    print("| VAE | | plan | chunk, s | longest step, s |\n|---|---|---|---|---|")
    for name in ("demo-cv-vae", "demo-iv-vae"):
        vae, marks = load(name), list[float]()
        frames = 17 if vae.family == "cv-vae" else 9
        video = torch.rand(1, 3, frames, height, width).mul_(2).sub_(1)
        cut = StripPlan(strips=8) if vae.family == "cv-vae" else TilePlan(tile=(16, None))
        latent = torch.randn(
            1, vae.info.latent_channels, vae.info.compression.latent_frames(frames), height // 8, width // 8
        )
        for direction, plan in (("encode", None), ("encode", cut), ("decode", None), ("decode", cut)):
            mark = partial(_mark, marks)
            with torch.inference_mode():
                if direction == "encode":
                    run = vae.encode_stream([video], plan=plan, between=mark)
                else:
                    run = vae.decode_stream(latent, plan=plan, between=mark)
                whole, step = longest(run, marks)
            print(f"| {name} | {direction} | {plan or 'whole frames'} | {whole:.1f} | {step:.2f} |", flush=True)


if __name__ == "__main__":
    main()
