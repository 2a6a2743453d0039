"""What the commands do: pieces of video through a VAE and into files, a bounded number of frames at a time."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from ..door.vae import VideoVAE
from ..errors import VideoError
from ..media.latents import LatentFile, LatentMeta, LatentWriter
from ..media.video import VideoInfo, VideoWriter, frame_times, is_variable, probe, read_frames
from ..metrics import frame_quality
from .guard import UserError

Advance = Callable[[int], None]
Watch = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class Clip:
    """The part of a video file that a command works on; `times` are of its frames, in seconds of the file's clock."""

    path: Path
    info: VideoInfo
    start: int
    frames: int | None
    times: list[Fraction]
    end: Fraction | None

    @property
    def expected(self) -> int | None:
        """How many frames there should be, for the progress bar."""
        if self.times:
            return len(self.times)
        known = self.info.expected_frames
        if known is None:
            return self.frames
        return min(self.frames or known, max(1, known - self.start))

    @property
    def audio_range(self) -> tuple[Fraction, Fraction | None]:
        """First and end of its sound, in seconds of the file's clock; end None for all the rest."""
        return (self.times[0] if self.times else self.start / self.info.fps), self.end

    def read(self) -> Iterator[Tensor]:
        """Its frames, in small pieces."""
        return read_frames(self.path, self.start, self.frames)

    def writer(self, path: Path, *, beside: bool = False) -> VideoWriter:
        """A file like this one: its size (twice as wide with `beside`), rate, frame times and sound."""
        height, width = self.info.size
        return VideoWriter(
            path,
            fps=self.info.fps,
            size=(height, 2 * width if beside else width),
            times=self.times,
            aspect=self.info.aspect,
            audio_from=self.path if self.info.has_audio else None,
            audio_range=self.audio_range,
        )


def open_clip(path: Path, start: int, frames: int | None) -> Clip:
    """Look at the file, and at the times of the frames that are wanted. Raises VideoError."""
    info = probe(path)
    times = frame_times(path, start, None if frames is None else frames + 1)
    end: Fraction | None = None
    if frames is not None:
        begin = times[0] if times else start / info.fps
        end = times[frames] if len(times) > frames else begin + frames / info.fps
    return Clip(path=path, info=info, start=start, frames=frames, times=times[:frames], end=end)


@dataclass
class Quality:
    """PSNR in dB and SSIM of every frame so far."""

    psnr: list[float] = field(default_factory=list[float])
    ssim: list[float] = field(default_factory=list[float])

    def add(self, reconstruction: Tensor, original: Tensor) -> None:
        psnr, ssim = frame_quality(reconstruction, original)
        self.psnr += map(float, psnr)
        self.ssim += map(float, ssim)

    @property
    def mean(self) -> tuple[float, float]:
        """Mean of the frames' PSNR, and of their SSIM."""
        return sum(self.psnr) / len(self.psnr), sum(self.ssim) / len(self.ssim)


def encoded(
    vae: VideoVAE, frames: Iterable[Tensor], seed: int | None, advance: Advance | None = None
) -> Iterator[Tensor]:
    """Latents of a stream of frames; without a seed the mean, with one a draw from the posterior."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)

    def counted() -> Iterator[Tensor]:
        for piece in frames:
            yield piece
            if advance is not None:
                advance(piece.shape[2])

    return vae.encode_stream(counted(), pad=True, sample=seed is not None, generator=generator)


def encode(vae: VideoVAE, clip: Clip, path: Path, *, seed: int | None, advance: Advance) -> LatentMeta:
    """Write the latent of `clip`; returns what the file says of itself."""
    count = 0

    def counted(frames: int) -> None:
        nonlocal count
        count += frames
        advance(frames)

    source = clip.info.has_audio or is_variable(clip.times, clip.info.fps)  # what decoding takes from the source
    with LatentWriter(
        path,
        family=vae.family,
        fps=clip.info.fps,
        height=clip.info.height,
        width=clip.info.width,
        audio=str(clip.path.resolve()) if source else None,
        start=clip.start,
    ) as writer:
        for piece in encoded(vae, clip.read(), seed, counted):
            writer.write(piece)
        return writer.finish(frames=count)


def source_of(file: LatentFile) -> tuple[Clip | None, str | None]:
    """The video a latent was made from, for its sound and frame times; or None and, where it should be there, why."""
    if file.meta.audio is None:
        return None, None
    try:
        clip = open_clip(Path(file.meta.audio), file.meta.start, file.meta.frames)
    except VideoError as error:
        return None, f"The sound is left out: {error}"
    if clip.info.size != (file.meta.height, file.meta.width):
        return None, f"The sound is left out: {clip.path} is no longer the video this was made from."
    return clip, None


def decode(vae: VideoVAE, file: LatentFile, path: Path, *, source: Clip | None, advance: Advance) -> None:
    """Write the video of a latent file, with the sound and frame times of `source`."""
    size = file.meta.height, file.meta.width
    made = source.writer(path) if source else VideoWriter(path, fps=file.meta.fps, size=size)
    with made as writer:
        for piece in vae.decode_frames(
            file.pieces(), dtype=torch.uint8, lent=True, check=True, frames=file.meta.frames, size=size
        ):
            writer.write_pixels(piece[0])
            advance(piece.shape[1])


def reconstruct(
    vae: VideoVAE,
    clip: Clip,
    *,
    plain: Path,
    beside: Path,
    seed: int | None,
    advance: Advance,
    watch: Watch | None = None,
) -> Quality:
    """Encode and decode `clip`, write the result and a side-by-side, and compare frame by frame.

    Holds the originals that are read and not yet decoded: one chunk. `watch` is called with (index of the first,
    originals, reconstructions) for every piece.
    """
    quality, waiting = Quality(), deque[Tensor]()

    def kept() -> Iterator[Tensor]:
        for piece in clip.read():
            waiting.extend(piece[:, :, index : index + 1] for index in range(piece.shape[2]))
            yield piece

    with contextlib.ExitStack() as stack:
        first = stack.enter_context(clip.writer(plain))
        second = stack.enter_context(clip.writer(beside, beside=True))
        for piece in vae.decode_stream(encoded(vae, kept(), seed), size=clip.info.size):
            count = min(piece.shape[2], len(waiting))  # at the end, frames that only padded the clip follow
            if not count:
                continue
            original = torch.cat([waiting.popleft() for _ in range(count)], dim=2)  # 1 c t h w
            result = piece[:, :, :count].float().cpu()
            if watch is not None:
                watch(first.frames, original, result)
            quality.add(result, original)
            first.write(result)
            second.write(torch.cat([original, result.clamp(-1, 1)], dim=-1))
            advance(count)
    if waiting:
        raise AssertionError(f"{len(waiting)} frames were read and never decoded")
    return quality


def check_outputs(paths: Iterable[Path], *, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Raise UserError, before any work, where an output cannot or must not be written."""
    sources = {source.resolve() for source in inputs}
    for path in paths:
        if path.resolve() in sources:
            raise UserError(f"{path} is the input itself; choose another -o.")
        if path.is_dir():
            raise UserError(f"{path} is a folder; give a file name with -o.")
        if not path.parent.is_dir():
            raise UserError(f"{path.parent} is no folder; make it first, or choose another -o.")
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists already; add --overwrite to replace it, or choose another -o.")


def notes_on(clip: Clip) -> Iterator[str]:
    """What a user should know before the work begins."""
    if clip.times and clip.frames is not None and len(clip.times) < clip.frames:
        yield f"{clip.path} has {len(clip.times)} frames from frame {clip.start} on, fewer than --frames {clip.frames}."
    if clip.info.hdr:
        yield f"{clip.path} is HDR; its values are taken as they are, without tone mapping."
    if clip.info.height % 2 or clip.info.width % 2:
        yield (
            f"{clip.info.width}x{clip.info.height} has an odd side, so the video is stored as 4:4:4, which keeps the "
            "size exactly; some players cannot show it."
        )
    if clip.times and is_variable(clip.times, clip.info.fps):
        yield f"{clip.path} has a varying frame rate; every frame keeps its time."
