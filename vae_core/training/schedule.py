"""Learning rates, and the optimizers that follow them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .config import OptimizerConfig
from .optimizer import Muon

Weights = list[Tensor] | tuple[Tensor, ...]
MUON_SHARE = 0.2  # of the learning rate, for what AdamW trains in addition to Muon


def rate_factor(step: int, steps: int, *, warm_up: int, least: float) -> float:
    """Of the peak learning rate at step `step` (from 0) of `steps`: linear warm-up, then half a cosine to `least`."""
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def moving_share(steps: int, share: float) -> float:
    """What a moving average keeps of itself after `steps` steps: less at first, when it is the start still."""
    return min(share, (1 + steps) / (10 + steps))


def moving_average(share: float) -> Callable[[Weights, Weights, Tensor | int], None]:
    """How an `AveragedModel` takes in the weights after a step: `share` of itself stays, less at first."""

    @torch.no_grad()
    def take_in(average: Weights, weights: Weights, steps: Tensor | int) -> None:
        for ours, theirs in zip(average, weights, strict=True):
            ours.lerp_(theirs, 1 - moving_share(int(steps), share))

    return take_in


class Optimizers:
    """The optimizers of one network under one schedule.

    output_layer: how the names of its last layer begin. apart: names of parameters whose gradients are clipped by
    themselves, see `OptimizerConfig`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        *,
        output_layer: str = "",
        apart: str = "",
        learning_rate: float | None = None,
    ) -> None:
        self.config = config
        rate = config.learning_rate if learning_rate is None else learning_rate
        kernels: list[Tensor] = []
        others: list[Tensor] = []
        for name, parameter in model.named_parameters():
            is_matrix = parameter.ndim >= 2 and min(parameter.flatten(1).shape) > 1
            muon = config.kind == "muon" and is_matrix and not (output_layer and output_layer in name)
            (kernels if muon else others).append(parameter)
        lone = [p for name, p in model.named_parameters() if apart and name.startswith(apart)]
        self._apart = lone if config.clip_log_variances == "apart" else []
        self._joined = [p for p in (*kernels, *others) if not any(p is other for other in self._apart)]
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                others,
                lr=rate * (MUON_SHARE if kernels else 1.0),
                betas=config.betas,
                eps=config.eps,
                weight_decay=config.weight_decay,
            )
        ]
        if kernels:
            self._optimizers.append(Muon(kernels, lr=rate, weight_decay=config.weight_decay))
        self._rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self._optimizers]

    def clear(self) -> None:
        """Forget the gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad()

    def step(self, step: int, steps: int, *, change: bool = True) -> tuple[float, float]:
        """Clip the gradients, make step `step` of `steps`, clear the gradients; the gradient norm and learning rate.

        The norm is that of what is clipped together. Where one is not finite, or not `change`, nothing is changed.
        """
        norm = float(nn.utils.clip_grad_norm_(self._joined, self.config.clip))
        for parameter in self._apart:
            alone = float(nn.utils.clip_grad_norm_(parameter, self.config.clip))
            norm = norm if math.isfinite(alone) else alone
        factor = rate_factor(step, steps, warm_up=self.config.warm_up, least=self.config.least)
        for optimizer, rates in zip(self._optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            if change and math.isfinite(norm):
                optimizer.step()
        self.clear()
        return norm, self._rates[-1][0] * factor

    def state_dict(self) -> list[dict[str, object]]:
        """The state of each optimizer."""
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_state_dict(self, states: list[dict[str, object]]) -> None:
        """Go on from `state_dict`."""
        for optimizer, state in zip(self._optimizers, states, strict=True):
            optimizer.load_state_dict(state)
