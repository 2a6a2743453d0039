"""Long sampling of SVD through ComfyUI's wrappers: windows in every step, or chunk after chunk.

The wrappers hold settings alone. What one run needs to remember is a `Run`, made when sampling begins and handed down
in transformer_options, since clones of a model share its wrappers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.conds
import comfy.model_management as mm
import comfy.utils
import torch
from comfy.ldm.modules.attention import SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.util import timestep_embedding
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .chunks import Chunks
from .job import START, Job, LongSettings, Run, cut, has_image, refuse_frames_of_control
from .windows import Span, even_out, fusing_weights, repeat_noise

KEY = "cviv_svd_long"
EVEN_BELOW = 1.5  # sigma under which windows are evened out: above, an estimate has too little variance to judge by
FOLLOW_BELOW = 5.0  # sigma under which a window may take its own estimate for its image: above, it is a blur


class LongSampling:
    """The hooks; `patch` gives a model that has them."""

    def __init__(self, settings: LongSettings) -> None:
        self.settings = settings

    def patch(self, model: Any) -> Any:
        """A clone of `model` with these hooks instead of those of an earlier Long Video node."""
        patched = model.clone()
        hooks = {
            WrappersMP.OUTER_SAMPLE: self.outer_sample,
            WrappersMP.PREPARE_SAMPLING: self.prepare_sampling,
            WrappersMP.PREDICT_NOISE: self.predict_noise,
            WrappersMP.CALC_COND_BATCH: self.calc_cond_batch,
            WrappersMP.DIFFUSION_MODEL: self.diffusion_model,
        }
        for kind, hook in hooks.items():
            patched.remove_wrappers_with_key(kind, KEY)
            patched.add_wrapper_with_key(kind, KEY, hook)
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
        guider = executor.class_obj
        run = Run(cfg=getattr(guider, "cfg", 1.0))
        guider.model_options.setdefault("transformer_options", {})[KEY] = run
        spans = self.settings.spans(noise.shape[0])
        if self.settings.freenoise and len(spans) > 1:
            noise = repeat_noise(noise, self.settings.length, self.settings.overlap, seed or 0)
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
        if len(spans) == 1:
            return job.run(executor)
        if self.settings.mode == "windows":
            return _sample_windows(executor, job, run, len(spans))
        return Chunks(self.settings, executor, job, run).sample(spans)

    def prepare_sampling(
        self, executor: Any, model: Any, noise_shape: Any, conds: Any, *arguments: Any, **other: Any
    ) -> Any:
        """Ask ComfyUI for the memory of one window, not of the clip."""
        shape = [min(noise_shape[0], self.settings.length), *list(noise_shape)[1:]]
        return executor(model, shape, conds, *arguments, **other)

    def predict_noise(
        self, executor: Any, x: Tensor, timestep: Tensor, model_options: Any = None, seed: int | None = None
    ) -> Tensor:
        """One estimate of the clip; late in the run its windows are brought to the statistics of the first."""
        estimate = executor(x, timestep, {} if model_options is None else model_options, seed)
        spans = self.settings.spans(x.shape[0])
        late = float(timestep.max()) < EVEN_BELOW
        if self.settings.mode != "windows" or not self.settings.drift or len(spans) == 1 or not late:
            return estimate
        return even_out(estimate, spans, fusing_weights(spans, self.settings.fuse), self.settings.drift)

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: Any, x_in: Tensor, timestep: Tensor, model_options: Any
    ) -> list[Tensor]:
        """One call of the model for each condition: window by window, fused."""
        options = model_options.get("transformer_options", {})
        run = options.get(KEY) or Run(cfg=1.0)
        spans = self.settings.spans(x_in.shape[0])
        if self.settings.mode != "windows" or len(spans) == 1:
            results = executor(model, conds, x_in, timestep, model_options)
            return self._ramp(results, conds, run, model_options)
        fused = [torch.zeros_like(x_in, dtype=torch.float32) for _ in conds]
        for span, weight in zip(spans, fusing_weights(spans, self.settings.fuse), strict=True):
            mm.throw_exception_if_processing_interrupted()
            part = slice(span.start, span.stop)
            image = self._own_image(model, run, span, timestep)
            windowed = [_window_of(cond, x_in.shape[0], part, image) for cond in conds]
            inside = {**model_options, "transformer_options": {**options, START: span.start}}
            results = executor(model, windowed, x_in[part], timestep[part], inside)
            results = self._ramp(results, windowed, run, model_options)
            share = weight.to(x_in.device).reshape(-1, 1, 1, 1)
            for total, result in zip(fused, results, strict=True):
                total[part] += result.float() * share
            run.window_done()
        return [total.to(x_in.dtype) for total in fused]

    def diffusion_model(
        self,
        executor: Any,
        x: Tensor,
        timesteps: Any = None,
        context: Any = None,
        y: Any = None,
        control: Any = None,
        transformer_options: Any = None,
        **other: Any,
    ) -> Tensor:
        """One call of the network; with the time offset it is told where in the clip the window lies."""
        options = {} if transformer_options is None else transformer_options
        start = options.get(START, 0)
        if not self.settings.time_offset or not start:
            return executor(x, timesteps, context, y, control, options, **other)
        length = int(other["num_video_frames"])
        where = torch.arange(start, start + length, dtype=torch.float32, device=x.device)
        hooks = _tell_positions(executor.class_obj, where.repeat(x.shape[0] // length))
        try:
            return executor(x, timesteps, context, y, control, options, **other)
        finally:
            for hook in hooks:
                hook.remove()

    # --------------------------------------------------------------------------------------------------------- parts

    def _own_image(self, model: Any, run: Run, span: Span, timestep: Tensor) -> Tensor | None:
        """The image of a later window where it follows the clip: the latest estimate of its first latent."""
        if not self.settings.moving or not span.start or run.newest is None:
            return None
        if float(timestep.max()) >= FOLLOW_BELOW:
            return None
        return model.process_latent_out(run.newest[span.start : span.start + 1])

    def _ramp(self, results: list[Tensor], conds: Any, run: Run, model_options: Any) -> list[Tensor]:
        """Scale what the condition adds, so that the guidance gets `min_cfg` at the first latent and cfg at the last.

        Guidance is u + cfg * (c - u), linear in c - u: scaling that inside a window is guidance inside the window.
        """
        if not self.settings.min_cfg or len(conds) < 2 or any(cond is None for cond in conds) or not run.cfg:
            return results
        if len(conds) > 2:
            raise ValueError(
                f"min_cfg is {self.settings.min_cfg} and the guider has {len(conds)} conditions; the ramp of the CFG "
                "is defined for one positive and one negative. Set min_cfg to 0, or use KSampler or CFGGuider."
            )
        if "sampler_cfg_function" in model_options:
            raise ValueError(
                f"min_cfg is {self.settings.min_cfg}, and another node of the model, such as Video Linear CFG "
                "Guidance, changes the CFG over the frames, too. Set min_cfg to 0, or remove that node."
            )
        positive, negative = results
        ramp = torch.linspace(self.settings.min_cfg, run.cfg, positive.shape[0], device=positive.device) / run.cfg
        return [negative + ramp.to(positive.dtype).reshape(-1, 1, 1, 1) * (positive - negative), negative]


def _sample_windows(executor: Any, job: Job, run: Run, windows: int) -> Tensor:
    """The whole clip in one run of the sampler, with progress after every window."""
    total = job.steps * windows
    bar = comfy.utils.ProgressBar(total)
    done = {"steps": 0, "windows": 0}

    def window_done() -> None:
        # samplers of several stages run more windows in a step than one pass has; the bar waits for them
        done["windows"] = min(done["windows"] + 1, windows - 1)
        bar.update_absolute(min(done["steps"], job.steps - 1) * windows + done["windows"], total)

    def step_done(step: int, x0: Tensor, x: Tensor, steps: int) -> None:
        run.newest = x0
        done.update(steps=step + 1, windows=0)
        if job.callback is not None:
            job.callback((step + 1) * windows - 1, x0, x, steps * windows)

    run.window_done = window_done
    return replace(job, callback=step_done).run(executor)


def _window_of(cond: Any, latents: int, part: slice, image: Tensor | None) -> Any:
    """The conditions of one window; `image` takes the place of the image condition where there is one."""
    if cond is None:
        return None
    windowed = []
    for entry in cond:
        refuse_frames_of_control(entry.get("control"))
        entry = {name: cut(value, latents, part) for name, value in entry.items()}
        model_conds = dict(entry.get("model_conds", {}))
        for name, value in model_conds.items():
            tensor = getattr(value, "cond", None)
            if name == "num_video_frames":
                model_conds[name] = comfy.conds.CONDConstant(part.stop - part.start)
            elif isinstance(tensor, Tensor):
                tensor = cut(tensor, latents, part)
                if name == "c_concat" and image is not None and has_image(tensor):
                    tensor = image.to(tensor).expand_as(tensor)
                model_conds[name] = value._copy_with(tensor)
        entry["model_conds"] = model_conds
        windowed.append(entry)
    return windowed


def _tell_positions(network: Any, where: Tensor) -> list[Any]:
    """Hooks that give the time embedding of every video transformer the positions `where` instead of 0, 1, 2, ..."""

    def teller(transformer: Any) -> Callable[[Any, tuple[Tensor, ...]], tuple[Tensor]]:
        def tell(_: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
            told = timestep_embedding(where, transformer.in_channels, max_period=transformer.max_time_embed_period)
            return (told.to(arguments[0].dtype),)

        return tell

    return [
        module.time_pos_embed.register_forward_pre_hook(teller(module))
        for module in network.modules()
        if isinstance(module, SpatialVideoTransformer)
    ]
