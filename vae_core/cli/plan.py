"""`cviv-vae plan`: what an encode or decode would do and need, before it runs."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..pictures.plan import draw_plan
from .guard import UserError, guarded, say
from .options import Device, DType, DTypeOption, Weights, load_weights


class Way(str, Enum):
    """Which way to plan."""

    DECODE = "decode"
    ENCODE = "encode"


@guarded
def plan_command(
    width: Annotated[int, typer.Option("--width", min=1, help="Width of the frames in pixels.")],
    height: Annotated[int, typer.Option("--height", min=1, help="Height of the frames in pixels.")],
    frames: Annotated[int, typer.Option("--frames", min=1, help="Frames of the clip.")],
    way: Annotated[Way, typer.Option("--way", help="decode or encode.")] = Way.DECODE,
    budget: Annotated[
        float | None,
        typer.Option("--budget", min=0.001, help="Device memory in GiB, without the weights; if left out: no limit."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Where to write the tiles as a PNG; without: nowhere.")
    ] = None,
    weights: Weights = "demo-cv-vae",
    dtype: DTypeOption = DType.auto,
    device: Device = "auto",
) -> None:
    """Say how a clip would be encoded or decoded within a memory budget. Nothing is computed."""
    if picture is not None and picture.suffix.lower() != ".png":
        raise UserError(f"{picture} is not the name of a PNG file: end it in .png.")
    vae = load_weights(weights, dtype, device)
    compression = vae.info.compression
    latents = compression.latent_frames(frames)
    budget_bytes = None if budget is None else int(budget * 2**30)
    if way is Way.DECODE:
        cells = compression.cells(height), compression.cells(width)
        plan = vae.plan_decode((1, vae.info.latent_channels, latents, *cells), budget_bytes=budget_bytes)
    else:
        plan = vae.plan_encode((1, 3, frames, height, width), budget_bytes=budget_bytes)
    limit = "without a limit" if budget is None else f"within {budget:g} GiB"
    precision = str(vae.dtype).removeprefix("torch.")
    title = f"{way.value} {frames} frames of {width}x{height} with {vae.family}, {precision}, {limit}"
    say(f"{title}\n{plan}")
    if picture is not None:
        draw_plan(plan, (height, width), frames, title).save(picture)
        say(f"picture  {picture}")
