"""Latent Layout: between 4-D frame batches and 5-D videos."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..bridge.schema import check_choice, describe, field, latent_input
from ..bridge.wire import Layout, from_video, make_latent, read_facts, samples_of, to_video

LAYOUTS: dict[str, Layout] = {"video 5-D": "video", "clip as frame batch": "frames"}


class LatentLayout(io.ComfyNode):
    """Moves the frames of a latent between the batch axis and an axis of their own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_LatentLayout",
            display_name="Latent Layout",
            description="Turns a latent with its frames on the batch axis (SD, AnimateDiff, SVD) into a 5-D video "
            "latent, or back. The numbers stay the same.",
            search_aliases=["latent 4d to 5d", "frames to batch", "batch to frames"],
            inputs=[
                latent_input(),
                field(io.Combo, "layout", options=list(LAYOUTS), default="video 5-D", tooltip="The layout to give."),
                field(
                    io.Int,
                    "clips",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="How many clips of one length a frame batch holds, one after another.",
                    advanced=True,
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The same latent, laid out as chosen.")],
        )

    @classmethod
    def execute(cls, samples: Any, layout: str, clips: int) -> io.NodeOutput:
        check_choice("layout", layout, tuple(LAYOUTS))
        target = LAYOUTS[layout]
        tensor, facts = samples_of(samples), read_facts(samples)
        if target == "frames" and facts.own_space:
            raise ValueError(
                f"This latent was made by {facts.family}, whose latent space is its own, and the frame batch is the "
                "layout of SD and SVD samplers, which would make noise of it. Encode with a CV-VAE for those samplers."
            )
        video = to_video(tensor, "frames", clips)
        base = dict(samples)
        if isinstance(base.get("noise_mask"), Tensor):
            base["noise_mask"] = _mask(base["noise_mask"], target, video)
        base.pop("batch_index", None)  # it numbers the batch axis, which means something else now
        return io.NodeOutput(make_latent(from_video(video, target), facts, target, base))


def _mask(mask: Tensor, target: Layout, video: Tensor) -> Tensor:
    """A noise mask for the new layout: (frames, 1, h, w) on the batch axis, (b, 1, t, h, w) for a video."""
    clips, frames = video.shape[0], video.shape[2]
    flat = mask.reshape(-1, 1, *mask.shape[-2:])  # masks come with and without an axis of channels
    if flat.shape[0] not in (1, clips * frames):
        flat = flat.repeat(-(-clips * frames // flat.shape[0]), 1, 1, 1)[: clips * frames]
    if flat.shape[0] == 1:
        return flat if target == "frames" else flat.unsqueeze(2)
    return flat if target == "frames" else torch.stack(flat.split(frames)).transpose(1, 2)


NODES = [LatentLayout]
