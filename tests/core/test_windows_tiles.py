"""Cutting and merging in time and space, with an identity in place of the model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vae_core import Compression, ReferencePlan
from vae_core.families import FAMILIES, VIDEO, Windows
from vae_core.run.tiling import Overlapping, run_blended
from vae_core.run.windows import check_whole, pad_stream, rechunk, whole_stream

WINDOWS = [w for family in FAMILIES.values() for w in (family.frames, family.latents)]
WINDOWS.append(Windows(first=3, step=2, overlap=2))
CV_VAE = FAMILIES["cv-vae"]
IMAGES = Compression(time=1, space=8)


def clip(frames: int, height: int = 1, width: int = 1) -> Tensor:
    return torch.arange(frames * height * width, dtype=torch.float64).reshape(1, 1, frames, height, width)


@given(st.integers(1, 80), st.lists(st.integers(0, 20), max_size=30), st.sampled_from(WINDOWS))
@settings(deadline=None, max_examples=200)
def test_windows_merge_to_the_clip_however_it_is_cut(frames: int, cuts: list[int], windows: Windows) -> None:
    x = clip(frames)
    lengths: list[int] = []
    for n in cuts:
        lengths.append(min(n, frames - sum(lengths)))
    lengths.append(frames - sum(lengths))
    chunks = list(rechunk(x.split(lengths, dim=2), windows))
    merged = torch.cat([w if i == 0 else w[:, :, windows.overlap :] for i, w in enumerate(chunks)], dim=2)
    assert torch.equal(merged, x)
    whole = list(rechunk([x], windows))
    assert [w.tolist() for w in chunks] == [w.tolist() for w in whole]
    assert all(w.shape[2] == windows.step + windows.overlap for w in chunks[1:-1])
    expected = max(1, 1 + -(-(frames - windows.first) // windows.step))
    assert len(chunks) == expected == windows.count(frames)
    assert [w.tolist() for w in windows.cut(x)] == [w.tolist() for w in chunks]


def test_the_published_chunks_of_a_cv_vae_clip() -> None:
    """Pixels [16n, 16n + 17), latents [4n, 4n + 5), as many as max(1, ceil((T - 1) / 16))."""
    spans = [(int(w[0, 0, 0]), int(w[0, 0, -1]) + 1) for w in rechunk([clip(37)], CV_VAE.frames)]
    assert spans == [(0, 17), (16, 33), (32, 37)]
    spans = [(int(w[0, 0, 0]), int(w[0, 0, -1]) + 1) for w in rechunk([clip(10)], CV_VAE.latents)]
    assert spans == [(0, 5), (4, 9), (8, 10)]


def test_a_stream_holds_one_window_only() -> None:
    """A window's storage is no larger than the window and one clip, and earlier clips are let go."""
    made: list[int] = []

    def clips() -> object:
        for i in range(100):
            made.append(i)
            yield clip(3)

    for n, window in enumerate(rechunk(clips(), CV_VAE.frames)):  # type: ignore[arg-type]
        assert window.untyped_storage().nbytes() <= 8 * (17 + 3)
        assert len(made) <= (17 + 16 * n) // 3 + 2  # nothing is read ahead


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (2, 2), (5, 2), (6, 3), (9, 3), (17, 5), (97, 25)])
def test_frame_counts(frames: int, latents: int) -> None:
    assert VIDEO.latent_frames(frames) == latents
    assert VIDEO.pixel_frames(latents) >= frames
    assert VIDEO.pixel_frames(latents - 1) < frames
    assert IMAGES.latent_frames(frames) == IMAGES.pixel_frames(frames) == frames


@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=8),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from([VIDEO, IMAGES]),
)
@settings(deadline=None)
def test_padding_repeats_the_last_frame_and_the_edge(
    lengths: list[int], height: int, width: int, compression: Compression
) -> None:
    frames = sum(lengths)
    x = clip(frames, height, width) if frames else torch.zeros(1, 1, 0, height, width)
    padded = list(pad_stream(x.split(lengths, dim=2), compression))
    if not frames:
        assert padded == []
        return
    y = torch.cat(padded, dim=2)
    check_whole(*y.shape[2:], compression)
    assert y.shape[2] - frames < compression.time
    assert y.shape[3] - height < 8
    assert y.shape[4] - width < 8
    rows, columns = torch.arange(y.shape[3]).clamp(max=height - 1), torch.arange(y.shape[4]).clamp(max=width - 1)
    times = torch.arange(y.shape[2]).clamp(max=frames - 1)
    assert torch.equal(y, x[:, :, times][..., rows, :][..., columns])


@pytest.mark.parametrize("shape", [(2, 8, 8), (5, 9, 8), (5, 8, 12), (96, 570, 1000)])
def test_a_clip_that_does_not_fit_is_refused_with_the_way_out(shape: tuple[int, int, int]) -> None:
    frames, height, width = shape
    with pytest.raises(ValueError, match=r"needed are 1 \+ 4N frames .* pad=True .* size=") as caught:
        check_whole(*shape, VIDEO)
    assert f"{frames} frames of {width}x{height}" in str(caught.value)
    assert f"frames={frames}, size=({height}, {width})" in str(caught.value)
    with pytest.raises(ValueError, match="pad=True"):
        list(whole_stream([torch.zeros(1, 3, *shape)], VIDEO))


def test_any_number_of_frames_is_whole_where_time_is_not_compressed() -> None:
    check_whole(6, 16, 8, IMAGES)
    with pytest.raises(ValueError, match="6 frames of 9x16; needed are any frames and sides that are multiples of 8"):
        check_whole(6, 16, 9, IMAGES)


def test_the_refusal_names_the_padded_size() -> None:
    with pytest.raises(ValueError, match="up to 97 frames of 1000x576"):
        check_whole(96, 570, 1000, VIDEO)


# ---------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize(
    ("size", "spans"),
    [
        (50, [(0, 50)]),
        (72, [(0, 72)]),
        (73, [(0, 72), (56, 73)]),
        (128, [(0, 72), (56, 128)]),
        (129, [(0, 72), (56, 128), (112, 129)]),
    ],
)
def test_tile_spans_are_the_published_ones(size: int, spans: list[tuple[int, int]]) -> None:
    assert ReferencePlan().latents == Overlapping(tile=72, overlap=16)
    assert ReferencePlan().pixels == Overlapping(tile=576, overlap=128)
    assert ReferencePlan().latents.spans(size) == spans


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([(32, 0.25), (64, 0.25), (72, 0.2222), (16, 0.0)]))
@settings(deadline=None, max_examples=60)
def test_blended_tiles_of_an_identity_give_the_whole(height: int, width: int, tiling: tuple[int, float]) -> None:
    plan = ReferencePlan(*tiling)
    x = torch.rand(1, 2, 1, height, width, dtype=torch.float64)
    up = x.repeat_interleave(8, -1).repeat_interleave(8, -2)
    decoded = run_blended(
        x,
        lambda t: t.repeat_interleave(8, -1).repeat_interleave(8, -2),
        source=plan.latents,
        target=plan.pixels,
    )
    torch.testing.assert_close(decoded, up, rtol=0, atol=1e-12)
    encoded = run_blended(up, lambda t: t[..., ::8, ::8].clone(), source=plan.pixels, target=plan.latents)
    torch.testing.assert_close(encoded, x, rtol=0, atol=1e-12)


def test_blending_fades_from_the_tile_before() -> None:
    """Row i of the overlap is neighbour * (1 - i/o) + tile * i/o; vertical first, then horizontal."""
    values = iter([0.0, 1.0, 2.0, 3.0])
    grid = Overlapping(tile=8, overlap=4)
    y = run_blended(torch.zeros(1, 1, 1, 12, 12), lambda t: torch.full_like(t, next(values)), source=grid, target=grid)[
        0, 0, 0
    ]
    ramp = torch.tensor([0, 0.25, 0.5, 0.75])
    torch.testing.assert_close(y[0, 4:8], ramp * 1.0)
    torch.testing.assert_close(y[4:8, 0], ramp * 2.0)
    above, left = ramp[None] * 1.0, ramp[:, None] * 2.0  # what the neighbours show there after their own blending
    tile = above * (1 - ramp[:, None]) + 3.0 * ramp[:, None]
    torch.testing.assert_close(y[4:8, 4:8], left * (1 - ramp) + tile * ramp)
    assert y[-1, -1] == 3


@pytest.mark.parametrize(
    ("tile", "overlap"), [(576, 0.26), (100, 0.25), (0, 0.25), (64, 0.6), (64, -0.1), (48, 0.2222)]
)
def test_tiles_that_do_not_line_up_are_refused(tile: int, overlap: float) -> None:
    with pytest.raises(ValueError, match=r"multiples of 72 with overlap 0\.2222"):
        ReferencePlan(tile, overlap)
