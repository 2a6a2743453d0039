"""A base directory for ComfyUI: models, input, output, user, and the pack in custom_nodes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from .checkout import ROOT

PACK = "cviv-vae"
LEFT_OUT = shutil.ignore_patterns(".*", "tests", "benchmarks", "__pycache__", "*.egg-info", "demo_output", "build")

# of the page: no greeting, and every word readable in screenshots, however small the graph is shown
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "LiteGraph.Canvas.LowQualityRenderingZoomThreshold": 0.1,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}


def make_base(path: Path, *, models: Path | None = None, pack: Path | None = None) -> Path:
    """A new base directory at `path`.

    models: a folder for models/vae that several bases share. pack: what stands in custom_nodes; None: this project.
    """
    for name in ("custom_nodes", "models", "input", "output", "temp", "user/default"):
        (path / name).mkdir(parents=True)
    if models is None:
        (path / "models" / "vae").mkdir()
    else:
        _link(path / "models" / "vae", models)
    _link(path / "custom_nodes" / PACK, pack or ROOT)
    (path / "user" / "default" / "comfy.settings.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
    return path


def _link(link: Path, target: Path) -> None:
    """A symbolic link, or a copy where the system gives no links."""
    try:
        os.symlink(target, link, target_is_directory=True)
    except OSError:
        shutil.copytree(target, link, ignore=LEFT_OUT)
