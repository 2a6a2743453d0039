"""A picture of how a long clip is cut: windows or chunks over time."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...vae_core.families import VIDEO
from ..bridge.wire import image_of
from .job import LongSettings
from .windows import carry_mask

WIDTH = 1024
_LEFT, _RIGHT, _TOP, _ROW, _AXIS = 24, 24, 44, 52, 46
_MOST_ROWS = 24  # a longer clip shows its first windows and says so
_BACKGROUND, _INK, _FAINT = (24, 26, 30), (228, 230, 235), (92, 97, 107)
_COLOURS = ((86, 156, 214), (78, 201, 176), (220, 170, 90), (197, 134, 192), (206, 110, 110))

Row = tuple[Sequence[int], Sequence[float]]  # latents, and how tall each is drawn


def draw_plan(latents: int, settings: LongSettings, fps: float) -> Tensor:
    """An IMAGE (1, h, w, 3): a row for each window, as tall as its weight, over latents, frames and seconds.

    In continuation a row is as tall as a latent is new: what is carried over from the chunk before is a thin line.
    """
    rows = _rows(latents, settings)
    shown = rows[:_MOST_ROWS]
    picture = Image.new("RGB", (WIDTH, _TOP + _ROW * len(shown) + _AXIS), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default()
    draw.text((_LEFT, 12), _title(latents, len(rows), settings), fill=_INK, font=font)
    if len(shown) < len(rows):
        draw.text((_LEFT, 26), f"the first {len(shown)} of {len(rows)} are shown", fill=_FAINT, font=font)
    step = (WIDTH - _LEFT - _RIGHT) / latents
    _draw_axis(draw, font, latents, step, _TOP + _ROW * len(shown), fps)
    for index, row in enumerate(shown):
        _draw_row(draw, font, row, _TOP + _ROW * index, step, _COLOURS[index % len(_COLOURS)])
    return image_of(picture)


def _rows(latents: int, settings: LongSettings) -> list[Row]:
    if settings.in_windows(latents):
        return [(window.latents, window.weights.tolist()) for window in settings.schedule.windows(latents, 0, 0)]
    return [
        (range(span.start, span.stop), carry_mask(span.length, span.known, settings.fade).tolist())
        for span in settings.spans(latents)
    ]


def _title(latents: int, rows: int, settings: LongSettings) -> str:
    if rows == 1:
        return f"{latents} latents at once"
    if settings.in_windows(latents):
        when = "in the first step, in others elsewhere" if settings.moving else "in every step"
        return f"{rows} windows {when}: {latents} latents, height = weight ({settings.fuse})"
    return f"{rows} chunks, one after another: {latents} latents, height = how new a latent is"


def _draw_row(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    row: Row,
    top: int,
    step: float,
    colour: tuple[int, int, int],
) -> None:
    latents, heights = row
    bottom, room = top + _ROW - 18, _ROW - 24
    for latent, height in zip(latents, heights, strict=True):
        left, right = (round(_LEFT + (latent + edge) * step) for edge in (0, 1))
        draw.rectangle((left, bottom - max(2.0, height * room), max(left, right - 1), bottom), fill=colour)
    draw.text((_LEFT + latents[0] * step, bottom + 3), f"{latents[0]}-{latents[-1]}", fill=_INK, font=font)


def _draw_axis(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    latents: int,
    step: float,
    top: int,
    fps: float,
) -> None:
    draw.line((_LEFT, top, WIDTH - _RIGHT, top), fill=_FAINT)
    every = next(size for size in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if latents / size <= 12)
    for latent in range(0, latents, every):
        x = _LEFT + latent * step
        draw.line((x, top, x, top + 5), fill=_FAINT)
        frame = VIDEO.pixel_frames(latent + 1) - 1
        draw.text((x + 2, top + 6), f"latent {latent}" if not latent else str(latent), fill=_INK, font=font)
        told = f"frame {frame}" if not latent else f"{frame}: {frame / fps:.1f} s"
        draw.text((x + 2, top + 22), told, fill=_FAINT, font=font)
