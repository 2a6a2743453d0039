"""An inflated video VAE, before any training on video, reproduces its image VAE on still frames."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

import vae_core
from vae_core.cli import app as commands
from vae_core.door.loading import DEMO_WEIGHTS, official_state
from vae_core.families.cv_vae import CVVAEConfig
from vae_core.families.iv_vae import IVVAEConfig
from vae_core.nn.clip import Clip
from vae_core.nn.steps import Context
from vae_core.training.inflation import CVImageWeights, inflate, inflate_cv, read_image_vae
from vae_core.training.iv_image import InflationError, IVImageConfig, IVImageVAE, inflate_iv, join_halves
from vae_core.training.sources import frozen_image_vae

from .image_vae_2d import BLOCKS, CHANNELS, WIDTHS, Image2D, as_diffusers, our_image_vae, passable, random_weights

WIDER = (32, 32, 64, 64)
CV_VIDEO = CVVAEConfig(widths=WIDER, blocks_per_level=1, latent_channels=4, sd3=False)
IV_VIDEO = IVVAEConfig(dim=4, latent_channels=8, scale_factor=1.0, shift_factor=0.0)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _still(frames: int) -> tuple[Tensor, Tensor]:
    picture = torch.rand(1, 3, 32, 40) * 2 - 1
    return picture, picture[:, :, None].expand(-1, -1, frames, -1, -1)


def _close(value: Tensor, expected: Tensor) -> None:
    limit = 1e-11 if value.dtype == torch.float64 else 1e-5
    assert (value - expected).abs().max() < limit * max(1.0, float(expected.abs().max()))


def _shaken(model: torch.nn.Module) -> dict[str, Tensor]:
    """Weights in which no bias is zero and no norm is plain, so that a forgotten one shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5, 17])
def test_cv_reproduces_the_image_vae_on_still_frames(frames: int) -> None:
    image_vae = our_image_vae(WIDER)
    _shaken(image_vae)
    vae = vae_core.load(inflate_cv(official_state(image_vae.model), CV_VIDEO))
    picture, still = _still(frames)
    mean, logvar = image_vae.encode(picture)
    video_mean, video_logvar = vae.moments(still)
    _close(video_mean, mean[:, :, None].expand_as(video_mean))
    _close(video_logvar, logvar[:, :, None].expand_as(video_logvar))
    decoded = vae.decode(video_mean)
    assert decoded.shape == still.shape
    _close(decoded, image_vae.decode(mean)[0][:, :, None].expand_as(decoded))


@torch.no_grad()
def test_the_bundled_image_vae_is_reproduced_on_stills() -> None:
    image_vae = frozen_image_vae("demo-image-vae")
    vae = inflate(["demo-image-vae"]).vae
    picture, still = _still(5)
    mean, _ = image_vae.encode(picture)
    _close(vae.encode(still), mean[:, :, None].expand(-1, -1, 2, -1, -1))
    _close(vae.decode(vae.encode(still)), image_vae.decode(mean)[0][:, :, None].expand_as(still))


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 9])
def test_iv_reproduces_both_image_vaes_on_still_frames(frames: int) -> None:
    half = IVImageConfig(dim=4, latent_channels=4, halves=1)
    first, second = IVImageVAE(half), IVImageVAE(half)
    vae = vae_core.load(inflate_iv(join_halves(_shaken(first), _shaken(second)), IV_VIDEO))
    picture, still = _still(frames)
    mean = torch.cat((first.encode(picture)[0], second.encode(picture)[0]), dim=1)
    logvar = torch.cat((first.encode(picture)[1], second.encode(picture)[1]), dim=1)
    video_mean, video_logvar = vae.moments(still)
    _close(video_mean, mean[:, :, None].expand_as(video_mean))
    _close(video_logvar, logvar[:, :, None].expand_as(video_logvar))
    decoded = vae.decode(vae.encode(still))
    keyframe, other = first.decode(mean[:, :4])[0], second.decode(mean[:, 4:])[0]
    for frame in range(frames):
        is_keyframe = frame == 0 or frame % 4 == 1
        _close(decoded[:, :, frame], keyframe if is_keyframe else other)


@torch.no_grad()
def test_iv_reproduces_an_image_vae_whose_halves_read_each_other() -> None:
    image_vae = IVImageVAE(IVImageConfig(dim=4, latent_channels=8, halves=2))
    vae = vae_core.load(inflate_iv(_shaken(image_vae), IV_VIDEO), dtype=torch.float64)
    image_vae.double()  # these weights amplify rounding
    picture, still = (clip.double() for clip in _still(5))
    mean, _ = image_vae.encode(picture)
    latent = vae.encode(still)
    _close(latent, mean[:, :, None].expand_as(latent))
    decoded = vae.decode(latent)
    keyframe, other = image_vae.decode(mean)
    for frame, expected in enumerate((keyframe, keyframe, other, other, other)):
        _close(decoded[:, :, frame], expected)


def test_one_image_vae_may_become_both_halves() -> None:
    weights = _shaken(IVImageVAE(IVImageConfig(dim=4, latent_channels=4, halves=1)))
    vae = vae_core.load(inflate_iv(join_halves(weights, weights), IV_VIDEO))
    mean, _ = vae.moments(_still(5)[1])
    first, second = mean.chunk(2, dim=1)
    _close(first, second)


def test_image_weights_that_do_not_fit_are_refused() -> None:
    weights = official_state(our_image_vae(WIDER).model)
    wider = CVVAEConfig(widths=(32, 64, 64, 64), blocks_per_level=1, latent_channels=4, sd3=False)
    with pytest.raises(InflationError, match=r"does not fit.*widths must be the same"):
        inflate_cv(weights, wider)
    del weights["encoder.conv_in.weight"]
    with pytest.raises(InflationError, match=r"has no encoder\.conv_in\.weight; give the weights of an image VAE"):
        inflate_cv(weights, CV_VIDEO)
    narrow = IVImageVAE(IVImageConfig(dim=4, latent_channels=4, halves=1)).state_dict()
    other = IVImageVAE(IVImageConfig(dim=5, latent_channels=4, halves=1)).state_dict()
    with pytest.raises(InflationError, match="differ in names or shapes"):
        join_halves(narrow, other)
    with pytest.raises(InflationError, match="dim and latent channels must be the same"):
        inflate_iv(join_halves(other, other), IV_VIDEO)


# ------------------------------------------------------------------------------- VAEs of the Stable Diffusion kind


def _check_still_frames(vae: vae_core.VideoVAE, encode, decode, frames: int = 5) -> None:
    picture, still = _still(frames)
    with torch.no_grad():
        for value, expected in zip(vae.moments(still), encode(picture), strict=True):
            _close(value, expected[:, :, None].expand_as(value))
        latent = encode(picture)[0]
        decoded = vae.decode(latent[:, :, None].expand(-1, -1, 1 + frames // 4, -1, -1))
        _close(decoded, decode(latent)[:, :, None].expand_as(decoded))


@pytest.mark.parametrize("quant", [True, False])
@pytest.mark.parametrize("spelling", ["bare", "checkpoint", "diffusers"])
def test_cv_reproduces_a_stable_diffusion_vae_on_still_frames(spelling: str, quant: bool, tmp_path: Path) -> None:
    weights = passable(random_weights(quant=quant))
    reference = Image2D(weights)
    if spelling == "diffusers":
        save_file(as_diffusers(weights), tmp_path / "diffusion_pytorch_model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "norm_num_groups": 32}))
        source: Path = tmp_path
    else:
        prefix = "first_stage_model." if spelling == "checkpoint" else ""
        beside = {"model.diffusion_model.out.2.bias": torch.zeros(4)} if prefix else {}
        source = tmp_path / "vae.safetensors"
        save_file({prefix + name: tensor for name, tensor in weights.items()} | beside, source)
    made = inflate([source])
    assert made.vae.family == "cv-vae"
    assert [note for note in made.notes if "border" in note] == []
    _check_still_frames(made.vae, reference.encode, reference.decode)


def test_the_older_spelling_of_diffusers_is_read() -> None:
    weights = as_diffusers(passable(random_weights()))
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in weights.items():
        for new, old in older.items():
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = tensor
    today, then = inflate([weights]).vae.model.state_dict(), inflate([renamed]).vae.model.state_dict()
    assert renamed.keys() != weights.keys()
    assert all(torch.equal(today[name], then[name]) for name in today)


def test_cv_reproduces_diffusers_own_vae() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    model = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=WIDTHS,
        layers_per_block=BLOCKS,
        latent_channels=CHANNELS,
    ).eval()
    model.load_state_dict(as_diffusers(passable(random_weights())), strict=True)

    def encode(picture: Tensor) -> tuple[Tensor, Tensor]:
        posterior = model.encode(picture).latent_dist
        return posterior.mean, posterior.logvar

    made = inflate([dict(model.state_dict())])
    _check_still_frames(made.vae, encode, lambda latent: model.decode(latent).sample)


def test_what_cannot_be_the_same_is_near_and_said() -> None:
    """A full-rank attention loses three directions; a bias before zero padding shows at the border."""
    weights = random_weights()
    weights["post_quant_conv.bias"].zero_()
    reference = Image2D(weights)
    made = inflate([weights])
    latent = torch.randn(1, 4, 6, 7)
    with torch.no_grad():
        expected = reference.decode(latent)
        error = float((made.vae.decode(latent[:, :, None])[:, :, 0] - expected).abs().max())
        weights["decoder.mid.attn_1.proj_out.weight"] = torch.zeros(WIDTHS[3], WIDTHS[3], 1, 1)
        silent = float((Image2D(weights).decode(latent) - expected).abs().max())
    assert 1e-5 < error < 1e-2 < 0.3 < silent
    assert any("all but 3 of its 96 directions" in note for note in made.notes)

    with_bias = random_weights()
    made = inflate([with_bias])
    found = read_image_vae(with_bias)
    assert isinstance(found, CVImageWeights)
    assert found.border is not None
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)) / 0.18215
    one, other = Image2D(with_bias).decode(latent), made.vae.model.decode(latent[:, :, None])[:, :, 0]
    error = (one - other).square() / one.var()
    assert found.border.whole == pytest.approx(float(error.mean().sqrt()), rel=0.05)
    assert found.border.inside == pytest.approx(float(error[..., 8:-8, 8:-8].mean().sqrt()), rel=0.05)
    assert found.border.inside > 0.001  # the whole frame is reached
    assert any(f"differs by {100 * found.border.whole:.2g}% of its deviation" in note for note in made.notes)
    first = made.vae.model.decoder.conv_in  # type: ignore[union-attr]
    with torch.no_grad():
        value = first(Clip([latent[:, :, None]]), Context()).tensor()[:, :, 0] / 10**0.5  # the norms' eps differs by 10
        inner = Image2D(with_bias)._conv("post_quant_conv", latent)
        expected = Image2D(with_bias)._conv("decoder.conv_in", inner, padding=1)
    _close(value[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])
    assert (value - expected).abs().max() > 1e-2


def test_sd3_layout_is_the_image_vae_but_for_borders_and_halving() -> None:
    weights = passable(random_weights(quant=False))
    made = inflate([weights], "cv-vae-sd3")
    assert made.vae.family == "cv-vae-sd3"
    assert any("--family cv-vae reproduces it" in note for note in made.notes)
    latent = torch.randn(1, 4, 5, 6)
    with torch.no_grad():
        _close(made.vae.decode(latent[:, :, None])[:, :, 0], Image2D(weights, repeat_border=True).decode(latent))
    kernel = made.vae.model.encoder.levels[0].down.weight  # type: ignore[union-attr]
    source = weights["encoder.down.0.downsample.conv.weight"]
    _close(kernel.sum((2, 3, 4)), source.sum((2, 3)))  # flat areas stay what they are
    assert torch.equal(kernel[:, :, 2, 1, 1], source[:, :, 0, 0])  # the pixel that both see stays where it was


def test_the_inflated_vae_is_always_the_same() -> None:
    first, second = (inflate([random_weights()]).vae.model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def test_two_image_vaes_become_the_branches_of_an_iv_vae() -> None:
    half = IVImageConfig(dim=4, latent_channels=4, halves=1)
    first, second = IVImageVAE(half), IVImageVAE(half)
    made = inflate([_shaken(first), _shaken(second)])
    assert (made.vae.family, made.vae.info.latent_channels, made.notes) == ("iv-vae", 8, ())
    picture, still = _still(5)
    mean = made.vae.moments(still)[0]
    _close(mean[:, :4], first.encode(picture)[0][:, :, None].expand(-1, -1, 2, -1, -1))
    _close(mean[:, 4:], second.encode(picture)[0][:, :, None].expand(-1, -1, 2, -1, -1))
    assert "One image VAE became both halves" in inflate([_shaken(first)]).notes[0]
    whole = inflate([_shaken(IVImageVAE(IVImageConfig(dim=4, latent_channels=8, halves=2)))])
    assert whole.vae.info.latent_channels == 8


def test_sources_that_do_not_go_together_are_refused() -> None:
    cv, iv = random_weights(), dict(IVImageVAE(IVImageConfig(dim=4, latent_channels=4, halves=1)).state_dict())
    whole = dict(IVImageVAE(IVImageConfig(dim=4, latent_channels=8, halves=2)).state_dict())
    for sources, family in (([cv, cv], None), ([cv], "iv-vae"), ([iv], "cv-vae"), ([cv, iv], None), ([], None)):
        with pytest.raises(InflationError, match=r"A CV-VAE .* is made of one of the Stable Diffusion kind"):
            inflate(sources, family)
    for sources in ([whole, iv], [iv, iv, iv]):
        with pytest.raises(InflationError, match="an IV-VAE is made of two of one half"):
            inflate(sources)


def test_files_that_hold_no_image_vae_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InflationError, match=r"is a video VAE already \(cv-vae\)"):
        read_image_vae(DEMO_WEIGHTS["demo-cv-vae"])
    with pytest.raises(InflationError, match="holds no image VAE"):
        read_image_vae({"a": torch.zeros(3)})
    weights = random_weights()
    with pytest.raises(InflationError, match=r"but decoder\.extra\.weight is unknown.* Give the VAE of Stable"):
        read_image_vae(weights | {"decoder.extra.weight": torch.zeros(3)})
    del weights["encoder.down.3.block.0.conv1.weight"]
    with pytest.raises(InflationError, match=r"conv1\.weight' is missing .* incomplete or was altered"):
        read_image_vae(weights)
    weights = random_weights()
    del weights["decoder.mid.block_1.norm1.bias"]
    with pytest.raises(InflationError, match=r"but decoder\.mid\.block_1\.norm1\.bias is missing"):
        inflate([weights])
    save_file(as_diffusers(random_weights()), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"norm_num_groups": 16}))
    with pytest.raises(InflationError, match="group norms have 16 groups, and 32 are read"):
        read_image_vae(tmp_path)


def test_the_command_writes_a_file_that_loads(tmp_path: Path) -> None:
    image, out = tmp_path / "image.safetensors", tmp_path / "video.safetensors"
    save_file(random_weights(), image)
    result = CliRunner(env={"COLUMNS": "100"}).invoke(commands.app, ["inflate", str(image), "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert "family           cv-vae" in result.stdout
    assert "outermost 8 pixels" in result.stderr
    loaded, made = vae_core.load(out).model.state_dict(), inflate([image]).vae.model.state_dict()
    assert all(torch.equal(loaded[name], made[name]) for name in made)
    for words, message in (
        (["-o", str(out)], "exists already"),
        (["-o", str(tmp_path / "x.safetensors"), "--family", "iv-vae"], "An IV-VAE of one or two"),
        (["-o", str(tmp_path / "x.bin")], "ends in .safetensors or .pth"),
    ):
        result = CliRunner(env={"COLUMNS": "400"}).invoke(commands.app, ["inflate", str(image), *words])
        assert result.exit_code == 2
        assert message.lower() in result.stderr.lower()
