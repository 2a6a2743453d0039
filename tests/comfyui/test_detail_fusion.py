"""Keyframe Detail: what it gives, what it says, and what it refuses. Where OpenCV is missing, the sentence about it."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from .calls import decode, encode
from .conftest import LoadVAE
from .inprocess import Comfy, NodeError
from .weights import picture

NODE = "CVIV_DetailFusion"
HAS_OPENCV = importlib.util.find_spec("cv2") is not None
WIDGETS = {"strength": 1.0, "detail_radius": 3.0, "confidence": 0.5}
needs_opencv = pytest.mark.skipif(not HAS_OPENCV, reason="opencv-python-headless is not installed")


def fuse(comfy: Comfy, frames: Tensor, keyframes: Tensor, **changes: Any) -> tuple[Tensor, str]:
    images, report = comfy.call(NODE, frames=frames, keyframes=keyframes, **{**WIDGETS, **changes})
    return images, report


def fine(frames: int, height: int = 48, width: int = 64) -> Tensor:
    """An IMAGE of noise that stands still: there is detail everywhere."""
    noise = torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(1))
    return noise.mul(0.6).add(0.2).expand(frames, -1, -1, -1)


def soft(images: Tensor) -> Tensor:
    """Blurred by 1 2 1 in both directions, which turns no frequency over."""
    padded = torch.nn.functional.pad(images.movedim(-1, 1), (1, 1, 1, 1), mode="replicate")
    return torch.nn.functional.avg_pool2d(torch.nn.functional.avg_pool2d(padded, 2, 1), 2, 1).movedim(1, -1)


def test_strength_0_gives_the_frames_themselves(comfy: Comfy) -> None:
    frames = picture(9, 40, 56)
    images, report = fuse(comfy, frames, frames[::4], strength=0.0)
    assert torch.equal(images, frames)
    assert "strength 0: the frames are as they were" in report


@needs_opencv
def test_frames_get_the_detail_of_the_keyframes(comfy: Comfy) -> None:
    truth = fine(9)
    frames = soft(truth)
    images, report = fuse(comfy, frames, truth[::4])
    assert images.shape == frames.shape
    assert images.dtype == torch.float32
    assert (images - truth).square().mean() < 0.5 * (frames - truth).square().mean()
    assert report.startswith("9 frames, ")
    assert "detail of 3 keyframes added to 100% of the picture, least in frame" in report
    assert "hardly look like" not in report
    assert comfy.progress[-1].value == comfy.progress[-1].total == 9


@needs_opencv
def test_keyframes_of_another_clip_are_told(comfy: Comfy) -> None:
    frames = soft(fine(9))
    keyframes = frames[::4].flip(2).clone()
    keyframes[0] = frames[0]
    _, report = fuse(comfy, frames, keyframes)
    assert "keyframes 1, 2 hardly look like their frames" in report


@needs_opencv
def test_padded_keyframes_are_cut_and_that_is_told(comfy: Comfy) -> None:
    truth = fine(5)
    images, report = fuse(comfy, soft(truth)[:, :43, :61], truth[::4])
    assert images.shape == (5, 43, 61, 3)
    assert "the padding of the keyframes (64x48) at the right and the bottom is cut off" in report


@needs_opencv
def test_with_both_decodes_of_one_latent(comfy: Comfy, load_vae: LoadVAE) -> None:
    """The whole way: one latent, as a clip and as separate images."""
    vae = load_vae("demo-cv-vae")
    latent, _ = encode(comfy, vae, picture(8, 48, 64))
    frames, _, _ = decode(comfy, vae, latent)
    (keyframes,) = comfy.call("VAEDecode", vae=load_vae("demo-cv-vae", latent_layout="separate images"), samples=latent)
    assert keyframes.shape == (3, 48, 64, 3)
    images, report = fuse(comfy, frames, keyframes)
    assert images.shape == frames.shape == (8, 48, 64, 3)
    assert "nothing was added, the frames are as they were: the keyframes are no sharper" in report
    assert torch.equal(images, frames)


@needs_opencv
def test_keyframes_without_gain_change_nothing_and_that_is_told(comfy: Comfy) -> None:
    frames = fine(9)
    images, report = fuse(comfy, frames, soft(frames[::4]))
    assert torch.equal(images, frames)
    assert "nothing was added, the frames are as they were: the keyframes are no sharper than the video" in report


@needs_opencv
def test_one_keyframe_is_said_not_to_be_enough(comfy: Comfy) -> None:
    _, report = fuse(comfy, soft(fine(1)), fine(1))
    assert "nothing was added, the frames are as they were: a single keyframe cannot be checked" in report


@pytest.mark.parametrize(
    ("frames", "keyframes", "message"),
    [
        (fine(97, 16, 16), fine(24, 16, 16), r"Got 97 frames and 24 keyframes; 97 frames need 25 keyframes"),
        (fine(9), fine(9), r"9 keyframes need 30 to 33 frames .*Decode the same latent with both VAEs"),
        (fine(5), fine(2, 48, 72), r"The keyframes have 72x48 pixels and the frames 64x48; they must be equal"),
    ],
    ids=["too few", "all frames", "size"],
)
def test_refusals(comfy: Comfy, frames: Tensor, keyframes: Tensor, message: str) -> None:
    with pytest.raises(NodeError, match=message):
        fuse(comfy, frames, keyframes)


@pytest.mark.skipif(HAS_OPENCV, reason="OpenCV is installed")
def test_without_opencv_it_says_what_to_install(comfy: Comfy) -> None:
    with pytest.raises(NodeError, match=r"needs OpenCV.*pip install opencv-python-headless"):
        fuse(comfy, fine(5), fine(2))
