"""One step's losses: what the trained VAE, the frozen image VAE, LPIPS and the discriminator make of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..metrics import LPIPS
from .coders import Coder, VideoCoder
from .config import LossConfig, RegularizationConfig
from .discriminator import PatchDiscriminator
from .draws import Draws
from .frozen import ImageVAE
from .losses import adaptive_weight, draw_posterior, kl_divergence, likelihood, lpips_frames, pixel_distance
from .regularization import decoded_frames, encoded_frames, map_frames, mapped_latent

R = TypeVar("R")


class Trained(nn.Module):
    """All that the generator's optimizer changes: the VAE and the learned log-variances.

    `forward` hands itself to a function, so that DistributedDataParallel sees a whole step as one forward pass.
    """

    def __init__(self, coder: Coder, regularization: RegularizationConfig | None) -> None:
        super().__init__()
        self.coder: Coder = coder
        names = ["reconstruction"]
        if regularization is not None:
            names += [name for name in ("decoder", "encoder") if getattr(regularization, name) > 0]
        self.log_variances = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in names})

    def forward(self, step: Callable[[Trained], R]) -> R:
        return step(self)


@dataclass
class Objective:
    """The generator's loss, term by term.

    image_vae (frozen), lpips (frozen) and discriminator are there where the configs ask for them.
    """

    loss: LossConfig
    regularization: RegularizationConfig | None = None
    image_vae: ImageVAE | None = None
    lpips: LPIPS | None = None
    discriminator: PatchDiscriminator | None = None
    adversarial_weight: float = 0.0
    figures: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def __call__(self, trained: Trained, video: Tensor, draws: Draws, *, adversarial: bool) -> Tensor:
        """The sum of all terms for a batch of clips; what each term was is in `figures` afterwards."""
        self.figures = {}
        mean, logvar = (full(part) for part in trained.coder.moments(video))
        latent = draw_posterior(mean, logvar, draws.noise)
        outputs = [full(output) for output in trained.coder.decode(latent)]
        nll = self._reconstruction(trained, outputs, video)
        kl = kl_divergence(mean, logvar)
        self._note(nll=nll, kl=kl)
        total = nll + self.loss.kl_weight * kl
        if self.regularization is not None:
            total = total + self._regularization(trained, self.regularization, latent, video, draws)
        if adversarial:
            total = total + self._adversarial(trained, nll, outputs)
        self._note(total=total)
        return total

    def reconstructed(self, trained: Trained, video: Tensor, draws: Draws) -> Tensor:
        """One reconstruction through a draw from the posterior, for the discriminator's step."""
        mean, logvar = (full(part) for part in trained.coder.moments(video))
        return full(trained.coder.decode(draw_posterior(mean, logvar, draws.noise))[0])

    def _reconstruction(self, trained: Trained, outputs: list[Tensor], video: Tensor) -> Tensor:
        distances = torch.stack([pixel_distance(output, video, self.loss.reconstruction) for output in outputs]).mean(0)
        self._note(**{self.loss.reconstruction: distances.mean()})
        if self.lpips is not None:
            perceptual = torch.stack([lpips_frames(self.lpips, output, video) for output in outputs]).mean(0)
            self._note(lpips=perceptual.mean())
            distances = distances + self.loss.lpips_weight * perceptual
        return likelihood(distances, trained.log_variances["reconstruction"])

    def _regularization(
        self, trained: Trained, config: RegularizationConfig, latent: Tensor, video: Tensor, draws: Draws
    ) -> Tensor:
        assert self.image_vae is not None
        kept = map_frames(video, config.mapping, draws.frames)
        total = video.new_zeros(())
        if config.decoder > 0:
            frames = full(decoded_frames(self.image_vae, mapped_latent(latent, config.mapping)))
            distance = (frames - kept).abs()
            self._note(decoder_regularization=distance.mean())
            total = total + config.decoder * likelihood(distance, trained.log_variances["decoder"])
        if config.encoder > 0:
            decoded = full(trained.coder.decode(full(encoded_frames(self.image_vae, kept)))[0])
            distance = (decoded - video[:, :, : decoded.shape[2]]).abs()
            self._note(encoder_regularization=distance.mean())
            total = total + config.encoder * likelihood(distance, trained.log_variances["encoder"])
        return total

    def _adversarial(self, trained: Trained, nll: Tensor, outputs: list[Tensor]) -> Tensor:
        assert self.discriminator is not None
        loss = -torch.stack([full(self.discriminator(output)).mean() for output in outputs]).mean()
        weight = adaptive_weight(nll, loss, trained.coder.last_layer)
        self._note(adversarial=loss, adaptive_weight=weight)
        return self.adversarial_weight * weight * loss

    def _note(self, **figures: Tensor) -> None:
        self.figures.update({name: value.detach() for name, value in figures.items()})


def full(x: Tensor) -> Tensor:
    """`x` in float32 at least: autocast gives bfloat16, in which sums over a clip would be coarse."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_channels(coder: Coder, image_vae: ImageVAE, source: str) -> None:
    """Raise ValueError unless the frozen image VAE reads latents of as many channels as the trained VAE makes."""
    assert isinstance(coder, VideoCoder)
    with torch.no_grad():
        parameter = next(coder.parameters())
        mean, _ = image_vae.encode(torch.zeros(1, 3, 16, 16, device=parameter.device))
    if mean.shape[1] != coder.latent_channels:
        raise ValueError(
            f"The image VAE {source} has latents of {mean.shape[1]} channels, and the video VAE of "
            f"{coder.latent_channels}: regularize by the image VAE that it was inflated from."
        )
