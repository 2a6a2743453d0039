"""The time offset: SVD's video transformers are told where in the clip a window lies.

Their time embedding is replaced by one that is told. What it is told is a tensor that lies outside of the network, so
that a compiled network reads it anew in every call; ComfyUI's compile node lets no guard watch transformer_options.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.util import timestep_embedding
from torch import Tensor, nn


class Places:
    """Positions in time of the latents that the network sees next; None: 0, 1, 2 and so on."""

    def __init__(self) -> None:
        self.told: Tensor | None = None

    def tell(self, places: Sequence[int], device: torch.device) -> None:
        """Set the positions."""
        self.told = torch.tensor(places, dtype=torch.float32, device=device)


class ToldEmbedding(nn.Sequential):
    """A time embedding (the layers of `old`, under their names) that is told its positions."""

    def __init__(self, old: nn.Sequential, transformer: Any, places: Places) -> None:
        super().__init__(*old)
        self.channels, self.period, self.places = transformer.in_channels, transformer.max_time_embed_period, places

    def forward(self, embedded: Tensor) -> Tensor:
        """(b t, channels), the sinusoids of 0 to t - 1, to the embedding of the positions told."""
        told = self.places.told
        if told is not None:
            sinusoids = timestep_embedding(told, self.channels, max_period=self.period).to(embedded)
            embedded = sinusoids.repeat(embedded.shape[0] // told.shape[0], 1)
        return super().forward(embedded)


def patch_positions(model: Any, *, wanted: bool) -> Places | None:
    """Let the network of `model`, a clone, be told its positions; without `wanted`, no longer."""
    for name, patch in list(model.object_patches.items()):
        if isinstance(patch, ToldEmbedding):
            del model.object_patches[name]
    if not wanted:
        return None
    places = Places()
    for name, module in model.model.diffusion_model.named_modules():
        if isinstance(module, SpatialVideoTransformer):
            key = f"diffusion_model.{name}.time_pos_embed"
            model.add_object_patch(key, ToldEmbedding(model.get_model_object(key), module, places))
    return places
