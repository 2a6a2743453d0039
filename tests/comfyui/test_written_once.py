"""A lazy video is decoded once: who asks for the same file again gets a copy with texts of its own."""

from __future__ import annotations

import io
import json
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from .calls import DECODE_TO_VIDEO, SAVE_VIDEO, encode, play, saved_path, tone
from .conftest import LoadVAE
from .inprocess import Comfy
from .lazy import Maker, chirp, lazy, shades
from .weights import SMALL, picture


def content(path: Path | io.BytesIO) -> dict[str, Any]:
    """Every picture with its time, and the sound, as a player gets them."""
    with av.open(path if isinstance(path, io.BytesIO) else str(path)) as file:
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]
    if isinstance(path, io.BytesIO):
        path.seek(0)
    with av.open(path if isinstance(path, io.BytesIO) else str(path)) as file:
        sound = [(frame.time, frame.to_ndarray()) for frame in file.decode(audio=0)] if file.streams.audio else []
        colours = file.streams.video[0].codec_context.colorspace, file.streams.video[0].codec_context.color_range
        return {"frames": frames, "sound": sound, "colours": colours, "texts": dict(file.metadata)}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name in ("frames", "sound"):
        assert len(one[name]) == len(other[name])
        for (time, first), (again, second) in zip(one[name], other[name], strict=True):
            assert time == again
            assert np.array_equal(first, second)
    assert one["colours"] == other["colours"]


@pytest.mark.parametrize("container", ["mp4", "mov", "mkv", "webm"])
@pytest.mark.parametrize("sound", [True, False])
def test_a_copy_has_the_same_content_and_other_texts(comfy: Comfy, tmp_path: Path, container: str, sound: bool) -> None:
    maker = Maker(shades(60))
    video = lazy(comfy, maker, audio=chirp(3) if sound else None)
    first, second = tmp_path / f"a.{container}", tmp_path / f"b.{container}"
    video.save_to(str(first), format=container, metadata={"prompt": {"run": 1}})
    video.save_to(str(second), format=container, metadata={"prompt": {"run": 2}, "workflow": {"name": "é"}})
    assert maker.asked == [(0, 60)]
    one, other = content(first), content(second)
    assert len(one["frames"]) == 60
    assert_same(one, other)
    texts = {name.lower(): text for name, text in other["texts"].items()}
    assert json.loads(texts["prompt"]) == {"run": 2}
    assert json.loads(texts["workflow"]) == {"name": "é"}
    assert sorted(tmp_path.iterdir()) == [first, second]

    buffer = io.BytesIO()
    video.save_to(buffer, format=container)
    assert maker.asked == [(0, 60)]
    buffer.seek(0)
    assert_same(one, content(buffer))


def test_another_form_is_decoded_anew(comfy: Comfy, tmp_path: Path) -> None:
    maker = Maker(shades(20))
    video = lazy(comfy, maker)
    video.save_to(str(tmp_path / "a.mp4"))
    for number, choice in enumerate(({"crf": 30.0}, {"bit_depth": 10}, {"codec": "av1"}, {"format": "mkv"}), 2):
        video.save_to(str(tmp_path / f"{number}.mp4"), **choice)
        assert len(maker.asked) == number
        video.save_to(str(tmp_path / f"{number}_again.mp4"), **choice)
        assert len(maker.asked) == number


@pytest.mark.parametrize("how", ["deleted", "changed", "moved"])
def test_a_file_that_is_not_as_it_was_is_no_source(comfy: Comfy, tmp_path: Path, how: str) -> None:
    maker = Maker(shades(20))
    video, path = lazy(comfy, maker), tmp_path / "a.mp4"
    video.save_to(str(path))
    if how == "deleted":
        path.unlink()
    elif how == "moved":
        path.rename(tmp_path / "elsewhere.mp4")
    else:
        path.write_bytes(b"another film")
        os.utime(path, ns=(1, 1))
    video.save_to(str(tmp_path / "b.mp4"))
    assert len(maker.asked) == 2
    assert len(content(tmp_path / "b.mp4")["frames"]) == 20


def test_a_writing_that_failed_is_no_source(comfy: Comfy, tmp_path: Path) -> None:
    maker = Maker(shades(60), fail_at=40)
    video = lazy(comfy, maker)
    with pytest.raises(KeyboardInterrupt):
        video.save_to(str(tmp_path / "a.mp4"))
    maker.fail_at = None
    video.save_to(str(tmp_path / "b.mp4"))
    assert len(maker.asked) == 2


def test_a_part_is_not_taken_for_the_whole(comfy: Comfy, tmp_path: Path) -> None:
    maker = Maker(shades(60))
    video = lazy(comfy, maker)
    video.save_to(str(tmp_path / "a.mp4"))
    video.as_trimmed(0, 1.0).save_to(str(tmp_path / "b.mp4"))
    assert len(content(tmp_path / "b.mp4")["frames"]) == 24


def test_runs_and_nodes_decode_once(comfy: Comfy, load_vae: LoadVAE) -> None:
    """Two Save Video nodes, and a second run that ComfyUI takes for another: its page adds an input after the first."""
    latent, _ = encode(comfy, load_vae(SMALL["cv"]), picture(33, 24, 32))
    prompt: dict[str, Any] = {}
    inputs = {"vae": comfy.give(prompt, load_vae(SMALL["cv"])), "samples": comfy.give(prompt, latent)}
    inputs["audio"] = comfy.give(prompt, tone(33 / 24))
    prompt["decode"] = {"class_type": "CVIV_DecodeToVideo", "inputs": {**DECODE_TO_VIDEO, **inputs}}
    for name in ("one", "two"):
        saved = {"video": ["decode", 0], "filename_prefix": f"once/{name}", **SAVE_VIDEO}
        prompt[name] = {"class_type": "SaveVideo", "inputs": saved}
    executor = comfy.executor()
    comfy.run(deepcopy(prompt), executor)
    decoded = [report.value for report in comfy.progress if report.node_id == "decode"]
    assert decoded
    assert len(decoded) == len(set(decoded))
    files = [saved_path(comfy.base, comfy.ui[name]) for name in ("one", "two")]

    prompt["one"]["inputs"]["video-preview"] = ""  # as the page does
    comfy.run(deepcopy(prompt), executor)
    assert [report for report in comfy.progress if report.node_id == "decode"] == []
    files.append(saved_path(comfy.base, comfy.ui["one"]))
    assert len(set(files)) == 3
    contents = [content(file) for file in files]
    for other in contents[1:]:
        assert_same(contents[0], other)
    assert "video-preview" in contents[2]["texts"]["prompt"]
    assert play(str(files[2]))["sound"] == pytest.approx(33 / 24, abs=0.1)


def test_a_picture_sequence_keeps_its_bits(comfy: Comfy, tmp_path: Path) -> None:
    """A copy of a file of 10 bits has 10 bits."""
    noise = torch.rand(5, 48, 64, 3, generator=torch.Generator().manual_seed(0))
    video = lazy(comfy, Maker(noise))
    for name in ("a", "b"):
        video.save_to(str(tmp_path / f"{name}.mp4"), bit_depth=10)
    with av.open(str(tmp_path / "b.mp4")) as file:
        assert "10" in file.streams.video[0].codec_context.pix_fmt
