"""Inflation: a video VAE that reproduces an image VAE on still frames, before any training on video.

A 3-D kernel starts from the image VAE's 2-D kernel at one time tap, zeros elsewhere: the last tap where time is causal
(CV-VAE's encoder), the centre tap elsewhere. What has no counterpart in the image VAE starts so that still frames pass.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..checkpoints import official_state
from ..cv_vae import CVVAE, CVVAEConfig
from ..iv_vae import IVVAE, IVVAEConfig
from ..keys import key_map

Weights = Mapping[str, Tensor]


class InflationError(ValueError):
    """The image weights do not fit the video VAE that they are to become."""


# ---------------------------------------------------------------------------------------------------------- CV-VAE


def inflate_cv(image: Weights, config: CVVAEConfig) -> dict[str, Tensor]:
    """Official weights of a CV-VAE from those of an image VAE in the Stable Diffusion layout (same names, 2-D kernels).

    Upsampling convolutions that double time repeat the 2-D kernel for both parts. `proj_out_t` is zero, which silences
    the whole attention path of the decoder (its spatial part feeds the part over time): an image VAE without attention
    there is reproduced exactly on still frames, one with it as if that attention gave nothing, until training opens it.
    What else the image VAE does not have keeps the model's own initialisation (torch's global seed).
    Raises InflationError when a tensor is missing or does not fit.
    """
    model = CVVAE(config)
    state = official_state(model)
    for name, target in state.items():
        if name == "decoder.mid.attn_1.proj_out_t.weight" or name == "decoder.mid.attn_1.proj_out_t.bias":
            state[name] = torch.zeros_like(target)
        elif name in image:
            state[name] = _spread_over_time(image[name], target, name)
        elif not name.startswith("decoder.mid.attn_1."):
            raise InflationError(
                f"The image VAE has no {name}; give the weights of an image VAE in the Stable Diffusion layout with "
                f"the widths {config.widths} and {config.blocks_per_level} block(s) per level."
            )
    return state


def _spread_over_time(source: Tensor, target: Tensor, name: str) -> Tensor:
    """`source` in the shape of `target`: repeated over parts, then put at one time tap."""
    parts = target.shape[0] // source.shape[0] if ".upsample." in name else 1
    repeated = source.repeat(parts, *(1,) * (source.ndim - 1))
    if repeated.shape == target.shape:
        return repeated.to(target.dtype)
    if target.ndim != 5 or repeated.shape != (*target.shape[:2], *target.shape[3:]):
        raise InflationError(
            f"The image VAE's {name} has shape {tuple(source.shape)}, which does not fit the video VAE's "
            f"{tuple(target.shape)}: their widths must be the same."
        )
    taps = target.shape[2]
    tap = taps - 1 if name.startswith("encoder.") else taps // 2
    inflated = torch.zeros_like(target)
    inflated[:, :, tap] = repeated
    return inflated


# ---------------------------------------------------------------------------------------------------------- IV-VAE

# our name in the video VAE -> name in the image VAE, up to the half
_IV_RULES = (
    (r"^encoder\.conv_in\.", "conv_in."),
    (r"^encoder\.stages\.", "encoder."),
    (r"^encoder\.middle\.", "encoder_middle."),
    (r"^encoder\.norm_out\.", "encoder_norm."),
    (r"^encoder\.pac\.", "head."),
    (r"^decoder\.conv_in\.", "conv_latent."),
    (r"^decoder\.stages\.", "decoder."),
    (r"^decoder\.middle\.", "decoder_middle."),
    (r"^decoder\.norm_out\.", "decoder_norm."),
    (r"^decoder\.conv_out\.", "conv_out."),
    (r"\.conv\.(weight|bias)$", r".\1"),  # the purely 2-D stages
)


def join_halves(first: Weights, second: Weights) -> dict[str, Tensor]:
    """Two image VAEs of z/2 channels (`IVImageVAE`, one half) side by side, as one of two halves.

    Kernels from one half to the other are zero, so each half still computes what it did alone. One image VAE may be
    given twice. Raises InflationError when the two differ in names or shapes.
    """
    if {name: t.shape for name, t in first.items()} != {name: t.shape for name, t in second.items()}:
        raise InflationError(
            "The two image VAEs that are to become the halves of an IV-VAE differ in names or shapes: train both with "
            "the same dim and number of latent channels, or give the same one twice."
        )
    joined: dict[str, Tensor] = {}
    for name, a in first.items():
        b = second[name]
        per_half = re.match(r"(.*\.(?:to_qkv|proj|conv))\.0\.(weight|bias)$", name)
        if per_half:  # attention and the changes of resolution: one layer per half
            joined[f"{per_half[1]}.0.{per_half[2]}"], joined[f"{per_half[1]}.1.{per_half[2]}"] = a, b
        elif a.ndim != 4 or name == "conv_in.weight":  # biases, norms, and kernels that read the picture
            joined[name] = torch.cat((a, b))
        elif name == "head.merge.weight":  # it reads, of every branch, both halves
            parts = [half.unflatten(1, (-1, half.shape[0])) for half in (a, b)]
            joined[name] = _block_diagonal(parts[0], parts[1], dim=2).flatten(1, 2)
        else:
            joined[name] = _block_diagonal(a, b, dim=1)
    return joined


def _block_diagonal(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """[[a, 0], [0, b]], with the columns along `dim`."""
    zeros = torch.zeros_like(a)
    return torch.cat((torch.cat((a, zeros), dim), torch.cat((zeros, b), dim)))


def inflate_iv(image: Weights, config: IVVAEConfig) -> dict[str, Tensor]:
    """Official weights of an IV-VAE from an `IVImageVAE` of two halves: keyframe temporal compression initialisation.

    The first half becomes the 2-D branch, the second the 3-D branch, its kernels at the centre tap. The time
    convolutions pass still video: the encoder's takes the mean of two frames, the decoder's repeats. On still frames
    the keyframes (frame 0 and the first of every group of four) come out as the first half gives them, the other
    frames as the second does. Raises InflationError when a tensor is missing or does not fit.
    """
    model = IVVAE(config)
    names = {ours: theirs for ours, (theirs, _) in key_map(model).items()}
    state: dict[str, Tensor] = {}
    for name, target in model.state_dict().items():
        value = _identity_over_time(name, target) if ".time_conv." in name else _from_halves(image, name, target)
        if value.shape != target.shape:
            raise InflationError(
                f"The image VAE's weights for {names[name]} have shape {tuple(value.shape)}, which does not fit the "
                f"video VAE's {tuple(target.shape)}: dim and latent channels must be the same."
            )
        state[names[name]] = value
    return state


def _identity_over_time(name: str, target: Tensor) -> Tensor:
    """Of a time convolution: (c, c, 2, 1, 1) that averages two frames, or (2c, c, 1, 1, 1) that repeats one."""
    if name.endswith(".bias"):
        return torch.zeros_like(target)
    width, taps = target.shape[1], target.shape[2]
    identity = torch.eye(width).repeat(target.shape[0] // width, 1)
    return (identity / taps)[:, :, None, None, None].expand_as(target).clone()


def _from_halves(image: Weights, name: str, target: Tensor) -> Tensor:
    """The value of our tensor `name`, from the image VAE of two halves."""
    is_time = "_3d." in name  # of the second half; "_2d." of the first; neither: of both
    half = 1 if is_time else 0
    source = re.sub(r"(attention|conv)_[23]d\.", lambda m: f"{m[1]}_?.", name)
    for ours, theirs in _IV_RULES:
        source = re.sub(ours, theirs, source)
    resample = source.replace("conv_?.", f"conv.{half}.")
    if resample != source and resample in image:  # changes of resolution
        return image[resample].to(target.dtype)
    if "attention_?." in source:
        source = source.replace("attention_?.", "")
        source = re.sub(r"(to_qkv|proj)\.", rf"\1.{half}.", source)
        value = _tensor(image, source, name)
        return (value.chunk(2)[half] if source.endswith(".gamma") else value).to(target.dtype)
    value = _tensor(image, source.replace("conv_?.", ""), name)
    if source == "head.merge.weight":  # the video VAE reads all first halves, then all second halves
        value = value.unflatten(1, (-1, 2, value.shape[0] // 2)).transpose(1, 2).flatten(1, 3)
    if "_?." in source:
        value = value.chunk(2)[half]
    if name.endswith(".gamma"):
        value = value.reshape(target.shape)
    if target.ndim == 5 and value.ndim == 4:
        inflated = torch.zeros_like(target)
        inflated[:, :, target.shape[2] // 2] = value
        return inflated
    return value.to(target.dtype)


def _tensor(image: Weights, source: str, name: str) -> Tensor:
    if source not in image:
        raise InflationError(
            f"The image VAE has no {source}, from which {name} is made; give the weights of an IVImageVAE of two "
            "halves (join_halves makes one of two image VAEs)."
        )
    return image[source]
