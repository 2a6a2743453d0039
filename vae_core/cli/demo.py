"""`cviv-vae demo`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from ..door.loading import DEMO_FOLDER
from . import report
from .guard import UserError, guarded, say, say_written, show
from .options import (
    Budget,
    Device,
    DType,
    DTypeOption,
    Frames,
    Overwrite,
    Ram,
    Tile,
    Tiling,
    TilingOption,
    bounded,
    load_weights,
)
from .outputs import check_outputs
from .progress import progress
from .work import Clip, Quality, opened, reconstruct

DEMO_CLIP = DEMO_FOLDER / "demo_clip.mp4"
DEMO_NAMES = ("demo-cv-vae", "demo-iv-vae")
DEMO_COLUMNS = 5


@guarded
def demo_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for the results; made if needed.")] = Path(
        "cviv_vae_demo"
    ),
    dtype: DTypeOption = DType.auto,
    device: Device = "auto",
    frames: Frames = None,
    budget: Budget = None,
    ram: Ram = None,
    tiling: Tiling = TilingOption.exact,
    tile: Tile = None,
    overwrite: Overwrite = False,
) -> None:
    """Send the bundled clip through both demo VAEs; write videos and a contact sheet."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; give a folder with -o.")
    output.mkdir(parents=True, exist_ok=True)
    sheet = output / "contact_sheet.png"
    videos = {name: (output / f"{name}.mp4", output / f"{name}_side_by_side.mp4") for name in DEMO_NAMES}
    check_outputs([path for pair in videos.values() for path in pair] + [sheet], overwrite=overwrite)
    clip = opened(DEMO_CLIP, 0, frames)
    shown = report.spread(clip.frames, DEMO_COLUMNS)
    results: list[tuple[str, Quality, float]] = []
    pickers: list[report.FramePicker] = []
    for name, (plain, beside) in videos.items():
        vae = bounded(load_weights(name, dtype, device), budget, ram, tiling, tile)
        picker, began = report.FramePicker(shown), time.monotonic()
        with progress(name, clip.frames) as advance:
            quality, _ = reconstruct(vae, clip, plain=plain, beside=beside, seed=None, advance=advance, watch=picker)
        results.append((f"{name} (z {vae.info.latent_channels})", quality, time.monotonic() - began))
        pickers.append(picker)
    _draw_sheet(sheet, clip, pickers, results)
    show(report.summary_table(results))
    say("Demo weights are small and briefly trained: they show that all works, not what the papers' models reach.")
    say_written([(name, path) for name, pair in videos.items() for path in pair] + [("contact sheet", sheet)])


def _draw_sheet(
    path: Path, clip: Clip, pickers: list[report.FramePicker], results: list[tuple[str, Quality, float]]
) -> None:
    shown = sorted(pickers[0].originals)
    rows = [("Original", f"{clip.info.width} x {clip.info.height}", [pickers[0].originals[i] for i in shown])]
    for label, picker, (_, quality, _) in zip(("CV-VAE demo", "IV-VAE demo"), pickers, results, strict=True):
        psnr, ssim = quality.mean
        rows.append((label, f"{psnr:.2f} dB, SSIM {ssim:.3f}", [picker.results[i] for i in shown]))
    report.contact_sheet(path, title="CV-VAE and IV-VAE, demo weights", rows=rows, frames=shown)
