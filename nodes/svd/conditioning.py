"""SVD Image to Long Video: conditioning and empty latent for a clip of so many frames."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import comfy.utils
import torch
import torch.nn.functional as F
from comfy_api.latest import io
from torch import Tensor

from ...vae_core.families import VIDEO
from ..bridge.running import report_ui
from ..bridge.schema import describe, field
from ..bridge.wire import Facts, make_latent, pixels_of
from .anchor import CHANNELS, check_readers, encode_pictures, see_pictures, with_noise
from .motion import FASTEST, MOST, SLOWEST
from .windows import TRAINED

_LARGEST_SIDE = 16384


class SVDConditioning(io.ComfyNode):
    """Output frames and rate in, what SVD's sampler needs out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_SVDConditioning",
            display_name="SVD Image to Long Video",
            description="Conditioning and empty latent for SVD whose result a CV-VAE decodes to the frames asked for: "
            "97 frames are 25 latents. The exact length, size and rate stay with the latent.",
            search_aliases=["svd img2vid", "SVD_img2vid_Conditioning", "image to video", "svd 97 frames"],
            inputs=[
                field(io.ClipVision, "clip_vision", tooltip="From Image Only Checkpoint Loader."),
                field(
                    io.Image,
                    "image",
                    tooltip="The image the video starts from. Several are keyframes: each holds for an equal share of "
                    "the video. Alpha is dropped.",
                ),
                field(
                    io.Vae,
                    "image_vae",
                    tooltip="Encodes the image: SVD's own VAE from Image Only Checkpoint Loader, or a CV-VAE.",
                ),
                *_size_inputs(),
                *motion_inputs(),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="For the sampler."),
                io.Conditioning.Output(display_name="negative", tooltip="For the sampler."),
                io.Latent.Output(
                    display_name="latent", tooltip="Empty, with what a decode of this pack needs to give exact frames."
                ),
                io.String.Output(display_name="report", tooltip="Latents, rates, sizes, and what to mind."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        clip_vision: Any,
        image: Any,
        image_vae: Any,
        width: int,
        height: int,
        frames: int,
        fps: float,
        motion_bucket_id: int,
        augmentation_level: float,
        augmentation_seed: int,
    ) -> io.NodeOutput:
        check_readers(clip_vision, image_vae)
        pixels = pixels_of(image)
        latents = VIDEO.latent_frames(frames)
        scaled = _scale(pixels, width, height)
        shown = encode_pictures(image_vae, with_noise(scaled, augmentation_level, augmentation_seed))
        seen = _see(clip_vision, pixels, latents)
        told = {
            "motion_bucket_id": motion_bucket_id,
            "fps": max(1, round(fps / VIDEO.time)),
            "augmentation_level": augmentation_level,
        }
        positive = [[seen, {**told, "concat_latent_image": shown}]]
        negative = [[torch.zeros_like(seen), {**told, "concat_latent_image": torch.zeros_like(shown)}]]
        facts = Facts(
            family="cv-vae",
            fps=Fraction(fps).limit_denominator(1001),
            frames=frames,
            height=height,
            width=width,
        )
        empty = torch.zeros(latents, CHANNELS, scaled.shape[1] // VIDEO.space, scaled.shape[2] // VIDEO.space)
        report = _report(pixels, facts, empty, told)
        return io.NodeOutput(positive, negative, make_latent(empty, facts, "frames"), report, ui=report_ui(report))


def _size_inputs() -> list[Any]:
    return [
        field(io.Int, "width", default=1024, min=16, max=_LARGEST_SIDE, tooltip="Of the video, in pixels."),
        field(
            io.Int,
            "height",
            default=576,
            min=16,
            max=_LARGEST_SIDE,
            tooltip="Of the video, in pixels. The image is scaled to cover width and height, and cut to its middle.",
        ),
        field(
            io.Int,
            "frames",
            default=97,
            min=1,
            max=100_000,
            tooltip="Frames of the video. 97 need 25 latents, as many as SVD-XT was trained on; more need SVD Long "
            "Video.",
        ),
        field(
            io.Float,
            "fps",
            default=24.0,
            min=1.0,
            max=240.0,
            step=0.001,
            tooltip="Frames per second of the video. SVD is told the rate of the latents, a quarter of it.",
        ),
    ]


def motion_inputs() -> list[Any]:
    """The inputs on motion and noise that nodes with conditioning share."""
    return [
        field(
            io.Int,
            "motion_bucket_id",
            default=127,
            min=1,
            max=1023,
            tooltip="How much motion SVD makes. Low numbers are calm; SVD knows 1 to 255.",
            advanced=True,
        ),
        field(
            io.Float,
            "augmentation_level",
            default=0.0,
            min=0.0,
            max=10.0,
            step=0.01,
            tooltip="Noise on the image that SVD sees: more of it frees the motion and loses detail of the image.",
            advanced=True,
        ),
        field(
            io.Int,
            "augmentation_seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            tooltip="Seed of that noise. Without effect at level 0.",
            advanced=True,
        ),
    ]


def _scale(pixels: Tensor, width: int, height: int) -> Tensor:
    """(n, h, w, 3) covering the size and cut to its middle; edges are repeated up to whole latents."""
    scaled = comfy.utils.common_upscale(pixels.movedim(-1, 1), width, height, "bilinear", "center")
    padded = F.pad(scaled, (0, -width % VIDEO.space, 0, -height % VIDEO.space), mode="replicate")
    return padded.movedim(1, -1)


def _see(clip_vision: Any, pixels: Tensor, latents: int) -> Tensor:
    """CLIP's embedding: (1, 1, d) of one image, (latents, 1, d) of keyframes."""
    embeds = see_pictures(clip_vision, pixels)
    return embeds if embeds.shape[0] == 1 else comfy.utils.resize_to_batch_size(embeds, latents)


def told_of(rate: int, bucket: int) -> list[str]:
    """What SVD is told of rate and motion, and what it does not know of that."""
    lines = [f"SVD is told {rate} latents per second"]
    if not SLOWEST <= rate <= FASTEST:
        lines.append(
            f"SVD was trained on {SLOWEST} to {FASTEST} per second: choose an fps of "
            f"{VIDEO.time * SLOWEST} to {VIDEO.time * FASTEST}, or expect odd motion"
        )
    if bucket > MOST:
        lines.append(f"motion_bucket_id {bucket} is above {MOST}, the most that SVD was trained on: expect odd motion")
    return lines


def _report(pixels: Tensor, facts: Facts, empty: Tensor, told: dict[str, Any]) -> str:
    assert facts.frames is not None
    assert facts.fps is not None
    latents, seconds = empty.shape[0], facts.frames / float(facts.fps)
    lines = [
        f"{facts.frames} frames of {facts.width}x{facts.height}: {latents} latents",
        f"{seconds:.2f} s at {float(facts.fps):g} frames per second",
        *told_of(told["fps"], told["motion_bucket_id"]),
    ]
    surplus = VIDEO.pixel_frames(latents) - facts.frames
    if surplus:
        lines.append(f"{latents} latents decode to {surplus} frames more, which Video VAE Decode leaves out")
    count, height, width, _ = pixels.shape
    if width * (facts.height or 0) != height * (facts.width or 0):
        lines.append(f"the image of {width}x{height} has another shape: its middle is used")
    if count > 1:
        lines.append(f"{count} images: each is held for about {latents / count:.1f} latents")
    if latents > TRAINED:
        lines.append(
            f"{latents} latents are more than the {TRAINED} SVD-XT was trained on: connect SVD Long Video between the "
            "model and the sampler, or motion and picture will suffer"
        )
    return "\n".join(lines)


NODES = [SVDConditioning]
