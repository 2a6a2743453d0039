"""Compare Videos: how far two clips differ, frame by frame, and a player to see where."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import comfy.model_management as mm
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..bridge.running import Run, report_ui
from ..bridge.schema import check_choice, describe, field
from ..bridge.video_source import Clip, clip_of
from ..bridge.wire import CHUNK, image_of, rate_of
from .frames import Comparison
from .wipe import MOST_FRAMES, SIDE

MATCH, SHORTER = "must match", "shorter of the two"
_BYTES_PER_PIXEL = 512  # of device memory that the SSIM of one frame takes, with room to spare


class Compare(io.ComfyNode):
    """Two clips, frame by frame."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_Compare",
            display_name="Compare Videos",
            description="Compares two clips of the same size frame by frame: PSNR, SSIM and flicker as a table and a "
            "chart, and a player on the node with a divider to drag, single steps, zoom and a difference view.",
            search_aliases=["wipe", "before after", "psnr", "ssim", "video difference", "image compare"],
            inputs=[
                field(
                    io.MultiType,
                    "video_a",
                    types=[io.Image, io.Video],
                    tooltip="The original: the frames of one clip as IMAGE batch, or a VIDEO, which is read as it "
                    "is compared.",
                ),
                field(
                    io.MultiType,
                    "video_b",
                    types=[io.Image, io.Video],
                    tooltip="What is compared with it, of the same size.",
                ),
                field(io.String, "label_a", default="original", tooltip="Name of video_a in player, table and chart."),
                field(
                    io.String,
                    "label_b",
                    default="reconstruction",
                    tooltip="Name of video_b in player, table and chart.",
                ),
                field(
                    io.Combo,
                    "frames",
                    options=[MATCH, SHORTER],
                    default=MATCH,
                    tooltip="must match: clips of different length are an error. shorter of the two: the longer clip "
                    "is compared as far as the shorter one goes, from the first frame on.",
                ),
                field(
                    io.Float,
                    "fps",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.001,
                    tooltip="Frames per second of the player. 0 = that of the VIDEO, 24 for images.",
                ),
                field(
                    io.Int,
                    "player_side",
                    default=SIDE,
                    min=64,
                    max=4096,
                    tooltip="Longest side in the player, in pixels; larger frames are shrunk for it. Table and chart "
                    "are always of the full frames.",
                    advanced=True,
                ),
                field(
                    io.Int,
                    "player_frames",
                    default=MOST_FRAMES,
                    min=1,
                    max=10000,
                    tooltip="Most frames in the player; of a longer clip every n-th is shown. Table and chart are "
                    "always of all frames.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Image.Output(display_name="chart", tooltip="PSNR and SSIM over the frames."),
                io.String.Output(
                    display_name="table",
                    tooltip="Markdown: mean and worst PSNR and SSIM, flicker, and the means by place in the group of "
                    "four frames that share a latent.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        video_a: Any,
        video_b: Any,
        label_a: str,
        label_b: str,
        frames: str,
        fps: float,
        player_side: int,
        player_frames: int,
    ) -> io.NodeOutput:
        check_choice("frames", frames, (MATCH, SHORTER))
        a, b = clip_of(video_a, label_a.strip() or "video_a"), clip_of(video_b, label_b.strip() or "video_b")
        count = _common_frames(a, b, shorter=frames == SHORTER)
        rate = rate_of(fps) or a.fps or b.fps
        run = Run(count, node_id=cls.hidden.unique_id, size=a.size)
        device = mm.get_torch_device()
        mm.free_memory(_BYTES_PER_PIXEL * a.height * a.width, device)
        comparison = Comparison(
            count,
            a.size,
            labels=(a.name, b.name),
            fps=rate,
            side=player_side,
            most_frames=player_frames,
            device=device,
        )
        for ours, theirs in zip(_cut(a, count), _cut(b, count), strict=True):
            comparison.add(ours, theirs)
            run.step(ours.shape[2])
        done = comparison.finish()
        report = "\n".join([*done.report.splitlines(), *_remarks(a, b, count), run.finish()])
        chart = image_of(done.chart)
        shown = ui.PreviewImage(chart, cls=cls).as_dict() | done.ui | report_ui(report)
        return io.NodeOutput(chart, done.table, ui=shown)


def _common_frames(a: Clip, b: Clip, *, shorter: bool) -> int:
    """How many frames to compare. Raises ValueError for unequal sizes, and for unequal lengths unless `shorter`."""
    if a.size != b.size:
        raise ValueError(
            f"{a}; {b}. Only frames of one size can be compared, and nothing is cropped or scaled here: put Upscale "
            "Image or a crop before one of the two, or decode with Video VAE Decode, which gives back the true size."
        )
    if a.frames != b.frames and not shorter:
        raise ValueError(
            f"{a}; {b}. Set frames to '{SHORTER}' to compare the first {min(a.frames, b.frames)} frames, or decode "
            "with Video VAE Decode, which gives back the true number of frames."
        )
    return min(a.frames, b.frames)


def _cut(clip: Clip, count: int) -> Iterator[Tensor]:
    """The first `count` frames in chunks of one length, whatever the chunks they come in."""
    frames = islice(clip.singles(), count)
    done = 0
    while done < count:
        chunk = list(islice(frames, CHUNK))
        wanted, done = min(CHUNK, count - done), done + len(chunk)
        if len(chunk) < wanted:
            raise ValueError(
                f"{clip.name} ended after {done} frames, though it says that it has {clip.frames}: the file is "
                f"damaged or cut short. Make it anew, or set frames to '{SHORTER}' and cut the other clip to {done}."
            )
        yield torch.cat(chunk, dim=2)


def _remarks(a: Clip, b: Clip, count: int) -> list[str]:
    """What a reader of the figures should know of the two clips."""
    remarks = list[str]()
    if a.frames != b.frames:
        longer = a if a.frames > b.frames else b
        remarks.append(f"the last {longer.frames - count} frames of {longer.name} have no counterpart: left out")
    if a.fps and b.fps and a.fps != b.fps:
        remarks.append(
            f"{a.name} has {float(a.fps):g} frames per second and {b.name} {float(b.fps):g}: compared frame by "
            "frame, not by time"
        )
    return remarks


NODES = [Compare]
