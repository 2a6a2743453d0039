"""`cviv-vae train`: one stage of training, from a TOML file."""

import json
import logging
import signal
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from ..recipes import first_sentence, name_of, recipes
from ..training import processes
from ..training.advice import advice
from ..training.checkpoint import TrainingError
from ..training.config import TrainConfig, read_config
from ..training.data import TrainingDataError
from ..training.iv_image import InflationError
from ..training.journal import Watch, has_tensorboard
from ..training.loop import FINAL, Trainer
from ..training.losses import LossError
from ..training.tables import ConfigError, schema
from .guard import UserError, err, guarded, note, say, warn

WRONG_INPUT = (ConfigError, TrainingDataError, InflationError, LossError)
Resume = Literal["no", "yes", "if any"]
QUIET = 60  # seconds between lines where there is no terminal for a progress bar
SHOWN = ("total", "l1", "l2", "lpips", "decoder_regularization", "encoder_regularization", "discriminator",
         "learning_rate")  # fmt: skip


@guarded
def train_command(
    config: Annotated[
        Path | None, typer.Argument(help="The TOML file of the stage, or a recipe.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    changed: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another value for one key, such as run.steps=100.", metavar="KEY=VALUE"),
    ] = None,
    resume_if_any: Annotated[
        bool, typer.Option("--resume-if-any", help="Go on from the newest checkpoint, or begin where there is none.")
    ] = False,
    new: Annotated[
        str | None, typer.Option("--new", help="Print a recipe, to keep as a file of one's own.", metavar="RECIPE")
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the recipes.")] = False,
    as_schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of the file, for editors.")
    ] = False,
) -> None:
    """Train a VAE, one stage to a file; with torchrun on many GPUs. Ctrl-C or SIGTERM writes a checkpoint and ends.

    A file of one's own begins as a recipe: cviv-vae train --new cv-video-256 > my.toml
    """
    if new is not None or listed or as_schema:
        _print(new, listed=listed)
        return
    if config is None:
        raise UserError("give the TOML file of a stage, or --new RECIPE, --list or --schema.")
    try:
        settings = read_config(config if config.exists() else _recipe(config.name), changed or ())
        with processes.joined(settings.run.device) as device, _notes():
            trainer = Trainer(settings, device)
            try:
                with _stopping() as signals:
                    _begin(trainer, "if any" if resume_if_any else "yes" if resume else "no")
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


def _print(new: str | None, *, listed: bool) -> None:
    if new is not None:
        typer.echo(_recipe(new).read_text(encoding="utf-8"), nl=False)
    elif listed:
        found = recipes()
        width = max(map(len, found))
        for name, path in found.items():
            say(f"{name:{width}}  {first_sentence(path.read_text(encoding='utf-8'))}")
    else:
        typer.echo(json.dumps(schema(TrainConfig), indent=1))


def _recipe(name: str) -> Path:
    found = recipes()
    if name_of(name) not in found:
        raise UserError(f"There is no file and no recipe {name}; there are {', '.join(found)}.")
    return found[name_of(name)]


def _begin(trainer: Trainer, resume: Resume) -> None:
    newest = trainer.checkpoints.newest()
    if resume == "yes" or (resume == "if any" and newest is not None):
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
        for line in advice(trainer.config):
            note(line)
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

        speed, shown = "", ""

        def step(done: int, total: int, figures: Mapping[str, float]) -> None:
            nonlocal shown
            shown = ", ".join(f"{name} {figures[name]:.4g}" for name in SHOWN if name in figures)
            bar.update(task, completed=done, description=f"{shown}{speed}")

        said = time.monotonic()

        def pace(done: int, figures: Mapping[str, float]) -> None:
            nonlocal speed, said
            speed = (
                f"; {figures['steps_per_second']:.3g} steps/s, {figures['data_wait']:.0%} of it waiting for data, "
                f"{figures['memory_gib']:.1f} GiB"
            )
            if main and not err.is_terminal and time.monotonic() - said >= QUIET:
                said = time.monotonic()
                left = timedelta(seconds=round(figures.get("seconds_left", 0)))
                note(f"step {done} of {trainer.config.run.steps}: {shown}{speed}, {left} left")

        def validation(done: int, figures: Mapping[str, float]) -> None:
            texts = [f"{name} {value:.4g}" for name, value in figures.items()]
            say(f"step {done}: {', '.join(texts)}")

        yield Watch(step=step, validation=validation, should_stop=lambda: bool(signals), pace=pace)


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
