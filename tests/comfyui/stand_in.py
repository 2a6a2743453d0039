"""Checkpoints that are not at hand, by small ones with random weights, on a server: Image Only Checkpoint Loader there
gives a MODEL of SVD's kind, a CLIP_VISION and an image VAE. All else is ComfyUI as it is.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from .checkout import ROOT
from .inprocess import Comfy
from .svd import small_svd
from .svd_model import small_clip_vision, small_image_vae

PACK = "cviv-vae-stand-in"
_CODE = f"""import importlib.machinery, importlib.util, sys

spec = importlib.machinery.ModuleSpec("cviv_tests", None, is_package=True)
spec.submodule_search_locations = [{str(ROOT / "tests")!r}]
sys.modules["cviv_tests"] = importlib.util.module_from_spec(spec)
importlib.import_module("cviv_tests.comfyui.stand_in").replace()
NODE_CLASS_MAPPINGS = {{}}
"""


def add_stand_in(base: Path) -> Path:
    """Put the pack that does it into the custom_nodes of a base directory, which is returned."""
    folder = base / "custom_nodes" / PACK
    folder.mkdir()
    (folder / "__init__.py").write_text(_CODE, encoding="utf-8")
    return base


def replace() -> None:
    """Let the loader of this process give small models, made once."""
    made: list[Any] = []

    def load_checkpoint(_self: Any, ckpt_name: str, **_other: Any) -> tuple[Any, ...]:
        if not made:
            made.extend(_small())
        return tuple(made)

    loader = importlib.import_module("nodes").NODE_CLASS_MAPPINGS["ImageOnlyCheckpointLoader"]
    loader.load_checkpoint = load_checkpoint


def _small() -> tuple[Any, Any, Any]:
    comfy = cast("Comfy", _Modules())
    with tempfile.TemporaryDirectory() as folder:
        return small_svd(comfy), small_clip_vision(comfy, Path(folder)), small_image_vae(comfy)


class _Modules:
    """The one thing that the makers of small models want of ComfyUI."""

    def module(self, name: str) -> ModuleType:
        return importlib.import_module(name)
