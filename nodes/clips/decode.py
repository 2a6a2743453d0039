"""Video VAE Decode and Video VAE Decode to Video."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ...vae_core.door.resume import DecodeStore
from ...vae_core.run.snapshots import Snapshots
from ..bridge.lazy_video import LazyVideo
from ..bridge.limits import Limits, limits_of
from ..bridge.native import NativeVideoVAE, collect_images, require
from ..bridge.running import Run, keep_report, report_ui
from ..bridge.schema import (
    GIB,
    budget_input,
    check_choice,
    describe,
    field,
    latent_input,
    preview_input,
    size_words,
    tiling_input,
    vae_input,
)
from ..bridge.truth import check_finite, decoded_facts
from ..bridge.wire import Facts, rate_of
from ..latents.files import save_latent
from ..latents.paths import SUFFIX
from .unfinished import resume_input, store_for

DEFAULT_FPS = Fraction(24)  # where neither the latent nor the user says
CODECS, BITS = ("auto", "h264", "av1", "vp9"), ("8", "10")
RESCUED = "latents/undecoded"  # the name below the output folder of a latent whose decode failed

_log = logging.getLogger("cviv-vae")


def _save_on_failure_input() -> Any:
    return field(
        io.Boolean,
        "save_latent_on_failure",
        default=True,
        optional=True,
        tooltip=f"If the decode fails in the end, save the latent as output/{RESCUED}_00001.latent.safetensors and so "
        "on, so that the sampling is not lost; the error names the file. Not after Cancel.",
        advanced=True,
    )


def _understood(vae: NativeVideoVAE, latent: dict[str, Any]) -> tuple[Tensor, Facts, list[str]]:
    """(b, z, t, h, w) of a LATENT, what is known of each clip, and sentences for the report. Raises ValueError."""
    z = vae.video_latent(latent)
    check_finite(latent)
    return z, *decoded_facts(latent, z, vae.layout_of(latent), vae.codec.family)


@contextmanager
def _latent_kept(latent: dict[str, Any], vae: NativeVideoVAE, *, wanted: bool) -> Iterator[None]:
    """Save `latent` if what happens inside fails, other than by a cancel, and name the file in the error."""
    try:
        yield
    except mm.InterruptProcessingException:
        raise
    except Exception as error:
        if wanted:
            sentence = _rescued(latent, vae)
            _log.warning("%s", sentence)
            error.args = (f"{error}\n{sentence}",)  # the same error: ComfyUI frees memory where it says there is none
        raise


def _rescued(latent: dict[str, Any], vae: NativeVideoVAE) -> str:
    """Save the latent, in the output folder or at least in the temporary one; a sentence about where, or why not."""
    last = Path(folder_paths.get_temp_directory()) / f"{RESCUED.rpartition('/')[2]}_{time.time_ns()}{SUFFIX}"
    why = ""
    for prefix, place in ((RESCUED, None), (RESCUED.rpartition("/")[2], None), ("", last)):
        try:
            _, path = save_latent(place, prefix, latent, vae, {})
        except (OSError, ValueError) as error:
            why = why or str(error)
            continue
        moved = " That folder is emptied when ComfyUI starts: move the file away." if place is not None else ""
        return f"The latent is saved as {path}: Load Video Latent reads it, and nothing need be sampled again.{moved}"
    return f"The latent could not be saved: {why}"


class Decode(io.ComfyNode):
    """A latent to images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_Decode",
            display_name="Video VAE Decode",
            description="Decodes a clip a few frames at a time into one buffer: device memory does not grow with its "
            "length. Gives back the true number of frames and size where the latent knows them.",
            search_aliases=["cv-vae decode", "iv-vae decode", "vae decode video", "tiled decode"],
            inputs=[
                vae_input(),
                latent_input(),
                budget_input(),
                preview_input(),
                _save_on_failure_input(),
                tiling_input(),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images",
                    tooltip="All frames, in 0..1. For very long clips use Video VAE "
                    "Decode to Video, which never holds them all.",
                ),
                io.Float.Output(display_name="fps", tooltip="Frames per second that the latent remembers, else 24."),
                io.String.Output(display_name="report", tooltip="What ran, how long, how much memory, exact or not."),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        vae: Any,
        samples: Any,
        memory_budget_gb: float,
        preview: bool,
        save_latent_on_failure: bool = True,
        tiling: str = "exact",
    ) -> io.NodeOutput:
        vae = require(vae)
        z, facts, told = _understood(vae, samples)
        run = Run(z.shape[0] * facts.frames, node_id=cls.hidden.unique_id, preview=preview, size=facts.size)
        limits = limits_of(memory_budget_gb, tiling)
        with _latent_kept(samples, vae, wanted=save_latent_on_failure):
            chunks = vae.decode_chunks(z, run, frames=facts.frames, size=facts.size, limits=limits, lent=True)
            images = collect_images(chunks, z.shape[0], facts.frames).flatten(0, 1)
        if images.nbytes >= GIB:
            run.note(
                f"the images take {size_words(images.nbytes)} of RAM; Video VAE Decode to Video never holds them all"
            )
        for sentence in told:
            run.note(sentence)
        report = run.finish()
        return io.NodeOutput(images, float(facts.fps or DEFAULT_FPS), report, ui=report_ui(report))


class DecodeToVideo(io.ComfyNode):
    """A latent to a VIDEO that is decoded while it is saved."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_DecodeToVideo",
            display_name="Video VAE Decode to Video",
            description="Gives a VIDEO that decodes while Save Video (or any node that takes a VIDEO) writes it, so "
            "that 10,000 frames need no more memory than 100. The same file a second time is a copy; a node that needs "
            "the frames themselves, or another file, decodes once more.",
            search_aliases=["cv-vae decode video", "latent to video", "decode to file"],
            inputs=[
                vae_input(),
                latent_input(),
                field(
                    io.Float,
                    "fps",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.001,
                    tooltip="Frames per second. 0 = as the latent remembers, else 24.",
                ),
                field(
                    io.Int,
                    "crf",
                    default=18,
                    min=0,
                    max=51,
                    tooltip="Quality of the file where the saving node does not say: 0 is lossless, 18 looks the same "
                    "as the original, 23 is smaller, 51 is the worst.",
                    advanced=True,
                ),
                budget_input(),
                preview_input(),
                field(io.Audio, "audio", optional=True, tooltip="Sound for the video; cut to its length."),
                _save_on_failure_input(),
                field(
                    io.Combo,
                    "codec",
                    options=list(CODECS),
                    default="auto",
                    optional=True,
                    tooltip="Codec of the file where the saving node says auto. auto: h264, which plays everywhere; "
                    "av1 and vp9 give smaller files and are slower.",
                    advanced=True,
                ),
                field(
                    io.Combo,
                    "bit_depth",
                    options=list(BITS),
                    default="8",
                    optional=True,
                    tooltip="Bits per channel in the file where the saving node does not say. 10 keeps smooth skies "
                    "smooth; not every player shows it. For 16 bits save images with Save Image Sequence.",
                    advanced=True,
                ),
                tiling_input(),
                resume_input(),
            ],
            outputs=[io.Video.Output(display_name="video", tooltip="For Save Video. Nothing is decoded before that.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        vae: Any,
        samples: Any,
        fps: float,
        crf: int,
        memory_budget_gb: float,
        preview: bool,
        audio: Any = None,
        save_latent_on_failure: bool = True,
        codec: str = "auto",
        bit_depth: str = "8",
        tiling: str = "exact",
        resume: bool = False,
    ) -> io.NodeOutput:
        check_choice("codec", codec, CODECS)
        check_choice("bit_depth", bit_depth, BITS)
        limits = limits_of(memory_budget_gb, tiling)
        vae = require(vae)
        z, facts, told = _understood(vae, samples)
        if z.shape[0] != 1:
            what = "separate images" if vae.layout_of(samples) == "images" else "clips"
            raise ValueError(
                f"The latent holds {z.shape[0]} {what} and a VIDEO is one clip: use Video VAE Decode, take them apart "
                "with Latent From Batch, or choose another latent_layout in Load Video VAE."
            )
        node_id = cls.hidden.unique_id

        if resume and limits.blended:
            raise ValueError(
                "resume is on and tiling is 'exact, else blended': which blended tiles are taken depends on the memory "
                "at hand. Switch one of them off."
            )
        stores: dict[tuple[int, int], DecodeStore] = {}

        def frames(start: int, stop: int, dtype: torch.dtype = torch.float32, keep: bool = False) -> Iterator[Tensor]:
            store = store_for(vae, z, facts, (start, stop), dtype) if keep else None
            if store is not None:
                stores[start, stop] = store
            run = Run(stop - start, node_id=node_id, preview=preview, size=facts.size)
            for sentence in told:
                run.note(sentence)
            chunks = _some(vae, z, facts, run, start, stop, limits, node_id, dtype, store)
            with _latent_kept(samples, vae, wanted=save_latent_on_failure):
                yield from chunks

        video = LazyVideo(
            frames,
            byte_frames=partial(frames, dtype=torch.uint8, keep=resume),
            width=facts.width,
            height=facts.height,
            frame_count=facts.frames,
            frame_rate=rate_of(fps) or facts.fps or DEFAULT_FPS,
            audio=audio,
            crf=crf,
            aspect=facts.aspect or Fraction(1),
            codec=codec,
            bits=int(bit_depth),
            copied=partial(_say_copied, node_id),
            finished=partial(_forget, stores),
        )
        return io.NodeOutput(video)


def _say_copied(node_id: str, source: Path) -> None:
    """The report of a run that decoded nothing."""
    keep_report(f"nothing decoded: copied from {source.name}, which this clip was written to before", node_id)


def _forget(stores: dict[tuple[int, int], DecodeStore], start: int, stop: int) -> None:
    """Keep nothing of what is complete."""
    store = stores.pop((start, stop), None)
    if store is not None:
        store.remove()


def _some(
    vae: NativeVideoVAE,
    z: Tensor,
    facts: Facts,
    run: Run,
    start: int,
    stop: int,
    limits: Limits,
    node_id: str,
    dtype: torch.dtype,
    store: DecodeStore | None,
) -> Iterator[Tensor]:
    """Frames `start` to `stop` as (t, h, w, 3), a few at a time. In 8 bits they are for a file, which keeps none."""

    def make(done: int, snapshots: Snapshots | None) -> Iterator[Tensor]:
        chunks = vae.decode_chunks(
            z,
            run,
            start=start + done,
            frames=stop,
            size=facts.size,
            limits=limits,
            dtype=dtype,
            lent=dtype == torch.uint8,
            snapshots=snapshots,
        )
        for chunk in chunks:
            yield chunk[0]

    try:
        if store is None:
            yield from make(0, None)
        else:
            run.there(store.found)
            yield from store.all(make, stop - start, dim=0)
        keep_report(run.finish(), node_id)
    except mm.InterruptProcessingException:
        if store is not None:
            store.remove()
        raise
    finally:
        run.close()


NODES = [Decode, DecodeToVideo]
