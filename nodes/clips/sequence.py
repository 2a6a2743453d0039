"""Save Image Sequence: the frames of a VIDEO as numbered pictures, while they are decoded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import folder_paths
import numpy as np
import torch
from comfy.cli_args import args
from comfy_api.latest import io
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..bridge.running import Run, report_ui
from ..bridge.schema import before_run, check_choice, describe, field
from ..bridge.video_source import clip_of
from ..latents.paths import check_prefix

PNG, PNG_16, WEBP = "PNG, 8 bits", "PNG, 16 bits", "WebP, lossless"
FORMATS = (PNG, PNG_16, WEBP)


class SaveImageSequence(io.ComfyNode):
    """A VIDEO or IMAGE to a folder of pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_SaveImageSequence",
            display_name="Save Image Sequence",
            description="Writes the frames of a VIDEO as pictures 00000, 00001, ... into a new folder, one at a time: "
            "a VIDEO of Video VAE Decode to Video decodes while it is written, in 16 bits where you like.",
            search_aliases=["image sequence", "png sequence", "frames to disk", "16 bit png", "export frames"],
            inputs=[
                field(
                    io.MultiType,
                    "video",
                    types=[io.Video, io.Image],
                    tooltip="A VIDEO, which is read a few frames at a time, or an IMAGE batch.",
                ),
                field(
                    io.String,
                    "filename_prefix",
                    default="frames/video",
                    tooltip="Where the new folder goes below the output folder, and its name, to which a number is "
                    "added. %date:yyyy-MM-dd% and the other tokens of Save Video are filled in.",
                ),
                field(
                    io.Combo,
                    "format",
                    options=list(FORMATS),
                    default=PNG,
                    tooltip="PNG, 8 bits: the first picture also holds the workflow. PNG, 16 bits: for grading and "
                    "compositing; a video decoded here has no more than its network gives, but no rounding to 256 "
                    "levels. WebP, lossless: smaller files.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="folder", tooltip="Path of the new folder."),
                io.String.Output(display_name="report", tooltip="How many pictures, of which size, where."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        return before_run((check_prefix, filename_prefix))

    @classmethod
    def execute(cls, video: Any, filename_prefix: str, format: str) -> io.NodeOutput:  # noqa: A002
        check_choice("format", format, FORMATS)
        clip = clip_of(video, "video")
        run = Run(clip.frames, node_id=cls.hidden.unique_id, size=clip.size)
        suffix, write = _writer(format, cls.hidden)
        with _new_folder(filename_prefix, clip.size) as (part, target):
            for number, frame in enumerate(clip.singles()):
                write(frame[0, :, 0], part / f"{number:05}{suffix}")
                run.step(1)
        run.note(f"{format}, in {target}")
        report = run.finish()
        return io.NodeOutput(str(target), report, ui=report_ui(report))


@contextmanager
def _new_folder(prefix: str, size: tuple[int, int]) -> Iterator[tuple[Path, Path]]:
    """A hidden folder to write to, and the name that it takes when the block ends; it goes if the block fails."""
    output = folder_paths.get_output_directory()
    folder, name, number, *_ = folder_paths.get_save_image_path(
        "/".join(check_prefix(prefix)), output, size[1], size[0]
    )
    target = Path(folder) / f"{name}_{number:05}"
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        yield part, target
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _writer(choice: str, hidden: Any) -> tuple[str, Callable[[Tensor, Path], None]]:
    """The suffix of the files, and what writes a frame (3, h, w) in [-1, 1] to one."""
    if choice == PNG_16:
        return ".png", _write_deep
    texts = None if choice == WEBP or args.disable_metadata else _texts(hidden)

    def write(frame: Tensor, path: Path) -> None:
        levels = frame.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
        picture = Image.fromarray(levels.cpu().numpy())
        if choice == WEBP:
            picture.save(path, "WEBP", lossless=True, quality=0, method=0)  # quality: of the search for smaller files
        else:
            picture.save(path, "PNG", compress_level=4, pnginfo=texts if path.stem == "00000" else None)

    return (".webp" if choice == WEBP else ".png"), write


def _write_deep(frame: Tensor, path: Path) -> None:
    levels = frame.double().add(1).mul(65535 / 2).round().clamp(0, 65535).permute(1, 2, 0)
    picture = av.VideoFrame.from_ndarray(levels.cpu().numpy().astype(np.uint16), format="rgb48le")
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt = picture.width, picture.height, "rgb48be"
    encoder.time_base = 1
    packets = [*encoder.encode(picture.reformat(format="rgb48be")), *encoder.encode(None)]
    path.write_bytes(b"".join(bytes(packet) for packet in packets))


def _texts(hidden: Any) -> PngInfo:
    """Prompt and workflow, as ComfyUI's own Save Image stores them."""
    texts = PngInfo()
    for name, value in {"prompt": hidden.prompt, **(hidden.extra_pnginfo or {})}.items():
        if value is not None:
            texts.add_text(name, json.dumps(value))
    return texts


NODES = [SaveImageSequence]
