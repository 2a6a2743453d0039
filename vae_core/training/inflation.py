"""Inflation: a video VAE that reproduces an image VAE on still frames, before any training on video.

A 3-D kernel starts from the image VAE's 2-D kernel at one time tap, zeros elsewhere: the last tap where time is causal
(CV-VAE's encoder), the centre tap elsewhere. What has no counterpart in the image VAE starts so that still frames pass.
A frozen copy of the video VAE, run on single frames, then stands for the image VAE.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..cv_vae import CVVAE, CVVAEConfig
from ..door.checkpoints import load, official_state
from ..door.codec import VideoVAE
from ..iv_vae import IVVAE, IVVAEConfig
from ..keys import key_map, official
from ..weights.detect import Family
from .image_weights import OUR_EPS, CVImageWeights, InflationError, IVImageWeights, Weights, read_image_vae

_DROPPED = 3  # directions of an attention's output that `_through_time` cannot pass
_HEADROOM = 256.0  # how far its constant pair stands above what it passes: the error is 1 / (2 * _HEADROOM)^2
_PAIR_LIMIT = 2.0**15  # of the pair, for float16


@dataclass(frozen=True, kw_only=True)
class Inflated:
    """A video VAE made of one or two image VAEs, and in which ways it is not quite the same on still frames."""

    vae: VideoVAE
    notes: tuple[str, ...]


def inflate(sources: Sequence[str | Path | Weights], family: Family | None = None) -> Inflated:
    """The video VAE of one image VAE, or, for IV-VAE, of one or of two of z/2 channels.

    sources: files, folders or state dicts, see `read_image_vae`. family: None is `cv-vae` for the Stable Diffusion
    kind and `iv-vae` for `IVImageVAE`. What the image VAE has no weights for is drawn, always the same.
    Raises InflationError where sources and family do not go together; CheckpointError where a file cannot be read.
    """
    images = [read_image_vae(source) for source in sources]
    cv = [image for image in images if isinstance(image, CVImageWeights)]
    iv = [image for image in images if isinstance(image, IVImageWeights)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if len(cv) == 1 and not iv and family != "iv-vae":
            return _inflated_cv(cv[0], sd3=family == "cv-vae-sd3")
        if iv and not cv and family in (None, "iv-vae"):
            return _inflated_iv(iv)
    kinds = ", ".join("of the Stable Diffusion kind" if isinstance(image, CVImageWeights) else "an IVImageVAE"
                      for image in images)  # fmt: skip
    raise InflationError(
        f"Got {len(images)} image VAE(s) ({kinds or 'none'}) for {family or 'a video VAE'}. A CV-VAE (cv-vae, "
        "cv-vae-sd3) is made of one of the Stable Diffusion kind; an IV-VAE of one or two IVImageVAEs."
    )


def _inflated_cv(image: CVImageWeights, *, sd3: bool) -> Inflated:
    notes: list[str] = []
    if image.border_bias:
        notes.append(
            f"The image VAE has a convolution before its decoder whose bias is now felt at the border too (up to "
            f"{image.border_bias:.3g} in the first layer): the outermost 8 pixels differ at first."
        )
    if sd3:
        notes.append(
            "cv-vae-sd3 pads borders otherwise and halves pictures around other pixels than the image VAE, so still "
            "frames are near to those of the image VAE and not the same; --family cv-vae reproduces it."
        )
    elif "decoder.mid.attn_1.proj_out.weight" in image.tensors:
        strengths = torch.linalg.svdvals(_attention_map(image.tensors)).square()
        share = math.sqrt(float(strengths[-_DROPPED:].sum() / strengths.sum()))
        notes.append(
            f"The decoder's attention over space goes through the layer norm of the one over time, all but {_DROPPED} "
            f"of its {len(strengths)} directions, which hold {share:.1e} of its strength."
        )
    config = replace(image.config, sd3=sd3)
    return Inflated(vae=load(inflate_cv(image.tensors, config, norm_eps=image.norm_eps)), notes=tuple(notes))


def _inflated_iv(images: Sequence[IVImageWeights]) -> Inflated:
    halves = [image.config.halves for image in images]
    if sum(halves) > 2 or (len(halves) == 2 and halves != [1, 1]):
        raise InflationError(
            f"Got {len(images)} IVImageVAEs of {' and '.join(map(str, halves))} halves: an IV-VAE is made of two of "
            "one half, of one of one half twice, or of one of two halves."
        )
    first, last = images[0].tensors, images[-1].tensors
    joined = first if halves == [2] else join_halves(first, last)
    channels = images[0].config.latent_channels * 2 // halves[0]
    config = IVVAEConfig(dim=images[0].config.dim, latent_channels=channels, scale_factor=1.0, shift_factor=0.0)
    notes = ("One image VAE became both halves; they part in training.",) if halves == [1] else ()
    return Inflated(vae=load(inflate_iv(joined, config), scale_factor=1.0, shift_factor=0.0), notes=notes)


# ---------------------------------------------------------------------------------------------------------- CV-VAE


def inflate_cv(image: Weights, config: CVVAEConfig, *, norm_eps: float = OUR_EPS) -> dict[str, Tensor]:
    """Official weights of a CV-VAE from those of an image VAE in the Stable Diffusion layout (same names, 2-D kernels).

    Upsampling convolutions that double time repeat the 2-D kernel for both parts. norm_eps: of the image VAE's group
    norms; where the video VAE has another one, everything that a norm will see is scaled so that it makes no
    difference. The decoder's attention over space goes on into one over time, which is made to pass it on (see
    `_through_time`); where the image VAE has no attention there, that path starts silent.
    What else the image VAE does not have keeps the model's own initialisation (torch's global seed). For `cv-vae-sd3`,
    whose layers halve the picture around other pixels, their kernels are moved as far as they go.
    Raises InflationError when a tensor is missing or does not fit.
    """
    model = CVVAE(config)
    state = official_state(model)
    # an image VAE's names are those of cv-vae
    names = {theirs: official(ours, shape, "cv-vae")[0] for ours, (theirs, shape) in _own_names(model).items()}
    scale = math.sqrt(config.norm_eps / norm_eps)
    attention = "decoder.mid.attn_1.proj_out.weight" in image
    for name, target in state.items():
        source = names[name]
        if source in image:
            value = _moved(image[source], source) if config.sd3 else image[source]
            if _is_seen_by_a_norm(source):
                value = value * scale
            state[name] = _spread_over_time(value, target, source)
        elif not source.startswith("decoder.mid.attn_1.") or (attention and not re.search(r"_t\.\w+$", source)):
            raise InflationError(
                f"The image VAE has no {source}; give the weights of an image VAE in the Stable Diffusion layout with "
                f"the widths {config.widths} and {config.blocks_per_level} block(s) per level."
            )
        elif source.startswith("decoder.mid.attn_1.proj_out." if config.sd3 else "decoder.mid.attn_1.proj_out_t."):
            state[name] = torch.zeros_like(target)
    if attention and not config.sd3:
        state |= _through_time(image, config, scale)
    return state


def _own_names(model: CVVAE) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our name -> official name, our shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return {ours: (theirs, shapes[ours]) for ours, (theirs, _) in key_map(model).items()}


def _is_seen_by_a_norm(name: str) -> bool:
    """Whether what this tensor adds goes on into a group norm (and not only what it passes on, as a shortcut does)."""
    if re.search(r"\.(conv1|conv2|conv_in|proj_out)\.\w+$", name):
        return True
    return bool(re.search(r"\.(nin_shortcut|downsample\.conv|upsample\.conv)\.bias$", name))


def _moved(kernel: Tensor, name: str) -> Tensor:
    """A kernel that halves: it saw pixels 0, 1, 2 of each pair and the next one, and will see -1, 0, 1."""
    if not name.endswith(".downsample.conv.weight"):
        return kernel
    for dim in (-2, -1):
        first, second, third = kernel.unbind(dim)
        kernel = torch.stack((torch.zeros_like(first), first, second + third), dim)
    return kernel


def _through_time(image: Weights, config: CVVAEConfig, scale: float) -> dict[str, Tensor]:
    """The decoder's attention over space and over time, so that still frames get what the image VAE's attention gives.

    Over still frames attention over time passes its values on. The layer norm before it does not: it divides by the
    deviation over channels. So two channels are given a constant pair (+a, -a), so large that the deviation hardly
    depends on anything else, and their gain behind the norm is zero; the other channels then pass the norm as they are,
    but for their mean. That leaves three directions fewer than there are channels: the attention's output goes without
    the three that it has least in. What remains is an error of at most 1 / (2 * _HEADROOM)^2 of it, and those three.
    """
    at = "decoder.mid.attn_1."
    width = config.widths[-1]
    w_o = image[f"{at}proj_out.weight"].double().flatten(1)
    b_v, b_o = (image[f"{at}{name}.bias"].double() for name in ("v", "proj_out"))
    gain, offset = (image[f"{at}norm.{name}"].double() for name in ("weight", "bias"))
    whole = _attention_map(image)
    kept = torch.linalg.svd(whole)[0][:, : width - _DROPPED]  # orthonormal; the least come last
    ways = _zero_mean_directions(width - 2, width - _DROPPED)
    expected = math.sqrt(float((whole * gain).square().sum() + (whole @ offset).square().sum()))
    pair = min(2.0 ** math.ceil(math.log2(max(_HEADROOM * expected, 1.0))), _PAIR_LIMIT)
    into = torch.cat((torch.zeros(2, width, dtype=torch.float64), ways @ kept.T))
    constant = torch.zeros(width, dtype=torch.float64)
    constant[0], constant[1] = pair, -pair
    gamma = torch.full((width,), math.sqrt(2 * pair**2 / width + config.norm_eps), dtype=torch.float64)
    gamma[:2] = 0
    tensors = {
        "proj_out.weight": into @ w_o,
        "proj_out.bias": constant - into @ w_o @ b_v,  # the constant part comes behind the norm
        "norm_t.weight": gamma,
        "norm_t.bias": torch.zeros(width),
        "v_t.weight": torch.eye(width),
        "v_t.bias": torch.zeros(width),
        "proj_out_t.weight": scale * into.T,
        "proj_out_t.bias": scale * (w_o @ b_v + b_o),
    }
    tensors["proj_out.weight"] = tensors["proj_out.weight"][..., None, None]
    return {at + name: tensor.float() for name, tensor in tensors.items()}


def _attention_map(image: Weights) -> Tensor:
    """What the decoder's attention makes of the values it has mixed: (channels, channels), float64."""
    w_v, w_o = (image[f"decoder.mid.attn_1.{name}.weight"].double().flatten(1) for name in ("v", "proj_out"))
    return w_o @ w_v


def _zero_mean_directions(size: int, count: int) -> Tensor:
    """(size, count) orthonormal columns, each with a mean of zero; count is at most size - 1."""
    plane = torch.eye(size, dtype=torch.float64) - 1 / size
    return torch.linalg.qr(plane[:, :count])[0]


def _spread_over_time(source: Tensor, target: Tensor, name: str) -> Tensor:
    """`source` in the shape of `target`: repeated over parts, then put at one time tap."""
    parts = target.shape[0] // source.shape[0] if ".upsample." in name else 1
    repeated = source.repeat(parts, *(1,) * (source.ndim - 1))
    is_linear = repeated.shape[:2] == target.shape[:2] and repeated.numel() == target.numel()
    if repeated.shape == target.shape or (is_linear and repeated.ndim != target.ndim):  # 1x1 kernels
        return repeated.reshape(target.shape).to(target.dtype)
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
