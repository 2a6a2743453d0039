"""Every way a command can end: its exit code and its one line; and every line that it says."""

import errno
import functools
import re
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, ParamSpec, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from ..door.downloads import DownloadError
from ..door.output import NotFiniteError
from ..errors import AdapterError, BudgetError, CheckpointError, LatentFileError, VideoError
from ..run.stream import is_out_of_memory

P = ParamSpec("P")
_ENDING = ("SIGTERM", "SIGHUP", "SIGBREAK")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)


class UserError(ValueError):
    """A choice on the command line that cannot be carried out."""


class Terminated(BaseException):
    """SIGTERM or, when its terminal was closed, SIGHUP arrived: end as on Ctrl-C. number: of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


_ANSWERED = (
    UserError,
    AdapterError,
    BudgetError,
    CheckpointError,
    LatentFileError,
    VideoError,
    NotFiniteError,
)  # whose text is all that a user needs


class _Mode:
    debug = False


def set_debug(value: bool) -> None:
    """Whether unexpected errors show their traceback."""
    _Mode.debug = value


def say(text: str) -> None:
    """Lines to stdout, as they are: neither wrapped nor read as markup; what would steer a terminal is shown."""
    out.print(visible(text), soft_wrap=True, markup=False)


def show(table: Table) -> None:
    """A table to stdout; where that is no terminal, as wide as its content, so that no name is cut or wrapped."""
    if out.is_terminal:
        out.print(table)
        return
    wide = Console(file=out.file, width=10_000, highlight=False, emoji=False)
    wide.width = wide.measure(table).maximum
    wide.print(table)


def cell(text: str) -> Text:
    """A name from outside, for a table: not read as markup, with its control characters written out."""
    return Text(visible(text))


def note(text: str) -> None:
    """One line to stderr that is no error."""
    err.print(visible(f"Note: {text}"), soft_wrap=True, markup=False)


def warn(text: str) -> None:
    """One line to stderr that tells of a failure while the command goes on."""
    err.print(visible(text), soft_wrap=True, markup=False)


def say_written(files: Iterable[tuple[str, Path]]) -> None:
    """What was made, and where it lies."""
    for name, path in files:
        say(f"{name}: {path}")


def visible(text: str) -> str:
    """`text` with its control characters, from a file's names and texts, written out: an escape as \\x1b.

    So are bytes of names that are no UTF-8.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class Commands(TyperGroup):
    """The commands, whose wrong use is one line on stderr, too."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:  # noqa: ANN401, as typer has it
        """Run the command of a command line; ends in SystemExit."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        try:
            sys.exit(super().main(*args, standalone_mode=False, **extra) or 0)
        except typer.Abort:
            sys.exit(1)
        except Exception as error:  # typer brings its own copy of click, or uses the one that is there
            message: Callable[[], str] | None = getattr(error, "format_message", None)
            context: Any = getattr(error, "ctx", None)
            if message is None:
                raise
            if type(error).__name__ == "NoArgsIsHelpError":
                cast("Any", error).show()
            else:
                where = "cviv-vae" if context is None else context.command_path
                said = message().strip().rstrip(".").replace("Value error, ", "")
                warn(f"Error: {said}{'' if said.endswith('?') else '.'} See {where} -h.")
            sys.exit(2)


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Turn whatever ends `command` into one line on stderr and an exit code."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with _terminable():
                command(*args, **kwargs)
        except KeyboardInterrupt:
            _end("Stopped. No unfinished file is left behind.", 130)
        except Terminated as ended:
            _end("Ended from outside. No unfinished file is left behind.", 128 + ended.number)
        except _ANSWERED as error:
            _end(str(error), 2)
        except DownloadError as error:
            _end(str(error), 1)
        except OSError as error:
            if error.errno in DISK_FULL:
                _end("The disk is full. No unfinished file is left behind; make room, or choose another -o.", 1)
            if error.errno is None:
                _unexpected(error)
            _end(_os_words(error), 2)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                _end(
                    "Out of memory, by the smallest plan too. Use smaller frames, --dtype bfloat16 or --device cpu.", 1
                )
            _unexpected(error)

    return wrapper


def _unexpected(error: Exception) -> NoReturn:
    if _Mode.debug:
        traceback.print_exc()
    first = (str(error).strip().splitlines() or [""])[0]
    _end(f"Unexpected {type(error).__name__}: {first} (cviv-vae --debug ... shows where)", 1)


def _os_words(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}."


def _end(line: str, code: int) -> NoReturn:
    if _Mode.debug and sys.exc_info()[0] is not None and code == 2:
        traceback.print_exc()
    warn(f"Error: {line}" if code in (1, 2) else line)
    raise typer.Exit(code) from None


@contextmanager
def _terminable() -> Generator[None, None, None]:
    """Let what ends the process unwind the stack, so that nothing half-written stays; what is ignored stays so."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    before: dict[int, Any] = {}
    try:
        for name in _ENDING:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, stop)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
