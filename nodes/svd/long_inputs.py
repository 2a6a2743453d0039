"""The inputs of SVD Long Video. New ones are optional and stand at the end, so that saved workflows keep theirs."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..bridge.schema import field
from .schedule import FUSES
from .windows import TRAINED

MODES = ("continuation", "windows", "loop")
ANCHORS = ("first", "moving", "all carried", "re-encoded")
NOISES = ("as given", "FreeNoise")
SCHEDULES = ("moving", "still")


def long_inputs() -> list[Any]:
    """All of them, in their order on the node."""
    return [
        field(io.Model, "model", tooltip="An SVD model, from Image Only Checkpoint Loader."),
        field(
            io.Latent,
            "samples",
            display_name="latent",
            tooltip="The latent that goes to the sampler, from SVD Image to Long Video or SVD Extend Clip. It is only "
            "looked at, for the picture and the report.",
        ),
        field(
            io.Combo,
            "mode",
            options=list(MODES),
            default="continuation",
            tooltip="continuation: one chunk after another, each starting with the last latents of the one before; the "
            "clip can go somewhere. windows: every step runs the model over overlapping windows and fuses them; the "
            "clip stays near its image. loop: windows that go round; for Decode Loop.",
        ),
        *_cutting_inputs(),
        *_guiding_inputs(),
        *_later_inputs(),
    ]


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
            tooltip="windows and loop: latents that neighbours share, at least. More is smoother and slower.",
        ),
        field(
            io.Combo,
            "fuse",
            options=list(FUSES),
            default="pyramid",
            tooltip="windows and loop: what counts where windows overlap. pyramid: the middle of each most. "
            "overlap-linear: a cross-fade over the overlap. random: one of them alone, cut in every step elsewhere.",
        ),
        field(
            io.Int,
            "carry",
            default=4,
            min=1,
            max=255,
            tooltip="continuation: latents that a chunk takes over from the one before, at least. More keeps the "
            "motion going, too many freeze it.",
        ),
        field(
            io.Int,
            "crossfade",
            default=2,
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
            default="moving",
            tooltip="Which image later windows and chunks are told to start from. first: the one given. moving: their "
            "own first latent (windows: late in the run, once it is clear). all carried: each carried latent in its "
            "place. re-encoded: their first latent as a picture, encoded anew; needs image_vae and clip_vision.",
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
            default=0.5,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="Leads brightness and contrast of every latent channel back to the first window, slowly, against "
            "colours that drift away, and takes jumps of them off the seams. 0 = off, 1 = all the way.",
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
            "Linear CFG Guidance does over a whole clip. continuation: it rises over the first chunk and stays. 0 = "
            "the same CFG everywhere.",
        ),
    ]


def _later_inputs() -> list[Any]:
    return [
        field(
            io.Combo,
            "window_schedule",
            options=list(SCHEDULES),
            default="moving",
            optional=True,
            tooltip="windows and loop: whether windows lie elsewhere in every step, so that seams never meet twice in "
            "one place. still: always in the same; one window less, and EasyCache works.",
        ),
        field(
            io.Float,
            "wide_steps",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.05,
            optional=True,
            tooltip="windows and loop: share of the steps, from the first on, in which a window takes every other "
            "latent and so spans twice the time: the clip hangs together better, its motion may slow down.",
            advanced=True,
        ),
        field(
            io.Int,
            "resamples",
            default=1,
            min=1,
            max=10,
            optional=True,
            tooltip="continuation: how often each step of a later chunk is made, noise laid on again in between, so "
            "that new latents fit the carried ones. 2 takes twice the time. Sampler euler only.",
            advanced=True,
        ),
        field(
            io.Boolean,
            "steady_motion",
            default=False,
            optional=True,
            tooltip="continuation: where a chunk moved less or more than the first, the next one is told a higher or "
            "lower motion bucket, and past its end a lower or higher rate.",
            advanced=True,
        ),
        field(
            io.Vae,
            "image_vae",
            optional=True,
            tooltip="For anchor re-encoded: the VAE of Image Only Checkpoint Loader.",
        ),
        field(
            io.ClipVision,
            "clip_vision",
            optional=True,
            tooltip="For anchor re-encoded: CLIP vision of Image Only Checkpoint Loader.",
        ),
    ]
