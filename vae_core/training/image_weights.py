"""Weights of 2-D image VAEs from files, under the names that inflation reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cv_vae import CVVAE, CVVAEConfig
from ..door.checkpoints import DEMO_IMAGE_WEIGHTS
from ..errors import CheckpointError
from ..keys import infer_config, key_map, official
from ..weights.detect import Family, describe_foreign, family_of
from ..weights.files import read_weights, strip_foreign
from .image_vae import GROUPS, IVImageConfig

Weights = Mapping[str, Tensor]
PUBLISHED_EPS, OUR_EPS = 1e-6, 1e-5  # of the group norms: of Stable Diffusion's VAEs, and of `CVImageVAE`
# spelling of older diffusers -> today's
_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_REMEDY = "Give the VAE of Stable Diffusion 1.x, 2.x or 3 (a file or a diffusers folder), or an image VAE trained here."


class InflationError(ValueError):
    """The image weights do not fit the video VAE that they are to become."""


@dataclass(frozen=True, kw_only=True)
class CVImageWeights:
    """An image VAE of the Stable Diffusion kind, without quant convolutions.

    tensors: in the single-file spelling of Stable Diffusion (`decoder.mid.attn_1.q.weight`), 2-D kernels. config: of
    the CV-VAE that it becomes. norm_eps: of its group norms. border_bias: size of what folding the convolution before
    the decoder changed at the border of a latent, 0 where nothing (see `read_image_vae`).
    """

    tensors: dict[str, Tensor]
    config: CVVAEConfig
    norm_eps: float
    border_bias: float


@dataclass(frozen=True, kw_only=True)
class IVImageWeights:
    """An `IVImageVAE` of one half or of two."""

    tensors: dict[str, Tensor]
    config: IVImageConfig


def read_image_vae(source: str | Path | Weights) -> CVImageWeights | IVImageWeights:
    """The image VAE of a file, a diffusers folder or a state dict; what it is follows from names and shapes.

    The name "demo-image-vae" stands for the bundled one.

    Read are VAEs with the names of Stable Diffusion's single files (bare, or in a whole checkpoint under
    `first_stage_model.`), those with the names of diffusers, `CVImageVAE` and `IVImageVAE`. The 1x1 convolutions beside
    the latent (`quant_conv`, `post_quant_conv`) are folded into their neighbours, in float64. Only one thing is not the
    same after that: at the border the decoder's first kernel meets zeros outside of the latent, where it met no bias
    before and now acts as if it had.
    Raises InflationError where it is something else, or incomplete; CheckpointError where the file cannot be read.
    """
    config: dict[str, Any] = {}
    if isinstance(source, Mapping):
        origin, tensors = "The state dict", dict(source)
    else:
        file = read_weights(DEMO_IMAGE_WEIGHTS.get(str(source), source))
        origin, tensors, config = str(source), file.tensors, file.config or {}
    tensors = strip_foreign(tensors)
    if "encoder_middle.1.to_qkv.0.weight" in tensors:
        floats = {name: tensor.float() for name, tensor in tensors.items()}
        return IVImageWeights(tensors=floats, config=_iv_config(floats, origin))
    groups = config.get("norm_num_groups", GROUPS)
    if groups != GROUPS:
        raise InflationError(f"{origin} has group norms of {groups} groups; CV-VAE's have {GROUPS}. {_REMEDY}")
    return _cv_weights(tensors, origin)


def _iv_config(tensors: Weights, origin: str) -> IVImageConfig:
    halves = 2 if "encoder_middle.1.to_qkv.1.weight" in tensors else 1
    try:
        dim, z = tensors["conv_in.weight"].shape[0] // halves, tensors["from_latent.weight"].shape[0]
    except KeyError as error:
        raise InflationError(f"{origin} looks like an IVImageVAE, but {error} is missing. {_REMEDY}") from error
    return IVImageConfig(dim=dim, latent_channels=z, halves=halves)


def _cv_weights(tensors: Weights, origin: str) -> CVImageWeights:
    by_diffusers = "encoder.down_blocks.0.resnets.0.conv1.weight" in tensors
    spelling: Family = "cv-vae-sd3" if by_diffusers else "cv-vae"
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(shapes.get("decoder.conv_in.weight", ())) != 4:
        video = family_of(shapes)
        what = f"It is a video VAE already ({video})." if video else describe_foreign(shapes)
        raise InflationError(f"{origin} holds no image VAE that can become a CV-VAE. {what} {_REMEDY}")
    try:
        config = infer_config(shapes, spelling, scale_factor=None, shift_factor=None)
    except CheckpointError as error:
        raise InflationError(f"{origin} looks like an image VAE of another build. {error} {_REMEDY}") from error
    assert isinstance(config, CVVAEConfig)
    config = replace(config, sd3=False)
    tensors = {name: tensor.float() for name, tensor in tensors.items() if name.startswith(_PARTS)}  # not a whole SD
    renamed = _renamed(tensors, config) if by_diffusers else dict(tensors)
    unknown = sorted(_unknown(renamed, config))
    if unknown:
        raise InflationError(
            f"{origin} has {len(unknown)} tensors that CV-VAE has no place for, such as {', '.join(unknown[:3])}: it "
            f"is an image VAE of another build. {_REMEDY}"
        )
    border_bias = _fold_quant(renamed)
    published = "decoder.mid.attn_1.q.weight" in renamed
    return CVImageWeights(
        tensors=renamed,
        config=config,
        norm_eps=PUBLISHED_EPS if published else OUR_EPS,
        border_bias=border_bias,
    )


def _names(config: CVVAEConfig, spelling: Family) -> dict[str, str]:
    """Our name of every tensor of a CV-VAE, and the name in `spelling`."""
    with torch.device("meta"):
        state = CVVAE(config).state_dict()
    return {name: official(name, tuple(tensor.shape), spelling)[0] for name, tensor in state.items()}


def _renamed(tensors: Weights, config: CVVAEConfig) -> dict[str, Tensor]:
    """From the names of diffusers to those of a single file, attention as 1x1 kernels."""
    older = {re.sub(rf"\.{old}\.(\w+)$", rf".{new}.\1", name): name for name in tensors for old, new in _OLDER.items()
             if f".{old}." in name}  # fmt: skip
    names = {theirs: ours for ours, theirs in _names(replace(config, sd3=True), "cv-vae-sd3").items()}
    single = _names(config, "cv-vae")
    result = dict(tensors)
    for theirs, ours in names.items():
        tensor = result.pop(older.get(theirs, theirs), None)
        if tensor is not None:
            is_linear = ".attn_1." in single[ours] and tensor.ndim == 2
            result[single[ours]] = tensor[..., None, None] if is_linear else tensor
    return result


def _unknown(tensors: Weights, config: CVVAEConfig) -> set[str]:
    with torch.device("meta"):
        known = {name for name, _ in key_map(CVVAE(config)).values()}
    return {name for name in tensors if name.startswith(("encoder.", "decoder."))} - known


def _fold_quant(tensors: dict[str, Tensor]) -> float:
    """Fold the 1x1 convolutions beside the latent, in place; returns the size of the bias that the border feels."""
    if "quant_conv.weight" in tensors:
        outer, bias = tensors.pop("quant_conv.weight").double().flatten(1), tensors.pop("quant_conv.bias").double()
        _change(tensors, "encoder.conv_out.weight", lambda w: torch.einsum("om,mihw->oihw", outer, w))
        _change(tensors, "encoder.conv_out.bias", lambda b: outer @ b + bias)
    if "post_quant_conv.weight" not in tensors:
        return 0.0
    inner, bias = (
        tensors.pop("post_quant_conv.weight").double().flatten(1),
        tensors.pop("post_quant_conv.bias").double(),
    )
    felt = torch.einsum("omhw,m->o", tensors["decoder.conv_in.weight"].double(), bias)
    _change(tensors, "decoder.conv_in.bias", lambda b: b + felt)
    _change(tensors, "decoder.conv_in.weight", lambda w: torch.einsum("omhw,mi->oihw", w, inner))
    return float(felt.abs().max())


def _change(tensors: dict[str, Tensor], name: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors[name] = change(tensors[name].double()).float()
