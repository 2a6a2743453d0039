"""Weight files read into flat dicts of tensors. No code stored in a file is ever run, whatever its name."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from ..errors import CheckpointError
from .folders import SUFFIXES, read_config, weight_files
from .headers import NAME_LIMIT, UnreadableError, brief, file_size, open_safetensors, read_header, sniff
from .pickles import read_legacy, read_zip

# Under these names a training checkpoint keeps its weights; the first one found is taken.
CONTAINERS = (
    "state_dict", "model_state_dict", "model", "module", "vae", "autoencoder", "first_stage_model", "generator",
    "params", "weights", "net", "ema_state_dict", "params_ema", "ema_model", "ema", "model_ema",
)  # fmt: skip
# Tensors whose name starts with one of these parts belong to the training, not to the VAE, and are dropped.
FOREIGN = (
    "loss", "losses", "discriminator", "disc", "perceptual_loss", "perceptual", "lpips", "vgg", "logvar", "model_ema",
    "ema", "ema_model", "optimizer", "optimizers", "lr_scheduler", "lr_schedulers",
)  # fmt: skip
# The last part of a name by which our families are found under a prefix.
_TELL_TALES = (
    "decoder.conv_in.weight",
    "encoder.conv_in.weight",
    "decoder.conv1.conv.weight",
    "encoder.conv1.conv_2d.weight",
    "encoder.conv1.conv_3d.weight",
    "encoder.conv1.conv_3d.causal.weight",
)
_DEPTH = 5

_log = logging.getLogger("cviv-vae")


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """What a weight file holds.

    tensors: by their names in the file, on the CPU, in the file's dtypes. They are mapped from the file: pages are read
    when they are first used, and may be dropped again under pressure. Writing to them changes neither file nor disk.
    metadata: of a safetensors file, else empty. config: config.json of a Hugging Face folder or of shards, else None.
    path: the file the tensors came from, the first of several shards.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config: dict[str, Any] | None
    path: Path


def read_weights(source: str | Path) -> WeightFile:
    """Read a .safetensors, .pth, .pt, .ckpt or .bin file, or a Hugging Face folder, into a flat dict of tensors.

    Weights in shards are read as one, whether their folder, their index (.index.json) or one of them is given.

    The kind is decided by the content. safetensors files and those of `torch.save` are mapped into memory privately
    (copy on write) and each tensor is a view of that mapping, so a 365 MB file takes no RAM until its values are used
    and never a second copy; only the legacy format of PyTorch before 1.6 is read whole. Weights nested in a training
    checkpoint (CONTAINERS) are unwrapped, what is no tensor in addition to them (epoch, optimizer state) is left out.

    Raises CheckpointError, which says what the file seems to be and what to do, for anything that is not weights, is
    damaged, or would need pickled code to be run.
    """
    given = Path(source)
    try:
        paths = weight_files(given)
        first = paths[0]
        config = read_config(first.parent) if given.is_dir() or len(paths) > 1 else None
    except UnreadableError as error:
        raise CheckpointError(f"{given}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{given}: cannot be read: {error}.") from error
    if len(paths) > 1 and given.suffix in SUFFIXES:
        _log.info("%s is one of %d shards of weights: all of them are read.", given.name, len(paths))
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        found, texts = _read_one(path)
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise CheckpointError(
                f"{path}: holds {twice[0][:80]!r}, as another shard of these weights does: they do not belong together."
            )
        tensors |= found
        metadata |= texts
    if not tensors:
        raise CheckpointError(f"{first}: holds no tensors. Give a file of VAE weights.")
    return WeightFile(tensors=tensors, metadata=metadata, config=config, path=first)


def _read_one(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of one file."""
    try:
        kind = sniff(path)
        if kind == "safetensors":
            return _read_safetensors(path)
        tensors = _read_torch(path, kind)
        if path.suffix.lower() == ".safetensors":
            raise UnreadableError("is not a safetensors file but one of PyTorch under a wrong name: rename it to .pth.")
        return tensors, {}
    except UnreadableError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.") from error


def strip_foreign(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without the prefix of the model they were saved in, and without those of its training.

    The prefix (`first_stage_model.`, `module.`, `_orig_mod.`, also several in a row) is what stands before a name that
    only our families have; it is stripped if there is one such prefix, or one that is empty. Names that start with a
    part in FOREIGN are dropped, before and after stripping. All others stay, for a strict loader to report.
    """
    ours = {name: tensor for name, tensor in tensors.items() if not _is_foreign(name)}
    prefix = _prefix(ours)
    result = {name: tensor for name, tensor in ours.items() if not prefix or not name.startswith(prefix)}
    for name, tensor in ours.items():
        if prefix and name.startswith(prefix):
            short = name[len(prefix) :]
            if not _is_foreign(short):
                result[name if short in result else short] = tensor
    return result


def _prefix(names: Iterable[str]) -> str:
    found: set[str] = set()
    for name in names:
        for tell_tale in _TELL_TALES:
            prefix = name[: -len(tell_tale)]
            if (
                name.endswith(tell_tale)
                and (not prefix or prefix.endswith("."))
                and not set(FOREIGN) & set(name.split("."))
            ):
                found.add(prefix)
    return found.pop() if len(found) == 1 else ""


def _is_foreign(name: str) -> bool:
    first = name.partition(".")[0]
    return first in FOREIGN or first.startswith("discriminator_")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    header = read_header(path)
    try:
        with open_safetensors(path) as file:
            return {name: file.get_tensor(name) for name in header.shapes}, header.metadata
    except Exception as error:  # a dtype that this torch lacks, or a header that the library finds wrong
        raise UnreadableError(f"cannot be read by safetensors ({brief(error)}). Get it again.") from error


def _read_torch(path: Path, kind: str) -> dict[str, Tensor]:
    loaded = read_zip(path, _zip_records(path)) if kind == "zip" else read_legacy(path)
    tensors = _unwrap(loaded)
    for name, tensor in tensors.items():
        if len(name) > NAME_LIMIT:
            raise UnreadableError(f"is damaged: it has a tensor name of {len(name):,} characters. Get it again.")
        if tensor.is_complex():
            raise UnreadableError(f"holds {name[:80]!r}, which is not a tensor of plain numbers. Give float weights.")
    return tensors


def _zip_records(path: Path) -> list[zipfile.ZipInfo]:
    """The contents of an archive that torch.save wrote, whose records lie in the file as they should."""
    size = file_size(path)
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Exception as error:  # zipfile: BadZipFile, and several others where bytes are wrong
        raise UnreadableError(
            "is a truncated or damaged PyTorch file (its list of contents, at the end, cannot be read). The download "
            "was cut short: get it again."
        ) from error
    names = [record.filename for record in records]
    if sum(name.endswith("/data.pkl") for name in names) != 1:
        raise UnreadableError("is a zip archive, not a PyTorch file: unpack it and give the weights in it.")
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise UnreadableError(
            "is a TorchScript program, which holds code and is refused: save its state_dict() as .safetensors from a "
            "trusted environment."
        )
    whole = all(
        record.compress_type == zipfile.ZIP_STORED
        and not record.flag_bits & 1
        and record.compress_size == record.file_size
        and 0 <= record.header_offset <= size - 30 - record.file_size
        for record in records
    )
    if not whole or len(set(names)) != len(names) or sum(record.file_size for record in records) > size:
        raise UnreadableError("is a damaged PyTorch file (its records do not fit the file). Get it again.")
    return records


def _unwrap(loaded: object, depth: int = _DEPTH) -> dict[str, Tensor]:
    """The tensors of a checkpoint, from the first container that holds some, else from `loaded` itself."""
    if not isinstance(loaded, Mapping):
        raise UnreadableError(f"holds one {type(loaded).__name__}, not weights by name. Give a state dict.")
    items = cast("Mapping[object, object]", loaded)
    if depth:
        for name in CONTAINERS:
            inner = items.get(name)
            if isinstance(inner, Mapping):
                tensors = _unwrap(cast("object", inner), depth - 1)
                if tensors:
                    return tensors
    return {
        name: tensor.detach() for name, tensor in items.items() if isinstance(name, str) and isinstance(tensor, Tensor)
    }
