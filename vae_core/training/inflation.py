"""Inflation: a video VAE that reproduces an image VAE on still frames, before any training on video.

A 3-D kernel starts from the image VAE's 2-D kernel at one time tap, zeros elsewhere: the last tap where time is causal
(CV-VAE's encoder), the centre tap elsewhere. What has no counterpart in the image VAE starts so that still frames pass.
A frozen copy of the video VAE, run on single frames, then stands for the image VAE.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..door.loading import DEMO_WEIGHTS, load, official_state
from ..door.vae import VideoVAE
from ..errors import CheckpointError
from ..families import FAMILIES
from ..families.cv_vae import CV_VAE, CV_VAE_SD3, CVVAEConfig
from ..families.image_vae import IMAGE_VAE, OUR_EPS
from ..families.iv_vae import IV_VAE, IVVAEConfig
from ..weights.files import read_weights, strip_foreign
from .iv_image import InflationError, IVImageConfig, Weights, inflate_iv, join_halves

_DROPPED = 3  # directions of an attention's output that `_through_time` cannot pass
_HEADROOM = 256.0  # how far its constant pair stands above what it passes: the error is 1 / (2 * _HEADROOM)^2
_PAIR_LIMIT = 2.0**15  # of the pair, for float16
_MEASURED = 16  # side of the latents that the effect of folding is measured on
_REMEDY = "Give the VAE of Stable Diffusion 1.x, 2.x or 3 (a file or a diffusers folder), or an image VAE trained here."


@dataclass(frozen=True, kw_only=True)
class BorderEffect:
    """How far pictures of random latents are off: rms as a share of a picture's deviation.

    whole: over the whole frame; inside: without its outermost 8 pixels.
    """

    whole: float
    inside: float


@dataclass(frozen=True, kw_only=True)
class CVImageWeights:
    """An image VAE of the Stable Diffusion kind, without quant convolutions.

    tensors: in the spelling of Stable Diffusion's single files (`decoder.mid.attn_1.q.weight`), 2-D kernels. config: of
    the CV-VAE that it becomes. norm_eps: of its group norms. border: what folding the convolution before the decoder
    changed, None where nothing (see `read_image_vae`).
    """

    tensors: dict[str, Tensor]
    config: CVVAEConfig
    norm_eps: float
    border: BorderEffect | None


@dataclass(frozen=True, kw_only=True)
class IVImageWeights:
    """An `IVImageVAE` of one half or of two."""

    tensors: dict[str, Tensor]
    config: IVImageConfig


def read_image_vae(source: str | Path | Weights) -> CVImageWeights | IVImageWeights:
    """The image VAE of a file, a diffusers folder or a state dict; what it is follows from names and shapes.

    Read is what `load` takes for the family image-vae, "demo-image-vae" among it, and an `IVImageVAE`. The 1x1
    convolutions at the latent (`quant_conv`, `post_quant_conv`) are folded into their neighbours, in float64. Only one
    thing is not the same after that: at the border the decoder's first kernel meets zeros outside of the latent, where
    it met no bias before and now acts as if it had; norms and attention spread that over the frame. No kernel can hold
    it, so it is measured.
    Raises InflationError where it is something else, or incomplete; CheckpointError where the file cannot be read.
    """
    if isinstance(source, Mapping):
        origin, tensors = "The state dict", dict(source)
    else:
        origin, tensors = str(source), read_weights(DEMO_WEIGHTS.get(str(source), Path(source))).tensors
    tensors = strip_foreign(tensors)
    if "encoder_middle.1.to_qkv.0.weight" in tensors:
        floats = {name: tensor.float() for name, tensor in tensors.items()}
        return IVImageWeights(tensors=floats, config=_iv_config(floats, origin))
    try:
        vae = load(source)
    except CheckpointError as error:
        raise InflationError(f"{origin} holds no image VAE that can become a CV-VAE. {error} {_REMEDY}") from error
    config = vae.model.config
    if vae.model.family is not IMAGE_VAE:
        raise InflationError(
            f"{origin} holds no image VAE that can become a CV-VAE. It is a video VAE already ({vae.family}). {_REMEDY}"
        )
    if len(vae.model.halves) < 2:
        raise InflationError(
            f"{origin} can only {' and '.join(vae.model.halves)}, and both halves are needed. {_REMEDY}"
        )
    state = {name: tensor.float() for name, tensor in official_state(vae.model).items()}
    is_felt = _fold_quant(state)
    return CVImageWeights(
        border=_border_effect(vae, load(state)) if is_felt else None,
        tensors=state,
        config=CVVAEConfig(
            widths=config.widths,
            blocks_per_level=config.blocks_per_level,
            latent_channels=config.latent_channels,
            sd3=False,
        ),
        norm_eps=config.norm_eps,
    )


def _iv_config(tensors: Weights, origin: str) -> IVImageConfig:
    halves = 2 if "encoder_middle.1.to_qkv.1.weight" in tensors else 1
    try:
        dim, z = tensors["conv_in.weight"].shape[0] // halves, tensors["from_latent.weight"].shape[0]
    except KeyError as error:
        raise InflationError(f"{origin} looks like an IVImageVAE, but {error} is missing. {_REMEDY}") from error
    return IVImageConfig(dim=dim, latent_channels=z, halves=halves)


@torch.no_grad()
def _border_effect(before: VideoVAE, after: VideoVAE) -> BorderEffect:
    """The difference between what two image VAEs decode from the same random latents."""
    channels, scale = before.model.config.latent_channels, before.model.config.scale_factor
    latent = torch.randn(1, channels, 1, _MEASURED, _MEASURED, generator=torch.Generator().manual_seed(0)) / scale
    one, other = (vae.model.float().decode(latent)[0, :, 0] for vae in (before, after))
    error, edge = (one - other).square() / one.var(), 8
    return BorderEffect(whole=float(error.mean().sqrt()), inside=float(error[:, edge:-edge, edge:-edge].mean().sqrt()))


def _fold_quant(tensors: dict[str, Tensor]) -> bool:
    """Fold the 1x1 convolutions at the latent, in place; whether there is a bias that the border feels."""
    if "quant_conv.weight" in tensors:
        outer, bias = tensors.pop("quant_conv.weight").double().flatten(1), tensors.pop("quant_conv.bias").double()
        _change(tensors, "encoder.conv_out.weight", lambda w: torch.einsum("om,mihw->oihw", outer, w))
        _change(tensors, "encoder.conv_out.bias", lambda b: outer @ b + bias)
    if "post_quant_conv.weight" not in tensors:
        return False
    inner, bias = (
        tensors.pop("post_quant_conv.weight").double().flatten(1),
        tensors.pop("post_quant_conv.bias").double(),
    )
    felt = torch.einsum("omhw,m->o", tensors["decoder.conv_in.weight"].double(), bias)
    _change(tensors, "decoder.conv_in.bias", lambda b: b + felt)
    _change(tensors, "decoder.conv_in.weight", lambda w: torch.einsum("omhw,mi->oihw", w, inner))
    return bool(felt.abs().max() > 0)


def _change(tensors: dict[str, Tensor], name: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors[name] = change(tensors[name].double()).float()


# ------------------------------------------------------------------------------------------------------- making


@dataclass(frozen=True, kw_only=True)
class Inflated:
    """A video VAE made of one or two image VAEs, and in which ways it is not quite the same on still frames."""

    vae: VideoVAE
    notes: tuple[str, ...]


def inflate(sources: Sequence[str | Path | Weights], family: str | None = None) -> Inflated:
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
        chosen = FAMILIES.get(family or "")
        if len(cv) == 1 and not iv and chosen in (None, CV_VAE, CV_VAE_SD3):
            return _inflated_cv(cv[0], sd3=chosen is CV_VAE_SD3)
        if iv and not cv and chosen in (None, IV_VAE):
            return _inflated_iv(iv)
    kinds = ", ".join("of the Stable Diffusion kind" if isinstance(image, CVImageWeights) else "an IVImageVAE"
                      for image in images)  # fmt: skip
    raise InflationError(
        f"Got {len(images)} image VAE(s) ({kinds or 'none'}) for {family or 'a video VAE'}. A CV-VAE (cv-vae, "
        "cv-vae-sd3) is made of one of the Stable Diffusion kind; an IV-VAE of one or two IVImageVAEs."
    )


def _inflated_cv(image: CVImageWeights, *, sd3: bool) -> Inflated:
    notes: list[str] = []
    if image.border is not None:
        notes.append(
            "The image VAE has a convolution before its decoder whose bias is now felt at the border too, and norms "
            f"and attention spread that: at first a picture of {8 * _MEASURED} x {8 * _MEASURED} differs by "
            f"{100 * image.border.whole:.2g}% of its deviation (rms; {100 * image.border.inside:.2g}% without the "
            "outermost 8 pixels). Training takes it away."
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
    family = CV_VAE_SD3 if config.sd3 else CV_VAE
    model = family.network(config)
    state = official_state(model)
    # an image VAE's names are those of cv-vae
    names = {theirs: CV_VAE.official(config, ours, ())[0] for ours, (theirs, _) in family.key_map(model).items()}
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
    depends on anything else, and their gain after the norm is zero; the other channels then pass the norm as they are,
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
        "proj_out.bias": constant - into @ w_o @ b_v,  # the constant part comes after the norm
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
