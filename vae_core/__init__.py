"""CV-VAE and IV-VAE: two video VAEs, exact and streaming. This page is the package's public door."""

from .door.checkpoints import load, save
from .door.codec import VAEInfo, VideoVAE
from .errors import CheckpointError, LatentFileError, VideoError
from .memory import Memory
from .planner import Plan
from .tiles import ReferencePlan, TilePlan

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "LatentFileError",
    "Memory",
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
