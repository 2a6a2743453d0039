"""One pass of a VAE seen from ComfyUI: progress, live preview, cancel, and the report of what ran."""

from __future__ import annotations

import html
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

import comfy.model_management as mm
import comfy.utils
import torch
from comfy_execution.progress import get_progress_state
from PIL import Image
from torch import Tensor

from ...vae_core import AnyPlan
from .schema import GIB

PREVIEW_SIDE = 512  # largest side of the live preview in pixels
_PREVIEW_EVERY = 0.5  # seconds
_log = logging.getLogger("cviv-vae")


class Run:
    """Progress, preview, cancel and report of one pass over `total` frames.

    node_id: of the node that shows bar, preview and text; None for a stock node, which gets the bar alone.
    preview: whether to show the newest frame. size: (height, width) of the frames, for the report.
    """

    def __init__(
        self,
        total: int,
        *,
        node_id: str | None = None,
        preview: bool = False,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.total, self.done, self._there, self._size = total, 0, 0, size
        self.exact: bool | None = None  # whether the result is that of whole frames; None: not known
        self._node_id, self._preview = node_id, preview and node_id is not None
        self._bar = comfy.utils.ProgressBar(total, node_id=node_id)
        self._lines: list[str] = []
        self._start = self._last_preview = time.monotonic()
        self._device: torch.device | None = None
        self.tiles: AnyPlan = None  # that the work began in
        self._ram_before = 0

    def begin(self, device: torch.device, tiles: AnyPlan = None, *, exact: bool | None = None) -> None:
        """The work starts, on `device` in `tiles`: clock and peak of memory are set to zero, the first time."""
        if self._device is not None:
            return
        self.tiles, self.exact = tiles, exact
        self._start, self._device, self._ram_before = time.monotonic(), device, most_ram()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def step(self, frames: int, newest: Tensor | None = None) -> None:
        """`frames` more are done. newest: (h, w, 3), in 0..1 or uint8. Raises what ComfyUI raises on a cancel."""
        mm.throw_exception_if_processing_interrupted()
        self.done += frames
        now = time.monotonic()
        picture = None
        due = now - self._last_preview >= _PREVIEW_EVERY or self.done >= self.total
        if self._preview and newest is not None and due:
            picture = _jpeg(newest)
            self._last_preview = now
        self._bar.update_absolute(self.done, self.total, picture)
        if due:
            self._say(self._status(now))

    def there(self, frames: int) -> None:
        """`frames` were done by an earlier run."""
        if frames:
            self.done = self._there = frames
            self.note(f"{count_of(frames, 'frame')} were there from an earlier run")

    def note(self, sentence: str) -> None:
        """A line for the report; a second time it is not repeated."""
        if sentence not in self._lines:
            self._lines.append(sentence)

    def finish(self) -> str:
        """The report: a line with what was done, how long it took and the peak of memory; then the notes, one a line.

        The first line takes the place of the status, and is the one line on the console.
        """
        head = ", ".join(self._figures(time.monotonic() - self._start))
        _log.info("%s", head)
        self._say(head)
        return "\n".join((head, *self._lines))

    def _figures(self, seconds: float) -> Iterator[str]:
        size = "" if self._size is None else f" {self._size[1]}x{self._size[0]}"
        yield f"{count_of(self.done, 'frame')}{size}"
        yield clock(seconds) if seconds >= 10 else f"{seconds:.1f} s"
        if seconds > 0 and self.done > self._there:
            yield f"{(self.done - self._there) / seconds:.1f} fps"
        if self.exact is not None:
            yield "exact" if self.exact else "not exact: blended"
        if self._device is not None:
            yield from self._peak(self._device)

    def close(self) -> None:
        """Mark the node as done where it works after its own turn: a VIDEO is decoded while it is saved."""
        if self._node_id is not None:
            get_progress_state().finish_progress(self._node_id)

    def _peak(self, device: torch.device) -> Iterator[str]:
        """The most memory that was in use; on a CPU all that ComfyUI holds counts, and only a new peak is told."""
        if device.type == "cuda":
            yield f"peak {torch.cuda.max_memory_allocated(device) / GIB:.1f} GiB"
        elif most_ram() > self._ram_before:
            yield f"peak {most_ram() / GIB:.1f} GiB RAM"

    def _status(self, now: float) -> str:
        left = (now - self._start) / max(self.done - self._there, 1) * (self.total - self.done)
        return f"{self.done} of {self.total} frames, {clock(left)} left"

    def _say(self, text: str) -> None:
        if self._node_id is not None:
            show_text(text, self._node_id)


def most_ram() -> int:
    """Bytes: the most RAM that this process has held since it began."""
    if sys.platform == "win32":
        import psutil  # one of ComfyUI's requirements

        return psutil.Process().memory_info().peak_wset
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def count_of(number: int, word: str) -> str:
    """A number of things: 1 frame, 2 frames."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def report_ui(report: str, *, unfolded: bool = False) -> dict[str, Any]:
    """The `ui` of a node that keeps its report in sight: web/js/report.js writes it on the node, the first line alone
    unless it is to be `unfolded`: a click shows the rest.
    """
    return {"text": (report,), **({"cviv_unfolded": (True,)} if unfolded else {})}


def keep_report(report: str, node_id: str) -> None:
    """Put a report on a node that works after its own turn, by the message that ComfyUI sends at the end of a turn."""
    send_output(report_ui(report), node_id)


def send_output(output: dict[str, Any], node_id: str) -> None:
    """Give a node an output for the page outside its own turn; without a server nothing happens."""
    server = _server()
    if server is None:
        return
    message = {"node": node_id, "display_node": node_id, "output": output}
    message["prompt_id"] = getattr(server, "last_prompt_id", None)
    server.send_sync("executed", message, server.client_id)


def show_text(text: str, node_id: str) -> None:
    """Show plain text on a node, a stock sampler's too, until the run ends: web/js/node_outputs.js takes it away then.

    Without a server, as in tests and scripts, nothing happens.
    """
    server = _server()
    if server is None:
        return
    # newer front ends read Markdown, where two blanks end a line; older ones insert the text as HTML
    server.send_progress_text(html.escape(text, quote=False).replace("\n", "  \n"), node_id)
    server.send_sync("cviv-vae.said", {"node": node_id}, server.client_id)


def _server() -> Any:
    from server import PromptServer

    return getattr(PromptServer, "instance", None)


def clock(seconds: float) -> str:
    """A duration in words."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _jpeg(frame: Tensor) -> tuple[str, Image.Image, int]:
    """A frame (h, w, 3), in 0..1 or uint8, as ComfyUI takes previews; the number is a target side, and it enlarges."""
    side = max(frame.shape[:2])
    stride = max(1, side // PREVIEW_SIDE)
    small = frame[::stride, ::stride]
    levels = small if small.dtype == torch.uint8 else small.mul(255).round().to(torch.uint8)
    picture = Image.fromarray(levels.cpu().contiguous().numpy())
    return "JPEG", picture, min(PREVIEW_SIDE, max(picture.size))
