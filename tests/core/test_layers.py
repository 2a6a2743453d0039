"""Layers that compute the published function another way, how their clips lie in memory, and what 720p takes."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vae_core import TilePlan, VideoVAE
from vae_core.families import FAMILIES
from vae_core.families.cv_vae.layers import ClipConv, Upsample, phase_kernels
from vae_core.nn import clip as clips
from vae_core.nn.clip import Clip
from vae_core.nn.layers import enlarging_kernel
from vae_core.nn.steps import Context
from vae_core.plan.footprint import meta_network
from vae_core.run import segments

from ..conftest import SMALL, Config
from .full_size import FULL, full_size
from .meta_profile import TARGETS, MetaProfile


@pytest.mark.parametrize("size", [(1, 1), (4, 3)])
def test_phase_kernels_are_nearest_and_one_large_convolution(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, *size, dtype=torch.float64)
    weight = torch.randn(5, 3, 3, 3, 3, dtype=torch.float64)
    expected = F.conv3d(F.interpolate(x.flatten(1, 2), scale_factor=2).unflatten(1, (3, 4)), weight, padding=1)
    got = torch.full_like(expected, torch.nan)
    for phase, kernel in enumerate(phase_kernels(weight)):
        i, j = divmod(phase, 2)
        y = F.conv3d(x, kernel, padding=1)
        got[..., i::2, j::2] = y[..., i : i + size[0], j : j + size[1]]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (4, 3)])
def test_an_enlarging_kernel_is_nearest_and_one_large_convolution(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, *size, dtype=torch.float64), torch.randn(5, 3, 3, 3, dtype=torch.float64)
    expected = F.conv2d(F.interpolate(x, scale_factor=2), weight, padding=1)
    got = F.conv_transpose2d(x, enlarging_kernel(weight), stride=2, padding=1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("replicate", [False, True])
@pytest.mark.parametrize("time", [(2, 0), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("frames", [1, 2, 3, 5, 9])
def test_frames_at_the_ends_see_what_padding_would_show(
    frames: int, stride: int, time: tuple[int, int], replicate: bool, plain: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, frames, 8, 9, dtype=torch.float64)
    weight, bias = torch.randn(3, 2, 3, 3, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, 0, *time), mode="replicate" if replicate else "constant")
    if padded.shape[2] < 3:
        return
    expected = F.conv3d(padded, weight, bias, stride=(stride, 2, 2), padding=(0, 1, 1))
    conv = ClipConv(
        2, 3, time=time, time_replicate=replicate, space_padding="zeros", stride=(stride, 2, 2)
    ).requires_grad_(False)
    conv.bias = torch.nn.Parameter(bias)
    runs = list(conv.over_time(x, weight, (1, 1), plain=plain))
    assert [start for start, _ in runs] == [sum(y.shape[2] for _, y in runs[:i]) for i in range(len(runs))]
    torch.testing.assert_close(torch.cat([y for _, y in runs], dim=2), expected, rtol=0, atol=1e-12)


def test_strips_of_rows_change_nothing(
    family: str, small_vae: Callable[..., VideoVAE], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = small_vae(family)
    torch.manual_seed(0)
    latent = torch.randn(2, vae.info.latent_channels, 3, 5, 3, dtype=torch.float64)
    video = vae.decode(latent)
    mean = vae.encode(video)
    monkeypatch.setattr(segments, "STRIPS_ABOVE", 0)
    monkeypatch.setattr(segments, "MOST_STRIPS", 50)
    for nbytes in (1, 30_000):
        monkeypatch.setattr(segments, "STRIP_BYTES", nbytes)
        assert (vae.decode(latent) - video).abs().max() <= 1e-10 * video.std()
        assert (vae.encode(video) - mean).abs().max() <= 1e-10 * mean.std()


@pytest.mark.parametrize(("double_time", "frames"), [(True, 5), (True, 1), (False, 3)])
def test_the_upsampler_of_cv_vae_is_the_published_one(double_time: bool, frames: int) -> None:
    """Nearest x2, 3x3x3 with time replicated, channels read as (n, C), n into time, the very first frame dropped."""
    torch.manual_seed(0)
    for sd3 in (False, True):
        padding = "replicate" if sd3 else "zeros"
        layer = Upsample(32, double_time=double_time, space_padding=padding).double().requires_grad_(False)
        x = torch.randn(1, 32, frames, 3, 2, dtype=torch.float64)
        large = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
        large = F.pad(large, (0, 0, 0, 0, 1, 1), mode="replicate")
        large = F.pad(large, (1, 1, 1, 1, 0, 0), mode="replicate" if sd3 else "constant")
        y = F.conv3d(large, layer.conv.weight, layer.conv.bias)
        if double_time:
            y = torch.stack(y.chunk(2, dim=1), dim=3).flatten(2, 3)[:, :, 1:]
        for plain in (False, True):
            got = layer(Clip([x]), Context(plain=plain)).tensor()
            torch.testing.assert_close(got, y, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------ changed weights


def halve_through_data(weights: list[Tensor]) -> None:
    for weight in weights:
        weight.data.mul_(0.5)


def halve_in_inference_mode(weights: list[Tensor]) -> None:
    with torch.inference_mode():
        for weight in weights:
            weight.mul_(0.5)


@pytest.mark.parametrize("change", [halve_through_data, halve_in_inference_mode])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_decode_is_by_the_weights_as_they_are(
    family: str,
    small_vae: Callable[..., VideoVAE],
    change: Callable[[list[Tensor]], None],
    dtype: torch.dtype,
) -> None:
    """Weights that were changed in place, by whatever way, after a first decode and a first encode."""
    vae = small_vae(family, dtype)
    torch.manual_seed(0)
    latent = torch.randn(1, vae.info.latent_channels, 3, 2, 3).to(dtype)
    video = (torch.rand(1, 3, 9, 16, 24) * 2 - 1).to(dtype)
    before = vae.decode(latent), vae.encode(video)
    change(list(vae.model.parameters()))
    got = vae.decode(latent), vae.encode(video)
    fresh = small_vae(family, dtype)
    fresh.model.load_state_dict(
        {name: 0.5 * weight for name, weight in small_vae(family, dtype).model.state_dict().items()}
    )
    for mine, expected, old in zip(got, (fresh.decode(latent), fresh.encode(video)), before, strict=True):
        assert torch.equal(mine, expected)
        assert (mine - old).abs().max() > 0.1 * old.std()


@pytest.mark.parametrize("plain", [False, True])
def test_a_layer_in_place_of_another_is_the_one_that_runs(
    family: str, small_vae: Callable[..., VideoVAE], plain: bool
) -> None:
    """As LoRA and quantization do it; after a first run."""
    vae = small_vae(family)
    latent = torch.randn(1, vae.info.latent_channels, 2, 2, 3, dtype=torch.float64)
    run = vae.model.decode if plain else vae.decode
    assert run(latent).abs().max() > 0
    decoder: Any = vae.model.decoder
    last = copy.deepcopy(decoder.conv_out)
    for weight in last.parameters():
        weight.zero_()
    decoder.conv_out = last
    assert run(latent).abs().max() == 0


def test_a_network_is_pickled_and_copied(family: str, small_vae: Callable[..., VideoVAE]) -> None:
    vae = small_vae(family)
    latent = torch.randn(1, vae.info.latent_channels, 2, 2, 3, dtype=torch.float64)
    expected = vae.decode(latent)
    for network in (pickle.loads(pickle.dumps(vae.model)), copy.deepcopy(vae.model)):
        assert network.family is vae.model.family
        assert torch.equal(VideoVAE(network).decode(latent), expected)


# ---------------------------------------------------------------------------------------------- how clips lie


class Inputs(TorchDispatchMode):
    """Notes convolutions whose input does not lie as it should: (what, shape, strides).

    Convolutions give what they give on CUDA, channels-last where input or kernel is; on the meta device torch says
    contiguous. Pixels of a region may lie apart, channels of a pixel not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.wrong: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if "convolution" not in func.name():
            return out
        x, weight = args[:2]
        self.count += 1
        if x.stride(1) != 1 and x.shape[1] > 1:
            self.wrong.append((func.name(), tuple(x.shape), x.stride()))
        form = torch.channels_last_3d if x.ndim == 5 else torch.channels_last
        last = x.stride(1) == 1 or weight.is_contiguous(memory_format=form)
        return out.contiguous(memory_format=form) if last else out


@pytest.mark.parametrize("plan", [None, TilePlan(tile=4), TilePlan(tile=(3, None))])
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_every_convolution_reads_channels_last_off_the_cpu(family: str, plan: TilePlan | None, direction: str) -> None:
    """On the meta device, which lays clips out as GPUs do."""
    vae = VideoVAE(meta_network(FAMILIES[family], SMALL[family], ("encode", "decode"), torch.bfloat16))
    with Inputs() as inputs:
        if direction == "decode":
            shape = (1, vae.info.latent_channels, 6, 9, 8)
            vae.decode(torch.empty(shape, dtype=torch.bfloat16, device="meta"), plan=plan)
        else:
            vae.encode(torch.empty(1, 3, 21, 72, 64, dtype=torch.bfloat16, device="meta"), plan=plan)
    assert inputs.count > 50
    assert inputs.wrong == []


def test_a_cpu_keeps_channels_apart() -> None:
    x = torch.empty(1, 3, 2, 4, 4).contiguous(memory_format=torch.channels_last_3d)
    assert clips.laid_out(x).is_contiguous()
    assert clips.empty(x.shape, x).is_contiguous()


# ---------------------------------------------------------------------------------------------------- 720p


class Operators(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def stream(vae: VideoVAE, clip: Tensor, *, decoding: bool, plan: Any = None) -> None:
    for chunk in vae.decode_stream([clip], plan=plan) if decoding else vae.encode_stream([clip], plan=plan):
        del chunk


def counted(config: Config, clip: Tensor, *, decoding: bool, plan: Any = None) -> MetaProfile:
    vae = full_size(config)
    with MetaProfile() as profile:
        stream(vae, clip, decoding=decoding, plan=plan)
    return profile


def empty(*shape: int) -> Tensor:
    return torch.empty(1, *shape, dtype=torch.bfloat16, device="meta")


CV, CV_SD3, IV = FULL["cv-vae"], FULL["cv-vae-sd3"], FULL["iv-vae"]


@pytest.mark.parametrize(("name", "config", "channels"), [("cv", CV, 4), ("cv-sd3", CV_SD3, 16)])
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_work_and_memory_of_cv_vae_at_720p(name: str, config: Config, channels: int, direction: str) -> None:
    """Of one chunk that nets 16 frames."""
    decoding = direction == "decode"
    clip = empty(channels, 5, 90, 160) if decoding else empty(3, 17, 720, 1280)
    profile, most = counted(config, clip, decoding=decoding), TARGETS[name, direction]
    assert profile.flops / 16 <= most.tflop * 1e12
    assert profile.bytes_moved / 16 <= most.gigabytes * 1e9
    assert profile.peak_bytes <= most.gibibytes * 2**30


def test_a_tile_of_the_official_grid_fits_5_gib() -> None:
    """CV-VAE, 576 px, 17 frames; 10.9 GiB in the official code."""
    assert counted(CV, empty(4, 5, 72, 72), decoding=True).peak_bytes <= 5 * 2**30


@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_work_and_memory_of_iv_vae_at_720p(direction: str) -> None:
    """Of one later group, which nets four frames."""
    decoding = direction == "decode"
    short, long = (empty(16, n, 90, 160) if decoding else empty(3, 4 * n - 3, 720, 1280) for n in (2, 3))
    two, three = (counted(IV, clip, decoding=decoding) for clip in (short, long))
    most = TARGETS["iv-64", direction]
    assert (three.flops - two.flops) / 4 <= most.tflop * 1e12
    assert (three.bytes_moved - two.bytes_moved) / 4 <= most.gigabytes * 1e9
    assert three.peak_bytes <= most.gibibytes * 2**30


def test_strips_of_iv_vae_at_720p_fit_4_7_gib() -> None:
    plan = TilePlan(tile=(45, None))
    assert counted(IV, empty(16, 3, 90, 160), decoding=True, plan=plan).peak_bytes <= 4.7 * 2**30


def test_few_operators_do_the_work() -> None:
    """Launches count on a GPU: three latents of 720p, as whole frames."""
    vae = full_size(IV)
    with Operators() as operators:
        stream(vae, empty(16, 3, 90, 160), decoding=True)
    assert operators.calls.total() <= 2200
    assert not any("_local_scalar_dense" in name for name in operators.calls)


def test_group_norms_copy_nothing_to_the_host() -> None:
    vae = full_size(CV)
    with Operators() as operators:
        stream(vae, empty(4, 5, 16, 16), decoding=True)
        stream(vae, empty(4, 5, 16, 16), decoding=True, plan=TilePlan(tile=8))
    assert operators.calls["cviv::group_moments"] > 100
    assert not any("_local_scalar_dense" in name or "lift_fresh" in name for name in operators.calls)
