"""`cviv-vae train-svd-adapter` on a U-Net of diffusers with random weights, and the names of original SVD files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

import vae_core
from vae_core.cli import app as commands
from vae_core.errors import CheckpointError
from vae_core.media.latents import LatentMeta, save_latent
from vae_core.svd.adapter import read_adapter
from vae_core.svd.keys import CLIP, UNET, clip_tensors, unet_config, unet_layers, unet_name
from vae_core.svd.unet import SVDNetwork, load_image_encoder

from .clips import as_pictures, moving_picture, write_av

diffusers = pytest.importorskip("diffusers", reason='diffusers is not installed: pip install -e ".[svd]"')

CPU = torch.device("cpu")
WIDTH, SEEN = 32, 16  # features of the output layer; width of the image's embedding
CROSS, PLAIN = "CrossAttn{}BlockSpatioTemporal", "{}BlockSpatioTemporal"
CONFIG = {
    "block_out_channels": (WIDTH, 64),
    "down_block_types": (CROSS.format("Down"), PLAIN.format("Down")),
    "up_block_types": (PLAIN.format("Up"), CROSS.format("Up")),
    "layers_per_block": 1,
    "num_attention_heads": (1, 1),
    "cross_attention_dim": SEEN,
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 96,
}
# the original names of what the U-Net of CONFIG has, one of each kind, and diffusers' names for them
NAMES = {
    "time_embed.2.bias": "time_embedding.linear_2.bias",
    "label_emb.0.0.weight": "add_embedding.linear_1.weight",
    "input_blocks.0.0.weight": "conv_in.weight",
    "input_blocks.1.0.in_layers.2.weight": "down_blocks.0.resnets.0.spatial_res_block.conv1.weight",
    "input_blocks.1.0.time_stack.out_layers.3.bias": "down_blocks.0.resnets.0.temporal_res_block.conv2.bias",
    "input_blocks.1.0.time_mixer.mix_factor": "down_blocks.0.resnets.0.time_mixer.mix_factor",
    "input_blocks.1.1.proj_in.weight": "down_blocks.0.attentions.0.proj_in.weight",
    "input_blocks.1.1.time_stack.0.ff_in.net.2.bias":
        "down_blocks.0.attentions.0.temporal_transformer_blocks.0.ff_in.net.2.bias",
    "input_blocks.1.1.time_pos_embed.2.weight": "down_blocks.0.attentions.0.time_pos_embed.linear_2.weight",
    "input_blocks.2.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
    "input_blocks.3.0.skip_connection.weight": "down_blocks.1.resnets.0.spatial_res_block.conv_shortcut.weight",
    "middle_block.1.norm.weight": "mid_block.attentions.0.norm.weight",
    "middle_block.2.0.weight": "mid_block.resnets.1.spatial_res_block.0.weight",
    "output_blocks.1.1.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
    "output_blocks.3.1.transformer_blocks.0.attn2.to_k.weight":
        "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k.weight",
    "out.0.weight": "conv_norm_out.weight",
    "out.2.weight": "conv_out.weight",
}  # fmt: skip


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator)
        / (max(1, torch.Size(shape[1:]).numel()) ** 0.5 if len(shape) > 1 else 9)
        for name, shape in shapes.items()
    }


def clip_shapes(width: int = 80, layers: int = 1) -> dict[str, tuple[int, ...]]:
    """Of a small CLIP under transformers' names."""
    out: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, 56, 56),
        "embeddings.position_embedding.weight": (17, width),
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    for layer in range(layers):
        where = f"encoder.layers.{layer}"
        norms += [f"{where}.layer_norm1", f"{where}.layer_norm2"]
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            out |= {f"{where}.self_attn.{name}.weight": (width, width), f"{where}.self_attn.{name}.bias": (width,)}
        out |= {f"{where}.mlp.fc1.weight": (64, width), f"{where}.mlp.fc1.bias": (64,)}
        out |= {f"{where}.mlp.fc2.weight": (width, 64), f"{where}.mlp.fc2.bias": (width,)}
    out |= {f"{name}.{kind}": (width,) for name in norms for kind in ("weight", "bias")}
    return {f"vision_model.{name}": shape for name, shape in out.items()} | {"visual_projection.weight": (SEEN, width)}


@pytest.fixture(scope="module")
def svd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of SVD as diffusers writes it, with small widths."""
    folder = tmp_path_factory.mktemp("svd")
    torch.manual_seed(0)
    diffusers.UNetSpatioTemporalConditionModel(**CONFIG).save_pretrained(folder / "unet")
    vae = {
        "block_out_channels": (32, 32, 32, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
    }
    diffusers.AutoencoderKLTemporalDecoder(**vae).save_pretrained(folder / "vae")
    (folder / "image_encoder").mkdir()
    (folder / "image_encoder" / "config.json").write_text(json.dumps({"num_attention_heads": 1}), encoding="utf-8")
    save_file(drawn(clip_shapes()), folder / "image_encoder" / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, small_vae: Callable[..., vae_core.VideoVAE]) -> Path:
    path = tmp_path_factory.mktemp("weights") / "cv.safetensors"
    vae_core.save(small_vae("cv-vae", torch.float32), path)
    return path


@pytest.fixture
def train(svd: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command, on a folder with a video of two clips of 5 frames and one latent file."""
    monkeypatch.setattr("vae_core.svd.session.HELD_OUT", 2)
    monkeypatch.setattr("vae_core.svd.scenes._CUT", 1.0)  # what random weights decode changes like at a cut
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    write_av(tmp_path / "clips" / "a.mp4", as_pictures(moving_picture(10, 48, 100)))
    latent = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(4))
    meta = LatentMeta(family="cv-vae", fps=24, frames=5, height=64, width=64)
    save_latent(tmp_path / "clips" / "b.latent.safetensors", latent, meta)

    def run(*words: object, **changes: object) -> Result:
        given = {"svd": svd, "weights": weights, "frames": 5, "width": 64, "height": 64, "steps": 4, **changes}
        options = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        arguments = ["train-svd-adapter", "clips", *options, *map(str, words)]
        return CliRunner(env={"COLUMNS": "300"}).invoke(commands.app, arguments)

    return run


def test_training_lowers_the_loss_and_writes_the_layer_alone(train: Callable[..., Result], svd: Path) -> None:
    result = train("-o", "one.safetensors", method="ridge-regression", steps=10)
    assert result.exit_code == 0, result.output
    assert "3 clips, 1 of them held out" in result.stdout
    assert "10 steps in all, 10 now" in result.stdout
    found = read_adapter("one.safetensors")
    assert not found.full
    assert float(found.metadata["held_out_loss_after"]) < 0.95 * float(found.metadata["held_out_loss_before"])
    assert found.metadata["clips"] == "3"
    assert load_file("one.safetensors").keys() == {"diffusion_model.out.2.diff", "diffusion_model.out.2.diff_b"}
    assert sum(t.numel() for t in load_file("one.safetensors").values()) == 4 * WIDTH * 9 + 4
    assert Path("one.png").stat().st_size > 1000
    trained = load_file("one.state.safetensors")
    plain = load_file(svd / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(trained["old_weight"], plain["conv_out.weight"])


def test_a_stopped_training_goes_on_to_the_same_bits(
    train: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(network: SVDNetwork, *arguments: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return features(network, *arguments)

    calls: list[int] = []
    features = SVDNetwork.features
    common = {"learning_rate": 1e-3, "method": "gradient-descent"}
    assert train("-o", "whole.safetensors", steps=4, **common).exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(SVDNetwork, "features", stopping)
        assert train("-o", "parts.safetensors", steps=4, **common).exit_code == 130
    assert not Path("parts.safetensors").exists()
    losses = load_file("parts.state.safetensors")["losses"]
    assert len(losses) == 2
    result = train("-o", "parts.safetensors", "--resume", steps=4, **common)
    assert result.exit_code == 0, result.output
    assert "4 steps in all, 2 now, from step 2 on" in result.stdout
    whole, parts = (load_file(f"{name}.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    assert torch.equal(load_file("parts.state.safetensors")["losses"][:2], losses)
    result = train("-o", "parts.safetensors", "--resume", steps=4, method="gradient-descent", learning_rate=1e-2)
    assert result.exit_code == 2
    assert "had learning_rate 0.001, not 0.01" in result.stderr


def test_an_original_file_makes_the_same_features(train: Callable[..., Result], svd: Path, tmp_path: Path) -> None:
    """Heads are 64 channels wide there, so this U-Net has other widths than the folder's."""
    wide = {**CONFIG, "block_out_channels": (64, 64)}
    torch.manual_seed(1)
    network = diffusers.UNetSpatioTemporalConditionModel(**wide)
    network.save_pretrained(tmp_path / "wide" / "unet")
    shutil.copytree(svd / "image_encoder", tmp_path / "wide" / "image_encoder")
    plain = network.state_dict()
    names = {unet_name(name, 1): name for name in original_names(plain)}
    assert names.keys() == plain.keys()
    encoder = load_file(svd / "image_encoder" / "model.safetensors")
    original = {f"{UNET}{names[name]}": tensor for name, tensor in plain.items()}
    original |= {f"{CLIP}{name}": tensor.contiguous() for name, tensor in original_clip(encoder).items()}
    original |= {"first_stage_model.decoder.conv_in.weight": torch.zeros(2, 2, 3, 3)}
    save_file(original, tmp_path / "svd.safetensors")
    picture = torch.rand(1, 70, 90, 3, generator=torch.Generator().manual_seed(2))
    seen = [load_image_encoder(tmp_path / one, CPU).see(picture) for one in ("wide", "svd.safetensors")]
    assert seen[0].shape == (1, 1, SEEN)
    assert torch.allclose(*seen, atol=1e-5)
    losses = []
    for source in ("wide", "svd.safetensors"):
        result = train("-o", f"{Path(source).stem}_adapter.safetensors", svd=source, steps=2)
        assert result.exit_code == 0, result.output
        assert "the CV-VAE makes SVD's picture" in result.stderr
        losses.append(load_file(f"{Path(source).stem}_adapter.state.safetensors")["losses"])
    assert torch.allclose(*losses, rtol=1e-5)


def original_names(names: Any) -> list[str]:
    """The original names of a U-Net of one block a level and two levels, from diffusers' names."""
    tables = {
        "resnets": {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
                    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"},
        "attentions": {"temporal_transformer_blocks": "time_stack", "time_pos_embed.linear_1": "time_pos_embed.0",
                       "time_pos_embed.linear_2": "time_pos_embed.2"},
    }  # fmt: skip
    modules = {
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.attentions.0": "input_blocks.1.1",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op", "down_blocks.1.resnets.0": "input_blocks.3.0",
        "up_blocks.0.resnets.0": "output_blocks.0.0", "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
        "up_blocks.1.resnets.0": "output_blocks.2.0", "up_blocks.1.attentions.0": "output_blocks.2.1",
        "up_blocks.1.resnets.1": "output_blocks.3.0", "up_blocks.1.attentions.1": "output_blocks.3.1",
    }  # fmt: skip
    out = []
    for name in names:
        module = next(one for one in modules if name.startswith(f"{one}."))
        rest = name[len(module) + 1 :]
        rest = rest.replace("spatial_res_block.", "").replace("temporal_res_block", "time_stack")
        for kind, table in tables.items():
            for new, old in table.items():
                if kind in module and "transformer_blocks.0.norm" not in name:
                    rest = rest.replace(new, old, 1)
            if kind in module:
                rest = rest.replace("temporal_transformer_blocks", "time_stack")
        out.append(f"{modules[module]}.{rest}")
    return out


def original_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The small CLIP under OpenCLIP's names."""
    model = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
    where = "encoder.layers.0"
    out = {
        "class_embedding": model["embeddings.class_embedding"],
        "positional_embedding": model["embeddings.position_embedding.weight"],
        "conv1.weight": model["embeddings.patch_embedding.weight"],
        "proj": model["visual_projection.weight"].T,
    }
    for kind in ("weight", "bias"):
        out[f"ln_pre.{kind}"], out[f"ln_post.{kind}"] = model[f"pre_layrnorm.{kind}"], model[f"post_layernorm.{kind}"]
        block = "transformer.resblocks.0"
        out[f"{block}.attn.in_proj_{kind}"] = torch.cat([model[f"{where}.self_attn.{q}_proj.{kind}"] for q in "qkv"])
        for old, new in (("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                         ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):  # fmt: skip
            out[f"{block}.{old}.{kind}"] = model[f"{where}.{new}.{kind}"]
    return out


def test_original_names() -> None:
    assert {name: unet_name(name, 1) for name in NAMES} == {
        **NAMES,
        "middle_block.2.0.weight": NAMES["middle_block.2.0.weight"],
    }
    encoder = drawn(clip_shapes())
    again = clip_tensors(original_clip(encoder))
    assert again.keys() == encoder.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in encoder.items())


def test_the_published_size_is_what_diffusers_builds_by_default() -> None:
    """Names of the original file in full, made from diffusers' own by a table with one row for each kind of tensor."""
    with torch.device("meta"):
        network = diffusers.UNetSpatioTemporalConditionModel(**{**CONFIG, "block_out_channels": (64, 64)})
    state = network.state_dict()
    original = dict(zip(original_names(state), state.values(), strict=True))
    assert unet_layers(original) == 1
    config = unet_config(original)
    assert {name: network.config[name] for name in config} == config
    with pytest.raises(CheckpointError, match="lacks the layers over time"):
        unet_layers({"input_blocks.3.0.op.weight": torch.zeros(1)})


def test_refusals(train: Callable[..., Result], weights: Path, svd: Path, tmp_path: Path,
                  small_vae: Callable[..., vae_core.VideoVAE]) -> None:  # fmt: skip
    def refused(*words: object, **changes: object) -> str:
        result = train(*words, **changes)
        assert result.exit_code == 2, result.output
        return result.stderr

    assert "svd_xt.safetensors, or a folder" in refused(svd="missing")
    assert "The size is 100x64" in refused(width=100)
    assert "end it in .safetensors" in refused("-o", "x.pth")
    assert "leave --resume out" in refused("--resume")
    (tmp_path / "taken.safetensors").touch()
    assert "taken.safetensors exists already; add --overwrite" in refused("-o", "taken.safetensors")
    vae_core.save(small_vae("cv-vae-sd3", torch.float32), tmp_path / "sd3.safetensors")
    assert "is cv-vae-sd3 with 16 latent channels" in refused(weights="sd3.safetensors")
    assert "lacks the layers over time" in refused(svd=tmp_path / "clips")
    assert "does not fit SVD" in refused(svd=broken(svd, tmp_path / "broken"))
    meta = LatentMeta(family="cv-vae", fps=24, frames=5, height=40, width=64)
    save_latent(tmp_path / "clips" / "c.safetensors", torch.zeros(1, 4, 2, 5, 8), meta)
    assert "c.safetensors is a latent of 64x40 pixels; SVD is trained on multiples of 64" in refused()
    for file in (tmp_path / "clips").iterdir():
        file.unlink()
    assert "holds neither videos" in refused()
    write_av(tmp_path / "clips" / "short.mp4", as_pictures(moving_picture(4, 48, 64)))
    assert "every file has fewer than 5 frames" in refused()


def broken(svd: Path, folder: Path) -> Path:
    """A folder of SVD whose U-Net lacks a tensor."""
    for name in ("vae", "image_encoder"):
        shutil.copytree(svd / name, folder / name)
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text(
        (svd / "unet" / "config.json").read_text(encoding="utf-8"), encoding="utf-8"
    )
    state = load_file(svd / "unet" / "diffusion_pytorch_model.safetensors")
    del state["conv_out.bias"]
    save_file(state, folder / "unet" / "diffusion_pytorch_model.safetensors")
    return folder
