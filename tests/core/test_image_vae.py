"""The family image-vae against diffusers' AutoencoderKL, on drawn weights under every name that files have."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from vae_core import CheckpointError, TilePlan, VideoVAE, load

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

KINDS: dict[str, dict[str, Any]] = {
    "SD 1.x, 2.x and SDXL": {"latent_channels": 4},
    "SD3 and Flux": {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
    "two blocks": {"latent_channels": 4, "layers_per_block": 2},
}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture
def drawn(recipe: ModuleType) -> Callable[[Any], Any]:
    """A model with the weights of the recipe."""

    def draw(model: Any) -> Any:
        shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        model.load_state_dict(recipe.state_dict(shapes, 0))
        return model.eval()

    return draw


@pytest.fixture
def official(drawn: Callable[[Any], Any]) -> Callable[..., Any]:
    def make(layers_per_block: int = 1, **kind: Any) -> Any:
        model = diffusers.AutoencoderKL(
            block_out_channels=(32, 32, 64, 96),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=layers_per_block,
            norm_num_groups=32,
            **kind,
        )
        return drawn(model)

    return make


def older(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As diffusers named attention before 2023."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for new, old in OLD_NAMES.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[name] = tensor
    return renamed


def original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As single files name them; attention by 1x1 convolutions."""
    rules = (
        (r"_blocks\.(\d)\.resnets\.", r".\1.block."),
        (r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample."),
        (r"up_blocks\.(\d)\.upsamplers\.0\.", r"up.\1.upsample."),
        (r"mid_block\.resnets\.0\.", "mid.block_1."),
        (r"mid_block\.resnets\.1\.", "mid.block_2."),
        (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
        (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
        (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
        (r"conv_shortcut\.", "nin_shortcut."),
        (r"conv_norm_out\.", "norm_out."),
    )
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        linear = "attentions.0.to_" in name and tensor.ndim == 2
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        name = re.sub(r"decoder\.up\.(\d)", lambda m: f"decoder.up.{3 - int(m[1])}", name)
        renamed[name] = tensor[:, :, None, None] if linear else tensor
    return renamed


def in_checkpoint(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a whole SD checkpoint holds them, among much else."""
    others = {"model.diffusion_model.out.2.weight": torch.zeros(4, 320, 3, 3), "cond_stage_model.x": torch.zeros(1)}
    return {**others, **{f"first_stage_model.{name}": tensor for name, tensor in original(state).items()}}


NAMES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "diffusers": dict,
    "older diffusers": older,
    "single file": original,
    "whole checkpoint": in_checkpoint,
}


def by_diffusers(model: Any, video: Tensor, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, logvar) of every frame, and the frames of a latent."""
    with torch.no_grad():
        moments = torch.stack([model.encode(frame).latent_dist.parameters for frame in video.unbind(2)], dim=2)
        return *moments.chunk(2, dim=1), torch.stack([model.decode(z).sample for z in latent.unbind(2)], dim=2)


def by_us(vae: VideoVAE, video: Tensor, latent: Tensor, plan: TilePlan | None = None) -> tuple[Tensor, Tensor, Tensor]:
    mean, logvar = vae.moments(video, plan=plan)
    return mean, logvar.clamp(-30, 20), vae.decode(latent, plan=plan)


def error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.std())


@pytest.fixture
def clip() -> Callable[[int], tuple[Tensor, Tensor]]:
    """Three frames, and three latents."""

    def make(channels: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        return torch.rand(1, 3, 3, 40, 56) * 2 - 1, torch.randn(1, channels, 3, 5, 7)

    return make


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_is_what_diffusers_is(kind: str, names: str, official: Callable[..., Any], clip: Callable[..., Any]) -> None:
    """In float64, whole and in tiles, to rounding."""
    model = official(**KINDS[kind])
    vae = load(NAMES[names](model.state_dict()), dtype=torch.float64)
    assert vae.family == "image-vae"
    assert vae.info.latent_channels == KINDS[kind]["latent_channels"]
    assert vae.info.time_compression == 1
    video, latent = (x.double() for x in clip(vae.info.latent_channels))
    expected = by_diffusers(model.double(), video, latent)
    for plan in (None, TilePlan(tile=3), TilePlan(tile=(2, None), offload=True)):
        for got, right in zip(by_us(vae, video, latent, plan), expected, strict=True):
            assert error(got, right) <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_is_as_exact_as_diffusers_in_float32(kind: str, official: Callable[..., Any], clip: Callable[..., Any]) -> None:
    """From the result in float64: 1e-5 of its standard deviation, or what float32 itself costs such small networks."""
    model = official(**KINDS[kind])
    vae = load(model.state_dict())
    video, latent = clip(vae.info.latent_channels)
    theirs, ours = by_diffusers(model, video, latent), by_us(vae, video, latent)
    expected = by_diffusers(model.double(), video.double(), latent.double())
    for their, our, right in zip(theirs, ours, expected, strict=True):
        assert error(our, right) <= max(1e-5, 1.5 * error(their, right))


def test_draws_are_from_diffusers_posterior(official: Callable[..., Any]) -> None:
    """With logvar clamped as there, -30 to 20: beyond, a draw would be another, or infinite."""
    model = official(**KINDS["SD 1.x, 2.x and SDXL"])
    with torch.no_grad():
        model.quant_conv.bias[4:] += torch.tensor([-60.0, 25.0, 90.0, 0.0])
    vae = load(model.state_dict())
    video = torch.rand(1, 3, 1, 16, 16) * 2 - 1
    got = vae.encode(video, sample=True, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        posterior = model.encode(video[:, :, 0]).latent_dist
        noise = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))[:, :, 0]
        expected = posterior.mean + posterior.std * noise
    assert got.isfinite().all()
    torch.testing.assert_close(got[:, :, 0], expected, rtol=1e-4, atol=1e-4)
    assert error(vae.encode(video)[:, :, 0], posterior.mean) <= 2e-5


def test_the_encoder_of_svd_is_one(drawn: Callable[[Any], Any]) -> None:
    """Its decoder, over time, is another network; what is loaded says which half it has."""
    model = drawn(
        diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32, 64, 96),
            down_block_types=("DownEncoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
        )
    )
    vae = load(model.state_dict())
    assert vae.info.halves == ("encode",)
    video = torch.rand(1, 3, 2, 16, 24) * 2 - 1
    with torch.no_grad():
        mean = torch.stack([model.encode(frame).latent_dist.mean for frame in video.unbind(2)], dim=2)
    assert error(vae.encode(video), mean) <= 2e-5
    with pytest.raises(ValueError, match="have no decoder, so they cannot decode"):
        vae.decode(mean)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_half_alone_is_a_vae(half: str, official: Callable[..., Any]) -> None:
    state = original(official(**KINDS["two blocks"]).state_dict())
    own = {"encoder": ("encoder.", "quant_conv."), "decoder": ("decoder.", "post_quant_conv.")}[half]
    vae = load({name: tensor for name, tensor in state.items() if name.startswith(own)})
    whole = load(state)
    latent = torch.randn(1, 4, 2, 3, 2)
    if half == "decoder":
        assert torch.equal(vae.decode(latent), whole.decode(latent))
    else:
        assert torch.equal(
            vae.encode(latent[:, :3].repeat_interleave(8, -1).repeat_interleave(8, -2)),
            whole.encode(latent[:, :3].repeat_interleave(8, -1).repeat_interleave(8, -2)),
        )


@pytest.mark.parametrize(
    "name",
    [
        "encoder.down.3.block.0.conv1.weight",
        "decoder.up.3.block.0.conv1.weight",
        "encoder.conv_in.bias",
        "decoder.mid.attn_1.k.bias",
    ],
)
def test_a_missing_tensor_is_named(name: str, official: Callable[..., Any]) -> None:
    state = original(official(latent_channels=4).state_dict())
    del state[name]
    with pytest.raises(CheckpointError, match=re.escape(name.removesuffix(".weight"))):
        load(state)


def test_the_vae_says_what_its_file_says(official: Callable[..., Any]) -> None:
    """Scaling is the sampler's; a file's own numbers come first."""
    info = load(official(**KINDS["SD 1.x, 2.x and SDXL"]).state_dict()).info
    assert (info.scale_factor, info.shift_factor, info.scaled_by) == (0.18215, 0.0, "sampler")
    assert isinstance(load("demo-image-vae"), VideoVAE)
