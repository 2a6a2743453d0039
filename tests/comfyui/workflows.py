"""The workflows in example_workflows, and comfy-cli, which runs them as a user of the command line does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .checkout import ROOT, checkouts
from .server import Server
from .weights import SMALL

# nodes that load what is not part of the pack, and the folder where the file in their first widget belongs
THIRD_PARTY = {
    "CheckpointLoaderSimple": "models/checkpoints",
    "ImageOnlyCheckpointLoader": "models/checkpoints",
    "FrameInterpolationModelLoader": "models/frame_interpolation",
}
# nodes that the oldest ComfyUI has not, and the module that has them
_NEWER = {"FrameInterpolate": "comfy_extras/nodes_frame_interpolation.py"}


def read(path: Path) -> dict[str, Any]:
    """A workflow as the front end saves it."""
    return json.loads(path.read_text(encoding="utf-8"))


def nodes_of(workflow: dict[str, Any], *types: str) -> list[dict[str, Any]]:
    """The nodes of these types."""
    return [node for node in workflow["nodes"] if node["type"] in types]


def _opens(workflow: dict[str, Any]) -> bool:
    """Whether the ComfyUI under test is new enough for a workflow."""
    modules = [module for kind, module in _NEWER.items() if nodes_of(workflow, kind)]
    return all((place / module).is_file() for place in checkouts() for module in modules)


WORKFLOWS = [path for path in sorted((ROOT / "example_workflows").glob("*.json")) if _opens(read(path))]


def is_executable(path: Path) -> bool:
    """Whether a workflow runs with what the pack brings along."""
    return not nodes_of(read(path), *THIRD_PARTY)


def provide_files(workflow: dict[str, Any], base: Path) -> None:
    """Make every file that a workflow names exist in `base`, so that only its content could be wrong."""
    for node in nodes_of(workflow, *THIRD_PARTY):
        folder = base / THIRD_PARTY[node["type"]]
        folder.mkdir(parents=True, exist_ok=True)
        if node["type"] == "FrameInterpolationModelLoader":
            _write_small_rife(folder / node["widgets_values"][0])
        else:
            (folder / node["widgets_values"][0]).touch()
    for node in nodes_of(workflow, "CVIV_LoadVideoVAE"):
        name = node["widgets_values"][0]
        if not name.startswith("demo-"):
            shutil.copy(base / "models" / "vae" / SMALL["cv"], base / "models" / "vae" / name)
    for node in nodes_of(workflow, "LoadImage"):
        (base / "input" / node["widgets_values"][0]).touch()


def _write_small_rife(path: Path) -> None:
    """A file of RIFE's kind with four channels a block: its frames in between are nearly means of their neighbours."""
    shapes: dict[str, tuple[int, ...]] = {
        "encode.cnn0.weight": (16, 3, 3, 3),
        "encode.cnn1.weight": (16, 16, 3, 3),
        "encode.cnn2.weight": (16, 16, 3, 3),
        "encode.cnn3.weight": (16, 1, 4, 4),
    }
    for block in range(5):
        where = f"blocks.{block}"
        shapes |= {
            f"{where}.conv0.0.0.weight": (2, 22 if block else 9, 3, 3),
            f"{where}.conv0.1.0.weight": (4, 2, 3, 3),
        }
        shapes |= {f"{where}.convblock.{layer}.conv.weight": (4, 4, 3, 3) for layer in range(8)}
        shapes |= {f"{where}.convblock.{layer}.beta": (1, 4, 1, 1) for layer in range(8)}
        shapes[f"{where}.lastconv.0.weight"] = (4, 52, 4, 4)
    for name, shape in list(shapes.items()):
        if name.endswith("weight"):  # the last two are transposed
            shapes[name.replace("weight", "bias")] = (shape[int("cnn3" in name or "lastconv" in name)],)
    generator = torch.Generator().manual_seed(0)
    save_file({name: torch.randn(shape, generator=generator) * 0.01 for name, shape in shapes.items()}, path)


def with_small_weights(workflow: dict[str, Any]) -> dict[str, Any]:
    """The workflow with small weights in place of the demo weights, which take minutes for what is tested here."""
    small = {"demo-cv-vae": SMALL["cv"], "demo-iv-vae": SMALL["iv"]}
    for node in nodes_of(workflow, "CVIV_LoadVideoVAE"):
        node["widgets_values"][0] = small.get(node["widgets_values"][0], node["widgets_values"][0])
    return workflow


# widgets by their place, that make a run quick and leave the shape of what comes out as it is
_QUICK: dict[str, dict[int, Any]] = {
    "CVIV_SVDConditioning": {0: 128, 1: 72},
    "SVD_img2vid_Conditioning": {0: 128, 1: 72},
    "KSampler": {2: 1},
}


def small(workflow: dict[str, Any]) -> dict[str, Any]:
    """The workflow with small weights, small pictures and one step."""
    for node in workflow["nodes"]:
        for index, value in _QUICK.get(node["type"], {}).items():
            node["widgets_values"][index] = value
    return with_small_weights(workflow)


def quick(workflow: dict[str, Any]) -> dict[str, Any]:
    """`small` with few frames, too: for what a run does to the page, whatever comes out."""
    for node in nodes_of(workflow, "CVIV_SVDConditioning"):
        node["widgets_values"][2] = min(node["widgets_values"][2], 101)
    for kind, index, frames in (("CVIV_Encode", 5, 5), ("ImageFromBatch", 1, 5), ("CVIV_SVDExtendClip", 0, 20)):
        for node in nodes_of(workflow, kind):
            node["widgets_values"][index] = frames
    return small(workflow)


def comfy_cli(server: Server, folder: Path, *arguments: str) -> dict[str, Any]:
    """The envelope that `comfy --json run ...` prints. Its own files go into `folder`."""
    where = ["--host", "127.0.0.1", "--port", str(server.port)]
    homes = {name: str(folder) for name in ("HOME", "USERPROFILE", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "APPDATA")}
    result = subprocess.run(
        [sys.executable, "-m", "comfy_cli", "--json", "--skip-prompt", "run", *arguments, *where],
        env={**os.environ, **homes, "DO_NOT_TRACK": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    assert lines, f"comfy-cli printed no envelope:\n{result.stdout}\n{result.stderr}"
    return json.loads(lines[-1])
