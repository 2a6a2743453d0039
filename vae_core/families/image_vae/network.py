"""The 2-D autoencoder of Stable Diffusion, frame by frame: the VAE of SD 1.x, SD 2.x, SDXL, SD3 and Flux.

Source: "High-Resolution Image Synthesis with Latent Diffusion Models" (Rombach et al., 2022). A chunk is one frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ...nn.layers import FrameAttention, FrameConv, FrameEnlarge
from ...nn.region import HALVE_RIGHT
from ...nn.steps import Layer
from ..family import Direction, Network
from ..layout import GROUPS, Decoder, Encoder, Kit, LayoutConfig


@dataclass(frozen=True, kw_only=True)
class ImageVAEConfig(LayoutConfig):
    """What the weights need, and the scaling that their diffusion model applies.

    quantized: whether a 1x1 convolution follows the encoder, and whether one precedes the decoder. decoder_attention:
    whether the decoder's middle has it.
    """

    kind = "An image VAE"
    quantized: tuple[bool, bool]
    decoder_attention: bool
    norm_eps: float
    scale_factor: float
    shift_factor: float


def _down(width: int, level: int) -> Layer:
    return FrameConv(width, width, reach=HALVE_RIGHT, stride=2)


def _up(width: int, level: int) -> Layer:
    return FrameEnlarge(width, width)


class ImageVAE(Network):
    """Encoder and decoder of one frame."""

    def __init__(self, config: ImageVAEConfig, halves: Sequence[Direction] = ("encode", "decode")) -> None:
        super().__init__()
        attention = partial(FrameAttention, groups=GROUPS, eps=config.norm_eps)
        kit = partial(Kit, eps=config.norm_eps, conv=FrameConv, shortcut=partial(FrameConv, kernel=1))
        down = kit(resample=_down, attention=attention)
        up = kit(resample=_up, attention=attention if config.decoder_attention else None)
        self.config = config
        self.encoder = Encoder(config, down, quantize=config.quantized[0]) if "encode" in halves else None
        self.decoder = Decoder(config, up, quantize=config.quantized[1]) if "decode" in halves else None
