"""SVD Long Video: the model of SVD, patched to sample more latents than it was trained on."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...vae_core.families import VIDEO
from ..bridge.schema import check_choice, describe, field
from ..bridge.wire import Facts, read_facts, samples_of
from .conditioning import CHANNELS
from .hooks import LongSampling
from .job import LongSettings
from .model import check_svd
from .picture import draw_spans
from .windows import FUSES, TRAINED, Span, check_overlap, describe_spans

MODES = ("windows", "continuation")
ANCHORS = ("first", "moving")
NOISES = ("as given", "FreeNoise")
DEFAULT_FPS = 24.0


class SVDLongVideo(io.ComfyNode):
    """Windows or continuation for SVD, in any sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return describe(
            node_id="CVIV_SVDLongVideo",
            display_name="SVD Long Video",
            description="Lets SVD sample more latents than the 25 it was trained on: by overlapping windows in every "
            "step, or chunk after chunk. Works in KSampler and SamplerCustomAdvanced with every sampler.",
            search_aliases=["svd context windows", "svd long", "freenoise", "continue video", "svd extend"],
            inputs=[
                field(io.Model, "model", tooltip="An SVD model, from Image Only Checkpoint Loader."),
                field(
                    io.Latent,
                    "samples",
                    display_name="latent",
                    tooltip="The latent that goes to the sampler, from SVD Image to Long Video. It is only looked at, "
                    "for the picture and the report.",
                ),
                field(
                    io.Combo,
                    "mode",
                    options=list(MODES),
                    default="continuation",
                    tooltip="windows: every step runs the model over overlapping windows and fuses them; the clip "
                    "stays near its image. continuation: one chunk after another, each starting with the last "
                    "latents of the one before; the clip can go somewhere.",
                ),
                *_cutting_inputs(),
                *_guiding_inputs(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For the sampler. Clips of one window sample as before."),
                io.Image.Output(display_name="picture", tooltip="The windows or chunks over time."),
                io.String.Output(display_name="report", tooltip="Which windows, how much work, what to expect."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        samples: Any,
        mode: str,
        window_length: int,
        overlap: int,
        fuse: str,
        carry: int,
        crossfade: int,
        anchor: str,
        noise: str,
        drift_control: float,
        time_offset: bool,
        min_cfg: float,
    ) -> io.NodeOutput:
        for what, got, allowed in (
            ("mode", mode, MODES),
            ("fuse", fuse, FUSES),
            ("anchor", anchor, ANCHORS),
            ("noise", noise, NOISES),
        ):
            check_choice(what, got, allowed)
        windows = mode == "windows"
        if windows:
            check_overlap("overlap", window_length, overlap)
        else:
            check_overlap("carry", window_length, carry, least=1)
        check_svd(model)
        facts = _check_latent(samples)
        settings = LongSettings(
            mode=mode,
            length=window_length,
            overlap=overlap if windows else carry,
            fuse=fuse,
            fade=0 if windows else min(crossfade, carry),
            moving=anchor == "moving",
            freenoise=noise == "FreeNoise",
            drift=drift_control,
            time_offset=time_offset,
            min_cfg=min_cfg,
        )
        spans = settings.spans(samples["samples"].shape[0])
        fps = float(facts.fps or DEFAULT_FPS)
        return io.NodeOutput(
            LongSampling(settings).patch(model), draw_spans(spans, settings, fps), _report(spans, settings, facts, fps)
        )


def _cutting_inputs() -> list[Any]:
    return [
        field(
            io.Int,
            "window_length",
            default=TRAINED,
            min=2,
            max=256,
            tooltip="Latents of a window or chunk: 25 for SVD-XT, 14 for the first SVD. Memory grows with it, not with "
            "the clip.",
        ),
        field(
            io.Int,
            "overlap",
            default=6,
            min=0,
            max=255,
            tooltip="windows: latents that neighbours share. More is smoother and slower.",
        ),
        field(
            io.Combo,
            "fuse",
            options=list(FUSES),
            default="pyramid",
            tooltip="windows: what counts where windows overlap. pyramid: the middle of each most. linear: its first "
            "latent most. overlap-linear: a cross-fade over the overlap.",
        ),
        field(
            io.Int,
            "carry",
            default=4,
            min=1,
            max=255,
            tooltip="continuation: latents that a chunk takes over from the one before. More keeps the motion going, "
            "too many freeze it.",
        ),
        field(
            io.Int,
            "crossfade",
            default=0,
            min=0,
            max=255,
            tooltip="continuation: how many of the carried latents fade from kept to new. 0 = a hard cut.",
        ),
    ]


def _guiding_inputs() -> list[Any]:
    return [
        field(
            io.Combo,
            "anchor",
            options=list(ANCHORS),
            default="first",
            tooltip="Which image later windows are told to start from. first: the one given. moving: their own first "
            "latent; in windows once it is clear enough, late in the run.",
        ),
        field(
            io.Combo,
            "noise",
            options=list(NOISES),
            default="as given",
            tooltip="FreeNoise: the noise of the first window, shuffled, for all others, so that windows resemble each "
            "other. Noise that a sampler adds on its way is not changed.",
        ),
        field(
            io.Float,
            "drift_control",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="Pulls mean and contrast of every latent channel towards the first window, against colours that "
            "drift away. 0 = off, 1 = all the way.",
        ),
        field(
            io.Boolean,
            "time_offset",
            default=False,
            tooltip="Tells the model where in the clip a window lies, so that it does not take each for an opening. "
            "The model never saw positions past its training length.",
        ),
        field(
            io.Float,
            "min_cfg",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="CFG of the first latent of each window; it rises to the sampler's CFG at its last, as Video "
            "Linear CFG Guidance does over a whole clip. 0 = the same CFG everywhere.",
        ),
    ]


def _check_latent(latent: Any) -> Facts:
    """The facts of a latent that SVD can sample. Raises ValueError for any other."""
    samples, facts = samples_of(latent), read_facts(latent)
    if facts.own_space or (facts.family is not None and samples.shape[1] != CHANNELS):
        raise ValueError(
            f"This latent was made by {facts.family}, whose latent space is not SVD's; sampling it would give noise. "
            "Use the latent of SVD Image to Long Video, or encode the video with CV-VAE (4 channels)."
        )
    if samples.ndim != 4 or samples.shape[1] != CHANNELS:
        raise ValueError(
            f"The latent has shape {tuple(samples.shape)}; SVD samples (frames, 4, height, width). Use the latent of "
            "SVD Image to Long Video; a 5-D latent of CV-VAE becomes 4-D in Latent Layout (clip as frame batch)."
        )
    return facts


def _report(spans: list[Span], settings: LongSettings, facts: Facts, fps: float) -> str:
    latents = spans[-1].stop
    frames = facts.frames or VIDEO.pixel_frames(latents)
    lines = [f"{latents} latents, {frames} frames, {frames / fps:.1f} s at {fps:g} frames per second"]
    if len(spans) == 1:
        lines.append(f"one window of up to {settings.length} latents is enough: the model samples as without this node")
        return "\n".join(lines)
    word = "windows in every step" if settings.mode == "windows" else "chunks, one after another"
    lines.append(f"{len(spans)} {word}, {settings.length} latents each: {describe_spans(spans)}")
    work = len(spans) * settings.length
    lines.append(f"work of {work} latents ({work / latents:.2f} times the clip), memory of {settings.length}")
    surplus = spans[-1].known - settings.overlap
    if surplus:
        fits = latents + surplus
        shorter = fits - (settings.length - settings.overlap)
        lines.append(
            f"the last one is moved back and shares {spans[-1].known} latents; {VIDEO.pixel_frames(shorter)} or "
            f"{VIDEO.pixel_frames(fits)} frames fit without that"
        )
    if settings.length > TRAINED:
        lines.append(f"windows of {settings.length} latents are longer than the {TRAINED} that SVD-XT was trained on")
    if settings.drift and settings.mode == "continuation":
        lines.append(f"drift control {settings.drift:g}: new latents of each chunk, before they are carried on")
    lines.append("no quality of SVD beyond its training length was measured for this node: compare settings by eye")
    return "\n".join(lines)


NODES = [SVDLongVideo]
