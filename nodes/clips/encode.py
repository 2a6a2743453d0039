"""Video VAE Encode and Video VAE Encode Video."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io

from ..bridge.native import NativeVideoVAE, budget_bytes, require
from ..bridge.running import Run, report_ui
from ..bridge.schema import budget_input, check_choice, describe, field, vae_input
from ..bridge.video_source import Clip, clip_of, open_video
from ..bridge.wire import Facts, from_video, make_latent, rate_of

MODES = ("mean", "sample")


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


def _skip_damage_input() -> Any:
    return field(
        io.Boolean,
        "skip_damage",
        default=False,
        optional=True,
        tooltip="Where frames of a damaged file are missing, show the one before and go on; the report says how many. "
        "Off: an error that says which frames can be used.",
        advanced=True,
    )


def encode_clip(
    vae: NativeVideoVAE, clip: Clip, node_id: str, *, mode: str, seed: int, budget_gb: float
) -> tuple[dict[str, Any], str]:
    """The LATENT of a clip, and the report."""
    check_choice("mode", mode, MODES)
    run = Run(clip.frames, node_id=node_id)
    streams = (iter((frame,)) for frame in clip.singles()) if vae.layout == "images" else iter((clip.read(),))
    generator = torch.Generator().manual_seed(seed) if mode == "sample" else None
    length = 1 if vae.layout == "images" else clip.frames
    latents = [
        latent
        for stream in streams
        for latent in vae.encode_pieces(
            stream,
            (1, 3, length, clip.height, clip.width),
            run,
            sample=mode == "sample",
            generator=generator,
            budget=budget_bytes(budget_gb),
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
    for sentence in clip.told:
        run.note(sentence)
    run.note(
        f"{run.done} frames of {clip.width}x{clip.height} to {tuple(samples.shape)}"
        + ("" if mode == "mean" else f", drawn with seed {seed}")
    )
    return make_latent(samples, facts, vae.layout), run.finish()


class Encode(io.ComfyNode):
    """Images or a VIDEO to a latent."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_Encode",
            display_name="Video VAE Encode",
            description="Encodes a clip of any number of frames and any size. The true count, size and frame rate stay "
            "with the latent, and Video VAE Decode gives exactly them back.",
            search_aliases=["cv-vae encode", "iv-vae encode", "vae encode video"],
            inputs=[
                vae_input(),
                field(
                    io.MultiType,
                    "images",
                    types=[io.Image, io.Video],
                    tooltip="The frames of one clip as IMAGE batch, or a VIDEO. A VIDEO is read piece by piece.",
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
                _skip_damage_input(),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="Unscaled for CV-VAE, as samplers expect."),
                io.String.Output(
                    display_name="report", tooltip="What ran, in which pieces, how long, how much memory."
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
        skip_damage: bool = False,
    ) -> io.NodeOutput:
        vae = require(vae)
        clip = clip_of(images, "images", skip_damage=skip_damage)
        clip = replace(clip, fps=rate_of(fps) or clip.fps)
        latent, report = encode_clip(
            vae, clip, cls.hidden.unique_id, mode=mode, seed=sample_seed, budget_gb=memory_budget_gb
        )
        return io.NodeOutput(latent, report, ui=report_ui(report))


class EncodeVideo(io.ComfyNode):
    """A VIDEO, or a part of it, to a latent, streaming."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_EncodeVideo",
            display_name="Video VAE Encode Video",
            description="Encodes a VIDEO straight from its file: an hour needs no more memory than a minute, but for "
            "the latents themselves.",
            search_aliases=["cv-vae encode video file", "video to latent"],
            inputs=[
                vae_input(),
                field(io.Video, "video", tooltip="The video, from Load Video or any node that makes one."),
                *_drawing_inputs(),
                field(
                    io.Int,
                    "first_frame",
                    default=0,
                    min=0,
                    max=10**8,
                    tooltip="The first frame to encode, counted from 0.",
                ),
                field(
                    io.Int,
                    "frame_count",
                    default=0,
                    min=0,
                    max=10**8,
                    tooltip="How many frames to encode. 0 = to the end.",
                ),
                budget_input(),
                _skip_damage_input(),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="With count, size and frame rate of what was encoded."),
                io.Float.Output(display_name="fps", tooltip="Frames per second of the video."),
                io.Audio.Output(
                    display_name="audio", tooltip="The sound of the encoded part; nothing where there is none."
                ),
                io.String.Output(
                    display_name="report", tooltip="What ran, in which pieces, how long, how much memory."
                ),
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
        skip_damage: bool = False,
    ) -> io.NodeOutput:
        vae = require(vae)
        source = open_video(video, skip_damage=skip_damage)
        count = frame_count or None
        clip = source.clip("video", first_frame, count)
        latent, report = encode_clip(
            vae, clip, cls.hidden.unique_id, mode=mode, seed=sample_seed, budget_gb=memory_budget_gb
        )
        audio = source.audio(first_frame, count)
        return io.NodeOutput(latent, float(source.fps), audio, report, ui=report_ui(report))


NODES = [Encode, EncodeVideo]
