"""Latent compatibility: does a video VAE share the latent space of an image VAE?"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..door.vae import VideoVAE
from ..run.windows import pad_stream


class ImageCoder(Protocol):
    """An image VAE, with latents scaled as the video VAE's are."""

    def encode(self, images: Tensor) -> Tensor:
        """(b, 3, h, w) in [-1, 1] to the posterior mean (b, z, h/8, w/8)."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """(b, z, h/8, w/8) to (b, 3, h, w)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Compatibility:
    """Of one clip; means over its latents or frames.

    distance: root mean square difference of the video VAE's latent to the image VAE's latent of the last frame of its
    group, as a share of the latter's root mean square: 0 for the same latents, about 1.4 for unrelated ones. nearest:
    the same to the frame of the group that is nearest. video_to_image: PSNR in dB of the image VAE's decode of the
    video VAE's latents, to the frame of the group that is nearest. image_to_video: PSNR of the video VAE's decode of
    the image VAE's latents of the frames that latents begin with, every fourth of a video VAE's, to all frames.
    """

    distance: float
    nearest: float
    video_to_image: float
    image_to_video: float


def latent_compatibility(vae: VideoVAE, image_vae: ImageCoder, frames: Callable[[], Iterable[Tensor]]) -> Compatibility:
    """Compare the two on one clip; holds one chunk.

    frames: starts a stream of (1, 3, t, h, w) chunks in [-1, 1]; it is read twice. Raises ValueError where the latents
    differ in shape.
    """
    distances: list[float] = []
    nearest: list[float] = []
    decoded: list[float] = []
    with torch.no_grad():
        for latent, group in _groups(vae, pad_stream(frames(), vae.info.compression)):
            theirs = image_vae.encode(group)
            if latent.shape != theirs.shape[1:]:
                raise ValueError(
                    f"The video VAE's latents are {tuple(latent.shape)} (channels, height, width), the image VAE's "
                    f"{tuple(theirs.shape[1:])}: they cannot share a space. Name the image VAE it was made for."
                )
            shares = (theirs - latent).square().mean((1, 2, 3)).sqrt() / theirs.square().mean((1, 2, 3)).sqrt()
            distances.append(float(shares[-1]))
            nearest.append(float(shares.min()))
            image = image_vae.decode(latent[None]).clamp(-1, 1)
            decoded.append(max(_psnr(image[0], frame) for frame in group))
        crossed = list(_image_to_video(vae, image_vae, frames))
    return Compatibility(
        distance=_mean(distances),
        nearest=_mean(nearest),
        video_to_image=_mean(decoded),
        image_to_video=_mean(crossed),
    )


def _groups(vae: VideoVAE, frames: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each latent (z, h, w) with the frames (n, 3, h, w) it stands for."""
    waiting = deque[Tensor]()

    def kept() -> Iterator[Tensor]:
        for chunk in frames:
            waiting.extend(chunk[0].unbind(1))
            yield chunk

    count = 1
    for chunk in vae.encode_stream(kept()):
        for latent in chunk[0].unbind(1):
            yield latent, torch.stack([waiting.popleft() for _ in range(count)])
            count = vae.info.time_compression


def _image_to_video(vae: VideoVAE, image_vae: ImageCoder, frames: Callable[[], Iterable[Tensor]]) -> Iterator[float]:
    waiting = deque[Tensor]()

    def latents() -> Iterator[Tensor]:
        count = 0
        for chunk in pad_stream(frames(), vae.info.compression):
            for frame in chunk[0].unbind(1):
                waiting.append(frame)
                if count % vae.info.time_compression == 0:
                    yield image_vae.encode(frame[None])[:, :, None]
                count += 1

    for chunk in vae.decode_stream(latents()):
        for frame in chunk[0].unbind(1):
            yield _psnr(frame.clamp(-1, 1), waiting.popleft())


def _psnr(ours: Tensor, theirs: Tensor) -> float:
    error = float(((ours.float() - theirs.float()) / 2).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
