"""Join Video Latents: lengths, seams, what the result remembers, and what cannot be joined."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .calls import decode, encode
from .conftest import LoadVAE
from .inprocess import Comfy, NodeError
from .weights import picture


def clip(latents: int, value: float, **facts: Any) -> dict[str, Any]:
    """A 4-D latent of one value; `facts` are what it remembers."""
    told = {"cviv": {"layout": "frames", **facts}} if facts else {}
    return {"samples": torch.full((latents, 4, 6, 8), value), **told}


def join(comfy: Comfy, *clips: dict[str, Any], crossfade: int = 0) -> tuple[dict[str, Any], str]:
    inputs = {f"latent_{number}": latent for number, latent in enumerate(clips, 1)}
    latent, report = comfy.call("CVIV_JoinLatents", crossfade=crossfade, **inputs)
    return latent, report


def test_one_after_another(comfy: Comfy) -> None:
    latent, report = join(comfy, clip(3, 1.0), clip(2, 2.0), clip(4, 3.0))
    assert latent["samples"].shape == (9, 4, 6, 8)
    assert latent["samples"][:, 0, 0, 0].tolist() == [1] * 3 + [2] * 2 + [3] * 4
    assert "3 clips, 9 latents, seams at latent 3, 5" in report
    assert "33 frames" in report


def test_crossfade(comfy: Comfy) -> None:
    latent, report = join(comfy, clip(4, 0.0), clip(6, 4.0), clip(4, 0.0), crossfade=3)
    assert latent["samples"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 3, 2, 1, 0]
    assert "3 clips, 8 latents, seams at latent 1, 4" in report
    with pytest.raises(NodeError, match=r"crossfade is 3 and a clip at the seam before clip 2 has 2 latents"):
        join(comfy, clip(4, 0.0), clip(2, 4.0), crossfade=3)


def test_facts(comfy: Comfy) -> None:
    facts = {"family": "cv-vae", "fps": "24000/1001", "height": 43, "width": 61}
    first = {**clip(3, 1.0, frames=9, **facts), "noise_mask": torch.ones(3, 1, 6, 8), "batch_index": [0, 1, 2]}
    latent, report = join(comfy, first, clip(3, 2.0, frames=7, **facts))
    # 6 latents are 21 frames, and the last clip was padded by 2
    assert latent["cviv"] == {**facts, "frames": 19, "layout": "frames"}
    assert "noise_mask" not in latent
    assert "batch_index" not in latent
    assert "noise masks are left out" in report
    _, report = join(comfy, clip(3, 2.0, frames=7, **facts), clip(3, 2.0, **{**facts, "fps": "25"}))
    assert "different frame rates (24000/1001, 25): the first is kept" in report
    assert "padded at its end" in report


def test_layouts_mix(comfy: Comfy) -> None:
    five = {"samples": torch.full((1, 4, 2, 6, 8), 5.0)}
    latent, _ = join(comfy, clip(3, 1.0), five)
    assert latent["samples"][:, 0, 0, 0].tolist() == [1, 1, 1, 5, 5]
    latent, _ = join(comfy, five, clip(3, 1.0))
    assert latent["samples"].shape == (1, 4, 5, 6, 8)
    assert latent["cviv"]["layout"] == "video"


def test_decoded(comfy: Comfy, load_vae: LoadVAE) -> None:
    vae = load_vae("demo-cv-vae")
    first, _ = encode(comfy, vae, picture(9, 43, 61), fps=24.0)
    second, _ = encode(comfy, vae, picture(8, 43, 61, seed=1), fps=24.0)
    latent, _ = join(comfy, first, second)
    images, fps, _ = decode(comfy, vae, latent)
    assert images.shape == (20, 43, 61, 3)
    assert fps == 24
    alone, _, _ = decode(comfy, vae, first)
    # the decoder looks ahead within 16 frames: the first clip stays what it was, but for its end
    assert (images[0] - alone[0]).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (clip(3, 1.0, family="iv-vae"), r"Clip 2 was made by iv-vae.*Decode each clip"),
        (clip(3, 1.0, family="cv-vae-sd3"), r"clip 1 was made by cv-vae and clip 2 by cv-vae-sd3"),
        ({"samples": torch.zeros(3, 4, 6, 9)}, r"Clip 2 has .* \(1, 4, 6, 9\) and clip 1 \(1, 4, 6, 8\)"),
        ({"samples": torch.zeros(2, 4, 3, 6, 8)}, r"Clip 2 has .* \(2, 4, 6, 8\)"),
        (clip(3, 1.0, height=47, width=64), r"shows 64x47 pixels and clip 1 64x48"),
        ({**clip(3, 1.0), "cviv": {"layout": "images"}}, r"Clip 2 holds separate images"),
    ],
    ids=["iv-vae", "family", "size", "batch", "true size", "images"],
)
def test_refusals(comfy: Comfy, second: dict[str, Any], message: str) -> None:
    with pytest.raises(NodeError, match=rf"(?i){message}"):
        join(comfy, clip(3, 1.0, family="cv-vae", height=48, width=64), second)
