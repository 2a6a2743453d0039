"""CV-VAE: a video VAE in the latent space of an image VAE.

Source: "CV-VAE: A Compatible Video VAE for Latent Generative Video Models" (Zhao et al., 2024). A chunk is 1 + 4n
frames or 1 + n latents; chunks do not depend on each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from einops import rearrange
from torch import Tensor, nn

from ...nn.clip import Clip
from ...nn.convolution import convolve
from ...nn.layers import Attention, FrameAttention, SpacePadding
from ...nn.norm import Activation
from ...nn.region import HALVE_BOTH, HALVE_RIGHT
from ...nn.steps import Context, Layer
from ..family import Direction, Network
from ..layout import GROUPS, SAMPLER_SCALING, Decoder, Encoder, Kit, LayoutConfig
from .layers import ClipConv, Upsample

TIME_LEVELS = (0, 2)  # the encoder halves time after these levels; the decoder doubles it at the same depths


@dataclass(frozen=True, kw_only=True)
class CVVAEConfig(LayoutConfig):
    """What the weights need.

    sd3: the SD3 family pads by replication everywhere, has norm eps 1e-6 and no attention over time.
    """

    kind = "CV-VAE"
    sd3: bool

    @property
    def scale_factor(self) -> float:
        return SAMPLER_SCALING.get(self.latent_channels, (1.0, 0.0))[0]

    @property
    def shift_factor(self) -> float:
        return SAMPLER_SCALING.get(self.latent_channels, (1.0, 0.0))[1]

    @property
    def norm_eps(self) -> float:
        return 1e-6 if self.sd3 else 1e-5

    @property
    def space_padding(self) -> SpacePadding:
        return "replicate" if self.sd3 else "zeros"


class Shortcut(nn.Conv3d, Layer):
    """The 1x1x1 convolution of a skip between two widths."""

    def __init__(self, width_in: int, width_out: int) -> None:
        nn.Conv3d.__init__(self, width_in, width_out, 1)

    def forward(self, clip: Clip, at: Context, activation: Activation | None = None) -> Clip:  # type: ignore[override]
        """(b, width_in, t, h, w) to (b, width_out, t, h, w)."""
        return Clip([convolve(clip.tensor(), self.weight, self.bias, plain=at.plain)])


class AttentionBlock(FrameAttention):
    """Attention over the positions of each frame, then over time; one residual for both."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, groups=GROUPS, eps=eps)
        self.temporal = Attention(width, nn.LayerNorm(width, eps=eps))

    def over_time(self, y: Tensor, b: int, at: Context) -> Tensor:
        y = self.temporal.norm(rearrange(y, "(b t) p c -> (b p) t c", b=b))
        y = self.temporal.attend(y, plain=at.plain)
        return rearrange(y, "(b p) t c -> (b t) p c", b=b)


def encoder_kit(config: CVVAEConfig) -> Kit:
    """Causal in time: two copies of the first frame in front of every 3-D convolution."""
    conv = partial(ClipConv, time=(2, 0), time_replicate=True, space_padding=config.space_padding)
    reach = HALVE_BOTH if config.sd3 else HALVE_RIGHT

    def down(width: int, level: int) -> Layer:
        return conv(width, width, stride=(2 if level in TIME_LEVELS else 1, 2, 2), reach=reach)

    attention = partial(FrameAttention, groups=GROUPS, eps=config.norm_eps)
    return Kit(eps=config.norm_eps, conv=conv, shortcut=Shortcut, resample=down, attention=attention)


def decoder_kit(config: CVVAEConfig) -> Kit:
    """Every 3-D convolution sees one frame to each side in time."""
    conv = partial(ClipConv, time=(1, 1), time_replicate=config.sd3, space_padding=config.space_padding)

    def up(width: int, level: int) -> Layer:
        return Upsample(width, double_time=level in TIME_LEVELS, space_padding=config.space_padding)

    attention = partial(partial(FrameAttention, groups=GROUPS) if config.sd3 else AttentionBlock, eps=config.norm_eps)
    return Kit(eps=config.norm_eps, conv=conv, shortcut=Shortcut, resample=up, attention=attention)


class CVVAE(Network):
    """Encoder and decoder of one chunk."""

    def __init__(self, config: CVVAEConfig, halves: Sequence[Direction] = ("encode", "decode")) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, encoder_kit(config)) if "encode" in halves else None
        self.decoder = Decoder(config, decoder_kit(config)) if "decode" in halves else None
