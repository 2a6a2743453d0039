"""Where results go and how they are stored, checked before any work; what of a video a picture does not hold."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from ..atomic import LONGEST_NAME
from ..media.codecs import Codec, check_output_name, choose
from ..media.pictures import check_depth, is_picture, picture_paths
from .guard import UserError

_NO_UTF8 = re.compile("[\ud800-\udfff]")  # how Python shows other bytes of a name


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a result is stored; None for what is usual."""

    crf: float | None = None
    codec: Codec | None = None
    bits: int | None = None
    pix_fmt: str | None = None

    @property
    def deep(self) -> bool:
        """Whether it has more than 8 bits."""
        return self.bits not in (None, 8)

    def check(self, path: Path, size: tuple[int, int]) -> None:
        """Raise UserError or VideoError for a name or a choice that frames of `size` cannot be written with."""
        if not is_picture(path):
            check_output_name(path)
            choose(str(path), path.suffix.lower(), size, self.codec, self.bits, self.pix_fmt, self.crf)
            return
        if self.crf is not None or self.codec is not None or self.pix_fmt is not None:
            raise UserError(f"{path} is a picture: --crf, --codec and --pix-fmt are of videos; leave them out.")
        check_depth(path, self.bits)


def lost_in_pictures(path: Path, *, sound: bool, times: bool, aspect: Fraction) -> Iterator[str]:
    """What a video has and its frames as pictures do not, in sentences; nothing where `path` is a video."""
    if not is_picture(path):
        return
    if sound:
        yield "Pictures hold no sound; it is left out."
    if times:
        yield "Pictures hold no times; those of the frames are left out."
    if aspect != 1:
        yield f"Pictures hold no pixel shape; the {aspect.numerator}:{aspect.denominator} of the video is left out."


def check_outputs(
    paths: Iterable[Path], *, overwrite: bool, inputs: Iterable[Path] = (), frames: int | None = None
) -> None:
    """Raise UserError, before any work, where an output cannot or must not be written.

    frames: how many there are, for outputs that are pictures.
    """
    sources = {os.path.realpath(source) for source in inputs}
    for path in paths:
        if os.path.realpath(path) in sources:
            raise UserError(f"{path} is the input itself; choose another -o.")
        if path.suffix.lower() == ".safetensors" and _NO_UTF8.search(path.name):
            raise UserError(
                f"{path} is a name that is no UTF-8, which the safetensors library cannot open; choose another -o."
            )
        if path.is_dir():
            raise UserError(f"{path} is a folder; give a file name with -o.")
        if not path.parent.is_dir():
            raise UserError(f"{path.parent} is no folder; make it first, or choose another -o.")
        made = picture_paths(path, frames) if frames is not None and is_picture(path) else [path]
        there = next((file for file in made if file.exists()), None)
        if there is not None and not overwrite:
            raise UserError(f"{there} exists already; add --overwrite to replace it, or choose another -o.")


def fitting(stem: str, ending: str, spare: int = 0) -> str:
    """A file name of `stem` and `ending` that is not longer than file systems take, with `spare` bytes left.

    What of `stem` is no UTF-8 becomes "_".
    """
    stem = _NO_UTF8.sub("_", stem)
    room = LONGEST_NAME - len(os.fsencode(ending)) - spare
    while len(os.fsencode(stem)) > room:
        stem = stem[:-1]
    return stem + ending
