"""The latent file: the latent of one video with what is needed to show it again. It is read and written in pieces.

A latent file is a safetensors file with one tensor, `latent_tbchw`, of shape (T', B, z, h, w): time comes first, unlike
everywhere else in this package, so that pieces in time lie one after another in the file and can be appended while the
length is unknown. The metadata says so (`layout`), and names the tensor's family, frames and size; see LatentMeta.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal

import safetensors
import torch
from einops import rearrange
from torch import Tensor

from ..atomic import give_name, hidden, remove
from ..errors import LatentFileError
from ..families import FAMILIES, Compression, family_of
from ..weights.detect import describe_foreign
from ..weights.headers import HEADER_LIMIT, Header, UnreadableError, brief, open_safetensors, read_header, sniff

TENSOR = "latent_tbchw"
FORMAT = "cviv-vae latent"
VERSION = "1"
LAYOUT = "t b c h w"
ClipLayout = Literal["frames", "video", "images"]
_LAYOUTS: dict[str, ClipLayout] = {"frames": "frames", "video": "video", "images": "images"}
RESERVED = frozenset(  # names of the format's own texts
    {"format", "format_version", "layout", "family", "channels", "scaled", "fps", "frames", "height", "width"}
) | {"start", "audio", "clip_layout"}
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LARGEST = 10**15  # room for numbers in a header whose real ones are not known yet
_AGAIN = "Encode the video again."


@dataclass(frozen=True, kw_only=True)
class LatentMeta:
    """What a latent file says of its video.

    family: of the VAE that made the latent. fps: frames per second, exact. frames, height, width: true length and size
    in frames and pixels, before any padding. audio: path of the file the sound comes from, or None.
    start: index of the first encoded frame in that source. clip_layout: how the program that saved it held the latent:
    frames on the batch axis, a video of five axes, separate images on the batch axis, or None. extra: other texts of
    that program. `scaled` follows from the family: IV-VAE latents have their scale and shift applied, CV-VAE latents do
    not.
    """

    family: str
    fps: Fraction
    frames: int
    height: int
    width: int
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


class LatentWriter:
    """Writes a latent file piece by piece, holding none of them; use it as a context manager.

        with LatentWriter(path, family="cv-vae", fps=Fraction(24), height=570, width=1000) as writer:
            for piece in vae.encode_stream(frames, pad=True):  # b z t h w
                writer.write(piece)
            writer.finish(frames=96)

    The bytes go to a hidden file in the same folder, which takes the name `path` in `finish` and is removed when the
    block is left before that, also by Ctrl-C. Raises LatentFileError for latents that do not belong in such a file, and
    OSError where the disk fails.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        family: str,
        fps: Fraction,
        height: int,
        width: int,
        audio: str | None = None,
        start: int = 0,
        clip_layout: ClipLayout | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        if family not in FAMILIES:
            raise LatentFileError(f"The family {family!r} is not known: give one of {', '.join(FAMILIES)}.")
        if self.path.suffix.lower() != ".safetensors":
            raise LatentFileError(
                f"A latent file is a safetensors file: end the name {self.path.name} in .safetensors."
            )
        if not self.path.parent.is_dir():
            raise LatentFileError(f"The folder {self.path.parent} does not exist: make it first, or give another one.")
        if self.path.is_dir():
            raise LatentFileError(f"{self.path} is a folder: give the name of a file.")
        self._meta = LatentMeta(
            family=family,
            fps=fps,
            frames=1,
            height=height,
            width=width,
            audio=audio,
            start=start,
            clip_layout=clip_layout,
            extra=dict(extra or {}),
        )
        _check_meta(self._meta)
        self._part = hidden(self.path)
        self._file: BinaryIO | None = None
        self._shape: tuple[int, int, int, int] | None = None  # b c h w
        self._dtype = torch.float32
        self._length = 0

    def __enter__(self) -> LatentWriter:
        return self

    def write(self, piece: Tensor) -> None:
        """Append `piece`, (b, z, t, h, w), float16, bfloat16, float32 or float64, as all pieces of the file."""
        if self._shape is None:
            self._begin(piece)
        b, c, h, w = self._shape or (0, 0, 0, 0)
        if piece.ndim != 5 or (*piece.shape[:2], *piece.shape[3:]) != (b, c, h, w) or piece.dtype != self._dtype:
            raise LatentFileError(
                f"A piece of the latent has shape {tuple(piece.shape)} and {piece.dtype}; the first one asks for "
                f"({b}, {c}, any, {h}, {w}) and {self._dtype}."
            )
        data = rearrange(piece.detach(), "b c t h w -> t b c h w").contiguous().cpu()
        if data.numel():
            self._open_file().write(data.view(torch.uint8).numpy().data)
        self._length += data.shape[0]

    def finish(self, *, frames: int) -> LatentMeta:
        """Give the file its name. frames: how many the video really has, without padding. Returns the metadata."""
        if self._shape is None:
            raise LatentFileError("There is no latent to save: write at least one piece before finish.")
        meta = replace(self._meta, frames=frames)
        b, c, h, w = self._shape
        shape = (self._length, b, c, h, w)
        _check_meta(meta)
        _check_shape(shape, meta)
        file = self._open_file()
        file.seek(0)
        file.write(_header(shape, self._dtype, meta, size=self._header_size))
        file.close()
        self._file = None
        give_name(self._part, self.path)
        return meta

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unfinished = self._file is not None or self._shape is None
        if self._file is not None:
            try:
                self._file.close()  # writes what is buffered, which a full disk refuses again
            except OSError:
                pass
            finally:
                remove(self._part)
            self._file = None
        if kind is None and unfinished:
            raise LatentFileError(f"{self.path} was not written: finish(frames=...) was not called.")

    def _begin(self, piece: Tensor) -> None:
        if piece.ndim != 5 or piece.dtype not in _NAMES or not piece.numel():
            raise LatentFileError(
                f"A latent has shape (b, z, t, h, w) and float16, bfloat16, float32 or float64; got "
                f"{tuple(piece.shape)} and {piece.dtype}."
            )
        b, c, _, h, w = piece.shape
        _check_size((b, c, h, w), self._meta)
        self._dtype = piece.dtype
        largest = replace(self._meta, frames=_LARGEST)
        header = _header((_LARGEST, b, c, h, w), self._dtype, largest, size=None)
        self._header_size = len(header)
        if self._header_size > HEADER_LIMIT:
            raise LatentFileError(
                f"The extra texts take {self._header_size:,} bytes; {HEADER_LIMIT:,} are allowed. Leave some out."
            )
        try:
            self._file = self._part.open("wb")
        except OSError as error:
            raise LatentFileError(f"{self.path} cannot be written: {error}.") from error
        self._shape = (b, c, h, w)
        self._file.write(header)

    def _open_file(self) -> BinaryIO:
        if self._file is None:
            raise LatentFileError(f"{self.path} is finished: open another LatentWriter to write more.")
        return self._file


@dataclass(frozen=True, kw_only=True)
class LatentFile:
    """An open latent file; only its header has been read.

    meta: what it says of its video. shape: (b, z, t, h, w). dtype: of the stored values.
    """

    path: Path
    meta: LatentMeta
    shape: tuple[int, int, int, int, int]
    dtype: torch.dtype

    def pieces(self, size: int = 4) -> Iterator[Tensor]:
        """The latent as pieces of up to `size` latent frames, (b, z, t, h, w); holds one piece."""
        if size < 1:
            raise LatentFileError(f"The size of a piece is {size} latent frames; give 1 or more.")
        for start in range(0, self.shape[2], size):
            yield self._part(start, min(start + size, self.shape[2]))

    def read(self, first: int = 0, count: int | None = None) -> Tensor:
        """`count` latent frames from `first` on, None for all the rest, (b, z, t, h, w), in memory of its own.

        Raises LatentFileError for a range that the file does not have.
        """
        return self._part(*self._range(first, count))

    def part_meta(self, first: int = 0, count: int | None = None) -> LatentMeta:
        """What `read(first, count)` is by itself: as the first latent of a clip stands for one frame, not four, so does
        the first of a part.
        """
        first, stop = self._range(first, count)
        compression = self.meta.compression
        frames = compression.pixel_frames(stop - first)
        if stop == self.shape[2]:
            frames = max(1, frames - (compression.pixel_frames(stop) - self.meta.frames))
        return replace(self.meta, frames=frames, start=self.meta.start + compression.time * first)

    def _range(self, first: int, count: int | None) -> tuple[int, int]:
        length = self.shape[2]
        stop = length if count is None else first + count
        if not 0 <= first < stop <= length:
            asked = "the rest" if count is None else f"{count}"
            raise LatentFileError(
                f"{self.path}: has {length} latent frames, numbered from 0; {asked} from number {first} on is not "
                "among them. Give a smaller range."
            )
        return first, stop

    def _part(self, start: int, stop: int) -> Tensor:
        try:
            with open_safetensors(self.path) as file:
                part = file.get_slice(TENSOR)[start:stop]  # t b c h w
                return rearrange(part, "t b c h w -> b c t h w").clone(memory_format=torch.contiguous_format)
        except Exception as error:  # the file was changed or removed since it was opened
            raise LatentFileError(f"{self.path}: can no longer be read ({brief(error)}).") from error


def save_latent(path: str | os.PathLike[str], latent: Tensor, meta: LatentMeta) -> None:
    """Write `latent`, (b, z, t, h, w), and `meta` as a latent file. Raises LatentFileError where they do not agree."""
    with LatentWriter(
        path,
        family=meta.family,
        fps=meta.fps,
        height=meta.height,
        width=meta.width,
        audio=meta.audio,
        start=meta.start,
        clip_layout=meta.clip_layout,
        extra=meta.extra,
    ) as writer:
        writer.write(latent)
        writer.finish(frames=meta.frames)


def open_latent(path: str | os.PathLike[str]) -> LatentFile:
    """Open a latent file; its values are read by `pieces` or `read`, and are not checked.

    Raises LatentFileError when it is no latent file (saying what it seems to be), is damaged, or disagrees with its
    own metadata.
    """
    path = Path(path)
    try:
        kind = sniff(path)
        if kind != "safetensors":
            raise UnreadableError("is a PyTorch or zip file, not a latent file: give one that `encode` wrote.")
        header = read_header(path)
        if TENSOR not in header.shapes or len(header.shapes) != 1:
            raise UnreadableError(_not_a_latent(header))
        meta = _read_meta(header.metadata)
        shape, dtype = header.shapes[TENSOR], header.dtypes[TENSOR]
        if dtype not in _DTYPES:
            raise UnreadableError(f"has a latent of type {dtype}; known are {', '.join(_DTYPES)}. {_AGAIN}")
        _check_shape(shape, meta)
        _check_channels(header.metadata, shape[2])
        with open_safetensors(path):
            pass  # the library's own checks of the header
    except (UnreadableError, safetensors.SafetensorError, OSError) as error:
        raise LatentFileError(f"{path}: {error}") from error
    except LatentFileError as error:
        raise LatentFileError(f"{path}: is damaged or was altered. {error}") from error
    t, b, c, h, w = shape
    return LatentFile(path=path, meta=meta, shape=(b, c, t, h, w), dtype=_DTYPES[dtype])


def _not_a_latent(header: Header) -> str:
    if "latent_tensor" in header.shapes:
        shape = header.shapes["latent_tensor"]
        return (
            f"is a latent saved by ComfyUI's SaveLatent, of shape {shape}, without the frames, size and family that "
            "are needed here: load it with ComfyUI's Load Latent node, or encode the video again."
        )
    family = family_of(header.shapes)
    if family is not None:
        return f"holds the weights of a VAE ({family.id}), not a latent: give a file that `encode` wrote."
    return f"is not a latent file. {describe_foreign(header.shapes).replace('CV-VAE or IV-VAE weights', 'a latent')}"


def _header(shape: tuple[int, ...], dtype: torch.dtype, meta: LatentMeta, *, size: int | None) -> bytes:
    """A safetensors header for one tensor, padded with spaces to `size`, or to whole 64 bytes."""
    count = dtype.itemsize
    for n in shape:
        count *= n
    metadata = {
        "format": FORMAT,
        "format_version": VERSION,
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
    if meta.audio is not None:
        metadata["audio"] = meta.audio
    if meta.clip_layout is not None:
        metadata["clip_layout"] = meta.clip_layout
    metadata |= meta.extra
    entry = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (0, count)}
    text = json.dumps({"__metadata__": metadata, TENSOR: entry}).encode("ascii")
    size = size or -(-(8 + len(text)) // 64) * 64
    return (size - 8).to_bytes(8, "little") + text.ljust(size - 8)


def _read_meta(texts: dict[str, str]) -> LatentMeta:
    if texts.get("format") != FORMAT:
        raise UnreadableError(f"is not a latent file: its format is {_shown(texts.get('format'))}, not {FORMAT!r}.")
    if texts.get("format_version") != VERSION:
        raise UnreadableError(
            f"has version {_shown(texts.get('format_version'))} of the latent format; version {VERSION} is known here. "
            "Update cviv-vae."
        )
    if texts.get("layout") != LAYOUT:
        raise UnreadableError(f"has its axes in the order {_shown(texts.get('layout'))}; known is {LAYOUT!r}. {_AGAIN}")
    family = texts.get("family", "")
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnreadableError(f"is of the family {_shown(texts.get('family'))}; known are {known}. {_AGAIN}")
    if texts.get("scaled") != str(FAMILIES[family].scaled).lower():
        raise UnreadableError(
            f"says scaled = {_shown(texts.get('scaled'))}, which latents of {family} never are. {_AGAIN}"
        )
    try:
        meta = LatentMeta(
            family=family,
            fps=_fraction(texts.get("fps", "")),
            frames=_whole(texts, "frames"),
            height=_whole(texts, "height"),
            width=_whole(texts, "width"),
            audio=texts.get("audio"),
            start=_whole(texts, "start"),
            clip_layout=_LAYOUTS.get(texts.get("clip_layout", "")),
            extra={name: text for name, text in texts.items() if name not in RESERVED},
        )
    except ValueError as error:
        raise UnreadableError(f"has damaged metadata: {error}. {_AGAIN}") from error
    _check_meta(meta)
    return meta


def _check_channels(texts: dict[str, str], channels: int) -> None:
    try:
        said = _whole(texts, "channels")
    except ValueError as error:
        raise UnreadableError(f"has damaged metadata: {error}. {_AGAIN}") from error
    if said != channels:
        raise LatentFileError(f"It says it has {said} channels, and has {channels}.")


def _whole(texts: dict[str, str], name: str) -> int:
    text = texts.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise ValueError(f"{name} is {_shown(texts.get(name))}, not a whole number")
    return int(text)


def _fraction(text: str) -> Fraction:
    numerator, _, denominator = text.partition("/")
    parts = {"fps": numerator, "fps denominator": denominator or "1"}
    bottom = _whole(parts, "fps denominator")
    if bottom == 0:
        raise ValueError("fps has a denominator of 0")
    return Fraction(_whole(parts, "fps"), bottom)


def _check_meta(meta: LatentMeta) -> None:
    if meta.fps <= 0 or meta.frames < 1 or meta.height < 1 or meta.width < 1 or meta.start < 0:
        raise LatentFileError(
            f"fps, frames, height and width are above 0 and start is not negative; got fps {meta.fps}, {meta.frames} "
            f"frames of {meta.width}x{meta.height}, start {meta.start}."
        )
    if not _is_text(meta.audio or ""):
        raise LatentFileError(f"The name of the audio source, {meta.audio!r}, is not valid text: rename that file.")
    for name, text in meta.extra.items():
        if name in RESERVED or not _is_text(name) or not _is_text(text):
            raise LatentFileError(
                f"The extra text {name!r} cannot be saved: it has a name of the format itself, or is not valid text."
            )


def _check_shape(shape: tuple[int, ...], meta: LatentMeta) -> None:
    """shape: t b c h w, as stored."""
    if len(shape) != 5 or 0 in shape:
        raise LatentFileError(f"A latent has five axes ({LAYOUT}), none of them empty; got shape {shape}.")
    t, b, c, h, w = shape
    _check_size((b, c, h, w), meta)
    time = meta.compression.time
    longest = meta.compression.pixel_frames(t)
    if not max(1, longest - time + 1) <= meta.frames <= longest:
        raise LatentFileError(
            f"{t} latent frames make {longest} frames, {time - 1} of which may be padding; the video is said to have "
            f"{meta.frames}."
        )


def _check_size(shape: tuple[int, int, int, int], meta: LatentMeta) -> None:
    """shape: b c h w."""
    *_, h, w = shape
    space = meta.compression.space
    if not (space * (h - 1) < meta.height <= space * h and space * (w - 1) < meta.width <= space * w):
        raise LatentFileError(
            f"A latent of {w}x{h} makes pictures of {space * w}x{space * h}, up to {space - 1} of each side may be "
            f"padding; the video is said to be {meta.width}x{meta.height}."
        )


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _shown(text: str | None) -> str:
    return "missing" if text is None else repr(text[:60])
