"""What a training run is told: one TOML file for each stage, read strictly into frozen dataclasses."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, cast

from pydantic import Field
from pydantic.dataclasses import dataclass

from ..families import VIDEO
from ..families.iv_vae import PUBLISHED, IVParts, TemporalConv
from .clips import BatchKind
from .losses import Distance
from .regularization import Mapping as FrameMapping
from .tables import STRICT, ConfigError, Table, from_table

CV_LONGEST = 17  # frames that CV-VAE handles in one call
Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """What is trained, and from where.

    init: "fresh" draws weights; "weights" takes `weights`, a file of this stage's model or demo-cv-vae, demo-iv-vae;
    "inflate" (video only) makes the video VAE of the image VAE `weights`, or for iv-vae of two of them.
    widths, blocks_per_level, latent_channels (cv-vae, cv-vae-sd3) and dim, latent_channels, halves (iv-vae; halves for
    the image stage only) are the size where init is "fresh"; otherwise the weights say it.
    scale_factor, shift_factor: of IV-VAE's latents, kept in the file that is written; otherwise those of the weights,
    or 1 and 0.
    temporal_conv, branches, motion_perception: parts of a fresh IV-VAE, other than the published ones, see `IVParts`;
    where init is "weights" the file says them.
    train: "decoder" leaves the encoder as it is, so that latents stay exactly what they were.
    """

    family: Literal["cv-vae", "cv-vae-sd3", "iv-vae"]
    init: Literal["fresh", "weights", "inflate"]
    weights: tuple[str, ...] = ()
    widths: tuple[Count, ...] | None = None
    blocks_per_level: Count | None = None
    latent_channels: Count | None = None
    dim: Count | None = None
    halves: Literal[1, 2] | None = None
    scale_factor: Positive | None = None
    shift_factor: float | None = None
    temporal_conv: TemporalConv = PUBLISHED.temporal_conv
    branches: Literal[1, 2] = PUBLISHED.branches
    motion_perception: bool = PUBLISHED.motion_perception
    train: Literal["all", "decoder"] = "all"

    @property
    def parts(self) -> IVParts:
        """What a fresh IV-VAE is made of."""
        return IVParts(
            temporal_conv=self.temporal_conv, branches=self.branches, motion_perception=self.motion_perception
        )

    def __post_init__(self) -> None:
        if self.parts != PUBLISHED and (self.family != "iv-vae" or self.init != "fresh"):
            raise ValueError(
                f"temporal_conv, branches and motion_perception are choices for a fresh iv-vae (init = 'fresh'); got "
                f"{self.family} with init = '{self.init}'. Leave them out: weights say what they are made of."
            )
        size = ("dim", "latent_channels") if self.family == "iv-vae" else _CV_SIZE
        missing = [name for name in size if getattr(self, name) is None]
        if self.init == "fresh" and missing:
            raise ValueError(f"init is 'fresh', and {', '.join(missing)} must say the size of the {self.family}.")
        most = 2 if self.family == "iv-vae" and self.init == "inflate" else 1
        if self.init != "fresh" and not 1 <= len(self.weights) <= most:
            raise ValueError(
                f"init is '{self.init}', which needs {'one or two files' if most == 2 else 'one file'} in weights; "
                f"got {len(self.weights)}."
            )


_CV_SIZE = ("widths", "blocks_per_level", "latent_channels")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CameraMovesConfig:
    """Training pictures without a data set: a camera moves over procedural images, and over photographs if given.

    procedural: how many images to draw. photographs: a folder of pictures of at least 96 x 96 pixels, or "scikit-image"
    for ten that this package brings.
    """

    procedural: NotNegative
    photographs: Path | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """What is trained on: `sources` (folders, CSV files, WebDataset shards) or `camera_moves`.

    batches: the mixture; each is of one kind and size, and is taken in proportion to its weight.
    workers: processes that decode; 0 decodes in the training process.
    """

    batches: tuple[BatchKind, ...]
    sources: tuple[str, ...] = ()
    camera_moves: CameraMovesConfig | None = None
    workers: NotNegative = 0

    def __post_init__(self) -> None:
        if bool(self.sources) == (self.camera_moves is not None):
            raise ValueError("give either sources (folders, CSV files, WebDataset shards) or a table camera_moves.")
        if not self.batches:
            raise ValueError("at least one table [[data.batches]] is needed.")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LossConfig:
    """Reconstruction and KL. Published: l1, lpips_weight 0.5.

    kl_weight: on the KL summed over a clip's latent volume, next to a likelihood summed over a frame's pixels. The
    published config prints 1.0; the practice of latent diffusion models, and the default here, is 1e-6.
    lpips: a file of VGG-16 or AlexNet; without it torch's cache is looked through. lpips_weight 0 needs no file.
    """

    reconstruction: Distance = "l1"
    lpips_weight: Weight = 0.5
    lpips: Path | None = None
    kl_weight: Weight = 1e-6


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RegularizationConfig:
    """Latent-space regularization by the frozen image VAE `image_vae`. Published: decoder 1, encoder 0, random.

    image_vae: a file or folder of an image VAE, or weights of a video VAE, which then is used frame by frame.
    decoder, encoder: weights of the two terms. mapping: which frames stand for the latents.
    """

    image_vae: str
    decoder: Weight = 1.0
    encoder: Weight = 0.0
    mapping: FrameMapping = "random"

    def __post_init__(self) -> None:
        if self.decoder + self.encoder == 0:
            raise ValueError("decoder or encoder must be above 0; leave the table out to train without.")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DiscriminatorConfig:
    """The adversarial loss. Published: from the start, weight 0.5, width 64, a constant rate of 2e-5 without warm-up.

    Before step `start` there is none. learning_rate: None takes that of [optimizer]. schedule: "cosine" warms up and
    falls as the generator's does. weights: a checkpoint of the published training code to take the discriminator of.
    """

    start: NotNegative = 0
    weight: Positive = 0.5
    width: Annotated[int, Field(ge=32, multiple_of=32)] = 64
    learning_rate: Positive | None = None
    schedule: Literal["constant", "cosine"] = "constant"
    weights: Path | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """AdamW under a cosine with warm-up, as published; `kind` "muon" orthogonalises the momentum of kernels.

    With "muon" (Jordan et al. 2024), learning_rate is that of the kernels and everything else has AdamW at a fifth.
    least: the share of the learning rate that the cosine ends at.
    clip: the most that the gradient's norm may be. A learned log-variance has a gradient of as many as the frame has
    values, which fills the norm until it has settled (tens of thousands of steps at 1e-4) and leaves the rest of the
    gradient small against `eps`: clip_log_variances "apart" clips it by itself; "together", as published, does not.
    """

    learning_rate: Positive
    kind: Literal["adamw", "muon"] = "adamw"
    warm_up: NotNegative = 1000
    least: Annotated[float, Field(ge=0, le=1)] = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    eps: Positive = 1e-4
    weight_decay: Weight = 0.01
    clip: Positive = 1.0
    clip_log_variances: Literal["apart", "together"] = "apart"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """How long, how precisely, and what is written when (all in steps).

    steps: 0 writes the initial weights and ends, which is how a VAE is only inflated. accumulation: batches for one
    step. ema: share that the moving average of the weights keeps at each step, less at first; 0 for none. keep: how
    many checkpoints stay. most_skipped: steps in a row that are left out because their values are not finite; with one
    more the run goes back to the last good checkpoint, and ends where that does not help. checkpointing: compute
    activations again in the backward pass; a third slower, and far less memory.
    """

    steps: NotNegative
    device: str = "auto"
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    checkpointing: bool = True
    accumulation: Count = 1
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    save_every: Count = 1000
    keep: Count = 3
    log_every: Count = 10
    most_skipped: NotNegative = 10


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ValidationConfig:
    """Clips that are never trained on: PSNR, SSIM and sample grids every `every` steps.

    sources: as in [data], or demo-clip, the bundled one. clips: how many. size: (height, width) of the crop.
    """

    sources: tuple[str, ...]
    size: tuple[int, int]
    every: Count
    frames: Count = 17
    clips: Count = 8
    short_side: Count | None = None

    def __post_init__(self) -> None:
        check_clip(self.frames, self.size)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """One stage: `out` is the folder that everything is written to."""

    stage: Literal["image", "video"]
    out: Path
    model: ModelConfig
    data: DataConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    run: RunConfig
    seed: NotNegative = 0
    regularization: RegularizationConfig | None = None
    discriminator: DiscriminatorConfig | None = None
    validation: ValidationConfig | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it is from 0 to {2**63 - 1}.")
        longest = max(batch.frames for batch in self.data.batches)
        if self.validation is not None:
            longest = max(longest, self.validation.frames)
        if self.stage == "image" and (longest > 1 or self.regularization is not None or self.model.init == "inflate"):
            raise ValueError(
                "stage is 'image', which has frames = 1 everywhere, no [regularization] and no init = 'inflate'; "
                "these belong to stage 'video'."
            )
        if self.model.family != "iv-vae" and longest > CV_LONGEST:
            raise ValueError(
                f"{self.model.family} handles {CV_LONGEST} frames in one call, and the longest clips have {longest}: "
                f"use 1, 5, 9, 13 or {CV_LONGEST} frames."
            )


def check_clip(frames: int, size: tuple[int, int]) -> None:
    """Raise ValueError unless there are 1 + 4N frames and both sides are multiples of 8."""
    if (
        frames != VIDEO.pixel_frames(VIDEO.latent_frames(frames))
        or frames < 1
        or any(side < VIDEO.space or side % VIDEO.space for side in size)
    ):
        raise ValueError(
            f"clips of {frames} frames of {size[0]} x {size[1]} cannot be encoded: use 1, 5, 9, 13 or 17 frames and "
            "sides that are multiples of 8."
        )


# ------------------------------------------------------------------------------------------------------ reading


def read_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config in a TOML file, with `overrides` such as "run.steps=100" in place of what stands there.

    Raises ConfigError, which names the file and every key that is wrong, for what is not understood.
    """
    try:
        table = _parse(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the encoding or of TOML
        raise ConfigError(f"{path} is not TOML: {error}.") from error
    for text in overrides:
        _override(table, text)
    return from_table(TrainConfig, table, str(path))


def _parse(text: str) -> Table:
    return tomllib.loads(text)


def _override(table: Table, text: str) -> None:
    """Put one "section.key=value" into `table`; the value is TOML, or a text without quotes."""
    key, equals, value = text.partition("=")
    *sections, last = key.strip().split(".")
    if not equals or not all((*sections, last)):
        raise ConfigError(f"--set {text} is not understood: write section.key=value, such as run.steps=100.")
    for section in sections:
        inner: object = table.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {text}: {section} is no table of the config.")
        table = cast("Table", inner)
    try:
        table[last] = _parse(f"value = {value}")["value"]
    except ValueError:
        table[last] = value.strip()
