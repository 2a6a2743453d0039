"""Long sampling of SVD by continuation: chunk after chunk, each a run of the sampler."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.model_management as mm
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from .job import START, Job, LongSettings, Run, cut, has_image, refuse_frames_of_control
from .windows import Span, carry_mask, match_statistics, statistics

_SEEDS = 1 << 64


class Chunks:
    """Chunk after chunk, each a run of the sampler that keeps the last latents of the one before."""

    def __init__(self, settings: LongSettings, executor: Any, job: Job, run: Run) -> None:
        self.settings, self.executor, self.job, self.run = settings, executor, job, run
        self.guider = executor.class_obj
        self.model = self.guider.model_patcher.model
        self.noise_left = len(job.sigmas) > 0 and float(job.sigmas[-1]) > 0
        self.sampler = _noising_sampler(job.sampler) if not torch.count_nonzero(job.noise) else job.sampler
        self.mask = None if job.mask is None else _plain_mask(job.mask, job.noise.shape)
        self.out = torch.zeros(())  # the result, as ComfyUI hands latents over
        self.clean = torch.zeros(())  # the same without noise; a tensor of its own where the run ends early

    def sample(self, spans: list[Span]) -> Tensor:
        """The whole clip."""
        conds = self.guider.conds
        options = self.guider.model_options["transformer_options"]
        try:
            for index, span in enumerate(spans):
                mm.throw_exception_if_processing_interrupted()
                self.run.newest = None
                self.guider.conds = {
                    name: [self._entry(entry, span) for entry in entries] for name, entries in conds.items()
                }
                options[START] = span.start
                self._keep(span, self._chunk(index, span, len(spans)))
        finally:
            self.guider.conds = conds
            options.pop(START, None)
        if self.job.callback is not None:  # once more, with the whole clip, for nodes that keep the last estimate
            total = len(spans) * self.job.steps
            whole = self.model.process_latent_in(self.clean)
            self.job.callback(total - 1, whole, whole, total)
        return self.out

    def _chunk(self, index: int, span: Span, count: int) -> Tensor:
        job, known = self.job, span.known
        latent = job.latent[span.start : span.stop].clone()
        mask = None if self.mask is None else self.mask[span.start : span.stop]
        if known:
            latent[:known] = self.clean[span.start : span.start + known].to(latent)
            fresh = self._freshness(span).expand(-1, 1, *latent.shape[2:])
            mask = fresh.clone() if mask is None else mask * fresh.to(mask)

        def told(step: int, x0: Tensor, x: Tensor, steps: int) -> None:
            mm.throw_exception_if_processing_interrupted()
            self.run.newest = x0
            if job.callback is not None:  # the preview shows the first of them: the newest latent, not a kept one
                job.callback(index * steps + min(step, steps - 1), x0[known:], x[known:], count * steps)

        chunk = replace(
            job,
            noise=job.noise[span.start : span.stop].clone(),
            latent=latent,
            sampler=self.sampler if known else job.sampler,
            mask=None if mask is None else mask.to(self.guider.model_patcher.load_device),
            callback=told,
            seed=None if job.seed is None else (job.seed + index) % _SEEDS,  # else noise added later would repeat
            other={**job.other, "latent_shapes": [latent.shape]} if "latent_shapes" in job.other else job.other,
        )
        return chunk.run(self.executor)

    def _keep(self, span: Span, result: Tensor) -> None:
        """Put the new latents of a chunk into the clip, corrected towards the first chunk."""
        if span.start == 0:
            self.out = result.new_zeros(self.job.noise.shape)
            self.clean = torch.zeros_like(self.out) if self.noise_left else self.out
        first = span.start + max(0, span.known - self.settings.fade)
        result = self._without_drift(span, result)
        self.out[first : span.stop] = result[first - span.start :]
        if self.noise_left:
            estimate = result if self.run.newest is None else self.model.process_latent_out(self.run.newest)
            self.clean[first : span.stop] = estimate[first - span.start :]

    def _without_drift(self, span: Span, result: Tensor) -> Tensor:
        """The new latents with the statistics of the first chunk; those carried over already have them."""
        if not self.settings.drift or not span.known or self.noise_left:
            return result
        want = statistics(self.out[: self.settings.length])
        strength = self._freshness(span).to(result) * self.settings.drift
        if self.mask is not None:
            strength = strength * self.mask[span.start : span.stop].to(result)
        return match_statistics(result, statistics(result[span.known :]), want, strength)

    def _freshness(self, span: Span) -> Tensor:
        """(t, 1, 1, 1): 0 for latents kept as they are, 1 for new ones."""
        return carry_mask(span.length, span.known, self.settings.fade).reshape(-1, 1, 1, 1)

    def _entry(self, entry: dict[str, Any], span: Span) -> dict[str, Any]:
        """A condition for one chunk: what differs from latent to latent is cut, the image follows where asked."""
        refuse_frames_of_control(entry.get("control"))
        latents, part = self.job.noise.shape[0], slice(span.start, span.stop)
        image = entry.get("concat_latent_image")
        entry = {name: cut(value, latents, part) for name, value in entry.items()}
        if not isinstance(image, Tensor):
            return entry
        if self.settings.moving and span.known and has_image(image):
            entry["concat_latent_image"] = self.clean[span.start : span.start + 1].to(image)
        elif image.shape[0] > 1:  # keyframes, held as ComfyUI would hold them over the whole clip
            entry["concat_latent_image"] = comfy.utils.resize_to_batch_size(image, latents)[part]
        return entry


def _plain_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    """(t, 1, h, w) of a noise mask: older ComfyUI hands over the user's own, newer one already sized like the noise."""
    if mask.shape != shape:
        mask = comfy.utils.reshape_mask(mask, shape)
    return mask[:, :1]


def _noising_sampler(sampler: Any) -> Any:
    """The sampler for a later stage that adds no noise: kept latents need some of their own, else they enter clean."""
    if not isinstance(sampler, comfy.samplers.KSAMPLER):
        return sampler
    return comfy.samplers.KSAMPLER(
        sampler.sampler_function, sampler.extra_options, {**sampler.inpaint_options, "random": True}
    )
