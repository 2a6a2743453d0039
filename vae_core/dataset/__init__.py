"""A data set of videos and images encoded into shards of latents, once and for all."""

from .job import ClipInfo, Counts, EncodeJob, EncodeJobError, EncodeSettings
from .shards import read_latents

__all__ = ["ClipInfo", "Counts", "EncodeJob", "EncodeJobError", "EncodeSettings", "read_latents"]
