"""A picture of how a long clip is cut: windows or chunks over time."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...vae_core.families import VIDEO
from ..bridge.wire import image_of
from .job import LongSettings
from .windows import Span, carry_mask, fusing_weights

WIDTH = 1024
_LEFT, _RIGHT, _TOP, _ROW, _AXIS = 24, 24, 44, 52, 46
_MOST_ROWS = 24  # a longer clip shows its first windows and says so
_BACKGROUND, _INK, _FAINT = (24, 26, 30), (228, 230, 235), (92, 97, 107)
_COLOURS = ((86, 156, 214), (78, 201, 176), (220, 170, 90), (197, 134, 192), (206, 110, 110))


def draw_spans(spans: Sequence[Span], settings: LongSettings, fps: float) -> Tensor:
    """An IMAGE (1, h, w, 3): a row for each window, as tall as its weight, over latents, frames and seconds.

    In continuation a row is as tall as a latent is new: what is carried over from the chunk before is a thin line.
    """
    shown = spans[:_MOST_ROWS]
    picture = Image.new("RGB", (WIDTH, _TOP + _ROW * len(shown) + _AXIS), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default()
    draw.text((_LEFT, 12), _title(spans, settings), fill=_INK, font=font)
    if len(shown) < len(spans):
        draw.text((_LEFT, 26), f"the first {len(shown)} of {len(spans)} are shown", fill=_FAINT, font=font)
    latents = spans[-1].stop
    step = (WIDTH - _LEFT - _RIGHT) / latents
    _draw_axis(draw, font, latents, step, _TOP + _ROW * len(shown), fps)
    heights = (
        fusing_weights(spans, settings.fuse)
        if settings.mode == "windows"
        else [carry_mask(span.length, span.known, settings.fade) for span in spans]
    )
    for row, (span, height) in enumerate(zip(shown, heights, strict=False)):
        _draw_row(draw, font, span, height.tolist(), _TOP + _ROW * row, step, _COLOURS[row % len(_COLOURS)])
    return image_of(picture)


def _title(spans: Sequence[Span], settings: LongSettings) -> str:
    if len(spans) == 1:
        return f"{spans[0].length} latents in one window"
    if settings.mode == "windows":
        return f"{len(spans)} windows in every step: {spans[-1].stop} latents, height = weight ({settings.fuse})"
    return f"{len(spans)} chunks, one after another: {spans[-1].stop} latents, height = how new a latent is"


def _draw_row(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    span: Span,
    heights: Sequence[float],
    top: int,
    step: float,
    colour: tuple[int, int, int],
) -> None:
    bottom, room = top + _ROW - 18, _ROW - 24
    for index, height in enumerate(heights):
        left, right = (round(_LEFT + (span.start + index + edge) * step) for edge in (0, 1))
        draw.rectangle((left, bottom - max(2.0, height * room), max(left, right - 1), bottom), fill=colour)
    draw.text((_LEFT + span.start * step, bottom + 3), f"{span.start}-{span.stop - 1}", fill=_INK, font=font)


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
