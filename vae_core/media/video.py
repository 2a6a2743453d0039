"""Reading video files: lazily, with bounded memory, every frame at its true size and its own time.

Tensors are (1, 3, t, H, W), RGB, float32 in [-1, 1]. Sizes are (height, width), as in the rest of the package.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import accumulate
from pathlib import Path

import av
import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from torch import Tensor

from ..door.output import to_uint8
from ..errors import VideoError
from . import animation
from .codecs import OUTPUT_SUFFIXES, Codec, Container, check_output_name
from .hdr import GAMUTS, TRANSFERS
from .opening import has_decoder, has_no_times, is_still, open_media, picture_stream, sound_stream
from .pixels import Hdr, ToRGB, is_transparent, look_of
from .rates import is_variable, snapped
from .scanning import decoded, first_picture, timeline_of
from .timeline import Timeline
from .writer import VideoWriter

__all__ = [
    "OUTPUT_SUFFIXES", "Codec", "Container", "VideoInfo", "VideoWriter", "check_output_name", "checked_stop",
    "frame_times", "is_variable", "losses", "probe", "read_frames", "read_shown", "timeline_of",
    "to_uint8",
]  # fmt: skip

_DEFAULT_FPS = Fraction(25)  # of a still image, which has no rate of its own


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video file says of itself, after its rotation is applied.

    frames: the container's own count, None where it keeps none. fps: the rate that it names, in frames per second; the
    true one is that of `timeline_of`. duration: seconds. aspect: width to height of one pixel, 1 for square pixels.
    still: a single image. audio_codec, channels: of the sound track that is used, the first that can be decoded;
    sounds: how many there are. transfer: "PQ" or "HLG" for HDR, else "". gamut: "BT.2020" or "P3", else "" for BT.709
    and its like. alpha, interlaced: of the picture. bits: per channel.
    """

    width: int
    height: int
    fps: Fraction
    frames: int | None
    duration: float | None
    aspect: Fraction
    codec: str
    audio_codec: str | None
    channels: int = 0
    sounds: int = 0
    still: bool = False
    transfer: str = ""
    gamut: str = ""
    alpha: bool = False
    interlaced: bool = False
    bits: int = 8

    @property
    def has_audio(self) -> bool:
        """Whether there is a sound track that can be decoded."""
        return self.audio_codec is not None

    @property
    def hdr(self) -> bool:
        """Whether it is PQ or HLG material."""
        return bool(self.transfer)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.height, self.width

    @property
    def expected_frames(self) -> int | None:
        """The frame count, or an estimate from duration and rate, for progress bars only."""
        if self.frames is not None:
            return self.frames
        return None if self.duration is None else max(1, round(self.duration * self.fps))


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Look at a video or image file and decode its first frame.

    Raises `VideoError` where the file is missing, is no regular file, cannot be read as video or has no picture.
    """
    path = Path(path)
    if animation.is_animation(path):
        return _animation_info(path)
    with open_media(path) as container, path.open("rb") as file:
        stream = picture_stream(container, path)
        first = first_picture(container, stream, path)
        look = look_of(container, stream, first, file, path, "keep")
        height, width = look.orientation.size(first.height, first.width)
        still = is_still(container)
        sound = sound_stream(container)
        return VideoInfo(
            width=width,
            height=height,
            fps=_DEFAULT_FPS if still else _rate(container, stream),
            frames=1 if still else stream.frames or None,
            duration=None if still else _duration(container, stream),
            aspect=look.orientation.aspect(look.aspect),
            codec=stream.codec_context.name,
            audio_codec=None if sound is None else sound.codec_context.codec.canonical_name,
            channels=0 if sound is None else sound.channels,
            sounds=sum(has_decoder(track) for track in container.streams.audio),
            still=still,
            transfer=TRANSFERS.get(look.transfer, ""),
            gamut=GAMUTS.get(look.primaries, ""),
            alpha=is_transparent(first),
            interlaced=first.interlaced_frame,
            bits=max(part.bits for part in first.format.components),
        )


def read_frames(
    path: str | os.PathLike[str],
    start: int = 0,
    frames: int | None = None,
    chunk: int = 4,
    *,
    skip_damage: bool = False,
    hdr: Hdr = "tone-map",
) -> Iterator[Tensor]:
    """Read frames lazily, at most `chunk` at a time, as (1, 3, t, H, W) float32 RGB in [-1, 1].

    `start` counts frames from 0, as the file's timeline does; those before it are decoded and passed over, so it is
    exact in every file. `frames` None reads to the end, and a file that ends earlier gives fewer. The rotation the file
    asks for is applied. YCbCr is converted by the matrix and range the file states (where it states none: BT.709 from
    720 lines or 1280 columns on, else BT.601, as in files of ComfyUI's older Save Video); more than 8 bits per channel
    are kept; alpha is dropped. `skip_damage`: a missing frame shows the one before. `hdr`: PQ, HLG and wide gamuts are
    brought to BT.709 ("tone-map"), raise, or are kept as they are coded.

    Raises `VideoError` where the file is not a readable video, `start` is beyond its end, a frame is damaged, or the
    picture changes size on the way; all of that before the first frame.
    """
    path = Path(path)
    if start < 0 or (frames is not None and frames < 1) or chunk < 1:
        raise VideoError(
            f"got start={start}, frames={frames}, chunk={chunk}; start must be 0 or more, frames and chunk 1 or more."
        )
    timeline = timeline_of(path, None if frames is None else start + frames)
    stop = checked_stop(path, timeline, start, frames, skip_damage=skip_damage)
    yield from read_shown(path, timeline, range(start, stop), chunk, hdr)


def read_shown(
    path: Path, timeline: Timeline, frames: Sequence[int], chunk: int = 4, hdr: Hdr = "tone-map"
) -> Iterator[Tensor]:
    """Frames of a timeline by their numbers, which do not fall and may repeat, as `read_frames` gives them.

    What is missing shows the frame before; whether it may is the caller's business.
    """
    held: list[Tensor] = []
    with closing(_chosen(path, timeline, frames, hdr)) as pictures:
        for picture in pictures:
            held.append(picture)
            if len(held) == chunk:
                yield torch.stack(held, 1)[None]  # 1 c t h w
                held = []
    if held:
        yield torch.stack(held, 1)[None]  # 1 c t h w


def checked_stop(path: Path, timeline: Timeline, start: int, frames: int | None, *, skip_damage: bool) -> int:
    """The number after the last of the frames from `start` on. Raises VideoError where they cannot be read."""
    if start >= len(timeline):
        raise VideoError(
            f"{path}: has {len(timeline)} frames, numbered from 0; a start at frame {start} is beyond them."
        )
    stop = len(timeline) if frames is None else min(start + frames, len(timeline))
    if timeline.resized is not None and start < timeline.resized.frame < stop:
        raise VideoError(f"{path}: {timeline.resized.words()}")
    if not skip_damage:
        timeline.check(path, start, stop)
    return stop


def frame_times(path: str | os.PathLike[str], start: int = 0, frames: int | None = None) -> list[Fraction]:
    """When each frame is shown, in seconds on the file's own clock, from `start` on, `frames` of them or all the rest.

    The file is decoded for that, once. Raises `VideoError` as `timeline_of`.
    """
    stop = None if frames is None else start + frames
    return timeline_of(Path(path), stop).times(start, stop)


def losses(info: VideoInfo, hdr: Hdr = "tone-map") -> list[str]:
    """What of a file's picture and sound does not come through, as ends of sentences that begin with its name."""
    said: list[str] = []
    brought = "brought to BT.709" if hdr != "keep" else "taken as BT.709, as they are coded"
    if info.transfer:
        how = (
            "tone-mapped by the curve of BT.2390" if hdr != "keep" else "taken as they are coded, without tone mapping"
        )
        said.append(f"is HDR ({info.transfer}): its values are {how}")
    if info.gamut:
        said.append(f"has {info.gamut} colours: they are {brought}")
    if info.alpha:
        said.append("has an alpha channel: it is left out")
    if info.interlaced:
        said.append("is interlaced: its two fields are taken as one frame, and stay combed where things move")
    if info.sounds > 1:
        said.append(f"has {info.sounds} sound tracks: the first is used")
    return said


# ---------------------------------------------------------------------------------------------------- helpers


def _chosen(path: Path, timeline: Timeline, frames: Sequence[int], hdr: Hdr) -> Generator[Tensor]:
    """The pictures (3, H, W) of frames of the timeline; one that is missing is the one before once more."""
    shown = list(accumulate(timeline.pictures, max))  # for each frame its picture, or that of the one before
    last: Tensor | None = None
    at, of = -1, -1  # the picture that was decoded last, and that of `last`
    with closing(_pictures(path, timeline, hdr)) as pictures:
        for frame in frames:
            if shown[frame] != of:
                make = None
                while at < shown[frame]:
                    at, make = next(pictures, (len(shown), None))
                if make is None or at != shown[frame]:
                    raise VideoError(f"{path}: changed while it was being read; try again.")
                last, of = make(frame), at
            assert last is not None
            yield last


def _pictures(path: Path, timeline: Timeline, hdr: Hdr) -> Generator[tuple[int, Callable[[int], Tensor]]]:
    """(number, what makes (3, H, W) of it) of each picture in the order of decoding; the maker is told the frame."""
    if animation.is_animation(path):
        for number, picture in enumerate(animation.pictures(path)):
            yield number, lambda _, picture=picture: picture
        return
    converter: ToRGB | None = None

    def make(index: int, *, picture: VideoFrame) -> Tensor:
        nonlocal converter
        if converter is None:
            converter = ToRGB(picture, path, look_of(container, stream, picture, file, path, hdr))
        return converter(picture, index)

    with open_media(path) as container, path.open("rb") as file:
        stream = picture_stream(container, path)
        for number, picture in enumerate(decoded(container, stream, timeline)):
            yield number, partial(make, picture=picture)


def _animation_info(path: Path) -> VideoInfo:
    timeline = timeline_of(path)
    height, width, alpha = animation.facts(path)
    return VideoInfo(
        width=width,
        height=height,
        fps=timeline.fps,
        frames=len(timeline),
        duration=float(timeline.time(len(timeline))),
        aspect=Fraction(1),
        codec="webp",
        audio_codec=None,
        alpha=alpha,
    )


def _rate(container: InputContainer, stream: VideoStream) -> Fraction:
    coded = stream.codec_context.framerate if has_no_times(container) else None
    return snapped(coded or stream.guessed_rate or stream.average_rate or _DEFAULT_FPS)


def _duration(container: InputContainer, stream: VideoStream) -> float | None:
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / av.time_base
