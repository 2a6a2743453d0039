"""The command line `cviv-vae`: video in, latents and video out, without a line of Python."""

import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager

_NEEDED = ("av", "PIL", "rich", "typer")


def main() -> None:
    """Run the command line.

    Ends in SystemExit: 0 done, 1 failed, 2 wrong input, 3 done but videos left out, 130 stopped by Ctrl-C.
    """
    try:
        with _silent():
            from .app import run  # imports what only the command line needs
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _NEEDED:
            raise
        sys.exit(_missing(error.name))
    run()


@contextmanager
def _silent() -> Generator[None, None, None]:
    """While nothing is begun yet, let Ctrl-C end the process at once and without a word."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _missing(module: str) -> int:
    sys.stderr.write(
        f'The command line needs {module}, which is not installed: pip install -e ".[cli]" in its folder.\n'
    )
    return 2
