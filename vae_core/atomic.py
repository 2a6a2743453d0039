"""Files that appear under their name only when they are complete.

What is written goes to a hidden file beside the target, which takes its name at the end. Where the system refuses that
for a moment (a virus scanner or a player holds one of the two), it is tried again for some seconds; where it refuses
for good, the finished file is kept, and the error says where.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import time
from collections.abc import Generator
from pathlib import Path

PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # seconds between attempts to give a file its name
LONGEST_NAME = 255  # bytes


@contextlib.contextmanager
def atomic_write(path: Path) -> Generator[Path]:
    """The hidden file to write instead of `path`; it takes that name when the block ends, and goes if it fails.

    Raises OSError where the name is refused for good; the finished file is then kept.
    """
    part = hidden(path)
    try:
        yield part
    except BaseException:
        remove(part)
        raise
    give_name(part, path)


def hidden(path: Path) -> Path:
    """A hidden file of this process beside `path`, with the same ending; its name fits where that of `path` does."""
    name = f".{path.stem}.{os.getpid()}.part{path.suffix}"
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32]}.{os.getpid()}.part{path.suffix}"
    return path.with_name(name)


def give_name(part: Path, path: Path) -> None:
    """Put the complete file `part` on the disk and in the place of `path`. Raises OSError as `atomic_write`."""
    try:
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # else a power failure could leave the name without the content
        _set_mode(part, path)
    except BaseException:
        remove(part)
        raise
    for pause in (*PAUSES, None):
        try:
            os.replace(part, path)
            return
        except OSError as error:
            if pause is None or not isinstance(error, PermissionError):
                raise OSError(
                    error.errno,
                    f"The finished file could not take its name ({error.strerror}); it is kept as {part}. Close what "
                    f"uses {path.name}, or make the folder writable, and rename it",
                    os.fspath(path),
                ) from error
            time.sleep(pause)


def _set_mode(part: Path, path: Path) -> None:
    """Give `part` the permissions of the file it replaces, else those that any new file here has.

    Some libraries write files that nobody else may read, whatever the user's umask.
    """
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # a file system without permissions, or a full one
        if path.exists():
            mode = path.stat().st_mode
        else:
            probe = part.with_name(f".{os.getpid()}.{time.monotonic_ns()}.part")
            os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            mode = probe.stat().st_mode
            probe.unlink()
        part.chmod(mode & 0o777)


def sweep(path: Path) -> None:
    """Delete what processes that were killed have left of `path`, or in it if it is a folder."""
    if os.name != "posix":
        return
    folder = path.is_dir()
    stem, suffix = ("*", "*") if folder else map(glob.escape, (path.stem, path.suffix))
    for part in (path if folder else path.parent).glob(f".{stem}.*.part{suffix}"):
        number = part.name.rpartition(".part")[0].rpartition(".")[2]
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            remove(part)
        except (ValueError, OverflowError, PermissionError):
            continue


def remove(part: Path) -> None:
    """Delete an unfinished file, if it is there and the system lets us."""
    with contextlib.suppress(OSError):
        part.unlink(missing_ok=True)
