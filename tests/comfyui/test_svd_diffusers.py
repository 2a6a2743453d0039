"""The U-Net and CLIP of `cviv-vae train-svd-adapter` against ComfyUI's, on the same random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from . import svd
from .inprocess import Comfy
from .svd_model import small_clip_vision
from .weights import picture

CPU = torch.device("cpu")


def test_the_same_features_as_in_comfyui(comfy: Comfy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers", reason='diffusers is not installed: pip install -e ".[svd]"')
    monkeypatch.setitem(svd.UNET, "model_channels", 64)  # one head of 64 channels, as diffusers takes it
    model = svd.small_svd(comfy, heads=64)
    comfy.module("comfy.model_management").load_models_gpu([model])
    state = {f"model.diffusion_model.{name}": t.clone() for name, t in model.model.diffusion_model.state_dict().items()}
    save_file(state, tmp_path / "svd.safetensors")
    network = comfy.pack("vae_core.svd.unet").load_network(tmp_path / "svd.safetensors", torch.float32)
    session, training = comfy.pack("vae_core.svd.session"), comfy.pack("vae_core.svd.trainer")
    generator = torch.Generator().manual_seed(1)
    x0, image, noise = (torch.randn(n, 4, 8, 8, generator=generator) for n in (5, 1, 5))
    seen = torch.randn(1, 1, 1024, generator=generator)
    first = torch.rand(1, 64, 64, 3, generator=generator)
    clip = session.TrainingClip(name="", x0=x0, first=first, seen=seen, rate=6, motion=None, bucket=90)
    for sigma, dropped in ((0.3, False), (5.0, False), (80.0, True)):
        drawn = training.Draw(clip=0, sigma=sigma, noise=noise, dropped=dropped, level=0.05, image_seed=1)
        features, target = comfy.pack("nodes.svd.training").network_features(model, clip, drawn, image)
        ours, our_target = network.features(clip, drawn, image)
        assert torch.equal(our_target, target)
        assert (ours - features).abs().max() < 1e-3 * features.std()


def test_the_same_embedding_as_in_comfyui(comfy: Comfy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = comfy.pack("vae_core.svd.unet")
    monkeypatch.setattr(core, "_SIDE", 28)  # the small model's
    clip = small_clip_vision(comfy, tmp_path)
    encoder = core.ImageEncoder(clip.model.state_dict(), CPU, heads=2)
    for size in ((30, 42), (28, 28), (50, 33)):
        image = picture(1, *size)
        with torch.inference_mode():
            wanted = clip.encode_image(image).image_embeds
        assert (encoder.see(image)[:, 0] - wanted).abs().max() < 1e-4
