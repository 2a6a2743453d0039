"""The lazy VIDEO through every consumer, and frames and sound out of every kind of VIDEO."""

from __future__ import annotations

import io
import json
import weakref
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from .inprocess import CancelledRunError, Comfy, NodeError, RefusedError

RATE = Fraction(24000, 1001)
CHUNK = 7


def _clip(frames: int, height: int = 48, width: int = 64) -> torch.Tensor:
    """Frames whose brightness says their number; (frames, height, width, 3) in 0..1."""
    shade = torch.arange(frames).view(-1, 1, 1, 1) / max(frames, 60) * 0.8 + 0.1
    return (shade + torch.linspace(0, 0.1, width).view(1, 1, -1, 1)).expand(-1, height, width, 3)


def _audio(seconds: float, rate: int = 8000) -> dict[str, Any]:
    time = torch.arange(round(seconds * rate)) / rate
    return {"waveform": (torch.sin(2 * torch.pi * (200 + 100 * time) * time) * 0.4)[None, None], "sample_rate": rate}


class _Maker:
    """Makes frames on demand, and keeps what was asked of it."""

    def __init__(self, clip: torch.Tensor, fail_at: int | None = None) -> None:
        self.clip, self.fail_at = clip, fail_at
        self.asked: list[tuple[int, int]] = []
        self.closed = 0
        self.held: list[weakref.ref[torch.Tensor]] = []
        self.most = 0

    def __call__(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        self.asked.append((start, stop))
        try:
            for begin in range(start, stop, CHUNK):
                if self.fail_at is not None and begin >= self.fail_at:
                    raise KeyboardInterrupt
                chunk = self.clip[begin : min(begin + CHUNK, stop)].clone()
                self.held.append(weakref.ref(chunk))
                self.most = max(self.most, sum(ref() is not None for ref in self.held))
                yield chunk
                del chunk
        finally:
            self.closed += 1


def _lazy(comfy: Comfy, maker: _Maker, **choice: Any) -> Any:
    frames, height, width, _ = maker.clip.shape
    facts = {"width": width, "height": height, "frame_count": frames, "frame_rate": RATE}
    return comfy.pack("nodes.bridge.lazy_video").LazyVideo(maker, **{**facts, **choice})


def _read(comfy: Comfy, path: str | Path | io.BytesIO) -> torch.Tensor:
    """All frames of a file as ComfyUI's own loader reads them."""
    return comfy.module("comfy_api.latest").InputImpl.VideoFromFile(path).get_components().images


def _save(comfy: Comfy, video: Any, prefix: str, **choice: Any) -> Path:
    inputs = {"format": "auto", "codec": "auto", "filename_prefix": prefix, **choice}
    prompt = {"1": {"class_type": "SaveVideo", "inputs": inputs}}
    inputs["video"] = comfy.give(prompt, video)
    comfy.run(prompt, extra={"extra_pnginfo": {"workflow": {"name": "é"}}})
    saved = comfy.ui["1"]["images"][0]
    return comfy.base / "output" / saved["subfolder"] / saved["filename"]


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().mean() < 0.01)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (49, 65)])
def test_save_video_writes_every_frame_and_holds_few(comfy: Comfy, height: int, width: int) -> None:
    maker = _Maker(_clip(60, height, width))
    path = _save(comfy, _lazy(comfy, maker, audio=_audio(9)), "video/lazy")
    assert maker.asked == [(0, 60)]
    assert maker.most <= 2
    assert _close(_read(comfy, path), maker.clip)
    with av.open(str(path)) as file:
        assert abs(file.streams.video[0].average_rate - RATE) < 0.01
        assert json.loads(file.metadata["workflow"]) == {"name": "é"}
        assert json.loads(file.metadata["prompt"])["1"]["class_type"] == "SaveVideo"
        assert abs(file.streams.audio[0].duration * file.streams.audio[0].time_base - 60 / RATE) < 0.15
    assert not [name for name in path.parent.iterdir() if name.name.startswith(".")]


def test_the_new_choices_of_save_video_work(comfy: Comfy) -> None:
    maker, keys = _Maker(_clip(20)), {"format.codec": "h264", "format.codec.encoding": "re-encode"}
    if "mkv" not in comfy.module("comfy_api.latest").Types.VideoContainer.as_input():
        with pytest.raises(NodeError, match=r"The codec of the video is 'nonsense'; choose one of: auto, h264"):
            _save(comfy, _lazy(comfy, maker), "video/choice", codec="nonsense")
        return
    colour = {"format.codec.encoding.color_space": "sRGB"}
    sizes = {}
    for crf in (10.0, 45.0):
        keys["format.codec.encoding.crf"] = crf
        path = _save(comfy, _lazy(comfy, maker, crf=30), "video/choice", format="mkv", **keys, **colour)
        assert path.suffix == ".mkv"
        sizes[crf] = path.stat().st_size
    assert sizes[10.0] > sizes[45.0]
    webm = {**keys, "format.codec": "av1", **colour}
    path = _save(comfy, _lazy(comfy, maker, audio=_audio(1)), "video/choice", format="webm", **webm)
    assert _read(comfy, path).shape == maker.clip.shape
    with av.open(str(path)) as file:
        assert [stream.codec_context.codec.canonical_name for stream in file.streams] == ["av1", "opus"]
    with pytest.raises(NodeError, match="color_space is 'HDR'; choose one of: auto, sRGB"):
        _save(comfy, _lazy(comfy, maker), "video/choice", format="mkv", **keys, **{next(iter(colour)): "HDR"})


def test_the_quality_is_ours_unless_the_consumer_asks(comfy: Comfy, tmp_path: Path) -> None:
    noise = torch.rand(5, 48, 64, 3, generator=torch.Generator().manual_seed(0))
    sizes = []
    for own, asked in ((5, None), (40, None), (5, 40.0), (40, 5.0)):
        _lazy(comfy, _Maker(noise), crf=own).save_to(str(tmp_path / "a.mp4"), crf=asked)
        sizes.append((tmp_path / "a.mp4").stat().st_size)
    assert sizes[0] == sizes[3]
    assert sizes[1] == sizes[2]
    assert sizes[0] > 2 * sizes[1]


@pytest.mark.parametrize("choice", ["auto", "mp4", "mkv", "webm"])
def test_it_can_be_written_into_memory(comfy: Comfy, choice: str) -> None:
    maker, buffer = _Maker(_clip(9)), io.BytesIO()
    _lazy(comfy, maker).save_to(
        buffer, format=choice, metadata={"a": {"b": 1}}, bit_depth=8 if choice == "webm" else 10
    )
    assert _close(_read(comfy, buffer), maker.clip)
    buffer.seek(0)
    with av.open(buffer) as file:
        assert {"mkv": "matroska", "webm": "webm"}.get(choice, "mp4") in file.format.name
        assert {name.lower(): text for name, text in file.metadata.items()}["a"] == '{"b": 1}'
        assert ("10" in file.streams.video[0].codec_context.pix_fmt) == (choice != "webm")


def test_files_of_8_bits_are_made_from_bytes(comfy: Comfy, tmp_path: Path) -> None:
    """The same file, and of a part, too; where more bits are asked for, frames in 0..1 serve."""
    noise = torch.randint(256, (20, 48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    floats, levels = _Maker(noise / 255), _Maker(noise)
    plain, video = _lazy(comfy, floats), _lazy(comfy, floats, byte_frames=levels)
    for one, bits in ((video, 8), (plain, 8), (video.as_trimmed(4 / RATE, 10 / RATE), 8), (video, 10)):
        one.save_to(str(tmp_path / "a.mp4"), bit_depth=bits)
        (tmp_path / "a.mp4").rename(tmp_path / f"{len(list(tmp_path.iterdir()))}.mp4")
    assert levels.asked == [(0, 20), (4, 14)]
    assert floats.asked == [(0, 20), (0, 20)]
    assert levels.closed == 2
    files = [_read(comfy, tmp_path / f"{n}.mp4") for n in (1, 2, 3)]
    assert torch.equal(files[0], files[1])
    assert files[2].shape[0] == 10


def test_unknown_choices_are_refused_before_decoding(comfy: Comfy, tmp_path: Path) -> None:
    maker = _Maker(_clip(9))
    for choice, said in (
        ({"format": "avi"}, "The format of the video is 'avi'; choose one of: auto, mp4, mov, mkv, webm"),
        ({"codec": "hevc"}, "The codec of the video is 'hevc'; choose one of: auto, h264, av1, vp9"),
        ({"format": "webm", "codec": "h264"}, "h264 video does not go into webm"),
        ({"color_space": "HDR PQ"}, "color_space is 'HDR PQ'"),
        ({"bit_depth": 12}, "with 12 bits cannot be written"),
        ({"crf": 99.0}, "crf is 99"),
    ):
        with pytest.raises(ValueError, match=said):
            _lazy(comfy, maker).save_to(str(tmp_path / "a.mp4"), **choice)
    sound = {"waveform": torch.zeros(1, 3, 800), "sample_rate": 8000}
    with pytest.raises(ValueError, match=r"shape \(3, 800\)"):
        _lazy(comfy, maker, audio=sound).save_to(str(tmp_path / "a.mp4"))
    assert maker.asked == []
    assert not list(tmp_path.iterdir())


def test_a_failed_writing_leaves_no_file(comfy: Comfy, tmp_path: Path) -> None:
    maker = _Maker(_clip(60), fail_at=40)
    video = _lazy(comfy, maker)
    for write in (lambda: video.save_to(str(tmp_path / "a.mp4")), video.get_stream_source):
        before = sorted(comfy.base.rglob("*.mp4*"))
        with pytest.raises(KeyboardInterrupt):
            write()
        assert not list(tmp_path.iterdir())
        assert sorted(comfy.base.rglob("*.mp4*")) == before
    assert maker.closed == 2


def test_the_decoder_is_stopped_where_the_writer_fails(comfy: Comfy, tmp_path: Path) -> None:
    maker = _Maker(_clip(60))
    with pytest.raises(ValueError, match="got frames of shape") as caught:  # kept: it holds on to what was under way
        _lazy(comfy, maker, height=64).save_to(str(tmp_path / "a.mp4"))
    assert maker.closed == 1
    assert caught.type is comfy.pack("vae_core").VideoError
    assert not list(tmp_path.iterdir())


def test_too_few_frames_are_an_error(comfy: Comfy, tmp_path: Path) -> None:
    video = _lazy(comfy, _Maker(_clip(20)), frame_count=21)
    with pytest.raises(ValueError, match="has 20 frames where 21 were announced"):
        video.save_to(str(tmp_path / "a.mp4"))
    with pytest.raises(ValueError, match="has 20 frames where 21 were announced"):
        video.get_components()
    assert not list(tmp_path.iterdir())


def test_a_cancelled_save_leaves_no_file_and_frees_the_decoder(comfy: Comfy) -> None:
    clip = _clip(60)
    maker = _Maker(clip)

    def frames(start: int, stop: int) -> Iterator[torch.Tensor]:
        for number, chunk in enumerate(maker(start, stop)):
            if number == 3:
                comfy.module("nodes").interrupt_processing(True)
            comfy.module("comfy.model_management").throw_exception_if_processing_interrupted()
            yield chunk

    maker_of = comfy.pack("nodes.bridge.lazy_video").LazyVideo
    video = maker_of(frames, width=64, height=48, frame_count=60, frame_rate=RATE)
    with pytest.raises(CancelledRunError) as caught:
        _save(comfy, video, "video/cancelled")
    assert caught.value.node_type == "SaveVideo"
    assert not list((comfy.base / "output" / "video").glob("*cancelled*"))
    assert maker.closed == 1
    comfy.module("nodes").interrupt_processing(False)
    assert _read(comfy, _save(comfy, _lazy(comfy, _Maker(clip)), "video/after")).shape[0] == 60


def test_the_stock_nodes_get_its_components(comfy: Comfy) -> None:
    maker, sound = _Maker(_clip(20)), _audio(3)
    outputs = comfy.call("GetVideoComponents", video=_lazy(comfy, maker, audio=sound))
    images, audio, fps = outputs[:3]
    assert torch.equal(images, maker.clip)
    assert torch.equal(audio["waveform"], sound["waveform"][..., : round(20 / RATE * 8000)])
    assert fps == float(RATE)
    assert comfy.call("GetVideoComponents", video=_lazy(comfy, maker))[1] is None


def test_it_answers_without_decoding(comfy: Comfy) -> None:
    maker = _Maker(_clip(48))
    video = _lazy(comfy, maker)
    assert video.get_dimensions() == (64, 48)
    assert (video.get_frame_count(), video.get_frame_rate()) == (48, RATE)
    assert video.get_duration() == float(48 / RATE)
    assert "mp4" in video.get_container_format()
    assert (video.get_bit_depth(), video.get_color_space()) == (8, "sRGB")
    assert video.get_active_trim_window() == (0.0, 0.0)
    assert "48 frames, 64x48" in str(video)
    assert maker.asked == []


def test_a_file_for_those_who_need_one_is_made_once(comfy: Comfy) -> None:
    maker = _Maker(_clip(20))
    video = _lazy(comfy, maker)
    path = Path(video.get_stream_source())
    assert video.get_stream_source() == str(path)
    assert maker.asked == [(0, 20)]
    assert path.is_relative_to(comfy.module("folder_paths").get_temp_directory())
    assert _close(_read(comfy, path), maker.clip)
    path.unlink()
    assert Path(video.get_stream_source()).exists()


@pytest.mark.parametrize(
    ("start", "duration", "strict", "span"),
    [
        (0, 0, True, (0, 48)),
        (None, None, True, (0, 48)),
        (0.5, 0, True, (12, 48)),
        (0.5, 1.0, True, (12, 36)),
        (-0.5, 0, True, (36, 48)),
        (-9, 0, True, (0, 48)),
        (1.5, 0.5, True, (36, 48)),
        (1.5, 0.6, True, None),
        (1.5, 0.6, False, (36, 48)),
        (0.51, 0.1, True, (13, 15)),
        (2.0, 0, True, None),
        (5.0, 0, False, None),
        (1.0, -1.0, False, None),
    ],
)
def test_a_part_stays_lazy(
    comfy: Comfy, start: float | None, duration: float | None, strict: bool, span: tuple[int, int] | None
) -> None:
    maker, sound = _Maker(_clip(48)), _audio(2)
    part = _lazy(comfy, maker, frame_rate=Fraction(24), audio=sound).as_trimmed(start, duration, strict)
    assert maker.asked == []
    if span is None:
        assert part is None
        return
    assert part.get_frame_count() == span[1] - span[0]
    components = part.get_components()
    assert maker.asked == [span]
    assert torch.equal(components.images, maker.clip[span[0] : span[1]])
    begin, end = (round(n / 24 * 8000) for n in span)
    assert torch.equal(components.audio["waveform"], sound["waveform"][..., begin:end])
    inner = part.as_trimmed(Fraction(1, 24), Fraction(1, 24))
    assert torch.equal(inner.get_components().images, maker.clip[span[0] + 1 : span[0] + 2])


def test_the_stock_slice_keeps_it_lazy(comfy: Comfy) -> None:
    if "Video Slice" not in comfy.nodes:
        pytest.skip("this ComfyUI has no Video Slice")
    maker = _Maker(_clip(48))
    video = _lazy(comfy, maker, frame_rate=Fraction(24))
    (part,) = comfy.call("Video Slice", video=video, start_time=0.5, duration=1.0, strict_duration=True)
    assert maker.asked == []
    assert _read(comfy, _save(comfy, part, "video/slice")).shape[0] == 24
    with pytest.raises((NodeError, RefusedError), match="Failed to slice video"):
        comfy.call("Video Slice", video=video, start_time=1.5, duration=1.0, strict_duration=True)


@pytest.mark.parametrize(
    ("node", "choice", "expected", "decoded"),
    [
        ("VideoFrameSample", {"num_frames": 7, "strategy": "head", "seed": 0}, range(7), []),
        ("VideoFrameSample", {"num_frames": 7, "strategy": "tail", "seed": 0}, range(41, 48), []),
        ("VideoFrameSample", {"num_frames": 2, "strategy": "uniform", "seed": 0}, (0, 47), [(0, 48)]),
        ("VideoTemporalCrop", {"start_frame": 11, "length": 13}, range(11, 24), []),
    ],
)
def test_the_stock_samplers_of_frames_get_the_right_ones(
    comfy: Comfy, node: str, choice: dict[str, Any], expected: Any, decoded: list[tuple[int, int]]
) -> None:
    if node not in comfy.nodes:
        pytest.skip(f"this ComfyUI has no {node}")
    maker = _Maker(_clip(48))
    (part,) = comfy.call(node, video=_lazy(comfy, maker), **choice)
    assert maker.asked == decoded
    assert _close(part.get_components().images, maker.clip[list(expected)])


# ------------------------------------------------------------------------------------------------ reading a VIDEO


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
    _lazy(comfy, _Maker(clip), frame_rate=Fraction(24), audio=audio, crf=4).save_to(str(path))
    components = latest.Types.VideoComponents(images=clip, frame_rate=Fraction(24), audio=audio)

    class Other(latest.InputImpl.VideoFromFile):
        """A VIDEO of another pack."""

    return {
        "lazy": _lazy(comfy, _Maker(clip), frame_rate=Fraction(24), audio=audio),
        "tensors": latest.InputImpl.VideoFromComponents(components),
        "file": latest.InputImpl.VideoFromFile(str(path)),
        "memory": latest.InputImpl.VideoFromFile(io.BytesIO(path.read_bytes())),
        "other": Other(str(path)),
    }


@pytest.mark.parametrize("kind", ["lazy", "tensors", "file", "memory", "other"])
def test_every_kind_of_video_gives_frames_and_sound(comfy: Comfy, kind: str, tmp_path: Path) -> None:
    clip, sound = _clip(48), _audio(2)
    source = comfy.pack("nodes.bridge.video_source").open_video(_kinds(comfy, clip, sound, tmp_path)[kind])
    assert (source.width, source.height, source.fps, source.count()) == (64, 48, 24, 48)
    for part in ((), (0, 1), (10, 20), (40, None), (40, 99)):
        first, count = (*part, 0, None)[:2] if part else (0, None)
        stop = 48 if count is None else min(48, first + count)
        assert _close(_all(source, *part), clip[first:stop])
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
    sound = _audio(2)["waveform"][0, 0]
    for kind in ("file", "memory"):
        video = _kinds(comfy, _clip(48), _audio(2), tmp_path)[kind]
        if not hasattr(video, "as_trimmed"):
            pytest.skip("this ComfyUI trims no videos")
        part = video.as_trimmed(start, duration)
        expected = part.get_components()
        source = comfy.pack("nodes.bridge.video_source").open_video(part)
        assert source.count() == expected.images.shape[0]
        assert _close(_all(source), expected.images)
        heard = source.audio()["waveform"][0, 0]
        assert abs(len(heard) - round(source.count() / 24 * 8000)) <= 300
        wanted = sound[round(first / 24 * 8000) :][500:1200]
        assert torch.corrcoef(torch.stack([heard[500:1200], wanted]))[0, 1] > 0.99


def test_lazy_frames_come_straight_from_the_decoder(comfy: Comfy) -> None:
    maker = _Maker(_clip(48))
    before = sorted(comfy.base.rglob("*"))
    source = comfy.pack("nodes.bridge.video_source").open_video(_lazy(comfy, maker).as_trimmed(0.5, 0))
    frames = source.frames(4, 20)
    next(frames)
    frames.close()
    assert maker.asked == [(16, 36)]
    assert maker.closed == 1
    assert sorted(comfy.base.rglob("*")) == before


def test_tensors_are_read_without_a_copy_of_the_clip(comfy: Comfy) -> None:
    latest, images = comfy.module("comfy_api.latest"), _clip(40).contiguous()
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
    assert torch.equal(images, _clip(40))


def test_a_file_in_memory_leaves_nothing_behind(comfy: Comfy, tmp_path: Path) -> None:
    folder = Path(comfy.module("folder_paths").get_temp_directory())
    video = _kinds(comfy, _clip(30), None, tmp_path)["memory"]
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
