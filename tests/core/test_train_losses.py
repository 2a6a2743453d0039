"""The terms of the loss: each against its formula, and where its gradient goes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from vae_core.door.loading import official_state, save
from vae_core.errors import CheckpointError
from vae_core.metrics import LPIPS
from vae_core.training.coders import FrameByFrame, VideoCoder, read_image_model
from vae_core.training.config import DiscriminatorConfig, LossConfig, OptimizerConfig, RegularizationConfig
from vae_core.training.discriminator import PatchDiscriminator, halve
from vae_core.training.draws import draw
from vae_core.training.inflation import inflate
from vae_core.training.iv_image import IVImageConfig, IVImageVAE
from vae_core.training.losses import (
    LossError,
    adaptive_weight,
    discriminator_hinge,
    find_lpips,
    kl_divergence,
    likelihood,
    lpips_frames,
    pixel_distance,
)
from vae_core.training.networks import Networks
from vae_core.training.objective import Objective, Trained, check_channels
from vae_core.training.regularization import MAPPINGS, decoded_frames, encoded_frames, map_frames
from vae_core.training.schedule import Optimizers, moving_average, moving_share, rate_factor
from vae_core.training.sources import frozen_image_vae

from .image_vae_2d import our_image_vae
from .small_training import small_config


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_likelihood_and_kl_are_the_published_sums() -> None:
    distance, log_variance = torch.rand(2, 3, 5, 4, 6), torch.tensor(-1.5)
    expected = [(frame / math.exp(-1.5) - 1.5).sum() for clip in distance for frame in clip.unbind(1)]
    assert torch.allclose(likelihood(distance, log_variance), torch.stack(expected).mean())
    mean, logvar = torch.randn(2, 4, 2, 3, 3), torch.randn(2, 4, 2, 3, 3)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))
    assert torch.allclose(kl_divergence(mean, logvar), kl.sum() / 2)
    assert torch.isfinite(kl_divergence(mean, logvar + 1000))  # clamped as everywhere
    assert torch.equal(pixel_distance(distance, 0 * distance, "l2"), distance.square())


def test_hinge_and_adaptive_weight() -> None:
    assert discriminator_hinge(torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0])) == 0.5 * (0.5 + 1.0)
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    loss, adversarial = (weight * torch.tensor([3.0, 4.0])).sum(), (weight * torch.tensor([0.0, 0.5])).sum()
    found = adaptive_weight(loss, adversarial, [weight])
    assert float(found) == pytest.approx(5 / 0.5001)
    assert not found.requires_grad
    assert float(adaptive_weight(loss, 1e-9 * adversarial, [weight])) == 1e4


def _numbered(clips: int, frames: int) -> Tensor:
    numbers = torch.arange(frames, dtype=torch.float32) + 100 * torch.arange(clips)[:, None]
    return numbers[:, None, :, None, None].expand(clips, 3, frames, 2, 2)


@pytest.mark.parametrize(
    ("mapping", "kept"),
    [("first", [0]), ("slice", [0, 4, 8]), ("average", [0, 2.5, 6.5]), ("random", [0, 3, 5])],
)
def test_which_frames_stand_for_the_latents(mapping: str, kept: list[float]) -> None:
    video = _numbered(2, 9)
    draws = torch.tensor([[2, 0], [3, 1]])
    found = map_frames(video, mapping, draws)[:, 0, :, 0, 0]
    assert found[0].tolist() == kept
    expected = [0.0, 4.0, 6.0] if mapping == "random" else kept
    assert (found[1] - 100).tolist() == expected  # each clip has its own draws
    assert torch.equal(map_frames(video[:, :, :1], mapping, draws[:, :0]), video[:, :, :1])


def test_draws_do_not_depend_on_who_draws() -> None:
    whole = draw((4, 3, 9, 16, 24), 4, seed=1, index=7, first=0)
    parts = [draw((2, 3, 9, 16, 24), 4, seed=1, index=7, first=first) for first in (0, 2)]
    assert torch.equal(whole.noise, torch.cat([part.noise for part in parts]))
    assert torch.equal(whole.frames, torch.cat([part.frames for part in parts]))
    assert whole.noise.shape == (4, 4, 3, 2, 3)
    for other in (
        draw((4, 3, 9, 16, 24), 4, seed=1, index=8, first=0),
        draw((4, 3, 9, 16, 24), 4, seed=2, index=7, first=0),
    ):
        assert not torch.isclose(whole.noise, other.noise).any()
    many = draw((64, 3, 17, 8, 8), 1, seed=0, index=0, first=0).frames
    assert set(many.flatten().tolist()) == {0, 1, 2, 3}


def _image_vae() -> FrameByFrame:
    return our_image_vae().eval().requires_grad_(False)


def test_the_frozen_image_vae_passes_gradients_and_takes_none() -> None:
    image_vae = _image_vae()
    latent = torch.randn(2, 4, 3, 2, 2, requires_grad=True)
    frames = decoded_frames(image_vae, latent)
    assert frames.shape == (2, 3, 3, 16, 16)
    assert torch.allclose(frames[1, :, 2], image_vae.decode(latent[1:, :, 2])[0][0], atol=1e-5)
    frames[1, :, 2].sum().backward()
    assert latent.grad is not None
    assert latent.grad[1, :, 2].abs().min() > 0
    assert latent.grad[0].abs().max() == 0
    assert all(p.grad is None for p in image_vae.parameters())
    video = torch.rand(2, 3, 3, 16, 16) * 2 - 1
    assert torch.allclose(encoded_frames(image_vae, video)[0, :, 1], image_vae.encode(video[:1, :, 1])[0][0], atol=1e-5)


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("side", ["decoder", "encoder"])
def test_regularization_reaches_the_half_it_is_for(mapping: str, side: str, small_vae, recipe) -> None:
    model = small_vae("cv-vae", torch.float32).model.requires_grad_(True)
    config = RegularizationConfig(
        image_vae="", mapping=mapping, decoder=float(side == "decoder"), encoder=float(side == "encoder")
    )
    trained = Trained(VideoCoder(model, checkpointing=True), config)
    assert set(trained.log_variances) == {"reconstruction", side}
    objective = Objective(loss=LossConfig(lpips_weight=0.0), regularization=config, image_vae=_image_vae())
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    draws = draw(tuple(video.shape), 4, seed=0, index=0, first=0)
    total = objective(trained, video, draws, adversarial=False)
    figures = objective.figures
    assert set(figures) == {"l1", "nll", "kl", f"{side}_regularization", "total"}
    own = total - figures["nll"] - 1e-6 * figures["kl"]
    assert float(own.detach()) == pytest.approx(float(figures[f"{side}_regularization"]) * 3 * 16 * 16, rel=1e-4)
    own_only = Objective(loss=LossConfig(lpips_weight=0.0, kl_weight=0.0), regularization=config)
    own_only.image_vae = objective.image_vae
    latent = torch.randn(1, 4, 2, 2, 2, requires_grad=True)
    own_only._regularization(trained, config, latent, video, draws).backward()
    assert (latent.grad is None or latent.grad.abs().max() == 0) == (side == "encoder")
    touched = any(p.grad is not None for p in model.decoder.parameters())
    assert touched == (side == "encoder")


def test_a_regularization_by_other_latents_is_refused() -> None:
    coder = VideoCoder(frozen_image_vae("demo-iv-vae").model, checkpointing=False)  # 16 channels
    with pytest.raises(ValueError, match="image VAE x has latents of 4 channels, and the video VAE of 16: regularize"):
        check_channels(coder, _image_vae(), "x")


@pytest.mark.parametrize("attention", [False, True])
def test_an_image_vae_is_read_as_the_network_it_was(attention: bool, tmp_path: Path) -> None:
    model = our_image_vae(attention=attention).requires_grad_(False)
    VideoCoder(model.model, checkpointing=False).save(tmp_path / "image.safetensors")
    read = frozen_image_vae(str(tmp_path / "image.safetensors"))
    picture = torch.rand(2, 3, 16, 24) * 2 - 1
    assert torch.equal(read.encode(picture)[0], model.encode(picture)[0])
    assert torch.equal(read.decode(torch.ones(1, 4, 2, 2))[0], model.decode(torch.ones(1, 4, 2, 2))[0])
    assert not any(p.requires_grad for p in read.parameters())


def test_an_iv_image_vae_is_read_too(tmp_path: Path) -> None:
    model = IVImageVAE(IVImageConfig(dim=4, latent_channels=8, halves=2))
    save_file(model.state_dict(), tmp_path / "image.safetensors")
    read = read_image_model(str(tmp_path / "image.safetensors"))
    picture = torch.rand(1, 3, 16, 16)
    assert torch.equal(read.encode(picture)[1], model.encode(picture)[1])


def test_an_inflated_video_vae_stands_for_its_image_vae(tmp_path: Path) -> None:
    image = _image_vae()
    save(inflate([official_state(image.model)]).vae, tmp_path / "video.safetensors")
    frozen = frozen_image_vae(str(tmp_path / "video.safetensors"))
    picture = torch.rand(2, 3, 16, 24) * 2 - 1
    mean, logvar = image.encode(picture)
    assert torch.allclose(frozen.encode(picture)[0], mean, atol=1e-5)
    assert torch.allclose(frozen.encode(picture)[1], logvar, atol=1e-5)
    assert torch.allclose(frozen.decode(mean)[0], image.decode(mean)[0], atol=1e-5)


# ------------------------------------------------------------------------------------------- discriminator, LPIPS


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_the_discriminator_scores_patches(frames: int) -> None:
    model = PatchDiscriminator(32)
    scores = model(torch.randn(2, 3, frames, 32, 48))
    assert scores.shape == (2, 1, {1: 1, 5: 1, 17: 3}[frames], 4, 6)
    with pytest.raises(ValueError, match=r"discriminator.width is 48; needed is a multiple of 32"):
        PatchDiscriminator(48)


def test_the_discriminator_is_the_published_one(tmp_path: Path) -> None:
    """Names, sizes and order of the published training code, written out; its weights load."""
    torch.manual_seed(4)
    model, other = PatchDiscriminator(32), PatchDiscriminator(32)
    state = model.state_dict()
    widths = {"main.2": (32, 64), "main.5": (64, 128), "main.8": (128, 256), "main.11": (256, 256)}
    for block, (width_in, width) in widths.items():
        assert state[f"{block}.conv1.weight"].shape == (width, width_in, 3, 3, 3)
        assert (f"{block}.nin_shortcut.weight" in state) == (width_in != width)
    assert state["main.14.weight"].shape == (1, 256, 3, 3, 3)
    assert float(state["main.8.conv2.weight"].std()) == pytest.approx(0.02, rel=0.02)
    extra = {
        "loss.discriminator.main.2.temb_proj.weight": torch.zeros(64, 512),
        "encoder.conv_in.weight": torch.ones(2),
    }
    torch.save({"state_dict": {f"loss.discriminator.{k}": v for k, v in state.items()} | extra}, tmp_path / "a.ckpt")
    other.load_official(tmp_path / "a.ckpt")
    video = torch.randn(1, 3, 5, 32, 32)

    def written_out(x: Tensor) -> Tensor:
        def norm(x: Tensor, name: str) -> Tensor:
            return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

        def conv(x: Tensor, name: str, **options: int) -> Tensor:
            return F.conv3d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

        def half(x: Tensor) -> Tensor:
            x = torch.cat((x[:, :, :1], x), dim=2) if x.shape[2] % 2 else x
            return F.avg_pool3d(x, 2)

        x = F.leaky_relu(conv(x, "main.0", stride=2, padding=1), 0.2)
        for number, name in enumerate(widths):
            y = conv(F.silu(norm(x, f"{name}.norm1")), f"{name}.conv1", padding=1)
            x, y = (half(x), half(y)) if number < 2 else (x, y)
            y = conv(F.silu(norm(y, f"{name}.norm2")), f"{name}.conv2", padding=1)
            x = (conv(x, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in state else x) + y
            x = F.leaky_relu(norm(x, f"main.{int(name[5:]) + 1}"), 0.2)
        return conv(x, "main.14", padding=1)

    with torch.no_grad():
        assert torch.allclose(other(video), written_out(video), atol=1e-5)
    with pytest.raises(CheckpointError, match=r"of width 64, and the file holds one of width 32"):
        PatchDiscriminator(64).load_official(tmp_path / "a.ckpt")


def test_the_discriminator_has_a_rate_of_its_own(tmp_path: Path) -> None:
    config = small_config(tmp_path, discriminator=DiscriminatorConfig(width=32, learning_rate=2e-5))
    own = Networks(config, torch.device("cpu")).discriminator_optimizers
    assert own is not None
    assert [own.step(step, 6)[1] for step in range(6)] == [2e-5] * 6
    falling = replace(config, discriminator=DiscriminatorConfig(width=32, learning_rate=2e-5, schedule="cosine"))
    own = Networks(falling, torch.device("cpu")).discriminator_optimizers
    assert own is not None
    assert [own.step(step, 6)[1] for step in (0, 1, 5)] == pytest.approx([1e-5, 2e-5, 2e-5 * 0.14645], rel=1e-3)


def test_an_odd_number_of_frames_repeats_the_first() -> None:
    x = torch.tensor([1.0, 3.0, 7.0]).view(1, 1, 3, 1, 1).expand(-1, -1, -1, 2, 2)
    assert halve(x).flatten().tolist() == [1.0, 5.0]


def test_lpips_has_the_values_of_the_metric_and_a_gradient() -> None:
    network = LPIPS("alex").requires_grad_(False)
    for head in network.heads:
        nn.init.uniform_(head.weight)
    video = torch.rand(1, 3, 3, 40, 32) * 2 - 1
    other = (video * 0.5).requires_grad_(True)
    found = lpips_frames(network, other, video)
    assert found.shape == (1, 1, 3, 1, 1)
    assert torch.allclose(found.flatten(), network.frames(other, video), rtol=1e-4)
    found.sum().backward()
    assert other.grad is not None
    assert other.grad.abs().amax(dim=(0, 1, 3, 4)).min() > 0  # of every frame
    with pytest.raises(LossError, match=r"at least 32 x 32 pixels; the crops are 16 x 32. Train on larger crops"):
        lpips_frames(network, other[..., :16, :], video[..., :16, :])


def test_a_missing_network_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(LossError, match=r"lpips_weight is 0.5, and the network .* or set loss.lpips_weight = 0"):
        find_lpips(None, 0.5)


# ---------------------------------------------------------------------------------------------------- optimizers


def test_the_learning_rate_warms_up_and_falls() -> None:
    factors = [rate_factor(step, 110, warm_up=10, least=0.1) for step in range(111)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors[60] == pytest.approx(0.55)
    assert factors[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizers_go_on_from_their_state(kind: str) -> None:
    def make() -> tuple[nn.Module, Optimizers]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3))
        return model, Optimizers(model, OptimizerConfig(learning_rate=0.01, kind=kind, warm_up=0), output_layer="1.")

    def train(model: nn.Module, optimizers: Optimizers, steps: range) -> None:
        for step in steps:
            model(torch.ones(1, 3, 8, 8) * step).square().sum().backward()
            optimizers.step(step, 6)

    model, optimizers = make()
    train(model, optimizers, range(6))
    first, first_optimizers = make()
    train(first, first_optimizers, range(3))
    second, second_optimizers = make()
    second.load_state_dict(first.state_dict())
    second_optimizers.load_state_dict(first_optimizers.state_dict())
    train(second, second_optimizers, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), second.parameters(), strict=True))


def test_gradients_that_are_not_finite_change_nothing() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    optimizers = Optimizers(model, OptimizerConfig(learning_rate=0.1))
    (model(torch.ones(1, 2)).sum() * torch.inf).backward()
    norm, _ = optimizers.step(0, 10)
    assert not math.isfinite(norm)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(("kind", "share_of_all"), [("apart", 1.0), ("together", 0.1)])
def test_the_log_variance_leaves_the_gradient_to_the_others(kind: str, share_of_all: float) -> None:
    """Summed over a frame, its gradient is of the size of the frame: in one norm, it takes all the others away."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv3d(3, 3, 1)
            self.log_variances = nn.ParameterDict({"reconstruction": nn.Parameter(torch.zeros(()))})

    network = Network()
    nn.init.zeros_(network.layer.weight)
    nn.init.zeros_(network.layer.bias)
    optimizers = Optimizers(
        network, OptimizerConfig(learning_rate=1e-3, clip_log_variances=kind), apart="log_variances."
    )
    video = torch.randn(1, 3, 1, 64, 64) * 0.02
    distance = pixel_distance(network.layer(video), video, "l2")
    likelihood(distance, network.log_variances["reconstruction"]).backward()
    assert float(network.log_variances["reconstruction"].grad) > 10_000  # type: ignore[arg-type]
    clipped: dict[str, Tensor] = {}
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    for optimizer in optimizers._optimizers:
        optimizer.register_step_pre_hook(
            lambda used, *_: clipped.update(
                {names[id(p)]: p.grad.clone() for group in used.param_groups for p in group["params"]}
            )
        )
    optimizers.step(0, 10)
    norm = float(torch.cat([gradient.flatten() for name, gradient in clipped.items() if "layer" in name]).norm())
    assert (norm == pytest.approx(1, rel=1e-3)) if share_of_all == 1 else norm < share_of_all
    assert float(clipped["log_variances.reconstruction"].abs()) <= 1


def test_a_moving_average_warms_up() -> None:
    assert [moving_share(n, 0.999) for n in (0, 10, 100_000)] == [0.1, 0.55, 0.999]
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    warmed = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=moving_average(0.999))
    for step in range(1, 41):
        nn.init.constant_(model.weight, step / 40)
        warmed.update_parameters(model)
    assert float(warmed.module.weight.detach()) > 0.85  # with 0.999 from the start it would be 0.04
