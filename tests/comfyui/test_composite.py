"""Composite Edited Region: the region from the decode, every other pixel bitwise from the original."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

from .calls import SAVE_VIDEO, decode, decode_to_video, encode, play, saved_path, tone, video_of
from .conftest import LoadVAE
from .inprocess import Comfy, NodeError
from .weights import SMALL, picture

FRAMES, HEIGHT, WIDTH = 9, 40, 56


def mask(frames: int = 1) -> torch.Tensor:
    """White in a rectangle."""
    white = torch.zeros(frames, HEIGHT, WIDTH)
    white[:, 8:32, 16:48] = 1
    return white


def composite(comfy: Comfy, original: Any, edited: Any, white: torch.Tensor, **changes: Any) -> tuple[Any, ...]:
    widgets = {"feather": 0, "match_colour": False, **changes}
    return comfy.call("CVIV_Composite", original=original, edited=edited, mask=white, **widgets)


def test_only_the_region_comes_from_the_edit(comfy: Comfy) -> None:
    ours, theirs, white = picture(FRAMES, HEIGHT, WIDTH), torch.rand(FRAMES, HEIGHT, WIDTH, 3), mask()
    _, images, report = composite(comfy, ours, theirs, white)
    inside = white[0].bool()
    assert images.shape == ours.shape
    torch.testing.assert_close(images[:, inside], theirs[:, inside], atol=1e-6, rtol=0)
    torch.testing.assert_close(images[:, ~inside], ours[:, ~inside], atol=1e-6, rtol=0)
    assert report == "9 frames 56x40, 34.3 % of the picture edited, the rest untouched"


def test_the_soft_edge_lies_inside(comfy: Comfy) -> None:
    ours, theirs, white = torch.zeros(2, HEIGHT, WIDTH, 3), torch.ones(2, HEIGHT, WIDTH, 3), mask()
    _, images, _ = composite(comfy, ours, theirs, white, feather=8)
    assert (images[:, ~white[0].bool()] == 0).all()
    row = images[0, 20, 16:32, 0]
    assert (row.diff() >= -1e-6).all()
    assert 0 < row[0] < 0.2
    assert row[-1] == pytest.approx(1, abs=0.02)


def test_a_mask_for_each_frame(comfy: Comfy) -> None:
    ours, theirs, white = torch.zeros(3, HEIGHT, WIDTH, 3), torch.ones(3, HEIGHT, WIDTH, 3), mask(3)
    white[1] = 0
    _, images, _ = composite(comfy, ours, theirs, white)
    assert [float(one.max()) for one in images] == [1, 0, 1]


def test_colours_can_be_matched(comfy: Comfy) -> None:
    """An edit that also made everything darker: the region comes back as bright as the rest."""
    ours = torch.full((2, HEIGHT, WIDTH, 3), 0.6)
    theirs = ours - 0.1
    theirs[:, 10:30, 20:40] += 0.05
    _, images, _ = composite(comfy, ours, theirs, mask(), match_colour=True)
    assert images[0, 20, 30, 0] == pytest.approx(0.65, abs=1e-4)
    assert images[0, 9, 17, 0] == pytest.approx(0.6, abs=1e-4)


def test_two_videos_stay_lazy_and_keep_rate_and_sound(
    comfy: Comfy, load_vae: LoadVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, ours = load_vae(SMALL["cv"]), picture(FRAMES, HEIGHT, WIDTH)
    latent, _ = encode(comfy, vae, ours, fps=12.0)
    original = video_of(comfy, ours, Fraction(12), tone(FRAMES / 12))
    prompt: dict[str, Any] = {}
    inputs = {"original": original, "edited": decode_to_video(comfy, vae, latent), "mask": mask()}
    prompt["mix"] = {
        "class_type": "CVIV_Composite",
        "inputs": {**{name: comfy.give(prompt, one) for name, one in inputs.items()}, "feather": 4,
                   "match_colour": False},
    }  # fmt: skip
    saved = {"video": ["mix", 0], "filename_prefix": "video/mixed", **SAVE_VIDEO}
    prompt["save"] = {"class_type": "SaveVideo", "inputs": saved}
    comfy.run(prompt)
    found = play(saved_path(comfy.base, comfy.ui["save"]))
    assert found["frames"].shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert float(found["fps"]) == pytest.approx(12)
    assert found["sound"] == pytest.approx(FRAMES / 12, abs=0.1)
    shown = torch.from_numpy(found["frames"]) / 255
    decoded, _, _ = decode(comfy, vae, latent)
    assert (shown[:, :7] - ours[:, :7]).abs().mean() < 0.05
    assert (shown[:, 14:26, 22:42] - decoded[:, 14:26, 22:42]).abs().mean() < 0.12

    prompt["look"] = {"class_type": "PreviewImage", "inputs": {"images": ["mix", 1]}}
    said: list[str] = []
    server = comfy.module("server").PromptServer.instance
    monkeypatch.setattr(server, "send_sync", lambda event, data, sid=None: said.append(f"{event}: {data}"))
    comfy.run(prompt)
    (told,) = [one for one in said if one.startswith("execution_error")]
    assert "both inputs are VIDEOs, so there are no images: use its output video" in told


def test_what_does_not_fit_is_refused(comfy: Comfy) -> None:
    ours = picture(FRAMES, HEIGHT, WIDTH)
    with pytest.raises(NodeError, match=r"edited has 8 frames of 56x40\. Both must have the same frames"):
        composite(comfy, ours, ours[:8], mask())
    with pytest.raises(NodeError, match="The mask has 2 frames and the video 9; allowed are 1, for all, and 9"):
        composite(comfy, ours, ours, mask(2))
    with pytest.raises(NodeError, match="The mask is empty"):
        composite(comfy, ours, ours, torch.zeros(1, HEIGHT, WIDTH))
    _, images, report = composite(comfy, ours, 1 - ours, torch.ones(1, 20, 28))
    assert "the mask was scaled from 28x20" in report
    torch.testing.assert_close(images, 1 - ours, atol=1e-6, rtol=0)
