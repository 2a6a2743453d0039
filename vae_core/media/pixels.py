"""From decoded video frames to RGB tensors: matrix, range and depth as the file states them, turned as it asks."""

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from av.sidedata.sidedata import SideData
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from ..errors import VideoError

UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED, the same number for primaries and transfer
BT709 = 1
# flags of swscale.h: bicubic, accurate rounding, full chroma in and out, bit-exact (older PyAV lacks the names)
EXACT = 0x4 | 0x40000 | 0x2000 | 0x4000 | 0x80000


class Orientation:
    """The quarter turns and mirrorings of a frame's display matrix, as row and column operations."""

    def __init__(self, frame: VideoFrame, path: Path) -> None:
        entries = cast("Iterable[SideData]", frame.side_data)
        found = next((data for data in entries if data.type.name == "DISPLAYMATRIX"), None)
        a, b, c, d = 1, 0, 0, 1
        if found is not None:
            values = struct.unpack("=9i", bytes(found)[:36])
            scale = max(abs(values[i]) for i in (0, 1, 3, 4)) or 1
            a, b, c, d = (round(values[i] / scale, 2) for i in (0, 1, 3, 4))
        if sorted(map(abs, (a, b, c, d))) != [0, 0, 1, 1] or abs(a) != abs(d):
            raise VideoError(
                f"{path}: asks to be shown turned by {frame.rotation} degrees; only quarter turns can be applied."
            )
        self.swaps_axes = a == 0
        # a pixel (x, y) is shown at (a x + c y, b x + d y)
        self.flip_x = (c if self.swaps_axes else a) < 0
        self.flip_y = (b if self.swaps_axes else d) < 0

    def size(self, height: int, width: int) -> tuple[int, int]:
        return (width, height) if self.swaps_axes else (height, width)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        turned = image.transpose(-1, -2) if self.swaps_axes else image  # c h w
        dims = [dim for dim, flip in ((-1, self.flip_x), (-2, self.flip_y)) if flip]
        return turned.flip(dims) if dims else turned


class ToRGB:
    """Converts frames like the first to (3, H, W) float32 in [-1, 1]."""

    def __init__(self, first: VideoFrame, path: Path) -> None:
        self._path, self._reformatter = path, VideoReformatter()
        self._shape = first.height, first.width
        self._turn = Orientation(first, path)
        self._deep = any(part.bits > 8 for part in first.format.components)

    def __call__(self, frame: VideoFrame, index: int) -> torch.Tensor:
        if (frame.height, frame.width) != self._shape:
            raise VideoError(
                f"{self._path}: changes from {self._shape[1]}x{self._shape[0]} to {frame.width}x{frame.height} at "
                f"frame {index}; one size is needed: use the frames before it, or convert it first."
            )
        space = frame.colorspace
        if space == UNSPECIFIED:
            space = BT709 if frame.height >= 720 or frame.width >= 1280 else Colorspace.ITU601
        array = self._reformatter.reformat(
            frame,
            format="rgb48le" if self._deep else "rgb24",
            src_colorspace=space,
            # without meaning for RGB, but older PyAV takes no notice of the source's matrix where the two are equal
            dst_colorspace=Colorspace.ITU601 if space == BT709 else Colorspace.ITU709,
            src_color_range=ColorRange.JPEG if frame.format.name.startswith("yuvj") else frame.color_range,
            dst_color_range=ColorRange.JPEG,
            interpolation=EXACT,
        ).to_ndarray()
        peak = 65535 if self._deep else 255
        image = torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1)  # c h w
        return self._turn(image.mul_(2 / peak).sub_(1)).contiguous()
