"""Keyframe detail: what single images show, carried along the motion."""

from .fusion import MOST_CONFIDENCE, DetailSettings, Fused, check_counts, fuse_detail

__all__ = ["MOST_CONFIDENCE", "DetailSettings", "Fused", "check_counts", "fuse_detail"]
