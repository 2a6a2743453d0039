"""Speed against the official programs, on the same weights and the same input: ratios of median times.

    python benchmarks/against_reference.py --cv-vae CV-VAE --iv-vae iv-vae

The two folders are clones of the official repositories; diffusers must be installed for CV-VAE's. Where xformers is
missing, its attention is torch's. Rounds alternate between the two, so that what else the machine does falls on both.
Weights are drawn at full width; the difference of the outputs is printed beside the ratio.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "golden")]

import recipe  # noqa: E402

import vae_core  # noqa: E402

SEED = 20
Run = Callable[[], Tensor]


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    where = platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {where}, {options.threads} threads, float32")
    print(f"{options.frames} frames of {options.size}x{options.size}, {options.rounds} rounds\n")
    print("| | official, s | ours, s | ratio | largest difference / standard deviation |\n|---|---|---|---|---|")
    with torch.inference_mode():
        for name, official, ours in _pairs(options):
            _row(name, official, ours, options.rounds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cv-vae", type=Path, help="clone of the official CV-VAE repository")
    parser.add_argument("--iv-vae", type=Path, help="clone of the official IV-VAE repository")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def _pairs(options: argparse.Namespace) -> Iterator[tuple[str, Run, Run]]:
    size = options.size, options.size
    video = recipe.video((1, 3, options.frames, *size), SEED)
    for name, channels, make in (("CV-VAE", 4, _cv_vae), ("IV-VAE z16 dim64", 16, _iv_vae)):
        folder = options.cv_vae if name == "CV-VAE" else options.iv_vae
        if folder is None:
            continue
        encode, decode, state = make(folder)
        ours = vae_core.load(state)
        compression = ours.info.compression
        cells = (compression.cells(side) for side in size)
        latent = recipe.latent((1, channels, compression.latent_frames(options.frames), *cells), SEED)
        yield f"{name} encode", partial(encode, video), partial(ours.encode, video)
        yield f"{name} decode", partial(decode, latent), partial(ours.decode, latent)


def _row(name: str, official: Run, ours: Run, rounds: int) -> None:
    expected = official()  # the first call of each warms up
    difference = (ours() - expected).abs().max() / expected.std()
    times: dict[Run, list[float]] = {official: [], ours: []}
    for _ in range(rounds):
        for run, taken in times.items():
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    theirs, own = (statistics.median(taken) for taken in times.values())
    print(f"| {name} | {theirs:.2f} | {own:.2f} | {theirs / own:.2f} | {difference:.1e} |", flush=True)


def _drawn(model: torch.nn.Module) -> dict[str, Tensor]:
    state = recipe.state_dict({name: tuple(value.shape) for name, value in model.state_dict().items()}, SEED)
    model.load_state_dict(state)
    model.train(False)
    return state


def _cv_vae(folder: Path) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], dict[str, Tensor]]:
    _stand_in_for_xformers()
    sys.path.insert(0, str(folder))
    from models.modeling_vae import CVVAEModel  # type: ignore[import-not-found]

    model = CVVAEModel()
    state = _drawn(model)
    return lambda x: model.encode(x).latent_dist.mode(), lambda z: model.decode(z).sample, state


def _iv_vae(folder: Path) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], dict[str, Tensor]]:
    spec = importlib.util.spec_from_file_location("official_iv_vae", folder / "models" / "vae3d.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.VAutoencoder3d(dim=64, z_dim=16, scale_factor=0.9697, shift_factor=-0.1553)
    model.sample = lambda mean, _: mean  # the official program draws; the mean can be compared
    return model.encode, model.decode, _drawn(model)


def _stand_in_for_xformers() -> None:
    """torch's attention under the name that the official program calls, where xformers is not installed."""
    if importlib.util.find_spec("xformers") is not None:
        return
    import diffusers  # noqa: F401, it looks for xformers, too, and must not find this

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: object = None, op: object = None) -> Tensor:
        assert attn_bias is None
        if q.ndim == 3:
            return F.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(q.shape[-1]))
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    package.__version__ = "0.0.20"  # type: ignore[attr-defined]
    package.ops, ops.memory_efficient_attention = ops, attention  # type: ignore[attr-defined]
    sys.modules.update({"xformers": package, "xformers.ops": ops})


if __name__ == "__main__":
    main()
