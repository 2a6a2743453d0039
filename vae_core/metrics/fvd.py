"""FVD: the Frechet distance between the features of two sets of clips (Unterthiner et al. 2018)."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Mean and covariance of features, summed up as they come; memory does not grow with their number."""

    count: int = 0
    total: Tensor | None = None  # d
    products: Tensor | None = None  # d d

    def add(self, features: Tensor) -> None:
        """(n, d) features."""
        values = features.double()
        total, products = values.sum(0), values.T @ values
        self.total = total if self.total is None else self.total + total
        self.products = products if self.products is None else self.products + products
        self.count += len(values)

    @property
    def mean(self) -> Tensor:
        assert self.total is not None
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """With n - 1, as usual for FVD."""
        assert self.products is not None
        mean = self.mean
        return (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(ours: Moments, theirs: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). Raises ValueError below two clips a side."""
    if min(ours.count, theirs.count) < 2:
        raise ValueError(
            f"FVD compares two sets of at least 2 clips; got {ours.count} and {theirs.count}. Papers use thousands."
        )
    c1, c2 = ours.covariance, theirs.covariance
    # (C1 C2)^(1/2) has the trace of (R C2 R)^(1/2) with R = C1^(1/2), which is symmetric and so has real eigenvalues
    values, vectors = torch.linalg.eigh(c1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    inner = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    distance = (ours.mean - theirs.mean).square().sum() + c1.trace() + c2.trace() - 2 * inner
    return max(float(distance), 0.0)
