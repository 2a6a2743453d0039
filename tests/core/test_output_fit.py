"""The decoder's last convolution by least squares, and the decoder trained alone."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import vae_core
from vae_core.families import FAMILIES
from vae_core.families.cv_vae import CVVAEConfig
from vae_core.families.iv_vae import IVParts, IVVAEConfig
from vae_core.training import output_fit
from vae_core.training.clips import Batch
from vae_core.training.coders import VideoCoder, make_coder
from vae_core.training.config import ModelConfig
from vae_core.training.loop import FINAL, Trainer
from vae_core.training.output_fit import fit_output
from vae_core.training.tables import ConfigError

from .small_training import SIZES, Squares, small_config, watching


def coder(family, parts=None):
    torch.manual_seed(0)
    config = (
        IVVAEConfig(dim=2, latent_channels=4, scale_factor=1.0, shift_factor=0.0, parts=parts or IVParts())
        if family == "iv-vae"
        else CVVAEConfig(widths=(32, 32, 32, 32), blocks_per_level=1, latent_channels=4, sd3=family == "cv-vae-sd3")
    )
    return VideoCoder(FAMILIES[family].network(config), checkpointing=False)


def through(coder, video):
    return coder.decode(coder.moments(video)[0])[0]


def gradient(coder, video):
    """Of the squared error, for the last convolution."""
    parameters = list(coder.model.decoder.conv_out.parameters())
    with torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
        error = (through(coder, video) - video).square().mean()
        found = torch.autograd.grad(error, parameters)
    return float(torch.cat([g.flatten() for g in found]).norm())


@pytest.mark.parametrize("family", ["iv-vae", "cv-vae", "cv-vae-sd3"])
def test_no_other_kernel_would_be_better(family, monkeypatch):
    monkeypatch.setattr(output_fit, "SPACING", 1)
    made = coder(family)
    generator = torch.Generator().manual_seed(1)
    small = torch.rand(2, 3, 3, 6, 6, generator=generator) * 2 - 1
    video = F.interpolate(small, (9, 48, 48), mode="trilinear")
    before = gradient(made, video)
    fit_output(made, [Batch(video=video, kind="video", index=0)], 1)
    assert gradient(made, video) < 0.02 * before


def test_a_tint_goes():
    made = coder("iv-vae")
    generator = torch.Generator().manual_seed(2)
    video = torch.rand(2, 3, 5, 32, 32, generator=generator) * 0.2 + 0.3
    fit_output(made, [Batch(video=video, kind="video", index=0)], 1)
    with torch.no_grad():
        found = through(made, video)
    assert ((found - video).mean((3, 4)) * 127.5).abs().max() < 1.5


def test_only_the_last_convolution_changes():
    made = coder("cv-vae")
    before = copy.deepcopy(made.state_dict())
    fit_output(made, [Batch(video=torch.rand(1, 3, 1, 32, 32), kind="image", index=0)], 1)
    changed = {name for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"model.decoder.conv_out.weight", "model.decoder.conv_out.bias"}


def test_a_kernel_that_nothing_was_read_for_stays():
    made = coder("iv-vae")
    before = copy.deepcopy(made.state_dict())
    fit_output(made, [Batch(video=torch.rand(1, 3, 1, 32, 32), kind="image", index=0)], 1)
    changed = {name for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"model.decoder.conv_out.conv_2d.weight", "model.decoder.conv_out.conv_2d.bias"}


def test_other_networks_are_refused():
    with pytest.raises(ConfigError, match="fit_output is for CV-VAE and for IV-VAE of the published parts"):
        fit_output(coder("iv-vae", IVParts(temporal_conv="causal")), [], 1)


# ------------------------------------------------------------------------------------------------------ in a run


def test_a_run_fits_the_last_convolution_at_its_end(tmp_path):
    config = small_config(tmp_path)
    config = replace(config, run=replace(config.run, steps=2, ema=0.0, fit_output=3))
    assert Trainer(config, torch.device("cpu"), Squares(1, 5)).run(watching())
    trained = vae_core.load(tmp_path / "checkpoints/step_00000002.safetensors").model.state_dict()
    final = vae_core.load(tmp_path / FINAL).model.state_dict()
    changed = {name for name, value in final.items() if not torch.equal(value, trained[name])}
    assert changed == {"decoder.conv_out.weight", "decoder.conv_out.bias"}


@pytest.mark.parametrize("family", ["cv-vae", "iv-vae"])
def test_the_decoder_alone_can_be_trained(family, tmp_path):
    config = small_config(tmp_path, model=ModelConfig(family=family, init="fresh", train="decoder", **SIZES[family]))
    before = make_coder(config).state_dict()
    trainer = Trainer(config, torch.device("cpu"), Squares(1, 5))
    assert trainer.run(watching())
    after = trainer.coder.state_dict()
    changed = {name.split(".")[1] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == ({"decoder", "from_latent"} if family == "iv-vae" else {"decoder"})
