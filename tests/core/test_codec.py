"""Whole-clip calls: any frame count and size in and out, dtypes, errors that say what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vae_core
from vae_core.families.cv_vae import CVVAEConfig

Make = Callable[..., vae_core.VideoVAE]


@given(st.integers(1, 24), st.integers(1, 20), st.integers(1, 20))
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_frame_count_and_size_comes_back(
    family: str, small_vae: Make, frames: int, height: int, width: int
) -> None:
    vae = small_vae(family, torch.float32)
    video = torch.rand(1, 3, frames, height, width) * 2 - 1
    latent = vae.encode(video, pad=True)
    latents = 1 + -(-(frames - 1) // vae.info.time_compression)
    assert latent.shape == (1, vae.info.latent_channels, latents, -(-height // 8), -(-width // 8))
    out = vae.decode(latent, frames=frames, size=(height, width))
    assert out.shape == video.shape
    full = vae.decode(latent)
    assert torch.equal(out, full[:, :, :frames, :height, :width])


def test_96_frames_of_an_odd_size_come_back_as_they_were(small_vae: Make) -> None:
    vae = small_vae("iv-vae", torch.float32)
    video = torch.rand(1, 3, 96, 19, 34)
    assert vae.decode(vae.encode(video, pad=True), frames=96, size=(19, 34)).shape == video.shape


def test_padding_a_clip_that_fits_changes_nothing(family: str, small_vae: Make) -> None:
    vae = small_vae(family)
    video = torch.rand(1, 3, 5, 16, 8, dtype=torch.float64)
    assert torch.equal(vae.encode(video, pad=True), vae.encode(video))


def test_padding_is_repeating_the_last_frame_and_the_edge(family: str, small_vae: Make) -> None:
    vae = small_vae(family)
    video = torch.rand(1, 3, 6, 13, 9, dtype=torch.float64)
    padded = torch.nn.functional.pad(video, (0, 7, 0, 3, 0, -5 % vae.info.time_compression), mode="replicate")
    assert torch.equal(vae.encode(video, pad=True), vae.encode(padded))
    for a, b in zip(vae.moments(video, pad=True), vae.moments(padded), strict=True):
        assert torch.equal(a, b)


def test_scaling_lies_on_the_right_side(small_vae: Make) -> None:
    video = torch.rand(1, 3, 5, 8, 8, dtype=torch.float64)
    iv, cv = small_vae("iv-vae"), small_vae("cv-vae")
    mean = iv.moments(video)[0]
    torch.testing.assert_close(iv.encode(video), 1.3 * (mean - 0.1))
    assert torch.equal(cv.encode(video), cv.moments(video)[0])
    assert (cv.info.scale_factor, cv.info.shift_factor, cv.info.scaled_by) == (0.18215, 0.0, "sampler")
    sd3 = small_vae("cv-vae-sd3").info
    assert (sd3.scale_factor, sd3.shift_factor, sd3.scaled_by) == (1.5305, 0.0609, "sampler")
    config = CVVAEConfig(widths=(32, 32, 64, 64), blocks_per_level=1, latent_channels=16, sd3=False)
    inflated = small_vae(config).info  # as of an image VAE of 16 channels
    assert (inflated.scale_factor, inflated.shift_factor, inflated.scaled_by) == (1.5305, 0.0609, "sampler")
    assert (iv.info.scale_factor, iv.info.shift_factor, iv.info.scaled_by) == (1.3, 0.1, "vae")
    image = small_vae("image-vae")
    assert torch.equal(image.encode(video), image.moments(video)[0])
    assert (image.info.scale_factor, image.info.shift_factor, image.info.scaled_by) == (0.18215, 0.0, "sampler")


def test_info_is_a_readable_block(family: str, small_vae: Make) -> None:
    vae = small_vae(family)
    text = str(vae.info)
    assert f"family           {family}" in text
    assert f"{vae.info.time_compression}x in time, 8x8 in space" in text
    assert "float32, bfloat16" in text


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.2), (torch.float16, 0.1)])
def test_half_precision_runs_and_stays_close(
    family: str, dtype: torch.dtype, tolerance: float, small_vae: Make
) -> None:
    torch.manual_seed(0)
    video = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    exact, half = small_vae(family, torch.float32), small_vae(family, dtype)
    latent, latent_half = exact.encode(video), half.encode(video)
    assert latent_half.dtype == dtype
    assert half.dtype == dtype
    assert (latent_half.float() - latent).abs().max() < tolerance * latent.std()
    frames, frames_half = exact.decode(latent), half.decode(latent)
    assert frames_half.dtype == dtype
    assert (frames_half.float() - frames).abs().max() < tolerance * frames.std()


def test_progress_counts_up_to_the_whole(family: str, small_vae: Make) -> None:
    vae = small_vae(family, torch.float32)
    seen: list[tuple[int, int]] = []
    latent = vae.encode(torch.rand(1, 3, 33, 8, 8), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (latent.shape[2], latent.shape[2])
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    seen.clear()
    vae.decode(latent, frames=30, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (30, 30)


def test_frames_stop_the_decoder_early(family: str, small_vae: Make) -> None:
    vae = small_vae(family, torch.float32)
    latent = vae.encode(torch.rand(1, 3, 33, 8, 8))
    asked: list[int] = []

    def chunks() -> Any:
        for i in range(latent.shape[2]):
            asked.append(i)
            yield latent[:, :, i : i + 1]

    out = torch.cat(list(vae.decode_stream(chunks(), frames=5)), dim=2)
    assert torch.equal(out, vae.decode(latent)[:, :, :5])
    assert len(asked) <= 5


BAD_VIDEOS = [
    (torch.rand(3, 5, 8, 8), r"shape \(3, 5, 8, 8\).*needs \(batch, 3, frames, height, width\)"),
    (torch.rand(5, 3, 8, 8), r"becomes one clip by x\.movedim\(0, 1\)\[None\]"),
    (torch.rand(1, 5, 3, 8, 8), r"Channels seem to come after frames"),
    (torch.rand(1, 4, 5, 8, 8), r"latent with 4 channels is of another VAE"),
    (torch.rand(1, 3, 0, 8, 8), "has no frames"),
    (torch.rand(1, 3, 5, 0, 8), "none of them 0"),
    (torch.rand(1, 3, 4, 8, 8), r"4 frames of 8x8; needed are 1 \+ 4N frames"),
    (torch.rand(1, 3, 5, 12, 8), "5 frames of 8x12.*multiples of 8"),
    (torch.zeros(1, 3, 5, 8, 8, dtype=torch.uint8), r"dtype torch.uint8.*video.float\(\) / 127.5 - 1"),
]


@pytest.mark.parametrize(("video", "message"), BAD_VIDEOS)
def test_a_wrong_video_is_refused_with_the_way_out(video: torch.Tensor, message: str, small_vae: Make) -> None:
    vae = small_vae("cv-vae", torch.float32)
    with pytest.raises(ValueError, match=message):
        vae.encode(video)
    with pytest.raises(ValueError, match=message):
        vae.moments(video)


def test_a_wrong_latent_is_refused_with_the_way_out(small_vae: Make) -> None:
    vae = small_vae("cv-vae", torch.float32)
    with pytest.raises(ValueError, match=r"cv-vae needs \(batch, 4, .*latent with 16 channels is of another VAE"):
        vae.decode(torch.rand(1, 16, 2, 1, 1))
    with pytest.raises(ValueError, match=r"movedim\(0, 1\)"):
        vae.decode(torch.rand(2, 4, 1, 1))
    with pytest.raises(ValueError, match="The latent has no frames"):
        vae.decode(torch.rand(1, 4, 0, 1, 1))
    latent = torch.rand(1, 4, 3, 2, 2)
    with pytest.raises(ValueError, match="3 latents decode to 9 frames; give a number from 1 to 9"):
        vae.decode(latent, frames=10)
    with pytest.raises(ValueError, match="from 1 to 9"):
        vae.decode(latent, frames=0)
    with pytest.raises(ValueError, match="decode to 9 frames; give a smaller number"):
        list(vae.decode_stream(iter([latent]), frames=10))
    with pytest.raises(ValueError, match=r"decode to 16x16 .*heights 9 to 16 and widths 9 to 16"):
        vae.decode(latent, size=(8, 16))


def test_pieces_of_a_stream_must_fit_together(family: str, small_vae: Make) -> None:
    vae = small_vae(family, torch.float32)
    with pytest.raises(ValueError, match="only the number of frames may change"):
        list(vae.encode_stream([torch.rand(1, 3, 1, 8, 8), torch.rand(1, 3, 4, 16, 8)]))
    assert list(vae.encode_stream([])) == []
    four = [torch.rand(1, 3, 1, 8, 8), torch.rand(1, 3, 3, 8, 8)]
    if vae.info.time_compression == 1:  # any number of frames is whole
        assert sum(latent.shape[2] for latent in vae.encode_stream(four)) == 4
        return
    with pytest.raises(ValueError, match=r"4 frames of 8x8; needed are 1 \+ 4N"):
        list(vae.encode_stream(four))


@pytest.mark.parametrize("other", ["iv-vae", "image-vae"])
def test_the_reference_plan_is_for_cv_vae(other: str, small_vae: Make) -> None:
    vae = small_vae(other, torch.float32)
    plan = vae_core.ReferencePlan(64, 0.25)
    with pytest.raises(ValueError, match=rf"this is {other}, whose official code does not tile\. Leave plan out"):
        vae.encode(torch.rand(1, 3, 1, 8, 8), plan=plan)
    with pytest.raises(ValueError, match="Leave plan out"):
        vae.decode(torch.rand(1, 4, 1, 1, 1), plan=plan)


def test_a_plan_changes_nothing_for_a_frame_that_fits_one_tile(small_vae: Make) -> None:
    vae = small_vae("cv-vae")
    video = torch.rand(1, 3, 5, 32, 24, dtype=torch.float64)
    plan = vae_core.ReferencePlan(32, 0.25)
    assert torch.equal(vae.encode(video, plan=plan), vae.encode(video))
    wide = torch.rand(1, 3, 5, 32, 64, dtype=torch.float64)
    assert vae.decode(vae.encode(wide, plan=plan), plan=plan).shape == wide.shape
    assert not torch.allclose(vae.encode(wide, plan=plan), vae.encode(wide))


@pytest.mark.parametrize("family", ["cv-vae", "cv-vae-sd3", "image-vae"])
def test_draws_clamp_the_log_variance_as_published(family: str, small_vae: Callable[..., vae_core.VideoVAE]) -> None:
    """To -30 and 20, in the draw alone: the moments come as the network gives them."""
    vae = small_vae(family)
    last = vae.model.encoder.quant or vae.model.encoder.conv_out  # type: ignore[union-attr]
    z = vae.info.latent_channels
    last.bias[z:] += torch.linspace(-80, 80, z, dtype=torch.float64)  # type: ignore[index]
    video = torch.rand(1, 3, 1, 16, 16, dtype=torch.float64)
    mean, logvar = vae.moments(video)
    assert logvar.min() < -40
    assert logvar.max() > 40
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = vae.encode(video, sample=True, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(got, mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise, rtol=1e-9, atol=1e-9)
