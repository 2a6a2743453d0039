"""The ComfyUI checkout under test: where it is, and why the tests cannot run when they cannot."""

from __future__ import annotations

import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

HELP = """No ComfyUI found. These tests run the pack inside a real ComfyUI:

    pip install -r tests/comfyui/requirements.txt
    comfy --workspace ./ComfyUI install --cpu        # or any checkout you have, with its requirements installed
    COMFYUI_PATH=./ComfyUI COMFYUI_PYTHON=python3 make test-comfyui

COMFYUI_PYTHON is the Python that has ComfyUI's requirements and tests/comfyui/requirements.txt. Both may name several,
joined by ":" (";" on Windows): each checkout is tested in a process of its own, with its own Python or the only one.
ComfyUI runs on the CPU; CVIV_COMFYUI_DEVICE=gpu lets it take the GPU that it finds.
The browser tests need Chromium: `playwright install chromium`, or CHROMIUM=/path/to/chromium.
"""


def on_cpu() -> bool:
    """Whether ComfyUI is told to stay on the CPU."""
    return os.environ.get("CVIV_COMFYUI_DEVICE", "cpu") == "cpu"


def checkouts() -> list[Path]:
    """The folders COMFYUI_PATH names; where it is not set, the ComfyUI in whose custom_nodes this project lies."""
    named = os.environ.get("COMFYUI_PATH", "")
    if named:
        return [Path(part).expanduser().resolve() for part in named.split(os.pathsep) if part]
    if ROOT.parent.name == "custom_nodes" and (ROOT.parents[1] / "nodes.py").is_file():
        return [ROOT.parents[1]]
    return []


def pythons(count: int) -> list[str]:
    """A Python for each of `count` checkouts: those COMFYUI_PYTHON names, else this one. Raises ValueError."""
    named = [part for part in os.environ.get("COMFYUI_PYTHON", "").split(os.pathsep) if part] or [sys.executable]
    if len(named) == 1:
        named *= count
    if len(named) != count:
        raise ValueError(
            f"COMFYUI_PYTHON names {len(named)} and COMFYUI_PATH {count}: give one Python for all checkouts, or one "
            "each."
        )
    return named


def problem() -> str | None:
    """Why the tests cannot run in this Python, as a sentence, or None."""
    found = checkouts()
    if not found:
        return "no ComfyUI: COMFYUI_PATH is not set and this project does not lie in a ComfyUI's custom_nodes"
    if len(found) > 1:
        return f"COMFYUI_PATH names {len(found)} checkouts and a process takes one: use `make test-comfyui`"
    if not (found[0] / "main.py").is_file() or not (found[0] / "nodes.py").is_file():
        return f"COMFYUI_PATH={found[0]} is not a ComfyUI checkout: it has no main.py and nodes.py"
    missing = missing_requirements(found[0])
    if missing:
        return f"this Python lacks ComfyUI's requirements ({', '.join(missing[:4])}): set COMFYUI_PYTHON"
    return None


def missing_requirements(path: Path) -> list[str]:
    """Names in the checkout's requirements.txt that are not installed, whatever the version."""
    missing = []
    for line in (path / "requirements.txt").read_text(encoding="utf-8").splitlines():
        name = re.match(r"[A-Za-z0-9_.-]+", line)
        if name is None:
            continue
        try:
            version(name.group())
        except PackageNotFoundError:
            missing.append(name.group())
    return missing
