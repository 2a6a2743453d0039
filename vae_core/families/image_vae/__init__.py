"""The image VAE of Stable Diffusion and its relatives: the family `image-vae`, which takes a clip frame by frame."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ..family import Compression, Family, Shapes, Windows
from ..layout import CLAMP, GROUPS, LINEAR, SAMPLER_SCALING, from_diffusers, original, sizes_in, widths_in_words
from .network import ImageVAE, ImageVAEConfig

__all__ = ["IMAGE_VAE", "ImageVAE", "ImageVAEConfig"]

PUBLISHED_EPS, OUR_EPS = 1e-6, 1e-5  # of the group norms; ours are those without attention in the decoder

_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # spellings of diffusers
_OWN = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_TEMPORAL = re.compile(
    r"^decoder\.(.*\.)?(mix_factor$|time_stack\.|time_mix_conv\.|temporal_res_block\.|time_conv_out\.)"
)


def _modernize(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of diffusers in the original spelling. Of a whole checkpoint the VAE alone; of SVD's VAE the encoder alone,
    since its decoder is another."""
    if any(name.startswith("model.diffusion_model.") for name in tensors):
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(_OWN)}
    if any(map(_TEMPORAL.match, tensors)):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.")}
    if not any(re.match(r"(en|de)coder\.(down|up|mid)_block", name) for name in tensors):
        return tensors
    older = re.compile(rf"(?<=\.attentions\.0\.)({'|'.join(_OLDER)})(?=\.)")
    renamed = {from_diffusers(older.sub(lambda m: _OLDER[m[1]], name)): tensor for name, tensor in tensors.items()}
    return {
        name: tensor[..., None, None] if LINEAR.search(name) and tensor.ndim == 2 else tensor
        for name, tensor in renamed.items()
    }


def _configure(shapes: Shapes, told: Mapping[str, float]) -> ImageVAEConfig:
    if told.get("norm_num_groups", GROUPS) != GROUPS:
        raise ValueError(f"its group norms have {told['norm_num_groups']:g} groups, and {GROUPS} are read")
    sizes = sizes_in(shapes, "down", "up", "block", upward=False)
    attention = "decoder.mid.attn_1.q.weight" in shapes
    ours = "decoder.conv_in.weight" in shapes and not attention
    scale, shift = SAMPLER_SCALING.get(sizes["latent_channels"], (1.0, 0.0))  # where a file says nothing
    return ImageVAEConfig(
        **sizes,
        quantized=("quant_conv.weight" in shapes, "post_quant_conv.weight" in shapes),
        decoder_attention=attention,
        norm_eps=told.get("norm_eps", OUR_EPS if ours else PUBLISHED_EPS),
        scale_factor=told.get("scaling_factor", scale),
        shift_factor=told.get("shift_factor", shift),
    )


def _told(config: ImageVAEConfig) -> dict[str, float]:
    return {"norm_eps": config.norm_eps, "scaling_factor": config.scale_factor, "shift_factor": config.shift_factor}


IMAGE_VAE = Family(
    id="image-vae",
    compression=Compression(time=1, space=8),
    frames=Windows(first=1, step=1, overlap=0),
    latents=Windows(first=1, step=1, overlap=0),
    tell_tales={
        "encode": (
            {
                "encoder.conv_in.weight": 4,
                "encoder.down.3.block.0.conv1.weight": 4,
                "encoder.mid.attn_1.q.weight": 4,
                "encoder.norm_out.weight": 1,
            },
        ),
        "decode": (
            {"decoder.conv_in.weight": 4, "decoder.up.3.block.0.conv1.weight": 4, "decoder.norm_out.weight": 1},
        ),
    },
    configure=_configure,
    build=ImageVAE,
    official=original,
    widths=widths_in_words,
    modernize=_modernize,
    told=_told,
    clamp=CLAMP,
)
