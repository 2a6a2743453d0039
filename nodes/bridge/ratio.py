"""The compression of a video VAE, as nodes for videos and nodes for pictures both read it."""

from __future__ import annotations


class Ratio(tuple):
    """(function of frames, 8, 8), which is the number 8 to a node that computes with it.

    Nodes for pictures take a VAE's ratio as one number: ComfyUI 0.3's inpainting and other packs do.
    """

    def __rfloordiv__(self, other: float) -> float:
        return other // self[-1]

    def __rtruediv__(self, other: float) -> float:
        return other / self[-1]

    def __rmod__(self, other: float) -> float:
        return other % self[-1]

    def __mul__(self, other: float) -> float:  # type: ignore[override]
        return self[-1] * other

    def __rmul__(self, other: float) -> float:  # type: ignore[override]
        return other * self[-1]

    def __int__(self) -> int:
        return self[-1]

    __index__ = __int__
