"""Euler steps that are made several times: towards a start and an end image in turn, and for carried latents.

Each round ends a step lower in noise; before the next one the noise between the two steps is laid on again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from torch import Tensor
from tqdm.auto import trange

from .job import Run

END = "cviv_svd_end"  # in transformer_options: an EndImage


@dataclass(frozen=True, kw_only=True)
class EndImage:
    """What SVD is told of the last frame. image: (1, 4, h, w), unscaled. seen: CLIP's embedding (1, 1, d). end_first:
    whether the first of all passes follows it.
    """

    image: Tensor
    seen: Tensor
    end_first: bool


def check_sampler(sampler: Any, why: str) -> None:
    """Raise ValueError for samplers whose steps cannot be made in rounds."""
    function = getattr(sampler, "sampler_function", None)
    plain = isinstance(sampler, comfy.samplers.KSAMPLER) and not sampler.extra_options
    if not plain or getattr(function, "__name__", "") != "sample_euler":
        name = getattr(function, "__name__", type(sampler).__name__).removeprefix("sample_")
        raise ValueError(
            f"The sampler is {name}, and {why} makes every step in several rounds, which is defined for euler. Choose "
            "euler as the sampler."
        )


def in_rounds(sampler: Any, run: Run, resamples: int) -> Any:
    """Euler with `resamples` rounds for every step, each of two passes where the run has an end image."""

    def sample(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None,
               disable: bool | None = None) -> Tensor:  # fmt: skip
        extra_args = extra_args or {}
        generator = torch.Generator().manual_seed((int(extra_args.get("seed") or 0) + 0x5EED) % 2**63)
        try:
            for step in trange(len(sigmas) - 1, disable=disable):
                x, estimate = _step(model, x, sigmas[step : step + 2], step, extra_args, run, resamples, generator)
                if callback is not None:
                    told = {"i": step, "denoised": estimate, "x": x, "sigma": sigmas[step], "sigma_hat": sigmas[step]}
                    callback(told)
        finally:
            run.backwards = False
        return x

    return comfy.samplers.KSAMPLER(sample, {}, sampler.inpaint_options)


def _step(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    step: int,
    extra_args: Any,
    run: Run,
    resamples: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """(noisy latents after the step, the latest estimate)"""
    sigma, below = float(sigmas[0]), float(sigmas[1])
    around = max(0.0, sigma**2 - below**2) ** 0.5
    levels = sigmas[:1].expand(x.shape[0])
    order = [False] if run.end is None else [False, True]
    if run.end is not None and run.end.end_first != bool(step % 2):  # the two take turns in having the last word
        order.reverse()
    rounds = order * resamples
    if run.end is not None and below == 0:
        return _last_step(model, x, levels, extra_args, run)
    estimate = x
    for index, backwards in enumerate(rounds):
        run.backwards = backwards
        estimate = model(x, levels, **extra_args)
        x = estimate + (x - estimate) * (below / sigma)
        if index + 1 < len(rounds):
            noise = torch.randn(x.shape, generator=generator).to(x)
            x = x + around * (noise.flip(0) if backwards else noise)
    return x, estimate


def _last_step(model: Any, x: Tensor, levels: Tensor, extra_args: Any, run: Run) -> tuple[Tensor, Tensor]:
    """Both passes see the same latents; the nearer to its image a latent lies, the more its pass counts."""
    estimates = []
    for run.backwards in (False, True):
        estimates.append(model(x, levels, **extra_args))
    share = torch.linspace(0, 1, x.shape[0], device=x.device).reshape(-1, 1, 1, 1)
    estimate = estimates[0] + (estimates[1] - estimates[0]) * share.to(x)
    return estimate, estimate
