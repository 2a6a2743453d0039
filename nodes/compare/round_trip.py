"""Round Trip: a video through a VAE and back, what it lost, and a player to see where."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from dataclasses import field as field_of
from itertools import islice
from typing import Any

import comfy.sd
import torch
from comfy_api.latest import io
from torch import Tensor

from ...vae_core import TilePlan
from ...vae_core.metrics import Borders, SeamMeter, SeamReading, chunk_borders, exact_borders
from ..bridge.limits import limits_of
from ..bridge.native import NativeVideoVAE
from ..bridge.running import Run, report_ui
from ..bridge.schema import budget_input, describe, dtype_words, field
from ..bridge.video_source import Clip, clip_of
from ..bridge.wire import CHUNK, chunks_of, image_of, images_of
from ..clips.encode import encode_clip
from .frames import Comparison

LABELS = "original", "round trip"


class RoundTrip(io.ComfyNode):
    """A clip through a VAE and back."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_RoundTrip",
            display_name="Video VAE Round Trip",
            description="Encodes and decodes a video and says what was lost: PSNR, SSIM, flicker and seams as a table "
            "and a chart, and a player on the node with a divider to drag. For choosing a VAE, a number format or "
            "tiles by eye and by number.",
            search_aliases=["reconstruct", "vae quality", "psnr", "ssim", "vae compare", "wipe"],
            inputs=[
                field(
                    io.Vae,
                    "vae",
                    tooltip="From Load Video VAE; or a VAE of ComfyUI's own Load VAE, to compare with: that one runs "
                    "as ComfyUI runs it.",
                ),
                field(
                    io.MultiType,
                    "video",
                    types=[io.Image, io.Video],
                    tooltip="The frames of one clip as IMAGE batch, or a VIDEO, read as it is encoded. Any size "
                    "and number of frames.",
                ),
                field(
                    io.Int,
                    "frame_count",
                    default=0,
                    min=0,
                    max=10**8,
                    tooltip="How many frames to take, from the first on; a shorter video is taken whole. 0 = all.",
                ),
                budget_input(),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="What came back: as many frames of the same size."),
                io.Image.Output(display_name="chart", tooltip="PSNR and SSIM over the frames."),
                io.String.Output(
                    display_name="table",
                    tooltip="Markdown: mean and worst PSNR and SSIM, flicker, the means by place in the group of four "
                    "frames that share a latent, and how visible the borders of tiles and chunks are.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="What was lost and what ran: how long, how much memory, exact or not.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, vae: Any, video: Any, frame_count: int, memory_budget_gb: float) -> io.NodeOutput:
        source, told = clip_of(video, "video", frame_count or None), _Told()
        node_id = cls.hidden.unique_id
        if isinstance(vae, NativeVideoVAE):
            parts = _through_ours(vae, source, node_id, memory_budget_gb, told)
        else:
            parts = _through_stock(_require_stock(vae), source, node_id, told)
        comparison = Comparison(source.frames, source.size, labels=LABELS, fps=source.fps)
        originals, seams = source.singles(), None
        images, done = torch.empty(source.frames, *source.size, 3), 0
        for part in parts:
            seams = seams or SeamMeter(told.borders)
            for result in chunks_of(part):
                original = torch.cat(list(islice(originals, result.shape[2])), dim=2)
                comparison.add(original, result)
                seams.update(result, original)
            images[done : done + part.shape[0]] = part
            done += part.shape[0]
        assert seams is not None
        compared = comparison.finish()
        table = "\n\n".join([compared.table, *_seam_table(seams.reading)])
        report = "\n".join([compared.report, *source.remarks, *told.reports])
        return io.NodeOutput(images, image_of(compared.chart), table, report, ui=compared.ui | report_ui(report))


@dataclass
class _Told:
    """What is known of a pass once its first frames are there; the reports come when it is over."""

    borders: Borders = field_of(default_factory=Borders)
    reports: list[str] = field_of(default_factory=list[str])


def _through_ours(vae: NativeVideoVAE, source: Clip, node_id: str, budget_gb: float, told: _Told) -> Iterator[Tensor]:
    """(t, h, w, 3) in 0..1 of one of our VAEs: encoded as Video VAE Encode does, decoded as Video VAE Decode does."""
    latent, report = encode_clip(vae, source, node_id, mode="mean", seed=0, limits=limits_of(budget_gb))
    told.reports.append(f"encoding: {report}")
    run = Run(source.frames, node_id=node_id, size=source.size)
    single = vae.layout == "images"
    chunks = vae.decode_chunks(
        vae.video_latent(latent),
        run,
        frames=1 if single else source.frames,
        size=source.size,
        limits=limits_of(budget_gb),
    )
    for chunk in chunks:
        told.borders = _borders(vae, run, source)
        yield chunk[0]
    told.reports.append(f"decoding: {run.finish()}")


def _borders(vae: NativeVideoVAE, run: Run, source: Clip) -> Borders:
    """Where a decode was joined: the edges of its tiles, and of its chunks in time where they share frames."""
    frames = vae.codec.model.family.frames
    shared = vae.layout != "images" and frames.overlap > 0
    chunks = chunk_borders(source.frames, first=frames.first, step=frames.step) if shared else ()
    if not isinstance(run.tiles, TilePlan):
        return Borders(frames=chunks)
    return replace(exact_borders(run.tiles, source.size, vae.compression), frames=chunks)


def _require_stock(vae: Any) -> comfy.sd.VAE:
    if isinstance(vae, comfy.sd.VAE) and getattr(vae, "latent_dim", None) in (2, 3):
        return vae
    raise ValueError(
        f"A {type(vae).__name__} is connected as vae, which takes no pictures; connect Load Video VAE, or Load VAE "
        "with the VAE of an image or video model."
    )


def _through_stock(vae: comfy.sd.VAE, source: Clip, node_id: str, told: _Told) -> Iterator[Tensor]:
    """(t, h, w, 3) in 0..1 of another VAE, by ComfyUI's own encode and decode; padded for it, and cut again.

    The VAE of an image model gets a few frames at a time, that of a video model the whole clip.
    """
    run = Run(source.frames, node_id=node_id, size=source.size)
    run.begin(vae.device)
    whole = vae.latent_dim == 3
    chunks = [torch.cat(list(source.read()), dim=2)] if whole else source.read()
    for chunk in chunks:
        frames = images_of(chunk)[0]
        part = _one_way(vae, frames)
        run.step(part.shape[0])
        yield part
    model = type(vae.first_stage_model).__name__
    run.note(f"{model}, {dtype_words(vae.vae_dtype)} on {vae.device}, run by ComfyUI")
    run.note("all frames at once" if whole else f"{CHUNK} frames at a time")
    run.note("exact or not: ComfyUI does not say whether it took tiles, which it blends")
    told.reports.append(run.finish())


def _one_way(vae: comfy.sd.VAE, frames: Tensor) -> Tensor:
    """Encode and decode (t, h, w, 3) in 0..1. Raises ValueError where less comes back."""
    steps = vae.temporal_compression_decode() or 1 if vae.latent_dim == 3 else 1
    wanted = (1 + -(-(frames.shape[0] - 1) // steps) * steps, *(_up(side, vae) for side in frames.shape[1:3]))
    padded = frames
    for dim, length in enumerate(wanted):  # the last frame, row and column again
        padded = padded.index_select(dim, torch.arange(length).clamp(max=frames.shape[dim] - 1))
    result = vae.decode(vae.encode(padded)).cpu().float()
    result = result.reshape(-1, *result.shape[-3:])[: frames.shape[0], : frames.shape[1], : frames.shape[2]]
    if result.shape != frames.shape:
        raise ValueError(
            f"The VAE gave frames of shape {tuple(result.shape)} for {tuple(frames.shape)} (frames, height, width, "
            "colours), so the two cannot be compared. Use its own encode and decode nodes, and Compare Videos after "
            "them."
        )
    return result.clamp(0, 1)


def _up(side: int, vae: comfy.sd.VAE) -> int:
    step = vae.spacial_compression_encode()
    return -(-side // step) * step


def _seam_table(reading: SeamReading) -> list[str]:
    """A Markdown table of what could be measured, if anything."""
    known = [("tiles", reading.space), ("chunks in time", reading.time)]
    rows = [f"| {name} | {value:.2f} |" for name, value in known if not math.isnan(value)]
    head = ["| change of the error at the borders of ..., over that elsewhere: 1 is none | ratio |", "| --- | --- |"]
    return ["\n".join(head + rows)] if rows else []


NODES = [RoundTrip]
