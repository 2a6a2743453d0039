"""Bars that show how far a command has come, on a terminal."""

from collections.abc import Generator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from .guard import err
from .work import Advance


class _Speed(ProgressColumn):
    """Frames per second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f}/s", style="progress.data.speed")


@contextmanager
def bar_of(what: str, total: int | None, unit: str) -> Generator[tuple[Progress, TaskID], None, None]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Progress(
        *columns, _Speed(), TimeRemainingColumn(), console=err, transient=True, disable=not err.is_terminal
    ) as bar:
        yield bar, bar.add_task(what, total=total)


@contextmanager
def progress(what: str, total: int | None) -> Generator[Advance, None, None]:
    with bar_of(what, total, "frames") as (bar, task):
        yield lambda count: bar.advance(task, count)
