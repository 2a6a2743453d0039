"""The plan of a clip whose first chunk is at hand, within what a user allows."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import BudgetError
from ..families import Direction
from ..plan.planner import PlanOptions
from ..run.stream import Recover
from ..run.tiling import AnyPlan

if TYPE_CHECKING:
    from .vae import VideoVAE

AUTOMATIC_SHARE = 0.85  # of the free memory of a GPU; the rest is for the screen, and what cannot be foreseen
LONG = 100  # latents; no chunk is longer


def planned(
    vae: VideoVAE, direction: Direction, chunks: Iterable[Tensor], plan: AnyPlan, limits: PlanOptions
) -> tuple[Iterable[Tensor], AnyPlan, Recover | None]:
    """The chunks, how they run (by `plan`, if there is one), and what happens when memory runs out.

    Raises BudgetError where nothing fits, or `plan` does not.
    """
    rest = iter(chunks)
    first = next(rest, None)
    if first is None:
        return (), None, None
    windows, length = vae.model.family.windows(direction), first.shape[2]
    if windows.first == 1:  # and later chunks take more memory, if there are any
        first = first.clone()  # it may be written over when the next is asked for
        second = next(rest, None)
        if second is not None:
            rest, length = chain([second], rest), LONG
    elif length >= windows.first:
        length = LONG
    shape = (*first.shape[:2], length, *first.shape[3:])
    options: PlanOptions = {"device": vae.device, **limits}
    limited = bool(options.get("budget_bytes") or options.get("ram_bytes"))
    if plan is not None and limited:
        told = vae.describe_plan(plan, shape, direction, **options)
        if not told.fits:
            raise BudgetError(
                f"{told.way} would take {told.device_bytes / 2**30:.3f} GiB of device memory and "
                f"{told.host_bytes / 2**30:.3f} GiB of RAM for what waits, and less is allowed. Leave the tile out, "
                "and what fits is chosen; or allow more."
            )
    if options.get("budget_bytes") is None and vae.device.type == "cuda":
        options["budget_bytes"] = int(AUTOMATIC_SHARE * torch.cuda.mem_get_info(vae.device)[0])
    if plan is None and (vae.device.type != "cpu" or limited):
        plan_for = vae.plan_decode if direction == "decode" else vae.plan_encode
        required: PlanOptions = {**options, "required": True}
        plan = plan_for(shape, **required).tiles
    return chain([first], rest), plan, lambda _, ran: vae.smaller_plan(ran, shape, direction, **options)
