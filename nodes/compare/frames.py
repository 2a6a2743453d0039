"""Two clips frame by frame, as they pass by: figures, their table and chart, and the pictures of the wipe player."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...vae_core.metrics import FlickerMeter, check_pair, frame_quality, phase_means
from ..bridge.running import count_of
from .chart import draw_quality
from .wipe import MOST_FRAMES, SIDE, WipeRecorder


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The result. chart: an RGB picture; table: Markdown; report: a line and more; ui: for the wipe player."""

    chart: Image.Image
    table: str
    report: str
    ui: dict[str, list[dict[str, Any]]]


class Comparison:
    """Compares two clips of `frames` frames of `size` = (height, width) that pass by in chunks; the first is the truth.

    labels: of the two. fps, side, most_frames: as in `WipeRecorder`. device: to compute PSNR and SSIM on, a frame at a
    time; None: the CPU. It holds figures and two frames, not the clips.
    """

    def __init__(
        self,
        frames: int,
        size: tuple[int, int],
        *,
        labels: tuple[str, str],
        fps: Fraction | None = None,
        side: int = SIDE,
        most_frames: int = MOST_FRAMES,
        device: torch.device | None = None,
    ) -> None:
        self._size, self._labels, self._device = size, labels, device or torch.device("cpu")
        self._recorder = WipeRecorder(frames, size, labels=labels, fps=fps, side=side, most_frames=most_frames)
        self._psnr, self._ssim, self._flicker = list[float](), list[float](), FlickerMeter()

    def add(self, a: Tensor, b: Tensor) -> None:
        """The next frames of both, (1, 3, t, height, width) in [-1, 1]. Raises ValueError for unequal shapes."""
        check_pair(b, a)
        for ours, theirs in zip(b.split(1, dim=2), a.split(1, dim=2), strict=True):
            psnr, ssim = frame_quality(ours.to(self._device), theirs.to(self._device))
            self._psnr += psnr.tolist()
            self._ssim += ssim.tolist()
        self._flicker.update(b, a)
        self._recorder.add(a, b)

    def finish(self) -> Compared:
        """Table, chart, report and the player's data, once every frame was added."""
        numbers = {"PSNR (dB)": self._psnr, "SSIM": self._ssim}
        ui = self._recorder.payload(numbers)
        height, width = self._size
        frames = count_of(len(self._psnr), "frame")
        title = f"{self._labels[1]} against {self._labels[0]}: {frames} of {width}x{height}"
        mean, worst = _mean(self._psnr, "{:.2f} dB"), _worst(self._psnr, "{:.2f} dB")
        head = f"PSNR {mean}, SSIM {_mean(self._ssim, '{:.4f}')}, {frames} {width}x{height}"
        report = "\n".join([head, f"worst frame: PSNR {worst}", self._recorder.note()])
        table = f"{title}\n\n{self._figures()}\n\n{self._phases()}"
        return Compared(chart=draw_quality(numbers, title), table=table, report=report, ui=ui)

    def _figures(self) -> str:
        equal = sum(value == math.inf for value in self._psnr)
        excess = _finite(self._flicker.excess)
        rows = [
            ("", "mean", "worst frame"),
            ("PSNR", _mean(self._psnr, "{:.2f} dB"), _worst(self._psnr, "{:.2f} dB")),
            ("SSIM", _mean(self._ssim, "{:.4f}"), _worst(self._ssim, "{:.4f}")),
            (
                "flicker: change of the error from frame to frame, levels of 255",
                _figure(self._flicker.flicker, "{:.2f}"),
                _worst([-value for value in self._flicker.change], "{:.2f}", sign=-1),
            ),
            (
                "motion added (+) or lost (-), mean square levels",
                _figure(sum(excess) / len(excess) if excess else math.nan, "{:+.2f}"),
                "",
            ),
        ]
        if equal:
            rows.append(("frames that are equal, left out of the mean PSNR", str(equal), ""))
        return _markdown(rows)

    def _phases(self) -> str:
        names = [f"{place}. of 4" for place in range(1, 5)]
        psnr = phase_means([math.nan if value == math.inf else value for value in self._psnr])
        ssim = phase_means(self._ssim)
        first = f"{_figure(self._psnr[0], '{:.2f}')}", f"{_figure(self._ssim[0], '{:.4f}')}"
        return _markdown(
            [
                ("mean by place in the group of 4", "first frame", *names),
                ("PSNR (dB)", first[0], *(_figure(value, "{:.2f}") for value in psnr)),
                ("SSIM", first[1], *(_figure(value, "{:.4f}") for value in ssim)),
            ]
        )


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _figure(value: float, form: str) -> str:
    if math.isnan(value):
        return "-"
    return form.format(value) if math.isfinite(value) else "equal"


def _mean(values: Sequence[float], form: str) -> str:
    """Mean of the finite values."""
    finite = _finite(values)
    if finite:
        return form.format(sum(finite) / len(finite))
    return "equal" if math.inf in values else "-"


def _worst(values: Sequence[float], form: str, sign: int = 1) -> str:
    """The smallest value and its frame; sign: to show it with."""
    known = [(value, number) for number, value in enumerate(values) if not math.isnan(value)]
    if not known:
        return "-"
    value, number = min(known)
    return "equal" if math.isinf(value) else f"{form.format(sign * value)} (frame {number})"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up as plain text; the first row is the head."""
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    head, *body = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body])
