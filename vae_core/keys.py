"""Official tensor names and shapes, as functions of ours, and the config that a set of official shapes implies."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .cv_vae import CVVAE, LEVELS, CVVAEConfig
from .errors import CheckpointError
from .iv_layers import PUBLISHED, IVParts
from .iv_vae import IVVAE, IVVAEConfig
from .weights.detect import Family

Shape = tuple[int, ...]
Config = CVVAEConfig | IVVAEConfig
Model = CVVAE | IVVAE

# (our spelling, official spelling), applied one after another
_RULES: dict[Family, tuple[tuple[str, str], ...]] = {
    "cv-vae": (
        (r"^encoder\.levels\.(\d)\.block_(\d+)\.", r"encoder.down.\1.block.\2."),
        (r"^encoder\.levels\.(\d)\.down\.", r"encoder.down.\1.downsample.conv."),
        (r"^decoder\.levels\.(\d)\.block_(\d+)\.", r"decoder.up.\1.block.\2."),
        (r"^decoder\.levels\.(\d)\.up\.", r"decoder.up.\1.upsample."),
        (r"\.middle\.0\.", r".mid.block_1."),
        (r"\.middle\.2\.", r".mid.block_2."),
        (r"\.middle\.1\.temporal\.(\w+)\.", r".mid.attn_1.\1_t."),
        (r"\.middle\.1\.", r".mid.attn_1."),
        (r"\.shortcut\.", r".nin_shortcut."),
    ),
    "cv-vae-sd3": (
        (r"^encoder\.levels\.(\d)\.block_(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
        (r"^encoder\.levels\.(\d)\.down\.", r"encoder.down_blocks.\1.downsamplers.0.conv."),
        (r"^decoder\.levels\.(\d)\.block_(\d+)\.", r"decoder.up_blocks.\1.resnets.\2."),
        (r"^decoder\.levels\.(\d)\.up\.", r"decoder.up_blocks.\1.upsamplers.0."),
        (r"\.middle\.0\.", r".mid_block.resnets.0."),
        (r"\.middle\.2\.", r".mid_block.resnets.1."),
        (r"\.middle\.1\.norm\.", r".mid_block.attentions.0.group_norm."),
        (r"\.middle\.1\.proj_out\.", r".mid_block.attentions.0.to_out.0."),
        (r"\.middle\.1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
        (r"\.shortcut\.", r".conv_shortcut."),
        (r"\.norm_out\.", r".conv_norm_out."),
    ),
    "iv-vae": (
        (r"^encoder\.conv_in\.", r"encoder.conv1."),
        (r"^decoder\.conv_in\.", r"decoder.conv1.conv."),
        (r"^(en|de)coder\.norm_out\.", r"\1coder.head.0."),
        (r"^encoder\.pac\.branches\.0\.", r"encoder.head.2.PAC_0.conv."),
        (r"^encoder\.pac\.branches\.1\.", r"encoder.head.2.PAC_1.conv."),
        (r"^encoder\.pac\.branches\.2\.", r"encoder.head.2.PAC_3.conv."),
        (r"^encoder\.pac\.branches\.3\.", r"encoder.head.2.PAC_6.conv."),
        (r"^encoder\.pac\.branches\.4\.", r"encoder.head.2.PAC_9.conv."),
        (r"^encoder\.pac\.branches\.5\.", r"encoder.head.2.PAC_12.conv."),
        (r"^encoder\.pac\.merge\.", r"encoder.head.2.PAC_conv.conv."),
        (r"^encoder\.pac\.(\w+)$", r"encoder.head.2.conv.\1"),  # without motion perception
        (r"^decoder\.conv_out\.", r"decoder.head.2."),
        (r"\.stages\.(\d+)\.conv_(2|3)d\.", r".stages.\1.resample_\2d.1."),
        (r"\.attention_(2|3)d\.", r".Attention_\1d."),
        (r"\.norm1\.", r".residual.0."),
        (r"\.conv1\.(conv|conv_2d|conv_3d)\.", r".residual.2.\1."),
        (r"\.norm2\.", r".residual.3."),
        (r"\.conv2\.(conv|conv_2d|conv_3d)\.", r".residual.6.\1."),
        (r"^encoder\.stages\.", r"encoder.downsamples."),
        (r"^decoder\.stages\.", r"decoder.upsamples."),
        (r"^to_moments\.", r"conv1."),
        (r"^from_latent\.", r"conv2."),
    ),
}


def family_of_config(config: Config) -> Family:
    """The family whose names the weights of `config` carry."""
    if isinstance(config, IVVAEConfig):
        return "iv-vae"
    return "cv-vae-sd3" if config.sd3 else "cv-vae"


def build(config: Config) -> Model:
    """The model of `config` on the current default device, with freshly drawn weights."""
    return IVVAE(config) if isinstance(config, IVVAEConfig) else CVVAE(config)


def official(name: str, shape: Shape, family: Family) -> tuple[str, Shape]:
    """Official name and shape of our tensor `name` of `shape`."""
    is_input = name.startswith(("encoder.conv_in.", "decoder.conv_in."))
    for ours, theirs in _RULES[family]:
        if is_input and ours.startswith(r"\.conv"):
            continue  # `encoder.conv1.conv_2d` is a name of its own, not the first convolution of a block
        name = re.sub(ours, theirs, name)
    if family == "cv-vae":
        name = re.sub(r"^decoder\.up\.(\d)\.", lambda m: f"decoder.up.{LEVELS - 1 - int(m[1])}.", name)
        if re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", name):
            shape = (*shape, 1, 1)
    if family == "cv-vae-sd3" and name.endswith(".conv_shortcut.weight"):
        shape = shape[:-1]
    return name, shape


def key_map(model: Model) -> dict[str, tuple[str, Shape]]:
    """Our name of every tensor of `model`, with its official name and shape."""
    family = family_of_config(model.config)
    return {name: official(name, tuple(t.shape), family) for name, t in model.state_dict().items()}


def infer_config(
    shapes: Mapping[str, Shape], family: Family, *, scale_factor: float | None, shift_factor: float | None
) -> Config:
    """The config that a state dict of official names and `shapes` belongs to.

    scale_factor, shift_factor: for `iv-vae`, where the weights do not hold them; None takes the published numbers of
    this width, or 1 and 0 where none were published.
    Raises CheckpointError when a tensor that the config is read from is missing.
    """
    try:
        if family == "iv-vae":
            parts = _infer_parts(shapes)
            dim = shapes["decoder.conv1.conv.weight"][0] // 8
            z = shapes["decoder.conv1.conv.weight"][1]
            published = default_scaling(z, dim, parts)
            return IVVAEConfig(
                dim=dim,
                latent_channels=z,
                scale_factor=published[0] if scale_factor is None else scale_factor,
                shift_factor=published[1] if shift_factor is None else shift_factor,
                parts=parts,
            )
        level, block = ("down_blocks", "resnets") if family == "cv-vae-sd3" else ("down", "block")
        blocks = 0
        while f"encoder.{level}.0.{block}.{blocks}.conv1.weight" in shapes:
            blocks += 1
        return CVVAEConfig(
            widths=tuple(shapes[f"encoder.{level}.{i}.{block}.0.conv1.weight"][0] for i in range(LEVELS)),
            blocks_per_level=blocks,
            latent_channels=shapes["decoder.conv_in.weight"][1],
            sd3=family == "cv-vae-sd3",
        )
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"These look like {family} weights, but {error} is missing or has too few dimensions, so the widths cannot "
            "be read. The file is incomplete or was altered: download it again."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"These look like {family} weights, but their widths are impossible: {error}") from error


def default_scaling(latent_channels: int, dim: int, parts: IVParts) -> tuple[float, float]:
    """(scale_factor, shift_factor) of an IV-VAE whose file says neither: the published numbers, or 1 and 0."""
    return PUBLISHED_SCALING.get((latent_channels, dim), (1.0, 0.0)) if parts == PUBLISHED else (1.0, 0.0)


def _infer_parts(shapes: Mapping[str, Shape]) -> IVParts:
    """Which parts an IV-VAE has, by the names of its first and last convolutions."""
    return IVParts(
        temporal_conv="causal" if "encoder.conv1.conv_3d.causal.weight" in shapes else "grouped-causal",
        branches=2 if "encoder.conv1.conv_2d.weight" in shapes else 1,
        motion_perception="encoder.head.2.conv.weight" not in shapes,
    )


# (latent channels, dim) of the published IV-VAE files: (scale_factor, shift_factor)
PUBLISHED_SCALING: dict[tuple[int, int], tuple[float, float]] = {
    (4, 64): (1.3196, 0.1250),
    (8, 64): (1.0940, -0.0322),
    (16, 64): (0.9697, -0.1553),
    (16, 96): (0.7619, -0.0483),
}
