"""Memory and time of one sampling step of SVD's U-Net at full size, with random weights, bare and through our nodes.

    python benchmarks/svd_full_size.py ComfyUI            # a checkout, with a Python that has its requirements
    python benchmarks/svd_full_size.py ComfyUI --dtype fp16 --latents 14

Latents are tiny (32x32 pixels): what is measured is the model and what the nodes add, not a picture of any size.
"""

# ruff: noqa: ANN401, ComfyUI has no types to speak of

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # behind ComfyUI, whose nodes.py our nodes/ would hide

FULL = {
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
}
WINDOW, OVERLAP = 14, 8  # two windows over 20 latents


def main() -> None:
    """Print the table."""
    arguments = _arguments()
    os.environ["COMFYUI_PATH"] = str(arguments.comfyui)
    from tests.comfyui import inprocess, svd_model
    from tests.comfyui.place import make_base

    with tempfile.TemporaryDirectory() as folder:
        comfy = inprocess.start(make_base(Path(folder) / "base"))
        conds = svd_model.conditions(svd_model.random_images(size=4))
        before = _peak()
        began = time.monotonic()
        model = _full_svd(comfy, {"bf16": torch.bfloat16, "fp16": torch.float16}[arguments.dtype])
        count = sum(parameter.numel() for parameter in model.model.diffusion_model.parameters())
        where = f"{platform.machine()}, {torch.get_num_threads()} threads"
        print(f"ComfyUI {comfy.version}, torch {torch.__version__}, {where}")
        print(f"{count:,} parameters, {arguments.dtype}, built in {time.monotonic() - began:.0f} s, "
              f"peak {_gib(before)} before and {_gib(_peak())} after")  # fmt: skip
        print("\n| one step, CFG 2.5 | latents | seconds | peak resident set |\n|---|---|---|---|")
        runs = [
            ("bare", model, WINDOW),
            ("SVD Long Video, one window", _long(comfy, svd_model, model, WINDOW, "windows"), WINDOW),
            (
                "SVD Long Video, windows",
                _long(comfy, svd_model, model, arguments.latents, "windows"),
                arguments.latents,
            ),
            (
                "continuation and output adapter",
                _adapted(comfy, _long(comfy, svd_model, model, arguments.latents, "continuation")),
                arguments.latents,
            ),
        ]
        results: list[Tensor] = []
        for name, patched, latents in runs:
            began = time.monotonic()
            latent = svd_model.empty(latents)
            results.append(svd_model.ksampler(comfy, patched, conds, latent, steps=1, cfg=2.5))
            assert results[-1].isfinite().all()
            print(f"| {name} | {latents} | {time.monotonic() - began:.0f} | {_gib(_peak())} |", flush=True)
        print(f"\none window equals the bare model to the bit: {torch.equal(results[0], results[1])}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path, help="folder of a ComfyUI checkout")
    parser.add_argument("--dtype", choices=["bf16", "fp16"], default="bf16")
    parser.add_argument("--latents", type=int, default=20, help="latents of the long clip")
    return parser.parse_args()


def _full_svd(comfy: Any, dtype: torch.dtype) -> Any:
    """A MODEL of SVD's size, each weight drawn in place, so that no second copy exists."""
    from tests.comfyui.svd import UNET

    management = comfy.module("comfy.model_management")
    config = comfy.module("comfy.supported_models").SVD_img2vid({**UNET, **FULL})
    config.unet_config["dtype"] = dtype
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, device=torch.device("cpu"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.diffusion_model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    model.diffusion_model.requires_grad_(False).train(False)
    return comfy.module("comfy.model_patcher").ModelPatcher(
        model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


def _long(comfy: Any, svd_model: Any, model: Any, latents: int, mode: str) -> Any:
    return svd_model.long_model(
        comfy, model, latents, mode=mode, window_length=WINDOW, overlap=OVERLAP, carry=OVERLAP, time_offset=True
    )


def _adapted(comfy: Any, model: Any) -> Any:
    core = comfy.pack("vae_core.svd.adapter")
    folder = Path(comfy.module("folder_paths").get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    core.save_adapter(folder / "a.safetensors", core.output_layer(torch.full((4, 320, 3, 3), 1e-4), torch.zeros(4)))
    (patched,) = comfy.call("CVIV_ApplySVDAdapter", model=model, adapter="a.safetensors", strength=1.0, precise=True)
    return patched


def _peak() -> int:
    """The largest resident set of this process so far, in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


if __name__ == "__main__":
    main()
