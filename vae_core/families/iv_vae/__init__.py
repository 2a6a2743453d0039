"""IV-VAE: the family `iv-vae`, with a latent space of its own."""

from __future__ import annotations

from collections.abc import Mapping

from ..family import Compression, Family, Rules, Shapes, Windows, substituted
from .layers import DILATIONS, PUBLISHED, IVParts, TemporalConv
from .network import IVVAE, IVVAEConfig

__all__ = ["IVVAE", "IV_VAE", "PUBLISHED", "IVParts", "IVVAEConfig", "TemporalConv"]

# (latent channels, dim) of the published files: (scale_factor, shift_factor)
PUBLISHED_SCALING: dict[tuple[int, int], tuple[float, float]] = {
    (4, 64): (1.3196, 0.1250),
    (8, 64): (1.0940, -0.0322),
    (16, 64): (0.9697, -0.1553),
    (16, 96): (0.7619, -0.0483),
}
_NAMES: Rules = (
    (r"\.norm1\.", r".residual.0."),
    (r"\.conv1\.(conv_2d|conv_3d)\.", r".residual.2.\1."),
    (r"\.conv1\.(weight|bias)$", r".residual.2.conv.\1"),  # the purely 2-D stages
    (r"\.norm2\.", r".residual.3."),
    (r"\.conv2\.(conv_2d|conv_3d)\.", r".residual.6.\1."),
    (r"\.conv2\.(weight|bias)$", r".residual.6.conv.\1"),
    (r"\.stages\.(\d+)\.conv_(2|3)d\.", r".stages.\1.resample_\2d.1."),
    (r"\.attention_(2|3)d\.", r".Attention_\1d."),
    (r"^encoder\.conv_in\.", r"encoder.conv1."),
    (r"^decoder\.conv_in\.", r"decoder.conv1.conv."),
    (r"^(en|de)coder\.norm_out\.", r"\1coder.head.0."),
    (r"^encoder\.pac\.branches\.(\d)\.", lambda m: f"encoder.head.2.PAC_{(0, 1, *DILATIONS)[int(m[1])]}.conv."),
    (r"^encoder\.pac\.merge\.", r"encoder.head.2.PAC_conv.conv."),
    (r"^encoder\.pac\.(\w+)$", r"encoder.head.2.conv.\1"),  # without motion perception
    (r"^decoder\.conv_out\.", r"decoder.head.2."),
    (r"^encoder\.stages\.", r"encoder.downsamples."),
    (r"^decoder\.stages\.", r"decoder.upsamples."),
    (r"^to_moments\.", r"conv1."),
    (r"^from_latent\.", r"conv2."),
)


def _official(config: IVVAEConfig, name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    return substituted(name, _NAMES), shape


def _configure(shapes: Shapes, told: Mapping[str, float]) -> IVVAEConfig:
    parts = _parts(shapes)
    if "decoder.conv1.conv.weight" in shapes:
        width, z = shapes["decoder.conv1.conv.weight"][:2]
        dim = width // 8
    else:
        dim = shapes["encoder.head.0.gamma"][0] // 8
        z = shapes["conv1.conv_3d.weight"][0] * parts.branches // 2
    unscaled = 1.0, 0.0
    scale, shift = PUBLISHED_SCALING.get((z, dim), unscaled) if parts == PUBLISHED else unscaled
    return IVVAEConfig(
        dim=dim,
        latent_channels=z,
        scale_factor=told.get("scale_factor", scale),
        shift_factor=told.get("shift_factor", shift),
        parts=parts,
    )


def _parts(shapes: Shapes) -> IVParts:
    """Which parts the network has, by the names of the halves that are there."""
    causal = any(name.endswith(".residual.2.conv_3d.causal.weight") for name in shapes)
    two = any(".Attention_2d." in name for name in shapes)
    if "decoder.conv1.conv.weight" in shapes:
        motion = "decoder.upsamples.1.Attention_3d.proj.weight" in shapes
    else:
        motion = "encoder.head.2.conv.weight" not in shapes
    return IVParts(
        temporal_conv="causal" if causal else "grouped-causal", branches=2 if two else 1, motion_perception=motion
    )


def _told(config: IVVAEConfig) -> dict[str, float]:
    return {"scale_factor": config.scale_factor, "shift_factor": config.shift_factor}


_MIDDLE = "{half}.middle.1.Attention_3d.to_qkv.weight"
IV_VAE = Family(
    id="iv-vae",
    compression=Compression(time=4, space=8),
    frames=Windows(first=1, step=4, overlap=0),
    latents=Windows(first=1, step=1, overlap=0),
    tell_tales={
        "encode": (
            {"encoder.conv1.conv_3d.weight": 5, _MIDDLE.format(half="encoder"): 4},
            {"encoder.conv1.conv_3d.causal.weight": 5, _MIDDLE.format(half="encoder"): 4},
        ),
        "decode": ({"decoder.conv1.conv.weight": 4, _MIDDLE.format(half="decoder"): 4},),
    },
    configure=_configure,
    build=IVVAE,
    official=_official,
    widths=lambda config: f"dim {config.dim}",
    told=_told,
    scaled=True,
)
