"""What programs that embed the writer use: files in memory, codecs, depth, metadata, and sound from samples."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from vae_core.errors import VideoError
from vae_core.media.sound import Sound, read_sound
from vae_core.media.video import Codec, Container, VideoWriter, frame_times, probe, read_frames

from .clips import moving_picture, samples, tone_file, with_sound, write_av

RATE = Fraction(25)


def _tone(seconds: float, rate: int, channels: int = 1) -> torch.Tensor:
    time = torch.arange(round(rate * seconds)) / rate
    waves = [torch.sin(2 * torch.pi * (300 + 200 * n + 150 * time) * time) * 0.4 for n in range(channels)]
    return torch.stack(waves)  # channels, samples


def _likeness(one: np.ndarray, other: np.ndarray) -> float:
    count = min(len(one), len(other))
    return float(np.corrcoef(one[:count], other[:count])[0, 1])


@pytest.mark.parametrize(
    ("container", "codec", "bits", "pix_fmt", "size"),
    [
        ("mp4", None, 8, "yuv420p", (48, 64)),
        ("mkv", "h264", 10, "yuv420p10le", (48, 64)),
        ("mov", "h264", 8, "yuv444p", (49, 65)),
        ("webm", "av1", 8, "yuv420p", (49, 65)),
        ("mp4", "av1", 10, "yuv420p10le", (48, 64)),
        ("webm", None, 8, "yuv444p", (49, 64)),
    ],
)
def test_every_container_and_codec_in_memory(
    container: Container, codec: Codec | None, bits: int, pix_fmt: str, size: tuple[int, int], tmp_path: Path
) -> None:
    video, buffer = moving_picture(10, *size), io.BytesIO()
    with VideoWriter(buffer, fps=RATE, size=size, container=container, codec=codec, bits=bits) as writer:
        for chunk in video.split(4, dim=2):
            writer.write(chunk)
    path = tmp_path / "clip"
    path.write_bytes(buffer.getvalue())
    again = torch.cat(list(read_frames(path)), dim=2)
    assert 10 * torch.log10(4 / (again - video).pow(2).mean()) > 34
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.pix_fmt, stream.codec_context.colorspace) == (pix_fmt, 1)
        wanted = codec or ("vp9" if container == "webm" else "h264")
        assert stream.codec_context.codec.canonical_name == wanted


def test_ten_bits_are_written_finer_than_eight(tmp_path: Path) -> None:
    ramp = torch.linspace(-1, 1, 1024).view(1, 1, 1, 1, 1024).expand(1, 3, 1, 16, 1024)
    found = {}
    for bits in (8, 10):
        with VideoWriter(tmp_path / "ramp.mkv", fps=RATE, size=(16, 1024), bits=bits, crf=1) as writer:
            writer.write(ramp)
        found[bits] = len(torch.cat(list(read_frames(tmp_path / "ramp.mkv")), 2)[0, 1, 0, 0].unique())
    assert found[10] > 2 * found[8]


def test_crf_0_is_the_best_in_every_codec(tmp_path: Path) -> None:
    noise = torch.rand(1, 3, 6, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for codec in ("h264", "vp9", "av1"):
        sizes = []
        for crf in (0, 10, 50):
            with VideoWriter(tmp_path / "a.mkv", fps=RATE, size=(64, 64), codec=codec, crf=crf) as writer:
                writer.write(noise)
            sizes.append((tmp_path / "a.mkv").stat().st_size)
        assert sizes == sorted(sizes, reverse=True), codec
        assert sizes[0] > 1.5 * sizes[2]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".mov"])
def test_texts_go_into_the_file(suffix: str, tmp_path: Path) -> None:
    texts = {"prompt": '{"1": "é\\n"}', "workflow": "w" * 10000}
    with VideoWriter(tmp_path / f"a{suffix}", fps=RATE, size=(48, 64), metadata=texts) as writer:
        writer.write(torch.zeros(1, 3, 2, 48, 64))
    with av.open(str(tmp_path / f"a{suffix}")) as file:
        found = {name.lower(): text for name, text in file.metadata.items()}
    assert found["prompt"] == texts["prompt"]
    assert found["workflow"] == texts["workflow"]


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"codec": "vp9"}, "vp9 video does not go into mov; choose h264 or prores, or another container"),
        ({"bits": 12}, "h264 video with 12 bits cannot be written here; choose 8 or 10 bits"),
        ({"container": "webm", "codec": "vp9", "bits": 10}, "vp9 video with 10 bits cannot be written"),
        ({"crf": 52}, r"the quality crf is 52; h264 takes 0 \(lossless\) to 51"),
        ({"crf": -1}, "the quality crf is -1"),
        ({"container": "avi"}, "cannot tell which kind of video to write"),
    ],
)
def test_wrong_choices_are_refused_before_anything_is_written(
    choice: dict[str, object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(VideoError, match=said):
        VideoWriter(tmp_path / "a.mov", fps=RATE, size=(48, 64), **choice)  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())


def test_a_buffer_is_emptied_after_an_error() -> None:
    buffer = io.BytesIO()

    def cancelled() -> None:
        with VideoWriter(buffer, fps=RATE, size=(48, 64), container="mp4") as writer:
            writer.write(torch.rand(1, 3, 100, 48, 64) * 2 - 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cancelled()
    assert buffer.getvalue() == b""
    with pytest.raises(VideoError, match="the video: cannot tell which kind"):
        VideoWriter(buffer, fps=RATE, size=(48, 64))


@pytest.mark.parametrize(
    ("suffix", "rate", "channels", "kept"),
    [
        (".mp4", 44100, 2, 44100),
        (".mp4", 48000, 1, 48000),
        (".mov", 22050, 6, 22050),
        (".webm", 44100, 2, 48000),
        (".mp4", 37800, 1, 32000),
    ],
)
def test_samples_become_the_sound_cut_to_the_picture(
    suffix: str, rate: int, channels: int, kept: int, tmp_path: Path
) -> None:
    path, tone = tmp_path / f"a{suffix}", _tone(3, rate, channels)
    with VideoWriter(path, fps=RATE, size=(48, 64), audio=Sound(samples=tone, rate=rate)) as writer:
        for _ in range(10):
            writer.write(torch.zeros(1, 3, 5, 48, 64))  # 2 s in all
    with av.open(str(path)) as file:
        stream = file.streams.audio[0]
        assert (stream.codec_context.sample_rate, stream.channels) == (kept, channels)
    sound = read_sound(path, Fraction(0), None)
    assert sound is not None
    assert abs(sound.samples.shape[1] / sound.rate - 2) < 0.05
    if rate == kept:
        middle = slice(rate // 2, rate)
        assert _likeness(sound.samples[-1, middle].numpy(), tone[-1, middle].numpy()) > 0.98


def test_shorter_sound_leaves_the_picture_whole(tmp_path: Path) -> None:
    tone = Sound(samples=_tone(0.5, 8000), rate=8000)
    with VideoWriter(tmp_path / "a.mp4", fps=RATE, size=(48, 64), audio=tone) as writer:
        writer.write(torch.zeros(1, 3, 50, 48, 64))
    assert len(frame_times(tmp_path / "a.mp4")) == 50
    assert abs(len(samples(tmp_path / "a.mp4")[0]) / 48000 - 0.5) < 0.2


@pytest.mark.parametrize(
    ("sound", "rate", "said"),
    [
        (torch.zeros(3, 100), 8000, r"shape \(3, 100\).*with 1, 2, 6, 8 channels"),
        (torch.zeros(1, 1, 100), 8000, r"shape \(1, 1, 100\)"),
        (torch.zeros(1, 100, dtype=torch.int16), 8000, "int16"),
        (torch.zeros(1, 100), 0, "0 samples per second"),
        (torch.full((1, 100), torch.nan), 8000, "no numbers"),
    ],
)
def test_sound_that_no_file_holds_is_refused(sound: torch.Tensor, rate: int, said: str) -> None:
    with pytest.raises(VideoError, match=said):
        Sound(samples=sound, rate=rate)


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "aac"), (".mkv", "pcm_s16le"), (".webm", "libopus")])
def test_sound_is_read_from_where_it_is_asked(suffix: str, codec: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".webm":
        with VideoWriter(path, fps=RATE, size=(48, 64), audio=Sound(samples=_tone(3, 48000), rate=48000)) as writer:
            writer.write(torch.zeros(1, 3, 75, 48, 64))
    else:
        with_sound(path, 75, codec)
    every, begin = samples(path)
    for first, end in ((Fraction(0), None), (Fraction(1), Fraction(2)), (Fraction(3, 2), Fraction(99))):
        sound = read_sound(path, first, end)
        assert sound is not None
        length = min(3 if end is None else float(end), 3) - float(first)
        assert sound.rate == 48000
        assert abs(sound.samples.shape[1] / 48000 - length) < 0.06
        expected = every[round((float(first) - begin) * 48000) + 9600 :][:19200]
        assert _likeness(sound.samples[0, 9600:][:19200].numpy(), expected) > 0.999


def test_sound_that_begins_later_is_put_where_it_is_heard(tmp_path: Path) -> None:
    path = tmp_path / "late.mkv"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000, layout="mono")
        for start in (4000, 16000):  # at 0.5 s, and after a gap at 2 s
            frame = av.AudioFrame.from_ndarray(np.full((1, 4000), 8192, np.int16), "s16", "mono")
            frame.sample_rate, frame.pts, frame.time_base = 8000, start, Fraction(1, 8000)
            file.mux(stream.encode(frame))
    sound = read_sound(path, Fraction(1, 4), Fraction(9, 4))
    assert sound is not None
    expected = torch.zeros(16000)
    expected[2000:6000] = 0.25
    expected[14000:] = 0.25
    assert torch.equal(sound.samples[0], expected)
    assert read_sound(path, Fraction(5), None) is None


def test_a_file_without_sound_has_none(tmp_path: Path) -> None:
    silent = write_av(tmp_path / "silent.mp4", [np.zeros((48, 64, 3), np.uint8)] * 3)
    assert read_sound(silent, Fraction(0), None) is None
    assert read_sound(tone_file(tmp_path / "tone.m4a", 0.3), Fraction(0), None) is not None
    assert not probe(silent).has_audio
