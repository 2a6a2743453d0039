"""Video VAEs, exact and streaming: CV-VAE, IV-VAE and image VAEs. This page is the package's public door."""

from .door.info import VAEInfo
from .door.loading import DEMO_FOLDER, DEMO_WEIGHTS, load, official_state, save
from .door.output import NotFiniteError
from .door.vae import VideoVAE
from .errors import BudgetError, CheckpointError, LatentFileError, VideoError
from .families import Compression, Direction
from .plan.planner import Plan
from .run.tiling import AnyPlan, ReferencePlan, StripPlan, TilePlan

__version__ = "0.1.0"

__all__ = [
    "DEMO_FOLDER",
    "DEMO_WEIGHTS",
    "AnyPlan",
    "BudgetError",
    "CheckpointError",
    "Compression",
    "Direction",
    "LatentFileError",
    "NotFiniteError",
    "Plan",
    "ReferencePlan",
    "StripPlan",
    "TilePlan",
    "VAEInfo",
    "VideoError",
    "VideoVAE",
    "__version__",
    "load",
    "official_state",
    "save",
]
