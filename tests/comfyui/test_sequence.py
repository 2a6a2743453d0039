"""Save Image Sequence: every frame as a picture, in 8 or 16 bits, none held, none left after a cancel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from .calls import decode, decode_to_video, encode
from .conftest import LoadVAE
from .inprocess import CancelledRunError, Comfy, NodeError, Progress, RefusedError
from .weights import SMALL, picture


def save(comfy: Comfy, video: Any, prefix: str, choice: str = "PNG, 8 bits") -> tuple[Path, str]:
    folder, report = comfy.call("CVIV_SaveImageSequence", video=video, filename_prefix=prefix, format=choice)
    return Path(folder), report


def deep(path: Path) -> np.ndarray:
    """A picture in 0..1, with all its bits."""
    with av.open(str(path)) as file:
        (frame,) = file.decode(video=0)
        assert "48" in frame.format.name
        return frame.to_ndarray(format="rgb48le") / 65535


@pytest.mark.parametrize(("choice", "suffix"), [("PNG, 8 bits", ".png"), ("WebP, lossless", ".webp")])
def test_every_frame_is_a_picture(comfy: Comfy, choice: str, suffix: str) -> None:
    images = picture(7, 33, 41)
    folder, report = save(comfy, images, f"frames/plain{suffix}", choice)
    assert folder.parent == comfy.base / "output" / "frames"
    assert [path.name for path in sorted(folder.iterdir())] == [f"{number:05}{suffix}" for number in range(7)]
    found = np.stack([np.array(Image.open(path).convert("RGB")) for path in sorted(folder.iterdir())])
    assert np.abs(found / 255 - images.numpy()).max() <= 0.5 / 255 + 1e-6
    assert report.startswith("7 frames 41x33, ")
    assert str(folder) in report


def test_sixteen_bits_are_sixteen_bits(comfy: Comfy, load_vae: LoadVAE) -> None:
    vae = load_vae(SMALL["cv"])
    latent, _ = encode(comfy, vae, picture(5, 24, 32))
    images, _, _ = decode(comfy, vae, latent)
    folder, _ = save(comfy, decode_to_video(comfy, vae, latent), "frames/deep", "PNG, 16 bits")
    for number, path in enumerate(sorted(folder.iterdir())):
        assert np.abs(deep(path) - images[number].numpy()).max() <= 0.51 / 65535


def test_folders_are_numbered_and_the_workflow_is_in_the_first(comfy: Comfy) -> None:
    folders = [save(comfy, picture(2, 16, 16), "frames/again")[0] for _ in range(2)]
    assert [folder.name for folder in folders] == ["again_00001", "again_00002"]
    first, second = sorted(folders[0].iterdir())
    assert json.loads(Image.open(first).text["prompt"])["1"]["class_type"] == "CVIV_SaveImageSequence"
    assert "prompt" not in Image.open(second).text


def test_a_cancel_leaves_nothing(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy.module("comfy.utils"), "PROGRESS_THROTTLE_MIN_INTERVAL", 0, raising=False)

    def cancel(report: Progress) -> None:
        if report.value >= 3:
            comfy.module("nodes").interrupt_processing(True)

    comfy.on_progress = cancel
    with pytest.raises(CancelledRunError):
        save(comfy, picture(9, 16, 16), "cancelled_frames/video")
    folder = comfy.base / "output" / "cancelled_frames"
    assert not folder.exists() or list(folder.iterdir()) == []


def test_names_outside_are_refused(comfy: Comfy) -> None:
    with pytest.raises((RefusedError, NodeError), match=r"holds '\.\.' as a folder"):
        save(comfy, torch.rand(1, 16, 16, 3), "../frames")
