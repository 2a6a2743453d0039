"""Where a run's batches and its frozen image VAE come from."""

from __future__ import annotations

from pathlib import Path

from ..door.loading import DEMO_WEIGHTS, load
from ..families import family_of
from ..families.image_vae import IMAGE_VAE
from ..weights.files import read_weights, strip_foreign
from .camera_moves import CameraMoves
from .clips import ClipBatches
from .coders import FrameByFrame, read_image_model
from .config import TrainConfig
from .iv_image import IVImageVAE

FrozenImageVAE = IVImageVAE | FrameByFrame


def open_batches(config: TrainConfig, rank: int, world: int) -> ClipBatches | CameraMoves:
    """The training batches of process `rank` of `world`. Raises ConfigError or TrainingDataError."""
    data = config.data
    if data.camera_moves is not None:
        return CameraMoves(data.camera_moves, data.batches, seed=config.seed, rank=rank)
    return ClipBatches(
        data.sources, data.batches, seed=config.seed, workers=data.workers, rank=rank, world=world,
        pin_memory=config.run.device != "cpu" and data.workers > 0,
    )  # fmt: skip


def frozen_image_vae(source: str) -> FrozenImageVAE:
    """The image VAE of a file or folder (Stable Diffusion's, SD3's, or one of stage "image"), without gradients.

    Weights of a video VAE, or demo-cv-vae and demo-iv-vae, are used frame by frame: an inflated VAE is its image VAE.
    Raises InflationError for anything else, CheckpointError where the file cannot be read.
    """
    path = DEMO_WEIGHTS.get(source, Path(source))
    family = family_of({name: tuple(t.shape) for name, t in strip_foreign(read_weights(path).tensors).items()})
    found = read_image_model(source) if family in (None, IMAGE_VAE) else load(source).model
    model: FrozenImageVAE = found if isinstance(found, IVImageVAE) else FrameByFrame(found)
    return model.eval().requires_grad_(False)
