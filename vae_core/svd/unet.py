"""SVD outside ComfyUI: the U-Net and image VAE of diffusers and SVD's image encoder, for training its output layer.

A source is a folder of Hugging Face with the sub-folders `unet`, `image_encoder` and `vae`, or the original file, such
as svd_xt.safetensors, whose image VAE is not read. Weights are read without running code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from ..weights.files import WeightFile, read_weights
from .adapter import OutputLayer, output_layer
from .keys import CLIP, UNET, clip_tensors, unet_config, unet_layers, unet_name
from .session import TrainingClip
from .trainer import Draw, c_in, network_target

# CLIP's pictures: size, and mean and deviation of its channels
_SIDE = 224
_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_CLIP_HEAD = 80  # channels of an attention head of ViT-H
_EPSILON = 1e-5


class SVDNetwork:
    """The U-Net, for features of its output layer. old: that layer as loaded."""

    def __init__(self, unet: nn.Module) -> None:
        self._unet = unet
        conv: Any = unet.conv_out
        self.old: OutputLayer = output_layer(conv.weight, conv.bias)

    def to(self, device: torch.device) -> None:
        """Move the weights to `device`."""
        self._unet.to(device)

    def features(self, clip: TrainingClip, drawn: Draw, image: Tensor) -> tuple[Tensor, Tensor]:
        """What enters the output layer (t, features, h, w), and what it should give (t, 4, h, w)."""
        layer: Any = self._unet.conv_out
        device, dtype = layer.weight.device, layer.weight.dtype
        x0, noise = clip.x0.to(device), drawn.noise.to(device)
        image, seen = (torch.zeros_like(t) if drawn.dropped else t for t in (image, clip.seen))
        noisy = (x0 + drawn.sigma * noise) * c_in(drawn.sigma)
        sample = torch.cat((noisy, image.to(device).expand(x0.shape[0], -1, -1, -1)), dim=1)[None]  # 1 t 8 h w
        told = torch.tensor([[clip.rate - 1, clip.bucket, drawn.level]], device=device)
        caught: list[Tensor] = []

        def catch(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            caught.append(arguments[0].detach())

        handle = layer.register_forward_pre_hook(catch)
        try:
            with torch.inference_mode():  # nothing is kept for a way back
                time = torch.tensor(0.25 * math.log(drawn.sigma), device=device)
                self._unet(sample.to(dtype), time, seen.to(device, dtype), told)
        finally:
            handle.remove()
        return caught[0], network_target(x0, noise, drawn.sigma)


class ImageEncoder:
    """SVD's CLIP, under transformers' names: what the U-Net is told of a picture."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device, heads: int | None = None) -> None:
        self._tensors = {name: tensor.to(device, torch.float32) for name, tensor in tensors.items()}
        self._device = device
        self._heads = heads or max(1, self._tensor("embeddings.class_embedding").shape[-1] // _CLIP_HEAD)

    def see(self, picture: Tensor) -> Tensor:
        """(1, h, w, 3) in 0..1 to (1, 1, d): the picture's middle square, as ComfyUI's CLIP Vision takes it."""
        pixels = picture.movedim(-1, 1).float().to(self._device)  # 1 c h w
        scale = _SIDE / min(pixels.shape[-2:])
        size = [max(_SIDE, round(side * scale)) for side in pixels.shape[-2:]]
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
        top, left = (size[0] - _SIDE) // 2, (size[1] - _SIDE) // 2
        pixels = (pixels[..., top : top + _SIDE, left : left + _SIDE].clamp(0, 1) * 255).round() / 255
        mean, deviation = (torch.tensor(values, device=self._device)[:, None, None] for values in (_MEAN, _DEVIATION))
        with torch.inference_mode():
            return self._embed((pixels - mean) / deviation)[:, None].cpu()

    def _embed(self, pixels: Tensor) -> Tensor:
        """A Vision Transformer (Dosovitskiy et al. 2021) as CLIP has it: (n, 3, 224, 224) to (n, d)."""
        patches = self._tensor("embeddings.patch_embedding.weight")
        x = F.conv2d(pixels, patches, stride=patches.shape[-1]).flatten(2).transpose(1, 2)  # n patches c
        x = torch.cat((self._tensor("embeddings.class_embedding").reshape(1, 1, -1).expand(x.shape[0], -1, -1), x), 1)
        x = self._norm("pre_layrnorm", x + self._tensor("embeddings.position_embedding.weight"))
        layer = 0
        while f"vision_model.encoder.layers.{layer}.layer_norm1.weight" in self._tensors:
            x = self._layer(f"encoder.layers.{layer}", x)
            layer += 1
        return F.linear(self._norm("post_layernorm", x[:, 0]), self._tensors["visual_projection.weight"])

    def _layer(self, name: str, x: Tensor) -> Tensor:
        inner = self._norm(f"{name}.layer_norm1", x)
        parts = (self._linear(f"{name}.self_attn.{which}_proj", inner) for which in "qkv")
        q, k, v = (part.unflatten(-1, (self._heads, -1)).transpose(1, 2) for part in parts)  # n heads t c
        x = x + self._linear(
            f"{name}.self_attn.out_proj", F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )
        inner = F.gelu(self._linear(f"{name}.mlp.fc1", self._norm(f"{name}.layer_norm2", x)))
        return x + self._linear(f"{name}.mlp.fc2", inner)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias"), _EPSILON)

    def _tensor(self, name: str) -> Tensor:
        try:
            return self._tensors[f"vision_model.{name}"]
        except KeyError:
            raise CheckpointError(
                f"The image encoder lacks vision_model.{name}: it is no CLIP of SVD. Give the folder "
                "image_encoder of SVD."
            ) from None


class ImageVAE:
    """SVD's own VAE, for the first frames."""

    def __init__(self, network: nn.Module) -> None:
        self._network: Any = network

    def encode(self, picture: Tensor) -> Tensor:
        """(1, h, w, 3) around 0..1 to the mean of its latent, (1, 4, h/8, w/8), unscaled, on the CPU."""
        weight = next(self._network.parameters())
        with torch.inference_mode():
            pixels = picture.movedim(-1, 1).mul(2).sub(1).to(weight.device, weight.dtype)
            return self._network.encode(pixels).latent_dist.mean.float().cpu()


def load_network(source: Path, dtype: torch.dtype) -> SVDNetwork:
    """The U-Net of `source`, on the CPU. Raises CheckpointError where it holds none."""
    from diffusers import UNetSpatioTemporalConditionModel  # pyright: ignore[reportPrivateImportUsage]

    found = read_weights(_part(source, "unet"))
    tensors, config = found.tensors, found.config
    if config is None:
        tensors = {name.removeprefix(UNET): t for name, t in tensors.items() if name.startswith(UNET)} or tensors
        try:
            config = unet_config(tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error}") from error
        layers = unet_layers(tensors)
        tensors = {unet_name(name, layers): tensor for name, tensor in tensors.items()}
    network = _build(UNetSpatioTemporalConditionModel, config, tensors, found, (torch.device("cpu"), dtype))
    return SVDNetwork(network)


def load_image_encoder(source: Path, device: torch.device) -> ImageEncoder:
    """The CLIP of `source`. Raises CheckpointError where it holds none."""
    found = read_weights(_part(source, "image_encoder"))
    inside = {name.removeprefix(CLIP): t for name, t in found.tensors.items() if name.startswith(CLIP)}
    tensors = clip_tensors(inside) if inside else found.tensors
    heads = (found.config or {}).get("num_attention_heads")
    try:
        return ImageEncoder(tensors, device, heads)
    except CheckpointError as error:
        raise CheckpointError(f"{found.path}: {error}") from error


def load_image_vae(source: Path, device: torch.device) -> ImageVAE | None:
    """The VAE of `source`, in float32 since float16 can overflow in it; None where it is not a folder that has one."""
    if not (source / "vae" / "config.json").is_file():
        return None
    from diffusers import AutoencoderKLTemporalDecoder  # pyright: ignore[reportPrivateImportUsage]

    found = read_weights(source / "vae")
    network = _build(AutoencoderKLTemporalDecoder, found.config or {}, found.tensors, found, (device, torch.float32))
    return ImageVAE(network)


def _part(source: Path, name: str) -> Path:
    return source / name if (source / name).is_dir() else source


def _build(
    kind: type[Any],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    found: WeightFile,
    place: tuple[torch.device, torch.dtype],
) -> nn.Module:
    """The network with exactly these weights, without a second copy of them in float32."""
    if config.get("_class_name", kind.__name__) != kind.__name__:
        raise CheckpointError(
            f"{found.path}: is a {config['_class_name']}, and a {kind.__name__} is needed. Give a folder of SVD."
        )
    with torch.device("meta"):
        network: nn.Module = kind.from_config(dict(config))
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    wrong = sorted(n for n in wanted.keys() | tensors.keys() if n not in tensors or wanted.get(n) != tensors[n].shape)
    if wrong:
        raise CheckpointError(
            f"{found.path}: does not fit SVD: {len(wrong)} tensors are missing, unknown or of another shape, such as "
            f"{', '.join(wrong[:3])}. Give svd.safetensors, svd_xt.safetensors, or their folder from Hugging Face."
        )
    device, dtype = place
    network.load_state_dict({n: t.to(device, dtype) for n, t in tensors.items()}, strict=True, assign=True)
    return network.requires_grad_(False).eval()
