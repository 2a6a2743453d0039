"""All that the steps of a run change: the VAE, its moving average, the discriminator, and their optimizers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from .coders import Coder, make_coder
from .config import DiscriminatorConfig, TrainConfig
from .discriminator import PatchDiscriminator
from .objective import Trained
from .schedule import Optimizers, moving_average

logger = logging.getLogger("cviv_vae.training")


class Networks:
    """The networks of a stage and their optimizers, as a config makes them.

    discriminator, averaged: None where the config asks for none.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self._share = config.run.ema
        self.trained = Trained(make_coder(config), config.regularization).to(device)
        self.optimizers = Optimizers(
            self.trained,
            config.optimizer,
            output_layer=f"coder.{self.trained.coder.output_layer}",
            apart="log_variances.",
        )
        self.averaged = self._make_average()
        self.discriminator: PatchDiscriminator | None = None
        self.discriminator_optimizers: Optimizers | None = None
        if config.discriminator is not None:
            self._make_discriminator(config, config.discriminator, device)

    def _make_discriminator(self, config: TrainConfig, own: DiscriminatorConfig, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed + 1)
            self.discriminator = PatchDiscriminator(own.width)
        if own.weights is not None:
            self.discriminator.load_official(own.weights)
        self.discriminator.to(device)
        optimizer = config.optimizer
        if own.schedule == "constant":
            optimizer = replace(optimizer, warm_up=0, least=1.0)
        self.discriminator_optimizers = Optimizers(self.discriminator, optimizer, learning_rate=own.learning_rate)

    @property
    def best_coder(self) -> Coder:
        """The VAE to use: its moving average where there is one."""
        return self.trained.coder if self.averaged is None else cast("Coder", self.averaged.module)

    def are_finite(self) -> bool:
        """Whether all weights are numbers."""
        return all(bool(torch.isfinite(p).all()) for network in self._all() for p in network.parameters())

    def _all(self) -> Iterator[nn.Module]:
        yield self.trained
        if self.averaged is not None:
            yield self.averaged
        if self.discriminator is not None:
            yield self.discriminator

    def _make_average(self) -> AveragedModel | None:
        if self._share == 0:
            return None
        averaged = AveragedModel(self.trained.coder, multi_avg_fn=moving_average(self._share))
        return averaged.requires_grad_(False)

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        state: dict[str, Any] = {
            "trained": self.trained.state_dict(),
            "optimizers": self.optimizers.state_dict(),
        }
        if self.averaged is not None:
            state["averaged"] = self.averaged.state_dict()
        if self.discriminator is not None and self.discriminator_optimizers is not None:
            state["discriminator"] = self.discriminator.state_dict()
            state["discriminator_optimizers"] = self.discriminator_optimizers.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`. A moving average or a discriminator that it does not have begins here."""
        self.trained.load_state_dict(state["trained"])
        self.optimizers.load_state_dict(state["optimizers"])
        if self.averaged is not None:
            if "averaged" in state:
                self.averaged.load_state_dict(state["averaged"])
            else:
                logger.warning("The checkpoint has no moving average: it begins with the weights of the checkpoint.")
                self.averaged.module.load_state_dict(self.trained.coder.state_dict())
        if self.discriminator is not None and self.discriminator_optimizers is not None:
            if "discriminator" in state:
                self.discriminator.load_state_dict(state["discriminator"])
                self.discriminator_optimizers.load_state_dict(state["discriminator_optimizers"])
            else:
                logger.warning("The checkpoint has no discriminator: it begins fresh.")
