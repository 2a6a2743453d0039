"""Values per frame as a picture: one curve under another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE = 960, 560
_LEFT, _RIGHT, _TOP, _BOTTOM, _GAP = 84, 28, 62, 54, 52
_INK, _FAINT, _GRID = (30, 30, 30), (110, 115, 125), (228, 230, 234)
_LINES = ((25, 95, 190), (200, 95, 20), (30, 130, 80))
_TICKS = 6
_FEW = 60  # values; so many and fewer get a dot each


def draw_quality(numbers: Mapping[str, Sequence[float]], title: str) -> Image.Image:
    """An RGB picture with a curve for each of `numbers`, which are named lists of one value per frame, from frame 0.

    The dashed line is the mean of the finite values. An infinite value, of frames that are equal, is a mark at the top;
    NaN is a gap.
    """
    picture = Image.new("RGB", SIZE, "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=14)
    pen.text((_LEFT, 14), title, fill=_INK, font=ImageFont.load_default(size=17))
    height = (SIZE[1] - _TOP - _BOTTOM - _GAP * (len(numbers) - 1)) / max(1, len(numbers))
    frames = max((len(values) for values in numbers.values()), default=0)
    for index, (name, values) in enumerate(numbers.items()):
        top = _TOP + index * (height + _GAP)
        _draw_curve(pen, font, name, values, (top, top + height), _LINES[index % len(_LINES)])
    for frame in sorted({round(part * (frames - 1) / 6) for part in range(7)} if frames else ()):
        pen.text((_across(frame, frames), SIZE[1] - _BOTTOM + 8), str(frame), fill=_FAINT, font=font, anchor="mt")
    pen.text((SIZE[0] - _RIGHT, SIZE[1] - 6), "frame", fill=_FAINT, font=font, anchor="rb")
    return picture


def _draw_curve(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    name: str,
    values: Sequence[float],
    span: tuple[float, float],
    colour: tuple[int, int, int],
) -> None:
    finite = [value for value in values if math.isfinite(value)]
    pen.text((_LEFT, span[0] - 22), _heading(name, finite, values), fill=colour, font=font)
    if not finite:
        pen.rectangle((_LEFT, span[0], SIZE[0] - _RIGHT, span[1]), outline=_GRID)
        return
    low, high = min(finite), max(finite)
    margin = max((high - low) * 0.08, abs(high) * 1e-3, 1e-6)
    low, high = low - margin, high + margin

    def down(value: float) -> float:
        return span[0] + (span[1] - span[0]) * (high - value) / (high - low)

    for value in _ticks(low, high):
        pen.line((_LEFT, down(value), SIZE[0] - _RIGHT, down(value)), fill=_GRID)
        pen.text((_LEFT - 8, down(value)), f"{value:.4g}", fill=_FAINT, font=font, anchor="rm")
    mean = down(sum(finite) / len(finite))
    for x in range(_LEFT, SIZE[0] - _RIGHT, 12):
        pen.line((x, mean, x + 6, mean), fill=_FAINT)
    points = [
        (_across(frame, len(values)), span[0] if value == math.inf else down(value)) if not math.isnan(value) else None
        for frame, value in enumerate(values)
    ]
    for before, after in itertools.pairwise(points):
        if before and after:
            pen.line((*before, *after), fill=colour, width=2)
    if len(values) <= _FEW:
        for x, y in filter(None, points):
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)


def _heading(name: str, finite: Sequence[float], values: Sequence[float]) -> str:
    equal = sum(value == math.inf for value in values)
    parts = [f"mean {sum(finite) / len(finite):.4g}, lowest {min(finite):.4g}"] if finite else []
    if equal:
        parts.append(f"frames that are equal, at the top: {equal}" if finite else "all frames are equal")
    return f"{name}: {'; '.join(parts) or 'no values'}"


def _ticks(low: float, high: float) -> list[float]:
    """Round values between the two, at most `_TICKS` + 1."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _across(frame: int, frames: int) -> float:
    return _LEFT + (SIZE[0] - _LEFT - _RIGHT) * (frame / max(1, frames - 1))
