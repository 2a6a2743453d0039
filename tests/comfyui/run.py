"""Runs the tests of this folder once per ComfyUI checkout, each in its own process. `make test-comfyui` calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from checkout import HELP, ROOT, checkouts, pythons


def main() -> int:
    """The worst exit status of the runs; 2 where there is no checkout."""
    found = checkouts()
    if not found:
        sys.stderr.write(HELP)
        return 2
    worst = 0
    for path, python in zip(found, pythons(len(found)), strict=True):
        sys.stderr.write(f"\n== ComfyUI in {path}, Python {python}\n")
        command = [python, "-m", "pytest", "--confcutdir=tests/comfyui", *(sys.argv[1:] or ["tests/comfyui"])]
        environment = {**os.environ, "COMFYUI_PATH": str(path), "CVIV_COMFYUI_REQUIRED": "1"}
        worst = max(worst, subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode)
    return worst


if __name__ == "__main__":
    raise SystemExit(main())
