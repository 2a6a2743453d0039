"""Video VAE Encode, and under its old id Video VAE Encode Video, which was a node of its own."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from comfy_api.latest import io

from ..bridge.native import Limits, NativeVideoVAE, limits_of, require
from ..bridge.running import Run, report_ui
from ..bridge.schema import budget_input, check_choice, describe, field, preview_input, tiling_input, vae_input
from ..bridge.video_source import Clip, clip_of, open_video
from ..bridge.wire import Facts, from_video, make_latent, rate_of

MODES = ("mean", "sample")
DEFAULT_FPS = Fraction(24)  # where neither the video nor the user says
FIRST_FRAME_TIP = "The first frame to encode, counted from 0."
FRAME_COUNT_TIP = "How many frames to encode. 0 = to the end."


def encode_clip(
    vae: NativeVideoVAE, clip: Clip, node_id: str, *, mode: str, seed: int, limits: Limits, preview: bool = False
) -> tuple[dict[str, Any], str]:
    """The LATENT of a clip, and the report."""
    check_choice("mode", mode, MODES)
    run = Run(clip.frames, node_id=node_id, preview=preview, size=clip.size)
    streams = (iter((frame,)) for frame in clip.singles()) if vae.layout == "images" else iter((clip.read(),))
    generator = torch.Generator().manual_seed(seed) if mode == "sample" else None
    length = 1 if vae.layout == "images" else clip.frames
    latents = [
        latent
        for stream in streams
        for latent in vae.encode_chunks(
            stream,
            (1, 3, length, clip.height, clip.width),
            run,
            sample=mode == "sample",
            generator=generator,
            limits=limits,
        )
    ]
    samples = from_video(torch.cat(latents, dim=0 if vae.layout == "images" else 2), vae.layout)
    facts = Facts(
        family=vae.codec.family,
        fps=clip.fps,
        frames=run.done,
        height=clip.height,
        width=clip.width,
        aspect=clip.aspect,
        layout=vae.layout,
    )
    run.note(f"latent of shape {tuple(samples.shape)}" + ("" if mode == "mean" else f", drawn with seed {seed}"))
    for remark in clip.remarks:
        run.note(remark)
    return make_latent(samples, facts, vae.layout), run.finish()


class Encode(io.ComfyNode):
    """Images or a VIDEO, or some of their frames, to a latent."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_Encode",
            display_name="Video VAE Encode",
            description="Encodes a clip of any number of frames and any size, of images or straight from a VIDEO: an "
            "hour needs no more memory than a minute, but for the latents themselves. The true count, size and frame "
            "rate stay with the latent, and Video VAE Decode gives exactly them back.",
            search_aliases=["cv-vae encode", "iv-vae encode", "vae encode video", "video to latent"],
            inputs=[
                vae_input(),
                field(
                    io.MultiType,
                    "images",
                    types=[io.Image, io.Video],
                    tooltip="The frames of one clip as IMAGE batch, or a VIDEO. A VIDEO is read while it is encoded.",
                ),
                *_drawing_inputs(),
                field(
                    io.Float,
                    "fps",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.001,
                    tooltip="Frames per second to remember with the latent. 0 = that of the VIDEO; images have none.",
                ),
                budget_input(),
                field(io.Int, "first_frame", default=0, min=0, max=10**8, optional=True, tooltip=FIRST_FRAME_TIP),
                field(io.Int, "frame_count", default=0, min=0, max=10**8, optional=True, tooltip=FRAME_COUNT_TIP),
                preview_input(optional=True),
                field(
                    io.Boolean,
                    "skip_damage",
                    default=False,
                    optional=True,
                    tooltip="Where frames of a damaged file are missing, show the one before and go on; the report "
                    "says how many. Off: an error that says which frames can be used.",
                    advanced=True,
                ),
                tiling_input(),
            ],
            outputs=[
                _latent_output(),
                _report_output(),
                io.Float.Output(
                    display_name="fps", tooltip="Frames per second: the widget's, else the video's, else 24."
                ),
                io.Audio.Output(
                    display_name="audio", tooltip="The sound of the encoded frames; nothing where there is none."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        vae: Any,
        images: Any,
        mode: str,
        sample_seed: int,
        fps: float,
        memory_budget_gb: float,
        first_frame: int = 0,
        frame_count: int = 0,
        preview: bool = True,
        skip_damage: bool = False,
        tiling: str = "exact",
    ) -> io.NodeOutput:
        vae = require(vae)
        clip = clip_of(images, "images", frame_count or None, first=first_frame, skip_damage=skip_damage)
        clip = replace(clip, fps=rate_of(fps) or clip.fps)
        latent, report = encode_clip(
            vae,
            clip,
            cls.hidden.unique_id,
            mode=mode,
            seed=sample_seed,
            limits=limits_of(memory_budget_gb, tiling),
            preview=preview,
        )
        return io.NodeOutput(latent, report, float(clip.fps or DEFAULT_FPS), clip.audio(), ui=report_ui(report))


class EncodeVideo(io.ComfyNode):
    """The old id, for a ComfyUI that cannot replace nodes by itself."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_EncodeVideo",
            display_name="Video VAE Encode Video",
            description="The old name of Video VAE Encode, which takes a VIDEO, too.",
            is_deprecated=True,
            inputs=[
                vae_input(),
                field(io.Video, "video", tooltip="The video, from Load Video or any node that makes one."),
                *_drawing_inputs(),
                field(io.Int, "first_frame", default=0, min=0, max=10**8, tooltip=FIRST_FRAME_TIP),
                field(io.Int, "frame_count", default=0, min=0, max=10**8, tooltip=FRAME_COUNT_TIP),
                budget_input(),
            ],
            outputs=[
                _latent_output(),
                io.Float.Output(display_name="fps", tooltip="Frames per second of the video."),
                io.Audio.Output(
                    display_name="audio", tooltip="The sound of the encoded frames; nothing where there is none."
                ),
                _report_output(),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        vae: Any,
        video: Any,
        mode: str,
        sample_seed: int,
        first_frame: int,
        frame_count: int,
        memory_budget_gb: float,
    ) -> io.NodeOutput:
        clip = open_video(video).clip("video", first_frame, frame_count or None)
        latent, report = encode_clip(
            require(vae), clip, cls.hidden.unique_id, mode=mode, seed=sample_seed, limits=limits_of(memory_budget_gb)
        )
        return io.NodeOutput(latent, float(clip.fps or DEFAULT_FPS), clip.audio(), report, ui=report_ui(report))


# how a workflow with the old node becomes one with the new: keyword arguments of io.NodeReplace
_REPLACED = {
    "new_node_id": "CVIV_Encode",
    "old_node_id": "CVIV_EncodeVideo",
    "old_widget_ids": ["mode", "sample_seed", "first_frame", "frame_count", "memory_budget_gb"],
    "input_mapping": [
        {"new_id": "vae", "old_id": "vae"},
        {"new_id": "images", "old_id": "video"},
        {"new_id": "mode", "old_id": "mode"},
        {"new_id": "sample_seed", "old_id": "sample_seed"},
        {"new_id": "fps", "set_value": 0.0},
        {"new_id": "memory_budget_gb", "old_id": "memory_budget_gb"},
        {"new_id": "first_frame", "old_id": "first_frame"},
        {"new_id": "frame_count", "old_id": "frame_count"},
    ],
    "output_mapping": [
        {"new_idx": 0, "old_idx": 0},
        {"new_idx": 2, "old_idx": 1},
        {"new_idx": 3, "old_idx": 2},
        {"new_idx": 1, "old_idx": 3},
    ],
}


def _drawing_inputs() -> list[Any]:
    return [
        field(
            io.Combo,
            "mode",
            options=list(MODES),
            default="mean",
            tooltip="mean: the most likely latent, the same every time, best for reconstruction and editing. sample: a "
            "draw from the posterior, as in training.",
        ),
        field(
            io.Int,
            "sample_seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            tooltip="Seed of the draw. Without effect in the mode mean.",
        ),
    ]


def _latent_output() -> Any:
    return io.Latent.Output(
        display_name="latent",
        tooltip="With count, size and frame rate of what was encoded. Unscaled for CV-VAE, as samplers expect.",
    )


def _report_output() -> Any:
    return io.String.Output(display_name="report", tooltip="What ran, how long, how much memory, exact or not.")


NODES = [Encode]
OLD_NODES = [(EncodeVideo, _REPLACED)]
