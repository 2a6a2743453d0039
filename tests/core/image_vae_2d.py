"""A 2-D VAE of the Stable Diffusion kind as plain functions of a state dict, independent of the code under test; and
small ones of the family image-vae."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from vae_core.families.image_vae import IMAGE_VAE, OUR_EPS, ImageVAEConfig
from vae_core.training.coders import FrameByFrame

WIDTHS, BLOCKS, CHANNELS = (32, 32, 64, 96), 1, 4


def random_weights(*, quant: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Weights in the spelling of single files, drawn so that activations neither die nor explode."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}

    def conv(name: str, width_in: int, width_out: int, side: int) -> None:
        kernel = torch.randn(width_out, width_in, side, side, generator=generator) / (width_in * side * side) ** 0.5
        weights[f"{name}.weight"], weights[f"{name}.bias"] = kernel, 0.1 * torch.randn(width_out, generator=generator)

    def norm(name: str, width: int) -> None:
        weights[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        weights[f"{name}.bias"] = 0.2 * torch.randn(width, generator=generator)

    def block(name: str, width_in: int, width: int) -> None:
        norm(f"{name}.norm1", width_in)
        conv(f"{name}.conv1", width_in, width, 3)
        norm(f"{name}.norm2", width)
        conv(f"{name}.conv2", width, width, 3)
        if width_in != width:
            conv(f"{name}.nin_shortcut", width_in, width, 1)

    def middle(half: str) -> None:
        block(f"{half}.mid.block_1", WIDTHS[3], WIDTHS[3])
        norm(f"{half}.mid.attn_1.norm", WIDTHS[3])
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{half}.mid.attn_1.{part}", WIDTHS[3], WIDTHS[3], 1)
        block(f"{half}.mid.block_2", WIDTHS[3], WIDTHS[3])

    conv("encoder.conv_in", 3, WIDTHS[0], 3)
    width = WIDTHS[0]
    for i, wide in enumerate(WIDTHS):
        for j in range(BLOCKS):
            block(f"encoder.down.{i}.block.{j}", width, wide)
            width = wide
        if i < 3:
            conv(f"encoder.down.{i}.downsample.conv", width, width, 3)
    middle("encoder")
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", width, 2 * CHANNELS, 3)
    conv("decoder.conv_in", CHANNELS, width, 3)
    middle("decoder")
    for i in (3, 2, 1, 0):
        for j in range(BLOCKS + 1):
            block(f"decoder.up.{i}.block.{j}", width, WIDTHS[i])
            width = WIDTHS[i]
        if i:
            conv(f"decoder.up.{i}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", width, 3, 3)
    if quant:
        conv("quant_conv", 2 * CHANNELS, 2 * CHANNELS, 1)
        conv("post_quant_conv", CHANNELS, CHANNELS, 1)
    return weights


def as_diffusers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in the spelling of diffusers."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        name = re.sub(r"^decoder\.up\.(\d)\.", lambda m: f"decoder.up_blocks.{3 - int(m[1])}.", name)
        name = re.sub(r"^encoder\.down\.(\d)\.", r"encoder.down_blocks.\1.", name)
        name = re.sub(r"\.block\.(\d)\.", r".resnets.\1.", name)
        name = name.replace(".downsample.", ".downsamplers.0.").replace(".upsample.", ".upsamplers.0.")
        name = name.replace(".mid.block_1.", ".mid_block.resnets.0.").replace(".mid.block_2.", ".mid_block.resnets.1.")
        name = name.replace(".nin_shortcut.", ".conv_shortcut.").replace(".norm_out.", ".conv_norm_out.")
        if ".mid.attn_1." in name:
            name = name.replace(".mid.attn_1.", ".mid_block.attentions.0.").replace(".norm.", ".group_norm.")
            name = re.sub(r"\.([qkv])\.(\w+)$", r".to_\1.\2", name).replace(".proj_out.", ".to_out.0.")
            tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor
        renamed[name] = tensor
    return renamed


def passable(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what no CV-VAE can do: a decoder attention of full rank, and a bias before the decoder's zero padding."""
    u, strengths, v = torch.linalg.svd(weights["decoder.mid.attn_1.v.weight"].flatten(1).double())
    strengths[-3:] = 0
    weights["decoder.mid.attn_1.v.weight"] = (u * strengths @ v).float()[..., None, None]
    if "post_quant_conv.bias" in weights:
        weights["post_quant_conv.bias"].zero_()
    return weights


class Image2D:
    """Encode to mean and logvar, and decode, (b, 3, h, w) <-> (b, z, h/8, w/8).

    repeat_border: pad as cv-vae-sd3 does, by repetition, but for the second convolution of a block.
    """

    def __init__(self, weights: dict[str, Tensor], *, repeat_border: bool = False) -> None:
        self.weights, self.repeat_border = weights, repeat_border

    def _conv(self, name: str, x: Tensor, **options: int) -> Tensor:
        if self.repeat_border and options.get("padding") and not name.endswith(".conv2"):
            x, options = F.pad(x, (1, 1, 1, 1), mode="replicate"), {}
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **options)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-6)

    def _block(self, name: str, x: Tensor) -> Tensor:
        y = self._conv(f"{name}.conv1", F.silu(self._norm(f"{name}.norm1", x)), padding=1)
        y = self._conv(f"{name}.conv2", F.silu(self._norm(f"{name}.norm2", y)), padding=1)
        return y + (self._conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.bias" in self.weights else x)

    def _middle(self, half: str, x: Tensor) -> Tensor:
        x = self._block(f"{half}.mid.block_1", x)
        at = f"{half}.mid.attn_1"
        q, k, v = (self._conv(f"{at}.{part}", self._norm(f"{at}.norm", x)).flatten(2) for part in "qkv")
        mixed = v @ (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(2).transpose(1, 2)
        return self._block(f"{half}.mid.block_2", x + self._conv(f"{at}.proj_out", mixed.view(x.shape)))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self._conv("encoder.conv_in", x, padding=1)
        for i in range(4):
            for j in range(BLOCKS):
                x = self._block(f"encoder.down.{i}.block.{j}", x)
            if i < 3:
                x = self._conv(f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = F.silu(self._norm("encoder.norm_out", self._middle("encoder", x)))
        x = self._conv("encoder.conv_out", x, padding=1)
        mean, logvar = (self._conv("quant_conv", x) if "quant_conv.bias" in self.weights else x).chunk(2, 1)
        return mean, logvar

    def decode(self, z: Tensor) -> Tensor:
        z = self._conv("post_quant_conv", z) if "post_quant_conv.bias" in self.weights else z
        x = self._middle("decoder", self._conv("decoder.conv_in", z, padding=1))
        for i in (3, 2, 1, 0):
            for j in range(BLOCKS + 1):
                x = self._block(f"decoder.up.{i}.block.{j}", x)
            if i:
                x = self._conv(f"decoder.up.{i}.upsample.conv", F.interpolate(x, scale_factor=2.0), padding=1)
        return self._conv("decoder.conv_out", F.silu(self._norm("decoder.norm_out", x)), padding=1)


def our_image_vae(widths: tuple[int, ...] = (32, 32, 32, 32), *, attention: bool = False) -> FrameByFrame:
    """A freshly drawn `image-vae` without quant convolutions, as the image stage trains it; with `attention` in the
    decoder and eps 1e-6, as Stable Diffusion has them."""
    size = ImageVAEConfig(
        widths=widths,
        blocks_per_level=1,
        latent_channels=4,
        quantized=(False, False),
        decoder_attention=attention,
        norm_eps=1e-6 if attention else OUR_EPS,
        scale_factor=1.0,
        shift_factor=0.0,
    )
    return FrameByFrame(IMAGE_VAE.network(size))
