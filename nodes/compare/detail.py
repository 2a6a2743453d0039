"""Keyframe Detail: the detail of single images, decoded by the image VAE, for the frames of a video."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ...vae_core.detail import MOST_CONFIDENCE, DetailSettings, check_counts, fuse_detail
from ...vae_core.families import VIDEO
from ..bridge.running import Run, report_ui
from ..bridge.schema import describe, field
from ..bridge.wire import chunks_of, images_of, pixels_of

NO_GAIN = "the keyframes are no sharper than the video, or do not agree with it, or with each other along the motion"
UNLIKE = 0.5  # correlation below which a keyframe and its frames seem to be of different pictures


class DetailFusion(io.ComfyNode):
    """Frames and keyframes in, sharper frames out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_DetailFusion",
            display_name="Keyframe Detail",
            description="Gives the frames that a CV-VAE decoded the fine detail of the same latents decoded one by one "
            "by the image VAE (VAE Decode): what keyframes agree on, along the motion, where they have more than the "
            "video. Needs opencv-python-headless.",
            search_aliases=["detail fusion", "sharpen video", "two decoder fusion", "sharp keyframes"],
            inputs=[
                field(
                    io.Image, "frames", tooltip="The video: from Video VAE Decode with a CV-VAE, 4N - 3 of N latents."
                ),
                field(
                    io.Image,
                    "keyframes",
                    tooltip="The same latent through VAE Decode with the VAE of SD or SVD's checkpoint, one image for "
                    "each latent: 25 for 97 frames.",
                ),
                field(
                    io.Float,
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How much of the keyframes' detail replaces the video's own. 0 = the frames as they are.",
                ),
                field(
                    io.Float,
                    "detail_radius",
                    default=3.0,
                    min=0.5,
                    max=32.0,
                    step=0.5,
                    tooltip="What counts as detail, in pixels: everything that a blur of this radius takes away.",
                ),
                field(
                    io.Float,
                    "confidence",
                    default=0.5,
                    min=0.0,
                    max=MOST_CONFIDENCE,
                    step=0.05,
                    tooltip="How sure motion and keyframes have to be. 0 = trust them even where they disagree; higher "
                    "= the video's own picture wherever there is doubt. 0.5 made no clip of the bench worse.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="All frames, with detail, in 0..1."),
                io.String.Output(
                    display_name="report", tooltip="How much of the picture got detail, or that nothing was added."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
            is_experimental=True,
        )

    @classmethod
    def execute(
        cls, frames: Any, keyframes: Any, strength: float, detail_radius: float, confidence: float
    ) -> io.NodeOutput:
        settings = DetailSettings(strength=strength, radius=detail_radius, confidence=confidence)
        video, images = pixels_of(frames), pixels_of(keyframes)
        check_counts(video.shape[0], images.shape[0])
        run = Run(video.shape[0], node_id=cls.hidden.unique_id)
        images = _fitting(images, video, run)
        if strength == 0:
            run.step(run.total)
            run.note("strength 0: the frames are as they were")
        else:
            fused = _fuse(video, images, settings, run)
            frames = frames if fused is None else fused
        report = run.finish()
        return io.NodeOutput(frames, report, ui=report_ui(report))


def _fuse(video: Tensor, images: Tensor, settings: DetailSettings, run: Run) -> Tensor | None:
    """(n, h, w, 3) in 0..1, or None where nothing was added; what happened goes to the notes of `run`."""
    run.begin(video.device)
    result = torch.empty(video.shape, dtype=torch.float32)
    carried: list[float] = []
    likeness: list[float] = []
    for chunk in fuse_detail(_on_host(video), _on_host(images), settings):
        pixels = images_of(chunk.frames)[0]
        result[run.done : run.done + pixels.shape[0]] = pixels
        carried.extend(chunk.carried)
        likeness.extend([] if chunk.likeness is None else [chunk.likeness])
        run.step(pixels.shape[0])
    run.note(_gain(carried, len(likeness)))
    unlike = [number for number, value in enumerate(likeness) if value < UNLIKE]
    if unlike:
        run.note(
            f"keyframes {', '.join(map(str, unlike))} hardly look like their frames: are both decoded from the same "
            "latent, and by VAEs of one latent space?"
        )
    return result if any(carried) else None


def _gain(carried: list[float], keyframes: int) -> str:
    """What was done, in a sentence. carried: for each frame the share of the picture that got detail."""
    if not any(carried):
        return "nothing was added, the frames are as they were: " + (
            "a single keyframe cannot be checked against others" if keyframes < 2 else NO_GAIN
        )
    mean = sum(carried) / len(carried)
    least, most = (pick(range(len(carried)), key=carried.__getitem__) for pick in (min, max))
    untouched = sum(1 for share in carried if share == 0)
    rest = f"; {untouched} of {len(carried)} frames are as they were" if untouched else ""
    return (
        f"detail of {keyframes} keyframes added to {mean:.0%} of the picture, least in frame {least}: "
        f"{carried[least]:.0%}, most in frame {most}: {carried[most]:.0%}{rest}"
    )


def _on_host(images: Tensor) -> Iterator[Tensor]:
    """Chunks of an IMAGE on the CPU, where the motion is found; ComfyUI may keep images on the GPU."""
    return (chunk.cpu() for chunk in chunks_of(images))


def _fitting(images: Tensor, video: Tensor, run: Run) -> Tensor:
    """The keyframes at the size of the video. Raises ValueError where more than a VAE's padding is over."""
    height, width = video.shape[1:3]
    got = images.shape[1:3]
    if got == (height, width):
        return images
    if got == (-(-height // VIDEO.space) * VIDEO.space, -(-width // VIDEO.space) * VIDEO.space):
        run.note(f"the padding of the keyframes ({got[1]}x{got[0]}) at the right and the bottom is cut off")
        return images[:, :height, :width]
    raise ValueError(
        f"The keyframes have {got[1]}x{got[0]} pixels and the frames {width}x{height}; they must be equal. Decode the "
        "same latent with both VAEs, and scale afterwards."
    )


NODES = [DetailFusion]
