"""What ComfyUI finds inside a VAE object: the network as its base class and other packs call it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...vae_core import TilePlan, VideoVAE


def to_unit(pixels: Tensor) -> Tensor:
    """Pixels from [-1, 1] to [0, 1], clamped; in place and returned, for each version of ComfyUI takes one of them."""
    return pixels.add_(1.0).div_(2.0).clamp_(0.0, 1.0)


def to_signed(pixels: Tensor) -> Tensor:
    """Pixels from [0, 1] to [-1, 1]."""
    return pixels * 2.0 - 1.0


class Network(nn.Module):
    """`first_stage_model`: the network as ComfyUI's base class and other packs call it, with its chunked protocol.

    Tensors are (b, 3, t, h, w) in [-1, 1] and (b, z, t', h/8, w/8); frames beyond 1 + 4N are padded when encoding.
    """

    comfy_has_chunked_io = True

    def __init__(self, codec: VideoVAE) -> None:
        super().__init__()
        self.model = codec.model
        self.codec = codec

    def decode_output_shape(self, shape: Iterable[int]) -> tuple[int, ...]:
        """The shape of the frames that a latent of `shape` decodes to."""
        b, _, t, h, w = shape
        compression = self.codec.info.compression
        return b, 3, compression.pixel_frames(t), h * compression.space, w * compression.space

    def encode(self, x: Tensor, device: torch.device | None = None) -> Tensor:
        """The mean latent; `device` is where the weights are, and is named by ComfyUI alone."""
        z = self.codec.encode(x, pad=True)
        return z if device is None else z.to(device)

    def decode(self, z: Tensor, output_buffer: Tensor | None = None) -> Tensor:
        """Frames, chunk by chunk into `output_buffer` where there is one."""
        return _fill(self.codec.decode_stream(z), self.decode_output_shape(z.shape), z, output_buffer)

    def decode_tiled(self, z: Tensor, *, tile_x: int = 32, tile_y: int = 32, **_: Any) -> Tensor:
        """Exact tiles of `tile_y` x `tile_x` latents: overlap and cuts in time are not needed, and change nothing."""
        stream = self.codec.decode_stream(z, plan=TilePlan(tile=(tile_y, tile_x)))
        return _fill(stream, self.decode_output_shape(z.shape), z, None)

    def encode_tiled(self, x: Tensor, *, tile_x: int = 512, tile_y: int = 512, **_: Any) -> Tensor:
        """Exact tiles of `tile_y` x `tile_x` pixels."""
        return self.codec.encode(x, pad=True, plan=tiles_of_pixels(self.codec, tile_y, tile_x))


def _fill(chunks: Iterable[Tensor], shape: tuple[int, ...], like: Tensor, out: Tensor | None) -> Tensor:
    out = like.new_empty(shape) if out is None else out
    done = 0
    for chunk in chunks:
        out[:, :, done : done + chunk.shape[2]] = chunk
        done += chunk.shape[2]
    return out


def tiles_of_pixels(codec: VideoVAE, height: int, width: int) -> TilePlan:
    """Exact tiles of so many pixels."""
    space = codec.info.compression.space
    return TilePlan(tile=(max(1, height // space), max(1, width // space)))
