"""Loading and saving: families, configs, names in both directions, strictness, scaling, RAM."""

from __future__ import annotations

import errno
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vae_core
from vae_core.door.loading import official_state
from vae_core.families import Family
from vae_core.families.cv_vae import CV_VAE, CV_VAE_SD3, CVVAEConfig
from vae_core.families.image_vae import IMAGE_VAE, ImageVAEConfig
from vae_core.families.iv_vae import IV_VAE, IVVAEConfig

ROOT = Path(__file__).parent.parent.parent
State = Callable[..., dict[str, Tensor]]


def _image_config(**changes: Any) -> ImageVAEConfig:
    """As SD 1.5's VAE, but for its size."""
    told = {"quantized": (True, True), "decoder_attention": True, "norm_eps": 1e-6, "latent_channels": 4}
    scaling = {"scale_factor": 0.18215, "shift_factor": 0.0}
    return ImageVAEConfig(widths=(32, 64, 32, 64), blocks_per_level=2, **{**told, **scaling, **changes})


CONFIGS: list[tuple[Family, Any]] = [
    (CV_VAE, CVVAEConfig(widths=(32, 64, 64, 96), blocks_per_level=1, latent_channels=4, sd3=False)),
    (CV_VAE, CVVAEConfig(widths=(64, 32, 32, 32), blocks_per_level=2, latent_channels=8, sd3=False)),
    (CV_VAE_SD3, CVVAEConfig(widths=(32, 32, 64, 32), blocks_per_level=3, latent_channels=16, sd3=True)),
    (IV_VAE, IVVAEConfig(dim=4, latent_channels=16, scale_factor=1.0, shift_factor=0.0)),
    (IV_VAE, IVVAEConfig(dim=12, latent_channels=8, scale_factor=1.0, shift_factor=0.0)),
    (IMAGE_VAE, _image_config()),
    (IMAGE_VAE, _image_config(quantized=(False, False), latent_channels=16, scale_factor=1.5305, shift_factor=0.0609)),
    (IMAGE_VAE, _image_config(quantized=(True, False), decoder_attention=False, norm_eps=1e-5)),
]
EACH = pytest.mark.parametrize(("made_by", "config"), CONFIGS, ids=[f"{a.id}-{i}" for i, (a, _) in enumerate(CONFIGS)])


@EACH
def test_family_and_config_are_inferred_from_the_weights(made_by: Family, config: Any, small_state: State) -> None:
    model = vae_core.load(small_state(config)).model
    assert model.family is made_by
    assert model.config == config


@EACH
def test_names_map_one_to_one_in_both_directions(made_by: Family, config: Any, small_state: State) -> None:
    state = small_state(config)
    with torch.device("meta"):
        names = made_by.key_map(made_by.network(config))
    assert len({theirs for theirs, _ in names.values()}) == len(names) == len(state)
    back = official_state(vae_core.load(state).model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@EACH
def test_each_half_loads_alone_and_says_what_it_cannot_do(
    made_by: Family, config: Any, small_state: State, tmp_path: Path
) -> None:
    state = small_state(config)
    whole = vae_core.load(state)
    names = made_by.key_map(whole.model)
    video, latent = torch.rand(1, 3, 5, 16, 16), torch.rand(1, config.latent_channels, 2, 2, 2)
    half = {"encode": "encoder.", "decode": "decoder."}
    inputs = {"encoder.": "to_moments.", "decoder.": "from_latent."}
    for direction, other in (("encode", "decode"), ("decode", "encode")):
        own = (half[direction], inputs[half[direction]])
        part = {theirs: state[theirs] for ours, (theirs, _) in names.items() if ours.startswith(own)}
        save_file(part, tmp_path / "half.safetensors", metadata={"norm_eps": str(getattr(config, "norm_eps", 0))})
        vae = vae_core.load(tmp_path / "half.safetensors")
        assert vae.info.halves == (direction,)
        assert vae.model.config == config or made_by is IMAGE_VAE  # of the absent half it cannot know all
        same = {"encode": lambda v: v.encode(video), "decode": lambda v: v.decode(latent)}
        torch.testing.assert_close(same[direction](vae), same[direction](whole))
        with pytest.raises(ValueError, match=rf"weights have no {half[other][:-1]}, so they cannot {other}"):
            same[other](vae)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_saved_file_holds_the_official_names_and_loads_again(
    family: str, suffix: str, small_state: State, tmp_path: Path
) -> None:
    state = small_state(family)
    scaling = {"scale_factor": 1.5, "shift_factor": -0.25} if family == "iv-vae" else {}
    vae = vae_core.load(state, **scaling)
    path = tmp_path / f"weights{suffix}"
    vae_core.save(vae, path)
    stored = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], state[name]) for name in state)
    again = vae_core.load(path)
    if suffix == ".safetensors":  # a .pth holds nothing but tensors, as the official one
        assert again.info == vae.info
    video = torch.rand(1, 3, 5, 8, 8)
    torch.testing.assert_close(again.moments(video)[0], vae.moments(video)[0])
    assert list(tmp_path.iterdir()) == [path]


def test_saving_in_half_precision_rounds_once(small_state: State, tmp_path: Path) -> None:
    state = small_state("cv-vae")
    vae_core.save(vae_core.load(state), tmp_path / "half.safetensors", dtype=torch.float16)
    stored = load_file(tmp_path / "half.safetensors")
    assert all(torch.equal(stored[name], state[name].half()) for name in state)
    assert vae_core.load(tmp_path / "half.safetensors", dtype=None).dtype == torch.float16
    assert vae_core.load(tmp_path / "half.safetensors").dtype == torch.float32


def test_saving_under_another_ending_is_refused(small_vae: Any, tmp_path: Path) -> None:
    with pytest.raises(vae_core.CheckpointError, match=r"weights\.bin: give a name that ends in .safetensors or .pth"):
        vae_core.save(small_vae("iv-vae"), tmp_path / "weights.bin")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_nothing(small_vae: Any, tmp_path: Path) -> None:
    with pytest.raises(vae_core.CheckpointError, match=r"missing does not exist\. Make it first"):
        vae_core.save(small_vae("iv-vae"), tmp_path / "missing" / "weights.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="limits are a POSIX feature")
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize("limit", [0, 2000, 100_000])
def test_a_full_disk_is_an_error_of_the_system(small_vae: Any, tmp_path: Path, name: str, limit: int) -> None:
    """Both libraries have errors of their own for it."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    vae = small_vae("iv-vae")
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            vae_core.save(vae, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert caught.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


def test_saved_weights_whose_name_is_taken_by_a_folder_are_kept_and_the_error_says_where(
    small_vae: Any, tmp_path: Path
) -> None:
    (tmp_path / "weights.pth").mkdir()
    with pytest.raises(OSError, match=r"directory.*it is kept as .*\.part\.pth") as caught:
        vae_core.save(small_vae("iv-vae"), tmp_path / "weights.pth")
    kept = next(path for path in tmp_path.iterdir() if path.name != "weights.pth")
    assert str(kept) in str(caught.value)
    assert vae_core.load(kept).family == "iv-vae"


def test_iv_vae_scaling_from_argument_file_and_default(small_state: State, tmp_path: Path) -> None:
    state = small_state("iv-vae")

    def scaling(vae: vae_core.VideoVAE) -> tuple[float, float]:
        return vae.info.scale_factor, vae.info.shift_factor

    assert scaling(vae_core.load(state)) == (1.0, 0.0)
    assert scaling(vae_core.load(state, scale_factor=2.0)) == (2.0, 0.0)
    save_file(state, tmp_path / "a.safetensors", metadata={"scale_factor": "0.5", "shift_factor": "-1"})
    assert scaling(vae_core.load(tmp_path / "a.safetensors")) == (0.5, -1.0)
    assert scaling(vae_core.load(tmp_path / "a.safetensors", shift_factor=3.0)) == (0.5, 3.0)
    save_file(state, tmp_path / "b.safetensors", metadata={"scale_factor": "much"})
    with pytest.raises(vae_core.CheckpointError, match="scale_factor as 'much', which is not a number"):
        vae_core.load(tmp_path / "b.safetensors")
    with pytest.raises(vae_core.CheckpointError, match="nonzero scale_factor"):
        vae_core.load(state, scale_factor=0.0)
    with pytest.raises(vae_core.CheckpointError, match="Leave them out"):
        vae_core.load(small_state("cv-vae"), scale_factor=0.18215)


def test_loaded_weights_need_no_gradient_and_can_be_trained(family: str, small_vae: Any) -> None:
    vae = small_vae(family, torch.float32)
    assert not any(p.requires_grad for p in vae.model.parameters())
    assert not vae.model.training
    video = torch.rand(1, 3, 5, 8, 8)
    assert not vae.decode(vae.encode(video)).requires_grad
    vae.model.requires_grad_(True)
    vae.decode(vae.encode(video)).sum().backward()
    assert all(p.grad is not None for p in vae.model.decoder.parameters())


def test_missing_unknown_and_misshapen_tensors_are_named(family: str, small_state: State) -> None:
    state = small_state(family)
    victim = "decoder.conv1.conv.bias" if family == "iv-vae" else "decoder.conv_in.bias"
    with pytest.raises(vae_core.CheckpointError, match=rf"like {family} weights, but {re.escape(victim)} is missing"):
        vae_core.load({name: t for name, t in state.items() if name != victim})
    with pytest.raises(vae_core.CheckpointError, match=r"extra\.weight is unknown"):
        vae_core.load({**state, "extra.weight": torch.zeros(1)})
    with pytest.raises(vae_core.CheckpointError, match=rf"{re.escape(victim)} has shape \(3, 3\) where"):
        vae_core.load({**state, victim: torch.zeros(3, 3)})
    with pytest.raises(vae_core.CheckpointError, match=r"as torch\.int8; read are float16"):
        vae_core.load({**state, victim: state[victim].to(torch.int8)})
    with pytest.raises(vae_core.CheckpointError, match="needed are tensors by name"):
        vae_core.load({"state_dict": state})  # type: ignore[dict-item]


def test_prefixed_weights_beside_training_tensors_load(family: str, small_state: State) -> None:
    state = small_state(family)
    nested = {f"first_stage_model.{name}": t for name, t in state.items()}
    nested["loss.discriminator.main.0.weight"] = torch.zeros(3)
    nested["loss.logvar"] = torch.zeros(())
    vae = vae_core.load(nested)
    assert all(torch.equal(a, state[name]) for name, a in official_state(vae.model).items())


def test_a_config_with_impossible_widths_says_what_fits() -> None:
    with pytest.raises(ValueError, match=r"multiples of 32 .* got \(16, 32, 32, 32\)"):
        CVVAEConfig(widths=(16, 32, 32, 32), blocks_per_level=1, latent_channels=4, sd3=False)
    with pytest.raises(ValueError, match="even number of latent channels; got dim=8, latent_channels=3"):
        IVVAEConfig(dim=8, latent_channels=3, scale_factor=1.0, shift_factor=0.0)


def test_loading_builds_on_the_meta_device_and_shares_the_state_dict(small_state: State) -> None:
    """No second copy: where neither dtype nor device changes, the parameters are the tensors of the state dict."""
    state = small_state("cv-vae")
    vae = vae_core.load(state)
    given = {t.untyped_storage().data_ptr() for t in state.values()}
    assert {p.untyped_storage().data_ptr() for p in vae.model.parameters()} == given


def test_a_file_stays_mapped_so_that_there_is_no_second_copy(tmp_path: Path) -> None:
    """A 120 MB file in its own dtype adds almost nothing to the private memory of the process."""
    config = CVVAEConfig(widths=(64, 128, 256, 384), blocks_per_level=2, latent_channels=4, sd3=False)
    path = tmp_path / "big.safetensors"
    model = CV_VAE.network(config).half()
    save_file({k: v.contiguous() for k, v in official_state(model).items()}, path)
    size = path.stat().st_size
    assert size > 100e6
    code = f"""
import torch, vae_core
torch.set_num_threads(1)  # the pool of another thread would count too
def anonymous():
    return int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1]) * 1024
def read(source):
    vae = vae_core.load(source, dtype=None)
    assert torch.isfinite(sum(p.sum(dtype=torch.float64) for p in vae.model.parameters()))
    return vae
small = read('demo-cv-vae')  # what the first use of anything takes is not counted
before = anonymous()
vae = read({str(path)!r})
print(anonymous() - before)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self/status")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(out.stdout) < size / 3
