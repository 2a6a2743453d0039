"""A folder for one job at a time."""

from __future__ import annotations

import errno
import importlib
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .shards import EncodeJobError

LOCK = ".lock"
_TAKEN = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Hold the folder; the system lets go of it when this process ends, however it ends.

    Raises EncodeJobError where another job holds it. A file system without locks is used without.
    """
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            _hold(file)
        except OSError as error:
            if error.errno in _TAKEN:
                file.seek(0)
                who = file.read().strip()
                raise EncodeJobError(
                    f"Another job is at work in {folder} ({who}): wait for its end, or choose another folder."
                ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _hold(file: IO[str]) -> None:
    module: Any
    if os.name == "nt":
        module = importlib.import_module("msvcrt")
        file.seek(1 << 20)  # beyond the text, which others are to read
        module.locking(file.fileno(), module.LK_NBLCK, 1)
    else:
        module = importlib.import_module("fcntl")
        module.flock(file, module.LOCK_EX | module.LOCK_NB)
