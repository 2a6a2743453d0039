"""Weight files on disk, complete or not there at all; a full disk is an OSError, whichever library meets it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..atomic import atomic_write


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous tensors on the CPU. Raises OSError where the disk does not take them."""
    with atomic_write(path) as part:
        try:
            safetensors.torch.save_file(dict(tensors), part, metadata=dict(metadata))
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from error


def write_torch(path: Path, value: object) -> None:
    """Write what torch.save takes. Raises OSError where the disk does not take it."""
    with atomic_write(path) as part, part.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # "unexpected pos", raised while what really happened is on its way
            cause = error.__context__
            if isinstance(cause, OSError) or (cause is not None and not isinstance(cause, Exception)):
                raise cause from None
            raise
