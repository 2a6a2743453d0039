"""One run of a sampler over a long SVD clip: settings, arguments, and how conditions are cut to a part of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .windows import Span, plan_spans

START = "cviv_svd_start"  # in transformer_options: which latent of the clip is the first that the model sees


@dataclass(frozen=True, kw_only=True)
class LongSettings:
    """How to sample more latents than SVD was trained on.

    mode: "windows" or "continuation". length: latents of a window or chunk. overlap: latents that two windows, or two
    chunks, share. fuse: see `fusing_weights`. fade: of the latents carried into a chunk, how many are cross-faded.
    moving: whether the image condition follows the clip. freenoise, drift, time_offset: see the node. min_cfg: CFG of
    the first latent of a window; 0 leaves the CFG alone.
    """

    mode: str
    length: int
    overlap: int
    fuse: str
    fade: int
    moving: bool
    freenoise: bool
    drift: float
    time_offset: bool
    min_cfg: float

    def spans(self, latents: int) -> list[Span]:
        """The windows or chunks of a clip."""
        return plan_spans(latents, self.length, self.overlap)


@dataclass
class Run:
    """What the hooks of one sampling run share. newest: the latest estimate of the clip, in the model's scale."""

    cfg: float
    newest: Tensor | None = None
    window_done: Callable[[], None] = lambda: None


@dataclass(frozen=True, kw_only=True)
class Job:
    """The arguments of one call of a guider's outer_sample."""

    noise: Tensor
    latent: Tensor
    sampler: Any
    sigmas: Tensor
    mask: Tensor | None
    callback: Any
    disable_pbar: bool
    seed: int | None
    other: dict[str, Any]

    @property
    def steps(self) -> int:
        """Steps of the sampler."""
        return max(1, len(self.sigmas) - 1)

    def run(self, executor: Any) -> Tensor:
        """The latents that the guider samples."""
        arguments = (self.noise, self.latent, self.sampler, self.sigmas, self.mask, self.callback, self.disable_pbar)
        return executor(*arguments, self.seed, **self.other)


def has_image(image: object) -> bool:
    """Whether an image condition shows anything: the negative's is all zeros and stays so."""
    return isinstance(image, Tensor) and bool(torch.count_nonzero(image))


def cut(value: Any, latents: int, part: slice) -> Any:
    """The part of a tensor that holds something for each latent; anything else as it is."""
    return value[part] if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == latents else value


def refuse_frames_of_control(control: Any) -> None:
    """Raise ValueError where a ControlNet has a hint for each frame: ComfyUI would give every part the first ones."""
    while control is not None:
        hint = getattr(control, "cond_hint_original", None)
        if isinstance(hint, Tensor) and hint.shape[0] > 1:
            raise ValueError(
                f"A ControlNet with {hint.shape[0]} frames is connected, and windows and chunks would all get its "
                "first ones. Use one image for it, or sample without SVD Long Video."
            )
        control = getattr(control, "previous_controlnet", None)
