"""The clips that SVD's output adapter is trained on: latents, and what SVD is shown of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
import torch
from comfy_api.latest import InputImpl
from torch import Tensor

from ...vae_core.families import FAMILIES, VIDEO
from ...vae_core.media.latents import open_latent
from ...vae_core.svd import LATENT_SCALE, TrainingClip, augmented
from ..bridge.native import NativeVideoVAE
from ..bridge.running import Run
from ..bridge.video_source import VideoSource, open_video
from ..latents.paths import inside
from .conditioning import CHANNELS

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
LATENTS = ".safetensors"
_FEWEST = 1 + VIDEO.time  # frames of a clip


@dataclass(frozen=True, kw_only=True)
class ClipMaker:
    """Turns files into clips of up to `frames` frames, videos scaled to `width` x `height` and cut to their middle."""

    vae: NativeVideoVAE
    image_vae: Any
    clip_vision: Any
    frames: int
    width: int
    height: int
    seed: int

    def clips(self, files: list[Path], node_id: str | None) -> tuple[list[TrainingClip], list[str]]:
        """All clips of `files`, and sentences on what was left out. Raises ValueError where there is none."""
        out: list[TrainingClip] = []
        notes: list[str] = []
        for file in files:
            make = self._of_latent if file.suffix.lower() == LATENTS else self._of_video
            found = 0
            for x0, first, rate in make(file, node_id):
                out.append(self._clip(f"{file.name} #{found + 1}", x0, first, rate, len(out)))
                found += 1
            if not found:
                notes.append(f"{file.name} is left out: it has fewer than {_FEWEST} frames")
        if not out:
            raise ValueError(f"No clip can be trained on: every file has fewer than {_FEWEST} frames. Add longer ones.")
        return out, notes

    def _of_video(self, file: Path, node_id: str | None) -> Iterator[tuple[Tensor, Tensor, float]]:
        """(latent (t, 4, h, w), first frame (1, h, w, 3), frames per second) of each clip, one after another."""
        source = open_video(InputImpl.VideoFromFile(str(file)))
        count = (min(self.frames, source.total) - 1) // VIDEO.time * VIDEO.time + 1
        if count < _FEWEST:
            return
        for start in range(0, source.total - count + 1, count):
            first = next(iter(source.frames(start, 1)))  # 1 3 1 h w
            shape = (1, 3, count, self.height, self.width)
            chunks = self.vae.encode_chunks(self._chunks(source, start, count), shape, Run(count, node_id=node_id))
            z = torch.cat(list(chunks), dim=2)[0].movedim(1, 0)  # t c h w
            yield z, self._scale(first).movedim(1, -1).add(1).div(2), float(source.fps)

    def _of_latent(self, file: Path, node_id: str | None) -> Iterator[tuple[Tensor, Tensor, float]]:
        """The beginning of a latent file; its first frame is decoded by the image VAE."""
        opened = open_latent(file)
        family = FAMILIES[opened.meta.family]
        if family.scaled or family.compression != VIDEO or opened.shape[1] != CHANNELS:
            raise ValueError(
                f"{file.name} is a latent of {opened.meta.family} with {opened.shape[1]} channels, and SVD works on "
                f"those of cv-vae with {CHANNELS}: encode the video with CV-VAE, or take the file out of the folder."
            )
        count = min(opened.shape[2], VIDEO.latent_frames(self.frames))
        if count < 2:
            return
        z = opened.read(0, count)[0].movedim(1, 0).float()  # t c h w
        picture = self.image_vae.decode(z[:1])
        yield z, picture.reshape(-1, *picture.shape[-3:])[:1, ..., :3].cpu(), float(opened.meta.fps)

    def _clip(self, name: str, x0: Tensor, first: Tensor, fps: float, number: int) -> TrainingClip:
        first = first.float()
        level, noisy = augmented(first, self.seed, number)
        image = self.image_vae.encode(noisy)
        image = image[:, :, 0] if image.ndim == 5 else image
        if image.shape[1] != CHANNELS or image.shape[-2:] != x0.shape[-2:]:
            raise ValueError(
                f"The image VAE made {tuple(image.shape)} of the first frame of {name}, and the clip has latents "
                f"{tuple(x0.shape)}: connect the VAE of Image Only Checkpoint Loader."
            )
        seen = self.clip_vision.encode_image(first).image_embeds.unsqueeze(1)  # 1 1 d
        return TrainingClip(
            name=name,
            x0=x0.detach().cpu().float() * LATENT_SCALE,
            image=image.detach().cpu().float(),
            seen=seen.detach().cpu().float(),
            rate=max(1, round(fps / VIDEO.time)),
            augmentation=level,
        )

    def _chunks(self, source: VideoSource, start: int, count: int) -> Iterator[Tensor]:
        for chunk in source.frames(start, count):  # 1 3 t h w
            yield self._scale(chunk).movedim(0, 1).unsqueeze(0)

    def _scale(self, chunk: Tensor) -> Tensor:
        """(1, 3, t, h, w) to (t, 3, height, width)."""
        return comfy.utils.common_upscale(chunk[0].movedim(1, 0), self.width, self.height, "bilinear", "center")


def training_files(folder: str) -> list[Path]:
    """Videos and latent files of a folder below input/, by name. Raises ValueError where there are none."""
    root = Path(folder_paths.get_input_directory())
    path = training_folder(folder)
    if not path.is_dir():
        raise ValueError(
            f"There is no folder {folder!r} in {root.name}/: make it and put videos into it, or latent files of Video "
            "VAE Encode and Save Video Latent."
        )
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in (*VIDEOS, LATENTS) and file.is_file())
    if not files:
        raise ValueError(
            f"The folder {folder!r} holds neither videos ({', '.join(VIDEOS)}) nor latent files ({LATENTS}): put some "
            "into it. Folders in it are not searched."
        )
    return files


def training_folder(folder: str) -> Path:
    """The path of a folder below input/. Raises ValueError where it would lie elsewhere."""
    root = Path(folder_paths.get_input_directory())
    path = root / folder.strip().replace("\\", "/")
    if not folder.strip() or not inside(path, root):
        raise ValueError(f"The folder is {folder[:200]!r}: give the name of one in input/, such as svd_training.")
    return path


def check_size(width: int, height: int) -> None:
    """Raise ValueError unless the size fits the U-Net, which halves the latent three times."""
    if width % (8 * VIDEO.space) or height % (8 * VIDEO.space):
        raise ValueError(
            f"The size is {width}x{height}; SVD is trained on multiples of {8 * VIDEO.space}, such as 1024x576 or "
            "512x320."
        )
