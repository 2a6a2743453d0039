"""The command encode-dataset."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..dataset import Counts, EncodeJob, EncodeJobError, EncodeSettings
from ..training.data import TrainingDataError
from .guard import UserError, err, guarded, note, say
from .options import (
    Budget,
    Device,
    DType,
    DTypeOption,
    Ram,
    Seed,
    Tile,
    Tiling,
    TilingOption,
    Weights,
    device_and_dtype,
    limits_of,
    size_of,
)

SKIPPED = 3  # exit code: done, but clips were left out
_SHOWN = 10


class Form(str, Enum):
    """Forms of the shards."""

    safetensors = "safetensors"
    webdataset = "webdataset"


class Stored(str, Enum):
    """Precisions of stored latents."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@guarded
def encode_dataset_command(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Folders, .csv lists (path, start, end), .tar shards, images, videos.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the shards.")],
    weights: Weights = "demo-cv-vae",
    size: Annotated[
        str | None, typer.Option("--size", help="WIDTHxHEIGHT: scale down to cover it, and cut to the centre.")
    ] = None,
    frames: Annotated[int | None, typer.Option("--frames", min=1, help="Frames of each video; without: all.")] = None,
    stride: Annotated[int, typer.Option("--stride", min=1, help="Take every so manyth frame.")] = 1,
    seed: Seed = None,
    form: Annotated[Form, typer.Option("--format", help="Form of the shards.")] = Form.safetensors,
    stored: Annotated[Stored, typer.Option("--store", help="Precision of the stored latents.")] = Stored.float32,
    clips_per_shard: Annotated[int, typer.Option("--clips-per-shard", min=1, help="Clips of a shard, at most.")] = 256,
    dtype: DTypeOption = DType.auto,
    device: Device = "auto",
    retry_broken: Annotated[
        bool, typer.Option("--retry-broken", help="Try clips again that could not be encoded before.")
    ] = False,
    budget: Budget = None,
    ram: Ram = None,
    tiling: Tiling = TilingOption.exact,
    tile: Tile = None,
    ray: Annotated[
        str | None, typer.Option("--ray", help="Run on Ray: local, auto, or the address of a cluster.", metavar="WHERE")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Workers of Ray, one GPU or core each.")] = 1,
) -> None:
    """Encode a data set of videos and images into shards of latents, with a manifest.

    A run that was ended goes on where it was; what is finished is not encoded again, unless its file has changed. A
    clip that cannot be read is reported and left out; the exit code is then 3.
    """
    where, kind = device_and_dtype(dtype, device)
    try:
        settings = EncodeSettings(
            weights=weights,
            dtype=kind,
            stored={Stored.float32: torch.float32, Stored.float16: torch.float16, Stored.bfloat16: torch.bfloat16}[
                stored
            ],
            size=None if size is None else size_of(size),
            frames=frames,
            stride=stride,
            seed=seed,
            form=form.value,
            clips_per_shard=clips_per_shard,
            limits=limits_of(budget, ram, tiling, tile),
        )
        job = EncodeJob(sources, output, settings, retry_broken=retry_broken)
        if job.again:
            note(f"{job.again} clips are encoded again: they were broken, or their files are others now.")
        counts = _run(job, where, ray, workers)
    except (EncodeJobError, TrainingDataError) as error:
        raise UserError(str(error)) from error
    if job.gone:
        note(f"{len(job.gone)} clips are no longer in the sources; their latents stay. manifest.json names them.")
    errors = job.errors()
    for name, reason in list(errors.items())[:_SHOWN]:
        note(f"left out: {reason if name in reason else f'{name}: {reason}'}")
    if len(errors) > _SHOWN:
        note(f"and {len(errors) - _SHOWN} more; manifest.json names them all.")
    for name, ending in list(job.damaged.items())[:_SHOWN]:
        note(f"{name} {ending}; it is encoded all the same.")
    if len(job.damaged) > _SHOWN:
        note(f"and {len(job.damaged) - _SHOWN} more that are damaged; manifest.json names them all.")
    say(
        f"{output}: {counts.encoded} of {counts.clips} clips encoded, {counts.now} of them in this run; "
        f"{counts.frames} frames; {counts.broken} clips left out"
    )
    if errors:
        raise typer.Exit(SKIPPED)


def _run(job: EncodeJob, device: torch.device, ray: str | None, workers: int) -> Counts:
    columns = (TextColumn("encoding"), BarColumn(), MofNCompleteColumn(), TextColumn("clips"), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        counts = job.counts()
        task = bar.add_task("", total=counts.clips, completed=counts.clips - counts.pending)

        def progress(now: Counts) -> None:
            bar.update(task, completed=now.clips - now.pending)

        if ray is None:
            return job.run(device, progress)
        from ..dataset.on_ray import run_on_ray

        address = None if ray == "local" else ray
        return run_on_ray(job, device=str(device), workers=workers, address=address, progress=progress)
