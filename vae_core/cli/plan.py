"""`cviv-vae plan`: what an encode or decode would do and need, before it runs."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..atomic import atomic_write
from ..pictures.plan import draw_plan
from ..plan.planner import PlanOptions
from ..plan.rates import Rates
from .guard import UserError, guarded, say
from .options import (
    Budget,
    Device,
    DType,
    DTypeOption,
    Ram,
    Tiling,
    TilingOption,
    Weights,
    bytes_of,
    device_named,
    dtype_for,
    load_weights,
    size_of,
)


class Way(str, Enum):
    """Which way to plan."""

    DECODE = "decode"
    ENCODE = "encode"


@guarded
def plan_command(
    frames: Annotated[int, typer.Option("--frames", min=1, max=10**9, help="Frames of the clip.")],
    size: Annotated[str | None, typer.Option("--size", help="WIDTHxHEIGHT of the frames in pixels.")] = None,
    width: Annotated[int | None, typer.Option("--width", min=1, max=10**6, help="Instead of --size.")] = None,
    height: Annotated[int | None, typer.Option("--height", min=1, max=10**6, help="Instead of --size.")] = None,
    way: Annotated[Way, typer.Option("--way", help="decode or encode.")] = Way.DECODE,
    budget: Budget = None,
    ram: Ram = None,
    tiling: Tiling = TilingOption.exact,
    rates: Annotated[
        tuple[float, float, float] | None,
        typer.Option(
            help="What the device does: TFLOP/s of convolutions, GB/s of its memory, GB/s to and from RAM; measured, "
            "or those of a card of the middle class, if left out.",
            show_default=False,
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Where to write the tiles as a PNG; without: nowhere.")
    ] = None,
    weights: Weights = "demo-cv-vae",
    dtype: DTypeOption = DType.auto,
    device: Device = "auto",
) -> None:
    """Say how a clip would be encoded or decoded within a memory budget. Nothing is computed.

    The device need not be there: --device cuda plans for a card that you might have.
    """
    if picture is not None and picture.suffix.lower() != ".png":
        raise UserError(f"{picture} is not the name of a PNG file: end it in .png.")
    height, width = _sides(size, width, height)
    vae = load_weights(weights, dtype, "cpu")
    where = device_named(device)
    kind = dtype_for(dtype, where)
    compression = vae.info.compression
    latents = compression.latent_frames(frames)
    if rates is not None and not all(0 < rate < float("inf") for rate in rates):
        raise UserError(f"--rates {' '.join(f'{rate:g}' for rate in rates)}: rates are finite and above 0.")
    asked: PlanOptions = {
        "budget_bytes": bytes_of(budget),
        "ram_bytes": bytes_of(ram),
        "blended": tiling is TilingOption.blended,
        "device": where,
        "dtype": kind,
        "rates": None if rates is None else Rates(flops=rates[0] * 1e12, memory=rates[1] * 1e9, bus=rates[2] * 1e9),
    }
    if way is Way.DECODE:
        cells = compression.cells(height), compression.cells(width)
        plan = vae.plan_decode((1, vae.info.latent_channels, latents, *cells), **asked)
    else:
        plan = vae.plan_encode((1, 3, frames, height, width), **asked)
    limit = "without a limit" if budget is None else f"within {budget:g} GiB"
    precision = str(kind).removeprefix("torch.")
    title = f"{way.value} {frames} frames of {width}x{height} with {vae.family}, {precision}, {limit}"
    say(f"{title}\n{plan}")
    if picture is not None:
        with atomic_write(picture) as part:
            draw_plan(plan, (height, width), frames, title).save(part)
        say(f"picture  {picture}")


def _sides(size: str | None, width: int | None, height: int | None) -> tuple[int, int]:
    """Height and width, of --size or of the two options."""
    if size is not None and width is None and height is None:
        return size_of(size)
    if size is not None or width is None or height is None:
        raise UserError("Give --size WIDTHxHEIGHT such as 1280x720, or both of --width and --height instead.")
    return height, width
