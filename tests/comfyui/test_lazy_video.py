"""The lazy VIDEO through every consumer."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from .inprocess import CancelledRunError, Comfy, NodeError, RefusedError
from .lazy import RATE, Maker, alike, chirp, lazy, read_back, shades


def _save(comfy: Comfy, video: Any, prefix: str, **choice: Any) -> Path:
    inputs = {"format": "auto", "codec": "auto", "filename_prefix": prefix, **choice}
    prompt = {"1": {"class_type": "SaveVideo", "inputs": inputs}}
    inputs["video"] = comfy.give(prompt, video)
    comfy.run(prompt, extra={"extra_pnginfo": {"workflow": {"name": "é"}}})
    saved = comfy.ui["1"]["images"][0]
    return comfy.base / "output" / saved["subfolder"] / saved["filename"]


@pytest.mark.parametrize(("height", "width"), [(48, 64), (49, 65)])
def test_save_video_writes_every_frame_and_holds_few(comfy: Comfy, height: int, width: int) -> None:
    maker = Maker(shades(60, height, width))
    path = _save(comfy, lazy(comfy, maker, audio=chirp(9)), "video/lazy")
    assert maker.asked == [(0, 60)]
    assert maker.most <= 2
    assert alike(read_back(comfy, path), maker.clip)
    with av.open(str(path)) as file:
        assert abs(file.streams.video[0].average_rate - RATE) < 0.01
        assert json.loads(file.metadata["workflow"]) == {"name": "é"}
        assert json.loads(file.metadata["prompt"])["1"]["class_type"] == "SaveVideo"
        assert abs(file.streams.audio[0].duration * file.streams.audio[0].time_base - 60 / RATE) < 0.15
    assert not [name for name in path.parent.iterdir() if name.name.startswith(".")]


def test_the_new_choices_of_save_video_work(comfy: Comfy) -> None:
    maker, keys = Maker(shades(20)), {"format.codec": "h264", "format.codec.encoding": "re-encode"}
    if "mkv" not in comfy.module("comfy_api.latest").Types.VideoContainer.as_input():
        with pytest.raises(NodeError, match=r"The codec of the video is 'nonsense'; choose one of: auto, h264"):
            _save(comfy, lazy(comfy, maker), "video/choice", codec="nonsense")
        return
    colour = {"format.codec.encoding.color_space": "sRGB"}
    sizes = {}
    for crf in (10.0, 45.0):
        keys["format.codec.encoding.crf"] = crf
        path = _save(comfy, lazy(comfy, maker, crf=30), "video/choice", format="mkv", **keys, **colour)
        assert path.suffix == ".mkv"
        sizes[crf] = path.stat().st_size
    assert sizes[10.0] > sizes[45.0]
    webm = {**keys, "format.codec": "av1", **colour}
    path = _save(comfy, lazy(comfy, maker, audio=chirp(1)), "video/choice", format="webm", **webm)
    assert read_back(comfy, path).shape == maker.clip.shape
    with av.open(str(path)) as file:
        assert [stream.codec_context.codec.canonical_name for stream in file.streams] == ["av1", "opus"]
    with pytest.raises(NodeError, match="color_space is 'HDR'; choose one of: auto, sRGB"):
        _save(comfy, lazy(comfy, maker), "video/choice", format="mkv", **keys, **{next(iter(colour)): "HDR"})


def test_the_quality_is_ours_unless_the_consumer_asks(comfy: Comfy, tmp_path: Path) -> None:
    noise = torch.rand(5, 48, 64, 3, generator=torch.Generator().manual_seed(0))
    sizes = []
    for own, asked in ((5, None), (40, None), (5, 40.0), (40, 5.0)):
        lazy(comfy, Maker(noise), crf=own).save_to(str(tmp_path / "a.mp4"), crf=asked)
        sizes.append((tmp_path / "a.mp4").stat().st_size)
    assert sizes[0] == sizes[3]
    assert sizes[1] == sizes[2]
    assert sizes[0] > 2 * sizes[1]


@pytest.mark.parametrize("choice", ["auto", "mp4", "mkv", "webm"])
def test_it_can_be_written_into_memory(comfy: Comfy, choice: str) -> None:
    maker, buffer = Maker(shades(9)), io.BytesIO()
    lazy(comfy, maker).save_to(buffer, format=choice, metadata={"a": {"b": 1}}, bit_depth=8 if choice == "webm" else 10)
    assert alike(read_back(comfy, buffer), maker.clip)
    buffer.seek(0)
    with av.open(buffer) as file:
        assert {"mkv": "matroska", "webm": "webm"}.get(choice, "mp4") in file.format.name
        assert {name.lower(): text for name, text in file.metadata.items()}["a"] == '{"b": 1}'
        assert ("10" in file.streams.video[0].codec_context.pix_fmt) == (choice != "webm")


def test_files_of_8_bits_are_made_from_bytes(comfy: Comfy, tmp_path: Path) -> None:
    """The same file, and of a part, too; where more bits are asked for, frames in 0..1 serve."""
    noise = torch.randint(256, (20, 48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    floats, levels = Maker(noise / 255), Maker(noise)
    plain, video = lazy(comfy, floats), lazy(comfy, floats, byte_frames=levels)
    for one, bits in ((video, 8), (plain, 8), (video.as_trimmed(4 / RATE, 10 / RATE), 8), (video, 10)):
        one.save_to(str(tmp_path / "a.mp4"), bit_depth=bits)
        (tmp_path / "a.mp4").rename(tmp_path / f"{len(list(tmp_path.iterdir()))}.mp4")
    assert levels.asked == [(0, 20), (4, 14)]
    assert floats.asked == [(0, 20), (0, 20)]
    assert levels.closed == 2
    files = [read_back(comfy, tmp_path / f"{n}.mp4") for n in (1, 2, 3)]
    assert torch.equal(files[0], files[1])
    assert files[2].shape[0] == 10


def test_unknown_choices_are_refused_before_decoding(comfy: Comfy, tmp_path: Path) -> None:
    maker = Maker(shades(9))
    for choice, said in (
        ({"format": "avi"}, "The format of the video is 'avi'; choose one of: auto, mp4, mov, mkv, webm"),
        ({"codec": "hevc"}, "The codec of the video is 'hevc'; choose one of: auto, h264, av1, vp9"),
        ({"format": "webm", "codec": "h264"}, "h264 video does not go into webm"),
        ({"color_space": "HDR PQ"}, "color_space is 'HDR PQ'"),
        ({"bit_depth": 12}, "with 12 bits cannot be written"),
        ({"crf": 99.0}, "crf is 99"),
    ):
        with pytest.raises(ValueError, match=said):
            lazy(comfy, maker).save_to(str(tmp_path / "a.mp4"), **choice)
    sound = {"waveform": torch.zeros(1, 3, 800), "sample_rate": 8000}
    with pytest.raises(ValueError, match=r"shape \(3, 800\)"):
        lazy(comfy, maker, audio=sound).save_to(str(tmp_path / "a.mp4"))
    assert maker.asked == []
    assert not list(tmp_path.iterdir())


def test_a_failed_writing_leaves_no_file(comfy: Comfy, tmp_path: Path) -> None:
    maker = Maker(shades(60), fail_at=40)
    video = lazy(comfy, maker)
    for write in (lambda: video.save_to(str(tmp_path / "a.mp4")), video.get_stream_source):
        before = sorted(comfy.base.rglob("*.mp4*"))
        with pytest.raises(KeyboardInterrupt):
            write()
        assert not list(tmp_path.iterdir())
        assert sorted(comfy.base.rglob("*.mp4*")) == before
    assert maker.closed == 2


def test_the_decoder_is_stopped_where_the_writer_fails(comfy: Comfy, tmp_path: Path) -> None:
    maker = Maker(shades(60))
    with pytest.raises(ValueError, match="got frames of shape") as caught:  # kept: it holds on to what was under way
        lazy(comfy, maker, height=64).save_to(str(tmp_path / "a.mp4"))
    assert maker.closed == 1
    assert caught.type is comfy.pack("vae_core").VideoError
    assert not list(tmp_path.iterdir())


def test_too_few_frames_are_an_error(comfy: Comfy, tmp_path: Path) -> None:
    video = lazy(comfy, Maker(shades(20)), frame_count=21)
    with pytest.raises(ValueError, match="has 20 frames where 21 were announced"):
        video.save_to(str(tmp_path / "a.mp4"))
    with pytest.raises(ValueError, match="has 20 frames where 21 were announced"):
        video.get_components()
    assert not list(tmp_path.iterdir())


def test_a_cancelled_save_leaves_no_file_and_frees_the_decoder(comfy: Comfy) -> None:
    clip = shades(60)
    maker = Maker(clip)

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
    assert read_back(comfy, _save(comfy, lazy(comfy, Maker(clip)), "video/after")).shape[0] == 60


def test_the_stock_nodes_get_its_components(comfy: Comfy) -> None:
    maker, sound = Maker(shades(20)), chirp(3)
    outputs = comfy.call("GetVideoComponents", video=lazy(comfy, maker, audio=sound))
    images, audio, fps = outputs[:3]
    assert torch.equal(images, maker.clip)
    assert torch.equal(audio["waveform"], sound["waveform"][..., : round(20 / RATE * 8000)])
    assert fps == float(RATE)
    assert comfy.call("GetVideoComponents", video=lazy(comfy, maker))[1] is None


def test_it_answers_without_decoding(comfy: Comfy) -> None:
    maker = Maker(shades(48))
    video = lazy(comfy, maker)
    assert video.get_dimensions() == (64, 48)
    assert (video.get_frame_count(), video.get_frame_rate()) == (48, RATE)
    assert video.get_duration() == float(48 / RATE)
    assert "mp4" in video.get_container_format()
    assert (video.get_bit_depth(), video.get_color_space()) == (8, "sRGB")
    assert video.get_active_trim_window() == (0.0, 0.0)
    assert "48 frames, 64x48" in str(video)
    assert maker.asked == []


def test_a_file_for_those_who_need_one_is_made_once(comfy: Comfy) -> None:
    maker = Maker(shades(20))
    video = lazy(comfy, maker)
    path = Path(video.get_stream_source())
    assert video.get_stream_source() == str(path)
    assert maker.asked == [(0, 20)]
    assert path.is_relative_to(comfy.module("folder_paths").get_temp_directory())
    assert alike(read_back(comfy, path), maker.clip)
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
    maker, sound = Maker(shades(48)), chirp(2)
    part = lazy(comfy, maker, frame_rate=Fraction(24), audio=sound).as_trimmed(start, duration, strict)
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
    maker = Maker(shades(48))
    video = lazy(comfy, maker, frame_rate=Fraction(24))
    (part,) = comfy.call("Video Slice", video=video, start_time=0.5, duration=1.0, strict_duration=True)
    assert maker.asked == []
    assert read_back(comfy, _save(comfy, part, "video/slice")).shape[0] == 24
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
    maker = Maker(shades(48))
    (part,) = comfy.call(node, video=lazy(comfy, maker), **choice)
    assert maker.asked == decoded
    assert alike(part.get_components().images, maker.clip[list(expected)])
