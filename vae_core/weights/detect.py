"""What a state dict that is of none of our families seems to be, by names and shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

Shapes = Mapping[str, tuple[int, ...]]

_SD15 = "Give the CV-VAE file made for the same latents (family cv-vae, z 4)."
_SD3 = "Give the CV-VAE file made for SD3 latents (family cv-vae-sd3, z 16)."
_OTHER_VIDEO = (
    "Its latents differ from ours: load it with the nodes of its own model, or give CV-VAE or IV-VAE weights."
)
_NOT_A_VAE = "Give the VAE's own file: CV-VAE or IV-VAE weights."
_WHOLE = "Give the complete file."
_IMAGES = "single images, no time axis), incomplete or of another build"
_SD15_IMAGES = _SD15.replace("Give", "Give the complete file, or")
_SD3_IMAGES = _SD3.replace("Give", "Give the complete file, or")


class _Kind(NamedTuple):
    what: str
    is_it: Callable[[Shapes], bool]
    remedy: str


def describe_foreign(shapes: Shapes) -> str:
    """What a state dict that is none of ours seems to be and what would be right, as two sentences.

    shapes: shape of every tensor by its name. A kind is recognized under any prefix.
    """
    if not shapes:
        return f"It is empty, or holds only parts of a training (loss, discriminator, averages). {_NOT_A_VAE}"
    for kind in _KINDS:
        if kind.is_it(shapes):
            return f"It seems to be {kind.what}. {kind.remedy}"
    names = sorted(shapes)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    first = ", ".join(repr(name[:80]) for name in names[:3])
    return f"It is of no kind known here; its tensors are {first}{more}. {_NOT_A_VAE}"


def _has(*patterns: str, rank: int | None = None, size: tuple[int, int] | None = None) -> Callable[[Shapes], bool]:
    """A predicate: every pattern is found in some name (from the start of a name part), in a tensor with `rank` axes
    and, for size = (axis, n), with n entries along that axis."""
    compiled = [re.compile(rf"(?:^|\.)(?:{pattern})") for pattern in patterns]

    def is_it(shapes: Shapes) -> bool:
        def fits(shape: tuple[int, ...]) -> bool:
            return (rank is None or len(shape) == rank) and (
                size is None or (len(shape) > size[0] and shape[size[0]] == size[1])
            )

        return all(any(p.search(name) and fits(shape) for name, shape in shapes.items()) for p in compiled)

    return is_it


def _either(*predicates: Callable[[Shapes], bool]) -> Callable[[Shapes], bool]:
    return lambda shapes: any(predicate(shapes) for predicate in predicates)


def _is_half_3d(half: str) -> Callable[[Shapes], bool]:
    """A residual block as only CV-VAE has it, 3-D `conv1` and per-frame `conv2`, or a layer that only IV-VAE has."""
    conv1 = re.compile(rf"(?:^|\.){half}\.(?:\w+\.)*conv1\.weight$")
    iv = _has(rf"{half}\.(\w+\.)*(conv_3d|PAC_\d+\.conv|Attention_3d\.proj)\.weight$")

    def is_it(shapes: Shapes) -> bool:
        blocks = [name for name, shape in shapes.items() if len(shape) == 5 and conv1.search(name)]
        return iv(shapes) or any(len(shapes.get(name.replace("conv1.", "conv2."), ())) == 4 for name in blocks)

    return is_it


def _is_only(half: str) -> Callable[[Shapes], bool]:
    """One half of one of our models, without the other."""
    ours, other = _is_half_3d(half), _has(rf"{'decoder' if half == 'encoder' else 'encoder'}\.")
    return lambda shapes: ours(shapes) and not other(shapes)


def _is_full_checkpoint(shapes: Shapes) -> bool:
    starts = ("first_stage_model.", "vae.", "decoder.", "encoder.")
    return _DIFFUSION_MODEL(shapes) and any(name.startswith(starts) for name in shapes)


def _is_discriminator(shapes: Shapes) -> bool:
    layers = any(re.fullmatch(r"main\.\d+\.weight", name) and len(shape) in (4, 5) for name, shape in shapes.items())
    return layers or _has(r"disc(riminator)?\w*\.")(shapes)


_DIFFUSION_MODEL = _has(
    r"diffusion_model\.|(input|output)_blocks\.0\.0\.|(down|up)_blocks\.\d\.attentions\.\d\.transformer_blocks\.|"
    r"(double|single|joint)_blocks\.0\.|(single_)?transformer_blocks\.0\.|head\.modulation$|time_embedding\.linear_1\.|"
    r"blocks\.0\.(cross_attn|self_attn|adaLN_modulation)\."
)
_WAN_22_DIFFUSERS = (
    _has(r"decoder\.mid_block\.resnets\.0\.norm1\.gamma$"),
    _has(r"decoder\.conv_in\.weight$", rank=5, size=(1, 48)),
)

# In order: the most telling comes first, since a full checkpoint has a VAE and a text encoder too.
_KINDS: tuple[_Kind, ...] = (
    _Kind(
        "a LoRA (a small change to a diffusion model)",
        _has(r"(lora_up|lora_down|lora_[ABab]|hada_w1_a|lokr_w1)\b|lora\.(up|down)\."),
        _NOT_A_VAE,
    ),
    _Kind(
        "a ControlNet or T2I adapter",
        _has(r"control_model\.|controlnet_\w+\.|zero_convs\.0\.|input_hint_block\.|adapter\.(body|conv_in)\."),
        _NOT_A_VAE,
    ),
    _Kind(
        "a full diffusion checkpoint (diffusion model, VAE and perhaps text encoder), with another VAE than ours",
        _is_full_checkpoint,
        _NOT_A_VAE,
    ),
    _Kind("a diffusion model (the part that a sampler runs), not a VAE", _DIFFUSION_MODEL, _NOT_A_VAE),
    _Kind(
        "the SVD VAE with its temporal decoder (latents not compressed in time)",
        _has(r"decoder\.(.*\.)?(mix_factor$|time_stack\.|time_mix_conv\.|temporal_res_block\.|time_conv_out\.)"),
        _SD15,
    ),
    _Kind(
        "a TAESD tiny VAE (made for previews)",
        _has(r"taesd_(en|de)coder\.|(en|de)coder\.layers\.\d+\.conv\.0\.|\d+\.conv\.0\.weight$", rank=4),
        _SD15,
    ),
    _Kind("an incomplete file, only the decoder of one of our VAEs", _is_only("decoder"), _WHOLE),
    _Kind("an incomplete file, only the encoder of one of our VAEs", _is_only("encoder"), _WHOLE),
    _Kind("an incomplete CV-VAE or IV-VAE file", _is_half_3d("(en|de)coder"), "Get it again."),
    _Kind(
        "a Wan 2.2 VAE (48 channels)",
        _either(
            _has(r"decoder\.upsamples\.\d\.upsamples\.\d\."), lambda shapes: all(p(shapes) for p in _WAN_22_DIFFUSERS)
        ),
        _OTHER_VIDEO,
    ),
    _Kind(
        "a Wan 2.1 VAE (Qwen-Image uses the same)",
        _either(
            _has(r"(en|de)coder\.middle\.0\.residual\.0\.gamma$"),
            _has(r"(en|de)coder\.mid_block\.resnets\.0\.norm1\.gamma$", rank=4),
        ),
        "IV-VAE has names like it but other layers: give an IV-VAE file, or load this one as Wan's VAE.",
    ),
    _Kind("a CogVideoX VAE", _has(r"decoder\.(.*\.)?norm1\.conv_y\.conv\."), _OTHER_VIDEO),
    _Kind(
        "an LTX-Video VAE",
        _either(
            _has(r"decoder\.up_blocks\.0\.res_blocks\.|per_channel_statistics\."),
            _has(r"decoder\.conv_in\.conv\.weight$", rank=5, size=(1, 128)),
        ),
        _OTHER_VIDEO,
    ),
    _Kind("a Cosmos tokenizer", _has(r"decoder\.unpatcher(3d)?\."), _OTHER_VIDEO),
    _Kind(
        "a Mochi VAE", _has(r"blocks\.2\.blocks\.3\.stack\.5\.weight$|layers\.4\.layers\.1\.attn_block\."), _OTHER_VIDEO
    ),
    _Kind(
        "a HunyuanVideo VAE or one of its relatives",
        _has(r"(en|de)coder\.conv_in\.conv\.weight$", rank=5),
        _OTHER_VIDEO,
    ),
    _Kind("a video VAE of another model", _has(r"(en|de)coder\.(conv_in|conv1)\.weight$", rank=5), _OTHER_VIDEO),
    _Kind(
        f"a 2-D SD3 or Flux VAE (16 channels, {_IMAGES}",
        _has(r"decoder\.conv_in\.weight$", rank=4, size=(1, 16)),
        _SD3_IMAGES,
    ),
    _Kind(
        f"a 2-D Flux.2 VAE (32 channels, {_IMAGES}",
        _has(r"decoder\.conv_in\.weight$", rank=4, size=(1, 32)),
        "No CV-VAE was made for its latents: give the complete file, or CV-VAE or IV-VAE weights.",
    ),
    _Kind(f"a 2-D Stable Diffusion VAE ({_IMAGES}", _has(r"(en|de)coder\.conv_in\.weight$", rank=4), _SD15_IMAGES),
    _Kind(
        "a text or image encoder (CLIP, T5, a language model)",
        _has(
            r"text_model\.|transformer\.resblocks\.|encoder\.block\.0\.layer\.0\.|vision_model\.|visual\.|"
            r"layers\.0\.self_attn\.|cond_stage_model\.|conditioner\."
        ),
        _NOT_A_VAE,
    ),
    _Kind("an upscaler (ESRGAN)", _has(r"model\.1\.sub\.|RRDB_trunk\.|body\.\d+\.rdb1\."), _NOT_A_VAE),
    _Kind("a textual inversion embedding", _has(r"emb_params$|clip_[lg]$|string_to_param|\*$"), _NOT_A_VAE),
    _Kind("a latent, not weights", _has(r"latent_tensor$|latent_tbchw$"), _NOT_A_VAE),
    _Kind("the discriminator of a VAE's training", _is_discriminator, _NOT_A_VAE),
)
