"""`cviv-vae train-svd-adapter`: SVD's output layer, tuned on clips of a folder without ComfyUI."""

import importlib.util
import itertools
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from ..door.vae import VideoVAE
from ..families import VIDEO
from ..media.latents import open_latent
from ..media.video import probe, read_frames
from ..pictures.losses import draw_losses
from ..svd.adapter import OUTPUTS, save_adapter
from ..svd.files import (
    FEWEST,
    LATENTS,
    UNIT,
    check_any,
    check_latent,
    check_size,
    fingerprint,
    left_out,
    training_files,
)
from ..svd.scenes import beginning_of, look_through, spans_of
from ..svd.session import CHECKPOINT_EVERY, HELD_OUT, Training, TrainingClip, with_buckets
from ..svd.trainer import LATENT_SCALE, METHODS, AdapterTrainer, TrainSettings
from .guard import UserError, err, guarded, note, say
from .options import Device, DType, DTypeOption, Overwrite, device_and_dtype, load_weights
from .outputs import check_outputs

if TYPE_CHECKING:
    from ..svd.unet import ImageEncoder, ImageVAE


class Method(str, Enum):
    """How to train, in the order of `METHODS`."""

    RIDGE = "ridge-regression"
    DESCENT = "gradient-descent"


@guarded
def train_svd_adapter_command(
    folder: Annotated[Path, typer.Argument(help="Videos, or latent files that encode wrote with the same VAE.")],
    svd: Annotated[Path, typer.Option("--svd", help="svd_xt.safetensors, or a folder of SVD from Hugging Face.")],
    weights: Annotated[str, typer.Option("--weights", "-w", help="The CV-VAE that will decode.", metavar="FILE")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The adapter; NAME.state.safetensors and NAME.png lie beside it.")
    ] = Path("svd_cv_vae.safetensors"),
    steps: Annotated[
        int, typer.Option("--steps", min=1, help="Steps in all; the published tuning by gradient descent took 5000.")
    ] = 500,
    method: Annotated[Method, typer.Option("--method", help="A closed form, or AdamW, as published.")] = Method.RIDGE,
    learning_rate: Annotated[float, typer.Option("--learning-rate", min=1e-8, max=1.0, help="Of AdamW.")] = 1e-5,
    ridge: Annotated[
        float, typer.Option("--ridge", min=1e-9, help="How strongly ridge regression holds the old weights.")
    ] = 1e-3,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Of clips, noise levels and noise.")] = 0,
    frames: Annotated[int, typer.Option("--frames", min=FEWEST, help="Of a clip; longer videos give several.")] = 97,
    width: Annotated[int, typer.Option("--width", min=UNIT, help="Videos are scaled and cut to this width ...")] = 1024,
    height: Annotated[int, typer.Option("--height", min=UNIT, help="... and height.")] = 576,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the training of this output.")] = False,
    dtype: DTypeOption = DType.auto,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Tune the last layer of SVD (11,524 numbers) on CV-VAE latents of your clips, with the memory of sampling.

    Ctrl-C keeps what was done; --resume goes on with it.
    """
    _check_installed()
    from ..svd.unet import load_network

    check_size(width, height)
    places = _places(output, resume=resume, overwrite=overwrite)
    shape = _Shape(frames=frames, width=width, height=height)
    files = _files(folder)
    settings = TrainSettings(
        method=METHODS[list(Method).index(method)],
        learning_rate=learning_rate,
        ridge=ridge,
        seed=seed,
        fingerprint=fingerprint(files, frames, width, height),
    )
    source, where, kind = _source(svd, dtype, device)
    network = load_network(source, kind)  # before the clips, which may take long: what is wrong with it shows at once
    if resume:
        trainer = AdapterTrainer.resume(places.state, network.old, settings, where)
    else:
        trainer = AdapterTrainer(network.old, settings, where)
    models = _Models.load(source, weights, dtype, device)
    clips, notes = _clips(files, shape, models)
    network.to(where)
    _train(Training(trainer, clips, network.features, models.image), places, steps, notes)


def _train(training: Training, places: "_Places", steps: int, notes: list[str]) -> None:
    trainer, began = training.trainer, time.monotonic()
    with _bar("training", max(0, steps - trainer.steps) + HELD_OUT) as (bar, task):
        try:
            for loss in training.steps(steps):
                bar.update(task, advance=1, description=f"loss {loss:.4g}")
                if trainer.steps % CHECKPOINT_EVERY == 0:
                    trainer.save(places.state)
        finally:
            if trainer.steps > training.first:
                trainer.save(places.state)
        tuned = trainer.result()
        before, after = training.compare(tuned, lambda: bar.advance(task))
    draw_losses(trainer.losses, training.title(places.adapter.stem, before, after)).save(places.curve)
    training.check(before, after, str(places.state))
    save_adapter(places.adapter, tuned - trainer.old, training.texts(before, after))
    where = f"adapter {places.adapter}\nstate {places.state}\nloss curve {places.curve}"
    report = training.report(before, after, time.monotonic() - began, where, notes)
    say("\n".join(report))


# ------------------------------------------------------------------------------------------------------ files


@dataclass(frozen=True, kw_only=True)
class _Places:
    adapter: Path
    state: Path
    curve: Path


def _places(output: Path, *, resume: bool, overwrite: bool) -> _Places:
    if output.suffix.lower() != ".safetensors":
        raise UserError(f"{output} is not the name of an adapter: end it in .safetensors.")
    places = _Places(adapter=output, state=output.with_suffix(".state.safetensors"), curve=output.with_suffix(".png"))
    resuming = resume and places.state.exists()
    if resume and not resuming:
        raise UserError(
            f"There is no {places.state} to go on with: leave --resume out, or give the -o of that training."
        )
    check_outputs((places.adapter, places.state, places.curve), overwrite=overwrite or resuming)
    return places


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give one with videos, or with latent files that encode wrote.")
    return training_files(folder)


# ------------------------------------------------------------------------------------------------------ clips


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """Frames of a clip at most, and the size that videos are brought to."""

    frames: int
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class _Models:
    """What makes clips of files. image_vae: SVD's own, None where it is not at hand and `vae` stands in for it."""

    vae: VideoVAE
    encoder: "ImageEncoder"
    image_vae: "ImageVAE | None"

    @classmethod
    def load(cls, svd: Path, weights: str, dtype: DType, device: str) -> "_Models":
        from ..svd.unet import load_image_encoder, load_image_vae

        where, _ = device_and_dtype(dtype, device)
        vae = load_weights(weights, dtype, device)
        if (vae.family, vae.info.latent_channels) != ("cv-vae", OUTPUTS):
            raise UserError(
                f"{weights} is {vae.family} with {vae.info.latent_channels} latent channels, and SVD works on those of "
                f"cv-vae with {OUTPUTS}; name a CV-VAE such as vae3d_v1-1 with --weights."
            )
        image_vae = load_image_vae(svd, where)
        if image_vae is None:
            note("the CV-VAE makes SVD's picture of each first frame; a folder of SVD with its vae would do it itself.")
        return cls(vae=vae, encoder=load_image_encoder(svd, where), image_vae=image_vae)

    def image(self, picture: Tensor) -> Tensor:
        """(1, h, w, 3) around 0..1 to (1, 4, h/8, w/8)."""
        if self.image_vae is not None:
            return self.image_vae.encode(picture)
        return self.vae.encode(picture.movedim(-1, 1).unsqueeze(2).mul(2).sub(1)).float().cpu()[:, :, 0]


@dataclass(frozen=True, kw_only=True)
class _Made:
    """A clip without its embedding. z: (t, 4, h, w), unscaled. first: (1, h, w, 3) in 0..1. motion: see `Look`."""

    z: Tensor
    first: Tensor
    fps: float
    motion: float | None


def _clips(files: list[Path], shape: _Shape, models: _Models) -> tuple[list[TrainingClip], list[str]]:
    """All clips of `files`, and sentences on what was left out."""
    clips: list[TrainingClip] = []
    notes: list[str] = []
    with _bar("encoding", len(files)) as (bar, task):
        for file in files:
            bar.update(task, description=file.name)
            make = _of_latent if file.suffix.lower() == LATENTS else _of_video
            before = len(clips)
            for made in make(file, shape, models.vae):
                clips.append(
                    TrainingClip(
                        name=f"{file.name} #{len(clips) - before + 1}",
                        x0=made.z * LATENT_SCALE,
                        first=made.first.half(),
                        seen=models.encoder.see(made.first),
                        rate=max(1, round(made.fps / VIDEO.time)),
                        motion=None if made.motion is None else made.motion * made.fps / VIDEO.time,
                    )
                )
            if len(clips) == before:
                notes.append(left_out(file.name))
            bar.advance(task)
    check_any(clips)
    return with_buckets(clips), notes


def _of_video(file: Path, shape: _Shape, vae: VideoVAE) -> Iterator[_Made]:
    """Clips of a video, one after another, none across a cut."""
    from ..evaluation.protocols import cover

    fps, size = float(probe(file).fps), (shape.height, shape.width)
    at, pictures = 0, _singles(read_frames(file))
    for span in spans_of(look_through(read_frames(file)), shape.frames):
        first = cover(next(itertools.islice(pictures, span.start - at, None)), size)
        more = (cover(frame, size) for frame in itertools.islice(pictures, span.frames - 1))
        at = span.start + span.frames
        z = torch.cat(list(vae.encode_stream(itertools.chain([first], more))), dim=2)  # 1 c t h w
        yield _Made(z=_frames_first(z), first=_picture(first), fps=fps, motion=span.motion)


def _of_latent(file: Path, shape: _Shape, vae: VideoVAE) -> Iterator[_Made]:
    """The beginning of a latent file, up to the first cut; decoded to see what is in it."""
    opened = open_latent(file)
    check_latent(str(file), opened.meta.family, opened.shape)
    count = min(opened.shape[2], VIDEO.latent_frames(shape.frames))
    if count < 2:
        return
    z = opened.read(0, count).float()
    shown = list(itertools.islice(_singles(vae.decode_stream(z)), 0, None, VIDEO.time))  # a frame for each latent
    span = beginning_of(look_through(shown, every=VIDEO.time), count)
    if span.frames >= 2:
        yield _Made(
            z=_frames_first(z)[: span.frames], first=_picture(shown[0]), fps=float(opened.meta.fps), motion=span.motion
        )


def _singles(chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    return (frame for chunk in chunks for frame in chunk.split(1, dim=2))


def _frames_first(z: Tensor) -> Tensor:
    return z[0].movedim(1, 0).float().cpu()


def _picture(frame: Tensor) -> Tensor:
    """(1, 3, 1, h, w) in -1..1 to (1, h, w, 3) in 0..1."""
    return frame[:, :, 0].movedim(1, -1).float().cpu().add(1).div(2).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------- helpers


def _source(svd: Path, dtype: DType, device: str) -> tuple[Path, torch.device, torch.dtype]:
    if not svd.exists():
        raise UserError(f"--svd {svd} is not there; give svd_xt.safetensors, or a folder of SVD from Hugging Face.")
    where, kind = device_and_dtype(dtype, device)
    return svd, where, kind


def _check_installed() -> None:
    if importlib.util.find_spec("diffusers") is None:
        raise UserError('This command needs diffusers, which is not installed: pip install -e ".[svd]" in its folder.')


@contextmanager
def _bar(what: str, total: int) -> Generator[tuple[Progress, TaskID], None, None]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        yield bar, bar.add_task(what, total=total)
