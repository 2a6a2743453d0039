"""Between RGB and coded YCbCr, exactly: matrix, range and depth. Planes are floats (h, w) in code values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BT709, UNSPECIFIED, BT601, YCGCO = 1, 2, 6, 8  # AVCOL_SPC_...
_WEIGHTS = {  # of red and of blue in luma
    BT709: (0.2126, 0.0722),
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    BT601: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
}
KNOWN_MATRICES = frozenset({*_WEIGHTS, YCGCO})
MATRIX_NAMES = {8: "YCgCo", 10: "BT.2020 with constant luminance", 11: "SMPTE 2085", 14: "ICtCp", 15: "IPT-C2"} | {
    12: "derived from its primaries", 13: "derived from its primaries", 16: "YCgCo-R", 17: "YCgCo-R"
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Coding:
    """How YCbCr is coded. matrix: AVCOL_SPC_..., of KNOWN_MATRICES. full: codes from 0 to the top; else limited."""

    matrix: int
    full: bool
    bits: int

    @property
    def _scales(self) -> tuple[float, float, float, float]:
        """Black and span of luma, middle and span of chroma, in code values."""
        if self.full:
            top = 2.0**self.bits - 1
            return 0.0, top, 2.0 ** (self.bits - 1), top
        unit = 2.0 ** (self.bits - 8)
        return 16 * unit, 219 * unit, 128 * unit, 224 * unit

    def to_rgb(self, luma: Tensor, blue: Tensor | None, red: Tensor | None) -> Tensor:
        """(3, h, w) in [-1, 1], clamped, of planes of one size; blue, red: Cb and Cr (Cg and Co), None for grey."""
        black, span, middle, chroma_span = self._scales
        y = luma.sub(black).div_(span / 2).sub_(1)  # divided, so that white is exactly 1
        out = y.new_empty(3, *y.shape)
        if blue is None or red is None:
            out.copy_(y.expand_as(out))
            return out.clamp_(-1, 1)
        b, r = blue.sub(middle), red.sub(middle)
        scale = 2 / chroma_span
        if self.matrix == YCGCO:
            torch.add(y, b, alpha=scale, out=out[1])
            y.sub_(b, alpha=scale)
            torch.add(y, r, alpha=scale, out=out[0])
            torch.sub(y, r, alpha=scale, out=out[2])
            return out.clamp_(-1, 1)
        kr, kb = _WEIGHTS[self.matrix]
        kg = 1 - kr - kb
        torch.add(y, r, alpha=scale * 2 * (1 - kr), out=out[0])
        torch.add(y, b, alpha=scale * 2 * (1 - kb), out=out[2])
        y.sub_(b, alpha=scale * 2 * (1 - kb) * kb / kg).sub_(r, alpha=scale * 2 * (1 - kr) * kr / kg)
        out[1].copy_(y)
        return out.clamp_(-1, 1)

    def luma(self, rgb: Tensor) -> Tensor:
        """(h, w) of (3, h, w) in [-1, 1]; not rounded."""
        black, span, _, _ = self._scales
        kr, kb = _WEIGHTS[self.matrix]
        y = rgb[0] * kr
        y.add_(rgb[1], alpha=1 - kr - kb).add_(rgb[2], alpha=kb)
        return y.add_(1).mul_(span / 2).add_(black)

    def chroma(self, rgb: Tensor, luma: Tensor) -> Tensor:
        """(2, h, w), Cb and Cr, of (3, h, w) in [-1, 1] and its `luma`; not rounded."""
        black, span, middle, chroma_span = self._scales
        kr, kb = _WEIGHTS[self.matrix]
        out = torch.stack((rgb[2], rgb[0]))
        out.sub_((luma - black).mul_(2 / span).sub_(1))
        out[0].mul_(chroma_span / (4 * (1 - kb)))
        out[1].mul_(chroma_span / (4 * (1 - kr)))
        return out.add_(middle)

    def visible(self, chroma: Tensor) -> Tensor:
        """(2, h, w) whole codes, those of colours that RGB has at no brightness brought towards grey until it has."""
        most, least = self._colour_range(chroma)
        excess = (most - least) / 2
        middle = self._scales[2]
        return torch.where(excess > 1, ((chroma - middle) / excess).trunc() + middle, chroma)

    def luma_range(self, chroma: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest and the highest whole luma at which RGB has the colours (2, h, w); it may be none: low > high."""
        black, span, _, _ = self._scales
        most, least = self._colour_range(chroma)
        slack = 1e-3  # of a code: what float32 leaves
        low, high = least.mul_(-span / 2).add_(black), most.sub_(2).mul_(-span / 2).add_(black)
        return low.sub_(slack).ceil_(), high.add_(slack).floor_()

    def _colour_range(self, chroma: Tensor) -> tuple[Tensor, Tensor]:
        """The highest and the lowest of red, green and blue, less luma, at (2, h, w) codes."""
        _, _, middle, chroma_span = self._scales
        kr, kb = _WEIGHTS[self.matrix]
        blue, red = chroma.sub(middle).mul_(4 / chroma_span).unbind(0)
        blue, red = blue * (1 - kb), red * (1 - kr)
        green = (blue * kb + red * kr) / (kr + kb - 1)
        offsets = torch.stack((red, green, blue))
        return offsets.amax(0), offsets.amin(0)

    def rounded(self, plane: Tensor) -> Tensor:
        """Whole code values that the range allows."""
        black, span, _, chroma_span = self._scales
        top = black + max(span, chroma_span)
        return plane.round_().clamp_(black, top)
