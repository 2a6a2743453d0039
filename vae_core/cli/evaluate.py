"""The commands evaluate and build-set."""

import importlib.util
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..run.tiling import ReferencePlan
from .guard import UserError, cell, err, guarded, note, say, show, visible, warn
from .options import (
    Budget,
    Device,
    DType,
    DTypeOption,
    Ram,
    Tile,
    Tiling,
    TilingOption,
    device_and_dtype,
    limits_of,
    size_of,
)
from .report import figure

if TYPE_CHECKING:
    from ..evaluation import Outcome, Protocol

SKIPPED = 3  # exit code: done, but videos were left out
_OPENCV, _MATPLOTLIB = ("cv2", "opencv-python-headless"), ("matplotlib", "matplotlib")  # module, package
_SHOWN = (
    ("psnr", "PSNR", 2), ("ssim", "SSIM", 4), ("ms_ssim", "MS-SSIM", 4), ("lpips", "LPIPS", 4), ("fvd", "FVD", 2),
    ("ssim_phase_spread", "spread", 4), ("seam", "seams", 2), ("flicker", "flicker", 2),
)  # fmt: skip

Videos = Annotated[
    list[str], typer.Argument(help="Videos, folders of videos, or .txt lists of them.", show_default=False)
]
Size = Annotated[str | None, typer.Option("--size", help="WIDTHxHEIGHT: scale to cover it, and cut to the centre.")]


@guarded
def evaluate_command(
    videos: Videos,
    vae: Annotated[
        list[str] | None,
        typer.Option(
            "--weights",
            "-w",
            "--vae",
            "-v",
            help="demo-cv-vae, demo-iv-vae, a weights file, or a folder of diffusers' AutoencoderKL, TemporalDecoder, "
            "CogVideoX or Wan; NAME+reference-tiles runs CV-VAE in its official tiles. Give it several times.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the report.")] = Path("report"),
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol",
            "-p",
            help="webvid, coco, kinetics-600, activitynet, 480p, 720p or 1080p; the options below change it.",
        ),
    ] = None,
    size: Size = None,
    frames: Annotated[int | None, typer.Option("--frames", min=1, help="Frames of each clip; without: all.")] = None,
    stride: Annotated[int | None, typer.Option("--stride", min=1, help="Take every so manyth frame.")] = None,
    start: Annotated[int | None, typer.Option("--start", min=0, help="First frame to use, counted from 0.")] = None,
    lpips: Annotated[Path | None, typer.Option("--lpips", help="File of AlexNet or VGG-16, for LPIPS.")] = None,
    fvd: Annotated[Path | None, typer.Option("--fvd", help="File of I3D, for FVD.")] = None,
    fetch: Annotated[bool, typer.Option("--fetch-networks", help="Download AlexNet (244 MB) if needed.")] = False,
    image_vae: Annotated[
        Path | None, typer.Option("--image-vae", help="Folder of a diffusers AutoencoderKL, for latent compatibility.")
    ] = None,
    tile_px: Annotated[
        int | None, typer.Option("--tile-px", help="Side of the official tiles; 576, less for small pictures.")
    ] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline/--no-baseline", help="Add a row: shrink 8 times and enlarge.")
    ] = True,
    clips: Annotated[int, typer.Option("--clips", min=0, help="Videos shown in the report, the worst.")] = 4,
    dtype: DTypeOption = DType.auto,
    device: Device = "auto",
    budget: Budget = None,
    ram: Ram = None,
    tiling: Tiling = TilingOption.exact,
    tile: Tile = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what the folder has measured.")] = False,
) -> None:
    """Measure VAEs on videos; write report.html, report.json, summary.csv and videos.csv.

    A run that was ended goes on where it was. A video that cannot be read is reported and left out; the exit code is
    then 3.
    """
    _check_installed(_OPENCV, _MATPLOTLIB)
    from ..evaluation import choose, evaluate  # needs what only evaluation needs
    from ..evaluation.candidates import BASELINE, image_coder
    from ..evaluation.networks import find_networks
    from ..evaluation.page import write_page
    from ..evaluation.protocols import find_videos
    from ..evaluation.summary import write_tables

    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; give a folder with -o.")
    asked = _protocol(protocol, size, frames, stride, start)
    where, kind = device_and_dtype(dtype, device)
    found = find_videos(videos, without=output)
    tiles = None if tile_px is None else _checked(ReferencePlan, tile_px)
    names = [*(vae or ["demo-cv-vae"]), *([BASELINE] if baseline else [])]
    _check_vaes(names)
    try:
        limits = limits_of(budget, ram, tiling, tile)
        choices = [choose(name, device=where, dtype=kind, tiles=tiles, limits=limits) for name in names]
        coder = None if image_vae is None else image_coder(image_vae, device=where, dtype=kind)
    except ValueError as error:
        raise UserError(str(error)) from error
    networks = find_networks(lpips=lpips, fvd=fvd, fetch_lpips=fetch, device=where)
    for text in networks.missing:
        note(text)
    with _spinner() as (bar, task):

        def progress(video: str, name: str, count: int) -> None:
            bar.update(task, description=visible(f"{name}: {video}"), advance=count)

        try:
            outcome = evaluate(
                found, choices, output, protocol=asked, networks=networks, tiles=tiles, image_vae=coder,
                restart=restart, progress=progress,
            )  # fmt: skip
        except ValueError as error:
            raise UserError(str(error)) from error
    for text in outcome.notes:
        if text not in networks.missing:
            note(text)
    files = [write_page(outcome, output, clips=clips), *write_tables(outcome, output)]
    show(_table(outcome))
    for path in files:
        say(f"{path.name}: {path}")
    _end(outcome.broken, len(found))


@guarded
def build_set_command(
    videos: Videos,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the set.")] = Path("evaluation_set"),
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many clips.")] = 100,
    size: Annotated[str, typer.Option("--size", help="WIDTHxHEIGHT of the clips; smaller videos are passed over.")] = (
        "1920x1080"
    ),
    frames: Annotated[int, typer.Option("--frames", min=2, help="Frames of each clip.")] = 97,
    per_video: Annotated[int, typer.Option("--per-video", min=1, help="Clips of one video, at most.")] = 1,
    crf: Annotated[float, typer.Option("--crf", min=0, max=51, help="Quality of the clips; 0 is lossless.")] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a set that is there.")] = False,
) -> None:
    """Cut an evaluation set from videos: scored by motion, chosen evenly over its range, with a manifest of hashes.

    A video that cannot be read is reported and left out; the exit code is then 3.
    """
    _check_installed(_OPENCV)
    from ..evaluation.build_set import MANIFEST, build_set, without_sets  # needs what only evaluation needs
    from ..evaluation.protocols import find_videos

    if (output / MANIFEST).exists() and not overwrite:
        raise UserError(f"{output / MANIFEST} exists already; add --overwrite to replace it, or choose another -o.")
    found = without_sets(find_videos(videos, without=output))
    with _spinner() as (bar, task):
        built = build_set(
            found, output, count=count, size=size_of(size), frames=frames, per_video=per_video, crf=crf,
            progress=lambda text: bar.update(task, description=visible(text), advance=1),
        )  # fmt: skip
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("clip", "motion", "from frame"):
        table.add_column(name, justify="left" if name == "clip" else "right")
    for cut in built.cuts:
        table.add_row(cell(cut.file), f"{cut.motion:.4f}", str(cut.start))
    show(table)
    if len(built.cuts) < count:
        note(f"{len(built.cuts)} clips were cut where {count} were asked for: there are no more.")
    if built.too_small:
        note(f"{len(built.too_small)} videos are smaller than {size} and were passed over: {_few(built.too_small)}.")
    say(f"manifest: {output / MANIFEST}")
    _end(built.broken, len(found))


def _end(broken: dict[str, str], total: int) -> None:
    """Name what was left out, and say so by the exit code."""
    if not broken:
        return
    for why in broken.values():
        warn(f"Left out: {why}")
    warn(f"Error: {len(broken)} of {total} videos were left out.")
    raise typer.Exit(SKIPPED)


def _protocol(
    name: str | None, size: str | None, frames: int | None, stride: int | None, start: int | None
) -> "Protocol":
    from ..evaluation.protocols import PROTOCOLS, Protocol

    if name is not None and name not in PROTOCOLS:
        raise UserError(f"--protocol {name} is not known; choose one of {', '.join(PROTOCOLS)}.")
    chosen = PROTOCOLS[name] if name else Protocol(name="as asked")
    asked = replace(
        chosen,
        size=size_of(size) if size else chosen.size,
        frames=frames or chosen.frames,
        stride=stride or chosen.stride,
        start=start if start is not None else chosen.start,
    )
    return asked if name is None or asked == chosen else replace(asked, name=f"{name}, changed")


def _checked(plan: type[ReferencePlan], tile_px: int) -> ReferencePlan:
    try:
        return plan(tile_px=tile_px)
    except ValueError as error:
        raise UserError(f"--tile-px: {error}") from error


def _check_vaes(names: list[str]) -> None:
    from ..door.loading import DEMO_WEIGHTS
    from ..evaluation.candidates import BASELINE, TILED

    for name in names:
        bare = name.removesuffix(TILED)
        if bare not in (*DEMO_WEIGHTS, BASELINE) and not Path(bare).exists():
            raise UserError(f"--vae {name}: no such file or folder, nor {', '.join((*DEMO_WEIGHTS, BASELINE))}.")


def _check_installed(*needed: tuple[str, str]) -> None:
    for module, package in needed:
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f'This command needs {package}, which is not installed: pip install -e ".[evaluation]" in its folder.'
            )


def _table(outcome: "Outcome") -> Table:
    from ..evaluation.summary import rows

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    found = rows(outcome)
    shown = [one for one in _SHOWN if any(row.figures[one[0]] == row.figures[one[0]] for row in found)]
    for _, heading, _ in shown:
        table.add_column(heading, justify="right")
    for row in found:
        table.add_row(cell(row.name), *(figure(row.figures[key], digits) for key, _, digits in shown))
    return table


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def _spinner() -> Generator[tuple[Progress, TaskID], None, None]:
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TextColumn("{task.completed}"))
    with Progress(*columns, TimeElapsedColumn(), console=err, transient=True, disable=not err.is_terminal) as bar:
        yield bar, bar.add_task("looking", total=None)
