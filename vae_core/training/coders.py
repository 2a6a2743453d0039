"""What a stage trains: an image VAE or a video VAE behind one interface, and how each is made from a config."""

from __future__ import annotations

import logging
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from ..atomic import atomic_write
from ..cv_vae import CVVAE, CVVAEConfig
from ..door.checkpoints import load, official_state, save
from ..door.codec import IV_FRAMES, VideoVAE
from ..iv_vae import IVVAE, IVVAEConfig
from ..keys import Model, build
from ..memory import Memory
from ..windows import rechunk
from .config import ConfigError, ModelConfig, TrainConfig
from .image_vae import CVAttention, CVImageConfig, CVImageVAE, IVImageConfig, IVImageVAE
from .image_weights import CVImageWeights, read_image_vae
from .inflation import inflate

logger = logging.getLogger("cviv_vae.training")

LOGVAR_START = -6.0  # a fresh posterior is narrow, so that the first reconstructions are not noise


class VideoCoder(nn.Module):
    """A video VAE in training; clips (b, 3, 1 + 4n, h, w), for CV-VAE of at most 17 frames. Latents are unscaled."""

    def __init__(self, model: Model, *, checkpointing: bool) -> None:
        super().__init__()
        self.model = model
        self.checkpointing = checkpointing

    @property
    def latent_channels(self) -> int:
        return self.model.config.latent_channels

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logvar, each (b, z, 1 + n, h/8, w/8); logvar not clamped."""
        if isinstance(self.model, CVVAE):
            return self.model.encode(video, checkpointing=self.checkpointing)
        memory = Memory()
        groups = rechunk([video], IV_FRAMES)
        pairs = [self.model.encode(group, memory, checkpointing=self.checkpointing) for group in groups]
        return torch.cat([mean for mean, _ in pairs], dim=2), torch.cat([logvar for _, logvar in pairs], dim=2)

    def decode(self, latent: Tensor) -> tuple[Tensor, ...]:
        """The clip that a latent stands for, alone in a tuple."""
        if isinstance(self.model, CVVAE):
            return (self.model.decode(latent, checkpointing=self.checkpointing),)
        memory = Memory()
        frames = latent.split(1, dim=2)
        return (torch.cat([self.model.decode(x, memory, checkpointing=self.checkpointing) for x in frames], dim=2),)

    @property
    def last_layer(self) -> list[Tensor]:
        """The kernels of the decoder's last convolution, at which the adversarial loss is weighed."""
        return [p for p in self.model.decoder.conv_out.parameters() if p.ndim > 1]

    @property
    def output_layer(self) -> str:
        """How the names of the decoder's last convolution begin."""
        return "model.decoder.conv_out."

    def save(self, path: Path) -> None:
        """Write the weights under their official names."""
        save(VideoVAE(self.model), path)


class ImageCoder(nn.Module):
    """An image VAE in training; clips of one frame (b, 3, 1, h, w)."""

    def __init__(self, model: CVImageVAE | IVImageVAE) -> None:
        super().__init__()
        self.model = model

    @property
    def latent_channels(self) -> int:
        return self.model.config.latent_channels

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logvar, each (b, z, 1, h/8, w/8); logvar not clamped."""
        mean, logvar = self.model.encode(video[:, :, 0])
        return mean[:, :, None], logvar[:, :, None]

    def decode(self, latent: Tensor) -> tuple[Tensor, ...]:
        """The picture as each half of the image VAE gives it, (b, 3, 1, h, w) each."""
        return tuple(image[:, :, None] for image in self.model.decode(latent[:, :, 0]))

    @property
    def last_layer(self) -> list[Tensor]:
        """The kernel of the decoder's last convolution, at which the adversarial loss is weighed."""
        decoder = self.model.decoder if isinstance(self.model, CVImageVAE) else self.model
        return [decoder.conv_out.weight]

    @property
    def output_layer(self) -> str:
        """How the names of the decoder's last convolution begin."""
        return "model.decoder.conv_out." if isinstance(self.model, CVImageVAE) else "model.conv_out."

    def save(self, path: Path) -> None:
        """Write the weights under the names that inflation reads; complete or not there at all."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        with atomic_write(path) as part:
            safetensors.torch.save_file(state, part, metadata={"format": "pt"})


Coder = VideoCoder | ImageCoder


class FrameByFrame(nn.Module):
    """A video VAE as an image VAE: every picture is a video of one frame."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.coder = VideoCoder(model, checkpointing=False)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 3, h, w) to mean and logvar, each (n, z, h/8, w/8)."""
        mean, logvar = self.coder.moments(image[:, :, None])
        return mean[:, :, 0], logvar[:, :, 0]

    def decode(self, latent: Tensor) -> tuple[Tensor, ...]:
        """(n, z, h/8, w/8) to pictures (n, 3, h, w)."""
        return tuple(frame[:, :, 0] for frame in self.coder.decode(latent[:, :, None]))


# ------------------------------------------------------------------------------------------------------ making


def make_coder(config: TrainConfig) -> Coder:
    """The model of a stage, trainable, in float32 on the CPU; fresh weights are drawn from the config's seed.

    Raises ConfigError, CheckpointError or InflationError for weights that do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.stage == "image":
            coder: Coder = ImageCoder(_image_model(config.model))
        else:
            coder = VideoCoder(_video_model(config.model), checkpointing=config.run.checkpointing)
    return coder.train().requires_grad_(True)


def _video_model(config: ModelConfig) -> Model:
    if config.init == "fresh":
        model = build(video_config(config))
        _narrow_posterior(model)
        return model
    is_iv = config.family == "iv-vae"
    scale, shift = (config.scale_factor, config.shift_factor) if is_iv else (None, None)
    if config.init == "inflate":
        found = inflate(config.weights, config.family)
        for note in found.notes:
            logger.warning("%s", note)
        return load(official_state(found.vae.model), scale_factor=scale, shift_factor=shift).model
    vae = load(config.weights[0], scale_factor=scale, shift_factor=shift)
    if vae.family != config.family:
        raise ConfigError(f"model.weights holds a {vae.family}, and model.family is {config.family}: make them agree.")
    return vae.model


def video_config(config: ModelConfig) -> CVVAEConfig | IVVAEConfig:
    """The size of a fresh video VAE."""
    assert config.latent_channels is not None
    if config.family == "iv-vae":
        assert config.dim is not None
        return IVVAEConfig(
            dim=config.dim,
            latent_channels=config.latent_channels,
            scale_factor=1.0 if config.scale_factor is None else config.scale_factor,
            shift_factor=0.0 if config.shift_factor is None else config.shift_factor,
            parts=config.parts,
        )
    assert config.widths is not None
    assert config.blocks_per_level is not None
    return CVVAEConfig(
        widths=config.widths,
        blocks_per_level=config.blocks_per_level,
        latent_channels=config.latent_channels,
        sd3=config.family == "cv-vae-sd3",
    )


@torch.no_grad()
def _narrow_posterior(model: Model | CVImageVAE | IVImageVAE) -> None:
    """Let the log-variances of a fresh model begin at LOGVAR_START."""
    if isinstance(model, IVVAE):
        for name, bias in model.to_moments.named_parameters():
            if name.endswith(".bias"):
                bias.chunk(2)[1].fill_(LOGVAR_START)
        return
    bias = model.to_moments.bias if isinstance(model, IVImageVAE) else model.encoder.conv_out.bias
    assert bias is not None
    for half in bias.chunk(model.config.halves if isinstance(model, IVImageVAE) else 1):
        half.chunk(2)[1].fill_(LOGVAR_START)


def _image_model(config: ModelConfig) -> CVImageVAE | IVImageVAE:
    if config.init == "weights":
        model = read_image_model(config.weights[0])
        if isinstance(model, IVImageVAE) != (config.family == "iv-vae"):
            raise ConfigError(f"model.weights is no image VAE of {config.family}: {config.weights[0]}.")
        return model
    assert config.latent_channels is not None
    if config.family == "iv-vae":
        assert config.dim is not None
        model = IVImageVAE(
            IVImageConfig(dim=config.dim, latent_channels=config.latent_channels, halves=config.halves or 1)
        )
    elif config.family == "cv-vae":
        assert config.widths is not None
        assert config.blocks_per_level is not None
        model = CVImageVAE(
            CVImageConfig(
                widths=config.widths, blocks_per_level=config.blocks_per_level, latent_channels=config.latent_channels
            )
        )
    else:
        raise ConfigError("The image stage trains cv-vae or iv-vae; for cv-vae-sd3, inflate the VAE of SD3 instead.")
    _narrow_posterior(model)
    return model


def read_image_model(source: str) -> CVImageVAE | IVImageVAE:
    """The image VAE of a file or folder, as a network: Stable Diffusion's, SD3's, or one that stage "image" wrote.

    Raises InflationError for anything else, CheckpointError where the file cannot be read.
    """
    weights = read_image_vae(source)
    if not isinstance(weights, CVImageWeights):
        iv_model = IVImageVAE(weights.config)
        iv_model.load_state_dict(weights.tensors)
        return iv_model
    config = weights.config
    model = CVImageVAE(
        CVImageConfig(
            widths=config.widths, blocks_per_level=config.blocks_per_level, latent_channels=config.latent_channels
        )
    )
    if "decoder.mid.attn_1.q.weight" in weights.tensors:  # Stable Diffusion's have it, ours do not
        model.decoder.mid.attn_1 = CVAttention(config.widths[-1])
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = weights.norm_eps
    model.load_state_dict(weights.tensors)
    return model
