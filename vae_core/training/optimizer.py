"""Orthogonalised momentum for kernels: the optimizer of short runs, such as those of the demo models."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

# Coefficients of the quintic iteration of Jordan et al., "Muon: An optimizer for hidden layers" (2024): it drives all
# singular values of a matrix into about [0.7, 1.2] in five rounds.
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


def orthogonalised(matrix: Tensor) -> Tensor:
    """The nearest matrix, roughly, whose singular values are all one; (rows, columns) to the same."""
    a, b, c = QUINTIC
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised momentum of each kernel, read as a matrix (channels out, everything else).

    A step's size is 0.2 * sqrt(the longer side) times the learning rate, so that rates of AdamW are in range.
    """

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step for every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                average: Tensor = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                matrix = parameter.grad.lerp(average, group["momentum"]).flatten(1)
                update = orthogonalised(matrix).view_as(parameter)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-0.2 * math.sqrt(max(matrix.shape)) * group["lr"])
