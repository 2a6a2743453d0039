"""`cviv-vae train`: one stage of training, from a TOML file."""

import logging
import signal
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from ..training import processes
from ..training.checkpoint import TrainingError
from ..training.config import TrainConfig, read_config
from ..training.data import TrainingDataError
from ..training.iv_image import InflationError
from ..training.journal import Watch, has_tensorboard
from ..training.loop import FINAL, Trainer
from ..training.losses import LossError
from ..training.tables import ConfigError
from .guard import UserError, err, guarded, note, say, warn

WRONG_INPUT = (ConfigError, TrainingDataError, InflationError, LossError)
SHOWN = ("total", "l1", "l2", "lpips", "decoder_regularization", "encoder_regularization", "discriminator")


@guarded
def train_command(
    config: Annotated[Path, typer.Argument(help="The TOML file of the stage.", show_default=False)],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    changed: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another value for one key, such as run.steps=100.", metavar="KEY=VALUE"),
    ] = None,
) -> None:
    """Train a VAE, one stage to a file; with torchrun on many GPUs. Ctrl-C or SIGTERM writes a checkpoint and ends."""
    try:
        settings = read_config(config, changed or ())
        with processes.joined(settings.run.device) as device, _notes():
            trainer = Trainer(settings, device)
            try:
                with _stopping() as signals:
                    _begin(trainer, resume=resume)
                    with _watch(trainer, signals) as watch:
                        finished = trainer.run(watch)
            finally:
                trainer.batches.close()
            _end(trainer, finished=finished, number=signals[0] if signals else signal.SIGTERM)
    except WRONG_INPUT as error:
        raise UserError(str(error)) from error
    except TrainingError as error:
        warn(f"Error: {error}")
        raise typer.Exit(1) from error


def _begin(trainer: Trainer, *, resume: bool) -> None:
    newest = trainer.checkpoints.newest()
    if resume:
        trainer.resume()
    elif newest is not None:
        raise UserError(
            f"{trainer.config.out} holds a run already, up to {newest.name}: add --resume to go on with it, or choose "
            "another folder (--set out=...)."
        )
    if processes.rank() == 0 and not has_tensorboard():
        note(
            "TensorBoard's events are left out; log.jsonl has the same figures. For them: "
            'pip install -e ".[training]" in the folder of cviv-vae.'
        )
    if processes.rank() == 0:
        say(_summary(trainer.config, trainer))


def _summary(config: TrainConfig, trainer: Trainer) -> str:
    count = sum(p.numel() for p in trainer.coder.parameters())
    where = f"{trainer.device}" + (f", {processes.world()} processes" if processes.world() > 1 else "")
    return (
        f"stage {config.stage}: {config.model.family}, {count:,} parameters, from step {trainer.step} to "
        f"{config.run.steps} on {where}, into {config.out}"
    )


def _end(trainer: Trainer, *, finished: bool, number: int) -> None:
    if finished:
        if processes.rank() == 0:
            say(f"weights: {trainer.config.out / FINAL}")
        return
    if processes.rank() == 0:
        newest = trainer.checkpoints.newest()
        warn(f"Stopped at step {trainer.step}. Go on from {newest} with --resume.")
    raise typer.Exit(128 + number)


@contextmanager
def _stopping() -> Generator[list[int], None, None]:
    """Collects the first SIGTERM or Ctrl-C; a second one ends at once."""
    numbers: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if numbers:
            raise KeyboardInterrupt
        numbers.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield numbers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _watch(trainer: Trainer, signals: list[int]) -> Generator[Watch, None, None]:
    """A progress bar on a terminal, and one line for each validation."""
    columns = (
        SpinnerColumn(), TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )  # fmt: skip
    main = processes.rank() == 0
    with Progress(*columns, console=err, transient=True, disable=not (main and err.is_terminal)) as bar:
        task = bar.add_task("", total=trainer.config.run.steps, completed=trainer.step)

        def step(done: int, total: int, figures: Mapping[str, float]) -> None:
            texts = [f"{name} {figures[name]:.4g}" for name in SHOWN if name in figures]
            bar.update(task, completed=done, description=", ".join(texts))

        def validation(done: int, figures: Mapping[str, float]) -> None:
            texts = [f"{name} {value:.4g}" for name, value in figures.items()]
            say(f"step {done}: {', '.join(texts)}")

        yield Watch(step=step, validation=validation, should_stop=lambda: bool(signals))


class _Notes(logging.Handler):
    """Shows what the training logs as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


@contextmanager
def _notes() -> Generator[None, None, None]:
    logger, handler = logging.getLogger("cviv_vae.training"), _Notes(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
