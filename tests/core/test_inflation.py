"""An inflated video VAE, before any training on video, reproduces its image VAE on still frames."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vae_core
from vae_core.cv_vae import CVVAEConfig
from vae_core.iv_vae import IVVAEConfig
from vae_core.training.image_vae import CVImageConfig, CVImageVAE, IVImageConfig, IVImageVAE
from vae_core.training.inflation import InflationError, inflate_cv, inflate_iv, join_halves

CV_IMAGE = CVImageConfig(widths=(32, 32, 64, 64), blocks_per_level=1, latent_channels=4)
CV_VIDEO = CVVAEConfig(widths=(32, 32, 64, 64), blocks_per_level=1, latent_channels=4, sd3=False)
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
    image_vae = CVImageVAE(CV_IMAGE)
    vae = vae_core.load(inflate_cv(_shaken(image_vae), CV_VIDEO))
    picture, still = _still(frames)
    mean, logvar = image_vae.encode(picture)
    video_mean, video_logvar = vae.moments(still)
    _close(video_mean, mean[:, :, None].expand_as(video_mean))
    _close(video_logvar, logvar[:, :, None].expand_as(video_logvar))
    decoded = vae.decode(video_mean)
    assert decoded.shape == still.shape
    _close(decoded, image_vae.decode(mean)[0][:, :, None].expand_as(decoded))


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
    weights = dict(CVImageVAE(CV_IMAGE).state_dict())
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
