"""Small videos for tests, written with PyAV alone, independently of the code under test."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.audio.stream import AudioStream
from av.container import OutputContainer


def moving_picture(frames: int, height: int, width: int) -> torch.Tensor:
    """A smooth picture that drifts and changes colour: (1, 3, t, H, W) in [-1, 1]."""
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 4, width), indexing="ij")
    t = torch.arange(frames).view(-1, 1, 1) * 0.15
    return 0.8 * torch.stack([torch.sin(x + t), torch.cos(y - t), torch.sin(x + y + 2 * t)])[None]  # 1 c t h w


def write_av(
    path: Path,
    pictures: list[np.ndarray],
    *,
    codec: str = "libx264",
    source: str = "rgb24",
    pix_fmt: str = "yuv420p",
    rate: Fraction = Fraction(25),
    pts: list[int] | None = None,
    matrix: list[int] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write frames with PyAV alone, independently of the code under test; `pts` in milliseconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if matrix is not None:
            if not hasattr(type(stream), "set_display_matrix"):
                pytest.skip("this PyAV writes no display matrix")
            stream.set_display_matrix(matrix)
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format=source)
            frame.pts = index if pts is None else pts[index]
            frame.time_base = Fraction(1, 1000) if pts is not None else 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def tone(container: OutputContainer, codec: str, rate: int = 48000) -> Callable[[float], None]:
    """Add a sound stream; the result writes so many seconds of a rising tone, in which a shift in time would show."""
    stream = container.add_stream(codec, rate=rate, layout="mono")
    assert isinstance(stream, AudioStream)

    def write(seconds: float) -> None:
        time = np.arange(int(rate * seconds)) / rate
        wave = (np.sin(2 * np.pi * (200 + 150 * time) * time) * 12000).astype(np.int16)[None]
        for begin in range(0, wave.shape[1], 1024):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[:, begin : begin + 1024]), "s16", "mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, begin, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))

    return write


def with_sound(path: Path, frames: int, codec: str = "aac", rate: Fraction = Fraction(25), group: int = 250) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"g": str(group)})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        write_tone = tone(container, codec)
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), index * 2 % 255, np.uint8), format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        write_tone(float(frames / rate))
    return path


def samples(path: Path) -> tuple[np.ndarray, float]:
    """All sound as mono floats at 48 kHz, and the time in seconds of its first sample."""
    resampler = av.AudioResampler(format="flt", layout="mono", rate=48000)
    parts, first = [], None
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            first = float(frame.pts * frame.time_base) if first is None else first
            parts += [part.to_ndarray()[0] for part in resampler.resample(frame)]
    assert first is not None
    return np.concatenate(parts), first


def same_sound(original: Path, copy: Path, *, offset: float, length: float) -> None:
    """Assert that sound shown at time t of the copy is the sound of the original at t + offset, to a millisecond."""
    (source, source_first), (target, target_first) = samples(original), samples(copy)
    begin = max(target_first, source_first - offset, 0) + 0.05
    count = int((length - 0.1) * 48000)
    heard = target[round((begin - target_first) * 48000) :][:count]
    assert len(heard) > 0.7 * length * 48000
    around = source[round((begin + offset - source_first) * 48000) - 96 :]
    match = {lag: np.corrcoef(heard, around[96 + lag :][: len(heard)])[0, 1] for lag in range(-96, 97, 2)}
    best = max(match, key=lambda lag: match[lag])
    assert match[best] > 0.98
    assert abs(best) <= 48


def tone_file(path: Path, seconds: float) -> Path:
    """A file with sound and no picture."""
    with av.open(str(path), "w") as container:
        tone(container, "aac")(seconds)
    return path


def as_pictures(video: torch.Tensor) -> list[np.ndarray]:
    """(1, 3, t, H, W) in [-1, 1] to frames for `write_av`."""
    return list(((video[0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).contiguous().numpy())
