"""VAEs over sets of videos: protocols, figures, reports, and sets cut for the purpose."""

from .candidates import Candidate, Choice, choose
from .measure import ClipFigures, ClipMeters, Networks
from .protocols import PROTOCOLS, Protocol
from .runner import Outcome, evaluate

__all__ = [
    "PROTOCOLS",
    "Candidate",
    "Choice",
    "ClipFigures",
    "ClipMeters",
    "Networks",
    "Outcome",
    "Protocol",
    "choose",
    "evaluate",
]
