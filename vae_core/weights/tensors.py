"""Small safetensors files of our own, and a hash of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from ..errors import CheckpointError
from .headers import UnreadableError, open_safetensors, read_header, sniff
from .writing import write_safetensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, complete or not there at all."""
    if path.suffix.lower() != ".safetensors":
        raise CheckpointError(f"Cannot save {path.name}: give a name that ends in .safetensors.")
    if not path.parent.is_dir():
        raise CheckpointError(f"Cannot save {path.name}: the folder {path.parent} does not exist. Make it first.")
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_safetensors(path, kept, metadata)


def read_tensors(path: Path, largest: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and texts of a safetensors file of up to `largest` bytes. Raises CheckpointError for any other."""
    try:
        if sniff(path) != "safetensors":
            raise UnreadableError("is a PyTorch or zip file, and a safetensors file is needed.")
        if path.stat().st_size > largest:
            raise UnreadableError(f"has {path.stat().st_size:,} bytes, and up to {largest:,} are read: a wrong file.")
        header = read_header(path)
        with open_safetensors(path) as file:
            tensors = {name: file.get_tensor(name).clone() for name in header.shapes}
    except (UnreadableError, safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return tensors, header.metadata


def digest(*values: Tensor | Mapping[str, Tensor] | str) -> str:
    """A hash of texts and of the values, types and shapes of tensors."""
    found = hashlib.sha256()
    for value in values:
        for name, tensor in value.items() if isinstance(value, Mapping) else (("", value),):
            if isinstance(tensor, str):
                found.update(repr(tensor).encode())
                continue
            found.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
