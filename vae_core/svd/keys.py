"""Names of SVD's tensors: those of the original file as functions of those of diffusers and transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import CheckpointError

UNET = "model.diffusion_model."  # before the U-Net's names in an original file
CLIP = "conditioner.embedders.0.open_clip.model.visual."  # before the image encoder's
HEAD = 64  # channels of an attention head
_OUTER = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = {
    "time_stack": "temporal_transformer_blocks",
    "time_pos_embed.0": "time_pos_embed.linear_1",
    "time_pos_embed.2": "time_pos_embed.linear_2",
}
_CLIP = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "conv1": "vision_model.embeddings.patch_embedding",
    "ln_pre": "vision_model.pre_layrnorm",
    "ln_post": "vision_model.post_layernorm",
}
_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def unet_layers(names: Mapping[str, Tensor]) -> int:
    """Residual blocks of a level, of a U-Net under its original names. Raises CheckpointError where it is no SVD."""
    ends = [int(found[1]) for name in names if (found := re.fullmatch(r"input_blocks\.(\d+)\.0\.op\.weight", name))]
    if not ends or "input_blocks.1.0.time_stack.in_layers.0.weight" not in names:
        raise CheckpointError(
            "This is no U-Net of SVD: it lacks the layers over time. Give svd.safetensors, svd_xt.safetensors, or "
            "their folder from Hugging Face."
        )
    return min(ends) - 1


def unet_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What diffusers' UNetSpatioTemporalConditionModel is to be built with, of a U-Net under its original names."""
    layers = unet_layers(tensors)
    firsts = [1]  # the first residual block of each level
    while f"input_blocks.{firsts[-1] + layers + 1}.0.in_layers.0.weight" in tensors:
        firsts.append(firsts[-1] + layers + 1)
    widths = tuple(tensors[f"input_blocks.{first}.0.out_layers.3.weight"].shape[0] for first in firsts)
    attends = [f"input_blocks.{first}.1.norm.weight" in tensors for first in firsts]
    seen = next(tensor for name, tensor in tensors.items() if name.endswith("attn2.to_k.weight"))
    told = tensors["label_emb.0.0.weight"].shape[1]
    return {
        "block_out_channels": widths,
        "down_block_types": tuple("CrossAttnDownBlockSpatioTemporal" if a else "DownBlockSpatioTemporal"
                                  for a in attends),
        "up_block_types": tuple("CrossAttnUpBlockSpatioTemporal" if a else "UpBlockSpatioTemporal"
                                for a in reversed(attends)),
        "layers_per_block": layers,
        "num_attention_heads": tuple(max(1, width // HEAD) for width in widths),
        "cross_attention_dim": seen.shape[1],
        "projection_class_embeddings_input_dim": told,
        "addition_time_embed_dim": told // 3,
    }  # fmt: skip


def unet_name(name: str, layers: int) -> str:
    """diffusers' name of a tensor of the U-Net, of the original one without its prefix."""
    for old, new in _OUTER.items():
        if name.startswith(f"{old}."):
            return _inner(new, name[len(old) + 1 :])
    found = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)", name)
    if found is None:
        return name
    side, number, part, rest = found[1], int(found[2]), int(found[3]), found[4]
    level, block = divmod(number - (side == "input"), layers + 1)
    where = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
    if rest.startswith("op."):
        return f"{where}.downsamplers.0.conv.{rest[3:]}"
    if part and rest.startswith("conv."):
        return f"{where}.upsamplers.0.{rest}"
    return _inner(f"{where}.{'attentions' if part else 'resnets'}.{block}", rest)


def _inner(module: str, rest: str) -> str:
    if ".attentions." in module:
        return f"{module}.{_swap(_ATTENTION, rest)}"
    if ".resnets." not in module or rest.startswith("time_mixer."):
        return f"{module}.{rest}"
    if rest.startswith("time_stack."):
        return f"{module}.temporal_res_block.{_swap(_RESNET, rest[len('time_stack.') :])}"
    return f"{module}.spatial_res_block.{_swap(_RESNET, rest)}"


def clip_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image encoder under transformers' names, of an original one without its prefix."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
        if name == "proj":
            out["visual_projection.weight"] = tensor.T
        elif found is None:
            out[_swap(_CLIP, name)] = tensor
        elif found[2].startswith("attn.in_proj_"):
            for part, which in zip(tensor.chunk(3), "qkv", strict=True):
                kind = found[2].removeprefix("attn.in_proj_")
                out[f"vision_model.encoder.layers.{found[1]}.self_attn.{which}_proj.{kind}"] = part
        else:
            out[f"vision_model.encoder.layers.{found[1]}.{_swap(_CLIP_LAYER, found[2])}"] = tensor
    return out


def _swap(table: Mapping[str, str], name: str) -> str:
    """`name` with its beginning looked up in `table`."""
    for old, new in table.items():
        if name == old or name.startswith(f"{old}."):
            return new + name[len(old) :]
    return name
