"""The limits that a user sets a VAE."""

from __future__ import annotations

from dataclasses import dataclass

from ..run.tiling import TilePlan
from .vae import VideoVAE


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What work may take. budget_bytes: of device memory, without weights; ram_bytes: of what waits off the device;
    None is as much as there is. blended: whether CV-VAE's official tiles may be taken where nothing exact fits. tile:
    side in latents of exact tiles to take, whatever would be planned.
    """

    budget_bytes: int | None = None
    ram_bytes: int | None = None
    blended: bool = False
    tile: int | None = None

    def keep(self, vae: VideoVAE) -> VideoVAE:
        """The VAE, which keeps within them from now on. Raises ValueError where it has no official tiles."""
        if self.blended and not vae.model.family.reference_tiles:
            raise ValueError(f"--tiling blended: the official tiles are those of CV-VAE, and this is {vae.family}.")
        return vae.within(
            None if self.tile is None else TilePlan(tile=self.tile),
            budget_bytes=self.budget_bytes,
            ram_bytes=self.ram_bytes,
            blended=self.blended,
        )


NO_LIMITS = Limits()
