"""What SVD's output layer is trained on, for node and command: files of a folder, and sizes that the U-Net takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import AdapterError
from ..families import FAMILIES, VIDEO
from .adapter import OUTPUTS

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
LATENTS = ".safetensors"
FEWEST = 1 + VIDEO.time  # frames of a clip
UNIT = 8 * VIDEO.space  # pixels; the U-Net halves a latent three times


def training_files(folder: Path) -> list[Path]:
    """The videos and latent files of a folder, by name. Raises AdapterError where there are none."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (*VIDEOS, LATENTS) and file.is_file())
    if not files:
        raise AdapterError(
            f"The folder {folder.name} holds neither videos ({', '.join(VIDEOS)}) nor latent files ({LATENTS}): put "
            "some into it. Folders in it are not searched."
        )
    return files


def check_size(width: int, height: int) -> None:
    """Raise AdapterError unless a size in pixels fits the U-Net."""
    if width % UNIT or height % UNIT or min(width, height) < UNIT:
        raise AdapterError(
            f"The size is {width}x{height}; SVD is trained on multiples of {UNIT}, such as 1024x576 or 512x320."
        )


def check_latent(name: str, family: str, shape: Sequence[int]) -> None:
    """Raise AdapterError unless a latent file (b, c, t, h, w) holds latents of SVD's kind, of a size that fits."""
    kind, channels = FAMILIES[family], shape[1]
    if kind.scaled or kind.compression != VIDEO or channels != OUTPUTS:
        raise AdapterError(
            f"{name} is a latent of {family} with {channels} channels, and SVD works on those of cv-vae with "
            f"{OUTPUTS}: encode the video with CV-VAE, or take the file out of the folder."
        )
    height, width = (side * VIDEO.space for side in shape[-2:])
    if height % UNIT or width % UNIT:
        raise AdapterError(
            f"{name} is a latent of {width}x{height} pixels; SVD is trained on multiples of {UNIT}, such as 1024x576: "
            "scale the video before it is encoded, or take the file out of the folder."
        )


def left_out(name: str) -> str:
    """The sentence on a file that gives no clip."""
    return f"{name} is left out: it has fewer than {FEWEST} frames without a cut"


def check_any(clips: Sequence[object]) -> None:
    """Raise AdapterError where no file gave a clip."""
    if not clips:
        raise AdapterError(
            f"No clip can be trained on: every file has fewer than {FEWEST} frames without a cut. Add longer ones."
        )


def fingerprint(files: Sequence[Path], frames: int, width: int, height: int) -> str:
    """A hash of names and lengths of files, and of what is made of them: a training goes on with the same alone."""
    told = [[file.name, file.stat().st_size] for file in files]
    return hashlib.sha256(json.dumps([told, frames, width, height]).encode()).hexdigest()
