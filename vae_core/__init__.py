"""Video VAEs, exact and streaming: CV-VAE, IV-VAE and image VAEs. This page is the package's public door.

What it names is imported when it is first asked for, so that the command line answers, and stops, at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .door.info import VAEInfo
    from .door.loading import DEMO_FOLDER, DEMO_WEIGHTS, load, official_state, save
    from .door.output import NotFiniteError
    from .door.vae import VideoVAE
    from .errors import BudgetError, CheckpointError, LatentFileError, VideoError
    from .families import Compression, Direction
    from .plan.planner import Plan
    from .run.snapshots import Snapshots
    from .run.tiling import AnyPlan, ReferencePlan, StripPlan, TilePlan

__version__ = "0.1.0"

_PLACES = {
    ".door.info": ("VAEInfo",),
    ".door.loading": ("DEMO_FOLDER", "DEMO_WEIGHTS", "load", "official_state", "save"),
    ".door.output": ("NotFiniteError",),
    ".door.vae": ("VideoVAE",),
    ".errors": ("BudgetError", "CheckpointError", "LatentFileError", "VideoError"),
    ".families": ("Compression", "Direction"),
    ".plan.planner": ("Plan",),
    ".run.snapshots": ("Snapshots",),
    ".run.tiling": ("AnyPlan", "ReferencePlan", "StripPlan", "TilePlan"),
}
_PLACE = {name: place for place, names in _PLACES.items() for name in names}

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
    "Snapshots",
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


def __getattr__(name: str) -> object:
    place = _PLACE.get(name)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(place, __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
