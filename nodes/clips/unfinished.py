"""Frames of a video whose decode is not finished, kept for the run after a crash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ...vae_core import __version__
from ...vae_core.door.resume import DecodeStore
from ...vae_core.weights.tensors import digest
from ..bridge.native import NativeVideoVAE
from ..bridge.schema import field
from ..bridge.wire import Facts

FOLDER = "unfinished_videos"  # below the output folder


def resume_input() -> Any:
    """The input `resume`."""
    return field(
        io.Boolean,
        "resume",
        default=False,
        optional=True,
        tooltip=f"Keep finished frames in output/{FOLDER} until the video is saved, 1.8 MB each at 1024x576, so that "
        "the same run after a crash goes on where it ended. For files of 8 bits and exact tiling. Cancel throws them "
        "away.",
        advanced=True,
    )


def store_for(vae: NativeVideoVAE, z: Tensor, facts: Facts, span: tuple[int, int], dtype: torch.dtype) -> DecodeStore:
    """Where the frames from span[0] to span[1] - 1 of a latent are kept. Raises VideoError where the disk is full."""
    codec = vae.codec
    how = (__version__, torch.__version__, codec.model.config, vae.device.type, vae.vae_dtype, facts.size)
    key = digest(z, f"{how} {span} {dtype}", codec.model.state_dict())
    folder = Path(folder_paths.get_output_directory()) / FOLDER / key[:16]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(f"{folder.parent} is a file: move it away, or switch resume off.") from error
    store = DecodeStore(folder, key)
    height, width = facts.size
    store.check_room((span[1] - span[0] - store.frames) * 3 * dtype.itemsize * height * width)
    return store
