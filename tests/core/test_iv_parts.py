"""IV-VAE with other parts than the published ones: they load by themselves, stream, tile and train."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vae_core import CheckpointError, TilePlan, VideoVAE, load, save
from vae_core.door.loading import official_state
from vae_core.families.iv_vae import IV_VAE, IVVAE, PUBLISHED, IVParts, IVVAEConfig, TemporalConv
from vae_core.families.iv_vae.layers import CausalConv3d
from vae_core.nn.clip import Clip
from vae_core.nn.steps import Context, Memory, walk

CONFIG = IVVAEConfig(dim=8, latent_channels=4, scale_factor=1.3, shift_factor=0.1)
CONVS: tuple[TemporalConv, ...] = ("grouped-causal", "causal")
ALL = [
    IVParts(temporal_conv=conv, branches=branches, motion_perception=perception)
    for conv, branches, perception in itertools.product(CONVS, (2, 1), (True, False))
]


def name_of(parts: IVParts) -> str:
    return f"{parts.temporal_conv}-{parts.branches}-{'motion' if parts.motion_perception else 'plain'}"


@pytest.fixture(params=ALL, ids=name_of)
def vae(request: pytest.FixtureRequest) -> VideoVAE:
    torch.manual_seed(0)
    model = IV_VAE.network(replace(CONFIG, parts=request.param)).double()
    return VideoVAE(model.eval().requires_grad_(False))


@pytest.fixture
def video() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.rand(1, 3, 9, 24, 32, dtype=torch.float64) * 2 - 1


def test_the_parts_follow_from_the_weights(vae: VideoVAE, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save(vae, path)
    loaded = load(path, dtype=None)
    assert loaded.model.config == vae.model.config
    wrapped = {f"first_stage_model.{name}": tensor for name, tensor in official_state(vae.model).items()}
    assert load(wrapped, scale_factor=1.3, shift_factor=0.1).model.config == vae.model.config


def test_no_two_choices_have_the_same_names_and_shapes() -> None:
    with torch.device("meta"):
        states = [official_state(IV_VAE.network(replace(CONFIG, parts=parts))) for parts in ALL]
    assert len({frozenset((name, tensor.shape) for name, tensor in state.items()) for state in states}) == len(ALL)


def test_tiles_give_what_whole_frames_give(vae: VideoVAE, video: torch.Tensor) -> None:
    latent = vae.encode(video)
    assert (vae.encode(video, plan=TilePlan(tile=(2, 3))) - latent).abs().max() < 1e-12
    frames = vae.decode(latent)
    assert frames.shape == video.shape
    assert (vae.decode(latent, plan=TilePlan(tile=(2, 3))) - frames).abs().max() < 1e-12


def test_later_frames_do_not_change_earlier_latents(vae: VideoVAE, video: torch.Tensor) -> None:
    latent = vae.encode(video)
    changed = video.clone()
    changed[:, :, 5:] = 0
    assert torch.equal(vae.encode(changed)[:, :, :2], latent[:, :, :2])
    assert not torch.equal(vae.encode(changed)[:, :, 2], latent[:, :, 2])


def test_every_weight_is_trained(vae: VideoVAE, video: torch.Tensor) -> None:
    model = vae.model.train().requires_grad_(True)
    assert isinstance(model, IVVAE)
    model(video[:, :, :9]).square().sum().backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert unused == []


@pytest.mark.parametrize("plain", [False, True])
def test_a_causal_convolution_sees_no_later_frame_and_is_the_same_in_any_groups(plain: bool) -> None:
    torch.manual_seed(0)
    conv = CausalConv3d(3, 2).double()
    x = torch.randn(1, 3, 9, 6, 5, dtype=torch.float64)

    def fresh() -> Context:
        return Context(memory=Memory(), plain=plain)

    with torch.no_grad():
        whole = conv.run(x, fresh())
        for sizes in ((1, 4, 4), (1, 2, 2, 2, 2), (1,) * 9):
            at = fresh()
            runs = [conv.run(frames, at) for frames in x.split(list(sizes), dim=2)]
            assert (torch.cat(runs, dim=2) - whole).abs().max() < 1e-12
        x[:, :, 4:] = 0
        assert torch.equal(conv.run(x, fresh())[:, :, :4], whole[:, :, :4])
        repeated = torch.cat((x[:, :, :1], x[:, :, :1], x), dim=2)
        expected = torch.nn.functional.conv3d(repeated, conv.causal.weight, conv.causal.bias, padding=(0, 1, 1))
        assert (conv.run(x, fresh()) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("plain", [False, True])
def test_the_frames_of_a_group_see_each_other_only_where_it_is_grouped_causal(video: torch.Tensor, plain: bool) -> None:
    """Through the first layer alone: the second frame of a group of four, and what the fourth changes in it."""
    torch.manual_seed(0)
    changed = video.clone()
    changed[:, :, 4] = 0  # the last frame of the first group of four
    for parts in ALL:
        model = IV_VAE.network(replace(CONFIG, parts=parts)).double().requires_grad_(False)
        steps = model.steps("encode")[:3]
        outputs = []
        for clip in (video, changed):
            memory = Memory()
            for n, group in enumerate((clip[:, :, :1], clip[:, :, 1:5])):
                y = walk(steps, Clip([group.clone()]), Context(memory=memory, first=n == 0, plain=plain))
            outputs.append(y.tensor())
        differs = [not torch.equal(outputs[0][:, :, t], outputs[1][:, :, t]) for t in range(4)]
        grouped = parts.temporal_conv == "grouped-causal"
        assert differs == [grouped, grouped, grouped, True]


def test_the_default_is_the_published_network() -> None:
    assert CONFIG.parts == PUBLISHED
    assert IVParts() == PUBLISHED
    with torch.device("meta"):
        names = official_state(IV_VAE.network(CONFIG)).keys()
    assert {"encoder.conv1.conv_2d.weight", "encoder.head.2.PAC_0.conv.weight"} <= names
    assert len(names) == 362


def test_published_scaling_is_for_the_published_network_alone() -> None:
    with torch.device("meta"):
        states = [
            official_state(IV_VAE.network(replace(CONFIG, dim=64, latent_channels=16, parts=parts)))
            for parts in ALL[:2]
        ]
    configs = [IV_VAE.configure({name: tuple(t.shape) for name, t in state.items()}, {}) for state in states]
    assert [(config.scale_factor, config.shift_factor) for config in configs if isinstance(config, IVVAEConfig)] == [
        (0.9697, -0.1553),
        (1.0, 0.0),
    ]


def test_weights_without_a_part_are_named_as_incomplete(vae: VideoVAE) -> None:
    state = official_state(vae.model)
    del state["decoder.upsamples.1.residual.2.conv.weight" if not vae.model.config.parts.motion_perception  # type: ignore[union-attr]
              else "decoder.upsamples.2.residual.2.conv.weight"]  # fmt: skip
    with pytest.raises(CheckpointError, match=r"looks like iv-vae weights, but decoder\.upsamples\..* is missing"):
        load(state)
