"""What a loaded VAE is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..families import Compression, Direction, Network

SAFE_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class VAEInfo:
    """What a loaded VAE is. `str(info)` is a readable block.

    halves: "encode" and "decode", or one of them, where the weights have only that half.
    scale_factor, shift_factor: scaled latent = scale_factor * (latent - shift_factor).
    scaled_by: "sampler": our latents are unscaled and the diffusion model's side scales them; "vae": ours are scaled.
    safe_dtypes: dtypes without a known danger of overflow; float16 runs but may overflow on some content.
    """

    family: str
    halves: tuple[Direction, ...]
    latent_channels: int
    compression: Compression
    parameters: int
    scale_factor: float
    shift_factor: float
    scaled_by: str
    safe_dtypes: tuple[torch.dtype, ...]
    widths: str

    @classmethod
    def of(cls, network: Network) -> VAEInfo:
        """What a network is."""
        family, config = network.family, network.config
        scaling = family.scaling(config)
        return cls(
            family=family.id,
            halves=network.halves,
            latent_channels=config.latent_channels,
            compression=family.compression,
            parameters=sum(p.numel() for p in network.parameters()),
            scale_factor=scaling.scale,
            shift_factor=scaling.shift,
            scaled_by="vae" if family.scaled else "sampler",
            safe_dtypes=SAFE_DTYPES,
            widths=family.widths(config),
        )

    @property
    def time_compression(self) -> int:
        """Pixel frames per latent, after the first."""
        return self.compression.time

    @property
    def space_compression(self) -> int:
        """Pixels per latent, in height and in width."""
        return self.compression.space

    def __str__(self) -> str:
        scaled = "by the sampler" if self.scaled_by == "sampler" else "by this VAE"
        space = f"{self.space_compression}x{self.space_compression}"
        shifted = f"(latent {-self.shift_factor:+g})" if self.shift_factor else "latent"
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.safe_dtypes)
        half = "" if len(self.halves) == 2 else f" (can only {self.halves[0]})"
        return "\n".join(
            (
                f"family           {self.family}{half}",
                f"latent channels  {self.latent_channels}",
                f"compression      {self.time_compression}x in time, {space} in space",
                f"widths           {self.widths}",
                f"parameters       {self.parameters:,}",
                f"latent scale     {self.scale_factor:g} * {shifted}, applied {scaled}",
                f"safe dtypes      {dtypes}",
            )
        )
