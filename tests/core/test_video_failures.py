"""Videos that cannot be read or written: each is named with what is wrong."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from vae_core.errors import VideoError
from vae_core.media.video import VideoWriter, frame_times, probe, read_frames

from .clips import tone_file, with_sound, write_av
from .command_line import read_all


def _text(folder: Path) -> Path:
    (folder / "text.mp4").write_text("this is not a video\n" * 50)
    return folder / "text.mp4"


def _page(folder: Path) -> Path:
    (folder / "page.mp4").write_text("<!DOCTYPE html><html>Please log in</html>")
    return folder / "page.mp4"


def _zeros(folder: Path) -> Path:
    (folder / "zeros.mkv").write_bytes(bytes(5000))
    return folder / "zeros.mkv"


def _pointer(folder: Path) -> Path:
    (folder / "clip.mov").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n")
    return folder / "clip.mov"


def _cut(folder: Path) -> Path:
    whole = with_sound(folder / "whole.mp4", 10)
    (folder / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    return folder / "cut.mp4"


def _sound_only(folder: Path) -> Path:
    return tone_file(folder / "tone.m4a", 0.3)


def _empty(folder: Path) -> Path:
    (folder / "empty.mp4").touch()
    return folder / "empty.mp4"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_text, "text.mp4: is a text file"),
        (_page, "page.mp4: is an HTML page, as a download link saves it"),
        (_zeros, "starts with nothing but zero bytes, as an interrupted download leaves it"),
        (_pointer, "is a Git LFS pointer, not the file itself"),
        (_cut, "cannot be read as video"),
        (_empty, "cannot be read as video"),
        (_sound_only, "holds only sound; give a file with a video stream"),
        (lambda folder: folder / "nowhere.mp4", "no such file"),
        (lambda folder: folder, "is a folder; give a video file"),
    ],
)
def test_wrong_inputs_are_named(tmp_path: Path, make: Callable[[Path], Path], words: str) -> None:
    path = make(tmp_path)
    for attempt in (probe, lambda file: list(read_frames(file)), frame_times):
        with pytest.raises(VideoError, match=words):
            attempt(path)


def test_a_change_of_size_is_refused(tmp_path: Path) -> None:
    parts = b"".join(
        write_av(tmp_path / f"{side}.h264", [np.zeros((side, 64, 3), np.uint8)] * 5).read_bytes() for side in (48, 64)
    )
    (tmp_path / "both.h264").write_bytes(parts)
    with pytest.raises(VideoError, match="changes from 64x48 to 64x64 at frame 5"):
        list(read_frames(tmp_path / "both.h264"))
    assert read_all(tmp_path / "both.h264", frames=5).shape == (1, 3, 5, 48, 64)


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("clip.txt", (48, 64), "end the name in one of .mp4"),
        ("clip", (48, 64), "end the name in one of .mp4"),
        ("clip.mp4", (8, 64), "64x8 is too small to store"),
        ("nowhere/clip.mp4", (48, 64), "cannot be written there"),
    ],
)
def test_wrong_outputs_are_named(tmp_path: Path, name: str, size: tuple[int, int], words: str) -> None:
    with pytest.raises(VideoError, match=words), VideoWriter(tmp_path / name, fps=Fraction(25), size=size):
        pass
    assert not any(tmp_path.iterdir())


def test_the_writer_refuses_wrong_shapes_and_no_frames(tmp_path: Path) -> None:
    with (
        pytest.raises(
            VideoError, match=r"got frames of shape \(1, 3, 1, 32, 64\), this file takes \(1, 3, t, 48, 64\)"
        ),
        VideoWriter(tmp_path / "clip.mp4", fps=Fraction(25), size=(48, 64)) as writer,
    ):
        writer.write(torch.zeros(1, 3, 1, 32, 64))
    with (
        pytest.raises(VideoError, match="no frame was given"),
        VideoWriter(tmp_path / "clip.mp4", fps=Fraction(25), size=(48, 64)),
    ):
        pass
    assert not any(tmp_path.iterdir())
