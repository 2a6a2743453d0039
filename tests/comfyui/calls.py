"""Our nodes with the widget values that most tests leave alone."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from .inprocess import Comfy

ENCODE = {"mode": "mean", "sample_seed": 0, "fps": 0.0, "memory_budget_gb": 0.0}
ENCODE_PART = {**ENCODE, "first_frame": 0, "frame_count": 0, "preview": True}
DECODE = {"memory_budget_gb": 0.0, "preview": False}
DECODE_TO_VIDEO = {"fps": 0.0, "crf": 18, **DECODE}
LOAD_VAE = {"dtype": "fp32", "device": "auto", "latent_layout": "auto"}
SAVE_LATENT = {"filename_prefix": "latents/video", "when_file_exists": "number a new file"}
LOAD_LATENT = {"first_latent": 0, "latent_count": 0, "layout": "as saved"}
# both shapes of Save Video's widgets: each version of ComfyUI takes its own
SAVE_VIDEO = {"format": "auto", "codec": "auto", "format.codec": "auto"}


def encode(comfy: Comfy, vae: Any, images: Any, **changes: Any) -> tuple[dict[str, Any], str]:
    """(latent, report) of Video VAE Encode."""
    latent, report, _, _ = comfy.call("CVIV_Encode", vae=vae, images=images, **{**ENCODE, **changes})
    return latent, report


def decode(comfy: Comfy, vae: Any, latent: dict[str, Any], **changes: Any) -> tuple[torch.Tensor, float, str]:
    """(images, fps, report) of Video VAE Decode."""
    images, fps, report = comfy.call("CVIV_Decode", vae=vae, samples=latent, **{**DECODE, **changes})
    return images, fps, report


def decode_to_video(comfy: Comfy, vae: Any, latent: dict[str, Any], **changes: Any) -> Any:
    """The VIDEO of Video VAE Decode to Video."""
    (video,) = comfy.call("CVIV_DecodeToVideo", vae=vae, samples=latent, **{**DECODE_TO_VIDEO, **changes})
    return video


def video_of(comfy: Comfy, images: torch.Tensor, fps: Fraction, audio: Any = None) -> Any:
    """A VIDEO that holds its frames, as Create Video makes it."""
    api = comfy.module("comfy_api.latest")
    return api.InputImpl.VideoFromComponents(api.Types.VideoComponents(images=images, frame_rate=fps, audio=audio))


def tone(seconds: float, rate: int = 32000) -> dict[str, Any]:
    """An AUDIO: a steady stereo tone."""
    time = torch.arange(round(seconds * rate)) / rate
    wave = torch.sin(2 * torch.pi * 440 * time) * 0.5
    return {"waveform": wave.expand(1, 2, -1).contiguous(), "sample_rate": rate}


def play(source: Any) -> dict[str, Any]:
    """What a player finds in a video file: frames (t, h, w, 3) of uint8, fps, seconds of sound, its peak, metadata."""
    with av.open(source) as container:
        stream = container.streams.video[0]
        fps, metadata = stream.average_rate, dict(container.metadata)
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    seconds, loudest = 0.0, 0.0
    if hasattr(source, "seek"):
        source.seek(0)
    with av.open(source) as container:
        for frame in container.decode(audio=0) if container.streams.audio else ():
            seconds += frame.samples / frame.sample_rate
            loudest = max(loudest, float(np.abs(frame.to_ndarray()).max()))
    return {"frames": frames, "fps": fps, "sound": seconds, "loudest": loudest, "metadata": metadata}


def saved_path(base: Path, ui: dict[str, Any]) -> Path:
    """Path of the file that an output node names in its result for the page."""
    (file,) = ui["images"]
    return base / "output" / file["subfolder"] / file["filename"]
