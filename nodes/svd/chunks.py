"""Long sampling of SVD by continuation: chunk after chunk, each a run of the sampler."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import comfy.model_management as mm
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from .anchor import Anchor, Reader
from .drift import chunk_change, moved
from .fingerprint import fingerprint, model_fingerprint
from .job import START, Job, LongSettings, Run, entry_of, has_image
from .motion import motion_of, told_for
from .progress import Told, report_step
from .store import Chunk, ChunkStore, StoreSettings
from .windows import Span, carry_mask

_SEEDS = 1 << 64
_log = logging.getLogger("cviv-vae")


class Chunks:
    """Chunk after chunk, each a run of the sampler that keeps the last latents of the one before."""

    def __init__(
        self, settings: LongSettings, executor: Any, job: Job, run: Run, store: StoreSettings, reader: Reader | None
    ) -> None:
        self.settings, self.executor, self.job, self.run, self.reader = settings, executor, job, run, reader
        self.guider = executor.class_obj
        self.model = self.guider.model_patcher.model
        self.noise = job.noise
        self.noise_left = len(job.sigmas) > 0 and float(job.sigmas[-1]) > 0
        self.sampler = _noising_sampler(job.sampler) if not torch.count_nonzero(job.noise) else job.sampler
        self.mask = None if job.mask is None else _plain_mask(job.mask, job.noise.shape)
        self.spans = settings.spans(job.noise.shape[0], _skipped(self.mask, settings.overlap))
        self.store = ChunkStore(store)
        self.made: list[Chunk] = []
        first = self.spans[0].start  # a clip that is made longer sets the motion
        self.before = (
            [motion_of(job.latent[max(0, first - settings.length) : first + settings.overlap])] if first else []
        )
        # as ComfyUI hands latents over, and the same without noise where the run ends early
        self.out = job.latent.float().clone()
        self.clean = self.out.clone() if self.noise_left else self.out
        self.base = "" if self.whole else self._base_key()

    @property
    def whole(self) -> bool:
        """Whether the clip is one chunk, for which there is nothing to do here."""
        return len(self.spans) == 1 and not self.spans[0].start

    def sample(self) -> Tensor:
        """The whole clip."""
        conds, end = self.guider.conds, self.run.end
        options = self.guider.model_options["transformer_options"]
        steps = len(self.spans) * self.job.steps
        told, reused = Told(steps), 0
        try:
            for number, span in enumerate(self.spans):
                mm.throw_exception_if_processing_interrupted()
                options[START] = self.run.start = span.start
                self.run.newest, self.run.carried = None, bool(span.known or span.start)
                self.run.end = end if number + 1 == len(self.spans) else None
                self.run.rise = _rise(number, span)
                chunk, found = self._chunk(number, span, conds, told)
                reused += found
                self._keep(span, chunk)
        finally:
            self.guider.conds, self.run.end = conds, end
            options.pop(START, None)
        told.say(f"{len(self.spans)} chunks" + (f", {reused} of them finished before" if reused else ""))
        if self.job.callback is not None:  # once more, with the whole clip, for nodes that keep the last estimate
            whole = self.model.process_latent_in(self.clean)
            self.job.callback(steps - 1, whole, whole, steps)
        return self.out

    # ----------------------------------------------------------------------------------------------------- one chunk

    def _chunk(self, number: int, span: Span, conds: Any, told: Told) -> tuple[Chunk, bool]:
        """(the chunk, whether it was finished before)"""
        own = self.store.settings.seeds.get(number + 1)
        seed = None if self.job.seed is None else (self.job.seed + number) % _SEEDS  # else later noise would repeat
        if own is not None:
            seed = own
            self._draw_anew(span, own)
        found = self.store.kept(number, (span.length - self._first(span), *self.noise.shape[1:]))
        if found is None:
            job = self._job(number, span, seed, told)
            key = fingerprint(
                self.base, self.before, [chunk.key for chunk in self.made], number, vars(span), seed,
                job.noise, job.latent, job.mask, conds, self.run.end,
            )  # fmt: skip
            found = self.store.find(number, key)
        if found is not None:
            told.skip(self.job.steps)
            _log.info("chunk %d of %d was finished before", number + 1, len(self.spans))
            return found, True
        carried = self.clean[span.start : span.start + (span.known or self.settings.overlap)]
        anchor = Anchor(self.settings.anchor, self.reader, carried, seed or 0)
        controls: dict[int, Any] = {}
        self.guider.conds = {
            name: [self._entry(entry, span, anchor, controls) for entry in entries] for name, entries in conds.items()
        }
        chunk = self._made(span, key, job.run(self.executor))
        self.store.put(number, chunk, {"number": str(number + 1), "of": str(len(self.spans)), "seed": str(seed)})
        return chunk, False

    def _job(self, number: int, span: Span, seed: int | None, told: Told) -> Job:
        job, known, count = self.job, span.known, len(self.spans)
        latent = job.latent[span.start : span.stop].clone()
        mask = None if self.mask is None else self.mask[span.start : span.stop]
        if known:
            latent[:known] = self.clean[span.start : span.start + known].to(latent)
            fresh = self._freshness(span).expand(-1, 1, *latent.shape[2:])
            mask = fresh.clone() if mask is None else mask * fresh.to(mask)
        before = self.clean[: span.start + known]

        def step_done(step: int, x0: Tensor, x: Tensor, steps: int) -> None:
            mm.throw_exception_if_processing_interrupted()
            self.run.newest = x0
            done = number * steps + min(step, steps - 1)
            told.step(f"chunk {number + 1} of {count}, step {min(step + 1, steps)} of {steps}", done + 1)
            if job.callback is not None:
                whole = torch.cat((self.model.process_latent_in(before).to(x0), x0[known:]))
                report_step(job.callback, done, whole, x[known:], count * steps)

        return replace(
            job,
            noise=self.noise[span.start : span.stop].clone(),
            latent=latent,
            sampler=self.sampler if known else job.sampler,
            mask=None if mask is None else mask.to(self.guider.model_patcher.load_device),
            callback=step_done,
            seed=seed,
            other={**job.other, "latent_shapes": [latent.shape]} if "latent_shapes" in job.other else job.other,
        )

    def _made(self, span: Span, key: str, result: Tensor) -> Chunk:
        """A chunk of what the sampler gave, held to the first one where it is free of noise."""
        first = self._first(span)
        if self.noise_left:
            clean = result if self.run.newest is None else self.model.process_latent_out(self.run.newest).to(result)
        else:
            result = clean = self._without_drift(span, result)
        motion = motion_of(clean[max(0, span.known - 1) :])
        kept = result[first:]
        return Chunk(key=key, result=kept, clean=kept if clean is result else clean[first:], motion=motion)

    def _keep(self, span: Span, chunk: Chunk) -> None:
        """Put the new latents of a chunk into the clip."""
        first = span.start + self._first(span)
        self.out[first : span.stop] = chunk.result.to(self.out)
        if self.clean is not self.out:
            self.clean[first : span.stop] = chunk.clean.to(self.clean)
        self.made.append(chunk)

    def _without_drift(self, span: Span, result: Tensor) -> Tensor:
        """The new latents held to the first chunk; those carried over already are."""
        if not self.settings.drift or not span.known:
            return result
        begin = self.spans[0]
        known = self.clean[span.start : span.start + span.known].to(result)
        first = self.clean[begin.start : begin.stop].to(result)
        change = chunk_change(result, known, first, self.settings.length, self.settings.drift)
        strength = self._freshness(span).to(result)
        if self.mask is not None:
            strength = strength * self.mask[span.start : span.stop].to(result)
        return result + (moved(result, change) - result) * strength

    def _freshness(self, span: Span) -> Tensor:
        """(t, 1, 1, 1): 0 for latents kept as they are, 1 for new ones."""
        return carry_mask(span.length, span.known, self.settings.fade).reshape(-1, 1, 1, 1)

    def _first(self, span: Span) -> int:
        """The first latent of a chunk that is not kept as it was."""
        return max(0, span.known - self.settings.fade)

    def _draw_anew(self, span: Span, seed: int) -> None:
        """Noise of its own for the new latents of a chunk; those carried keep theirs."""
        new = slice(span.start + span.known, span.stop)
        drawn = torch.randn(self.noise[new].shape, generator=torch.Generator().manual_seed(seed % 2**63))
        self.noise = self.noise.clone()
        self.noise[new] = drawn.to(self.noise)

    def _entry(self, entry: dict[str, Any], span: Span, anchor: Anchor, controls: dict[int, Any]) -> dict[str, Any]:
        """A condition for one chunk: what differs from latent to latent is cut, the image follows where asked."""
        latents, image = self.job.noise.shape[0], entry.get("concat_latent_image")
        entry = entry_of(entry, latents, range(span.start, span.stop), controls)
        if self.settings.steady and "motion_bucket_id" in entry:
            motions = [*self.before, *(chunk.motion for chunk in self.made)]
            bucket, rate = entry["motion_bucket_id"], entry.get("fps", 6)  # 6 is ComfyUI's own
            entry["motion_bucket_id"], entry["fps"] = told_for(bucket, rate, motions)
        if not isinstance(image, Tensor):
            return entry
        if (span.known or span.start) and has_image(image) and anchor.moves:
            return {**entry, **anchor.told(image, span.length, entry.get("augmentation_level", 0.0))}
        if image.shape[0] > 1:  # keyframes, held as ComfyUI would hold them over the whole clip
            held = comfy.utils.resize_to_batch_size(image, latents)
            entry["concat_latent_image"] = held[span.start : span.stop]
        return entry

    def _base_key(self) -> str:
        """The hash of what all chunks are made of."""
        passing = ("inner_model", "loaded_models", "conds", "original_conds", "model_patcher", "model_options")
        guider = {name: value for name, value in vars(self.guider).items() if name not in passing}
        options = dict(self.guider.model_options)
        inner = dict(options.pop("transformer_options", {}))
        wrappers = {
            kind: {key: hooks[key] for key in hooks if not str(key).startswith("cviv_svd_long")}
            for kind, hooks in inner.pop("wrappers", {}).items()
        }
        inner = {name: value for name, value in inner.items() if not name.startswith("cviv_svd")}
        return fingerprint(
            model_fingerprint(self.guider.model_patcher), type(self.guider), guider, options, inner, wrappers,
            self.settings, self.reader, self.job.sampler, self.job.sigmas,
        )  # fmt: skip


def _rise(number: int, span: Span) -> Tensor:
    """The CFG rises over the first chunk and stays: falling back at every seam, it would pulse."""
    return torch.ones(span.length) if number else torch.linspace(0, 1, span.length)


def _skipped(mask: Tensor | None, carry: int) -> int:
    """Latents at the beginning that are kept as they are and that no chunk needs to carry on from."""
    if mask is None:
        return 0
    sampled = torch.count_nonzero(mask.flatten(1), dim=1).cpu().nonzero()
    kept = int(sampled[0]) if sampled.numel() else mask.shape[0]
    return max(0, kept - carry)


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
