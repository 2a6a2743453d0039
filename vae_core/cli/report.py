"""Tables for the terminal, and the contact sheet of the demo."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from rich import box
from rich.table import Table
from torch import Tensor

from ..atomic import atomic_write
from ..media.video import to_uint8
from .work import Quality

MOST_ROWS = 240  # frames shown one by one; a longer clip is shown in spans
_COLUMNS = 4  # frames side by side at most
_FIGURES_WIDTH = 21  # characters that PSNR, SSIM and the gaps take


def quality_table(quality: Quality, width: int) -> Table:
    """PSNR and SSIM of every frame, several to a line of `width` characters; of spans where there are very many."""
    count = len(quality.psnr)
    span = max(1, math.ceil(count / MOST_ROWS))
    cells: list[tuple[str, str, str]] = []
    for begin in range(0, count, span):
        end = min(begin + span, count)
        psnr = sum(quality.psnr[begin:end]) / (end - begin)
        ssim = sum(quality.ssim[begin:end]) / (end - begin)
        cells.append((str(begin) if span == 1 else f"{begin}-{end - 1}", figure(psnr, 2), figure(ssim, 4)))
    each = max(5, len(cells[-1][0])) + _FIGURES_WIDTH
    columns = max(1, min(_COLUMNS, len(cells), width // each))
    rows = math.ceil(len(cells) / columns)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=None if span == 1 else f"means of {span} frames each")
    for column in range(columns):
        table.add_column("frame" if span == 1 else "frames", justify="right", style="dim", no_wrap=True)
        table.add_column("PSNR", justify="right", no_wrap=True)
        table.add_column("SSIM" + ("   " if column < columns - 1 else ""), justify="left", no_wrap=True)
    for row in range(rows):
        line: list[str] = []
        for cell in cells[row::rows]:
            line += cell
        table.add_row(*line)
    return table


def summary_table(rows: Sequence[tuple[str, Quality, float]]) -> Table:
    """One line for each VAE: mean PSNR, mean SSIM, worst frame, frames per second."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "PSNR (dB)", "SSIM", "worst frame (dB)", "frames/s"):
        table.add_column(name, justify="left" if not name else "right")
    for name, quality, seconds in rows:
        psnr, ssim = quality.mean
        speed = f"{len(quality.psnr) / seconds:.1f}"
        table.add_row(name, figure(psnr, 2), figure(ssim, 4), figure(min(quality.psnr), 2), speed)
    return table


def figure(value: float, digits: int) -> str:
    """A number for a table: `-` where there is none, `inf` for no difference at all."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` frame numbers from the first to the last of `count`, evenly."""
    if count <= wanted:
        return list(range(count))
    return [round(index * (count - 1) / (wanted - 1)) for index in range(wanted)]


_BACKGROUND, _INK, _FAINT, _ACCENT = (22, 24, 29), (236, 238, 242), (146, 152, 164), (122, 176, 255)


def contact_sheet(
    path: Path,
    *,
    title: str,
    rows: Sequence[tuple[str, str, Sequence[Tensor]]],
    frames: Sequence[int],
    wide: int = 1800,
) -> None:
    """Draw rows of frames, one row per VAE, to a PNG that appears under its name only when complete.

    rows: (name, remark, frames as (3, H, W) in [-1, 1]), all of one size and as many as `frames`, their numbers.
    """
    height, width = rows[0][2][0].shape[-2:]
    margin, gap, label, head = 36, 14, 210, 104
    cell_w = (wide - 2 * margin - label - gap * (len(frames) - 1)) // len(frames)
    cell_h = max(1, round(cell_w * height / width))
    total = head + len(rows) * (cell_h + gap) - gap + margin
    sheet = Image.new("RGB", (wide, total), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, margin - 6), title, font=_font(26), fill=_INK)
    for column, number in enumerate(frames):
        x = margin + label + column * (cell_w + gap)
        draw.text((x + cell_w // 2, head - 14), f"frame {number}", font=_font(15), fill=_FAINT, anchor="ms")
    for row, (name, remark, pictures) in enumerate(rows):
        y = head + row * (cell_h + gap)
        middle = y + cell_h // 2
        draw.rectangle((margin, middle - 24, margin + 3, middle + 24), fill=_ACCENT if row else _FAINT)
        draw.text((margin + 18, middle - 4), name, font=_font(22), fill=_INK, anchor="ls")
        draw.text((margin + 18, middle + 20), remark, font=_font(14), fill=_FAINT, anchor="ls")
        for column, picture in enumerate(pictures):
            image = Image.fromarray(to_uint8(picture).permute(1, 2, 0).cpu().contiguous().numpy())
            filter_ = Image.Resampling.LANCZOS if cell_w < width else Image.Resampling.BICUBIC
            sheet.paste(image.resize((cell_w, cell_h), filter_), (margin + label + column * (cell_w + gap), y))
    with atomic_write(path) as part:
        sheet.save(part, format="PNG", optimize=True)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


class FramePicker:
    """Collects chosen frames of a clip as it goes by: one kept copy each, everything else let go."""

    def __init__(self, wanted: Sequence[int]) -> None:
        self.wanted = list(wanted)
        self.originals: dict[int, Tensor] = {}
        self.results: dict[int, Tensor] = {}

    def __call__(self, first: int, originals: Tensor, results: Tensor) -> None:
        for index in self.wanted:
            if first <= index < first + originals.shape[2]:
                self.originals[index] = originals[0, :, index - first].clone()
                self.results[index] = torch.clamp(results[0, :, index - first], -1, 1)
