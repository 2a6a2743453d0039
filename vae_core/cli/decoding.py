"""From a latent file to videos or pictures, and on after a crash."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__
from ..atomic import sweep
from ..door.output import NotFiniteError
from ..door.resume import DecodeStore
from ..door.vae import VideoVAE
from ..errors import LatentFileError, VideoError
from ..media.audio import SIDECAR_START
from ..media.latents import LatentFile, sound_name
from ..media.opening import open_media, sound_stream
from ..media.pictures import PictureWriter, is_picture
from ..media.video import VideoWriter
from ..run.snapshots import Snapshots
from ..weights.tensors import digest
from .guard import UserError
from .outputs import Form, fitting
from .work import Advance, Writer, remedy, uneven


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """The frames of a latent file that are decoded, those from `start` to `stop` - 1, and how they are stored."""

    file: LatentFile
    form: Form
    start: int
    stop: int

    @property
    def frames(self) -> int:
        """How many there are of each clip."""
        return self.stop - self.start

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.file.meta.height, self.file.meta.width

    @property
    def times(self) -> list[Fraction] | None:
        """When each is shown, and when the last ends, in seconds; None where all frames of the clip are on time."""
        times = self.file.meta.times
        return None if times is None else [time - times[self.start] for time in times[self.start : self.stop + 1]]

    @property
    def sound_range(self) -> tuple[Fraction, Fraction]:
        """First and end of their sound, in seconds of the sound's file."""
        meta = self.file.meta
        first, end = (n / meta.fps if meta.times is None else meta.times[n] for n in (self.start, self.stop))
        return SIDECAR_START + first, SIDECAR_START + end

    def writer(self, path: Path, sound: Path | None) -> Writer:
        """A file for them."""
        if is_picture(path):
            return PictureWriter(path, size=self.size, count=self.frames, bits=self.form.bits)
        return VideoWriter(
            path,
            fps=self.file.meta.fps,
            size=self.size,
            **uneven(self.times),
            aspect=self.file.meta.aspect,
            audio_from=sound,
            audio_range=self.sound_range,
            crf=self.form.crf,
            codec=self.form.codec,
            bits=self.form.bits,
            pix_fmt=self.form.pix_fmt,
        )

    def levels(self, vae: VideoVAE, done: int = 0, snapshots: Snapshots | None = None) -> Iterator[Tensor]:
        """(b, t, h, w, 3) of 0 to 255, without the `done` first."""
        return vae.decode_frames(
            self.file.chunks(),
            dtype=torch.uint8,
            lent=True,
            check=True,
            start=self.start + done,
            frames=self.stop,
            size=self.size,
            snapshots=snapshots,
        )

    def deep(self, vae: VideoVAE, done: int = 0, snapshots: Snapshots | None = None) -> Iterator[Tensor]:
        """(b, 3, t, h, w) in [-1, 1], without the `done` first, for files of more than 8 bits."""
        start, stop = self.start + done, self.stop
        chunks = vae.decode_stream(self.file.chunks(), start=start, frames=stop, size=self.size, snapshots=snapshots)
        for number, chunk in enumerate(chunks):
            if not torch.isfinite(chunk).all():
                raise NotFiniteError(number)
            yield chunk.float().cpu()


def chosen(file: LatentFile, form: Form, start: int, frames: int | None) -> Decoding:
    """`frames` of a latent file from frame `start` on, or all the rest. Raises UserError where it has not so many."""
    have = file.meta.frames
    stop = have if frames is None else start + frames
    if not start < stop <= have:
        asked = "all the rest" if frames is None else f"{frames}"
        raise UserError(
            f"{file.path} has {have} frames, numbered from 0; {asked} from frame {start} on is not among them. Give a "
            "smaller --start or --frames."
        )
    return Decoding(file=file, form=form, start=start, stop=stop)


def sound_of(file: LatentFile) -> tuple[Path | None, str | None]:
    """The sound of a latent file; or None and, where it should be there, why not."""
    if file.meta.audio is None:
        return None, None
    path = file.path.with_name(file.meta.audio)
    if not path.exists() and file.path.with_name(sound_name(file.path)).exists():
        path = file.path.with_name(sound_name(file.path))  # both were given another name
    try:
        with open_media(path) as container:
            if sound_stream(container) is None:
                return None, f"The sound is left out: {path} holds none."
    except VideoError as error:
        return None, f"The sound is left out: {error}"
    return path, None


def check_latent(file: LatentFile) -> None:
    """Raise LatentFileError where the latent holds values that are no numbers."""
    done = 0
    for chunk in file.chunks():
        if not torch.isfinite(chunk).all():
            raise LatentFileError(
                f"{file.path}: holds NaN or infinity from latent frame {done} on, so it cannot be decoded; encode or "
                "sample it again."
            )
        done += chunk.shape[2]


def decoded_paths(file: LatentFile, path: Path) -> list[Path]:
    """Where the clips of a latent file are decoded to: `path` for one, numbered for a batch."""
    count = file.shape[0]
    return [path] if count == 1 else [path.with_name(f"{path.stem}_{n}{path.suffix}") for n in range(1, count + 1)]


def decode(
    vae: VideoVAE,
    job: Decoding,
    paths: list[Path],
    *,
    sound: Path | None,
    store: DecodeStore | None = None,
    advance: Advance,
) -> list[str]:
    """Write the videos of a latent file, with the sound at `sound`; returns what did not come through as it was.

    store: where finished chunks are kept until the videos are complete, and those of an earlier run are found.
    """
    time, make = (2, job.deep) if job.form.deep else (1, job.levels)
    chunks = make(vae) if store is None else store.all(partial(make, vae), job.frames, dim=time)
    try:
        with contextlib.ExitStack() as stack:
            writers = [stack.enter_context(job.writer(path, sound)) for path in paths]
            for chunk in chunks:
                for writer, frames in zip(writers, chunk, strict=True):
                    if job.form.deep:
                        writer.write(frames[None])
                    else:
                        writer.write_pixels(frames)
                advance(chunk.shape[time])
            told = [sentence for writer in writers for sentence in writer.told]
    except NotFiniteError as error:  # the latent itself has been looked at
        raise UserError(
            f"Decoding gives NaN or infinity in chunk {error.chunk} of the video. {remedy(vae.dtype)} Nothing was "
            "written."
        ) from error
    if store is not None:
        store.remove()
    return told


def store_for(vae: VideoVAE, job: Decoding, paths: list[Path]) -> DecodeStore:
    """Where the finished chunks of a decode to `paths` are kept; what a killed one left half-written goes.

    Raises VideoError where the disk is too full.
    """
    for path in paths:
        sweep(path)
    with job.file.path.open("rb") as latent:
        source = hashlib.file_digest(latent, "sha256").hexdigest()
    how = f"{__version__} {torch.__version__} {vae.model.config} {vae.device.type} {job.form.deep}"
    key = digest(source, f"{how} {job.start} {job.stop}", vae.model.state_dict())
    store = DecodeStore(unfinished_folder(paths[0]), key)
    height, width = job.size
    store.check_room(job.file.shape[0] * 3 * (4 if job.form.deep else 1) * height * width * (job.frames - store.frames))
    return store


def unfinished_folder(path: Path) -> Path:
    """The hidden folder beside `path` where the finished chunks of an unfinished decode are kept."""
    return path.with_name(fitting(f".{path.name}", ".unfinished"))
