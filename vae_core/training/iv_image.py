"""The image VAE in IV-VAE's layout, which the image stage trains, and IV-VAE made of it. Tensors are (b, c, h, w)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..families.iv_vae import IV_VAE, IVVAEConfig

Weights = Mapping[str, Tensor]
LEVELS = 4
BLOCKS = 2  # residual blocks of an encoder level; the decoder has one more
DILATIONS = (3, 6, 9, 12)


class InflationError(ValueError):
    """The image weights do not fit the video VAE that they are to become."""


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Single head over the positions of an image; all (b, c, h, w)."""
    height = q.shape[-2]
    q, k, v = (rearrange(part, "b c h w -> b 1 (h w) c") for part in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b 1 (h w) c -> b c h w", h=height)


@dataclass(frozen=True, kw_only=True)
class IVImageConfig:
    """`halves` image VAEs side by side, each of `latent_channels` / `halves` channels.

    dim: width of one half at the finest level. halves: 1 is the image VAE of z/2 channels; 2 is the layout of the
    video model, where every convolution reads both halves (kernels from half to half are zero where two separate
    image VAEs were joined), while norms, attention and the changes of resolution stay inside a half.
    """

    dim: int
    latent_channels: int
    halves: int


class HalvesNorm(nn.Module):
    """L2-normalise each half along channels at every position, times sqrt(width of a half), times gamma."""

    def __init__(self, width: int, halves: int) -> None:
        super().__init__()
        self.halves = halves
        self.gamma = nn.Parameter(torch.ones(width * halves, 1, 1))
        self.scale = math.sqrt(width)

    def forward(self, x: Tensor) -> Tensor:
        if self.halves == 1:
            return F.normalize(x, dim=1) * (self.scale * self.gamma)
        parts = x.chunk(self.halves, dim=1)
        return torch.cat([F.normalize(part, dim=1) for part in parts], dim=1) * (self.scale * self.gamma)


class IVBlock(nn.Module):
    def __init__(self, width_in: int, width: int, halves: int) -> None:
        super().__init__()
        a, b = width_in * halves, width * halves
        self.norm1 = HalvesNorm(width_in, halves)
        self.conv1 = nn.Conv2d(a, b, 3, padding=1)
        self.norm2 = HalvesNorm(width, halves)
        self.conv2 = nn.Conv2d(b, b, 3, padding=1)
        self.shortcut = nn.Conv2d(a, b, 1) if a != b else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return self.shortcut(x) + y


class IVAttention(nn.Module):
    """One attention per half, plus the input."""

    def __init__(self, width: int, halves: int) -> None:
        super().__init__()
        self.norm = HalvesNorm(width, halves)
        self.to_qkv = nn.ModuleList(nn.Conv2d(width, 3 * width, 1) for _ in range(halves))
        self.proj = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(halves))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.norm(x).chunk(len(self.proj), dim=1)
        outputs = [
            proj(_attention(*to_qkv(part).chunk(3, dim=1)))
            for to_qkv, proj, part in zip(self.to_qkv, self.proj, parts, strict=True)
        ]
        return x + torch.cat(outputs, dim=1)


class IVResample(nn.Module):
    """Space / 2, or nearest x2 and half the width; one 3x3 convolution per half."""

    def __init__(self, width: int, halves: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.ModuleList(
            nn.Conv2d(width, width, 3, stride=2) if down else nn.Conv2d(width, width // 2, 3, padding=1)
            for _ in range(halves)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2.0, mode="nearest")
        parts = x.chunk(len(self.conv), dim=1)
        return torch.cat([conv(part) for conv, part in zip(self.conv, parts, strict=True)], dim=1)


class IVHead(nn.Module):
    """The encoder's parallel atrous convolutions, merged by a 1x1."""

    def __init__(self, width: int, width_out: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Conv2d(width, width_out, 1), nn.Conv2d(width, width_out, 3, padding=1)])
        self.branches.extend(nn.Conv2d(width, width_out, 3, padding=d, dilation=d) for d in DILATIONS)
        self.merge = nn.Conv2d(len(self.branches) * width_out, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(torch.cat([branch(x) for branch in self.branches], dim=1))


def _encoder_stages(dim: int, halves: int) -> nn.Sequential:
    stages = nn.Sequential()
    width = dim
    for level, multiple in enumerate((1, 2, 4, 4)):
        for _ in range(BLOCKS):
            stages.append(IVBlock(width, dim * multiple, halves))
            width = dim * multiple
            if level == LEVELS - 1:
                stages.append(IVAttention(width, halves))
        if level < LEVELS - 1:
            stages.append(IVResample(width, halves, down=True))
        if level == LEVELS - 2:
            stages.append(IVAttention(width, halves))
    return stages


def _decoder_stages(dim: int, halves: int) -> nn.Sequential:
    stages = nn.Sequential()
    width = 4 * dim
    for level, multiple in enumerate((4, 4, 2, 1)):
        for _ in range(BLOCKS + 1):
            stages.append(IVBlock(width, dim * multiple, halves))
            width = dim * multiple
            if level == 0:
                stages.append(IVAttention(width, halves))
        if level < LEVELS - 1:
            stages.append(IVResample(width, halves, down=False))
            width //= 2
    return stages


def _middle(width: int, halves: int) -> nn.Sequential:
    return nn.Sequential(IVBlock(width, width, halves), IVAttention(width, halves), IVBlock(width, width, halves))


class IVImageVAE(nn.Module):
    """The IV-VAE with its 3-D kernels cut to one tap: one image VAE of z/2 channels, or two side by side."""

    def __init__(self, config: IVImageConfig) -> None:
        super().__init__()
        dim, halves, z = config.dim, config.halves, config.latent_channels
        self.config = config
        self.conv_in = nn.Conv2d(3, dim * halves, 3, padding=1)
        self.encoder = _encoder_stages(dim, halves)
        self.encoder_middle = _middle(4 * dim, halves)
        self.encoder_norm = HalvesNorm(4 * dim, halves)
        self.head = IVHead(4 * dim * halves, 2 * z)
        self.to_moments = nn.Conv2d(2 * z, 2 * z, 1)
        self.from_latent = nn.Conv2d(z, z, 1)
        self.conv_latent = nn.Conv2d(z, 4 * dim * halves, 3, padding=1)
        self.decoder_middle = _middle(4 * dim, halves)
        self.decoder = _decoder_stages(dim, halves)
        self.decoder_norm = HalvesNorm(dim, halves)
        self.conv_out = nn.Conv2d(dim * halves, 3 * halves, 3, padding=1)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(b, 3, h, w) in [-1, 1] to mean and logvar, each (b, z, h/8, w/8)."""
        x = self.encoder_middle(self.encoder(self.conv_in(image)))
        x = self.to_moments(self.head(F.silu(self.encoder_norm(x))))
        parts = [part.chunk(2, dim=1) for part in x.chunk(self.config.halves, dim=1)]
        return torch.cat([mean for mean, _ in parts], dim=1), torch.cat([logvar for _, logvar in parts], dim=1)

    def decode(self, latent: Tensor) -> tuple[Tensor, ...]:
        """(b, z, h/8, w/8) to the image as each half gives it, (b, 3, h, w), nominally in [-1, 1]."""
        x = self.decoder(self.decoder_middle(self.conv_latent(self.from_latent(latent))))
        return self.conv_out(F.silu(self.decoder_norm(x))).chunk(self.config.halves, dim=1)


# ------------------------------------------------------------------------------------------------- inflation

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
    model = IV_VAE.network(config)
    names = {ours: theirs for ours, (theirs, _) in IV_VAE.key_map(model).items()}
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
