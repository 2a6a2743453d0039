"""What a stage trains: a network of some family behind one interface, and how each is made from a config."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from ..door.loading import load, official_state, save
from ..door.vae import VideoVAE
from ..families import FAMILIES, Network
from ..families.cv_vae import CVVAEConfig
from ..families.image_vae import IMAGE_VAE, OUR_EPS, ImageVAEConfig
from ..families.iv_vae import IV_VAE, IVVAEConfig
from ..weights.writing import write_safetensors
from .config import ModelConfig, TrainConfig
from .inflation import IVImageWeights, inflate, read_image_vae
from .iv_image import IVImageConfig, IVImageVAE
from .tables import ConfigError

logger = logging.getLogger("cviv_vae.training")

ENCODER = ("model.encoder.", "model.to_moments.")  # how the names of what makes moments begin
LOGVAR_START = -6.0  # a fresh posterior is narrow, so that the first reconstructions are not noise


class VideoCoder(nn.Module):
    """A network of some family in training; clips (b, 3, t, h, w) of whole latents. Latents are unscaled."""

    def __init__(self, model: Network, *, checkpointing: bool) -> None:
        super().__init__()
        self.model = model
        self.checkpointing = checkpointing

    @property
    def latent_channels(self) -> int:
        return self.model.config.latent_channels

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logvar, each (b, z, t', h/8, w/8); logvar not clamped."""
        return self.model.encode(video, checkpointing=self.checkpointing)

    def decode(self, latent: Tensor) -> tuple[Tensor, ...]:
        """The clip that a latent stands for, alone in a tuple."""
        return (self.model.decode(latent, checkpointing=self.checkpointing),)

    @property
    def last_layer(self) -> list[Tensor]:
        """The kernels of the decoder's last convolution, at which the adversarial loss is weighed."""
        assert self.model.decoder is not None
        return [p for p in self.model.decoder.conv_out.parameters() if p.ndim > 1]  # type: ignore[union-attr]

    @property
    def output_layer(self) -> str:
        """How the names of the decoder's last convolution begin."""
        return "model.decoder.conv_out."

    def save(self, path: Path) -> None:
        """Write the weights under their official names."""
        save(VideoVAE(self.model), path)


class HalvesCoder(nn.Module):
    """The image VAE in IV-VAE's layout in training; clips of one frame (b, 3, 1, h, w)."""

    def __init__(self, model: IVImageVAE) -> None:
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
        return [self.model.conv_out.weight]

    @property
    def output_layer(self) -> str:
        """How the names of the decoder's last convolution begin."""
        return "model.conv_out."

    def save(self, path: Path) -> None:
        """Write the weights under the names that inflation reads; complete or not there at all."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        write_safetensors(path, state, {"format": "pt"})


Coder = VideoCoder | HalvesCoder


class FrameByFrame(nn.Module):
    """A network of some family as an image VAE: every picture is a video of one frame."""

    def __init__(self, model: Network) -> None:
        super().__init__()
        self.model = model

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 3, h, w) to mean and logvar, each (n, z, h/8, w/8)."""
        mean, logvar = self.model.encode(image[:, :, None])
        return mean[:, :, 0], logvar[:, :, 0]

    def decode(self, latent: Tensor) -> tuple[Tensor, ...]:
        """(n, z, h/8, w/8) to pictures (n, 3, h, w)."""
        return (self.model.decode(latent[:, :, None])[:, :, 0],)


# ------------------------------------------------------------------------------------------------------ making


def make_coder(config: TrainConfig) -> Coder:
    """The model of a stage, trainable, in float32 on the CPU; fresh weights are drawn from the config's seed.

    Raises ConfigError, CheckpointError or InflationError for weights that do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        make = _image_coder if config.stage == "image" else _video_coder
        coder = make(config.model, config.run.checkpointing).train().requires_grad_(True)
    if config.model.train == "decoder":
        for name, parameter in coder.named_parameters():
            parameter.requires_grad_(not name.startswith(ENCODER))
    return coder


def _video_coder(config: ModelConfig, checkpointing: bool) -> Coder:
    return VideoCoder(_video_network(config), checkpointing=checkpointing)


def _video_network(config: ModelConfig) -> Network:
    if config.init == "fresh":
        network = FAMILIES[config.family].network(video_config(config))
        _narrow_posterior(network)
        return network
    scaled = FAMILIES[config.family].scaled
    scale, shift = (config.scale_factor, config.shift_factor) if scaled else (None, None)
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
    if FAMILIES[config.family] is IV_VAE:
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
def _narrow_posterior(network: Network | IVImageVAE) -> None:
    """Let the log-variances of a fresh network begin at LOGVAR_START."""
    last = network.to_moments if hasattr(network, "to_moments") else network.encoder.conv_out  # type: ignore[union-attr]
    halves = network.config.halves if isinstance(network, IVImageVAE) else 1
    assert isinstance(last, nn.Module)
    for name, bias in last.named_parameters():
        if name.endswith("bias"):
            for half in bias.chunk(halves):
                half.chunk(2)[1].fill_(LOGVAR_START)


def _image_coder(config: ModelConfig, checkpointing: bool) -> Coder:
    halves = FAMILIES[config.family] is IV_VAE
    if config.init == "weights":
        model = read_image_model(config.weights[0])
        if isinstance(model, IVImageVAE) != halves:
            raise ConfigError(f"model.weights is no image VAE of {config.family}: {config.weights[0]}.")
    elif halves:
        assert config.latent_channels is not None
        assert config.dim is not None
        model = IVImageVAE(
            IVImageConfig(dim=config.dim, latent_channels=config.latent_channels, halves=config.halves or 1)
        )
        _narrow_posterior(model)
    elif config.family == "cv-vae":
        assert config.latent_channels is not None
        assert config.widths is not None
        assert config.blocks_per_level is not None
        # without attention in the decoder, which inflation could pass on only in part
        size = ImageVAEConfig(
            widths=config.widths,
            blocks_per_level=config.blocks_per_level,
            latent_channels=config.latent_channels,
            quantized=(False, False),
            decoder_attention=False,
            norm_eps=OUR_EPS,
            scale_factor=1.0,
            shift_factor=0.0,
        )
        model = IMAGE_VAE.network(size)
        _narrow_posterior(model)
    else:
        raise ConfigError("The image stage trains cv-vae or iv-vae; for cv-vae-sd3, inflate the VAE of SD3 instead.")
    return HalvesCoder(model) if isinstance(model, IVImageVAE) else VideoCoder(model, checkpointing=checkpointing)


def read_image_model(source: str) -> Network | IVImageVAE:
    """The image VAE of a file or folder, as a network: Stable Diffusion's, SD3's, or one that stage "image" wrote.

    Raises InflationError for anything else, CheckpointError where the file cannot be read.
    """
    weights = read_image_vae(source)
    if isinstance(weights, IVImageWeights):
        model = IVImageVAE(weights.config)
        model.load_state_dict(weights.tensors)
        return model
    return load(source).model
