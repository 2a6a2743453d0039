"""A training's losses as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

SIZE = 960, 540
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 24, 56, 48
_INK, _PALE, _LINE = (30, 30, 30), (205, 215, 230), (25, 95, 190)
_TICKS = 5


def draw_losses(losses: Sequence[float], title: str) -> Image.Image:
    """`losses`, one a step, as pale dots with their running mean, over a logarithmic axis."""
    picture = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(picture)
    pen.text((_LEFT, 18), title, fill=_INK)
    shown = [max(loss, 1e-12) for loss in losses]
    if not shown:
        pen.text((_LEFT, _TOP), "no steps yet", fill=_INK)
        return picture
    low, high = math.log(min(shown)), math.log(max(shown))
    if high - low < 0.02:
        low, high = low - 0.01, high + 0.01

    def place(step: int, loss: float) -> tuple[float, float]:
        x = _LEFT + (SIZE[0] - _LEFT - _RIGHT) * (step / max(1, len(shown) - 1))
        y = _TOP + (SIZE[1] - _TOP - _BOTTOM) * (high - math.log(loss)) / (high - low)
        return x, y

    for tick in range(_TICKS):
        value = math.exp(low + (high - low) * tick / (_TICKS - 1))
        _, y = place(0, value)
        pen.line((_LEFT, y, SIZE[0] - _RIGHT, y), fill=(232, 232, 232))
        pen.text((12, y - 6), f"{value:.4g}", fill=_INK)
    for step, loss in enumerate(shown):
        x, y = place(step, loss)
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=_PALE)
    points = [place(step, loss) for step, loss in enumerate(_running_mean(shown))]
    if len(points) > 1:
        pen.line(points, fill=_LINE, width=2)
    pen.text((_LEFT, SIZE[1] - 32), f"steps 1 to {len(shown)}; dots: loss of a step; line: mean of the latest",
             fill=_INK)  # fmt: skip
    return picture


def _running_mean(losses: Sequence[float]) -> list[float]:
    window, out = max(1, len(losses) // 10), list[float]()
    for stop in range(1, len(losses) + 1):
        part = losses[max(0, stop - window) : stop]
        out.append(sum(part) / len(part))
    return out
