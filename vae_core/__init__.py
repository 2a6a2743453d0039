"""Video VAEs, exact and streaming: CV-VAE, IV-VAE and image VAEs. This page is the package's public door."""

from .door.info import VAEInfo
from .door.loading import load, save
from .door.vae import VideoVAE
from .errors import CheckpointError, LatentFileError, VideoError
from .families import Compression
from .plan.planner import Plan
from .run.tiling import ReferencePlan, TilePlan

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Compression",
    "LatentFileError",
    "Plan",
    "ReferencePlan",
    "TilePlan",
    "VAEInfo",
    "VideoError",
    "VideoVAE",
    "__version__",
    "load",
    "save",
]
