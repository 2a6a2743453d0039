"""Video VAE Plan: what an encode or decode would do and need, before it runs."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ...vae_core.pictures import draw_plan
from ..bridge.limits import Limits, limits_of
from ..bridge.native import require
from ..bridge.plan_words import plan_words
from ..bridge.running import clock, count_of, report_ui
from ..bridge.schema import budget_input, check_choice, describe, dtype_words, field, size_words, vae_input
from ..bridge.wire import image_of

DIRECTIONS = ("decode", "encode")


class PlanNode(io.ComfyNode):
    """A plan in words and as a picture; nothing is computed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_Plan",
            display_name="Video VAE Plan",
            description="Says how a clip would be encoded or decoded within a memory budget: chunks, tiles, memory, "
            "exact or not. Nothing is computed, so it answers at once, before an hour of sampling.",
            search_aliases=["tile plan", "memory estimate", "vae memory"],
            inputs=[
                vae_input(),
                field(io.Combo, "direction", options=list(DIRECTIONS), default="decode", tooltip="Which way to plan."),
                field(io.Int, "frames", default=97, min=1, max=10**8, tooltip="Frames of the clip."),
                field(io.Int, "width", default=1024, min=8, max=16384, tooltip="Width of the frames in pixels."),
                field(io.Int, "height", default=576, min=8, max=16384, tooltip="Height of the frames in pixels."),
                budget_input(),
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="The tiles over the frame and the chunks over time."),
                io.String.Output(display_name="report", tooltip="The plan in words. Its memory is a prediction."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, vae: Any, direction: str, frames: int, width: int, height: int, memory_budget_gb: float
    ) -> io.NodeOutput:
        vae = require(vae)
        check_choice("direction", direction, DIRECTIONS)
        budget = limits_of(memory_budget_gb).budget or vae.could_be_free()
        if direction == "decode":
            cells = vae.compression.cells(height), vae.compression.cells(width)
            shape = (1, vae.latent_channels, vae.compression.latent_frames(frames), *cells)
        else:
            shape = (1, 3, frames, height, width)
        plan = vae.plan(direction, shape, Limits(budget=budget))
        exact = "exact" if plan.exact else "not exact: blended"
        head = f"{direction} {count_of(frames, 'frame')} {width}x{height}: {exact}"
        words = [
            f"{vae.codec.family}, {dtype_words(vae.vae_dtype)} on {vae.device}, budget {size_words(budget)}",
            *plan_words(plan, vae.device),
            f"about {clock(plan.seconds)}{' by guess, before anything ran' if plan.guessed else ''}",
        ]
        image = image_of(draw_plan(plan, (height, width), frames, head, words))
        report = "\n".join((head, *words))
        shown = ui.PreviewImage(image, cls=cls).as_dict() | report_ui(report)
        return io.NodeOutput(image, report, ui=shown)


NODES = [PlanNode]
