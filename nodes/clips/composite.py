"""Composite Edited Region: the edited part from the decoded video, every other pixel from the original."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from comfy_api.latest import Input, io
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ..bridge.lazy_video import LazyVideo
from ..bridge.running import Run, report_ui
from ..bridge.schema import describe, field
from ..bridge.video_source import Clip, clip_of
from ..bridge.wire import CHUNK, images_of

DEFAULT_FPS = 24


class Composite(io.ComfyNode):
    """Two clips and a mask to one clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_Composite",
            display_name="Composite Edited Region",
            description="Takes the masked region from the edited video and every other pixel, untouched, from the "
            "original. A video that went through a VAE always loses a little; here only the region does.",
            search_aliases=["composite video", "paste back", "inpaint paste", "masked composite", "stitch"],
            inputs=[
                field(
                    io.MultiType,
                    "original",
                    types=[io.Image, io.Video],
                    tooltip="The video before it was encoded: an IMAGE batch or a VIDEO.",
                ),
                field(
                    io.MultiType,
                    "edited",
                    types=[io.Image, io.Video],
                    tooltip="The same video, edited and decoded: as many frames of the same size.",
                ),
                field(
                    io.Mask,
                    "mask",
                    tooltip="Where the edited video is taken: one mask for all frames, or one for each. A mask of "
                    "another size is scaled.",
                ),
                field(
                    io.Int,
                    "feather",
                    default=16,
                    min=0,
                    max=512,
                    tooltip="Width in pixels of the soft edge, which lies inside the mask: outside, nothing changes.",
                ),
                field(
                    io.Boolean,
                    "match_colour",
                    default=False,
                    tooltip="Shift the colours of each edited frame by what the VAE changed outside the mask, on "
                    "average, so that no edge shows. Off: as they are.",
                ),
            ],
            outputs=[
                io.Video.Output(
                    display_name="video",
                    tooltip="Made while it is saved, with the frame rate and sound of the original; 24 frames per "
                    "second where that is images.",
                ),
                io.Image.Output(
                    display_name="images",
                    tooltip="The frames, where one of the two is an IMAGE batch. Of two VIDEOs take the output video.",
                ),
                io.String.Output(display_name="report", tooltip="How much of the video is edited."),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, original: Any, edited: Any, mask: Tensor, feather: int, match_colour: bool) -> io.NodeOutput:
        before, after = clip_of(original, "original"), clip_of(edited, "edited")
        _check_pair(before, after)
        weights, told = _weights(mask, before, feather)
        node_id = cls.hidden.unique_id

        def frames(start: int, stop: int) -> Iterator[Tensor]:
            run = Run(stop, node_id=node_id, size=before.size)
            yield from _merged(before, after, weights, (start, stop), run, match_colour=match_colour)
            run.close()

        video = LazyVideo(
            frames,
            width=before.width,
            height=before.height,
            frame_count=before.frames,
            frame_rate=before.fps or after.fps or DEFAULT_FPS,
            audio=before.audio(),
        )
        images: Any = ExecutionBlocker(
            "Composite Edited Region: both inputs are VIDEOs, so there are no images: use its output video, and Get "
            "Video Components after it where you need images."
        )
        if not (isinstance(original, Input.Video) and isinstance(edited, Input.Video)):
            images = video.get_components().images
        report = "\n".join((_summary(before, weights), *told))
        return io.NodeOutput(video, images, report, ui=report_ui(report))


def _check_pair(before: Clip, after: Clip) -> None:
    if before.size != after.size or before.frames != after.frames:
        raise ValueError(
            f"{before}; {after}. Both must have the same frames of one size, and nothing is cropped or scaled here: "
            "decode with Video VAE Decode, which gives back the true number and size, or cut the original alike."
        )


def _weights(mask: Tensor, clip: Clip, feather: int) -> tuple[Tensor, list[str]]:
    """(1 or frames, 1, h, w) in 0..1: how much of the edited video each pixel takes; and sentences for the report."""
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float().clamp(0, 1)
    told = list[str]()
    if mask.shape[0] not in (1, clip.frames):
        raise ValueError(
            f"The mask has {mask.shape[0]} frames and the video {clip.frames}; allowed are 1, for all, and "
            f"{clip.frames}. Repeat or cut the mask batch."
        )
    if tuple(mask.shape[-2:]) != clip.size:
        told.append(f"the mask was scaled from {mask.shape[-1]}x{mask.shape[-2]}")
        mask = F.interpolate(mask, clip.size, mode="bilinear")
    if not mask.any():
        raise ValueError("The mask is empty, so nothing would be taken from the edited video: paint the region white.")
    return feathered(mask, feather), told


def feathered(mask: Tensor, width: int) -> Tensor:
    """A mask (n, 1, h, w) whose edge rises inside it, over `width` pixels; what is 0 stays 0."""
    if width == 0:
        return mask
    sides = [F.pad(mask, (width, width, 0, 0), mode="replicate"), (1, 2 * width + 1)]
    blurred = F.avg_pool2d(sides[0], sides[1], stride=1)
    blurred = F.avg_pool2d(F.pad(blurred, (0, 0, width, width), mode="replicate"), (2 * width + 1, 1), stride=1)
    return mask * (2 * blurred - 1).clamp(0, 1)


def _merged(
    before: Clip, after: Clip, weights: Tensor, span: tuple[int, int], run: Run, *, match_colour: bool
) -> Iterator[Tensor]:
    """Frames span[0] to span[1] as (t, h, w, 3) in 0..1."""
    start, stop = span
    pairs = zip(islice(before.singles(), start, stop), islice(after.singles(), start, stop), strict=True)
    number = start
    while batch := list(islice(pairs, CHUNK)):
        ours, theirs = (images_of(torch.cat(clip, dim=2))[0] for clip in zip(*batch, strict=True))  # t h w c
        part = weights if weights.shape[0] == 1 else weights[number : number + len(batch)]
        share = part.permute(0, 2, 3, 1)  # t h w 1
        if match_colour:
            theirs = theirs + _offset(ours, theirs, share)
        yield torch.where(share > 0, ours + (theirs - ours) * share, ours).clamp_(0, 1)
        number += len(batch)
        run.step(len(batch))


def _offset(ours: Tensor, theirs: Tensor, share: Tensor) -> Tensor:
    """(t, 1, 1, 3): what the VAE changed on average where nothing was edited; 0 where all was."""
    outside = (share == 0).float().expand(ours.shape[0], -1, -1, -1)
    count = outside.sum(dim=(1, 2), keepdim=True)
    return ((ours - theirs) * outside).sum(dim=(1, 2), keepdim=True) / count.clamp(min=1)


def _summary(clip: Clip, weights: Tensor) -> str:
    touched = 100 * (weights > 0).float().mean().item()
    frames = f"{clip.frames} frame{'s' * (clip.frames != 1)}"
    return f"{frames} {clip.width}x{clip.height}, {touched:.1f} % of the picture edited, the rest untouched"


NODES = [Composite]
