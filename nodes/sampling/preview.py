"""Animated Sampling Preview: every frame of the clip while it is sampled."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.patcher_extension
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from comfy_execution.progress import get_progress_state
from PIL import Image
from torch import Tensor

from ..bridge.running import send_output
from ..bridge.schema import check_choice, describe, field
from .colours import AUTO, METHODS, Colours, colours_of, evenly, frames_of

SHEET, ANIMATION, OFF = "contact sheet", "animation", "off"
SHOWN = (SHEET, ANIMATION, OFF)
FOLDER = "cviv_sampling"  # in ComfyUI's temporary folder
_GAP = 2  # pixels between the pictures of a sheet
_KEY = "cviv_sampling_preview"


class AnimatedSamplingPreview(io.ComfyNode):
    """A MODEL whose samplers show every frame."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_AnimatedSamplingPreview",
            display_name="Animated Sampling Preview",
            description="Shows all frames of a clip on this node while it is sampled, where ComfyUI's own preview "
            "shows the first alone. Put it between model and sampler: SD, SVD, AnimateDiff and 5-D video models.",
            search_aliases=["video preview", "preview all frames", "latent preview", "animated preview"],
            inputs=[
                field(io.Model, "model", tooltip="The model to sample with."),
                field(
                    io.Combo,
                    "show",
                    options=list(SHOWN),
                    default=SHEET,
                    tooltip="contact sheet: all frames side by side. animation: they play in a loop. off: the model "
                    "goes through unchanged.",
                ),
                field(
                    io.Int,
                    "every",
                    default=2,
                    min=1,
                    max=1000,
                    tooltip="Show after every so many steps, and after the last.",
                ),
                field(
                    io.Combo,
                    "colours",
                    options=list(METHODS),
                    default=AUTO,
                    tooltip="latent colours: small and at once. TAESD: sharper and slower, with the file of "
                    "models/vae_approx. auto: TAESD where that file is there.",
                ),
                field(
                    io.Float,
                    "fps",
                    default=8.0,
                    min=0.1,
                    max=60.0,
                    step=0.1,
                    tooltip="Latents per second in the animation. One latent is one picture here, and four frames in "
                    "the video that CV-VAE decodes.",
                ),
                field(
                    io.Int,
                    "side",
                    default=768,
                    min=64,
                    max=2048,
                    tooltip="Longest side in pixels of the whole sheet, or of the animation.",
                    advanced=True,
                ),
                field(
                    io.Int,
                    "most_frames",
                    default=64,
                    min=1,
                    max=1024,
                    tooltip="Most frames to show; of a longer clip they are evenly spread.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="For the sampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model: Any, show: str, every: int, colours: str, fps: float, side: int, most_frames: int
    ) -> io.NodeOutput:
        check_choice("show", show, SHOWN)
        check_choice("colours", colours, METHODS)
        if show == OFF:
            return io.NodeOutput(model)
        make = colours_of(model.get_model_object("latent_format"), colours, model.load_device)
        shower = _Sheet(cls.hidden.unique_id, side) if show == SHEET else _Animation(cls.hidden.unique_id, side, fps)
        patched = model.clone()
        patched.add_wrapper_with_key(
            comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, _KEY, _Watch(make, shower, every, most_frames)
        )
        return io.NodeOutput(patched)


class _Watch:
    """Wraps a sampling: ComfyUI's callback after every step comes by here first."""

    def __init__(self, colours: Colours, shower: _Sheet | _Animation, every: int, most_frames: int) -> None:
        self._colours, self._shower, self._every, self._most = colours, shower, every, most_frames

    def __call__(
        self,
        executor: Any,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        callback: Callable[..., None] | None = None,
        *rest: Any,
        **more: Any,
    ) -> Any:
        def step(number: int, x0: Tensor, x: Tensor, total: int) -> None:
            if (number + 1) % self._every == 0 or number + 1 == total:
                self._show(x0, number + 1, total)
            if callback is not None:
                callback(number, x0, x, total)

        try:
            return executor(noise, latent_image, sampler, sigmas, denoise_mask, step, *rest, **more)
        finally:
            self._shower.close()

    def _show(self, x0: Tensor, step: int, total: int) -> None:
        if x0.is_nested or x0.ndim not in (4, 5):
            return  # picture and sound in one, or no pictures
        latents = frames_of(x0)
        pictures = self._colours(latents[evenly(latents.shape[0], self._most)])
        levels = pictures.mul(255).round().to(torch.uint8).numpy()
        self._shower.show([Image.fromarray(one) for one in levels], step, total)


class _Sheet:
    """All frames side by side, as the live preview of a node."""

    def __init__(self, node_id: str, side: int) -> None:
        self._node_id, self._side = node_id, side

    def show(self, pictures: list[Image.Image], step: int, total: int) -> None:
        sheet = contact_sheet(pictures, self._side)
        bar = comfy.utils.ProgressBar(total, node_id=self._node_id)
        bar.update_absolute(step, total, ("JPEG", sheet, max(sheet.size)))

    def close(self) -> None:
        get_progress_state().finish_progress(self._node_id)


class _Animation:
    """The frames in a loop, as a file that the node shows as its output."""

    def __init__(self, node_id: str, side: int, fps: float) -> None:
        self._node_id, self._side, self._fps = node_id, side, fps
        self._files: list[Path] = []

    def show(self, pictures: list[Image.Image], step: int, total: int) -> None:
        del step, total  # the sampler's own bar tells them
        folder = Path(folder_paths.get_temp_directory()) / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{uuid.uuid4().hex}.webp"
        first, *others = [_scaled(picture, self._side) for picture in pictures]
        first.save(
            path, "WEBP", save_all=True, append_images=others, duration=round(1000 / self._fps), loop=0, quality=80
        )
        file = {"filename": path.name, "subfolder": FOLDER, "type": "temp"}
        send_output({"images": [file], "animated": [True]}, self._node_id)
        self._files.append(path)
        while len(self._files) > 2:  # the page may still be loading the one before
            self._files.pop(0).unlink(missing_ok=True)

    def close(self) -> None:
        """The last one stays on the node."""


def contact_sheet(pictures: list[Image.Image], side: int) -> Image.Image:
    """Pictures of one size in rows, from left to right, as large as fits into a square of `side` pixels."""
    width, height = pictures[0].size
    columns = min(range(1, len(pictures) + 1), key=lambda count: _longest(len(pictures), count, width, height))
    rows = math.ceil(len(pictures) / columns)
    scale = min((side / columns - _GAP) / width, (side / rows - _GAP) / height)
    cell = max(1, round(width * scale)), max(1, round(height * scale))
    sheet = Image.new("RGB", (columns * (cell[0] + _GAP) - _GAP, rows * (cell[1] + _GAP) - _GAP), (24, 24, 24))
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        sheet.paste(picture.resize(cell, Image.Resampling.BICUBIC), (column * (cell[0] + _GAP), row * (cell[1] + _GAP)))
    return sheet


def _longest(count: int, columns: int, width: int, height: int) -> int:
    return max(columns * width, math.ceil(count / columns) * height)


def _scaled(picture: Image.Image, side: int) -> Image.Image:
    scale = side / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.BICUBIC)


NODES = [AnimatedSamplingPreview]
