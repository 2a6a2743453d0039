"""The header of a latent file: what it says of its video, checked both ways."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Literal

import torch

from ..errors import LatentFileError
from ..families import FAMILIES, Compression
from ..weights.headers import UnreadableError

TENSOR, TIMES = "latent_tbchw", "frame_times"
FORMAT = "cviv-vae latent"
VERSIONS = ("1", "2")  # the second has frame times
LAYOUT = "t b c h w"
ClipLayout = Literal["frames", "video", "images"]
_LAYOUTS: dict[str, ClipLayout] = {"frames": "frames", "video": "video", "images": "images"}
RESERVED = frozenset(  # names of the format's own texts
    {"format", "format_version", "layout", "family", "channels", "scaled", "fps", "frames", "height", "width"}
) | {"start", "audio", "clip_layout", "aspect", "time_base"}
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
AGAIN = "Encode the video again."
_MOST_UNITS = 10**9  # per second, of frame times


@dataclass(frozen=True, kw_only=True)
class LatentMeta:
    """What a latent file says of its video.

    family: of the VAE that made the latent. fps: frames per second, exact. frames, height, width: true length and size
    in frames and pixels, before any padding. aspect: width to height of one pixel. times: when each frame is shown, in
    seconds from 0 on, and when the last one ends, `frames` + 1 in all; None where all are 1 / fps apart. audio: name of
    the file with the sound, in the same folder, or None. start: index of the first encoded frame in the source.
    clip_layout: how the program that saved it held the latent: frames on the batch axis, a video of five axes, separate
    images on the batch axis, or None. extra: other texts of that program. `scaled` follows from the family: IV-VAE
    latents have their scale and shift applied, CV-VAE latents do not.
    """

    family: str
    fps: Fraction
    frames: int
    height: int
    width: int
    aspect: Fraction = Fraction(1)
    times: tuple[Fraction, ...] | None = None
    audio: str | None = None
    start: int = 0
    clip_layout: ClipLayout | None = None
    extra: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)

    @property
    def compression(self) -> Compression:
        """Of the VAE that made it."""
        return FAMILIES[self.family].compression

    @property
    def scaled(self) -> bool:
        """Whether scale and shift are applied to the stored values."""
        return FAMILIES[self.family].scaled

    @property
    def time_base(self) -> Fraction:
        """The unit in which times are stored, seconds."""
        return Fraction(1, math.lcm(*(time.denominator for time in self.times or ()))) if self.times else Fraction(1)

    def stamps(self) -> torch.Tensor:
        """The times in units of `time_base`, int64."""
        return torch.tensor([int(time / self.time_base) for time in self.times or ()], dtype=torch.int64)


def header_bytes(shape: tuple[int, ...], dtype: torch.dtype, meta: LatentMeta, *, size: int | None) -> bytes:
    """A safetensors header for the latent, and its times, padded with spaces to `size`, or to whole 64 bytes."""
    count = dtype.itemsize * math.prod(shape)
    metadata = {
        "format": FORMAT,
        "format_version": VERSIONS[meta.times is not None],
        "layout": LAYOUT,
        "family": meta.family,
        "channels": str(shape[2]),
        "scaled": str(meta.scaled).lower(),
        "fps": str(meta.fps),
        "frames": str(meta.frames),
        "height": str(meta.height),
        "width": str(meta.width),
        "start": str(meta.start),
    }
    if meta.aspect != 1:
        metadata["aspect"] = str(meta.aspect)
    if meta.audio is not None:
        metadata["audio"] = meta.audio
    if meta.clip_layout is not None:
        metadata["clip_layout"] = meta.clip_layout
    entries: dict[str, object] = {TENSOR: {"dtype": NAMES[dtype], "shape": shape, "data_offsets": (0, count)}}
    if meta.times is not None:
        metadata["time_base"] = str(meta.time_base)
        span = (count, count + 8 * (meta.frames + 1))
        entries[TIMES] = {"dtype": "I64", "shape": (meta.frames + 1,), "data_offsets": span}
    text = json.dumps({"__metadata__": metadata | dict(meta.extra), **entries}).encode("ascii")
    size = size or -(-(8 + len(text)) // 64) * 64
    return (size - 8).to_bytes(8, "little") + text.ljust(size - 8)


def read_meta(texts: dict[str, str]) -> LatentMeta:
    """What the texts of a header say, but for the times. Raises UnreadableError or LatentFileError if it is wrong."""
    if texts.get("format") != FORMAT:
        raise UnreadableError(f"is not a latent file: its format is {shown(texts.get('format'))}, not {FORMAT!r}.")
    if texts.get("format_version") not in VERSIONS:
        raise UnreadableError(
            f"has version {shown(texts.get('format_version'))} of the latent format; versions {' and '.join(VERSIONS)} "
            "are known here. Update cviv-vae."
        )
    if texts.get("layout") != LAYOUT:
        raise UnreadableError(f"has its axes in the order {shown(texts.get('layout'))}; known is {LAYOUT!r}. {AGAIN}")
    family = texts.get("family", "")
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnreadableError(f"is of the family {shown(texts.get('family'))}; known are {known}. {AGAIN}")
    if texts.get("scaled") != str(FAMILIES[family].scaled).lower():
        raise UnreadableError(
            f"says scaled = {shown(texts.get('scaled'))}, which latents of {family} never are. {AGAIN}"
        )
    try:
        meta = LatentMeta(
            family=family,
            fps=_fraction(texts, "fps"),
            frames=_whole(texts, "frames"),
            height=_whole(texts, "height"),
            width=_whole(texts, "width"),
            aspect=_fraction(texts, "aspect") if "aspect" in texts else Fraction(1),
            audio=texts.get("audio"),
            start=_whole(texts, "start"),
            clip_layout=_LAYOUTS.get(texts.get("clip_layout", "")),
            extra={name: text for name, text in texts.items() if name not in RESERVED},
        )
    except ValueError as error:
        raise UnreadableError(f"has damaged metadata: {error}. {AGAIN}") from error
    check_meta(meta)
    return meta


def read_times(texts: dict[str, str], stamps: torch.Tensor) -> tuple[Fraction, ...]:
    """The times of a file. Raises UnreadableError where they are none."""
    try:
        unit = _fraction(texts, "time_base")
    except ValueError as error:
        raise UnreadableError(f"has damaged metadata: {error}. {AGAIN}") from error
    return tuple(stamp * unit for stamp in stamps.tolist())


def check_channels(texts: dict[str, str], channels: int) -> None:
    """Raise UnreadableError or LatentFileError unless the texts name as many channels."""
    try:
        said = _whole(texts, "channels")
    except ValueError as error:
        raise UnreadableError(f"has damaged metadata: {error}. {AGAIN}") from error
    if said != channels:
        raise LatentFileError(f"It says it has {said} channels, and has {channels}.")


def check_meta(meta: LatentMeta) -> None:
    """Raise LatentFileError for numbers and texts that no video has."""
    if meta.fps <= 0 or meta.aspect <= 0 or meta.frames < 1 or meta.height < 1 or meta.width < 1 or meta.start < 0:
        raise LatentFileError(
            f"fps, aspect, frames, height and width are above 0 and start is not negative; got fps {meta.fps}, aspect "
            f"{meta.aspect}, {meta.frames} frames of {meta.width}x{meta.height}, start {meta.start}."
        )
    if meta.audio is not None and (not _is_text(meta.audio) or PurePosixPath(meta.audio).name != meta.audio):
        raise LatentFileError(
            f"The sound is said to be in {meta.audio!r}; it lies in the folder of the latent file, and its name has no "
            "path."
        )
    for name, text in meta.extra.items():
        if name in RESERVED or not _is_text(name) or not _is_text(text):
            raise LatentFileError(
                f"The extra text {name!r} cannot be saved: it has a name of the format itself, or is not valid text."
            )


def check_times(meta: LatentMeta) -> None:
    """Raise LatentFileError unless the times are those of as many frames."""
    times = meta.times
    if times is None:
        return
    rising = all(later > earlier for earlier, later in itertools.pairwise(times))
    if len(times) != meta.frames + 1 or times[0] != 0 or not rising or meta.time_base < Fraction(1, _MOST_UNITS):
        raise LatentFileError(
            f"{meta.frames} frames have {meta.frames + 1} times, rising from 0, the last when the video ends; got "
            f"{len(times)}{' that do not rise from 0 or are too fine' if len(times) == meta.frames + 1 else ''}."
        )


def check_shape(shape: tuple[int, ...], meta: LatentMeta) -> None:
    """Raise LatentFileError unless a latent of `shape`, t b c h w as stored, is one of such a video."""
    if len(shape) != 5 or 0 in shape:
        raise LatentFileError(f"A latent has five axes ({LAYOUT}), none of them empty; got shape {shape}.")
    t, b, c, h, w = shape
    check_size((b, c, h, w), meta)
    time, longest = meta.compression.time, meta.compression.pixel_frames(t)
    if not max(1, longest - time + 1) <= meta.frames <= longest:
        raise LatentFileError(
            f"{t} latent frames make {longest} frames, {time - 1} of which may be padding; the video is said to have "
            f"{meta.frames}."
        )


def check_size(shape: tuple[int, int, int, int], meta: LatentMeta) -> None:
    """The same for b c h w alone."""
    *_, h, w = shape
    space = meta.compression.space
    if not (space * (h - 1) < meta.height <= space * h and space * (w - 1) < meta.width <= space * w):
        raise LatentFileError(
            f"A latent of {w}x{h} makes pictures of {space * w}x{space * h}, up to {space - 1} of each side may be "
            f"padding; the video is said to be {meta.width}x{meta.height}."
        )


def shown(text: str | None) -> str:
    """A text of the header in a message."""
    return "missing" if text is None else repr(text[:60])


def _whole(texts: Mapping[str, str], name: str) -> int:
    text = texts.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise ValueError(f"{name} is {shown(texts.get(name))}, not a whole number")
    return int(text)


def _fraction(texts: Mapping[str, str], name: str) -> Fraction:
    numerator, _, denominator = texts.get(name, "").partition("/")
    parts = {name: numerator, f"{name} denominator": denominator or "1"}
    bottom = _whole(parts, f"{name} denominator")
    if bottom == 0:
        raise ValueError(f"{name} has a denominator of 0")
    return Fraction(_whole(parts, name), bottom)


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
