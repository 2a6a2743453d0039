"""Frames and sound out of every kind of VIDEO."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from .inprocess import Comfy
from .lazy import Maker, alike, chirp, lazy, shades


def _all(source: Any, *part: Any, chunk: int = 5) -> torch.Tensor:
    """All frames of a part as an IMAGE, after a look at the chunks."""
    chunks = list(source.frames(*part, chunk=chunk))
    assert all(got.ndim == 5 and got.shape[:2] == (1, 3) and 1 <= got.shape[2] <= chunk for got in chunks)
    video = torch.cat(chunks, dim=2)
    assert video.shape[2] == source.count(*part)
    return video[0].permute(1, 2, 3, 0).add(1).div(2)


def _kinds(comfy: Comfy, clip: torch.Tensor, audio: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
    """The same video in every kind of VIDEO."""
    latest = comfy.module("comfy_api.latest")
    path = folder / "clip.mp4"
    lazy(comfy, Maker(clip), frame_rate=Fraction(24), audio=audio, crf=4).save_to(str(path))
    components = latest.Types.VideoComponents(images=clip, frame_rate=Fraction(24), audio=audio)

    class Other(latest.InputImpl.VideoFromFile):
        """A VIDEO of another pack."""

    return {
        "lazy": lazy(comfy, Maker(clip), frame_rate=Fraction(24), audio=audio),
        "tensors": latest.InputImpl.VideoFromComponents(components),
        "file": latest.InputImpl.VideoFromFile(str(path)),
        "memory": latest.InputImpl.VideoFromFile(io.BytesIO(path.read_bytes())),
        "other": Other(str(path)),
    }


@pytest.mark.parametrize("kind", ["lazy", "tensors", "file", "memory", "other"])
def test_every_kind_of_video_gives_frames_and_sound(comfy: Comfy, kind: str, tmp_path: Path) -> None:
    clip, sound = shades(48), chirp(2)
    source = comfy.pack("nodes.bridge.video_source").open_video(_kinds(comfy, clip, sound, tmp_path)[kind])
    assert (source.width, source.height, source.fps, source.count()) == (64, 48, 24, 48)
    for part in ((), (0, 1), (10, 20), (40, None), (40, 99)):
        first, count = (*part, 0, None)[:2] if part else (0, None)
        stop = 48 if count is None else min(48, first + count)
        assert alike(_all(source, *part), clip[first:stop])
        heard = source.audio(*part)
        expected = sound["waveform"][0, 0, round(first / 24 * 8000) : round(stop / 24 * 8000)]
        assert heard["sample_rate"] == 8000
        assert heard["waveform"].shape[:2] == (1, 1)
        if stop - first < 10:
            continue
        got = heard["waveform"][0, 0][: len(expected)]
        assert abs(len(got) - len(expected)) < 300
        middle = slice(1000, 1600)
        assert torch.corrcoef(torch.stack([got[middle], expected[middle]]))[0, 1] > 0.99
    with pytest.raises(ValueError, match="has 48 frames, numbered from 0; a start at frame 48 is beyond them"):
        source.frames(48)
    silent = _kinds(comfy, clip, None, tmp_path)[kind]
    assert comfy.pack("nodes.bridge.video_source").open_video(silent).audio() is None


@pytest.mark.parametrize(
    ("start", "duration", "first"), [(0.5, 0, 12), (0.5, 1.0, 12), (0, 0.75, 0), (-0.5, 0, 36), (0.52, 0.2, 13)]
)
def test_a_trimmed_file_gives_the_frames_that_comfyui_gives(
    comfy: Comfy, start: float, duration: float, first: int, tmp_path: Path
) -> None:
    sound = chirp(2)["waveform"][0, 0]
    for kind in ("file", "memory"):
        video = _kinds(comfy, shades(48), chirp(2), tmp_path)[kind]
        if not hasattr(video, "as_trimmed"):
            pytest.skip("this ComfyUI trims no videos")
        part = video.as_trimmed(start, duration)
        expected = part.get_components()
        source = comfy.pack("nodes.bridge.video_source").open_video(part)
        assert source.count() == expected.images.shape[0]
        assert alike(_all(source), expected.images)
        heard = source.audio()["waveform"][0, 0]
        assert abs(len(heard) - round(source.count() / 24 * 8000)) <= 300
        wanted = sound[round(first / 24 * 8000) :][500:1200]
        assert torch.corrcoef(torch.stack([heard[500:1200], wanted]))[0, 1] > 0.99


def test_lazy_frames_come_straight_from_the_decoder(comfy: Comfy) -> None:
    maker = Maker(shades(48))
    before = sorted(comfy.base.rglob("*"))
    source = comfy.pack("nodes.bridge.video_source").open_video(lazy(comfy, maker).as_trimmed(0.5, 0))
    frames = source.frames(4, 20)
    next(frames)
    frames.close()
    assert maker.asked == [(16, 36)]
    assert maker.closed == 1
    assert sorted(comfy.base.rglob("*")) == before


def test_tensors_are_read_without_a_copy_of_the_clip(comfy: Comfy) -> None:
    latest, images = comfy.module("comfy_api.latest"), shades(40).contiguous()
    rgba = torch.cat([images, torch.zeros(40, 48, 64, 1)], dim=-1)
    for tensor, expected in (
        (images, images),
        (rgba, images),
        (images[..., :1], images[..., :1].expand(-1, -1, -1, 3)),
    ):
        components = latest.Types.VideoComponents(images=tensor, frame_rate=Fraction(25))
        source = comfy.pack("nodes.bridge.video_source").open_video(latest.InputImpl.VideoFromComponents(components))
        first = next(source.frames(chunk=4))
        assert first.untyped_storage().nbytes() == 4 * 48 * 64 * 3 * 4
        assert torch.allclose(_all(source), expected, atol=1e-6)
    assert torch.equal(images, shades(40))


def test_a_file_in_memory_leaves_nothing_behind(comfy: Comfy, tmp_path: Path) -> None:
    folder = Path(comfy.module("folder_paths").get_temp_directory())
    video = _kinds(comfy, shades(30), None, tmp_path)["memory"]
    before = sorted(folder.rglob("*"))
    source = comfy.pack("nodes.bridge.video_source").open_video(video)
    frames = source.frames(chunk=4)
    next(frames)
    del source
    assert sum(chunk.shape[2] for chunk in frames) == 26
    del frames
    assert sorted(folder.rglob("*")) == before
    with pytest.raises(ValueError, match="cannot be read as video"):
        comfy.pack("nodes.bridge.video_source").open_video(type(video)(io.BytesIO(b"no video" * 99)))
    assert sorted(folder.rglob("*")) == before


def test_what_is_no_video_is_named(comfy: Comfy, tmp_path: Path) -> None:
    latest, open_video = comfy.module("comfy_api.latest"), comfy.pack("nodes.bridge.video_source").open_video
    with av.open(str(tmp_path / "tone.m4a"), "w") as file:
        stream = file.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(torch.zeros(1, 1024).numpy(), "fltp", "mono")
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    with pytest.raises(ValueError, match="holds only sound; give a file with a video stream"):
        open_video(latest.InputImpl.VideoFromFile(str(tmp_path / "tone.m4a")))
    with pytest.raises(ValueError, match="Got Tensor where a VIDEO is needed: connect Load Video"):
        open_video(torch.zeros(3))
