"""The loop of the workflow "SVD ambient loop": stock nodes cut the latents, ours fades their end into their start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .inprocess import Comfy
from .weights import SMALL


def test_a_loop_closes_and_decodes(comfy: Comfy, load_vae: Callable[..., Any]) -> None:
    vae = load_vae(SMALL["cv"])
    facts = {"family": "cv-vae", "fps": "24", "frames": 49, "height": 16, "width": 16, "layout": "frames"}
    samples = torch.arange(13.0).reshape(-1, 1, 1, 1).expand(-1, 4, 2, 2).clone()
    latent = {"samples": samples, "cviv": facts}
    (rest,) = comfy.call("LatentFromBatch", samples=latent, batch_index=3, length=10)
    (head,) = comfy.call("LatentFromBatch", samples=latent, batch_index=0, length=3)
    loop, report = comfy.call("CVIV_JoinLatents", latent_1=rest, latent_2=head, crossfade=3)
    assert "10 latents" in report
    values = loop["samples"][:, 0, 0, 0].tolist()
    assert values[:7] == [3, 4, 5, 6, 7, 8, 9]
    fade = [
        (value - start) / (end - start) for value, end, start in zip(values[7:], (10, 11, 12), (0, 1, 2), strict=True)
    ]
    assert fade == sorted(fade, reverse=True)
    assert fade[-1] < 0.3  # nearly latent 2, after which the loop begins with latent 3
    images, fps, _ = comfy.call("CVIV_Decode", vae=vae, samples=loop, memory_budget_gb=0.0, preview=False)
    assert images.shape == (37, 16, 16, 3)
    assert fps == 24
