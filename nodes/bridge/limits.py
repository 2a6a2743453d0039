"""What a run may do: memory, and tiles that are not exact."""

from __future__ import annotations

from dataclasses import dataclass

from .schema import GIB, TILINGS, check_choice


@dataclass(frozen=True, kw_only=True)
class Limits:
    """budget: bytes of device memory for one chunk; None: as much as could be free. blended: whether tiles that are not
    exact may be taken where nothing exact fits."""

    budget: int | None = None
    blended: bool = False


ANY = Limits()


def limits_of(gib: float, tiling: str = TILINGS[0]) -> Limits:
    """What the widgets `memory_budget_gb` and `tiling` say."""
    check_choice("tiling", tiling, TILINGS)
    return Limits(budget=int(gib * GIB) or None, blended=tiling == TILINGS[1])
