"""Animated WebP, which the video libraries cannot decode: read by Pillow."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..errors import VideoError
from .opening import check_file, reason
from .rates import constant_rate
from .timeline import Timeline

_UNIT = Fraction(1, 1000)
_ANIMATED = 0x02  # flag of the VP8X chunk


def is_animation(path: Path) -> bool:
    """Whether this is an animated WebP, by its first bytes."""
    check_file(path)
    try:
        with path.open("rb") as file:
            return is_animated(file)
    except OSError as error:
        raise VideoError(f"{path}: cannot be opened ({reason(error)}).") from error


def is_animated(file: BinaryIO) -> bool:
    """The same of an open file, which is left at its beginning."""
    head = file.read(21)
    file.seek(0)
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and len(head) == 21 and bool(head[20] & _ANIMATED)


def first_picture(file: BinaryIO, name: object) -> Tensor:
    """The first picture, (3, H, W) in [-1, 1]. Raises VideoError where the file is damaged."""
    return _tensor(next(_pictures(file, name)))


def timeline(path: Path) -> Timeline:
    """When each picture is shown. Raises VideoError where the file is damaged."""
    stamps, now = array("q"), 0
    for picture in _pictures(path, path):
        stamps.append(now)
        now += max(1, round(picture.info.get("duration", 0) or 100))  # browsers show what has no duration for 0.1 s
    fps, even = constant_rate(stamps, _UNIT, (), now)
    return Timeline(unit=_UNIT, stamps=stamps, end=now, pictures=array("q", range(len(stamps))), fps=fps, even=even)


def pictures(path: Path) -> Iterator[Tensor]:
    """The pictures as (3, H, W) float32 in [-1, 1]; alpha is dropped."""
    yield from map(_tensor, _pictures(path, path))


def facts(path: Path) -> tuple[int, int, bool]:
    """Height, width, and whether anything in the first picture is not opaque."""
    first = next(_pictures(path, path))
    return first.height, first.width, "A" in first.getbands() and min(first.getchannel("A").tobytes()) < 255


def _tensor(picture: Image.Image) -> Tensor:
    raw = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    return raw.view(picture.height, picture.width, 3).permute(2, 0, 1).float().mul_(2 / 255).sub_(1)


def _pictures(source: Path | BinaryIO, name: object) -> Iterator[Image.Image]:
    try:
        with Image.open(source) as file:
            for number in range(getattr(file, "n_frames", 1)):
                file.seek(number)
                file.load()
                yield file
    except (UnidentifiedImageError, OSError, ValueError, EOFError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(f"{name}: cannot be read as an animated WebP ({reason(error)}); save it anew.") from error
