"""Keyframe detail: it follows the motion, fades where the motion is in doubt, and never needs the whole clip."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vae_core.detail.fusion import DetailSettings, Fused, blur, check_counts, fuse_detail

SIDES = 48, 64
FULL = DetailSettings(strength=1.0, radius=3.0, confidence=0.5)


def cv2_or_skip() -> None:
    pytest.importorskip("cv2")


def textured(frames: int, step: int = 1, seed: int = 0) -> Tensor:
    """A fine texture that moves `step` pixels to the left from frame to frame: (1, 3, t, h, w)."""
    height, width = SIDES
    noise = torch.randn(3, height, width + step * frames, generator=torch.Generator().manual_seed(seed))
    picture = 0.5 * blur(noise, 0.8) + 0.8 * blur(noise, 3.0)
    return torch.stack([picture[:, :, step * t : step * t + width] for t in range(frames)], 1)[None].clamp(-1, 1)


def soft(video: Tensor) -> Tensor:
    return torch.stack([blur(frame, 1.2) for frame in video[0].unbind(1)], 1)[None]


def fused(video: Tensor, keyframes: Tensor, settings: DetailSettings = FULL) -> Tensor:
    return torch.cat([chunk.frames for chunk in fuse_detail([video], [keyframes], settings)], 2)


def error(video: Tensor, truth: Tensor) -> Tensor:
    """Root mean square of each frame, the border left out, where what moves in was never seen."""
    return (video - truth)[0, :, :, 6:-6, 6:-14].square().mean((0, 2, 3)).sqrt()


def test_blur_keeps_a_flat_picture_and_the_mean_of_another() -> None:
    torch.testing.assert_close(blur(torch.full((3, 20, 30), 0.4), 3.0), torch.full((3, 20, 30), 0.4))
    point = torch.zeros(1, 41, 41)
    point[0, 20, 20] = 1
    spread = blur(point, 2.0)
    distance = (torch.arange(41.0) - 20).square()
    assert float(spread.sum()) == pytest.approx(1, abs=1e-5)
    assert float((spread[0].sum(0) * distance).sum()) == pytest.approx(4, rel=0.03)


def test_strength_0_is_the_video_bit_for_bit() -> None:
    video = textured(9)
    none = DetailSettings(strength=0, radius=3.0, confidence=0.5)
    chunks = list(fuse_detail(video.split(4, 2), [torch.zeros(1, 3, 3, *SIDES)], none))
    assert torch.equal(torch.cat([chunk.frames for chunk in chunks], 2), video)
    assert sum((chunk.carried for chunk in chunks), ()) == (0.0,) * 9


def test_detail_follows_the_motion() -> None:
    cv2_or_skip()
    truth = textured(13)
    video = soft(truth)
    result = fused(video, truth[:, :, ::4])
    before, after = error(video, truth), error(result, truth)
    assert (after < 0.5 * before).all(), (before, after)
    assert (after[::4] < 0.35 * before[::4]).all()
    half = fused(video, truth[:, :, ::4], DetailSettings(strength=0.5, radius=3.0, confidence=0.5))
    inside = result.abs() < 1  # nothing was clamped
    torch.testing.assert_close(half[inside], ((video + result) / 2)[inside])


def test_a_single_keyframe_cannot_be_checked_and_gives_nothing() -> None:
    cv2_or_skip()
    truth = textured(1)
    (chunk,) = fuse_detail([soft(truth)], [truth], FULL)
    assert torch.equal(chunk.frames, soft(truth))
    assert chunk.carried == (0.0,)


@pytest.mark.parametrize("shown", [1, 2, 3, 4])
def test_the_frame_that_a_keyframe_shows_is_found(shown: int) -> None:
    cv2_or_skip()
    truth = textured(9)
    chunks = list(fuse_detail([soft(truth)], [truth[:, :, [0, shown, 4 + shown]]], FULL))
    assert [chunk.frames.shape[2] for chunk in chunks] == [1, shown, 4] + [4 - shown] * (shown < 4)
    assert [chunk.likeness is None for chunk in chunks] == [False] * 3 + [True] * (shown < 4)
    result = torch.cat([chunk.frames for chunk in chunks], 2)
    assert (error(result, truth) < 0.6 * error(soft(truth), truth)).all()


def test_where_nothing_moves_the_last_of_the_four_is_taken() -> None:
    cv2_or_skip()
    still = textured(1).expand(-1, -1, 9, -1, -1)
    assert [chunk.frames.shape[2] for chunk in fuse_detail([still], [still[:, :, :3]], FULL)] == [1, 4, 4]


def test_detail_does_not_cross_a_cut() -> None:
    cv2_or_skip()
    truth = torch.cat([textured(3), textured(6, seed=5)], 2)  # a new picture from frame 3 on
    keyframes = truth[:, :, ::4]
    chunks = list(fuse_detail([soft(truth)], [keyframes], FULL))
    result = torch.cat([chunk.frames for chunk in chunks], 2)
    before, after = error(soft(truth), truth), error(result, truth)
    torch.testing.assert_close(after[:3], before[:3], rtol=0.01, atol=0)  # a picture of a single keyframe
    assert (after < 0.5 * before)[3:].all()


def test_confidence_lets_less_through() -> None:
    cv2_or_skip()
    truth = textured(5)
    truth[:, :, 2] = truth[:, :, 2].flip(-1)  # a frame that no motion explains

    def carried(confidence: float) -> tuple[float, ...]:
        settings = DetailSettings(strength=1.0, radius=3.0, confidence=confidence)
        return sum((chunk.carried for chunk in fuse_detail([soft(truth)], [truth[:, :, ::4]], settings)), ())

    low, middle, high = carried(0.0), carried(0.5), carried(0.9)
    assert min(low[:2] + low[3:]) > 0.9
    assert middle[2] < 0.3 < 0.8 < min(middle[0], middle[4])
    assert high[0] < middle[0] + 1e-6
    assert high[1] < middle[1]


def test_chunks_of_any_length_give_the_same_and_little_is_held() -> None:
    cv2_or_skip()
    truth = textured(17)
    video, keyframes = soft(truth), truth[:, :, ::4]
    whole = fused(video, keyframes)
    read = 0

    def one_by_one() -> Iterator[Tensor]:
        nonlocal read
        for frame in video.split(1, 2):
            read += 1
            yield frame

    chunks: list[Fused] = []
    done = 0
    for chunk in fuse_detail(one_by_one(), keyframes.split(2, 2), FULL):
        done += chunk.frames.shape[2]
        assert read - done <= 8
        chunks.append(chunk)
    assert torch.equal(torch.cat([chunk.frames for chunk in chunks], 2), whole)


@pytest.mark.parametrize("frames", [1, 2, 4, 5, 7, 8])
def test_any_count_goes_in_and_comes_back(frames: int) -> None:
    cv2_or_skip()
    video = textured(frames)
    keyframes = -(-(frames - 1) // 4) + 1
    check_counts(frames, keyframes)
    images = video[:, :, [min(4 * k, frames - 1) for k in range(keyframes)]]
    assert fused(soft(video), images).shape == video.shape


def test_counts_that_do_not_belong_together() -> None:
    check_counts(97, 25)
    check_counts(94, 25)  # a video whose padding was cut off
    with pytest.raises(ValueError, match=r"Got 97 frames and 24 keyframes; 97 frames need 25 keyframes, and 24 "):
        check_counts(97, 24)
    with pytest.raises(ValueError, match=r"24 keyframes need 90 to 93 frames.*Decode the same latent with both VAEs"):
        check_counts(97, 24)
    with pytest.raises(ValueError, match=r"1 keyframes need 1 frames"):
        check_counts(2, 1)
    with pytest.raises(ValueError, match=r"0 frames need 0 keyframes"):
        check_counts(0, 1)


@pytest.mark.parametrize(
    ("keyframes", "message"),
    [
        (torch.zeros(1, 3, 2, *SIDES), r"at least 9 frames and only 2 keyframes; needed is one keyframe for frame 0"),
        (torch.zeros(1, 3, 4, *SIDES), r"9 frames and 4 keyframes; needed is one keyframe"),
        (torch.zeros(1, 3, 3, 48, 72), r"Keyframe 0 has .* \(3, 48, 72\) and the frames \(3, 48, 64\); .* be equal"),
    ],
    ids=["few", "many", "size"],
)
def test_streams_that_do_not_belong_together(keyframes: Tensor, message: str) -> None:
    cv2_or_skip()
    with pytest.raises(ValueError, match=message):
        list(fuse_detail([textured(9)], [keyframes], FULL))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"strength": -0.1}, r"strength is -0.1; allowed is 0 to 2"),
        ({"radius": 0.0}, r"radius is 0.0; allowed is 0.5 to 32"),
        ({"confidence": 1.0}, r"confidence is 1.0; allowed is 0 to 0.95"),
        ({"strength": float("nan")}, r"strength is nan"),
    ],
)
def test_settings(changed: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetailSettings(**{"strength": 1.0, "radius": 3.0, "confidence": 0.5, **changed})


def test_without_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str) -> object:
        if name == "cv2":
            raise ModuleNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without)
    video = textured(1)
    with pytest.raises(ValueError, match=r"needs OpenCV.*pip install opencv-python-headless"):
        list(fuse_detail([video], [video], FULL))
