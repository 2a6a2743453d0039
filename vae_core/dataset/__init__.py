"""A data set of videos and images encoded into shards of latents, once and for all."""

from .encoding import EncodeSettings
from .job import Counts, EncodeJob
from .shards import ClipInfo, EncodeJobError, read_latents

__all__ = ["ClipInfo", "Counts", "EncodeJob", "EncodeJobError", "EncodeSettings", "read_latents"]
