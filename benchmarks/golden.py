"""Agreement with the official implementations, case by case: `python benchmarks/golden.py` prints the table.

Largest difference from the official float64 result in units of its standard deviation, on the cases of tests/golden.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "core"), str(ROOT / "tests" / "golden")]

import recipe  # noqa: E402
import test_golden as golden  # noqa: E402


def main() -> None:
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads\n")
    print("| case | output | float32 | float64 |\n|---|---|---|---|")
    for name in golden.CASES:
        case, expected = golden.read_case(name)
        got = {
            dtype: golden.outputs(case, golden.load_case(case, recipe, dtype), recipe)
            for dtype in (torch.float32, torch.float64)
        }
        for key, reference in expected.items():
            figures = " | ".join(f"{golden.relative_error(got[dtype][key], reference):.1e}" for dtype in got)
            print(f"| {name} | {key} | {figures} |")


if __name__ == "__main__":
    main()
