"""Writing frames as pictures: one, or a numbered sequence."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import av
from av.error import FFmpegError
from av.video.codeccontext import VideoCodecContext
from PIL import Image
from torch import Tensor

from ..atomic import atomic_write, remove
from ..door.output import to_uint8
from ..errors import VideoError
from .opening import reason
from .pixels import FromRGB
from .writer import checked

PICTURE_SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".webp", ".bmp")
_DEEP = {".png": ("png", "rgb48be"), ".tif": ("tiff", "rgb48le"), ".tiff": ("tiff", "rgb48le")}
_NUMBER = re.compile(r"%0?(\d*)d")
_QUALITY: dict[str, dict[str, Any]] = {".jpg": {"quality": 95, "subsampling": 0}, ".webp": {"quality": 95}}


def is_picture(path: Path) -> bool:
    """Whether the name is one of a picture, or of a sequence of them."""
    return path.suffix.lower() in PICTURE_SUFFIXES


def picture_paths(path: Path, count: int) -> list[Path]:
    """The files of `count` frames: `path` itself for one, else its %05d is filled in, from 0 on.

    Raises VideoError where several frames have only one name.
    """
    if _NUMBER.search(path.name) is None:
        if count > 1:
            numbered = path.with_name(f"{path.stem}_%05d{path.suffix}").name
            raise VideoError(
                f"{path}: {count} frames do not go into one picture; give a numbered name such as {numbered}, or a "
                "video."
            )
        return [path]
    if len(_NUMBER.findall(path.name)) > 1:
        raise VideoError(f"{path}: has several places for a number; give one, such as %05d.")

    def name(number: int) -> str:
        return _NUMBER.sub(lambda found: f"{number:0{found[1] or 0}d}", path.name)

    return [path.with_name(name(number)) for number in range(count)]


def check_depth(path: Path, bits: int | None) -> None:
    """Raise VideoError where a picture of this name cannot have so many bits per channel; None is 8."""
    suffix = path.suffix.lower()
    if (bits or 8) not in ((8, 16) if suffix in _DEEP else (8,)):
        depths = "8 or 16" if suffix in _DEEP else "8"
        raise VideoError(f"{path}: a {suffix[1:]} picture has {depths} bits, and {bits} were asked for.")


class PictureWriter:
    """Writes `count` frames of `size` = (height, width) as pictures; each is seen under its name when it is complete.

    A context manager; after an error the pictures that were written are removed. bits: 8, or 16 in PNG and TIFF.
    Raises `VideoError` for a name or depth it cannot write, a wrong shape or values that are no numbers.
    """

    def __init__(self, path: Path, *, size: tuple[int, int], count: int, bits: int | None = None) -> None:
        self._name, self._size, self._suffix = str(path), size, path.suffix.lower()
        self._paths = picture_paths(path, count)
        self._bits = bits or 8
        check_depth(path, bits)
        if not path.parent.is_dir():
            raise VideoError(f"{path}: cannot be written there (no such folder); choose another place.")
        self._encode = None if self._bits == 8 else FromRGB(_DEEP[self._suffix][1], size)
        self.frames = 0
        self.told: list[str] = []

    def __enter__(self) -> PictureWriter:
        return self

    def write(self, frames: Tensor) -> None:
        """Append (1, 3, t, H, W) frames, RGB in [-1, 1]; values outside are clamped."""
        for image in frames[0].detach().unbind(1):  # c h w
            self._save(checked(image, self._name, self.frames))

    def write_pixels(self, frames: Tensor) -> None:
        """Append (t, H, W, 3) frames, RGB, uint8."""
        for image in frames.cpu().unbind(0):  # h w c
            if self._encode is not None:
                self._save(image.permute(2, 0, 1).float().mul_(2 / 255).sub_(1))
            else:
                self._save_bytes(image)

    def _save(self, image: Tensor) -> None:
        if self._encode is None:
            self._save_bytes(to_uint8(image).permute(1, 2, 0).cpu())
            return
        codec = cast("VideoCodecContext", av.CodecContext.create(_DEEP[self._suffix][0], "w"))
        codec.height, codec.width = self._size
        codec.pix_fmt = _DEEP[self._suffix][1]
        codec.time_base = Fraction(1, 25)
        try:
            packets = [*codec.encode(self._encode(image)), *codec.encode(None)]
        except FFmpegError as error:
            raise VideoError(f"{self._name}: this PyAV cannot write such a picture ({reason(error)}).") from error
        with atomic_write(self._next()) as part:
            part.write_bytes(b"".join(bytes(packet) for packet in packets))
        self.frames += 1

    def _save_bytes(self, image: Tensor) -> None:
        picture = Image.fromarray(image.contiguous().numpy())
        suffix = ".jpg" if self._suffix == ".jpeg" else self._suffix
        with atomic_write(self._next()) as part:
            picture.save(part, **_QUALITY.get(suffix, {}))
        self.frames += 1

    def _next(self) -> Path:
        if self.frames >= len(self._paths):
            raise VideoError(f"{self._name}: more frames came than the {len(self._paths)} that were announced.")
        return self._paths[self.frames]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for path in self._paths[: self.frames]:
                remove(path)
        elif not self.frames:
            raise VideoError(f"{self._name}: no frame was given to write.")
