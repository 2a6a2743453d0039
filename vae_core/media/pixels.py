"""From decoded video frames to RGB tensors and back: matrix, range, depth and chroma siting as the file states them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO, Literal, cast

import numpy as np
import torch
from av.container import InputContainer
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane
from av.video.reformatter import ColorRange, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray
from torch import Tensor

from ..errors import VideoError
from .chroma import enlarged, halved
from .colour import BT601, BT709, KNOWN_MATRICES, MATRIX_NAMES, UNSPECIFIED, Coding
from .hdr import GAMUTS, TRANSFERS, to_sdr
from .opening import is_still
from .orientation import Orientation, turn_of
from .timeline import Resized

Hdr = Literal["tone-map", "refuse", "keep"]
# flags of swscale.h: bicubic, accurate rounding, full chroma in and out, bit-exact (older PyAV lacks the names)
EXACT = 0x4 | 0x40000 | 0x2000 | 0x4000 | 0x80000
_CENTRED = frozenset({"mjpeg", "mpeg1video", "h261", "h263", "flv1", "webp", "mjpegb", "ljpeg", "theora", "vp8", "vp3"})
_LIMITED_GREY = frozenset({"h264", "hevc", "vvc", "av1", "libdav1d", "libaom-av1"})
_UNPACKED = {  # packed YCbCr, and the same in planes
    "yuyv422": "yuv422p", "uyvy422": "yuv422p", "yvyu422": "yuv422p", "uyyvyy411": "yuv411p", "y210le": "yuv422p10le",
    "y212le": "yuv422p12le", "y216le": "yuv422p16le", "vuya": "yuva444p", "vuyx": "yuv444p", "ayuv": "yuva444p",
    "uyva": "yuva444p", "vyu444": "yuv444p", "xv30le": "yuv444p10le", "v30xle": "yuv444p10le", "xv36le": "yuv444p12le",
    "xv48le": "yuv444p16le", "ayuv64le": "yuva444p16le",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Look:
    """How the frames of a file are to be seen.

    codec: name of the decoder. matrix: AVCOL_SPC_... where frames state none. transfer, primaries: AVCOL_TRC_... and
    AVCOL_PRI_... aspect: width to height of a pixel as stored. hdr: what to do with PQ, HLG and wide gamuts.
    """

    orientation: Orientation
    codec: str
    matrix: int
    transfer: int = UNSPECIFIED
    primaries: int = UNSPECIFIED
    aspect: Fraction = Fraction(1)
    hdr: Hdr = "tone-map"


def look_of(
    container: InputContainer, stream: VideoStream, first: VideoFrame, file: BinaryIO, path: object, hdr: Hdr
) -> Look:
    """How to see a file, of its first decoded frame. Raises VideoError where it asks for what cannot be done."""
    context = stream.codec_context
    transfer = getattr(first, "color_trc", None) or context.color_trc
    primaries = getattr(first, "color_primaries", None) or context.color_primaries
    if transfer in TRANSFERS and hdr == "refuse":
        raise VideoError(
            f"{path}: is HDR ({TRANSFERS[transfer]}), which was to be refused; tone-map it first, or leave --hdr out."
        )
    return Look(
        orientation=Orientation(turn_of(container, stream, first, file), path),
        codec=context.name,
        matrix=_assumed_matrix(container, first),
        transfer=transfer,
        primaries=primaries,
        aspect=stream.sample_aspect_ratio or Fraction(1),
        hdr=hdr,
    )


def from_comfyui(container: InputContainer) -> bool:
    """Whether ComfyUI wrote the file: its older versions convert by BT.601 at any size, and state nothing."""
    return any(name.lower() == "prompt" for name in container.metadata)


def _assumed_matrix(container: InputContainer, frame: VideoFrame) -> int:
    large = frame.height >= 720 or frame.width >= 1280
    return BT709 if large and not is_still(container) and not from_comfyui(container) else BT601


class ToRGB:
    """Converts frames like the first to (3, H, W) float32 in [-1, 1]."""

    def __init__(self, first: VideoFrame, path: object, look: Look) -> None:
        self._path, self._look = path, look
        self._reformatter = VideoReformatter()
        self._shape = first.height, first.width

    def __call__(self, frame: VideoFrame, index: int) -> Tensor:
        """index: number of the frame, for messages."""
        if (frame.height, frame.width) != self._shape:
            change = Resized(index, self._shape, (frame.height, frame.width))
            raise VideoError(f"{self._path}: {change.words()}")
        rgb = self._rgb(frame)
        look = self._look
        if look.hdr != "keep" and (look.transfer in TRANSFERS or look.primaries in GAMUTS):
            rgb = to_sdr(rgb, look.transfer, look.primaries)
        return look.orientation(rgb).contiguous()

    def _rgb(self, frame: VideoFrame) -> Tensor:
        frame = self._in_planes(frame)
        name, parts = frame.format.name, frame.format.components
        upright = all(plane.line_size > 0 for plane in frame.planes)
        if upright and name.startswith(("gbrp", "gbrap")) and parts[0].bits <= 16:
            return torch.stack([_plane(frame, n) for n in range(3)]).mul_(2 / (2 ** parts[0].bits - 1)).sub_(1)
        if upright and name.startswith("gray") and parts[0].bits <= 16:
            return self._coding(frame).to_rgb(_plane(frame, 0), None, None)
        if upright and name.startswith(("yuv", "nv", "p0", "p2", "p4")) and len(frame.planes) > 1:
            return self._from_ycbcr(frame)
        return self._by_library(frame)

    def _from_ycbcr(self, frame: VideoFrame) -> Tensor:
        down, across = _ratios(frame.format)
        luma, blue, red = (_plane(frame, n) for n in range(3))
        if (down, across) != (1, 1):
            centred = self._look.codec in _CENTRED
            cosited = (False, not centred) if across <= 2 else (True, True)
            both = enlarged(torch.stack((blue, red)), *luma.shape, down=down, across=across, cosited=cosited)
            blue, red = both.unbind(0)
        return self._coding(frame).to_rgb(luma, blue, red)

    def _coding(self, frame: VideoFrame) -> Coding:
        grey = frame.format.name.startswith("gray")
        full = frame.format.name.startswith("yuvj") or frame.color_range == ColorRange.JPEG
        if grey and frame.color_range == ColorRange.UNSPECIFIED:
            full = self._look.codec not in _LIMITED_GREY
        matrix = frame.colorspace
        if matrix in (UNSPECIFIED, 0, 3) or grey:
            matrix = self._look.matrix
        if matrix not in KNOWN_MATRICES:
            raise VideoError(
                f"{self._path}: its colours are coded as {MATRIX_NAMES.get(matrix, f'kind {matrix}')}, which cannot be "
                "read here; convert it to BT.709 first."
            )
        return Coding(matrix=matrix, full=full, bits=frame.format.components[0].bits)

    def _in_planes(self, frame: VideoFrame) -> VideoFrame:
        planar = _UNPACKED.get(frame.format.name)
        if planar is None:
            return frame
        return self._reformatter.reformat(
            frame,
            format=planar,
            src_color_range=frame.color_range,
            dst_color_range=frame.color_range,
            interpolation=EXACT,
        )

    def _by_library(self, frame: VideoFrame) -> Tensor:
        """RGB in any packing, palettes and the like."""
        deep = any(part.bits > 8 for part in frame.format.components)
        matrix = frame.colorspace if frame.colorspace in (BT709, 5, BT601) else self._look.matrix
        array = self._reformatter.reformat(
            frame,
            format="rgb48le" if deep else "rgb24",
            src_colorspace=matrix,
            # without meaning for RGB, but older PyAV takes no notice of the source's matrix where the two are equal
            dst_colorspace=BT601 if matrix == BT709 else BT709,
            src_color_range=frame.color_range,
            dst_color_range=ColorRange.JPEG,
            interpolation=EXACT,
        ).to_ndarray()
        image = torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1)  # c h w
        return image.mul_(2 / (65535 if deep else 255)).sub_(1)


def is_transparent(frame: VideoFrame) -> bool:
    """Whether anything in the frame is not opaque."""
    form = frame.format
    if not any(part.is_alpha for part in form.components) and not form.has_palette:
        return False
    rgba = VideoReformatter().reformat(frame, format="rgba")
    return bool((rgba.to_ndarray()[..., 3] < 255).any())


def _ratios(pixels: VideoFormat) -> tuple[int, int]:
    """Rows and columns that a colour sample stands for."""
    across = round(1024 / max(1, pixels.chroma_width(1024)))
    return round(1024 / max(1, pixels.chroma_height(1024))), across


def _plane(frame: VideoFrame, component: int) -> Tensor:
    """Code values (h, w) of a component as floats."""
    name, part = frame.format.name, frame.format.components[component]
    plane: VideoPlane = frame.planes[part.plane]
    kind = np.dtype(np.uint8 if part.bits <= 8 else ">u2" if frame.format.is_big_endian else "<u2")
    rows = _rows(plane)[: part.height]
    interleaved = component > 0 and name.startswith(("nv", "p0", "p2", "p4"))
    count = part.width * (2 if interleaved else 1)
    codes = rows[:, : count * kind.itemsize].view(kind)
    if interleaved:
        second = (component == 2) != name.startswith(("nv21", "nv42"))
        codes = codes[:, 1 if second else 0 :: 2]
    values = torch.from_numpy(codes.astype(np.float32))
    if (part.bits > 8 and name.startswith("p")) or "msb" in name:
        values.div_(2 ** (16 - part.bits))  # the code lies in the upper bits
    return values


def _rows(plane: VideoPlane) -> NDArray[np.uint8]:
    """The bytes of a plane, which can be written where the frame can; (rows, bytes of a row)."""
    return np.frombuffer(cast("memoryview[int]", plane), np.uint8).reshape(-1, plane.line_size)


class FromRGB:
    """Converts RGB to frames of `pix_fmt`, planar YCbCr or planar or packed RGB; YCbCr as BT.709, limited range.

    size: (height, width). settled: choose among the codes that stand for colours that RGB has, also between colour
    samples; those are read and written again without any change, ever. Where edges are as saturated as RGB holds, it
    costs likeness: without it, the first copy is nearer and each further one goes some of the way.
    """

    def __init__(self, pix_fmt: str, size: tuple[int, int], *, settled: bool = False) -> None:
        self._settled = settled
        self._format = VideoFormat(pix_fmt, size[1], size[0])
        self._bits = self._format.components[0].bits
        self._coding = Coding(matrix=BT709, full=False, bits=self._bits)

    def __call__(self, rgb: Tensor) -> VideoFrame:
        """A frame of (3, H, W) in [-1, 1]; values outside are clamped."""
        rgb = rgb.float().clamp(-1, 1)
        frame = VideoFrame(self._format.width, self._format.height, self._format.name)
        if self._format.is_rgb:
            levels = rgb.add(1).mul_((2**self._bits - 1) / 2).round_()
            if self._format.is_planar:
                for component in range(3):
                    _fill(frame, self._format.components[component].plane, levels[component])
            else:
                _fill(frame, 0, levels.permute(1, 2, 0).flatten(1))
            return frame
        if self._format.name.startswith("gray"):
            weights = rgb.new_tensor((0.2126, 0.7152, 0.0722)).view(3, 1, 1)
            _fill(frame, 0, (rgb * weights).sum(0).add_(1).mul_((2**self._bits - 1) / 2).round_())
            return frame
        luma, chroma = self._settle(rgb) if self._settled else self._codes(rgb)
        _fill(frame, 0, luma)
        for component in (1, 2):
            _fill(frame, component, chroma[component - 1])
        frame.colorspace, frame.color_range = BT709, ColorRange.MPEG  # ProRes asks each frame, not the stream
        for tag in ("color_primaries", "color_trc"):
            if hasattr(frame, tag):  # older PyAV has neither
                setattr(frame, tag, BT709)
        return frame

    def _codes(self, rgb: Tensor) -> tuple[Tensor, Tensor]:
        """Luma (h, w) and chroma (2, h, w)."""
        luma = self._coding.luma(rgb)
        chroma = self._coding.chroma(rgb, luma)
        down, across = _ratios(self._format)
        chroma = halved(chroma, down=down == 2, across=across == 2, cosited=(False, True))
        return self._coding.rounded(luma), self._coding.rounded(chroma)

    def _settle(self, rgb: Tensor) -> tuple[Tensor, Tensor]:
        luma, chroma, wide, exact = self._nearest(rgb)
        if not exact:  # what is seen of the codes, which are a little beyond RGB, has exact ones
            luma, chroma, _, _ = self._nearest(self._coding.to_rgb(luma, *wide))
        return luma, chroma

    def _nearest(self, rgb: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
        """The nearest codes of colours that RGB has; the enlarged chroma; whether there were some everywhere."""
        luma, chroma = self._codes(rgb)
        chroma = self._coding.visible(chroma)
        down, across = _ratios(self._format)
        wide = enlarged(chroma, *luma.shape, down=down, across=across, cosited=(False, True))
        low, high = self._coding.luma_range(wide)
        none, middle = low > high, (low + high).div_(2).round_()
        luma = luma.maximum(torch.where(none, middle, low)).minimum(torch.where(none, middle, high))
        return luma, chroma, wide, not bool(none.any())


def _fill(frame: VideoFrame, number: int, codes: Tensor) -> None:
    """Write whole code values (h, w) into a plane."""
    plane = frame.planes[number]
    bits = frame.format.components[0].bits
    kind = np.dtype(np.uint8 if bits <= 8 else ">u2" if frame.format.is_big_endian else "<u2")
    rows = _rows(plane)
    stored: Sequence[int] = codes.shape
    rows[: stored[0], : stored[1] * kind.itemsize] = np.ascontiguousarray(codes.cpu().numpy().astype(kind)).view(
        np.uint8
    )
