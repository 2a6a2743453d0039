"""A picture of a plan: the tiles over the frame, the chunks over time, and what it says of itself in words."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ..nn.region import split
from ..plan.planner import Plan
from ..run.tiling import ReferencePlan, TilePlan

WIDTH = 960
_MARGIN, _FRAME_HEIGHT, _LINE, _BAR = 28, 400, 22, 26
_BACKGROUND, _INK, _FAINT = (24, 26, 30), (228, 230, 235), (92, 97, 107)
_TILE, _SHARED, _CHUNK = (86, 156, 214), (220, 170, 90), (78, 201, 176)
_MOST_CHUNKS = 120  # more are drawn as one bar


def draw_plan(
    plan: Plan, size: tuple[int, int], frames: int, title: str, words: Sequence[str] | None = None
) -> Image.Image:
    """An RGB picture of `plan` for `frames` frames of `size` = (height, width) pixels.

    Above, the frame to scale with its tiles; what neighbouring official tiles share and blend is orange.
    Below, one mark for each chunk in time, and `words`, a line each; None: what the plan says of itself.
    """
    words = str(plan).splitlines() if words is None else words
    cells = tuple(-(-n // plan.latent_px) for n in size)
    scale = min((WIDTH - 2 * _MARGIN) / size[1], _FRAME_HEIGHT / size[0])
    shown = round(size[1] * scale), round(size[0] * scale)
    below = 2 * _MARGIN + _LINE + shown[1]
    picture = Image.new("RGB", (WIDTH, below + _LINE + _BAR + _LINE * (len(words) + 1) + _MARGIN), _BACKGROUND)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=15)
    draw.text((_MARGIN, _MARGIN - 8), title, fill=_INK, font=font)
    corner = ((WIDTH - shown[0]) // 2, _MARGIN + _LINE)
    _draw_tiles(draw, plan, (cells[0], cells[1]), corner, shown)
    _draw_chunks(draw, plan.chunks, below)
    counts = f"{frames} frame{'s' * (frames != 1)} in {plan.chunks} chunk{'s' * (plan.chunks != 1)}"
    label = f"{counts}, from left to right"
    draw.text((_MARGIN, below + _BAR + 4), label, fill=_FAINT, font=font)
    for i, line in enumerate(words):
        draw.text((_MARGIN, below + _BAR + _LINE * (i + 1) + 14), line, fill=_INK, font=font)
    return picture


def _spans(plan: Plan, cells: tuple[int, int]) -> list[list[tuple[int, int]]]:
    """(start, stop) of the tiles in latents, over height and over width."""
    if isinstance(plan.tiles, TilePlan):
        return [split((0, n), side or n) for n, side in zip(cells, plan.tiles.sides, strict=True)]
    if isinstance(plan.tiles, ReferencePlan):
        return [plan.tiles.latents.spans(n) for n in cells]
    return [[(0, n)] for n in cells]


def _draw_tiles(
    draw: ImageDraw.ImageDraw, plan: Plan, cells: tuple[int, int], corner: tuple[int, int], shown: tuple[int, int]
) -> None:
    rows, columns = _spans(plan, cells)
    left, top = corner
    step = shown[0] / cells[1], shown[1] / cells[0]
    draw.rectangle((left, top, left + shown[0], top + shown[1]), fill=(34, 38, 44), outline=_INK, width=2)
    for spans, horizontal in ((columns, True), (rows, False)):
        for before, after in itertools.pairwise(spans):
            start, stop = after[0], before[1]
            if horizontal:
                box = (left + start * step[0], top, left + stop * step[0], top + shown[1])
            else:
                box = (left, top + start * step[1], left + shown[0], top + stop * step[1])
            if stop > start:
                draw.rectangle(box, fill=_SHARED)
            else:
                draw.line(box, fill=_TILE, width=2)


def _draw_chunks(draw: ImageDraw.ImageDraw, chunks: int, top: int) -> None:
    left, right = _MARGIN, WIDTH - _MARGIN
    if chunks > _MOST_CHUNKS:
        draw.rectangle((left, top, right, top + _BAR - 8), fill=_CHUNK)
        return
    step = (right - left) / chunks
    gap = 2 if step > 6 else 1
    for i in range(chunks):
        draw.rectangle((left + i * step, top, left + (i + 1) * step - gap, top + _BAR - 8), fill=_CHUNK)
