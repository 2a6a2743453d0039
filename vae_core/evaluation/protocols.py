"""What is looked at: size, length and stride of every clip; and the videos of a list or folder."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import VideoError
from ..media.pictures import PICTURE_SUFFIXES, is_picture
from ..media.video import read_frames
from .records import LINES, PARTS

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".gif")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One clip of every video, from frame `start`, every `stride`-th frame, `frames` of them (None: to the end).

    size: (height, width); the picture is scaled until it covers this size, smoothed, and cut to its centre. None leaves
    it as it is. note: where the numbers come from.
    """

    name: str
    size: tuple[int, int] | None = None
    frames: int | None = None
    stride: int = 1
    start: int = 0
    note: str = ""

    def __post_init__(self) -> None:
        numbers = (self.stride, self.frames or 1, *(self.size or (1, 1)))
        if min(numbers) < 1 or self.start < 0:
            raise ValueError(
                f"Got size {self.size}, {self.frames} frames, stride {self.stride}, start {self.start}; sizes, frames "
                "and stride are 1 or more, start is 0 or more."
            )

    def __str__(self) -> str:
        size = "size of the file" if self.size is None else f"{self.size[1]}x{self.size[0]}"
        frames = "all frames" if self.frames is None else f"{self.frames} frames"
        start = f", from frame {self.start}" if self.start else ""
        return f"{size}, {frames}, stride {self.stride}{start}"

    def read(self, path: Path) -> Iterator[Tensor]:
        """The clip of a video, in (1, 3, t, h, w) chunks in [-1, 1].

        A picture is a clip of one frame, whatever is asked for. Raises VideoError where the video is no video, is
        damaged or ends too early.
        """
        if is_picture(path):
            for picture in read_frames(path, 0, 1):
                yield picture if self.size is None else cover(picture, self.size)
            return
        count = 0
        last = None if self.frames is None else 1 + (self.frames - 1) * self.stride
        at = 0
        for chunk in read_frames(path, self.start, last):
            first = -at % self.stride
            at += chunk.shape[2]
            if first < chunk.shape[2]:
                taken = chunk[:, :, first :: self.stride]
                count += taken.shape[2]
                yield taken if self.size is None else cover(taken, self.size)
        if self.frames is not None and count < self.frames:
            raise VideoError(
                f"{path}: has {self.start + at} frames; {self.frames} at stride {self.stride} need "
                f"{self.start + 1 + (self.frames - 1) * self.stride}. Ask for fewer, or leave it out."
            )


_OURS = "The size is the published one; length and stride are not published and chosen here."
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(name="webvid", size=(256, 256), frames=33, stride=3, note="CV-VAE's protocol on WebVid."),
        Protocol(name="coco", size=(256, 256), frames=1, note="Pictures, as CV-VAE is measured on COCO; chosen here."),
        Protocol(name="kinetics-600", size=(256, 256), frames=33, note="Size, length and stride are chosen here."),
        Protocol(name="activitynet", size=(256, 256), frames=33, note="Size, length and stride are chosen here."),
        Protocol(name="480p", size=(480, 848), frames=33, note=_OURS),
        Protocol(name="720p", size=(720, 1280), frames=33, note=_OURS),
        Protocol(name="1080p", size=(1080, 1920), frames=33, note=_OURS),
    )
}


def cover(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """(b, 3, t, h, w) scaled until it covers `size` (bicubic, smoothed), then cut to its centre."""
    height, width = frames.shape[-2:]
    if (height, width) == size:
        return frames
    scale = max(size[0] / height, size[1] / width)
    scaled = [max(wanted, round(side * scale)) for side, wanted in zip((height, width), size, strict=True)]
    flat = frames.transpose(1, 2).flatten(0, 1)  # (b t) c h w
    flat = F.interpolate(flat, scaled, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    top, left = ((side - wanted) // 2 for side, wanted in zip(scaled, size, strict=True))
    flat = flat[..., top : top + size[0], left : left + size[1]]
    return flat.unflatten(0, (frames.shape[0], frames.shape[2])).transpose(1, 2).contiguous()


def find_videos(sources: Iterable[str | os.PathLike[str]], without: Path | None = None) -> dict[str, Path]:
    """Videos by a name that is theirs alone: files as given, folders searched through, `.txt` lists read line by line.

    Of a folder without videos the pictures are taken. Hidden files are passed over, those of reports, and those in the
    folder `without`, which holds results, where it is one within. Raises VideoError for a place that does not exist or
    holds none, and a list that is no text.
    """
    found: dict[str, Path] = {}
    for source in map(Path, sources):
        if source.is_dir():
            here = [path for path in sorted(source.rglob("*")) if not path.name.startswith(".")]
            here = [path for path in here if without is None or not _is_within(path, without, source)]
            here = [path for path in here if not (path.parent.name == PARTS and (path.parents[1] / LINES).exists())]
            inside = [path for path in here if path.suffix.lower() in SUFFIXES] or [
                path for path in here if path.suffix.lower() in PICTURE_SUFFIXES
            ]
            files = [(path.relative_to(source).as_posix(), path) for path in inside]
            if not files:
                raise VideoError(f"{source}: holds no video ({', '.join(SUFFIXES)}) and no picture.")
        elif source.suffix.lower() == ".txt" and source.is_file():
            files = [(line, source.parent / line) for line in _lines(source)]
        elif source.exists():
            files = [(source.name, source)]
        else:
            raise VideoError(f"{source}: no such file or folder.")
        for name, path in files:
            unique = _text(name) if _text(name) not in found else _text(path.as_posix())
            found[unique] = path
    return found


def _is_within(path: Path, results: Path, source: Path) -> bool:
    """Whether `path` lies in the folder `results`, where that is a folder within `source`."""
    real, folder = Path(os.path.realpath(path)), Path(os.path.realpath(results))
    return Path(os.path.realpath(source)) in folder.parents and folder in real.parents


def _text(name: str) -> str:
    """A file name as text that reports can hold: bytes that are no UTF-8 are written out."""
    return name.encode("utf-8", "backslashreplace").decode()


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise VideoError(f"{path}: is no list in UTF-8; save it in that encoding.") from None


def whole(chunks: Iterable[Tensor]) -> Tensor:
    """All chunks as one clip (1, 3, t, h, w)."""
    return torch.cat(list(chunks), dim=2)
