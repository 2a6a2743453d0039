"""What does not fit is refused with a sentence that says what to do; it names things as the user sees them."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from .calls import DECODE, DECODE_TO_VIDEO, ENCODE, LOAD_VAE, decode, encode
from .conftest import LoadVAE
from .inprocess import Comfy, NodeError, RefusedError
from .svd import small_svd
from .weights import SMALL, picture


def refusal(comfy: Comfy, node: str, **inputs: Any) -> str:
    """The message with which a node refuses."""
    with pytest.raises(NodeError) as caught:
        comfy.call(node, **inputs)
    assert caught.value.exception_type.rpartition(".")[2] in ("ValueError", "CheckpointError", "LatentFileError")
    assert caught.value.node_type == node
    return str(caught.value)


@pytest.mark.parametrize("node", ["CVIV_Decode", "CVIV_DecodeToVideo"])
def test_latent_of_another_family(comfy: Comfy, load_vae: LoadVAE, node: str) -> None:
    latent, _ = encode(comfy, load_vae(SMALL["iv"]), picture(5, 16, 16))
    widgets = DECODE if node == "CVIV_Decode" else DECODE_TO_VIDEO
    message = refusal(comfy, node, vae=load_vae(SMALL["cv"]), samples=latent, **widgets)
    assert "made by iv-vae and the VAE is cv-vae" in message
    assert "Load the VAE that made the latent" in message


def test_wrong_channels(comfy: Comfy, load_vae: LoadVAE) -> None:
    latent = {"samples": torch.randn(3, 16, 4, 4)}
    message = refusal(comfy, "CVIV_Decode", vae=load_vae(SMALL["cv"]), samples=latent, **DECODE)
    assert "16 channels and the VAE (cv-vae) takes 4" in message
    assert "cv-vae-sd3 or an image VAE with z 16 for SD3 and SD3.5 alone" in message
    assert "Flux, Wan, Hunyuan Video, Qwen-Image and others have 16 channels, too" in message
    assert "use the VAE of that model there" in message


def test_wrong_rank(comfy: Comfy, load_vae: LoadVAE) -> None:
    latent = {"samples": torch.randn(4, 8, 8)}
    message = refusal(comfy, "CVIV_Decode", vae=load_vae(SMALL["cv"]), samples=latent, **DECODE)
    assert "shape (4, 8, 8)" in message
    assert "(batch, channels, frames, height, width)" in message


def test_stock_decode_refuses_too(comfy: Comfy, load_vae: LoadVAE) -> None:
    latent = {"samples": torch.randn(3, 16, 4, 4)}
    message = refusal(comfy, "VAEDecode", vae=load_vae(SMALL["cv"]), samples=latent)
    assert "16 channels and the VAE (cv-vae) takes 4" in message


@pytest.mark.parametrize(
    ("node", "inputs"),
    [
        ("CVIV_Encode", {"images": torch.zeros(1, 16, 16, 3), **ENCODE}),
        ("CVIV_Decode", {"samples": {"samples": torch.zeros(1, 4, 2, 2)}, **DECODE}),
        ("CVIV_DecodeToVideo", {"samples": {"samples": torch.zeros(1, 4, 2, 2)}, **DECODE_TO_VIDEO}),
        ("CVIV_VideoVAEInfo", {}),
    ],
)
def test_a_vae_of_another_loader(comfy: Comfy, node: str, inputs: dict[str, Any]) -> None:
    stock = object.__new__(comfy.module("comfy.sd").VAE)
    message = refusal(comfy, node, vae=stock, **inputs)
    assert "needs a VAE from Load Video VAE" in message
    assert "ComfyUI's own VAE Encode and VAE Decode" in message


@pytest.mark.parametrize(("node", "name"), [("CVIV_Encode", "images"), ("CVIV_RoundTrip", "video")])
def test_what_is_no_clip(comfy: Comfy, load_vae: LoadVAE, node: str, name: str) -> None:
    widgets = {"CVIV_Encode": ENCODE, "CVIV_RoundTrip": {"frame_count": 0, "memory_budget_gb": 0.0}}[node]
    clip = {"samples": torch.zeros(5, 16, 16, 3)}
    message = refusal(comfy, node, vae=load_vae(SMALL["cv"]), **{name: clip}, **widgets)
    assert f"{name} is a dict; connect an IMAGE batch or a VIDEO" in message


def test_iv_latents_do_not_go_where_sd_samplers_take_them(comfy: Comfy, load_vae: LoadVAE) -> None:
    message = refusal(
        comfy, "CVIV_LoadVideoVAE", vae_name=SMALL["iv"], **{**LOAD_VAE, "latent_layout": "clip as frame batch"}
    )
    assert "is of the family iv-vae, whose latent space is its own" in message
    assert "video 5-D" in message
    latent, _ = encode(comfy, load_vae(SMALL["iv"]), picture(5, 16, 16))
    message = refusal(comfy, "CVIV_LatentLayout", samples=latent, layout="clip as frame batch", clips=1)
    assert "made by iv-vae, whose latent space is its own" in message


def test_iv_latents_in_a_sampler(comfy: Comfy, load_vae: LoadVAE, tmp_path: Path) -> None:
    """KSampler and Custom Sampler say it in a sentence; what only passes latents on still works."""
    vae = load_vae(SMALL["iv"])
    latent, _ = encode(comfy, vae, picture(9, 16, 16))
    model, nothing = small_svd(comfy), [[torch.zeros(1, 1, 1024), {}]]
    widgets = {"seed": 1, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "karras", "denoise": 1.0}
    sampled = {"model": model, "positive": nothing, "negative": nothing, "latent_image": latent}
    said = "This latent is of an IV-VAE, whose latent space is its own"
    assert said in refusal(comfy, "KSampler", **sampled, **widgets)
    samplers = comfy.module("comfy.samplers")
    custom = {
        **sampled, "add_noise": True, "noise_seed": 1, "cfg": 1.0, "sampler": samplers.sampler_object("euler"),
        "sigmas": torch.tensor([1.0, 0.0]),
    }  # fmt: skip
    assert said in refusal(comfy, "SamplerCustom", **custom)
    for node, inputs in (("RepeatLatentBatch", {"amount": 1}), ("LatentFromBatch", {"batch_index": 0, "length": 1})):
        (passed,) = comfy.call(node, samples=latent, **inputs)
        assert decode(comfy, vae, passed)[0].shape == (9, 16, 16, 3)
    again = deepcopy(latent)
    assert again["batch_index"] == [0]


def test_weights_of_another_kind(comfy: Comfy, models: Path) -> None:
    from safetensors.torch import save_file

    save_file({"decoder.conv_in.weight": torch.zeros(512, 4, 3, 3)}, models / "image_vae.safetensors")
    try:
        message = refusal(comfy, "CVIV_LoadVideoVAE", vae_name="image_vae.safetensors", **LOAD_VAE)
    finally:
        (models / "image_vae.safetensors").unlink()
    assert "image_vae.safetensors" in message


def test_weights_that_are_not_there(comfy: Comfy) -> None:
    with pytest.raises((RefusedError, NodeError)) as caught:
        comfy.call("CVIV_LoadVideoVAE", vae_name="nothing.safetensors", **LOAD_VAE)
    assert "nothing.safetensors" in str(caught.value)


def test_fp16_overflow_is_told(comfy: Comfy, models: Path, load_vae: LoadVAE) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(models / SMALL["cv"])
    loud = {name: tensor * 64 if name.startswith("decoder.conv_in") else tensor for name, tensor in state.items()}
    save_file(loud, models / "loud_cv.safetensors")
    try:
        vae = load_vae("loud_cv.safetensors", dtype="fp16")
        with pytest.raises(NodeError) as caught:
            decode(comfy, vae, {"samples": torch.full((1, 4, 2, 2), 3e4)})
    finally:
        (models / "loud_cv.safetensors").unlink()
    assert "float16 overflowed: choose bf16 or fp32 as dtype in Load Video VAE" in str(caught.value)


def test_choices_that_old_versions_do_not_check(comfy: Comfy) -> None:
    with pytest.raises((RefusedError, NodeError)) as caught:
        comfy.call("CVIV_LoadVideoVAE", vae_name=SMALL["cv"], **{**LOAD_VAE, "dtype": "int3"})
    assert "int3" in str(caught.value)
    assert "bf16" in str(caught.value)
