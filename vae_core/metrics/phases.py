"""Quality by the position of a frame in its group of four: what a VAE that compresses time does to frames between."""

import math
from collections.abc import Sequence

from ..families import VIDEO


def phase_means(values: Sequence[float]) -> list[float]:
    """Mean over all groups at each of the four positions; NaN where no frame has that position.

    values: one per frame. Frame 0 has a latent of its own and is left out; frame 1 has position 0, frame 4 position 3.
    """
    means: list[float] = []
    for position in range(VIDEO.time):
        here = [value for value in values[1 + position :: VIDEO.time] if not math.isnan(value)]
        means.append(sum(here) / len(here) if here else math.nan)
    return means


def phase_spread(values: Sequence[float]) -> float:
    """The best position's mean less the worst one's, in the unit of `values`; NaN below one whole group."""
    means = phase_means(values)
    return math.nan if any(map(math.isnan, means)) else max(means) - min(means)
