"""How a file asks to be turned: quarter turns and mirrorings, read without touching a frame's side data.

Side data of a frame is not looked at: of kinds that PyAV does not know it raises, and with an ICC profile it ends the
process.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import BinaryIO

import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from ..errors import VideoError
from .opening import is_still

Turn = tuple[float, float, float, float]  # a pixel (x, y) is shown at (a x + c y, b x + d y)
UPRIGHT: Turn = (1, 0, 0, 1)
_EXIF_TAG = 0x0112
_EXIF: dict[int, Turn] = {
    1: UPRIGHT, 2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 4: (1, 0, 0, -1),
    5: (0, 1, 1, 0), 6: (0, 1, -1, 0), 7: (0, -1, -1, 0), 8: (0, -1, 1, 0),
}  # fmt: skip
_NESTED = (b"moov", b"trak")
_DEEPEST, _MOST_BOXES = 4, 10_000


class Orientation:
    """Quarter turns and mirrorings as row and column operations. Raises VideoError for an oblique angle."""

    def __init__(self, turn: Turn, path: object) -> None:
        scale = max(map(abs, turn)) or 1
        a, b, c, d = (round(value / scale, 2) for value in turn)
        if sorted(map(abs, (a, b, c, d))) != [0, 0, 1, 1] or abs(a) != abs(d):
            angle = round(math.degrees(math.atan2(b, a)))
            raise VideoError(f"{path}: asks to be shown turned by {angle} degrees; only quarter turns can be applied.")
        self.swaps_axes = a == 0
        self.flip_x = (c if self.swaps_axes else a) < 0
        self.flip_y = (b if self.swaps_axes else d) < 0

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) as shown."""
        return (width, height) if self.swaps_axes else (height, width)

    def aspect(self, aspect: Fraction) -> Fraction:
        """Width to height of a pixel as shown."""
        return 1 / aspect if self.swaps_axes else aspect

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Turn (c, h, w)."""
        turned = image.transpose(-1, -2) if self.swaps_axes else image
        dims = [dim for dim, flip in ((-1, self.flip_x), (-2, self.flip_y)) if flip]
        return turned.flip(dims) if dims else turned


def turn_of(container: InputContainer, stream: VideoStream, frame: VideoFrame, file: BinaryIO) -> Turn:
    """What a file asks for: a photograph in its EXIF, MP4 and MOV in the track header, others by a plain rotation.

    frame: the first. file: the same file, opened for reading.
    """
    if is_still(container):
        found = _exif_turn(file)
    elif "mov" in container.format.name:
        found = _track_turn(file, stream.id)
    else:
        found = None
    if found is not None:
        return found
    angle = math.radians(frame.rotation)  # counterclockwise
    return round(math.cos(angle), 4), -round(math.sin(angle), 4), round(math.sin(angle), 4), round(math.cos(angle), 4)


def _exif_turn(file: BinaryIO) -> Turn | None:
    """None where Pillow cannot read the picture."""
    try:
        file.seek(0)
        with Image.open(file) as picture:
            return _EXIF.get(picture.getexif().get(_EXIF_TAG, 1), UPRIGHT)
    except Exception:  # Pillow raises whatever its readers meet in a damaged file
        return None


def _track_turn(file: BinaryIO, track: int) -> Turn | None:
    """The matrix of the track's header, and of the movie's; None where there is none."""
    movie: Turn = UPRIGHT
    found: Turn | None = None
    end = file.seek(0, 2)
    for kind, start, stop in _boxes(file, 0, end):
        if kind not in (b"mvhd", b"tkhd") or stop - start < 36:
            continue
        file.seek(start)
        content = file.read(min(stop - start, 120))
        wide = content[0] == 1  # times of 64 bits
        place = (32 if wide else 20) + 20 if kind == b"tkhd" else (44 if wide else 32) + 4
        number = struct.unpack_from(">I", content, 20 if wide else 12)[0] if kind == b"tkhd" else None
        if len(content) < place + 20:
            continue
        a, b, _, c, d = (value / 65536 for value in struct.unpack_from(">5i", content, place))
        if kind == b"mvhd":
            movie = a, b, c, d
        elif number == track:
            found = a, b, c, d
    if found is None or not any(found):
        return None
    a, b, c, d = found
    e, f, g, h = movie
    return a * e + b * g, a * f + b * h, c * e + d * g, c * f + d * h


def _boxes(file: BinaryIO, start: int, end: int, depth: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """(kind, begin and end of the content) of the boxes of an MP4 that may hold a matrix, in order."""
    for _ in range(_MOST_BOXES):
        if start + 8 > end:
            return
        file.seek(start)
        head = file.read(16)
        if len(head) < 8:
            return
        size, kind = struct.unpack_from(">I4s", head)
        begin = start + 8
        if size == 1 and len(head) == 16:
            size, begin = struct.unpack_from(">Q", head, 8)[0], start + 16
        stop = end if size == 0 else start + size
        if stop <= start + 7 or stop > end:
            stop = end
        if kind in _NESTED and depth < _DEEPEST:
            yield from _boxes(file, begin, stop, depth + 1)
        elif kind in (b"mvhd", b"tkhd"):
            yield kind, begin, stop
        start = stop
