"""Our VAE next to another model that ComfyUI holds: encode, decode and a video while it is resident, and unloading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .calls import decode, decode_to_video, encode
from .conftest import LoadVAE
from .inprocess import Comfy
from .weights import SMALL, picture


class _Other(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(512, 512)
        self.device = torch.device("cpu")  # which ComfyUI sets


@pytest.fixture
def other(comfy: Comfy) -> Any:
    """Another model, loaded on ComfyUI's device."""
    mm = comfy.module("comfy.model_management")
    patcher = comfy.module("comfy.model_patcher").ModelPatcher(
        _Other().requires_grad_(False), load_device=mm.get_torch_device(), offload_device=torch.device("cpu")
    )
    mm.load_models_gpu([patcher])
    return patcher


@pytest.mark.parametrize("name", ["cv", "iv", "image"])
def test_both_stay_right(comfy: Comfy, load_vae: LoadVAE, other: Any, tmp_path: Path, name: str) -> None:
    mm = comfy.module("comfy.model_management")
    vae, device = load_vae(SMALL[name]), mm.get_torch_device()
    x = torch.randn(2, 512)
    before = other.model.layer(x.to(device)).cpu()
    latent, _ = encode(comfy, vae, picture(21, 48, 64))
    images, _, report = decode(comfy, vae, latent)
    assert "exact" in report
    decode_to_video(comfy, vae, latent).save_to(str(tmp_path / "video.mp4"))
    assert (tmp_path / "video.mp4").stat().st_size > 0
    mm.load_models_gpu([other])
    assert torch.equal(other.model.layer(x.to(device)).cpu(), before)
    mm.unload_all_models()
    mm.soft_empty_cache()
    assert vae.patcher.loaded_size() == 0 or device.type == "cpu"
    again, *_ = decode(comfy, vae, latent)
    torch.testing.assert_close(again, images, atol=1e-5, rtol=0)


def test_memory_runs_out_while_it_is_resident(
    comfy: Comfy, load_vae: LoadVAE, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = load_vae(SMALL["cv"])
    latent, _ = encode(comfy, vae, picture(33, 64, 96))
    expected, *_ = decode(comfy, vae, latent)
    convolve, calls = torch.nn.functional.conv2d, 0

    def fails(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise torch.OutOfMemoryError("injected")
        return convolve(*given, **named)

    monkeypatch.setattr(torch.nn.functional, "conv2d", fails)
    monkeypatch.setattr(torch.nn.functional, "conv3d", _failing(torch.nn.functional.conv3d))
    images, _, report = decode(comfy, vae, latent)
    assert "out of memory after" in report
    torch.testing.assert_close(images, expected, atol=1e-3, rtol=0)
    assert other.model.layer.weight.isfinite().all()
    comfy.pack("nodes.bridge.session").SESSION.clear()


def _failing(convolve: Any) -> Any:
    calls = 0

    def run(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise torch.OutOfMemoryError("injected")
        return convolve(*given, **named)

    return run
