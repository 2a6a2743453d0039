"""Which family weights are of, by their names and shapes; and what those of others seem to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vae_core.families import family_of, recognize
from vae_core.weights.detect import describe_foreign

GOLDEN = Path(__file__).parent.parent / "golden"
CV = "decoder.conv_in.weight"
Shapes = dict[str, tuple[int, ...]]


def _published() -> dict[str, Shapes]:
    named = json.loads((GOLDEN / "checkpoint_keys.json").read_text())
    return {kind: {name: tuple(shape) for name, shape in shapes.items()} for kind, shapes in named.items()}


PUBLISHED = _published()


def _recognized(shapes: Shapes) -> tuple[str, tuple[str, ...]] | None:
    """Family and halves of weights of these names and shapes, as the loader finds them."""
    found = recognize({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    return None if found is None else (found[0].id, found[1])


def _family(kind: str) -> str:
    return kind if kind.startswith("cv") else "iv-vae"


@pytest.mark.parametrize("kind", list(PUBLISHED))
def test_the_published_files_are_recognized(kind: str) -> None:
    family = family_of(PUBLISHED[kind])
    assert family is not None
    assert family.id == _family(kind)
    assert _recognized(PUBLISHED[kind]) == (_family(kind), ("encode", "decode"))


@pytest.mark.parametrize("kind", list(PUBLISHED))
def test_half_a_file_is_recognized_with_the_half_that_it_has(kind: str) -> None:
    halves = {"encoder": "encode", "decoder": "decode"}
    for half, direction in halves.items():
        part = {name: shape for name, shape in PUBLISHED[kind].items() if name.startswith(half)}
        assert _recognized(part) == (_family(kind), (direction,))


@pytest.mark.parametrize("kind", list(PUBLISHED))
def test_incomplete_files_are_named(kind: str) -> None:
    told = ("conv_in.weight", "conv1.conv.weight", "encoder.conv1.conv_3d.weight")
    without = {name: shape for name, shape in PUBLISHED[kind].items() if not name.endswith(told)}
    assert _recognized(without) is None
    assert "an incomplete CV-VAE or IV-VAE file" in describe_foreign(without)
    for half in ("encoder", "decoder"):
        part = {name: shape for name, shape in without.items() if name.startswith(half)}
        assert _recognized(part) is None
        assert f"incomplete file, only the {half} of one of our VAEs" in describe_foreign(part)


def _flat(kind: str) -> Shapes:
    """The 2-D model that a CV-VAE was made from: kernels without their time axis, no attention over time."""
    shapes = {name: shape for name, shape in PUBLISHED[kind].items() if "_t." not in name}
    return {name: shape[:2] + shape[3:] if len(shape) == 5 else shape for name, shape in shapes.items()}


K = (512, 512, 3, 3, 3)
WAN = {
    "encoder.conv1.weight": (96, 3, 3, 3, 3),
    "conv1.weight": (32, 32, 1, 1, 1),
    "decoder.middle.0.residual.0.gamma": (384, 1, 1, 1),
    "decoder.middle.0.residual.2.weight": (384, 384, 3, 3, 3),
    "decoder.upsamples.0.residual.2.weight": (384, 384, 3, 3, 3),
}
WAN_DIFFUSERS = {
    "encoder.conv_in.weight": (96, 3, 3, 3, 3),
    CV: (384, 16, 3, 3, 3),
    "decoder.mid_block.resnets.0.norm1.gamma": (384, 1, 1, 1),
    "decoder.up_blocks.0.resnets.0.norm1.gamma": (384, 1, 1, 1),
    "decoder.up_blocks.0.resnets.0.conv1.weight": (384, 384, 3, 3, 3),
    "decoder.up_blocks.0.resnets.0.conv2.weight": (384, 384, 3, 3, 3),
}
FOREIGNERS: list[tuple[str, Shapes]] = [
    ("a 2-D SD3 or Flux VAE (16 channels", {"encoder.conv_in.weight": (128, 3, 3, 3), CV: (512, 16, 3, 3)}),
    ("a 2-D Stable Diffusion VAE", {"encoder.conv_in.weight": (128, 3, 3, 3), CV: (512, 4, 3, 3)}),
    ("a 2-D Flux.2 VAE (32 channels", {"bn.running_mean": (128,), CV: (512, 32, 3, 3)}),
    ("a Wan 2.1 VAE", WAN),
    ("a Wan 2.1 VAE", {f"model.{name}": shape for name, shape in WAN.items()}),
    ("a Wan 2.1 VAE", WAN_DIFFUSERS),
    ("a Wan 2.2 VAE", {**WAN, "decoder.upsamples.0.upsamples.0.residual.2.weight": (1024, 1024, 3, 3, 3)}),
    ("a Wan 2.2 VAE", {**WAN_DIFFUSERS, CV: (1024, 48, 3, 3, 3)}),
    (
        "a CogVideoX VAE",
        {"decoder.conv_in.conv.weight": K, "decoder.mid_block.resnets.0.norm1.conv_y.conv.weight": (512, 16, 1, 1, 1)},
    ),
    (
        "a HunyuanVideo VAE",
        {"decoder.conv_in.conv.weight": (512, 16, 3, 3, 3), "decoder.mid_block.resnets.0.conv1.conv.weight": K},
    ),
    ("an LTX-Video VAE", {"decoder.conv_in.conv.weight": K, "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight": K}),
    ("an LTX-Video VAE", {"decoder.conv_in.conv.weight": (1024, 128, 3, 3, 3)}),
    ("a Mochi VAE", {"decoder.blocks.2.blocks.3.stack.5.weight": K}),
    ("a Cosmos tokenizer", {"decoder.unpatcher3d.wavelets": (2,)}),
    (
        "the SVD VAE with its temporal decoder",
        {"encoder.conv_in.weight": (128, 3, 3, 3), "decoder.mid.block_1.mix_factor": (1,)},
    ),
    (
        "the SVD VAE with its temporal decoder",
        {"encoder.conv_in.weight": (128, 3, 3, 3), CV: (512, 4, 3, 3), "decoder.time_conv_out.weight": (3, 3, 3, 1, 1)},
    ),
    ("a video VAE of another model", {"encoder.conv_in.weight": (64, 3, 3, 3, 3), "decoder.stem.weight": K}),
    ("a TAESD tiny VAE", {"1.weight": (64, 4, 3, 3), "3.conv.0.weight": (64, 64, 3, 3)}),
    ("a TAESD tiny VAE", {"taesd_decoder.1.weight": (64, 4, 3, 3), "taesd_encoder.0.weight": (64, 3, 3, 3)}),
    ("a LoRA", {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (16, 320)}),
    ("a LoRA", {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": (16, 320)}),
    ("a ControlNet", {"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}),
    ("a ControlNet", {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3), "conv_in.weight": (320, 4, 3, 3)}),
    (
        "a full diffusion checkpoint",
        {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3), f"first_stage_model.{CV}": (512, 4, 3, 3)},
    ),
    ("a diffusion model", {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)}),
    ("a diffusion model", {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (320, 320)}),
    ("a diffusion model", {"blocks.0.self_attn.q.weight": (1536, 1536), "head.modulation": (1, 2, 1536)}),
    ("a text or image encoder", {"text_model.encoder.layers.0.self_attn.q_proj.weight": (768, 768)}),
    ("a text or image encoder", {"encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096)}),
    ("an upscaler (ESRGAN)", {"model.0.weight": (64, 3, 3, 3), "model.1.sub.0.RDB1.conv1.0.weight": (32, 64, 3, 3)}),
    ("an upscaler (ESRGAN)", {"conv_first.weight": (64, 3, 3, 3), "body.0.rdb1.conv1.weight": (32, 64, 3, 3)}),
    ("a textual inversion embedding", {"emb_params": (2, 768)}),
    ("a textual inversion embedding", {"clip_g": (2, 1280), "clip_l": (2, 768)}),
    ("the discriminator of a VAE's training", {"main.0.weight": (64, 3, 4, 4), "main.2.weight": (128, 64, 4, 4)}),
    ("a latent, not weights", {"latent_tensor": (1, 4, 64, 64), "latent_format_version_0": (0,)}),
    ("empty, or holds only parts of a training", {}),
    ("of no kind known here; its tensors are 'a', 'b', 'c' and 2 more", dict.fromkeys("abcde", (1,))),
]


@pytest.mark.parametrize(("said", "shapes"), FOREIGNERS, ids=[f"{i}-{said}" for i, (said, _) in enumerate(FOREIGNERS)])
def test_foreign_weights_are_named_with_what_would_be_right(said: str, shapes: Shapes) -> None:
    assert _recognized(shapes) is None
    text = describe_foreign(shapes)
    assert said in text
    sentences = text.rstrip(".").split(". ")
    assert len(sentences) == 2
    assert sentences[1].startswith(("Give", "Its latents", "IV-VAE has names", "No CV-VAE was made"))


@pytest.mark.parametrize("kind", ["cv-vae", "cv-vae-sd3"])
def test_the_image_vae_that_a_cv_vae_was_made_from_is_one_of_ours(kind: str) -> None:
    assert _recognized(_flat(kind)) == ("image-vae", ("encode", "decode"))


def test_of_the_vae_of_svd_the_encoder_is_one_of_ours() -> None:
    temporal = {"decoder.mid.block_1.mix_factor": (1,), "decoder.conv_out.time_mix_conv.weight": K}
    assert _recognized({**_flat("cv-vae"), **temporal}) == ("image-vae", ("encode",))


def test_names_in_a_sentence_stay_on_one_line() -> None:
    text = describe_foreign({"a\nb\x1b[31m" + "c" * 500: (1,)})
    assert "\n" not in text
    assert "\x1b" not in text
    assert len(text) < 300
