"""Lazy VIDEOs of frames that say their number, and what was asked of who makes them."""

from __future__ import annotations

import io
import weakref
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from .inprocess import Comfy

RATE = Fraction(24000, 1001)
CHUNK = 7


def shades(frames: int, height: int = 48, width: int = 64) -> torch.Tensor:
    """Frames whose brightness says their number; (frames, height, width, 3) in 0..1."""
    shade = torch.arange(frames).view(-1, 1, 1, 1) / max(frames, 60) * 0.8 + 0.1
    return (shade + torch.linspace(0, 0.1, width).view(1, 1, -1, 1)).expand(-1, height, width, 3)


def chirp(seconds: float, rate: int = 8000) -> dict[str, Any]:
    time = torch.arange(round(seconds * rate)) / rate
    return {"waveform": (torch.sin(2 * torch.pi * (200 + 100 * time) * time) * 0.4)[None, None], "sample_rate": rate}


class Maker:
    """Makes frames on demand, and keeps what was asked of it."""

    def __init__(self, clip: torch.Tensor, fail_at: int | None = None) -> None:
        self.clip, self.fail_at = clip, fail_at
        self.asked: list[tuple[int, int]] = []
        self.closed = 0
        self.held: list[weakref.ref[torch.Tensor]] = []
        self.most = 0

    def __call__(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        self.asked.append((start, stop))
        try:
            for begin in range(start, stop, CHUNK):
                if self.fail_at is not None and begin >= self.fail_at:
                    raise KeyboardInterrupt
                chunk = self.clip[begin : min(begin + CHUNK, stop)].clone()
                self.held.append(weakref.ref(chunk))
                self.most = max(self.most, sum(ref() is not None for ref in self.held))
                yield chunk
                del chunk
        finally:
            self.closed += 1


def lazy(comfy: Comfy, maker: Maker, **choice: Any) -> Any:
    frames, height, width, _ = maker.clip.shape
    facts = {"width": width, "height": height, "frame_count": frames, "frame_rate": RATE}
    return comfy.pack("nodes.bridge.lazy_video").LazyVideo(maker, **{**facts, **choice})


def read_back(comfy: Comfy, path: str | Path | io.BytesIO) -> torch.Tensor:
    """All frames of a file as ComfyUI's own loader reads them."""
    return comfy.module("comfy_api.latest").InputImpl.VideoFromFile(path).get_components().images


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().mean() < 0.01)
