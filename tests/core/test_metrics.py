"""Every metric against another implementation, or against what it must be by arithmetic."""

import math
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn
from torchmetrics.functional.image import lpips as torchmetrics_lpips

import vae_core
from vae_core.errors import CheckpointError
from vae_core.metrics import (
    LPIPS,
    Moments,
    frame_quality,
    frechet_distance,
    latent_compatibility,
    load_i3d,
    load_lpips,
    multiscale_ssim,
    phase_means,
    phase_spread,
)
from vae_core.metrics.i3d import I3D

from .clips import moving_picture
from .made_pictures import noise, textured


@pytest.mark.parametrize("size", [(48, 64), (33, 57), (11, 200)])
def test_psnr_and_ssim_are_those_of_scikit_image(size: tuple[int, int]) -> None:
    original = moving_picture(3, *size)
    ours = (original + 0.2 * noise(*original.shape)).clamp(-1, 1)
    psnr, ssim = frame_quality(ours, original)
    for frame in range(3):
        a, b = (((clip[0, :, frame] + 1) / 2).permute(1, 2, 0).numpy() for clip in (ours, original))
        assert abs(psnr[frame] - peak_signal_noise_ratio(b, a, data_range=1)) < 1e-4
        by_skimage = structural_similarity(
            b, a, channel_axis=2, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert abs(ssim[frame] - by_skimage) < 1e-4


def test_ms_ssim_by_hand() -> None:
    original = textured(1, 192, 176)
    ours = (original + 0.3 * noise(*original.shape)).clamp(-1, 1)
    a, b = ((clip[0, :, 0].double() + 1) / 2 for clip in (ours, original))
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    value = 1.0
    for scale, weight in enumerate(weights):
        luminance, contrast = _ssim_terms(a, b)
        value *= (contrast if scale < 4 else luminance * contrast).mean().item() ** weight
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    assert abs(multiscale_ssim(ours, original).item() - value) < 1e-3


def _ssim_terms(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(x**2) / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values[:, None], window)[:, 0]

    ma, mb = mean(a), mean(b)
    va, vb, both = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    return (2 * ma * mb + 1e-4) / (ma**2 + mb**2 + 1e-4), (2 * both + 9e-4) / (va + vb + 9e-4)


def test_small_pictures_have_no_ssim() -> None:
    clip = moving_picture(2, 10, 100)
    assert frame_quality(clip, clip)[1].isnan().all()
    assert multiscale_ssim(*[moving_picture(2, 160, 200)] * 2).isnan().all()
    with pytest.raises(ValueError, match="both must be the same"):
        multiscale_ssim(clip, clip[..., :-1])


def _backbone(kind: str, seed: int = 0) -> nn.Sequential:
    """torchvision's layers with random weights, for torchmetrics' own LPIPS."""
    torch.manual_seed(seed)
    return LPIPS(kind).features


@pytest.mark.parametrize("kind", ["alex", "vgg"])
def test_lpips_is_that_of_torchmetrics(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random features, the trained heads: torchmetrics' network around the same layers."""
    features = _backbone(kind)
    pool = [nn.MaxPool2d(3, 2) if kind == "alex" else nn.MaxPool2d(2, 2)]  # torchvision's last layer, which is not used
    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda *_, **__: nn.Sequential(*features, *pool))
    reference = torchmetrics_lpips._LPIPS(net=kind, pretrained=True, pnet_rand=True)
    torch.save({f"features.{name}": t for name, t in features.state_dict().items()}, tmp_path / "network.pth")
    ours = load_lpips(tmp_path / "network.pth")
    assert ours.kind == kind
    original = textured(2, 64, 72)
    other = (original + 0.3 * noise(*original.shape)).clamp(-1, 1)
    expected = [float(reference(other[:, :, i], original[:, :, i])) for i in range(2)]
    torch.testing.assert_close(ours.frames(other, original), torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert ours.frames(original, original).tolist() == [0, 0]
    assert min(expected) > 0
    torch.save(reference.state_dict(), tmp_path / "whole.pth")  # as the lpips package saves: network and heads
    torch.testing.assert_close(load_lpips(tmp_path / "whole.pth").frames(other, original), torch.tensor(expected))


def test_a_wrong_lpips_file_is_named(tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(8, 3, 5, 5)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"holds no AlexNet or VGG-16; LPIPS needs torchvision's alexnet"):
        load_lpips(tmp_path / "other.pth")
    state = {f"features.{name}": tensor for name, tensor in _backbone("alex").state_dict().items()}
    torch.save({name: tensor for name, tensor in state.items() if "10" not in name}, tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match="no complete alex network"):
        load_lpips(tmp_path / "cut.pth")


def test_lpips_without_torchmetrics_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"features.{name}": tensor for name, tensor in _backbone("alex").state_dict().items()}
    torch.save(state, tmp_path / "alex.pth")
    monkeypatch.setitem(sys.modules, "torchmetrics", None)  # as if it were not installed
    with pytest.raises(CheckpointError, match=r"come with torchmetrics, which is not installed: pip install -e"):
        load_lpips(tmp_path / "alex.pth")


def test_frechet_distance_is_that_of_scipy() -> None:
    a, b = noise(50, 12).double() @ noise(12, 12, seed=1).double(), noise(40, 12, seed=2).double() * 2 + 1
    ours, theirs = Moments(), Moments()
    for part in a.split(7):
        ours.add(part)
    theirs.add(b)
    ca, cb = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(ca @ cb).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(ca + cb - 2 * root)
    assert frechet_distance(ours, theirs) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(ours, ours) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_equal_shapes_is_the_distance_of_the_means() -> None:
    a = noise(30, 5)
    ours, theirs = Moments(), Moments()
    ours.add(a)
    theirs.add(a + torch.tensor([1.0, 2, 0, 0, 2]))
    assert frechet_distance(ours, theirs) == pytest.approx(9, rel=1e-5)
    with pytest.raises(ValueError, match="at least 2 clips; got 30 and 0"):
        frechet_distance(ours, Moments())


@pytest.fixture(scope="module")
def i3d_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the published names and shapes, tamed so that 400 logits differ."""
    torch.manual_seed(3)
    state = I3D().state_dict()
    for name, tensor in state.items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("i3d") / "i3d_pretrained_400.pt"
    torch.save(state, path)
    return path


def test_i3d_has_the_published_shapes(i3d_file: Path) -> None:
    model = I3D()
    assert sum(p.numel() for p in model.parameters()) == 12_697_264  # the published RGB network
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert shapes["Conv3d_1a_7x7.conv3d.weight"] == (64, 3, 7, 7, 7)
    assert shapes["Mixed_4f.b2b.conv3d.weight"] == (128, 32, 3, 3, 3)
    assert shapes["logits.conv3d.weight"] == (400, 1024, 1, 1, 1)


def test_i3d_layer_by_layer(i3d_file: Path) -> None:
    """Against the network written out plainly, with TensorFlow's padding found by counting."""
    state = torch.load(i3d_file, weights_only=True)
    clip = noise(1, 3, 10, 224, 224).clamp(-1, 1)
    torch.testing.assert_close(load_i3d(i3d_file)(clip), _plain_i3d(state, clip), rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="9 frames or more at a time; got 8"):
        load_i3d(i3d_file)(clip[:, :, :8])


def _same(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    for dim, (k, s) in enumerate(zip(kernel, stride, strict=True), start=2):
        size = x.shape[dim]
        outputs = len(range(0, size, s))
        while (x.shape[dim] - k) // s + 1 < outputs or x.shape[dim] < k:  # zeros in turn: behind, before
            added = x.shape[dim] - size
            zero = torch.zeros_like(x.narrow(dim, 0, 1))
            x = torch.cat([x, zero] if added % 2 == 0 else [zero, x], dim)
    return x


def _plain_i3d(state: dict[str, Tensor], x: Tensor) -> Tensor:
    def unit(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.conv3d.weight"]
        x = F.conv3d(_same(x, weight.shape[2:], [stride] * 3), weight, stride=stride)
        mean, var, gain, bias = (
            state[f"{name}.bn.{part}"].view(1, -1, 1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (var + 0.001).sqrt() * gain + bias).relu()

    def pool(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        return F.max_pool3d(_same(x, kernel, stride), kernel, stride)

    def mixed(x: Tensor, name: str) -> Tensor:
        parts = [unit(x, f"{name}.b0")]
        parts += [unit(unit(x, f"{name}.b{i}a"), f"{name}.b{i}b") for i in (1, 2)]
        return torch.cat([*parts, unit(pool(x, (3, 3, 3), (1, 1, 1)), f"{name}.b3b")], 1)

    x = pool(unit(x, "Conv3d_1a_7x7", 2), (1, 3, 3), (1, 2, 2))
    x = pool(unit(unit(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3"), (1, 3, 3), (1, 2, 2))
    for name in ("3b", "3c"):
        x = mixed(x, f"Mixed_{name}")
    x = pool(x, (3, 3, 3), (2, 2, 2))
    for name in ("4b", "4c", "4d", "4e", "4f"):
        x = mixed(x, f"Mixed_{name}")
    x = pool(x, (2, 2, 2), (2, 2, 2))
    for name in ("5b", "5c"):
        x = mixed(x, f"Mixed_{name}")
    x = F.avg_pool3d(x, (2, 7, 7), 1)
    return F.conv3d(x, state["logits.conv3d.weight"], state["logits.conv3d.bias"]).mean((2, 3, 4))


class _Scripted(nn.Module):
    """What a TorchScript file of I3D looks like from outside."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        assert not rescale
        assert not resize
        assert return_features
        return x.mean((2, 3, 4)).repeat(1, 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_file_is_run(tmp_path: Path) -> None:
    torch.jit.script(_Scripted()).save(str(tmp_path / "i3d_torchscript.pt"))
    assert any("/code/" in name for name in zipfile.ZipFile(tmp_path / "i3d_torchscript.pt").namelist())
    clip = torch.stack([torch.full((9, 32, 40), value) for value in (0.1, 0.2, 0.3)])[None]
    found = load_i3d(tmp_path / "i3d_torchscript.pt")(clip)
    torch.testing.assert_close(found, torch.tensor([[0.1, 0.2, 0.3, 0.1, 0.2, 0.3]]))


def test_a_wrong_i3d_file_is_named(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"holds no I3D network; FVD needs i3d_torchscript\.pt"):
        load_i3d(tmp_path / "other.pt")


def test_phases_count_from_the_frame_behind_the_first() -> None:
    values = [99.0, 1, 2, 3, 4, 5, 6, 7, 10, 3]
    assert phase_means(values) == [3, 4, 5, 7]
    assert phase_spread(values) == 4
    assert math.isnan(phase_spread(values[:4]))
    assert phase_spread([0.0, math.nan, 2, 2, 2, 1, 2, 2, 2]) == 1


# ------------------------------------------------------------------------------------------ compatibility


class _OfVideo:
    """The image VAE that a video VAE is for single frames."""

    def __init__(self, vae: vae_core.VideoVAE, gain: float = 1.0) -> None:
        self.vae, self.gain = vae, gain

    def encode(self, images: Tensor) -> Tensor:
        return self.gain * torch.cat([self.vae.encode(image[None, :, None])[:, :, 0] for image in images])

    def decode(self, latents: Tensor) -> Tensor:
        return torch.cat([self.vae.decode(z[None, :, None])[:, :, 0] for z in latents])


def test_a_vae_is_compatible_with_itself(small_vae: Callable[..., vae_core.VideoVAE]) -> None:
    vae = small_vae("cv-vae", torch.float32)
    frame = textured(1, 32, 40)
    found = latent_compatibility(vae, _OfVideo(vae), lambda: [frame])
    psnr = float(frame_quality(vae.decode(vae.encode(frame)), frame)[0])
    assert (found.distance, found.nearest) == pytest.approx((0, 0), abs=1e-5)
    assert (found.video_to_image, found.image_to_video) == pytest.approx((psnr, psnr), abs=1e-3)
    twice = latent_compatibility(vae, _OfVideo(vae, gain=2), lambda: [frame])
    assert twice.distance == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("kind", ["cv-vae", "image-vae"])
def test_compatibility_over_a_clip_by_hand(kind: str, small_vae: Callable[..., vae_core.VideoVAE]) -> None:
    vae = small_vae(kind, torch.float32)
    image, clip = _OfVideo(vae), moving_picture(9, 32, 40)
    found = latent_compatibility(vae, image, lambda: clip.split(2, 2))
    ours = vae.encode(clip)[0].transpose(0, 1)  # latents first
    last = image.encode(clip[0, :, :: vae.info.time_compression].transpose(0, 1))
    shares = [float((a - b).norm() / b.norm()) for a, b in zip(ours, last, strict=True)]
    assert found.distance == pytest.approx(sum(shares) / len(shares), rel=1e-4, abs=1e-5)
    assert found.nearest <= found.distance
    crossed = vae.decode(last.transpose(0, 1)[None])
    assert found.image_to_video == pytest.approx(float(frame_quality(crossed, clip)[0].mean()), abs=1e-3)


def test_latents_of_other_shapes_cannot_share_a_space(small_vae: Callable[..., vae_core.VideoVAE]) -> None:
    clip = moving_picture(1, 32, 40)
    with pytest.raises(ValueError, match="they cannot share a space"):
        latent_compatibility(
            small_vae("cv-vae-sd3", torch.float32), _OfVideo(small_vae("cv-vae", torch.float32)), lambda: [clip]
        )
