"""Save Video Latent and Load Video Latent."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from comfy.cli_args import args
from comfy_api.latest import io
from torch import Tensor

from ...vae_core.media.latents import RESERVED, LatentFile, LatentMeta, LatentWriter, open_latent
from ..bridge.native import require
from ..bridge.running import show_text
from ..bridge.schema import before_run, check_choice, describe, field, stamp
from ..bridge.wire import (
    Facts,
    Layout,
    check_latent,
    from_video,
    make_latent,
    read_facts,
    samples_of,
    to_video,
)
from .paths import check_prefix, listed, listed_path, make_folder, numbered_path, reused_path, subfolder
from .reuse import ITEM, MADE_BY, item_of_list, made_by, reusable, stamp_of_files

NUMBER, REUSE = "number a new file", "reuse it (do not compute again)"
LAYOUTS: dict[str, Layout | None] = {"as saved": None, "video 5-D": "video", "clip as frame batch": "frames"}
_LAYOUT_WORDS = {"frames": "clip as frame batch", "video": "video 5-D", "images": "separate images"}
_UNKNOWN_FPS = Fraction(24)  # stored where the rate is not known, with the text _FPS_KNOWN beside it
_FPS_KNOWN = "fps_known"
_MOST_TEXT = 8 << 20  # characters of workflow in one file
_MAKERS = ("samples", "vae")
_CHUNK = 64  # latent frames written at a time

_log = logging.getLogger("cviv-vae")


class SaveVideoLatent(io.ComfyNode):
    """A latent into a file of the output folder, and back from there instead of computing it again."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_SaveVideoLatent",
            display_name="Save Video Latent",
            description="Saves a latent with its family, frame rate, true length and size, so that a long render is "
            "safe before it is decoded. 'reuse it' makes a workflow resumable: where the same nodes with the same "
            "settings made the file, nothing before this node is computed again.",
            search_aliases=["save latent", "cache latent", "resume", "export latent"],
            inputs=[
                field(
                    io.Latent,
                    "samples",
                    display_name="latent",
                    lazy=True,
                    tooltip="The latent to save. A noise mask is not saved with it.",
                ),
                field(
                    io.String,
                    "filename_prefix",
                    default="latents/video",
                    tooltip="Folder and name below the output folder. %date:yyyy-MM-dd%, %KSampler.seed%, %year%, "
                    "%month%, %day%, %hour%, %minute%, %second%, %width% and %height% are filled in. The name ends in "
                    ".latent.safetensors.",
                ),
                field(
                    io.Combo,
                    "when_file_exists",
                    options=[NUMBER, REUSE],
                    default=NUMBER,
                    tooltip="number a new file: <prefix>_00001, _00002, ... reuse it: where a file of this name was "
                    "made by the same nodes, settings and input files, it is given out, and what comes before this "
                    "node is not computed; else it is, and saved as <prefix>, or with a number where that is taken. Of "
                    "a list each item has its own file. To compute again, delete the file or change the name.",
                ),
                field(
                    io.Vae,
                    "vae",
                    optional=True,
                    lazy=True,
                    tooltip="From Load Video VAE. Needed only where the latent does not say which VAE it belongs to, "
                    "as after a sampler that was given an empty latent.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The latent that was saved, or that of the file."),
                io.String.Output(display_name="path", tooltip="Path of the file."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.dynprompt],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        return before_run((check_prefix, filename_prefix))

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        prefix = inputs.get("filename_prefix")
        return stamp_of_files(prefix) if inputs.get("when_file_exists") == REUSE and prefix is not None else ""

    @classmethod
    def check_lazy_status(cls, **inputs: Any) -> list[str]:
        check_choice("when_file_exists", inputs["when_file_exists"], (NUMBER, REUSE))
        check_prefix(inputs["filename_prefix"])  # before anything is computed for a name that is refused
        if inputs["when_file_exists"] == REUSE:
            there = reusable(inputs["filename_prefix"], made_by(cls.hidden, _MAKERS))
            if list(there) == [0]:  # of a list all items are needed, for nobody else knows how many there are
                return []
        latent = inputs.get("samples")
        if latent is None:
            return ["samples"]
        return ["vae"] if "vae" in inputs and read_facts(latent).family is None else []

    @classmethod
    def execute(
        cls, filename_prefix: str, when_file_exists: str, samples: Any = None, vae: Any = None
    ) -> io.NodeOutput:
        texts, path, kept = _workflow(cls.hidden), None, False
        if when_file_exists == REUSE:
            made, item, first = made_by(cls.hidden, _MAKERS), item_of_list(), reused_path(filename_prefix)
            path = reusable(filename_prefix, made).get(item)
            if path is None and samples is None:
                raise ValueError(f"{first.name} went away while this ran: run it again.")
            if path is not None:
                latent = _reuse(path)
                words = "; nothing before this node was computed" if samples is None else ""
                show_text(f"Read from {path.name}{words}.", cls.hidden.unique_id)
                return _result(latent, path)
            kept = first.exists() and item == 0
            path = None if first.exists() else first
            if made is not None:
                texts |= {MADE_BY: made, ITEM: str(item)}
        latent, path = save_latent(path, filename_prefix, samples, vae, texts)
        others = "; the files of this name that other inputs made are kept" if kept else ""
        show_text(f"Saved as {path.name}{others}.", cls.hidden.unique_id)
        return _result(latent, path)


class LoadVideoLatent(io.ComfyNode):
    """A latent, or some of its frames, from a file of the output or input folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_LoadVideoLatent",
            display_name="Load Video Latent",
            description="Loads what Save Video Latent or the command line saved; only the chosen latents are read.",
            search_aliases=["load latent", "import latent", "resume"],
            inputs=[
                field(
                    io.Combo,
                    "file",
                    options=listed(),
                    tooltip="Latent files of output/ and input/, newest first: *.latent.safetensors, and every "
                    ".safetensors below a folder called latents.",
                ),
                field(
                    io.Int,
                    "first_latent",
                    default=0,
                    min=0,
                    max=10**8,
                    tooltip="The first latent frame to load, counted from 0. A latent frame stands for 4 frames, but "
                    "the first one of what is loaded decodes to 1: number 3 alone is frame 12, 3 and 4 are frames 12 "
                    "to 16.",
                ),
                field(
                    io.Int,
                    "latent_count",
                    default=0,
                    min=0,
                    max=10**8,
                    tooltip="How many latent frames to load: N decode to 4N-3 frames, of an image VAE to N. 0 = to "
                    "the end.",
                ),
                field(
                    io.Combo,
                    "layout",
                    options=list(LAYOUTS),
                    default="as saved",
                    tooltip="How the latent lies on the wire. clip as frame batch: 4-D, as SD, AnimateDiff and SVD "
                    "take it. video 5-D: as newer video models.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="With its family, frame rate, true length and size."),
                io.Float.Output(display_name="fps", tooltip="Frames per second; 24 where the file does not know."),
                io.String.Output(display_name="info", tooltip="What the file says of itself."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return before_run((listed_path, file))

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        return *stamp(listed_path, inputs.get("file")), inputs.get("first_latent"), inputs.get("latent_count")

    @classmethod
    def execute(cls, file: str, first_latent: int, latent_count: int, layout: str) -> io.NodeOutput:
        check_choice("layout", layout, tuple(LAYOUTS))
        opened = open_latent(listed_path(file))
        count = latent_count or None
        z, meta = opened.read(first_latent, count), opened.part_meta(first_latent, count)
        latent = _to_wire(z, meta, LAYOUTS[layout])
        return io.NodeOutput(latent, float(meta.fps), _info(file, opened, meta, z, first_latent))


def _result(latent: dict[str, Any], path: Path) -> io.NodeOutput:
    result = {"filename": path.name, "subfolder": subfolder(path), "type": "output"}
    return io.NodeOutput(latent, str(path), ui={"latents": [result]})


def save_latent(
    path: Path | None, prefix: str, latent: Any, vae: Any, texts: Mapping[str, str]
) -> tuple[dict[str, Any], Path]:
    """Save a LATENT as `path`, None for the next number; returns it, with its family, and the path."""
    samples, facts = samples_of(latent), read_facts(latent)
    layout: Layout = facts.layout or ("frames" if samples.ndim == 4 else "video")
    if facts.family is None:
        facts = replace(facts, family=_family(samples, vae))
        if samples.ndim == 4 and vae.layout == "images":
            layout = "images"
    z = to_video(samples, layout)  # b c t h w
    meta = _meta(z, facts, layout, texts)
    path = path or numbered_path(prefix, width=meta.width, height=meta.height)
    make_folder(path)
    with LatentWriter(
        path,
        family=meta.family,
        fps=meta.fps,
        height=meta.height,
        width=meta.width,
        aspect=meta.aspect,
        clip_layout=meta.clip_layout,
        extra=meta.extra,
    ) as writer:
        for chunk in z.split(_CHUNK, dim=2):
            writer.write(chunk)
        writer.finish(frames=meta.frames)
    if latent.get("noise_mask") is not None:
        _log.warning("The noise mask of the latent is not saved in %s.", path.name)
    return make_latent(samples, facts, layout, base=latent), path


def _meta(z: Tensor, facts: Facts, layout: Layout, texts: Mapping[str, str]) -> LatentMeta:
    """What the file says: the facts, and where they are not known all that the latent decodes to."""
    known = {} if facts.fps is not None else {_FPS_KNOWN: "false"}
    space = facts.compression.space
    height, width = facts.size or (space * z.shape[-2], space * z.shape[-1])
    family: Any = facts.family
    return LatentMeta(
        family=family,
        fps=(facts.fps or _UNKNOWN_FPS).limit_denominator(10**6),
        frames=facts.frames or facts.compression.pixel_frames(z.shape[2]),
        height=height,
        width=width,
        aspect=facts.aspect or Fraction(1),
        clip_layout=layout,
        extra={**texts, **known},
    )


def _family(samples: Tensor, vae: Any) -> str:
    """The family that the VAE names. Raises ValueError without one, or where the latent cannot be of it."""
    if vae is None:
        raise ValueError(
            "This latent does not say which VAE it belongs to, as after a sampler that was given an empty latent: "
            "connect the VAE that will decode it, from Load Video VAE, to the input vae."
        )
    vae = require(vae)
    check_latent(samples, Facts(), vae.codec.family, vae.latent_channels)
    return vae.codec.family


def _reuse(path: Path) -> dict[str, Any]:
    try:
        opened = open_latent(path)
        return _to_wire(opened.read(), opened.meta, None)
    except ValueError as error:
        raise ValueError(f"{error} To compute it again, delete that file or change the file name.") from error


def _to_wire(z: Tensor, meta: LatentMeta, layout: Layout | None) -> dict[str, Any]:
    """A LATENT of (b, z, t, h, w); layout None: as it was saved."""
    layout = layout or meta.clip_layout or "video"
    facts = Facts(
        family=meta.family,
        fps=meta.fps if _fps_known(meta) else None,
        frames=meta.frames,
        height=meta.height,
        width=meta.width,
        aspect=meta.aspect,
        layout=layout,
    )
    if layout == "frames" and facts.own_space:
        raise ValueError(
            f"This latent was made by {meta.family}, whose latent space is its own, and the frame batch is the layout "
            "of SD and SVD samplers, which would make noise of it: choose 'video 5-D'."
        )
    return make_latent(from_video(z, layout).contiguous(), facts, layout)


def _info(label: str, opened: LatentFile, meta: LatentMeta, z: Tensor, first: int) -> str:
    length = opened.shape[2]
    rate = f"{float(meta.fps):g} per second" if _fps_known(meta) else "rate not known, 24 per second assumed"
    lines = [
        f"file      {label}",
        f"family    {meta.family}",
        f"latents   {z.shape[2]} of {length}, from number {first} on",
        f"shape     {' x '.join(map(str, z.shape))} (batch, channels, time, height, width), {str(z.dtype)[6:]}",
        f"decodes   to {meta.frames} frames of {meta.width}x{meta.height}, {rate}",
        f"saved as  {_LAYOUT_WORDS[meta.clip_layout or 'video']}",
    ]
    if meta.audio is not None:
        lines.append(f"made from {meta.audio}, from frame {meta.start} on")
    return "\n".join(lines)


def _fps_known(meta: LatentMeta) -> bool:
    return meta.extra.get(_FPS_KNOWN) != "false"


def _workflow(hidden: Any) -> dict[str, str]:
    """Prompt and workflow for the file, as ComfyUI's own nodes store them."""
    if args.disable_metadata:
        return {}
    values = {"prompt": hidden.prompt, **(hidden.extra_pnginfo or {})}
    texts = {name: json.dumps(value) for name, value in values.items() if value is not None and name not in RESERVED}
    if sum(map(len, texts.values())) > _MOST_TEXT:
        _log.warning("The workflow is too large to be saved with the latent: it is left out.")
        return {}
    return texts


NODES = [SaveVideoLatent, LoadVideoLatent]
