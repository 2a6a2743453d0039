"""Everything that a GPU can tell of us, in one command of some minutes: tests, a table, and two files.

    python benchmarks/gpu_suite.py [--out FOLDER] [--cv-vae CLONE] [--iv-vae CLONE] [--device cuda] [--caps 6 8 12]
                                   [--sizes 576x1024 720x1280] [--frames 33] [--seconds 480] [--skip-tests]
                                   [--comfyui CHECKOUT ...] [--comfyui-python PYTHON ...]

Needs torch, Triton, pytest, hypothesis, einops, safetensors and numpy. It runs the tests of `tests/core` that a GPU
decides, the Triton kernels against torch among them; decodes by CV-VAE and IV-VAE (dim 64) of the published widths with
random weights in bfloat16, whole and under caps of device memory in GiB that the driver enforces, weights included;
where clones of the official programs are given, those next to ours; and, where ComfyUI checkouts are given, the tests
inside them that memory decides, on the GPU, next to another model. A row that fails is told as such, and the
next one runs; what does not fit into --seconds is left out. Writes gpu_suite_DATE.json and .md. On a CPU the same rows
run without caps, to try the script itself.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench import MODELS, Peak, finish, size_of

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from vae_core import VideoVAE  # noqa: E402
from vae_core.plan.rates import rates_of  # noqa: E402

GIB = 2**30
TESTS = ("tests/core/test_gpu.py", "tests/core/test_triton_norm.py", "tests/core/test_norms.py")
IN_COMFYUI = ("test_other_model", "test_interruptions", "test_our_nodes", "test_stock_nodes", "test_unfinished")
COLUMNS = ("model", "size", "cap, GiB", "plan", "frames/s", "first, s", "seconds", "said", "peak, GiB", "said, GiB")


def model_of(name: str, device: torch.device, dtype: torch.dtype) -> VideoVAE:
    """Random weights of the published widths, which are the same on every machine."""
    family, config = MODELS[name]
    torch.manual_seed(0)
    with device:
        return VideoVAE(family.network(config, ("decode",)).to(dtype).requires_grad_(False).eval())


def decoded(
    vae: VideoVAE, name: str, size: tuple[int, int], frames: int, cap: float | None, device: torch.device
) -> dict[str, Any]:
    """One row: a clip from RAM to RAM by the plan for the cap, after a chunk to warm up."""
    compression = vae.info.compression
    shape = (1, vae.info.latent_channels, compression.latent_frames(frames), *(compression.cells(n) for n in size))
    weights = sum(p.numel() * p.element_size() for p in vae.model.parameters())
    budget = None if cap is None else int(cap * GIB) - weights
    rates = rates_of(device, vae.dtype)
    plan = vae.plan_decode(shape, budget_bytes=budget, device=device, rates=rates, required=budget is not None)
    limit_memory(device, cap)
    try:
        torch.manual_seed(0)
        latent = torch.randn(shape)
        for chunk in vae.decode_frames(latent[:, :, :5], plan=plan.tiles, lent=True):
            del chunk
        peak = Peak(device)
        first: float | None = None
        begun = time.perf_counter()
        for chunk in vae.decode_frames(latent, plan=plan.tiles, lent=True):
            first = time.perf_counter() - begun if first is None else first
            del chunk
        finish(device)
        took = time.perf_counter() - begun
    finally:
        limit_memory(device, None)
    return {
        "model": name,
        "size": f"{size[1]}x{size[0]}",
        "cap, GiB": cap,
        "plan": plan.way,
        "frames/s": round(frames / took, 3),
        "first, s": None if first is None else round(first, 3),
        "seconds": round(took, 3),
        "said": round(plan.seconds, 3),
        "peak, GiB": round(peak.read() / GIB, 3),
        "said, GiB": round(plan.device_bytes / GIB, 3),
    }


def limit_memory(device: torch.device, cap: float | None) -> None:
    """Have the driver refuse what is above the cap."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if cap is None else min(1.0, cap * GIB / total), device)


def command(words: list[str], seconds: float, **environment: str) -> dict[str, Any]:
    """What a command ended with, and its last lines."""
    try:
        ran = subprocess.run(
            words,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=max(1, seconds),
            check=False,
            env={**os.environ, **environment},
        )
    except subprocess.TimeoutExpired:
        return {"command": " ".join(words), "status": "out of time", "tail": []}
    return {"command": " ".join(words), "status": ran.returncode, "tail": (ran.stdout + ran.stderr).splitlines()[-40:]}


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"# GPU suite, {result['date']}",
        "",
        f"{result['device']}, torch {result['torch']}, {result['dtype']}.",
        "",
    ]
    lines += [f"Rates: {result['rates']}.", ""]
    for ran in result["commands"]:
        lines += [f"`{ran['command']}`: {ran['status']}", "", "```", *ran["tail"][-12:], "```", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in result["rows"]:
        cells = [row.get(name) for name in COLUMNS]
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    lines += [
        "",
        *(
            f"- {row['model']} {row['size']}, cap {row['cap, GiB']}: {row['error']}"
            for row in result["rows"]
            if "error" in row
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["iv-64", "cv"])
    parser.add_argument("--sizes", nargs="+", type=size_of, default=[(576, 1024), (720, 1280)])
    parser.add_argument("--caps", nargs="*", type=float, default=[6, 8, 12])
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--cv-vae", type=Path, help="clone of the official CV-VAE repository")
    parser.add_argument("--iv-vae", type=Path, help="clone of the official IV-VAE repository")
    parser.add_argument("--comfyui", nargs="*", default=[], help="ComfyUI checkouts")
    parser.add_argument("--comfyui-python", nargs="*", default=[], help="a Python for each of them")
    parser.add_argument("--skip-tests", action="store_true")
    options = parser.parse_args()
    device, begun = torch.device(options.device), time.monotonic()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    result: dict[str, Any] = {
        "date": dt.date.today().isoformat(),
        "device": name,
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "rates": str(rates_of(device, dtype)),
        "commands": [],
        "rows": [],
    }

    def left() -> float:
        return options.seconds - (time.monotonic() - begun)

    def write() -> None:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"gpu_suite_{result['date']}"
        path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".md").write_text(page(result))

    if not options.skip_tests:
        result["commands"].append(command([sys.executable, "-m", "pytest", "-q", *TESTS], left() / 2))
        write()
    for model in options.models:
        vae = model_of(model, device, dtype)
        for size in options.sizes:
            for cap in [None, *(options.caps if device.type == "cuda" else [])]:
                row = {"model": model, "size": f"{size[1]}x{size[0]}", "cap, GiB": cap}
                try:
                    if left() < 0:
                        raise TimeoutError("left out: --seconds are over")
                    row = decoded(vae, model, size, options.frames, cap, device)
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                result["rows"].append(row)
                print(row, flush=True)
                write()
        del vae
    clones = [
        w
        for flag, path in (("--cv-vae", options.cv_vae), ("--iv-vae", options.iv_vae))
        if path
        for w in (flag, str(path))
    ]
    if clones:
        script = [sys.executable, "benchmarks/against_reference.py", *clones, "--rounds", "2"]
        result["commands"].append(command(script, left()))
    for number, path in enumerate(options.comfyui):
        tests = [f"tests/comfyui/{name}.py" for name in IN_COMFYUI]
        given = {
            "COMFYUI_PATH": path,
            "COMFYUI_PYTHON": options.comfyui_python[number] if options.comfyui_python else sys.executable,
            "CVIV_COMFYUI_DEVICE": "cpu" if device.type == "cpu" else "gpu",
        }
        result["commands"].append(command([sys.executable, "tests/comfyui/run.py", "-q", *tests], left(), **given))
        write()
    write()


if __name__ == "__main__":
    main()
