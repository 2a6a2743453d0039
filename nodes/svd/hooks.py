"""Long sampling of SVD through ComfyUI's wrappers: windows in every step, or chunk after chunk.

The wrappers hold settings alone. What one run needs to remember is a `Run`, made when sampling begins and handed down
in transformer_options, since clones of a model share its wrappers.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import comfy.conds
import comfy.model_management as mm
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .anchor import Reader
from .chunks import Chunks
from .drift import clip_change, moved
from .guidance import check_conditions, let_rise
from .job import START, Job, LongSettings, Run, entry_of, has_image
from .positions import patch_positions
from .progress import Told, report_step
from .rounds import END, check_sampler, in_rounds
from .schedule import Window
from .store import STORE, temporary_store
from .windows import repeat_noise

KEY = "cviv_svd_long"
EVEN_BELOW = 1.5  # sigma under which windows are evened out: above, an estimate has too little variance to judge by
FOLLOW_BELOW = 5.0  # sigma under which a window may take its own estimate for its image: above, it is a blur


class LongSampling:
    """The hooks; `patch` gives a model that has them. reader: for chunks that start from a picture made anew."""

    def __init__(self, settings: LongSettings, reader: Reader | None = None) -> None:
        self.settings, self.reader = settings, reader
        self.places: Any = None

    def patch(self, model: Any) -> Any:
        """A clone of `model` with these hooks instead of those of an earlier Long Video node."""
        patched = model.clone()
        self.places = patch_positions(patched, wanted=self.settings.time_offset)
        hooks = {
            WrappersMP.OUTER_SAMPLE: self.outer_sample,
            WrappersMP.PREPARE_SAMPLING: self.prepare_sampling,
            WrappersMP.SAMPLER_SAMPLE: self.sampler_sample,
            WrappersMP.PREDICT_NOISE: self.predict_noise,
            WrappersMP.CALC_COND_BATCH: self.calc_cond_batch,
        }
        for kind, hook in hooks.items():
            patched.remove_wrappers_with_key(kind, KEY)
            patched.add_wrapper_with_key(kind, KEY, hook)
        # ours runs the sampler once for every chunk: what others keep for a run must begin anew with each
        runs = patched.wrappers[WrappersMP.OUTER_SAMPLE]
        patched.wrappers[WrappersMP.OUTER_SAMPLE] = {KEY: runs.pop(KEY), **runs}
        return patched

    # ---------------------------------------------------------------------------------------------------- the hooks

    def outer_sample(
        self,
        executor: Any,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        callback: Any = None,
        disable_pbar: bool = False,
        seed: int | None = None,
        **other: Any,
    ) -> Tensor:
        """One run of a sampler: shuffles the noise, and in continuation runs the sampler chunk by chunk."""
        guider, settings, latents = executor.class_obj, self.settings, noise.shape[0]
        options = guider.model_options.setdefault("transformer_options", {})
        run = Run(seed=seed or 0, end=options.get(END))
        spans = settings.spans(latents)
        if settings.freenoise and len(spans) > 1:
            noise = repeat_noise(noise, spans, run.seed)
        job = Job(
            noise=noise,
            latent=latent_image,
            sampler=sampler,
            sigmas=sigmas,
            mask=denoise_mask,
            callback=callback,
            disable_pbar=disable_pbar,
            seed=seed,
            other=other,
        )
        chunks = None
        if settings.mode == "continuation":
            store = options.get(STORE) or temporary_store()
            chunks = Chunks(settings, executor, job, run, store, self.reader)
        options[KEY] = run
        if settings.min_cfg:
            let_rise(guider.model_options, settings.min_cfg, run)
        self._check_caches(options, latents)
        try:
            if chunks is not None and not chunks.whole:
                return chunks.sample()
            if settings.in_windows(latents):
                _last(options, WrappersMP.CALC_COND_BATCH)
                return _sample_windows(executor, job, run, settings.schedule.most_windows(latents))
            return job.run(executor)
        finally:
            if self.places is not None:
                self.places.told = None

    def prepare_sampling(
        self, executor: Any, model: Any, noise_shape: Any, conds: Any, *arguments: Any, **other: Any
    ) -> Any:
        """Ask ComfyUI for the memory of one window, not of the clip."""
        shape = [min(noise_shape[0], self.settings.length), *list(noise_shape)[1:]]
        return executor(model, shape, conds, *arguments, **other)

    def sampler_sample(self, executor: Any, guider: Any, sigmas: Tensor, extra_args: Any, *arguments: Any) -> Tensor:
        """The sampler, over whole steps; in rounds where an end image or carried latents ask for it."""
        run = extra_args["model_options"]["transformer_options"].get(KEY) or Run()
        resamples = self.settings.resamples if run.carried else 1
        if run.end is None and resamples == 1:
            return executor(guider, sigmas, extra_args, *arguments)
        sampler = executor.class_obj
        check_sampler(sampler, "resamples above 1" if run.end is None else "SVD End Image")
        return in_rounds(sampler, run, resamples).sample(guider, sigmas, extra_args, *arguments)

    def predict_noise(
        self, executor: Any, x: Tensor, timestep: Tensor, model_options: Any = None, seed: int | None = None
    ) -> Tensor:
        """One estimate of the clip; late in the run its windows are brought to the levels of the first."""
        model_options = {} if model_options is None else model_options
        run = model_options.get("transformer_options", {}).get(KEY) or Run()
        if run.backwards:
            estimate = _backwards(executor, x, timestep, model_options, seed, run)
        else:
            estimate = executor(x, timestep, model_options, seed)
        settings = self.settings
        if not settings.drift or settings.mode != "windows" or not settings.in_windows(x.shape[0]):
            return estimate
        if float(timestep.max()) >= EVEN_BELOW:
            return estimate
        return moved(estimate, clip_change(estimate, settings.spans(x.shape[0]), settings.drift))

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: Any, x_in: Tensor, timestep: Tensor, model_options: Any
    ) -> list[Tensor]:
        """One call of the model for each condition: window by window, fused."""
        options = model_options.get("transformer_options", {})
        run, latents = options.get(KEY) or Run(), x_in.shape[0]
        check_conditions(conds, self.settings.min_cfg)
        if not self.settings.in_windows(latents):
            self._tell(range(run.start, run.start + latents), x_in)
            return executor(model, conds, x_in, timestep, model_options)
        fused = [torch.zeros_like(x_in, dtype=torch.float32) for _ in conds]
        rise = torch.zeros(latents)
        for window in self._windows(latents, timestep, options, run):
            mm.throw_exception_if_processing_interrupted()
            index = torch.tensor(window.latents, device=x_in.device)
            image = self._own_image(model, run, window, timestep)
            controls: dict[int, Any] = {}
            windowed = [_window_of(cond, latents, window.latents, image, controls) for cond in conds]
            inside = {**model_options, "transformer_options": {**options, START: window.latents[0]}}
            self._tell(window.places, x_in)
            results = executor(model, windowed, x_in[index], timestep[index], inside)
            share = window.weights.to(x_in.device).reshape(-1, 1, 1, 1)
            for total, result in zip(fused, results, strict=True):
                total[index] += result.float() * share
            rise[index.cpu()] += window.weights * torch.linspace(0, 1, len(window.latents))
            run.window_done()
        run.rise = rise
        return [total.to(x_in.dtype) for total in fused]

    # ------------------------------------------------------------------------------------------------------- details

    def _windows(self, latents: int, timestep: Tensor, options: Any, run: Run) -> list[Window]:
        """The windows of the step that this noise level belongs to; between two steps, of the one before."""
        step, steps = 0, 1
        sigmas = options.get("sample_sigmas")
        if sigmas is not None:
            steps = max(1, len(sigmas) - 1)
            step = max(0, int((sigmas[:-1] >= float(timestep.max()) * (1 - 1e-4)).sum()) - 1)
        wide = step < round(self.settings.wide * steps)
        return self.settings.schedule.windows(latents, step, run.seed, wide=wide)

    def _tell(self, places: Sequence[int], x: Tensor) -> None:
        if self.places is not None:
            self.places.tell(places, x.device)

    def _own_image(self, model: Any, run: Run, window: Window, timestep: Tensor) -> Tensor | None:
        """The image of a later window where it follows the clip: the latest estimate of its first latent."""
        first = window.latents[0]
        if self.settings.anchor == "first" or not first or run.newest is None:
            return None
        if float(timestep.max()) >= FOLLOW_BELOW:
            return None
        newest = run.newest.flip(0) if run.backwards else run.newest
        return model.process_latent_out(newest[first : first + 1])

    def _check_caches(self, options: Any, latents: int) -> None:
        """Raise ValueError for EasyCache with windows that are not the same in every step."""
        if type(options.get("easycache")).__name__ != "EasyCacheHolder" or not self.settings.in_windows(latents):
            return
        if self.settings.moving or self.settings.wide:
            raise ValueError(
                "EasyCache keeps what a window gave for later steps, and here windows lie elsewhere in every step. Set "
                "window_schedule to still and wide_steps to 0, or use LazyCache."
            )


def _last(options: Any, kind: str) -> None:
    """Move our wrapper of a kind after all others, so that one call of theirs covers all windows."""
    wrappers = dict(options["wrappers"][kind])
    ours = wrappers.pop(KEY)
    options["wrappers"] = {**options["wrappers"], kind: {**wrappers, KEY: ours}}


def _sample_windows(executor: Any, job: Job, run: Run, windows: int) -> Tensor:
    """The whole clip in one run of the sampler, with progress after every window."""
    total = job.steps * windows
    bar, told = comfy.utils.ProgressBar(total), Told(total)
    done = {"steps": 0, "windows": 0}

    def window_done() -> None:
        # samplers of several stages run more windows in a step than one pass has; the bar waits for them
        done["windows"] = min(done["windows"] + 1, windows - 1)
        step = min(done["steps"], job.steps - 1)
        at = step * windows + done["windows"]
        bar.update_absolute(at, total)
        told.step(f"step {step + 1} of {job.steps}, window {done['windows']} of {windows}", at)

    def step_done(step: int, x0: Tensor, x: Tensor, steps: int) -> None:
        run.newest = x0
        done.update(steps=step + 1, windows=0)
        report_step(job.callback, (step + 1) * windows - 1, x0, x, steps * windows)

    run.window_done = window_done
    return replace(job, callback=step_done).run(executor)


def _window_of(cond: Any, latents: int, which: Sequence[int], image: Tensor | None, controls: dict[int, Any]) -> Any:
    """The conditions of one window; `image` takes the place of the image condition where there is one."""
    if cond is None:
        return None
    windowed = []
    for entry in cond:
        entry = entry_of(entry, latents, which, controls)
        if "uuid" in entry:  # caches of other nodes go by it, and a window is not the clip
            entry["uuid"] = uuid.uuid5(entry["uuid"], str(which))
        concat = entry.get("model_conds", {}).get("c_concat")
        if image is not None and concat is not None and has_image(concat.cond):
            entry["model_conds"]["c_concat"] = concat._copy_with(image.to(concat.cond).expand_as(concat.cond))
        windowed.append(entry)
    return windowed


def _backwards(executor: Any, x: Tensor, timestep: Tensor, model_options: Any, seed: int | None, run: Run) -> Tensor:
    """The estimate of a clip that begins with the end image and runs back in time."""
    guider, latents = executor.class_obj, x.shape[0]
    conds = guider.conds
    controls: dict[int, Any] = {}
    try:
        guider.conds = {
            name: [_from_the_end(entry, latents, run, controls) for entry in entries] for name, entries in conds.items()
        }
        return executor(x.flip(0), timestep.flip(0), model_options, seed).flip(0)
    finally:
        guider.conds = conds


def _from_the_end(entry: dict[str, Any], latents: int, run: Run, controls: dict[int, Any]) -> dict[str, Any]:
    entry = entry_of(entry, latents, range(latents - 1, -1, -1), controls)
    if "uuid" in entry:
        entry["uuid"] = uuid.uuid5(entry["uuid"], "backwards")
    model_conds = entry.get("model_conds", {})
    concat = model_conds.get("c_concat")
    if concat is not None and has_image(concat.cond):
        image = run.end.image
        if image.shape[-2:] != concat.cond.shape[-2:]:
            height, width = concat.cond.shape[-2:]
            image = comfy.utils.common_upscale(image, width, height, "bilinear", "center")
        model_conds["c_concat"] = concat._copy_with(image.to(concat.cond).expand_as(concat.cond))
        model_conds["c_crossattn"] = comfy.conds.CONDCrossAttn(run.end.seen.to(model_conds["c_crossattn"].cond))
    return entry
