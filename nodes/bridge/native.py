"""The VAE object: a ComfyUI VAE that stock nodes can use, over a `vae_core.VideoVAE`.

Every attribute that either version of ComfyUI reads is set here; nothing of the parent's constructor runs. Pixels and
latents are on the CPU and pass through the device one chunk at a time, in all entry points.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import torch
from torch import Tensor

from ...vae_core import AnyPlan, Direction, Plan, TilePlan, VideoVAE, official_state
from ...vae_core.door.output import collect
from ...vae_core.plan.rates import rates_of
from ...vae_core.run.snapshots import Snapshots
from .first_stage import Network, tiles_of_pixels, to_signed, to_unit
from .limits import ANY, Limits
from .plan_words import plan_words
from .ratio import Ratio
from .running import Run, count_of
from .schema import dtype_words
from .session import SESSION, Gauge, peak_reader
from .truth import explained, guarded
from .wire import (
    Layout,
    check_latent,
    chunks_of,
    from_video,
    images_of,
    layout_of,
    pixels_of,
    read_facts,
    samples_of,
    to_video,
)

_log = logging.getLogger("cviv-vae")
SAMPLERS = ("scaling_factor", "shift_factor")  # what files say for the sampler, of latents that VAEs do not scale
_AUTOMATIC_SHARE = 0.85  # of the device memory that could be free; the rest is for what cannot be foreseen


class NativeVideoVAE(comfy.sd.VAE):
    """A video VAE on ComfyUI's VAE wire.

    codec: the VAE itself. layout: how it exchanges latents with stock nodes: "frames" (4-D, frames on the batch axis),
    "video" (5-D) or "images" (4-D, each image by itself). device, dtype: where and in what the network runs. chosen:
    the layout where the user chose it, which then beats what a latent remembers. remarks: for every report.
    """

    def __init__(
        self,
        codec: VideoVAE,
        *,
        layout: Layout,
        device: torch.device,
        dtype: torch.dtype,
        chosen: Layout | None = None,
        remarks: Sequence[str] = (),
    ) -> None:
        # the parent's constructor would read a file of another model
        self.codec, self.layout, self.chosen, self.remarks = codec, layout, chosen, tuple(remarks)
        self.first_stage_model = Network(codec).eval()
        self.latent_channels, self.latent_dim, self.output_channels = codec.info.latent_channels, 3, 3
        self.compression = compression = codec.info.compression
        time, space = compression.time, compression.space
        self.upscale_ratio = Ratio((lambda t: max(0, compression.pixel_frames(t)), space, space))
        self.upscale_index_formula = (time, space, space)
        self.downscale_ratio = Ratio((lambda t: max(0, compression.latent_frames(t)), space, space))
        self.downscale_index_formula = (time, space, space)
        self.process_input, self.process_output = to_signed, to_unit
        self.working_dtypes = [torch.bfloat16, torch.float32]
        self.memory_used_decode = self._decode_bytes
        self.memory_used_encode = self._encode_bytes
        self.disable_offload, self.not_video, self.crop_input = True, layout == "images", True
        self.extra_1d_channel = self.pad_channel_value = self.format_encoded = None
        self.handles_tiling, self.audio_sample_rate = True, 44100
        self.device, self.vae_dtype, self.output_device = device, dtype, mm.intermediate_device()
        offload = torch.device("cpu") if device.type == "cpu" else mm.vae_offload_device()
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model, load_device=device, offload_device=offload
        )
        self.size = self.patcher.model_size()

    # ------------------------------------------------------------------------------------------- what stock nodes call

    def decode(self, samples_in: Tensor, vae_options: dict[str, Any] | None = None) -> Tensor:
        """Stock decoding: (b, t, h, w, 3) of a 5-D latent, (n, h, w, 3) of a 4-D one, in 0..1."""
        return self._decode_all(samples_in, None)

    def decode_tiled(
        self,
        samples: Tensor,
        tile_x: int | None = None,
        tile_y: int | None = None,
        overlap: int | None = None,
        tile_t: int | None = None,
        overlap_t: int | None = None,
    ) -> Tensor:
        """Stock tiled decoding, in exact tiles: overlap and cuts in time are not needed and change nothing."""
        return self._decode_all(samples, TilePlan(tile=(tile_y or 64, tile_x or 64)))

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """Stock encoding of (n, h, w, c) or (b, t, h, w, c) in 0..1; sides are cropped to multiples of 8."""
        return self._encode_all(pixel_samples, None)

    def encode_tiled(
        self,
        pixel_samples: Tensor,
        tile_x: int | None = None,
        tile_y: int | None = None,
        overlap: int | None = None,
        tile_t: int | None = None,
        overlap_t: int | None = None,
    ) -> Tensor:
        """Stock tiled encoding, in exact tiles."""
        return self._encode_all(pixel_samples, tiles_of_pixels(self.codec, tile_y or 512, tile_x or 512))

    def get_sd(self) -> dict[str, Tensor]:
        """The weights under their official names, so that Save VAE writes a file that loads again.

        Raises ValueError where that file would decode otherwise, since Save VAE writes nothing but tensors: for an
        IV-VAE whose scale only its own file tells, or an image VAE of another epsilon.
        """
        model, family = self.codec.model, self.codec.model.family
        state = official_state(model)
        told = {} if family.scaled else family.told(model.config)
        harmless = {name: value for name, value in told.items() if name in SAMPLERS}
        if family.configure({name: tuple(tensor.shape) for name, tensor in state.items()}, harmless) != model.config:
            raise ValueError(
                "Save VAE cannot keep this VAE's latent scale or epsilon, and the file would decode its latents "
                "wrongly. Use the file it was loaded from, or vae_core.save in Python."
            )
        return state

    def _decode_all(self, samples: Tensor, tiles: AnyPlan) -> Tensor:
        latent = {"samples": samples}
        z = self.video_latent(latent)
        frames = self.compression.pixel_frames(z.shape[2])
        chunks = self.decode_chunks(z, Run(z.shape[0] * frames), tiles=tiles, lent=True)
        images = collect_images(chunks, z.shape[0], frames).to(self.output_device)
        return images if samples.ndim == 5 else images.flatten(0, 1)

    def _encode_all(self, pixels: Tensor, tiles: AnyPlan) -> Tensor:
        pixels = self.vae_encode_crop_pixels(pixels)
        clips = list(pixels) if pixels.ndim == 5 else [pixels]  # each t h w c
        if self.layout == "images" and pixels.ndim == 4:
            clips = list(pixels.unsqueeze(1))
        run = Run(sum(clip.shape[0] for clip in clips))
        latents = [torch.cat(list(self._encode_clip(clip, run, tiles)), dim=2) for clip in clips]
        return from_video(torch.cat(latents), self.layout).to(self.output_device)

    def _encode_clip(self, clip: Tensor, run: Run, tiles: AnyPlan) -> Iterator[Tensor]:
        images = pixels_of(clip)
        shape = (1, 3, images.shape[0], *images.shape[1:3])
        return self.encode_chunks(chunks_of(images), shape, run, tiles=tiles)

    # ------------------------------------------------------------------------------------------------ what ours call

    def video_latent(self, latent: dict[str, Any]) -> Tensor:
        """(b, z, t, h, w) of a LATENT, checked to belong to this VAE."""
        facts = read_facts(latent)
        samples: Tensor = latent["samples"]
        check_latent(samples, facts, self.codec.family, self.latent_channels)
        return to_video(samples, layout_of(samples, facts, self.chosen))

    def layout_of(self, latent: dict[str, Any]) -> Layout:
        """How this VAE takes a LATENT."""
        return layout_of(samples_of(latent), read_facts(latent), self.chosen)

    def decode_chunks(
        self,
        z: Tensor,
        run: Run,
        *,
        start: int = 0,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        limits: Limits = ANY,
        tiles: AnyPlan = None,
        dtype: torch.dtype = torch.float32,
        lent: bool = False,
        snapshots: Snapshots | None = None,
    ) -> Iterator[Tensor]:
        """Frames of (b, z, t, h, w), clip after clip, as (1, t, h, w, 3) chunks in 0..1 on the CPU.

        start, frames, size: of every clip; what padding added goes. tiles: decode in these, and do not plan. dtype:
        torch.uint8 for 0..255. lent: a chunk is good until the next is asked for. snapshots: of the one clip, as in
        `VideoVAE.decode_stream`. Raises BudgetError before any work where `limits` are too small, ValueError for a
        result that is not finite.
        """
        clip_shape = (1, *z.shape[1:])
        asked = limits, tiles
        tiles, gauge = self._prepare("decode", clip_shape, run, limits, tiles)
        recover = self._recover("decode", clip_shape, run, asked, gauge)
        between = mm.throw_exception_if_processing_interrupted
        with self._on_device():
            for clip in z.detach().to("cpu", torch.float32).split(1):
                stream = self.codec.decode_frames(
                    clip,
                    dtype=dtype,
                    lent=lent,
                    check=True,
                    start=start,
                    frames=frames,
                    size=size,
                    plan=tiles,
                    recover=recover,
                    between=between,
                    snapshots=snapshots,
                )
                for images in explained(stream, self.codec.dtype):
                    gauge.chunk_done()
                    run.step(images.shape[1], images[0, -1])
                    yield images
                    del images  # not while the next is computed

    def encode_chunks(
        self,
        chunks: Iterable[Tensor],
        shape: tuple[int, ...],
        run: Run,
        *,
        sample: bool = False,
        generator: torch.Generator | None = None,
        limits: Limits = ANY,
        tiles: AnyPlan = None,
    ) -> Iterator[Tensor]:
        """Latents of a stream of (1, 3, t, h, w) chunks in [-1, 1], padded to whole latents, as float32 on the CPU.

        shape: of the whole clip. Other arguments as in `decode_chunks` and `VideoVAE.encode_stream`.
        """
        asked = limits, tiles
        tiles, gauge = self._prepare("encode", shape, run, limits, tiles)
        with self._on_device():
            stream = self.codec.encode_stream(
                _counted(chunks, run),
                pad=True,
                sample=sample,
                generator=generator,
                plan=tiles,
                recover=self._recover("encode", shape, run, asked, gauge),
                between=mm.throw_exception_if_processing_interrupted,
            )
            for chunk in explained(guarded(stream), self.codec.dtype):
                gauge.chunk_done()
                mm.throw_exception_if_processing_interrupted()
                yield chunk.float()

    # --------------------------------------------------------------------------------------------------------- memory

    def _decode_bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Device memory that decoding needs: of one chunk, however long the clip; shape is the latent's."""
        return self.codec.decode_bytes(shape[-2], shape[-1], dtype=dtype)

    def _encode_bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Device memory that encoding needs: of one chunk, however long the clip; shape is the pixels'."""
        return self.codec.encode_bytes(shape[-2], shape[-1], dtype=dtype)

    def _prepare(
        self, task: Direction, shape: tuple[int, ...], run: Run, limits: Limits, tiles: AnyPlan
    ) -> tuple[AnyPlan, Gauge]:
        """Plan, have ComfyUI make room and put the weights on the device; returns the tiles to use."""
        run.note(f"{self.codec.family}, {dtype_words(self.vae_dtype)} on {self.device}")
        for remark in self.remarks:
            run.note(remark)
        known = SESSION.tiles_for(self._job(task, shape), (limits, tiles))
        plan = self.plan(task, shape, limits, required=True) if tiles is None else self._described(tiles, task, shape)
        if known is not None:
            smaller = self._described(known, task, shape)
            if smaller.device_bytes < plan.device_bytes:
                plan = smaller
                run.note("memory ran out in an earlier run: begins with what worked then; another budget plans anew")
        for sentence in plan_words(plan, self.device):
            run.note(sentence)
        mm.load_models_gpu([self.patcher], memory_required=plan.device_bytes, force_full_load=True)
        run.begin(self.device, plan.tiles, exact=plan.exact)
        windows = self.codec.model.family.frames
        gauge = Gauge(
            SESSION,
            self._setting,
            plan=plan,
            chunks=1 if windows.first >= windows.overlap + windows.step else 2,  # a shorter one comes first
            peak=peak_reader(self.device),
        )
        return plan.tiles, gauge

    @property
    def _setting(self) -> Hashable:
        return str(self.device), self.vae_dtype, self.codec.family

    def _job(self, task: Direction, shape: tuple[int, ...]) -> Hashable:
        return str(self.device), self.vae_dtype, self.codec.model.config, task, shape[-2:]

    def _described(self, tiles: AnyPlan, task: Direction, shape: tuple[int, ...]) -> Plan:
        return self.codec.describe_plan(tiles, shape, task, **self._options(ANY))

    def plan(self, task: Direction, shape: tuple[int, ...], limits: Limits, *, required: bool = False) -> Plan:
        """How a latent ("decode") or a video ("encode") of `shape` would run.

        required: raise BudgetError where nothing fits.
        """
        plan_for = self.codec.plan_decode if task == "decode" else self.codec.plan_encode
        budget = limits.budget or self.could_be_free()
        return plan_for(shape, budget_bytes=budget, required=required, **self._options(limits))

    def _options(self, limits: Limits) -> dict[str, Any]:
        """What every plan is asked with."""
        return {
            "ram_bytes": int(mm.get_free_memory(torch.device("cpu")) * _AUTOMATIC_SHARE),
            "margin": SESSION.margin(self._setting),
            "rates": SESSION.rates(self._setting, rates_of(self.device, self.vae_dtype)),
            "blended": limits.blended,
            "dtype": self.vae_dtype,
            "device": self.device,
        }

    def could_be_free(self) -> int:
        """Bytes that this VAE could have for itself once ComfyUI has put other models away."""
        others = sum(
            loaded.model_loaded_memory()
            for loaded in mm.current_loaded_models
            if loaded.device == self.device and loaded.model is not None and loaded.model is not self.patcher
        )
        weights = self.patcher.model_size() - self.patcher.loaded_size()
        free = mm.get_free_memory(self.device) + (0 if self.device.type == "cpu" else others) - weights
        return max(1, int(free * _AUTOMATIC_SHARE))

    def _recover(
        self, task: Direction, shape: tuple[int, ...], run: Run, asked: tuple[Limits, AnyPlan], gauge: Gauge
    ) -> Any:
        """What to do when a chunk runs out of memory: the next smaller tiles, from that chunk on."""
        job = self._job(task, shape)

        def recover(error: Exception, tiles: AnyPlan) -> AnyPlan:
            gauge.spoil()
            mm.soft_empty_cache()
            smaller = self.codec.smaller_plan(tiles, shape, task, **self._options(asked[0]))
            if smaller is None:
                SESSION.failed(job)
                return None
            SESSION.worked(job, asked, smaller)
            plan = self._described(smaller, task, shape)
            run.exact = plan.exact
            after = count_of(run.done, "frame")
            sentence = f"out of memory after {after}; went on from there by a smaller plan: {plan.way}"
            _log.warning("%s", sentence)
            run.note(sentence)
            return smaller

        return recover

    def _on_device(self) -> AbstractContextManager[Any]:
        context = getattr(mm, "cuda_device_context", None)
        return nullcontext() if context is None else context(self.device)


def collect_images(chunks: Iterable[Tensor], clips: int, frames: int) -> Tensor:
    """(clips, frames, h, w, 3) from the chunks of clip after clip, each of `frames`; allocated once."""
    return collect(chunks, clips * frames, dim=1)[0].unflatten(0, (clips, frames))


def require(vae: object) -> NativeVideoVAE:
    """`vae` itself where it is ours. Raises ValueError otherwise."""
    if isinstance(vae, NativeVideoVAE):
        return vae
    raise ValueError(
        f"This node needs a VAE from Load Video VAE; a {type(vae).__name__} of another loader is connected. For that "
        "one use ComfyUI's own VAE Encode and VAE Decode."
    )


def _counted(chunks: Iterable[Tensor], run: Run) -> Iterator[Tensor]:
    for chunk in chunks:
        yield chunk
        run.step(chunk.shape[2], images_of(chunk[:, :, -1:])[0, 0])
