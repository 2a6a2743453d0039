"""What goes into which container: codecs, pixel formats and qualities of videos that are written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import torch
from av.codec.codec import UnknownCodecError

from ..errors import VideoError

Codec = Literal["h264", "vp9", "av1", "prores", "ffv1"]
Container = Literal["mp4", "mov", "mkv", "webm"]
CODECS: tuple[Codec, ...] = ("h264", "vp9", "av1", "prores", "ffv1")
ENCODERS: dict[Codec, str] = {
    "h264": "libx264", "vp9": "libvpx-vp9", "av1": "libsvtav1", "prores": "prores_ks", "ffv1": "ffv1",
}  # fmt: skip
MUXERS = {".mp4": "mp4", ".m4v": "ipod", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
_ALLOWED: dict[str, tuple[Codec, ...]] = {  # the first is the default
    ".mp4": ("h264", "av1", "vp9"),
    ".m4v": ("h264",),
    ".mov": ("h264", "prores"),
    ".mkv": ("h264", "av1", "vp9", "ffv1", "prores"),
    ".webm": ("vp9", "av1"),
}
OUTPUT_SUFFIXES = tuple(_ALLOWED)
DEFAULT_CRF = 16.0
_WORST = {"h264": 51, "vp9": 63, "av1": 63}
_DEPTHS: dict[Codec, tuple[int, ...]] = {"prores": (10,), "ffv1": (8, 10, 16)}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a video is written. made: the format of the frames that are made; pix_fmt: that of the encoder; lossless:
    whether it keeps every code."""

    codec: Codec
    pix_fmt: str
    made: str
    lossless: bool
    options: dict[str, str]


def choose(
    name: str, suffix: str, size: tuple[int, int], codec: Codec | None, bits: int | None, pix_fmt: str | None,
    crf: float | None,
) -> Choice:  # fmt: skip
    """Check and complete a choice. name: of the file, for messages. Raises `VideoError` for what cannot be written."""
    allowed = _ALLOWED[suffix]
    if codec is not None and codec not in allowed:
        raise VideoError(
            f"{name}: {codec} video does not go into {suffix[1:]}; choose {' or '.join(allowed)}, or another container."
        )
    codec = codec or allowed[0]
    form = _pix_fmt(name, codec, size, bits, pix_fmt)
    made = "rgb24" if form == "bgr0" else form
    lossless = codec == "ffv1" or crf == 0
    return Choice(codec=codec, pix_fmt=form, made=made, lossless=lossless, options=_quality(codec, crf, form, name))


def _pix_fmt(name: str, codec: Codec, size: tuple[int, int], bits: int | None, asked: str | None) -> str:
    try:
        known = [form.name for form in av.Codec(ENCODERS[codec], "w").video_formats or ()]
    except UnknownCodecError as error:
        raise VideoError(f"{name}: this PyAV cannot write {codec}; choose another codec or update av.") from error
    if asked is not None and asked not in known:
        writable = ", ".join(form for form in known if _can_be_made(form))
        raise VideoError(f"{name}: {codec} video is not written as {asked}; choose {writable}.")
    depths = _DEPTHS.get(codec, (8, 10))
    bits = bits or (_bits(asked) if asked else depths[0])
    form = asked or _usual(codec, size, bits)
    if asked is None and (bits not in depths or form not in known):
        fitting = " or ".join(str(depth) for depth in depths if _usual(codec, size, depth) in known)
        raise VideoError(f"{name}: {codec} video with {bits} bits cannot be written here; choose {fitting} bits.")
    if asked is not None:
        writable = [form for form in known if _can_be_made(form)]
        if asked not in writable:
            raise VideoError(f"{name}: {codec} video is not written as {asked}; choose {', '.join(writable)}.")
        if _bits(asked) != bits:
            raise VideoError(f"{name}: {asked} has {_bits(asked)} bits and {bits} were asked for; give one of the two.")
    halves = (form.startswith("yuv420"), form.startswith(("yuv420", "yuv422")))
    if codec != "av1" and any(half and side % 2 for half, side in zip(halves, size, strict=True)):
        raise VideoError(
            f"{name}: {form} has half the colour samples, so its sides are even, and the picture is "
            f"{size[1]}x{size[0]}; choose a yuv444p format."
        )
    return form


def _usual(codec: Codec, size: tuple[int, int], bits: int) -> str:
    if codec == "ffv1":
        return {8: "bgr0", 10: "gbrp10le"}.get(bits, "gbrp16le")
    if codec == "prores":
        return "yuv444p10le" if size[1] % 2 else "yuv422p10le"
    odd = any(side % 2 for side in size) and codec != "av1"
    return ("yuv444p" if odd else "yuv420p") + ("" if bits == 8 else f"{bits}le")


def _can_be_made(form: str) -> bool:
    planar = form.startswith(("yuv420p", "yuv422p", "yuv444p", "gbrp")) and not form.endswith("be")
    return (planar and "msb" not in form and "f32" not in form and "f16" not in form) or form in (
        "bgr0",
        "gray",
        "gray10le",
    )


def _bits(form: str) -> int:
    return av.VideoFormat(form, 16, 16).components[0].bits


def _quality(codec: Codec, crf: float | None, form: str, name: str) -> dict[str, str]:
    """The encoder's options."""
    if codec in ("prores", "ffv1"):
        if crf is not None:
            raise VideoError(f"{name}: {codec} has no quality crf; leave it out.")
        if codec == "ffv1":
            return {"level": "3", "slicecrc": "1"}
        return {"profile": "4444" if form.startswith("yuv444") else "hq", "vendor": "apl0"}
    crf = DEFAULT_CRF if crf is None else crf
    worst = _WORST[codec]
    if not 0 <= crf <= worst:
        raise VideoError(f"{name}: the quality crf is {crf:g}; {codec} takes 0 (lossless) to {worst}.")
    if codec == "h264":
        quality = {"crf": f"{crf:g}"} if crf else {"qp": "0"}  # crf 0 is lossless with 8 bits alone
        return quality | {"preset": "medium"} | _repeatable()
    if codec == "vp9":
        return {"crf": f"{crf:g}", "b": "0", "cpu-used": "4"} | ({} if crf else {"lossless": "1"})
    lossless = {} if crf else {"svtav1-params": "lossless=1"}  # crf 0 would be its default
    return {"preset": "8", "crf": f"{crf or 1:g}"} | lossless


def _repeatable() -> dict[str, str]:
    """Options by which x264 writes the same file twice: its functions for AVX-512 (mbtree) do not, in 8 bits, where
    a frame is not a multiple of 256 pixels wide."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return {"x264-params": "asm=avx2"} if wide else {}


def check_output_name(path: Path) -> None:
    """Raise `VideoError` unless the name ends in a suffix that can be written."""
    if path.suffix.lower() not in OUTPUT_SUFFIXES:
        raise VideoError(
            f"{path}: cannot tell which kind of video to write; end the name in one of {', '.join(OUTPUT_SUFFIXES)}."
        )
