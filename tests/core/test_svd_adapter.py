"""The output adapter of SVD: its file, the maths of its training, and that a training can be stopped anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from vae_core.errors import CheckpointError
from vae_core.pictures.losses import SIZE, draw_losses
from vae_core.svd import trainer as training
from vae_core.svd.adapter import OutputLayer, output_layer, read_adapter, save_adapter

WIDTH = 6
GRADIENT = training.TrainSettings(
    method="gradient descent", learning_rate=1e-2, ridge=1e-3, seed=3, fingerprint="clips"
)
RIDGE = training.TrainSettings(method="ridge regression", learning_rate=1e-2, ridge=1e-3, seed=3, fingerprint="clips")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(seed: int, width: int = WIDTH) -> OutputLayer:
    return output_layer(random(4, width, 3, 3, seed=seed), random(4, seed=seed + 100))


def batch(step: int, wanted: OutputLayer) -> tuple[Tensor, Tensor]:
    features = random(3, WIDTH, 5, 7, seed=1000 + step)
    return features, wanted.run(features)


def train(trainer: training.AdapterTrainer, stop: int, wanted: OutputLayer) -> None:
    while trainer.steps < stop:
        trainer.step(*batch(trainer.steps, wanted))


@pytest.mark.parametrize("sigma", [0.002, 0.5, 3.0, 700.0])
def test_the_weighted_error_of_the_estimate_is_the_plain_error_of_the_network(sigma: float) -> None:
    x0, noise, output = (random(2, 4, 3, 5, seed=seed).double() for seed in range(3))
    x = x0 + sigma * noise
    estimate = training.c_skip(sigma) * x + training.c_out(sigma) * output
    weighted = training.loss_weight(sigma) * (estimate - x0).square().mean()
    plain = (output - training.network_target(x0, noise, sigma)).square().mean()
    assert float(weighted / plain) == pytest.approx(1.0, rel=1e-6)
    assert training.c_in(sigma) * float(torch.tensor(sigma**2 + 1).double().sqrt()) == pytest.approx(1.0, rel=1e-6)


def test_draws_depend_on_seed_and_step_alone() -> None:
    shapes = [(5, 4, 2, 2), (3, 4, 2, 2)]
    one, again = training.draw(7, 12, shapes), training.draw(7, 12, shapes)
    assert (one.clip, one.sigma, one.dropped) == (again.clip, again.sigma, again.dropped)
    assert torch.equal(one.noise, again.noise)
    many = [training.draw(7, step, shapes) for step in range(2000)]
    logs = torch.tensor([d.sigma for d in many]).log()
    assert float(logs.mean()) == pytest.approx(training.SIGMA[0], abs=0.15)
    assert float(logs.std()) == pytest.approx(training.SIGMA[1], abs=0.15)
    assert {d.clip for d in many} == {0, 1}
    assert sum(d.dropped for d in many) / 2000 == pytest.approx(training.DROPPED, abs=0.03)
    assert all(tuple(d.noise.shape) == shapes[d.clip] for d in many)


def test_unfolded_rows_times_weights_are_the_convolution() -> None:
    one, features = layer(1), random(2, WIDTH, 4, 5)
    flat = torch.cat((one.weight.flatten(1), one.bias[:, None]), dim=1).T
    got = (training.unfolded(features) @ flat).reshape(2, 20, 4).transpose(1, 2).reshape(2, 4, 4, 5)
    assert (got - F.conv2d(features, one.weight, one.bias, padding=1)).abs().max() < 1e-5


@pytest.mark.parametrize("ridge", [1e-6, 0.3])
def test_the_closed_form_is_the_least_squares_solution(ridge: float) -> None:
    """Against torch.linalg.lstsq on rows to which the pull towards the old weights is added as further rows."""
    old, rows, wanted = layer(1), training.unfolded(random(3, WIDTH, 5, 6)).double(), random(90, 4, seed=9).double()
    got = training.solve_ridge(rows.T @ rows, rows.T @ wanted, old, ridge)
    size = rows.shape[1]
    pull = (ridge * float((rows.T @ rows).diagonal().mean())) ** 0.5 * torch.eye(size, dtype=torch.float64)
    start = torch.cat((old.weight.flatten(1), old.bias[:, None]), dim=1).T.double()
    found = torch.linalg.lstsq(torch.cat((rows, pull)), torch.cat((wanted, pull @ start)), driver="gelsd").solution
    assert (got.weight - found[:-1].T.reshape(old.weight.shape)).abs().max() < 1e-5
    assert (got.bias - found[-1]).abs().max() < 1e-5


def test_a_strong_ridge_keeps_the_old_weights() -> None:
    old, wanted = layer(1), layer(2)
    for ridge, limit in ((1e6, 1e-4), (1e-8, 30.0)):
        trainer = training.AdapterTrainer(old, training.TrainSettings(
            method="ridge regression", learning_rate=0.0, ridge=ridge, seed=0, fingerprint=""))  # fmt: skip
        train(trainer, 4, wanted)
        moved = (trainer.result() - old).weight.abs().max()
        assert moved < limit
    assert (trainer.result() - wanted).weight.abs().max() < 1e-3


def test_gradient_descent_is_adamw_on_the_whole_batch() -> None:
    old, wanted = layer(1), layer(2)
    trainer = training.AdapterTrainer(old, GRADIENT)
    weight, bias = (t.clone().requires_grad_(True) for t in (old.weight, old.bias))
    optimizer = torch.optim.AdamW([weight, bias], lr=GRADIENT.learning_rate)
    with torch.inference_mode():  # as inside a node
        train(trainer, 5, wanted)
    for step in range(5):
        features, target = batch(step, wanted)
        loss = F.mse_loss(F.conv2d(features, weight, bias, padding=1), target)
        assert trainer.losses[step] == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (trainer.result().weight - weight.detach()).abs().max() < 1e-5
    assert trainer.losses[-1] < trainer.losses[0]


@pytest.mark.parametrize("settings", [GRADIENT, RIDGE], ids=lambda s: s.method)
def test_a_resumed_training_ends_with_the_same_bits(settings: training.TrainSettings, tmp_path: Path) -> None:
    old, wanted = layer(1), layer(2)
    whole = training.AdapterTrainer(old, settings)
    train(whole, 9, wanted)
    for stop in (0, 4):
        path = tmp_path / f"{stop}.safetensors"
        first = training.AdapterTrainer(old, settings)
        train(first, stop, wanted)
        first.save(path)
        second = training.AdapterTrainer.resume(path, old, settings)
        assert second.steps == stop
        train(second, 9, wanted)
        assert second.losses == whole.losses
        assert torch.equal(second.result().weight, whole.result().weight)
        assert torch.equal(second.result().bias, whole.result().bias)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.safetensors", "4.safetensors"]


def test_another_training_is_not_resumed(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    training.AdapterTrainer(layer(1), GRADIENT).save(path)
    with pytest.raises(CheckpointError, match=r"had method 'gradient descent', not 'ridge regression'. Set"):
        training.AdapterTrainer.resume(path, layer(1), RIDGE)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        training.AdapterTrainer.resume(path, layer(2), GRADIENT)
    save_adapter(path, layer(1))
    with pytest.raises(CheckpointError, match="is no state of an adapter training"):
        training.AdapterTrainer.resume(path, layer(1), GRADIENT)


def test_values_that_are_not_finite_stop_the_training() -> None:
    trainer = training.AdapterTrainer(layer(1), GRADIENT)
    with pytest.raises(ValueError, match="The loss of step 1 is nan"):
        trainer.step(torch.full((1, WIDTH, 2, 2), float("nan")), torch.zeros(1, 4, 2, 2))


def test_the_file_comes_back_and_is_small(tmp_path: Path) -> None:
    path, difference = tmp_path / "a.safetensors", layer(1, width=320)
    save_adapter(path, difference, {"steps": "12"})
    assert load_file(path).keys() == {"diffusion_model.out.2.diff", "diffusion_model.out.2.diff_b"}
    assert sum(t.numel() for t in load_file(path).values()) == 11_524
    assert 46_096 < path.stat().st_size < 47_000
    found = read_adapter(path)
    assert (found.full, found.metadata["steps"]) == (False, "12")
    assert torch.equal(found.layer.weight, difference.weight)
    assert torch.equal(found.layer.bias, difference.bias)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("name", ["diffusion_model.out.2", "model.diffusion_model.out.2", "conv_out", "out.2"])
def test_a_full_layer_becomes_its_difference(name: str, tmp_path: Path) -> None:
    path, tuned, old = tmp_path / "full.safetensors", layer(1), layer(2)
    save_file({f"{name}.weight": tuned.weight, f"{name}.bias": tuned.bias}, path)
    difference = read_adapter(path).difference(old)
    assert (old + difference - tuned).weight.abs().max() < 1e-6
    assert torch.equal(difference.weight, tuned.weight - old.weight)
    with pytest.raises(CheckpointError, match=r"shape \(4, 6, 3, 3\) and the model has \(4, 8, 3, 3\)"):
        read_adapter(path).difference(layer(1, width=8))


def test_other_files_are_refused_with_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_adapter(path)
    path.write_bytes(b"\x89PNG" + bytes(100))
    with pytest.raises(CheckpointError, match="is a PNG image"):
        read_adapter(path)
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(CheckpointError, match=r"it holds lora_unet_x.lora_up.weight.*A LoRA belongs in a LoRA loader"):
        read_adapter(path)
    save_file({"conv_out.weight": torch.zeros(3, 6, 3, 3), "conv_out.bias": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"has shapes \(3, 6, 3, 3\)"):
        read_adapter(path)
    save_adapter(path, OutputLayer(weight=torch.full((4, 6, 3, 3), float("inf")), bias=torch.zeros(4)))
    with pytest.raises(CheckpointError, match="not finite"):
        read_adapter(path)
    with pytest.raises(CheckpointError, match=r"ends in \.safetensors"):
        save_adapter(tmp_path / "x.pth", layer(1))


def test_the_picture_of_the_losses() -> None:
    pictures = [draw_losses(losses, "training") for losses in ([], [1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0])]
    assert all(picture.size == SIZE and picture.mode == "RGB" for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == 4
