"""Reading and writing real video files: every frame, size, colour, rotation and sound comes back."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from vae_core.errors import VideoError
from vae_core.media.video import VideoWriter, frame_times, is_variable, probe, read_frames

from .clips import moving_picture, same_sound, samples, with_sound, write_av
from .command_line import read_all

ROOT = Path(__file__).parents[2]
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (128, 128, 128), (200, 40, 90))


def as_bytes(video: torch.Tensor) -> np.ndarray:
    """(1, 3, t, H, W) in [-1, 1] to t h w c floats in 0..255."""
    return ((video[0] + 1) * 127.5).permute(1, 2, 3, 0).numpy()


@pytest.mark.parametrize(
    ("frames", "height", "width", "suffix"),
    [(96, 57, 100, ".mp4"), (10, 64, 64, ".mkv"), (1, 48, 64, ".mp4"), (5, 251, 333, ".mov"), (3, 251, 64, ".webm")],
)
def test_every_frame_and_size_comes_back(tmp_path: Path, frames: int, height: int, width: int, suffix: str) -> None:
    video = moving_picture(frames, height, width)
    path = tmp_path / f"clip{suffix}"
    with VideoWriter(path, fps=Fraction(30000, 1001), size=(height, width)) as writer:
        for chunk in video.split(7, dim=2):
            writer.write(chunk)
    again = read_all(path)
    assert again.shape == video.shape
    error = (again - video).pow(2).mean()
    assert 10 * torch.log10(4 / error) > 38
    info = probe(path)
    assert (info.height, info.width, info.size) == (height, width, (height, width))
    assert info.fps == pytest.approx(Fraction(30000, 1001), rel=1e-3) or frames == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_start_and_frames_choose_exactly(tmp_path: Path, chunk: int) -> None:
    pictures = [np.full((32, 48, 3), 8 * index, np.uint8) for index in range(30)]
    path = write_av(tmp_path / "steps.mp4", pictures, options={"g": "12", "bf": "3"})
    for start, frames in ((0, 30), (7, 5), (29, 1), (13, 100)):
        got = list(read_frames(path, start=start, frames=frames, chunk=chunk))
        assert all(part.shape[2] <= chunk for part in got)
        levels = as_bytes(torch.cat(got, 2)).mean((1, 2, 3))
        expected = 8 * np.arange(start, min(30, start + frames))
        assert len(levels) == len(expected)
        np.testing.assert_allclose(levels, expected, atol=2.5)
    with pytest.raises(VideoError, match="has 30 frames, numbered from 0; a start at frame 30 is beyond"):
        list(read_frames(path, start=30))


@pytest.mark.parametrize("size", [(64, 64), (720, 64), (63, 65)])
def test_written_colours_are_what_players_show(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "colour.mp4"
    with VideoWriter(path, fps=Fraction(25), size=size) as writer:
        for colour in COLOURS:
            writer.write((torch.tensor(colour) / 127.5 - 1).view(1, 3, 1, 1, 1).expand(1, 3, 2, *size))
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        planes = [[np.frombuffer(plane, np.uint8)[0] for plane in frame.planes] for frame in container.decode(video=0)]
    for colour, (y, cb, cr) in zip(COLOURS, planes[::2], strict=True):  # BT.709 by hand, limited range
        r, g, b = (np.array(colour) / 255).tolist()
        luma = 0.2126 * r + 0.7152 * g + 0.0722 * b
        expected = (16 + 219 * luma, 128 + 224 * (b - luma) / 1.8556, 128 + 224 * (r - luma) / 1.5748)
        np.testing.assert_allclose((y, cb, cr), expected, atol=1.6)
    shown = as_bytes(read_all(path))[::2].mean((1, 2))
    np.testing.assert_allclose(shown, np.array(COLOURS), atol=3)


@pytest.mark.parametrize(
    ("pix_fmt", "codec", "space", "full"),
    [
        ("yuv420p", "libx264", "bt709", False),
        ("yuv420p", "libx264", "smpte170m", False),
        ("yuv420p", "libx264", "bt709", True),
        ("yuv444p", "libx264", None, False),
        ("yuv420p10le", "libx264", "bt709", False),
        ("yuv422p10le", "libx264", "bt2020nc", True),
        ("gbrp", "libx264rgb", None, True),
        ("rgba", "png", None, True),
    ],
)
def test_colours_are_read_by_the_matrix_of_the_file(
    tmp_path: Path, pix_fmt: str, codec: str, space: str | None, full: bool
) -> None:
    matrices = {"bt709": (0.2126, 0.0722), "bt2020nc": (0.2627, 0.0593)}
    red, blue = matrices.get(space or "", (0.299, 0.114))  # nothing stated in a small picture: BT.601
    deep = "10" in pix_fmt
    path = tmp_path / ("colour.mov" if codec == "png" else "colour.mkv")
    with av.open(str(path), "w") as container:
        options = {"qp": "0"} if codec == "libx264" else {}
        if codec == "libx264" and space:
            options["x264-params"] = f"colormatrix={space}:fullrange={'on' if full else 'off'}"
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "rgb24" if codec == "libx264rgb" else pix_fmt
        for colour in COLOURS:
            r, g, b = (np.array(colour) / 255).tolist()
            if "yuv" in pix_fmt:
                y = red * r + (1 - red - blue) * g + blue * b
                chroma = ((b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red))
                peak, middle = (1023, 512) if deep else (255, 128)
                step = 4 if deep else 1
                if full:
                    values = [peak * y, middle + peak * chroma[0], middle + peak * chroma[1]]
                else:
                    values = [(16 + 219 * y) * step, (128 + 224 * chroma[0]) * step, (128 + 224 * chroma[1]) * step]
                frame = av.VideoFrame(64, 48, pix_fmt)
                for plane, value in zip(frame.planes, values, strict=True):
                    kind = np.uint16 if deep else np.uint8
                    stored = min(round(value), peak)
                    plane.update(np.full(plane.buffer_size // kind().itemsize, stored, kind).tobytes())
            elif pix_fmt == "rgba":
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 4), (*colour, 90), np.uint8), format="rgba")
            else:
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), colour, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    shown = as_bytes(read_all(path)).mean((1, 2))
    np.testing.assert_allclose(shown, np.array(COLOURS), atol=1.6)


def test_ten_bits_stay_finer_than_eight(tmp_path: Path) -> None:
    path = tmp_path / "deep.mkv"
    ramp = np.linspace(0, 65535, 256 * 32).reshape(32, 256).astype(np.uint16)
    pictures = [np.repeat(ramp[..., None], 3, 2)]
    write_av(path, pictures, codec="ffv1", source="rgb48le", pix_fmt="gbrp10le")
    levels = read_all(path).unique()
    assert len(levels) > 1000


def test_gray_is_read_as_gray(tmp_path: Path) -> None:
    picture = np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))
    path = write_av(tmp_path / "gray.mkv", [picture], codec="ffv1", source="gray", pix_fmt="gray")
    shown = as_bytes(read_all(path))[0]
    np.testing.assert_allclose(shown, np.repeat(picture[..., None], 3, 2), atol=1)


@pytest.mark.parametrize(
    "matrix",
    [
        (1, 0, 0, 1),
        (0, 1, -1, 0),
        (-1, 0, 0, -1),
        (0, -1, 1, 0),
        (-1, 0, 0, 1),
        (1, 0, 0, -1),
        (0, 1, 1, 0),
        (0, -1, -1, 0),
    ],
)
def test_rotation_is_applied(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:16, :32] = 255  # a light corner, top left as stored
    a, b, c, d = matrix
    path = tmp_path / "turned.mp4"
    write_av(path, [picture], matrix=[a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30])
    # ISO/IEC 14496-12: the pixel in column p and row q is shown in column a p + c q and row b p + d q
    rows, columns = np.mgrid[:48, :64]
    x, y = a * columns + c * rows, b * columns + d * rows
    expected = np.zeros((64, 48, 3) if a == 0 else (48, 64, 3), np.uint8)
    expected[y - y.min(), x - x.min()] = picture
    info = probe(path)
    assert (info.height, info.width) == expected.shape[:2]
    np.testing.assert_allclose(as_bytes(read_all(path))[0], expected, atol=40)


def test_an_oblique_rotation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "oblique.mp4"
    write_av(path, [np.zeros((48, 64, 3), np.uint8)], matrix=[46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30])
    with pytest.raises(VideoError, match=r"turned by -?45 degrees; only quarter turns can be applied"):
        probe(path)


def test_a_still_image_is_a_clip_of_one_frame(tmp_path: Path) -> None:
    picture = np.zeros((50, 70, 3), np.uint8)
    picture[:, :35] = (200, 100, 50)
    path = write_av(tmp_path / "still.png", [picture], codec="png", pix_fmt="rgb24")
    info = probe(path)
    assert (info.frames, info.width, info.height, info.fps, info.has_audio) == (1, 70, 50, 25, False)
    np.testing.assert_array_equal(as_bytes(read_all(path))[0].round(), picture)


def test_varying_frame_times_are_kept(tmp_path: Path) -> None:
    pts = [0, 40, 80, 400, 440, 1000, 1040]
    path = write_av(tmp_path / "uneven.mp4", [np.full((48, 64, 3), 30 * i, np.uint8) for i in range(7)], pts=pts)
    info, times = probe(path), frame_times(path)
    assert [round(1000 * time) for time in times] == pts
    assert frame_times(path, 3, 2) == times[3:5]
    assert is_variable(times, info.fps)
    copy = tmp_path / "copy.mp4"
    with VideoWriter(copy, fps=info.fps, size=info.size, times=times) as writer:
        for chunk in read_frames(path):
            writer.write(chunk)
    again = frame_times(copy)
    assert [round(1000 * (time - again[0])) for time in again] == pts
    even = write_av(tmp_path / "even.mkv", [np.zeros((48, 64, 3), np.uint8)] * 9, rate=Fraction(24000, 1001))
    assert not is_variable(frame_times(even), probe(even).fps)


@pytest.mark.parametrize(
    ("source", "codec", "target", "kept"),
    [
        (".mp4", "aac", ".mp4", "aac"),
        (".ts", "aac", ".mp4", "aac"),
        (".mkv", "libopus", ".mp4", "opus"),
        (".mkv", "pcm_s16le", ".mp4", "aac"),
        (".mp4", "aac", ".webm", "opus"),
        (".mp4", "aac", ".mkv", "aac"),
    ],
)
def test_sound_is_kept_in_time(tmp_path: Path, source: str, codec: str, target: str, kept: str) -> None:
    original = with_sound(tmp_path / f"source{source}", 50, codec)
    first = frame_times(original)[0]
    copy = tmp_path / f"copy{target}"
    with VideoWriter(copy, fps=Fraction(25), size=(48, 64), audio_from=original, audio_range=(first, None)) as writer:
        for chunk in read_frames(original):
            writer.write(chunk)
    assert probe(copy).audio_codec == kept
    same_sound(original, copy, offset=float(first) - float(frame_times(copy)[0]), length=1.9)


def test_sound_is_cut_to_the_chosen_frames(tmp_path: Path) -> None:
    original = with_sound(tmp_path / "source.mp4", 75)
    copy = tmp_path / "copy.mp4"
    chosen = (Fraction(25, 25), Fraction(50, 25))
    with VideoWriter(copy, fps=Fraction(25), size=(48, 64), audio_from=original, audio_range=chosen) as writer:
        for chunk in read_frames(original, start=25, frames=25):
            writer.write(chunk)
    same_sound(original, copy, offset=1.0, length=0.9)
    assert len(samples(copy)[0]) / 48000 < 1.05


def test_a_source_without_sound_adds_none(tmp_path: Path) -> None:
    silent = write_av(tmp_path / "silent.mp4", [np.zeros((48, 64, 3), np.uint8)] * 3)
    with VideoWriter(tmp_path / "copy.mp4", fps=Fraction(25), size=(48, 64), audio_from=silent) as writer:
        writer.write(torch.zeros(1, 3, 3, 48, 64))
    assert not probe(tmp_path / "copy.mp4").has_audio


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"earlier")

    def interrupted() -> None:
        with VideoWriter(path, fps=Fraction(25), size=(48, 64)) as writer:
            writer.write(torch.zeros(1, 3, 40, 48, 64))
            assert path.read_bytes() == b"earlier"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [entry.name for entry in tmp_path.iterdir()] == ["clip.mp4"]
    assert path.read_bytes() == b"earlier"


FULL_DISK = """
import resource, sys
from fractions import Fraction
import torch
from vae_core.media.video import VideoWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
torch.manual_seed(0)
noise = torch.rand(1, 3, 12, 96, 96) * 2 - 1
try:
    with VideoWriter(sys.argv[1], fps=Fraction(25), size=(96, 96)) as writer:
        writer.write(noise)
except OSError as error:
    print(type(error).__name__, error.errno)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a POSIX feature")
def test_a_full_disk_is_an_error_at_every_point(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, fps=Fraction(25), size=(96, 96)) as writer:
        torch.manual_seed(0)
        writer.write(torch.rand(1, 3, 12, 96, 96) * 2 - 1)
    whole = path.stat().st_size
    path.unlink()
    for limit in (20, whole // 2, whole - 1):
        done = subprocess.run(
            [sys.executable, "-c", FULL_DISK, str(path), str(limit)],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
        assert "Error 27" in done.stdout
        assert not any(tmp_path.iterdir())


READ_ALL = """
import resource, sys
from vae_core.media.video import read_frames
count = sum(chunk.shape[2] for chunk in read_frames(sys.argv[1]))
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is read from getrusage")
def test_reading_holds_a_few_frames_only(tmp_path: Path) -> None:
    peaks = []
    for frames in (20, 220):  # 200 frames more as floats are 184 MB
        path = write_av(tmp_path / f"{frames}.mp4", [np.full((240, 320, 3), i % 255, np.uint8) for i in range(frames)])
        done = subprocess.run(
            [sys.executable, "-c", READ_ALL, str(path)], capture_output=True, text=True, check=True, cwd=ROOT
        )
        count, peak = map(int, done.stdout.split())
        assert count == frames
        peaks.append(peak * (1 if sys.platform == "darwin" else 1024))
    assert peaks[1] - peaks[0] < 100e6, [f"{peak / 1e6:.0f} MB" for peak in peaks]
