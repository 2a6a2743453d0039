"""What the commands do: chunks of video through a VAE and into files, a bounded number of frames at a time."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..door.vae import VideoVAE
from ..errors import VideoError
from ..media.audio import save_sound
from ..media.latents import LatentMeta, LatentWriter, sound_name
from ..media.pictures import PictureWriter, is_picture
from ..media.pixels import Hdr
from ..media.scanning import timeline_of
from ..media.timeline import Timeline
from ..media.video import VideoInfo, VideoWriter, checked_stop, losses, probe, read_frames
from ..metrics import frame_quality
from .guard import UserError, note
from .outputs import Form

Advance = Callable[[int], None]
Watch = Callable[[int, Tensor, Tensor], None]
Writer = VideoWriter | PictureWriter


@dataclass(frozen=True, kw_only=True)
class Clip:
    """The frames of a video file that a command works on: those from `start` to `stop` - 1 of its timeline."""

    path: Path
    info: VideoInfo
    timeline: Timeline
    start: int
    stop: int
    wanted: int | None = None
    skip_damage: bool = False
    hdr: Hdr = "tone-map"

    @property
    def frames(self) -> int:
        """How many there are."""
        return self.stop - self.start

    @property
    def times(self) -> list[Fraction] | None:
        """When each is shown, in seconds of the file's clock, and when the last ends; None where they are on time."""
        if self.timeline.on_time(self.start, self.stop):
            return None
        return [*self.timeline.times(self.start, self.stop), self.timeline.time(self.stop)]

    @property
    def sound_range(self) -> tuple[Fraction, Fraction | None]:
        """First and end of their sound, in seconds of the file's clock; end None for all the rest."""
        last = self.stop == len(self.timeline) and self.timeline.whole and not self.timeline.cut
        return self.timeline.time(self.start), None if last else self.timeline.time(self.stop)

    def read(self) -> Iterator[Tensor]:
        """The frames, a few at a time."""
        return read_frames(self.path, self.start, self.frames, skip_damage=self.skip_damage, hdr=self.hdr)

    def writer(self, path: Path, form: Form, *, beside: bool = False) -> Writer:
        """A file like this one: its size (twice as wide with `beside`), rate, frame times and sound."""
        height, width = self.info.size
        size = (height, 2 * width if beside else width)
        if is_picture(path):
            return PictureWriter(path, size=size, count=self.frames, bits=form.bits)
        return VideoWriter(
            path,
            fps=self.timeline.fps,
            size=size,
            **uneven(self.times),
            aspect=self.info.aspect,
            audio_from=self.path if self.info.has_audio else None,
            audio_range=self.sound_range,
            audio_shifts=self.timeline.shifts,
            crf=form.crf,
            codec=form.codec,
            bits=form.bits,
            pix_fmt=form.pix_fmt,
        )


def open_clip(
    path: Path, start: int = 0, frames: int | None = None, *, skip_damage: bool = False, hdr: Hdr = "tone-map"
) -> Clip:
    """Look at the file and decode the frames that are wanted once. Raises VideoError where they cannot be used."""
    info = probe(path)
    if info.hdr and hdr == "refuse":
        raise VideoError(
            f"{path}: is HDR ({info.transfer}), which was to be refused; tone-map it first, or leave --hdr out."
        )
    timeline = timeline_of(path, None if frames is None else start + frames)
    stop = checked_stop(path, timeline, start, frames, skip_damage=skip_damage)
    return Clip(
        path=path, info=info, timeline=timeline, start=start, stop=stop, wanted=frames, skip_damage=skip_damage, hdr=hdr
    )


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
    """Latents of a stream of frames; without a seed the mean, with one a draw from the posterior.

    Raises UserError where they are not finite.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)

    def counted() -> Iterator[Tensor]:
        for chunk in frames:
            yield chunk
            if advance is not None:
                advance(chunk.shape[2])

    done = 0
    for chunk in vae.encode_stream(counted(), pad=True, sample=seed is not None, generator=generator):
        if not torch.isfinite(chunk).all():
            raise UserError(
                f"Encoding gives NaN or infinity from latent frame {done} on. {remedy(vae.dtype)} Nothing was written."
            )
        done += chunk.shape[2]
        yield chunk


def remedy(dtype: torch.dtype) -> str:
    if dtype == torch.float16:
        return "float16 overflows with these weights: choose --dtype bfloat16 or float32."
    return "The weights are damaged or were trained to nothing: use other weights."


def encode(vae: VideoVAE, clip: Clip, path: Path, *, seed: int | None, advance: Advance) -> LatentMeta:
    """Write the latent of `clip`, and its sound beside it; returns what the file says of itself."""
    count = 0

    def counted(frames: int) -> None:
        nonlocal count
        count += frames
        advance(frames)

    times = clip.times
    with LatentWriter(
        path,
        family=vae.family,
        fps=clip.timeline.fps,
        height=clip.info.height,
        width=clip.info.width,
        aspect=clip.info.aspect,
        times=None if times is None else [time - times[0] for time in times],
        audio=sound_name(path) if clip.info.has_audio else None,
        start=clip.start,
    ) as writer:
        for chunk in encoded(vae, clip.read(), seed, counted):
            writer.write(chunk)
        if clip.info.has_audio:
            save_sound(clip.path, *clip.sound_range, clip.timeline.shifts, path.with_name(sound_name(path)))
        return writer.finish(frames=count)


def uneven(times: list[Fraction] | tuple[Fraction, ...] | None) -> dict[str, Any]:
    return {} if times is None else {"times": times[:-1], "end": times[-1]}


def reconstruct(
    vae: VideoVAE,
    clip: Clip,
    *,
    plain: Path,
    beside: Path,
    form: Form | None = None,
    seed: int | None,
    advance: Advance,
    watch: Watch | None = None,
) -> tuple[Quality, list[str]]:
    """Encode and decode `clip`, write the result and a side-by-side, and compare frame by frame.

    Holds the originals that are read and not yet decoded: one chunk. `watch` is called with (index of the first,
    originals, reconstructions) for every chunk. Returns the figures, and what did not come through as it was.
    """
    form = form or Form()
    quality, waiting = Quality(), deque[Tensor]()

    def kept() -> Iterator[Tensor]:
        for chunk in clip.read():
            waiting.extend(chunk[:, :, index : index + 1] for index in range(chunk.shape[2]))
            yield chunk

    with contextlib.ExitStack() as stack:
        first = stack.enter_context(clip.writer(plain, form))
        second = stack.enter_context(clip.writer(beside, form, beside=True))
        for chunk in vae.decode_stream(encoded(vae, kept(), seed), size=clip.info.size):
            count = min(chunk.shape[2], len(waiting))  # at the end, frames that only padded the clip follow
            if not count:
                continue
            original = torch.cat([waiting.popleft() for _ in range(count)], dim=2)  # 1 c t h w
            result = chunk[:, :, :count].float().cpu()
            if not torch.isfinite(result).all():
                raise UserError(
                    f"Decoding gives NaN or infinity between frames {first.frames} and {first.frames + count - 1}. "
                    f"{remedy(vae.dtype)} Nothing was written."
                )
            if watch is not None:
                watch(first.frames, original, result)
            quality.add(result, original)
            first.write(result)
            second.write(torch.cat([original, result.clamp(-1, 1)], dim=-1))
            advance(count)
        told = first.told
    if waiting:
        raise AssertionError(f"{len(waiting)} frames were read and never decoded")
    return quality, told


def notes_on(clip: Clip) -> Iterator[str]:
    """What a user should know before the work begins."""
    if clip.wanted is not None and clip.frames < clip.wanted:
        count = "1 frame" if clip.frames == 1 else f"{clip.frames} frames"
        yield f"{clip.path} has {count} from frame {clip.start} on, fewer than --frames {clip.wanted}."
    for ending in (*clip.timeline.told(clip.start, clip.stop), *losses(clip.info, clip.hdr)):
        yield f"{clip.path} {ending}."
    if clip.info.height % 2 or clip.info.width % 2:
        yield (
            f"{clip.info.width}x{clip.info.height} has an odd side, so the video is stored as 4:4:4, which keeps the "
            "size exactly; some players cannot show it."
        )
    if not clip.timeline.even:
        yield f"{clip.path} has a varying frame rate; every frame keeps its time."


def opened(path: Path, start: int, frames: int | None, *, skip_damage: bool = False, hdr: Hdr = "tone-map") -> Clip:
    """`open_clip`, and say what a user should know."""
    clip = open_clip(path, start, frames, skip_damage=skip_damage, hdr=hdr)
    for text in notes_on(clip):
        note(text)
    return clip
