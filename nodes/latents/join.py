"""Join Video Latents: several clips to one, without decoding between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..bridge.running import report_ui
from ..bridge.schema import describe, field
from ..bridge.wire import Facts, Layout, from_video, make_latent, read_facts, samples_of, to_video

MOST = 8  # clips of one node; chain nodes for more


@dataclass(frozen=True, kw_only=True)
class _Clip:
    """A clip to join: (b, z, t, h, w), what is known of it, and how it was laid out."""

    video: Tensor
    facts: Facts
    layout: Layout


class JoinLatents(io.ComfyNode):
    """Clips one after another, with a cross-fade where wanted."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        more = [
            field(io.Latent, f"latent_{number}", optional=True, tooltip="A further clip.")
            for number in range(3, MOST + 1)
        ]
        return describe(
            node_id="CVIV_JoinLatents",
            display_name="Join Video Latents",
            description="Puts clips one after another as latents, so that several generations decode as one video. "
            "Frame rate, size and family stay with the latent.",
            search_aliases=["concatenate latents", "latent batch", "extend video", "crossfade latents"],
            inputs=[
                field(io.Latent, "latent_1", tooltip="The first clip, 4-D or 5-D. The result is laid out like it."),
                field(io.Latent, "latent_2", tooltip="The clip after it."),
                field(
                    io.Int,
                    "crossfade",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="Latents at each seam in which one clip fades into the next; the result is that much "
                    "shorter. 0 = a cut.",
                ),
                *more,
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="All clips as one."),
                io.String.Output(display_name="report", tooltip="Lengths, and where the seams are."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, latent_1: Any, latent_2: Any, crossfade: int, **further: Any) -> io.NodeOutput:
        given = [latent_1, latent_2, *(further.get(f"latent_{number}") for number in range(3, MOST + 1))]
        latents = [latent for latent in given if latent is not None]
        clips = [_clip(number, latent) for number, latent in enumerate(latents, 1)]
        for number, clip in enumerate(clips[1:], 2):
            _check_pair(number, clips[0], clip)
        video, seams = join(clips, crossfade)
        facts, told = _facts(clips, video.shape[2])
        if any("noise_mask" in latent for latent in latents):
            told.append("noise masks are left out: they belong to the sampling of one clip")
        base = {name: value for name, value in latents[0].items() if name not in ("noise_mask", "batch_index")}
        told.insert(0, f"{len(clips)} clips, {video.shape[2]} latents, seams at latent {', '.join(map(str, seams))}")
        layout = clips[0].layout
        report = "\n".join(told)
        latent = make_latent(from_video(video, layout), facts, layout, base)
        return io.NodeOutput(latent, report, ui=report_ui(report))


def join(clips: Sequence[_Clip], crossfade: int) -> tuple[Tensor, list[int]]:
    """(b, z, t, h, w) of all clips, and the first latent of each after the first."""
    video, seams = clips[0].video, []
    for number, clip in enumerate(clips[1:], 2):
        following = clip.video.to(video)
        shortest = min(video.shape[2] - (seams[-1] if seams else 0), following.shape[2])
        if crossfade > shortest:
            raise ValueError(
                f"crossfade is {crossfade} and a clip at the seam before clip {number} has {shortest} latents; allowed "
                "are 0 to that. Lower crossfade or join longer clips."
            )
        seams.append(video.shape[2] - crossfade)
        rising = (torch.arange(1.0, crossfade + 1) / (crossfade + 1)).to(video).reshape(1, 1, -1, 1, 1)
        head, tail = video[:, :, : seams[-1]], video[:, :, seams[-1] :]
        faded = tail + (following[:, :, :crossfade] - tail) * rising
        video = torch.cat([head, faded, following[:, :, crossfade:]], dim=2)
    return video, seams


def _clip(number: int, latent: Any) -> _Clip:
    samples, facts = samples_of(latent), read_facts(latent)
    if facts.in_groups:
        raise ValueError(
            f"Clip {number} was made by {facts.family}, which codes a video in groups that build on each other: joined "
            "latents would decode to broken frames at the seam. Decode each clip and join the images instead."
        )
    if facts.layout == "images":
        raise ValueError(
            f"Clip {number} holds separate images, not a clip. Use Latent Batch for images, or encode with the "
            "latent_layout clip as frame batch."
        )
    layout: Layout = "video" if samples.ndim == 5 else "frames"
    return _Clip(video=to_video(samples, layout), facts=facts, layout=layout)


def _check_pair(number: int, first: _Clip, clip: _Clip) -> None:
    """Raise ValueError unless `clip` can follow `first`."""
    families = {first.facts.family, clip.facts.family} - {None}
    if len(families) > 1:
        raise ValueError(
            f"Clip 1 was made by {first.facts.family} and clip {number} by {clip.facts.family}: no VAE can decode "
            "both. Join clips of one VAE."
        )
    if _shape(first) != _shape(clip):
        raise ValueError(
            f"Clip {number} has (batch, channels, height, width) {_shape(clip)} and clip 1 {_shape(first)}; they must "
            "be equal. Generate both at one size, or scale one with Upscale Latent."
        )
    if None not in (first.facts.size, clip.facts.size) and first.facts.size != clip.facts.size:
        raise ValueError(
            f"Clip {number} shows {clip.facts.width}x{clip.facts.height} pixels and clip 1 "
            f"{first.facts.width}x{first.facts.height}, so one of them would be cut wrongly. Generate both at one size."
        )


def _shape(clip: _Clip) -> tuple[int, ...]:
    batch, channels, _, height, width = clip.video.shape
    return batch, channels, height, width


def _facts(clips: Sequence[_Clip], latents: int) -> tuple[Facts, list[str]]:
    """What is known of the joined clip, and sentences about what a user may not expect."""
    known = [clip.facts for clip in clips]
    rates = list(dict.fromkeys(facts.fps for facts in known if facts.fps is not None))
    sized = next((facts for facts in known if facts.size is not None), Facts())
    last = clips[-1]
    compression = last.facts.compression
    surplus = 0 if last.facts.frames is None else compression.pixel_frames(last.video.shape[2]) - last.facts.frames
    frames = compression.pixel_frames(latents) - surplus
    told = [f"{frames} frames"]
    if len(rates) > 1:
        told.append(f"the clips have different frame rates ({', '.join(map(str, rates))}): the first is kept")
    if any(_padded(clip) for clip in clips[:-1]):
        told.append("a clip before the last was padded at its end: those frames stay at the seam")
    facts = Facts(
        family=next((facts.family for facts in known if facts.family is not None), None),
        fps=rates[0] if rates else None,
        frames=frames,
        height=sized.height,
        width=sized.width,
        aspect=next((facts.aspect for facts in known if facts.aspect is not None), None),
    )
    return facts, told


def _padded(clip: _Clip) -> bool:
    return clip.facts.frames is not None and clip.facts.frames < clip.facts.compression.pixel_frames(
        clip.video.shape[2]
    )


NODES = [JoinLatents]
