"""The command line `cviv-vae`: video in, latents and video out, without a line of Python."""

import sys

_NEEDED = ("av", "PIL", "rich", "typer")


def main() -> None:
    """Run the command line.

    Ends in SystemExit: 0 done, 1 failed, 2 wrong input, 3 done but videos left out, 130 stopped by Ctrl-C.
    """
    try:
        from .app import run  # imports what only the command line needs
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _NEEDED:
            raise
        sys.exit(_missing(error.name))
    except KeyboardInterrupt:
        sys.exit(130)
    run()


def _missing(module: str) -> int:
    sys.stderr.write(f"The command line needs {module}, which is not installed: pip install 'cviv-vae[cli]'\n")
    return 2
