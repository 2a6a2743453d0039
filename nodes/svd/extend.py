"""SVD Extend Clip: what the sampler needs to go on from a clip that exists, a video or a latent."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ...vae_core.families import VIDEO
from ..bridge.running import report_ui
from ..bridge.schema import describe, field
from ..bridge.wire import Facts, make_latent, read_facts, samples_of
from .anchor import CHANNELS, Reader, check_readers
from .conditioning import motion_inputs, told_of
from .windows import TRAINED

_DEFAULT_FPS = Fraction(24)


class SVDExtendClip(io.ComfyNode):
    """A clip in, conditioning and a longer latent with a mask out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_SVDExtendClip",
            display_name="SVD Extend Clip",
            description="Makes a clip longer with SVD: a real video that Video VAE Encode encoded, or a latent that "
            "was sampled or saved. Gives latent, mask and conditioning; SVD Long Video samples only what is new.",
            search_aliases=["continue video", "video extension", "extend latent", "outpaint in time"],
            inputs=[
                field(io.ClipVision, "clip_vision", tooltip="From Image Only Checkpoint Loader."),
                field(
                    io.Vae,
                    "image_vae",
                    tooltip="SVD's own VAE from Image Only Checkpoint Loader: makes the picture to go on from.",
                ),
                field(
                    io.Latent,
                    "samples",
                    display_name="latent",
                    tooltip="The clip: from Video VAE Encode with a CV-VAE, Load Video Latent or a sampler.",
                ),
                field(
                    io.Int,
                    "added_frames",
                    default=84,
                    min=1,
                    max=100_000,
                    tooltip="Frames that the clip gets in addition. 84 are 21 latents, one chunk of 25 that carries 4.",
                ),
                field(
                    io.Int,
                    "carry",
                    default=4,
                    min=1,
                    max=255,
                    tooltip="Latents of the clip that SVD sees; the picture is that of the first of them. The same as "
                    "carry of SVD Long Video.",
                ),
                *motion_inputs(),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="For the sampler."),
                io.Conditioning.Output(display_name="negative", tooltip="For the sampler."),
                io.Latent.Output(
                    display_name="latent", tooltip="The clip and room for the new latents, with a mask that keeps it."
                ),
                io.String.Output(display_name="report", tooltip="What is kept, what is new, what to mind."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        clip_vision: Any,
        image_vae: Any,
        samples: Any,
        added_frames: int,
        carry: int,
        motion_bucket_id: int,
        augmentation_level: float,
        augmentation_seed: int,
    ) -> io.NodeOutput:
        check_readers(clip_vision, image_vae)
        clip, facts, notes = _known(samples)
        known, new = clip.shape[0], VIDEO.latent_frames(1 + added_frames) - 1
        reader = Reader(image_vae=image_vae, clip_vision=clip_vision)
        first = max(0, known - carry)
        shown, seen = reader.read(clip[first : first + 1], augmentation_level, augmentation_seed)
        rate = max(1, round((facts.fps or _DEFAULT_FPS) / VIDEO.time))
        told = {"motion_bucket_id": motion_bucket_id, "fps": rate, "augmentation_level": augmentation_level}
        positive = [[seen, {**told, "concat_latent_image": shown}]]
        negative = [[torch.zeros_like(seen), {**told, "concat_latent_image": torch.zeros_like(shown)}]]
        facts = replace(facts, frames=VIDEO.pixel_frames(known) + added_frames)
        longer = torch.cat((clip, clip.new_zeros((new, *clip.shape[1:]))))
        latent = make_latent(longer, facts, "frames")
        latent["noise_mask"] = torch.cat((torch.zeros(known, 1, *clip.shape[2:]), torch.ones(new, 1, *clip.shape[2:])))
        report = [
            f"{known} latents ({VIDEO.pixel_frames(known)} frames) are kept as they are",
            f"{new} new ones: {VIDEO.pixel_frames(known + new)} frames in all, of which {facts.frames} are asked for",
            f"the picture to go on from is that of latent {first}, made by the image VAE",
            *told_of(rate, motion_bucket_id),
            *notes,
        ]
        if known + new > TRAINED:
            report.append(
                f"more than {TRAINED} latents: connect SVD Long Video (continuation) to sample the new ones alone"
            )
        told_all = "\n".join(report)
        return io.NodeOutput(positive, negative, latent, told_all, ui=report_ui(told_all))


def _known(latent: Any) -> tuple[Tensor, Facts, list[str]]:
    """The latents of the clip (t, 4, h, w), its facts, and what was left out. Raises ValueError for other latents."""
    samples, facts = samples_of(latent), read_facts(latent)
    if facts.family not in (None, "cv-vae") or samples.shape[1] != CHANNELS:
        raise ValueError(
            f"The latent has shape {tuple(samples.shape)}"
            + (f" and was made by {facts.family}" if facts.family else "")
            + "; SVD goes on from those of a CV-VAE with 4 channels. Encode the video with one in Video VAE Encode."
        )
    if samples.ndim == 5:
        if samples.shape[0] != 1:
            raise ValueError(f"The latent holds {samples.shape[0]} clips: take one with Latent From Batch.")
        samples = samples[0].movedim(1, 0)  # t c h w
    notes: list[str] = []
    if facts.frames is not None and facts.frames < VIDEO.pixel_frames(samples.shape[0]) and samples.shape[0] > 1:
        left = facts.frames - VIDEO.pixel_frames(samples.shape[0] - 1)
        samples = samples[:-1]
        notes.append(f"the last {left} frames are left out: their latent is filled up with repeated frames")
    return samples.float(), facts, notes


NODES = [SVDExtendClip]
