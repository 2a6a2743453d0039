"""The metrics that the nodes show need nothing that ComfyUI does not bring."""

import subprocess
import sys

CODE = """
import sys
for name in ("torchmetrics", "cv2", "matplotlib", "skimage", "scipy", "typer", "rich"):
    sys.modules[name] = None  # as if it were not installed
import math, torch
from vae_core.evaluation import ClipMeters
from vae_core.metrics import multiscale_ssim
clip = torch.rand(1, 3, 5, 176, 176, generator=torch.Generator().manual_seed(0)) * 2 - 1
meters = ClipMeters()
meters.update(clip * 0.9, clip)
found = meters.result.figures
assert 15 < found["psnr"] < 40 and 0.5 < found["ssim"] < 1 and 0.5 < found["ms_ssim"] < 1, found
assert found["flicker"] > 0 and math.isnan(found["warp_error"]), found
"""


def test_the_meters_run_with_torch_alone() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
