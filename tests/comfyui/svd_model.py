"""What tests of SVD sampling need: conditions, denoisers that are pure functions, small image models, sampler calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .inprocess import Comfy
from .svd import small_svd

SCALE = 0.18215  # latents in the model are the wire's times this
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_act": "gelu",
    "hidden_size": 32,
    "image_size": 28,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-5,
    "num_attention_heads": 2,
    "num_channels": 3,
    "num_hidden_layers": 2,
    "patch_size": 14,
    "projection_dim": 1024,
}
LONG = {
    "mode": "windows",
    "window_length": 8,
    "overlap": 2,
    "fuse": "pyramid",
    "carry": 2,
    "crossfade": 0,
    "anchor": "first",
    "noise": "as given",
    "drift_control": 0.0,
    "time_offset": False,
    "min_cfg": 0.0,
    "window_schedule": "still",
}


LATENTS = 20
SPANS = [(0, 8), (6, 14), (12, 20)]  # windows of 8 that share 2


@dataclass
class Call:
    """What one call of the network was given, for the positive condition: one value for each frame.

    image, context: of the conditions, at one point. x: the noisy latents, (t, 4, h, w), scaled by the network's c_in.
    start: which latent of the clip the window begins at, as the hooks say. batch: positive and negative together.
    told: the embedding of fps, motion bucket and augmentation level, (768,).
    """

    image: Tensor
    context: Tensor
    x: Tensor
    sigma: float
    frames: int
    start: int
    batch: int
    told: Tensor


class Function(torch.nn.Module):
    """A network whose estimate of the clean latents is `estimate(call)`, (t, 4, h, w) in the model's scale."""

    def __init__(self, comfy: Comfy, estimate: Callable[[Call], Tensor]) -> None:
        super().__init__()
        self.dtype = torch.float32
        self.calls: list[Call] = []
        self._estimate, self._patches = estimate, comfy.module("comfy.patcher_extension")

    def forward(self, x: Tensor, timesteps: Any = None, context: Any = None, y: Any = None, control: Any = None,
                transformer_options: Any = None, **other: Any) -> Tensor:  # fmt: skip
        options = transformer_options or {}
        kind = self._patches.WrappersMP.DIFFUSION_MODEL
        executor = self._patches.WrapperExecutor.new_class_executor(
            self._run, self, self._patches.get_all_wrappers(kind, options)
        )
        return executor.execute(x, timesteps, context, y, control, options, **other)

    def _run(self, x: Tensor, timesteps: Any, context: Any, y: Any, control: Any, options: Any, **other: Any) -> Tensor:
        frames = int(other["num_video_frames"])
        assert x.shape[0] == timesteps.shape[0] == context.shape[0] == y.shape[0]
        out = []
        for index, which in enumerate(options["cond_or_uncond"]):
            part = slice(index * frames, (index + 1) * frames)
            sigma = float(torch.exp(4 * timesteps[part][0]))
            call = Call(
                image=x[part, 4, 0, 0].clone(),
                context=context[part, 0, 0].clone(),
                x=x[part, :4].clone(),
                sigma=sigma,
                frames=frames,
                start=options.get("cviv_svd_start", 0),
                batch=x.shape[0],
                told=y[part][0].clone(),
            )
            if which == 0:
                self.calls.append(call)
            wanted = self._estimate(call)
            # the output that the sampler turns into `wanted`: its estimate is x / (s^2 + 1) - out * s / sqrt(s^2 + 1)
            root = (sigma**2 + 1) ** 0.5
            out.append((call.x / root - wanted) * root / sigma)
        return torch.cat(out)


def function_svd(comfy: Comfy, estimate: Callable[[Call], Tensor]) -> tuple[Any, Function]:
    """(MODEL, its network) with a pure function in place of the U-Net."""
    model = small_svd(comfy)
    network = Function(comfy, estimate)
    model.model.diffusion_model = network
    return model, network


def image_itself(call: Call) -> Tensor:
    """A network that believes in a flat picture of its condition's number."""
    return spread(call.image * SCALE, call)


def spread(values: Tensor, call: Call) -> Tensor:
    """One value for each frame as latents."""
    return values.reshape(-1, 1, 1, 1).expand_as(call.x)


def conditions(images: Tensor, context: Tensor | None = None) -> tuple[Any, Any]:
    """(positive, negative) with `images` (n, 4, h, w) and, where given, a CLIP embedding for each latent."""
    pooled = torch.ones(1, 1, 1024) if context is None else context.reshape(-1, 1, 1).expand(-1, 1, 1024)
    told = {"motion_bucket_id": 127, "fps": 6, "augmentation_level": 0.0}
    positive = [[pooled, {**told, "concat_latent_image": images}]]
    return positive, [[torch.zeros_like(pooled), {**told, "concat_latent_image": torch.zeros_like(images)}]]


def indices(latents: int, size: int = 4) -> Tensor:
    """Images (latents, 4, size, size) that hold their own number, from 1 on: zero is the negative's."""
    return torch.arange(1.0, latents + 1).reshape(-1, 1, 1, 1).expand(-1, 4, size, size).clone()


def random_images(count: int = 1, size: int = 8) -> Tensor:
    """Images (count, 4, size, size) like latents of pictures."""
    return torch.randn(count, 4, size, size, generator=torch.Generator().manual_seed(3))


def empty(latents: int, size: int = 4) -> dict[str, Any]:
    """The latent that goes to the sampler."""
    return {"samples": torch.zeros(latents, 4, size, size)}


def long_model(comfy: Comfy, model: Any, latents: int, **changes: Any) -> Any:
    """`model` behind SVD Long Video."""
    patched, _, _ = comfy.call("CVIV_SVDLongVideo", model=model, samples=empty(latents), **{**LONG, **changes})
    return patched


def ksampler(
    comfy: Comfy, model: Any, conds: tuple[Any, Any], latent: Any, sampler: str = "euler", **changes: Any
) -> Tensor:
    """The samples of KSampler: 3 steps, CFG 2.5, seed 42 where not said otherwise."""
    widgets = {"seed": 42, "steps": 3, "cfg": 2.5, "scheduler": "karras", "denoise": 1.0, **changes}
    positive, negative = conds
    (result,) = comfy.call(
        "KSampler",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=latent,
        sampler_name=sampler,
        **widgets,
    )
    return result["samples"]


def custom_sampler(
    comfy: Comfy, model: Any, conds: tuple[Any, Any], latent: Any, sampler: str = "euler"
) -> tuple[Tensor, Tensor]:
    """(output, denoised output) of SamplerCustomAdvanced with the settings of `ksampler`."""
    (noise,) = comfy.call("RandomNoise", noise_seed=42)
    (guider,) = comfy.call("CFGGuider", model=model, positive=conds[0], negative=conds[1], cfg=2.5)
    (chosen,) = comfy.call("KSamplerSelect", sampler_name=sampler)
    (sigmas,) = comfy.call("BasicScheduler", model=model, scheduler="karras", steps=3, denoise=1.0)
    output, denoised = comfy.call(
        "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=chosen, sigmas=sigmas, latent_image=latent
    )
    return output["samples"], denoised["samples"]


def small_clip_vision(comfy: Comfy, folder: Path) -> Any:
    """A CLIP_VISION of ComfyUI with random weights, embeddings 1024 wide."""
    path = folder / "clip_vision.json"
    path.write_text(json.dumps(CLIP), encoding="utf-8")
    clip = comfy.module("comfy.clip_vision").ClipVisionModel(str(path))
    _fill(clip.model)
    return clip


def small_image_vae(comfy: Comfy) -> Any:
    """A VAE of ComfyUI of the kind SVD has for images, with random weights."""
    config = {
        "double_z": True, "resolution": 64, "in_channels": 3, "out_ch": 3, "attn_resolutions": [], "dropout": 0.0,
        "ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 4,
    }  # fmt: skip
    params = {"ddconfig": config, "embed_dim": 4}
    network = comfy.module("comfy.ldm.models.autoencoder").AutoencoderKL(**params)
    _fill(network)
    return comfy.module("comfy.sd").VAE(sd=network.state_dict(), config={"params": params}, dtype=torch.float32)


def _fill(network: torch.nn.Module) -> None:
    """Random weights: ComfyUI's layers hold whatever was in memory."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                drawn = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
            else:
                drawn = torch.full(parameter.shape, 1.0 if name.endswith("weight") else 0.0)
            parameter.copy_(drawn)
