"""Apply and Train SVD Output Adapter, on a small SVD with random weights, in ComfyUI's own sampler and LoRA loader."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from .checkout import ROOT
from .inprocess import CancelledRunError, Comfy, NodeError, Progress, RefusedError
from .svd import small_svd
from .svd_model import conditions, empty, ksampler, long_model, random_images, small_clip_vision, small_image_vae
from .weights import SMALL

WIDTH = 32  # features of the small model
KEYS = {"diffusion_model.out.2.diff", "diffusion_model.out.2.diff_b"}
TRAIN = {
    "folder": "clips",
    "steps": 30,
    "method": "gradient descent",
    "learning_rate": 2e-3,
    "seed": 1,
    "save_name": "small",
    "resume": False,
    "frames": 9,
    "width": 64,
    "height": 64,
    "ridge": 0.001,
}


@pytest.fixture
def loras(comfy: Comfy) -> Iterator[Path]:
    """models/loras, and output/adapters, empty again after the test."""
    folder = Path(comfy.module("folder_paths").get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    for path in (*folder.iterdir(), *_kept(comfy).glob("*")):
        path.unlink()


@pytest.fixture
def train(comfy: Comfy, loras: Path, load_vae: Callable[..., Any], tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Train SVD Output Adapter on the demo clip, which has a cut: four clips of nine frames."""
    folder = comfy.base / "input" / "clips"
    folder.mkdir()
    shutil.copy(ROOT / "vae_core" / "demo" / "demo_clip.mp4", folder / "clip.mp4")
    models = {
        "clip_vision": small_clip_vision(comfy, tmp_path),
        "image_vae": small_image_vae(comfy),
        "vae": load_vae(SMALL["cv"]),
    }

    def run(model: Any, **changes: Any) -> tuple[str, Tensor, str]:
        return comfy.call("CVIV_TrainSVDAdapter", model=model, **{**models, **TRAIN, **changes})

    yield run
    shutil.rmtree(folder)


def _kept(comfy: Comfy) -> Path:
    return comfy.base / "output" / "adapters"


def _apply(comfy: Comfy, model: Any, name: str, strength: float = 1.0, precise: bool = True) -> Any:
    (patched,) = comfy.call("CVIV_ApplySVDAdapter", model=model, adapter=name, strength=strength, precise=precise)
    return patched


def _difference(seed: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, WIDTH, 3, 3, generator=generator) * 0.02, torch.randn(4, generator=generator) * 0.02


def _write(comfy: Comfy, folder: Path, name: str, seed: int = 5) -> None:
    core = comfy.pack("vae_core.svd.adapter")
    core.save_adapter(folder / name, core.output_layer(*_difference(seed)))


def _tuned(comfy: Comfy, weight: Tensor, bias: Tensor) -> Any:
    """The small model with these numbers added to its output layer."""
    model = small_svd(comfy)
    with torch.no_grad():
        model.model.diffusion_model.out[2].weight += weight
        model.model.diffusion_model.out[2].bias += bias
    return model


def _sample(comfy: Comfy, model: Any) -> Tensor:
    return ksampler(comfy, model, conditions(random_images()), empty(3, size=8))


def _texts(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("precise", [True, False])
def test_the_adapter_changes_the_samples_and_comes_off_again(comfy: Comfy, loras: Path, precise: bool) -> None:
    _write(comfy, loras, "a.safetensors")
    model = small_svd(comfy)
    plain = _sample(comfy, model)
    weight, bias = _difference()
    for strength in (1.0, 0.5, 2.0):
        got = _sample(comfy, _apply(comfy, model, "a.safetensors", strength, precise))
        wanted = _sample(comfy, _tuned(comfy, weight * strength, bias * strength))
        assert (wanted - plain).abs().max() > 1e-2
        assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert torch.equal(_sample(comfy, model), plain)


@pytest.mark.parametrize("precise", [True, False])
def test_strength_zero_is_the_model_itself(comfy: Comfy, loras: Path, precise: bool) -> None:
    _write(comfy, loras, "a.safetensors")
    model = small_svd(comfy)
    plain = _sample(comfy, model)
    assert torch.equal(_sample(comfy, _apply(comfy, model, "a.safetensors", 0.0, precise)), plain)


def test_two_adapters_add_up_whichever_ran_before(comfy: Comfy, loras: Path) -> None:
    _write(comfy, loras, "a.safetensors", seed=5)
    _write(comfy, loras, "b.safetensors", seed=6)
    model = small_svd(comfy)
    first = _apply(comfy, model, "a.safetensors")
    _sample(comfy, first)  # its layer now stands in the network that both share
    second = _sample(comfy, _apply(comfy, model, "b.safetensors"))
    both = _sample(comfy, _apply(comfy, first, "b.safetensors"))
    one, other = _difference(5), _difference(6)
    for got, (weight, bias) in ((second, other), (both, (one[0] + other[0], one[1] + other[1]))):
        wanted = _sample(comfy, _tuned(comfy, weight, bias))
        assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("mode", ["windows", "continuation"])
def test_it_works_on_either_side_of_long_video(comfy: Comfy, loras: Path, mode: str) -> None:
    _write(comfy, loras, "a.safetensors")
    model, conds, latent = small_svd(comfy), conditions(random_images()), empty(12, size=8)
    wanted = ksampler(comfy, long_model(comfy, _tuned(comfy, *_difference()), 12, mode=mode), conds, latent)
    before = long_model(comfy, _apply(comfy, model, "a.safetensors"), 12, mode=mode)
    after = _apply(comfy, long_model(comfy, model, 12, mode=mode), "a.safetensors")
    for patched in (before, after):
        got = ksampler(comfy, patched, conds, latent)
        assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_the_stock_lora_loader_reads_the_same_file(comfy: Comfy, loras: Path) -> None:
    _write(comfy, loras, "a.safetensors")
    model = small_svd(comfy)
    for strength in (1.0, 0.3):
        ours = _sample(comfy, _apply(comfy, model, "a.safetensors", strength))
        (patched,) = comfy.call("LoraLoaderModelOnly", model=model, lora_name="a.safetensors", strength_model=strength)
        stock = _sample(comfy, patched)
        assert (ours - stock).abs().max() < 1e-4 * stock.abs().max()
        assert (ours - _sample(comfy, model)).abs().max() > 1e-3


def test_a_small_difference_survives_a_model_in_bf16(comfy: Comfy, loras: Path) -> None:
    """What it changes in one pass, against the same in float32; as a patch of the weights most of it is lost."""
    core = comfy.pack("vae_core.svd.adapter")
    difference = core.output_layer(*_difference()).times(1e-3)
    core.save_adapter(loras / "tiny.safetensors", difference)
    model = small_svd(comfy)
    model.model.diffusion_model.to(torch.bfloat16)
    model.model.diffusion_model.dtype = torch.bfloat16
    features: list[Tensor] = []
    out: dict[str, Tensor] = {}
    for name, patched in (
        ("plain", model),
        ("precise", _apply(comfy, model, "tiny.safetensors")),
        ("rounded", _apply(comfy, model, "tiny.safetensors", precise=False)),
    ):
        comfy.module("comfy.model_management").load_models_gpu([patched])
        network = patched.model.diffusion_model
        handle = network.out[2].register_forward_pre_hook(lambda layer, inputs: features.append(inputs[0].clone()))
        with torch.inference_mode():
            out[name] = network(
                torch.ones(3, 8, 8, 8, dtype=torch.bfloat16), torch.zeros(3), torch.ones(3, 1, 1024).bfloat16(),
                torch.ones(3, 768).bfloat16(), num_video_frames=3,
                transformer_options={"wrappers": patched.wrappers},
            ).float()  # fmt: skip
        handle.remove()
    wanted = difference.run(features[0])
    share = {name: float(((out[name] - out["plain"]) * wanted).sum() / wanted.square().sum()) for name in out}
    assert share["precise"] == pytest.approx(1.0, abs=0.01)
    assert share["rounded"] < 0.9


@pytest.mark.parametrize("method", ["gradient descent", "ridge regression"])
def test_training_lowers_the_held_out_loss_and_its_file_gives_the_trained_samples(
    comfy: Comfy, train: Callable[..., Any], loras: Path, method: str
) -> None:
    model = small_svd(comfy)
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    path, curve, report = train(model, method=method)
    assert Path(path) == loras / "small.safetensors"
    texts = _texts(Path(path))
    assert float(texts["held_out_loss_after"]) < 0.95 * float(texts["held_out_loss_before"])
    assert "4 clips, 1 of them held out" in report
    assert "30 steps in all" in report
    assert curve.shape[0] == 1
    assert curve.shape[-1] == 3
    assert (_kept(comfy) / "small.png").is_file()
    found = load_file(path)
    assert found.keys() == KEYS
    assert sum(tensor.numel() for tensor in found.values()) == 9 * WIDTH * 4 + 4
    after = model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(parameter.requires_grad for parameter in model.model.diffusion_model.parameters())
    layer = model.model.diffusion_model.out[2]
    assert not layer._forward_pre_hooks
    assert not layer._forward_hooks
    applied = _apply(comfy, model, "small.safetensors")
    difference = found["diffusion_model.out.2.diff"], found["diffusion_model.out.2.diff_b"]
    got, wanted = _sample(comfy, applied), _sample(comfy, _tuned(comfy, *difference))
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (got - _sample(comfy, model)).abs().max() > 1e-3
    if method == "gradient descent":
        trained = load_file(_kept(comfy) / "small.state.safetensors")["weight"]
        assert (trained - before["diffusion_model.out.2.weight"] - difference[0]).abs().max() < 1e-7


def test_a_cancelled_training_goes_on_to_the_same_bits(comfy: Comfy, train: Callable[..., Any], loras: Path) -> None:
    model, widgets = small_svd(comfy), {"steps": 6, "save_name": "whole"}
    path, _, _ = train(model, **widgets)
    whole = load_file(path)

    def cancel(report: Progress) -> None:
        if report.total == 6 + 8 and report.value == 1:  # eight passes compare the layers at the end
            comfy.module("nodes").interrupt_processing(True)

    comfy.on_progress = cancel
    with pytest.raises(CancelledRunError, match="CVIV_TrainSVDAdapter"):
        train(model, steps=6, save_name="cut")
    comfy.on_progress = None
    state = _kept(comfy) / "cut.state.safetensors"
    assert len(load_file(state)["losses"]) == 1
    assert not (loras / "cut.safetensors").exists()
    with pytest.raises(NodeError, match=r"already cut.state.safetensors in adapters/.*switch resume on"):
        train(model, steps=6, save_name="cut")
    with pytest.raises(NodeError, match=r"had seed 1, not 2"):
        train(model, steps=6, save_name="cut", resume=True, seed=2)
    path, _, report = train(model, steps=6, save_name="cut", resume=True)
    assert "6 steps in all" in report
    found = load_file(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    path, _, report = train(model, steps=8, save_name="cut", resume=True)
    assert "8 steps in all, 2 now, from step 6 on" in report
    assert not torch.equal(load_file(path)["diffusion_model.out.2.diff"], whole["diffusion_model.out.2.diff"])


def test_latent_files_are_trained_on(
    comfy: Comfy, train: Callable[..., Any], load_vae: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comfy.pack("vae_core.svd.scenes"), "_CUT", 1.0)  # random weights decode to something like cuts
    folder, latents = comfy.base / "input" / "clips", comfy.pack("vae_core.media.latents")
    (folder / "clip.mp4").unlink()
    meta = latents.LatentMeta(family="cv-vae", fps=24, frames=13, height=64, width=64)
    z = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents.save_latent(folder / "one.latent.safetensors", z, meta)
    _, _, report = train(small_svd(comfy), steps=2)
    assert report.startswith("one clip, so the held-out loss is of the same clip")
    latents.save_latent(
        folder / "two.latent.safetensors", torch.randn(1, 16, 4, 8, 8), latents.LatentMeta(
            family="cv-vae-sd3", fps=24, frames=13, height=64, width=64))  # fmt: skip
    with pytest.raises(NodeError, match=r"two.latent.safetensors is a latent of cv-vae-sd3 with 16 channels"):
        train(small_svd(comfy), steps=2, save_name="other")
    (folder / "two.latent.safetensors").unlink()
    meta = latents.LatentMeta(family="cv-vae", fps=24, frames=13, height=64, width=72)
    latents.save_latent(folder / "wide.latent.safetensors", torch.randn(1, 4, 4, 8, 9), meta)
    with pytest.raises(NodeError, match=r"wide.latent.safetensors is a latent of 72x64 pixels"):
        train(small_svd(comfy), steps=2, save_name="other")


def test_refusals(comfy: Comfy, train: Callable[..., Any], load_vae: Callable[..., Any], loras: Path) -> None:
    model = small_svd(comfy)
    for name in ("../evil", "a/b", "", "con", "x."):
        with pytest.raises(RefusedError, match="give a plain name"):
            train(model, save_name=name)
    for folder in ("..", "../../etc", "/etc", " "):
        with pytest.raises(RefusedError, match="give the name of one in input/"):
            train(model, folder=folder)
    for name, told in (("iv", "whose latent space is not SVD's"), ("image", "which makes a latent of every frame")):
        with pytest.raises(NodeError, match=f"The input vae is {name}-vae, {told}"):
            train(model, vae=load_vae(SMALL[name]))
    with pytest.raises(NodeError, match="There is no folder 'nothing'"):
        train(model, folder="nothing")
    with pytest.raises(NodeError, match="The size is 100x64"):
        train(model, width=100)
    with pytest.raises(RefusedError, match="There is no adapter"):
        _apply(comfy, model, "missing.safetensors")
    with pytest.raises(RefusedError, match="choose a file of the list"):
        _apply(comfy, model, "../x.safetensors")
    _write(comfy, loras, "a.safetensors")
    with pytest.raises(NodeError, match="The output layer of this model is already changed"):
        train(_apply(comfy, model, "a.safetensors"))
    core = comfy.pack("vae_core.svd.adapter")
    core.save_adapter(loras / "wide.safetensors", core.output_layer(torch.zeros(4, 320, 3, 3), torch.zeros(4)))
    with pytest.raises(NodeError, match=r"shape \(4, 320, 3, 3\) and the model has \(4, 32, 3, 3\)"):
        _apply(comfy, model, "wide.safetensors")
    with pytest.raises(NodeError, match=r"works on SVD \(SVD_img2vid\) alone"):
        _apply(comfy, small_image_vae(comfy).patcher, "a.safetensors")
