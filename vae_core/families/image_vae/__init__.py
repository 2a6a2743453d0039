"""The image VAE of Stable Diffusion and its relatives: the family `image-vae`, which takes a clip frame by frame."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ..family import Compression, Family, Scaling, Shapes, Windows, substituted
from ..layout import GROUPS, LEVELS
from .network import ImageVAE, ImageVAEConfig

__all__ = ["IMAGE_VAE", "ImageVAE", "ImageVAEConfig"]

SAMPLER_SCALING = {4: (0.18215, 0.0), 16: (1.5305, 0.0609)}  # where a file says nothing: SD 1.x and 2.x; SD3
PUBLISHED_EPS, OUR_EPS = 1e-6, 1e-5  # of the group norms; ours are those without attention in the decoder

_NAMES = (
    (r"^encoder\.levels\.(\d)\.block_(\d+)\.", r"encoder.down.\1.block.\2."),
    (r"^encoder\.levels\.(\d)\.down\.", r"encoder.down.\1.downsample.conv."),
    (r"^decoder\.levels\.(\d)\.block_(\d+)\.", r"decoder.up.\1.block.\2."),
    (r"^decoder\.levels\.(\d)\.up\.", r"decoder.up.\1.upsample.conv."),
    (r"\.middle\.0\.", r".mid.block_1."),
    (r"\.middle\.1\.", r".mid.attn_1."),
    (r"\.middle\.2\.", r".mid.block_2."),
    (r"\.shortcut\.", r".nin_shortcut."),
    (r"^encoder\.quant\.", r"quant_conv."),
    (r"^decoder\.quant\.", r"post_quant_conv."),
)
# the spelling of diffusers, today's and older, in that of the original program
_DIFFUSERS = (
    (r"\.(down|up)_blocks\.(\d)\.resnets\.", r".\1.\2.block."),
    (r"\.down_blocks\.(\d)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", r".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", r".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", r".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.(to_out\.0|proj_attn)\.", r".mid.attn_1.proj_out."),
    (r"\.mid_block\.attentions\.0\.(?:to_q|query)\.", r".mid.attn_1.q."),
    (r"\.mid_block\.attentions\.0\.(?:to_k|key)\.", r".mid.attn_1.k."),
    (r"\.mid_block\.attentions\.0\.(?:to_v|value)\.", r".mid.attn_1.v."),
    (r"\.conv_shortcut\.", r".nin_shortcut."),
    (r"\.conv_norm_out\.", r".norm_out."),
)
_LINEAR = re.compile(r"\.attn_1\.(q|k|v|proj_out)\.weight$")  # in the original program 1x1 convolutions
_OWN = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_TEMPORAL = re.compile(
    r"^decoder\.(.*\.)?(mix_factor$|time_stack\.|time_mix_conv\.|temporal_res_block\.|time_conv_out\.)"
)


def _upside_down(name: str) -> str:
    """The decoder's levels counted from the other end."""
    return re.sub(r"^decoder\.up\.(\d)\.", lambda m: f"decoder.up.{LEVELS - 1 - int(m[1])}.", name)


def _official(config: ImageVAEConfig, name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    name = _upside_down(substituted(name, _NAMES))
    return name, (*shape, 1, 1) if _LINEAR.search(name) else shape


def _modernize(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of diffusers in the original spelling. Of a whole checkpoint the VAE alone; of SVD's VAE the encoder alone,
    since its decoder is another."""
    if any(name.startswith("model.diffusion_model.") for name in tensors):
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(_OWN)}
    if any(map(_TEMPORAL.match, tensors)):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.")}
    if not any(re.match(r"(en|de)coder\.(down|up|mid)_block", name) for name in tensors):
        return tensors
    renamed = {_upside_down(substituted(name, _DIFFUSERS)): tensor for name, tensor in tensors.items()}
    return {
        name: tensor[..., None, None] if _LINEAR.search(name) and tensor.ndim == 2 else tensor
        for name, tensor in renamed.items()
    }


def _configure(shapes: Shapes, told: Mapping[str, float]) -> ImageVAEConfig:
    if told.get("norm_num_groups", GROUPS) != GROUPS:
        raise ValueError(f"its group norms have {told['norm_num_groups']:g} groups, and {GROUPS} are read")
    whole = "decoder.conv_in.weight" in shapes
    levels, more = ("decoder.up", 1) if whole else ("encoder.down", 0)
    channels = shapes["decoder.conv_in.weight"][1] if whole else shapes["encoder.conv_out.weight"][0] // 2
    blocks = 0
    while f"{levels}.0.block.{blocks}.conv1.weight" in shapes:
        blocks += 1
    attention = "decoder.mid.attn_1.q.weight" in shapes
    scale, shift = SAMPLER_SCALING.get(channels, (1.0, 0.0))
    return ImageVAEConfig(
        widths=tuple(shapes[f"{levels}.{i}.block.0.conv1.weight"][0] for i in range(LEVELS)),
        blocks_per_level=blocks - more,
        latent_channels=channels,
        quantized=("quant_conv.weight" in shapes, "post_quant_conv.weight" in shapes),
        decoder_attention=attention,
        norm_eps=told.get("norm_eps", PUBLISHED_EPS if attention or not whole else OUR_EPS),
        scale_factor=told.get("scaling_factor", scale),
        shift_factor=told.get("shift_factor", shift),
    )


def _scaling(config: ImageVAEConfig) -> Scaling:
    return Scaling(scale=config.scale_factor, shift=config.shift_factor)


def _told(config: ImageVAEConfig) -> dict[str, float]:
    return {"norm_eps": config.norm_eps, "scaling_factor": config.scale_factor, "shift_factor": config.shift_factor}


def _widths(config: ImageVAEConfig) -> str:
    return f"{', '.join(map(str, config.widths))}; {config.blocks_per_level} residual block(s) per level"


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
    official=_official,
    scaling=_scaling,
    widths=_widths,
    modernize=_modernize,
    told=_told,
    clamp=(-30.0, 20.0),
)
