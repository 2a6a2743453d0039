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

from ...vae_core.families import VIDEO
from ...vae_core.media.latents import open_latent
from ...vae_core.svd import LATENT_SCALE, TrainingClip, beginning_of, look_through, spans_of, with_buckets
from ...vae_core.svd.files import LATENTS, check_any, check_latent, left_out, training_files
from ..bridge.native import NativeVideoVAE
from ..bridge.running import Run
from ..bridge.video_source import VideoSource, open_video
from ..latents.paths import inside
from .anchor import encode_pictures, see_pictures


@dataclass(frozen=True, kw_only=True)
class _Made:
    """A clip without its embedding. z: (t, 4, h, w), unscaled. first: (1, h, w, 3) in 0..1. motion: see `Look`."""

    z: Tensor
    first: Tensor
    fps: float
    motion: float | None


@dataclass(frozen=True, kw_only=True)
class ClipMaker:
    """Turns files into clips of up to `frames` frames, videos scaled to `width` x `height` and cut to their middle."""

    vae: NativeVideoVAE
    image_vae: Any
    clip_vision: Any
    frames: int
    width: int
    height: int

    def clips(self, files: list[Path], node_id: str | None) -> tuple[list[TrainingClip], list[str]]:
        """All clips of `files`, and sentences on what was left out. Raises ValueError where there is none."""
        out: list[TrainingClip] = []
        notes: list[str] = []
        for file in files:
            make = self._of_latent if file.suffix.lower() == LATENTS else self._of_video
            found = 0
            for made in make(file, node_id):
                found += 1
                out.append(self._clip(f"{file.name} #{found}", made))
            if not found:
                notes.append(left_out(file.name))
        check_any(out)
        return with_buckets(out), notes

    def encode(self, picture: Tensor) -> Tensor:
        """(1, h, w, 3) around 0..1 to SVD's image latent (1, 4, h/8, w/8), on the CPU."""
        return encode_pictures(self.image_vae, picture).detach().cpu().float()

    def _of_video(self, file: Path, node_id: str | None) -> Iterator[_Made]:
        """Clips of a video, one after another, none across a cut."""
        source = open_video(InputImpl.VideoFromFile(str(file)))
        for span in spans_of(look_through(source.frames()), self.frames):
            first = next(iter(source.frames(span.start, 1)))  # 1 3 1 h w
            shape = (1, 3, span.frames, self.height, self.width)
            scaled = self._scaled(source, span.start, span.frames)
            latents = self.vae.encode_chunks(scaled, shape, Run(span.frames, node_id=node_id))
            z = torch.cat(list(latents), dim=2)[0].movedim(1, 0)  # t c h w
            picture = self._scale(first).movedim(1, -1).add(1).div(2)
            yield _Made(z=z, first=picture, fps=float(source.fps), motion=span.motion)

    def _of_latent(self, file: Path, node_id: str | None) -> Iterator[_Made]:
        """The beginning of a latent file, up to the first cut; the image VAE shows what is in it."""
        opened = open_latent(file)
        check_latent(file.name, opened.meta.family, opened.shape)
        count = min(opened.shape[2], VIDEO.latent_frames(self.frames))
        if count < 2:
            return
        z = opened.read(0, count)[0].movedim(1, 0).float()  # t c h w
        shown = torch.cat([self._decode(latent) for latent in z.split(1)])  # t h w 3
        span = beginning_of(look_through([shown.movedim(-1, 0)[None].mul(2).sub(1)], every=VIDEO.time), count)
        if span.frames >= 2:
            yield _Made(z=z[: span.frames], first=shown[:1], fps=float(opened.meta.fps), motion=span.motion)

    def _decode(self, latent: Tensor) -> Tensor:
        picture = self.image_vae.decode(latent)
        return picture.reshape(-1, *picture.shape[-3:])[:1, ..., :3].cpu()

    def _clip(self, name: str, made: _Made) -> TrainingClip:
        first = made.first.float()
        image = self.encode(first)
        if image.shape[-2:] != made.z.shape[-2:]:
            raise ValueError(
                f"The image VAE made {tuple(image.shape)} of the first frame of {name}, and the clip has latents "
                f"{tuple(made.z.shape)}: connect the VAE of Image Only Checkpoint Loader."
            )
        return TrainingClip(
            name=name,
            x0=made.z.detach().cpu().float() * LATENT_SCALE,
            first=first.half(),
            seen=see_pictures(self.clip_vision, first).detach().cpu().float(),
            rate=max(1, round(made.fps / VIDEO.time)),
            motion=None if made.motion is None else made.motion * made.fps / VIDEO.time,
        )

    def _scaled(self, source: VideoSource, start: int, count: int) -> Iterator[Tensor]:
        for frames in source.frames(start, count):  # 1 3 t h w
            yield self._scale(frames).movedim(0, 1).unsqueeze(0)

    def _scale(self, frames: Tensor) -> Tensor:
        """(1, 3, t, h, w) to (t, 3, height, width)."""
        return comfy.utils.common_upscale(frames[0].movedim(1, 0), self.width, self.height, "bilinear", "center")


def files_of(folder: str) -> list[Path]:
    """Videos and latent files of a folder below input/, by name. Raises ValueError where there are none."""
    path = training_folder(folder)
    if not path.is_dir():
        raise ValueError(
            f"There is no folder {folder!r} in {Path(folder_paths.get_input_directory()).name}/: make it and put "
            "videos into it, or latent files of Video VAE Encode and Save Video Latent."
        )
    return training_files(path)


def training_folder(folder: str) -> Path:
    """The path of a folder below input/. Raises ValueError where it would lie elsewhere."""
    root = Path(folder_paths.get_input_directory())
    path = root / folder.strip().replace("\\", "/")
    if not folder.strip() or not inside(path, root):
        raise ValueError(f"The folder is {folder[:200]!r}: give the name of one in input/, such as svd_training.")
    return path
