"""One run of a sampler over a long SVD clip: settings, arguments, and how conditions are cut to some of its latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.conds
import torch
from torch import Tensor

from .control import control_of
from .schedule import Schedule
from .windows import Span, plan_spans

START = "cviv_svd_start"  # in transformer_options: which latent of the clip is the first that the model sees


@dataclass(frozen=True, kw_only=True)
class LongSettings:
    """How to sample more latents than SVD was trained on.

    mode: "continuation", "windows" or "loop". length: latents of a window or chunk. overlap: latents that two windows,
    or two chunks, share at least. fuse, moving: see `Schedule`. wide: share of the steps whose windows take every other
    latent. fade: of the latents carried into a chunk, how many are cross-faded. anchor: which image later windows and
    chunks start from. freenoise, drift, time_offset: see the node. min_cfg: CFG of the first latent of a window; 0
    leaves the CFG alone. resamples: how often a step with carried latents is made. steady: whether the motion bucket
    of a chunk follows the motion of the one before.
    """

    mode: str
    length: int
    overlap: int
    fuse: str
    moving: bool
    wide: float
    fade: int
    anchor: str
    freenoise: bool
    drift: float
    time_offset: bool
    min_cfg: float
    resamples: int
    steady: bool

    def spans(self, latents: int, first: int = 0) -> list[Span]:
        """The chunks of a clip from latent `first` on."""
        return plan_spans(latents, self.length, self.overlap, first)

    def in_windows(self, latents: int) -> bool:
        """Whether a clip is sampled by several windows in every step."""
        return self.mode == "loop" or (self.mode == "windows" and latents > self.length)

    @property
    def schedule(self) -> Schedule:
        """The windows of every step."""
        return Schedule(
            length=self.length,
            overlap=self.overlap,
            fuse=self.fuse,
            moving=self.moving,
            loop=self.mode == "loop",
        )


@dataclass
class Run:
    """What the hooks of one sampling run share.

    seed: of the sampler. start: the first latent of the chunk. carried: whether it holds latents of the one before.
    newest: the latest estimate of the clip, in the model's scale. rise: for each latent how far the CFG has risen, 0 to
    1; None: evenly over the clip. end: what the last frame shows; backwards: whether time is turned towards it now.
    """

    seed: int = 0
    start: int = 0
    carried: bool = False
    newest: Tensor | None = None
    rise: Tensor | None = None
    end: Any = None
    backwards: bool = False
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


def entry_of(entry: dict[str, Any], latents: int, which: Sequence[int], controls: dict[int, Any]) -> dict[str, Any]:
    """A condition of a clip of `latents`, cut to those in `which`; what is the same for all stays as it is.

    controls: a dict that all conditions of these latents share, see `control_of`.
    """
    index = torch.tensor(which)
    out = {name: _cut(value, latents, index) for name, value in entry.items()}
    if "control" in out:
        out["control"] = control_of(out["control"], latents, which, controls)
    model_conds = dict(entry.get("model_conds", {}))
    for name, value in model_conds.items():
        tensor = getattr(value, "cond", None)
        if name == "num_video_frames":
            model_conds[name] = comfy.conds.CONDConstant(len(which))
        elif isinstance(tensor, Tensor):
            model_conds[name] = value._copy_with(_cut(tensor, latents, index))
    if "model_conds" in entry:
        out["model_conds"] = model_conds
    return out


def _cut(value: Any, latents: int, index: Tensor) -> Any:
    """Those of a tensor that holds something for each latent; anything else as it is."""
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == latents:
        return value[index.to(value.device)]
    return value
