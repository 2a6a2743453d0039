"""What a player would see and hear in a file, read with PyAV alone."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np


def shown(path: Path) -> list[tuple[float, float]]:
    """(time in seconds, mean brightness in 0..255) of every frame."""
    with av.open(str(path)) as file:
        frames = [(frame.time or 0.0, float(frame.to_ndarray(format="gray").mean())) for frame in file.decode(video=0)]
    return sorted(frames)


def flash(path: Path) -> float:
    """When the brightest frame begins to be shown, in seconds since the first frame."""
    frames = shown(path)
    levels = np.array([level for _, level in frames])
    first = int(np.argmax(levels > levels.min() + 0.5 * (levels.max() - levels.min())))
    return frames[first][0] - frames[0][0]


def beep(path: Path) -> float:
    """When the sound becomes loud, in seconds since the first frame of the picture."""
    start = shown(path)[0][0]
    with av.open(str(path)) as file:
        rate, loud = 0, 0.0
        chunks: list[tuple[float, np.ndarray]] = []
        for frame in file.decode(audio=0):
            rate = frame.sample_rate
            values = np.abs(frame.to_ndarray().astype(np.float64)).max(axis=0)
            chunks.append((frame.time or 0.0, values))
            loud = max(loud, float(values.max()))
    for time, values in chunks:
        over = np.nonzero(values > 0.3 * loud)[0]
        if len(over):
            return time + over[0] / rate - start
    raise AssertionError("no sound")


def lengths(path: Path) -> tuple[float, float]:
    """Seconds of picture and of sound of an MP4."""
    with av.open(str(path)) as file:
        picture = file.streams.video[0]
        assert picture.duration is not None
        assert picture.time_base is not None
        length = float(picture.duration * picture.time_base)
        if not file.streams.audio:
            return length, 0.0
        sound = [(frame.time or 0.0, frame.samples / frame.sample_rate) for frame in file.decode(audio=0)]
    return length, sound[-1][0] + sound[-1][1] - sound[0][0]
