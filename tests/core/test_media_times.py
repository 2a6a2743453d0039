"""When frames are shown, in files of every kind, joined and damaged ones too."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from vae_core.cli.outputs import Form
from vae_core.cli.work import open_clip
from vae_core.errors import VideoError
from vae_core.media.rates import constant_rate, on_grid, snapped
from vae_core.media.sound import read_sound
from vae_core.media.video import frame_times, read_frames, timeline_of
from vae_core.training.clip_decoding import random_clip
from vae_core.training.clip_files import ClipFile

from .clips import same_sound, tone, with_sound, write_av
from .media_checks import lengths, shown
from .media_reading import as_bytes, copied, greys, numbered, read_all

RATE = Fraction(25)


# --------------------------------------------------------------------------------------------------- times


def test_b_frames_in_avi_come_in_order_at_even_times(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.avi", 20, codec="mpeg4", options={"bf": "2", "b": "4000000"})
    assert greys(read_all(path)) == list(range(20))
    times = frame_times(path)
    assert np.diff([float(time) for time in times]) == pytest.approx(0.04)


def test_times_of_a_gif_with_pauses(tmp_path: Path) -> None:
    pictures = [Image.fromarray(np.full((32, 48), 40 * i, np.uint8)) for i in range(5)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=[100, 500, 40, 40, 900])
    timeline = timeline_of(tmp_path / "a.gif")
    assert [float(time) for time in timeline.times()] == [0, 0.1, 0.6, 0.64, 0.68]
    assert float(timeline.time(5)) == 1.58
    assert not timeline.even
    copied(tmp_path / "a.gif", tmp_path / "a.mp4")
    assert [round(time, 3) for time, _ in shown(tmp_path / "a.mp4")] == [0, 0.1, 0.6, 0.64, 0.68]
    assert lengths(tmp_path / "a.mp4")[0] == pytest.approx(1.58, abs=0.001)


def _parts(folder: Path, suffix: str, frames: int = 50) -> list[bytes]:
    video = "mpeg1video" if suffix == ".mpg" else "libx264"
    sound = "mp2" if suffix == ".mpg" else "aac"
    made = []
    for number in range(2):
        path = folder / f"part{number}{suffix}"
        with av.open(str(path), "w", options={}) as container:
            stream = container.add_stream(video, rate=25, options={"g": "12"})
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            write_tone = tone(container, sound)
            for index in range(frames):
                level = 20 + 100 * number + 2 * index
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
                frame.pts = index
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
            write_tone(frames / 25)
        made.append(path.read_bytes())
    return made


@pytest.mark.parametrize("suffix", [".ts", ".mpg"])
def test_joined_files_are_one_film(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"joined{suffix}"
    path.write_bytes(b"".join(_parts(tmp_path, suffix)))
    levels = as_bytes(read_all(path)).mean((1, 2, 3))
    assert len(levels) == 100
    for one in (levels[:50], levels[50:]):  # MPEG-1 at its usual rate leaves some frames as the one before
        assert all(np.diff(one) > -0.5)
        assert one[-1] > one[0] + 80
    assert levels[50] > levels[0] + 90
    timeline = timeline_of(path)
    assert float(timeline.time(100) - timeline.time(0)) == pytest.approx(4, abs=0.001)
    said = copied(path, tmp_path / "copy.mp4")
    assert "time stamps that start again once" in said[0]
    first = float(timeline.time(0))
    for offset in (0.0, 2.0):  # the tone begins again with the second part
        piece = tmp_path / f"cut{offset:g}.mp4"
        clip = open_clip(path, round(offset * 25), 50)
        with clip.writer(piece, Form()) as writer:
            for chunk in clip.read():
                writer.write(chunk)
        same_sound(tmp_path / f"part0{suffix}", piece, offset=first, length=1.8)


def test_a_stream_cut_inside_a_group_begins_at_its_first_picture(tmp_path: Path) -> None:
    whole = with_sound(tmp_path / "whole.ts", 75, group=12)
    content = whole.read_bytes()
    cut = content[len(content) // 3 // 188 * 188 :]
    (tmp_path / "cut.ts").write_bytes(cut)
    timeline = timeline_of(tmp_path / "cut.ts")
    assert timeline.lead > 0 or len(timeline) < 75
    said = copied(tmp_path / "cut.ts", tmp_path / "copy.mp4")
    picture, sound = lengths(tmp_path / "copy.mp4")
    assert abs(picture - sound) < 0.1
    same_sound(whole, tmp_path / "copy.mp4", offset=float(timeline.time(0)), length=picture - 0.1)
    assert not timeline.lead or "begins within a group of pictures" in said[0]


def test_rates_are_those_that_were_meant() -> None:
    assert snapped(Fraction(19001, 317)) == Fraction(60000, 1001)
    assert snapped(Fraction(2997, 100)) == Fraction(30000, 1001)
    assert snapped(Fraction(17)) == 17
    milliseconds = [round(1000 * i * 1001 / 30000) for i in range(300)]
    assert constant_rate(milliseconds, Fraction(1, 1000), [Fraction(30)]) == (Fraction(30000, 1001), True)
    assert constant_rate([0, 40, 80, 400, 440], Fraction(1, 1000), [Fraction(9)]) == (25, False)
    assert constant_rate([0], Fraction(1, 1000), []) == (25, True)
    after_a_gap = [0, *range(2, 50)]  # in an AVI file, whose unit is one frame
    assert constant_rate(after_a_gap, Fraction(1, 24), [Fraction(24)]) == (24, False)
    assert constant_rate(list(range(50)), Fraction(1, 24), [Fraction(24)]) == (24, True)


def test_an_even_grid_without_end_is_refused() -> None:
    with pytest.raises(VideoError, match="The time stamps are damaged"):
        on_grid([Fraction(0), Fraction(10**9)], Fraction(10**9 + 1), Fraction(25))


def test_sound_that_a_damaged_stamp_puts_hours_away_is_left_out(tmp_path: Path) -> None:
    source = tmp_path / "source.ts"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        sound = container.add_stream("mp2", rate=48000, layout="mono")
        for index in range(25):
            frame = av.VideoFrame(64, 48, "yuv420p")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        for number in range(20):
            block = av.AudioFrame.from_ndarray(np.full((1, 1152), 9000, np.int16), "s16", "mono")
            block.sample_rate, block.pts = 48000, 1152 * number + (number > 9) * 48000 * 20000
            container.mux(sound.encode(block))
    timeline = timeline_of(source)
    found = read_sound(source, timeline.time(0), None, timeline.shifts)
    assert found is not None
    assert found.samples.shape[1] == pytest.approx(11520, abs=1200)


def test_an_even_grid_drops_and_repeats_so_that_times_stay() -> None:
    times = [Fraction(t, 100) for t in (0, 4, 5, 20, 24)]
    assert on_grid(times, Fraction(28, 100), Fraction(25)) == [0, 2, 2, 2, 2, 3, 4]
    assert on_grid(times, Fraction(28, 100), Fraction(25), first=7) == [7, 9, 9, 9, 9, 10, 11]
    assert on_grid([Fraction(3)], Fraction(4), Fraction(10)) == [0] * 10


# --------------------------------------------------------------------------------------------------- damage


def _spoilt(path: Path, target: Path, frame: int) -> Path:
    """The same file with the data of one packet destroyed."""
    with av.open(str(path)) as file:
        packet = [packet for packet in file.demux(video=0) if packet.size][frame]
        place, size = packet.pos, packet.size
    content = bytearray(path.read_bytes())
    content[place + 5 : place + size - 1] = bytes([0x5A]) * (size - 6)
    target.write_bytes(content)
    return target


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_a_spoilt_packet_is_said_and_skipped(tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / f"whole{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (60, 48, 64, 3), np.uint8)
    write_av(whole, list(noise), options={"g": "10", "bf": "0", "sc_threshold": "0"})
    path = _spoilt(whole, tmp_path / f"spoilt{suffix}", 23)
    with pytest.raises(VideoError) as caught:
        read_all(path)
    assert "is damaged from frame 23 on" in str(caught.value)
    assert "frames 0 to 22 can be used and, the most, 30 to 59 (--start 30 --frames 30)" in str(caught.value)
    first, rest = read_all(path, skip_damage=True), read_all(whole)
    assert first.shape == rest.shape
    assert torch.equal(first[:, :, :23], rest[:, :, :23])
    assert torch.equal(first[:, :, 30:], rest[:, :, 30:])
    for start, frames in ((0, 23), (30, 30)):
        assert torch.equal(torch.cat(list(read_frames(path, start, frames)), 2), rest[:, :, start : start + frames])


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_a_cut_file_gives_what_is_there(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 64, 3), np.uint8)
    whole = tmp_path / f"whole{suffix}"
    options = {"movflags": "faststart"} if suffix == ".mp4" else {}
    with av.open(str(whole), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index, picture in enumerate(noise):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    timeline = timeline_of(cut)
    assert 15 < len(timeline) < 30
    assert torch.equal(read_all(cut), read_all(whole)[:, :, : len(timeline)])
    if suffix == ".mp4":
        assert timeline.cut == 40 - len(timeline)
        assert f"is cut short: {timeline.cut} frames at its end are missing" in timeline.told()


def test_training_goes_on_past_damage(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 48, 64, 3), np.uint8)
    whole = write_av(tmp_path / "whole.mp4", list(noise), options={"g": "10", "bf": "0", "sc_threshold": "0"})
    path = _spoilt(whole, tmp_path / "spoilt.mp4", 3)
    expected = read_all(whole)[0]
    for seed in range(4):
        random = np.random.default_rng(seed)
        cut = random_clip(
            ClipFile(path=path, key="", kind="video"), frames=5, stride=(9, 10), size=(48, 64), short_side=48,
            random=random,
        )  # fmt: skip
        assert any(torch.equal(cut[:, 0], expected[:, frame]) for frame in range(10, 60)) or cut.shape[1] == 5
