"""The latent file: the latent of one video with what is needed to show it again. It is read and written in chunks.

A latent file is a safetensors file with the tensor `latent_tbchw`, of shape (T', B, z, h, w): time comes first, unlike
everywhere else in this package, so that chunks in time lie one after another in the file and can be appended while the
length is unknown. The metadata says so (`layout`), and names the tensor's family, frames and size; see LatentMeta.
Where the frames have times of their own, a second tensor, `frame_times`, holds them. The sound lies beside it in a
Matroska file of its own, NAME.sound.mka, in which the picture begins at 1 s. Nothing in a file names a place of the
machine that made it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import safetensors
import torch
from einops import rearrange
from torch import Tensor

from ..atomic import give_name, hidden, remove
from ..errors import LatentFileError
from ..families import FAMILIES, family_of
from ..weights.detect import describe_foreign
from ..weights.headers import HEADER_LIMIT, Header, UnreadableError, brief, open_safetensors, read_header, sniff
from .latent_header import (
    AGAIN,
    DTYPES,
    LAYOUT,
    NAMES,
    RESERVED,
    TENSOR,
    TIMES,
    ClipLayout,
    LatentMeta,
    check_channels,
    check_meta,
    check_shape,
    check_size,
    check_times,
    header_bytes,
    read_meta,
    read_times,
)

__all__ = [
    "LAYOUT", "RESERVED", "TENSOR", "LatentFile", "LatentMeta", "LatentWriter", "open_latent", "save_latent"
]  # fmt: skip
_LARGEST = 10**15  # room for numbers in a header whose real ones are not known yet
SOUND_ENDING = ".sound.mka"


class LatentWriter:
    """Writes a latent file chunk by chunk, holding none of them; use it as a context manager.

        with LatentWriter(path, family="cv-vae", fps=Fraction(24), height=570, width=1000) as writer:
            for chunk in vae.encode_stream(frames, pad=True):  # b z t h w
                writer.write(chunk)
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
        aspect: Fraction = Fraction(1),
        times: Sequence[Fraction] | None = None,
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
            aspect=aspect,
            times=None if times is None else tuple(times),
            audio=audio,
            start=start,
            clip_layout=clip_layout,
            extra=dict(extra or {}),
        )
        check_meta(self._meta)
        self._part = hidden(self.path)
        self._file: BinaryIO | None = None
        self._shape: tuple[int, int, int, int] | None = None  # b c h w
        self._dtype = torch.float32
        self._length = 0

    def __enter__(self) -> LatentWriter:
        return self

    def write(self, chunk: Tensor) -> None:
        """Append `chunk`, (b, z, t, h, w), float16, bfloat16, float32 or float64, as all chunks of the file."""
        if self._shape is None:
            self._begin(chunk)
        b, c, h, w = self._shape or (0, 0, 0, 0)
        if chunk.ndim != 5 or (*chunk.shape[:2], *chunk.shape[3:]) != (b, c, h, w) or chunk.dtype != self._dtype:
            raise LatentFileError(
                f"A chunk of the latent has shape {tuple(chunk.shape)} and {chunk.dtype}; the first one asks for "
                f"({b}, {c}, any, {h}, {w}) and {self._dtype}."
            )
        data = rearrange(chunk.detach(), "b c t h w -> t b c h w").contiguous().cpu()
        if data.numel():
            self._open_file().write(data.view(torch.uint8).numpy().data)
        self._length += data.shape[0]

    def finish(self, *, frames: int) -> LatentMeta:
        """Give the file its name. frames: how many the video really has, without padding. Returns the metadata."""
        if self._shape is None:
            raise LatentFileError("There is no latent to save: write at least one chunk before finish.")
        meta = replace(self._meta, frames=frames)
        b, c, h, w = self._shape
        shape = (self._length, b, c, h, w)
        check_meta(meta)
        check_shape(shape, meta)
        check_times(meta)
        file = self._open_file()
        if meta.times is not None:
            file.write(meta.stamps().numpy().astype("<i8").tobytes())
        file.seek(0)
        file.write(header_bytes(shape, self._dtype, meta, size=self._header_size))
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

    def _begin(self, chunk: Tensor) -> None:
        if chunk.ndim != 5 or chunk.dtype not in NAMES or not chunk.numel():
            raise LatentFileError(
                f"A latent has shape (b, z, t, h, w) and float16, bfloat16, float32 or float64; got "
                f"{tuple(chunk.shape)} and {chunk.dtype}."
            )
        b, c, _, h, w = chunk.shape
        check_size((b, c, h, w), self._meta)
        self._dtype = chunk.dtype
        largest = replace(self._meta, frames=_LARGEST)
        header = header_bytes((_LARGEST, b, c, h, w), self._dtype, largest, size=None)
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

    def chunks(self, size: int = 4) -> Iterator[Tensor]:
        """The latent as chunks of up to `size` latent frames, (b, z, t, h, w); holds one chunk."""
        if size < 1:
            raise LatentFileError(f"The size of a chunk is {size} latent frames; give 1 or more.")
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
        times, begin = self.meta.times, compression.time * first
        if times is not None:
            times = tuple(time - times[begin] for time in times[begin : begin + frames + 1])
        return replace(self.meta, frames=frames, times=times, start=self.meta.start + begin)

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
        aspect=meta.aspect,
        times=meta.times,
        audio=meta.audio,
        start=meta.start,
        clip_layout=meta.clip_layout,
        extra=meta.extra,
    ) as writer:
        writer.write(latent)
        writer.finish(frames=meta.frames)


def open_latent(path: str | os.PathLike[str]) -> LatentFile:
    """Open a latent file; its values are read by `chunks` or `read`, and are not checked.

    Raises LatentFileError when it is no latent file (saying what it seems to be), is damaged, or disagrees with its
    own metadata.
    """
    path = Path(path)
    try:
        kind = sniff(path)
        if kind != "safetensors":
            raise UnreadableError("is a PyTorch or zip file, not a latent file: give one that `encode` wrote.")
        header = read_header(path)
        if TENSOR not in header.shapes or not set(header.shapes) <= {TENSOR, TIMES}:
            raise UnreadableError(_not_a_latent(header))
        meta = read_meta(header.metadata)
        shape, dtype = header.shapes[TENSOR], header.dtypes[TENSOR]
        if dtype not in DTYPES:
            raise UnreadableError(f"has a latent of type {dtype}; known are {', '.join(DTYPES)}. {AGAIN}")
        check_shape(shape, meta)
        check_channels(header.metadata, shape[2])
        with open_safetensors(path) as file:  # which has checks of the header of its own
            if TIMES in header.shapes:
                if (header.dtypes[TIMES], header.shapes[TIMES]) != ("I64", (meta.frames + 1,)):
                    raise UnreadableError(f"has frame times of another shape than its frames. {AGAIN}")
                meta = replace(meta, times=read_times(header.metadata, file.get_tensor(TIMES)))
                check_times(meta)
    except (UnreadableError, safetensors.SafetensorError, OSError) as error:
        raise LatentFileError(f"{path}: {error}") from error
    except LatentFileError as error:
        raise LatentFileError(f"{path}: is damaged or was altered. {error}") from error
    t, b, c, h, w = shape
    return LatentFile(path=path, meta=meta, shape=(b, c, t, h, w), dtype=DTYPES[dtype])


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


def sound_name(latent: Path) -> str:
    """The name of the file beside `latent` that holds its sound."""
    return f"{latent.name.removesuffix('.safetensors')}{SOUND_ENDING}"
