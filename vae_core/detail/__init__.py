"""Keyframe detail: what single images show, carried along the motion."""
