"""Decode Loop: the frames of a clip that goes round."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ...vae_core.families import VIDEO
from ..bridge.limits import limits_of
from ..bridge.native import collect_images, require
from ..bridge.running import Run, report_ui
from ..bridge.schema import budget_input, describe, latent_input, preview_input, vae_input
from ..bridge.wire import read_facts

LEAD = 4  # latents of the end, at least, that are decoded before the beginning and then left out
_CHUNK = 4  # latents that a CV-VAE decodes at once, in addition to one that the chunk before has, too
_DEFAULT_FPS = 24.0


class DecodeLoop(io.ComfyNode):
    """A latent of SVD Long Video in mode loop to images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_DecodeLoop",
            display_name="Decode Loop",
            description="Decodes a clip that goes round, from SVD Long Video in mode loop: four frames of every "
            "latent, the first included, and no step where the end meets the beginning.",
            search_aliases=["seamless loop", "looping video", "boomerang", "cinemagraph"],
            inputs=[vae_input(), latent_input(), budget_input(), preview_input()],
            outputs=[
                io.Image.Output(display_name="images", tooltip="Four frames for each latent, in 0..1."),
                io.Float.Output(display_name="fps", tooltip="Frames per second that the latent remembers, else 24."),
                io.String.Output(display_name="report", tooltip="What ran, and how far the end lies from the start."),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, vae: Any, samples: Any, memory_budget_gb: float, preview: bool) -> io.NodeOutput:
        vae = require(vae)
        z, facts = vae.video_latent(samples), read_facts(samples)
        if z.shape[0] != 1 or z.shape[2] < 2:
            raise ValueError(
                f"The latent holds {z.shape[0]} clips of {z.shape[2]} latents; a loop is one clip of two latents or "
                "more. Choose layout clip as frame batch in Load Video VAE, or take one clip with Latent From Batch."
            )
        latents = z.shape[2]
        lead = LEAD + (1 - latents) % _CHUNK  # so that the last chunk is whole: a shorter one is normalised otherwise
        before = torch.arange(-lead, latents) % latents
        frames = VIDEO.pixel_frames(latents + lead)
        run = Run(frames, node_id=cls.hidden.unique_id, preview=preview)
        limits = limits_of(memory_budget_gb)
        chunks = vae.decode_chunks(z[:, :, before], run, frames=frames, size=facts.size, limits=limits, lent=True)
        images = collect_images(chunks, 1, frames)[0, frames - VIDEO.time * latents :].clone()
        run.note(
            f"{VIDEO.time * latents} frames go round: the last {lead} latents were decoded in front and left out again"
        )
        run.note(_closing(images))
        report = run.finish()
        return io.NodeOutput(images, float(facts.fps or _DEFAULT_FPS), report, ui=report_ui(report))


def _closing(images: Tensor) -> str:
    """How the step from the last frame to the first compares to the others."""
    steps = torch.stack([(b - a).abs().mean() for a, b in zip(images, images.roll(-1, 0), strict=True)])
    usual = float(steps[:-1].mean())
    return f"the step from end to beginning is {float(steps[-1]) / max(usual, 1e-9):.1f} times the usual one"


NODES = [DecodeLoop]
