"""Compare Videos: the figures, the pictures for its player, and what it refuses."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from .calls import decode_to_video, encode, video_of
from .conftest import LoadVAE
from .inprocess import Comfy, NodeError
from .weights import SMALL, picture

WIDGETS: dict[str, Any] = {
    "label_a": "original", "label_b": "reconstruction", "frames": "must match", "fps": 0.0, "player_side": 768,
    "player_frames": 240,
}  # fmt: skip


def noisy(images: Tensor, sigma: float = 0.05) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (images + sigma * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def compare(comfy: Comfy, a: Any, b: Any, **changes: Any) -> tuple[Tensor, str, dict[str, Any], str]:
    """(chart, table, what the player gets, report)"""
    prompt: dict[str, Any] = {"1": {"class_type": "CVIV_Compare", "inputs": {**WIDGETS, **changes}}}
    prompt["1"]["inputs"].update(video_a=comfy.give(prompt, a), video_b=comfy.give(prompt, b))
    keys = [comfy.take(prompt, ["1", i]) for i in range(2)]
    comfy.run(prompt)
    chart, table = (comfy.taken.pop(key) for key in keys)
    (player,) = comfy.ui["1"]["cviv_wipe"]
    assert len(comfy.ui["1"]["images"]) == 1  # the chart, for a page without the player
    json.dumps(comfy.ui, allow_nan=False)  # a browser reads no NaN
    return chart, table, player, "\n".join(comfy.ui["1"]["text"])


def shown(comfy: Comfy, player: dict[str, Any], name: str, index: int) -> np.ndarray:
    """A picture of the player, (h, w, 3) of uint8."""
    folder = Path(comfy.module("folder_paths").get_temp_directory()) / player["files"]["subfolder"]
    with Image.open(folder / f"{name}_{index:05}.webp") as file:
        return np.asarray(file.convert("RGB"))


def levels(images: Tensor) -> np.ndarray:
    return images.mul(255).round().byte().numpy()


def test_figures_and_pictures(comfy: Comfy) -> None:
    a = picture(18, 45, 62)
    b = noisy(a)
    chart, table, player, report = compare(comfy, a, b)
    psnr = [-10 * math.log10(float((x - y).square().mean())) for x, y in zip(a, b, strict=True)]
    assert player["numbers"][0]["name"] == "PSNR (dB)"
    assert player["numbers"][0]["values"] == pytest.approx(psnr, abs=1e-3)
    assert f"{sum(psnr) / 18:.2f} dB" in table
    assert f"{min(psnr):.2f} dB (frame {psnr.index(min(psnr))})" in table
    assert f"{sum(psnr[1::4]) / 5:.2f}" in table.splitlines()[-2]  # frames 1, 5, 9, 13, 17: first of four
    flicker = (((b - a)[1:] - (b - a)[:-1]) * 255).square().mean().sqrt()
    assert f"| {flicker:.2f} " in table
    assert chart.shape[0] == 1
    assert chart.shape[-1] == 3
    assert (chart < 0.5).any()
    for index in (0, 7, 17):
        assert np.array_equal(shown(comfy, player, "a", index), levels(a[index]))
        assert np.array_equal(shown(comfy, player, "b", index), levels(b[index]))
    assert (player["count"], player["stride"], player["width"], player["height"]) == (18, 1, 62, 45)
    assert player["labels"] == ["original", "reconstruction"]
    assert "every frame, full size" in report


def test_equal_clips_and_pictures_below_the_window(comfy: Comfy) -> None:
    clip = picture(5, 8, 8)
    _, table, player, _ = compare(comfy, clip, clip)
    psnr, ssim = (one["values"] for one in player["numbers"])
    assert psnr == ["inf"] * 5
    assert ssim == [None] * 5
    assert "| equal" in table
    one_differs = clip.clone()
    one_differs[3] = 1 - one_differs[3]
    chart, table, player, _ = compare(comfy, clip, one_differs)
    assert player["numbers"][0]["values"].count("inf") == 4
    assert "(frame 3)" in table
    assert "| 4 " in table  # equal frames
    assert torch.isfinite(chart).all()


@pytest.mark.parametrize("first", ["images", "components", "file", "lazy"])
def test_every_kind_of_video(comfy: Comfy, load_vae: LoadVAE, tmp_path: Path, first: str) -> None:
    images = picture(21, 48, 64)
    truth = images
    if first == "images":
        given: Any = images
    elif first == "components":
        given = video_of(comfy, images, Fraction(12))
    elif first == "file":
        path = tmp_path / "clip.mkv"
        with av.open(str(path), "w") as file:
            stream = file.add_stream("ffv1", rate=12)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
            for frame in levels(images):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            file.mux(stream.encode(None))
        given = comfy.module("comfy_api.latest").InputImpl.VideoFromFile(str(path))
    else:
        vae = load_vae(SMALL["cv"])
        latent, _ = encode(comfy, vae, images, fps=12.0)
        given = decode_to_video(comfy, vae, latent)
        truth = comfy.call("CVIV_Decode", vae=vae, samples=latent, memory_budget_gb=0.0, preview=False)[0]
    _, _, player, _ = compare(comfy, given, noisy(images))
    assert player["frames"] == 21
    assert player["fps"] == (24 if first == "images" else 12)
    for index in (0, 16, 20):
        difference = shown(comfy, player, "a", index).astype(int) - levels(truth[index]).astype(int)
        assert np.abs(difference).max() <= 1


def test_alpha_grey_and_rates(comfy: Comfy) -> None:
    images = picture(3, 16, 24)
    with_alpha = torch.cat([images, torch.rand(3, 16, 24, 1)], dim=-1)
    slow, fast = video_of(comfy, images, Fraction(12)), video_of(comfy, with_alpha[..., :3], Fraction(25))
    assert compare(comfy, with_alpha, images)[2]["numbers"][0]["values"] == ["inf"] * 3
    assert compare(comfy, images[..., :1], images[..., :1].expand(-1, -1, -1, 3))[2]["fps"] == 24
    _, _, player, report = compare(comfy, slow, fast)
    assert player["fps"] == 12
    assert "12 frames per second and reconstruction 25: compared frame by frame, not by time" in report
    assert compare(comfy, slow, fast, fps=30.0)[2]["fps"] == 30


def test_what_the_player_leaves_out_is_said(comfy: Comfy) -> None:
    a = picture(30, 48, 80)
    _, _, player, report = compare(comfy, a, noisy(a), player_side=64, player_frames=10)
    assert (player["count"], player["stride"], player["width"], player["height"]) == (10, 3, 64, 38)
    assert len(player["numbers"][0]["values"]) == 30  # the figures are of all frames
    assert "player: 10 of 30 frames, each 3. one, shrunk to 64x38; all figures are of the full clip" in report
    middle = torch.nn.functional.interpolate(a[27:28].movedim(-1, 1), (38, 64), mode="area").movedim(1, -1)[0]
    assert np.abs(shown(comfy, player, "a", 9).astype(int) - levels(middle).astype(int)).max() <= 1
    _, _, player, _ = compare(comfy, a, a, player_frames=8)  # every 4th would show one place of the group only
    assert (player["count"], player["stride"]) == (6, 5)


def test_shorter_of_the_two(comfy: Comfy) -> None:
    a = picture(20, 16, 16)
    with pytest.raises(
        NodeError, match=r"original has 20 frames of 16x16; reconstruction has 17 .*'shorter of the two'.*first 17"
    ):
        compare(comfy, a, a[:17])
    for one, other in ((a, a[:17]), (a[:17], a)):
        _, _, player, report = compare(comfy, one, other, frames="shorter of the two")
        assert player["frames"] == 17
        assert "the last 3 frames of" in report


def test_refusals(comfy: Comfy) -> None:
    a = picture(2, 16, 16)
    with pytest.raises(NodeError, match=r"original has 2 frames of 16x16; second has 2 frames of 24x16.*Upscale Image"):
        compare(comfy, a, picture(2, 16, 24), label_b="second")
    with pytest.raises(NodeError, match=r"original is a dict; connect an IMAGE batch or a VIDEO"):
        compare(comfy, {"samples": a}, a)
    with pytest.raises((NodeError, Exception), match=r"not in list|frames is 'some'; choose one of: must match"):
        compare(comfy, a, a, frames="some")


def test_a_video_that_ends_early(comfy: Comfy) -> None:
    made = picture(20, 16, 16)

    class Cut(comfy.pack("nodes.bridge.lazy_video").LazyVideo):  # type: ignore[misc]
        def chunks(self, start: int, stop: int) -> Any:
            yield from made[start : min(stop, 18)].split(7)

    video = Cut(lambda start, stop: iter(()), width=16, height=16, frame_count=20, frame_rate=Fraction(24))
    with pytest.raises(NodeError, match=r"original ended after 18 frames, though it says that it has 20"):
        compare(comfy, video, made)


def test_old_pictures_go(comfy: Comfy) -> None:
    clip = picture(1, 16, 16)
    sets = [compare(comfy, clip, clip)[2]["files"]["subfolder"] for _ in range(10)]
    temp = Path(comfy.module("folder_paths").get_temp_directory())
    assert [(temp / one).is_dir() for one in sets] == [False] * 2 + [True] * 8


def test_payload_of_images_in_memory(comfy: Comfy) -> None:
    module = comfy.pack("nodes.compare.wipe")
    a = picture(4, 16, 24)
    payload = module.wipe_payload(a, noisy(a), ("one", "other"), {"PSNR (dB)": [1.0, math.nan, math.inf, 2.0]})
    (player,) = payload["cviv_wipe"]
    assert player["numbers"] == [{"name": "PSNR (dB)", "values": [1.0, None, "inf", 2.0]}]
    assert np.array_equal(shown(comfy, player, "a", 3), levels(a[3]))
    with pytest.raises(ValueError, match=r"shapes \(4, 16, 24, 3\) and \(3, 16, 24, 3\)"):
        module.wipe_payload(a, a[:3], ("one", "other"), {})
    with pytest.raises(ValueError, match=r"numbers for \{'x': 2\}; the clip has 4 frames"):
        module.wipe_payload(a, a, ("one", "other"), {"x": [1.0, 2.0]})
