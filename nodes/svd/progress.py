"""What a user sees while a long clip is sampled: the whole clip so far in the preview, and the time left in words."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bridge.running import clock, show_text

_MOST_CELLS = 16  # pictures on the sheet


class Told:
    """Text on the node that samples. steps: of the whole run; done so far, with `start` of them before it began."""

    def __init__(self, steps: int) -> None:
        from comfy_execution.utils import get_executing_context

        context = get_executing_context()
        self._node_id = None if context is None else context.node_id
        self._steps, self._began, self._skipped, self._done = steps, time.monotonic(), 0, 0

    def skip(self, steps: int) -> None:
        """`steps` need not be made: they take no time."""
        self._skipped += steps

    def step(self, what: str, done: int) -> None:
        """Say `what` is being worked on and how long it will take; `done` steps are made or skipped."""
        made = max(1, done - self._skipped)
        left = (time.monotonic() - self._began) / made * (self._steps - done)
        self.say(f"{what}, {clock(left)} left")

    def say(self, text: str) -> None:
        """Show `text`."""
        if self._node_id is not None:
            show_text(text, self._node_id)


def contact_sheet(clip: Tensor) -> Tensor:
    """(1, c, h, w): latents of a clip (t, c, h, w) as small pictures in one of their size, spread evenly over it."""
    count = min(clip.shape[0], _MOST_CELLS)
    side = math.ceil(math.sqrt(count))
    if side == 1:
        return clip[:1]
    height, width = clip.shape[-2] // side, clip.shape[-1] // side
    if not height or not width:
        return clip[:1]
    chosen = torch.linspace(0, clip.shape[0] - 1, count).round().long().to(clip.device)
    cells = F.adaptive_avg_pool2d(clip[chosen], (height, width))
    sheet = clip.new_zeros((1, *clip.shape[1:]))
    for index, cell in enumerate(cells):
        top, left = index // side * height, index % side * width
        sheet[0, :, top : top + height, left : left + width] = cell
    return sheet


def with_sheet(clip: Tensor) -> Tensor:
    """The clip with a contact sheet in front: ComfyUI's previews show the first latent, others play all."""
    return torch.cat((contact_sheet(clip), clip))


def report_step(callback: Any, step: int, clip: Tensor, noisy: Tensor, steps: int) -> None:
    """Tell a sampler's callback; after the last step the clip goes as it is, since some nodes keep it."""
    if callback is not None:
        callback(step, clip if step + 1 >= steps else with_sheet(clip), noisy, steps)
