"""Weight files read into flat dicts of tensors. No code stored in a file is ever run, whatever its name."""

from __future__ import annotations

import json
import re
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import CheckpointError
from .headers import NAME_LIMIT, UnreadableError, brief, file_size, open_safetensors, read_header, sniff

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
FOLDER_NAMES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.bin",
    "diffusion_pytorch_model.ckpt",
)
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


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """What a weight file holds.

    tensors: by their names in the file, on the CPU, in the file's dtypes. They are mapped from the file: pages are read
    when they are first used, and may be dropped again under pressure. Writing to them changes neither file nor disk.
    metadata: of a safetensors file, else empty. config: config.json of a Hugging Face folder, else None.
    path: the file the tensors came from.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config: dict[str, Any] | None
    path: Path


def read_weights(source: str | Path) -> WeightFile:
    """Read a .safetensors, .pth, .pt, .ckpt or .bin file, or a Hugging Face folder, into a flat dict of tensors.

    The kind is decided by the content. safetensors files and those of `torch.save` are mapped into memory privately
    (copy on write) and each tensor is a view of that mapping, so a 365 MB file takes no RAM until its values are used
    and never a second copy; only the legacy format of PyTorch before 1.6 is read whole. Weights nested in a training
    checkpoint (CONTAINERS) are unwrapped, what is no tensor beside them (epoch, optimizer state) is left out.

    Raises CheckpointError, which says what the file seems to be and what to do, for anything that is not weights, is
    damaged, or would need pickled code to be run.
    """
    path = Path(source)
    config: dict[str, Any] | None = None
    try:
        if path.is_dir():
            config = _read_config(path / "config.json")
            path = _weights_in(path)
        kind = sniff(path)
        if path.suffix.lower() == ".safetensors" and kind != "safetensors":
            found = "a zip archive or a PyTorch file" if kind == "zip" else "a PyTorch (pickle) file"
            raise UnreadableError(f"is not a safetensors file but {found}: if it holds weights, rename it to .pth.")
        if kind == "safetensors":
            tensors, metadata = _read_safetensors(path)
        else:
            tensors, metadata = _read_torch(path, kind), {}
    except UnreadableError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.") from error
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors. Give a file of VAE weights.")
    return WeightFile(tensors=tensors, metadata=metadata, config=config, path=path)


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


def _weights_in(folder: Path) -> Path:
    """The weight file of a Hugging Face folder: by its usual names, else the only file with a suffix of weights."""
    for name in FOLDER_NAMES:
        if (folder / name).is_file():
            return folder / name
    for suffix in SUFFIXES:
        found = sorted(p for p in folder.glob(f"*{suffix}") if p.is_file())
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(p.name for p in found[:5])
            raise UnreadableError(f"this folder holds several weight files ({names}): give one of them.")
    nested = sorted(
        p.name for p in folder.iterdir() if p.is_dir() and any(q.suffix.lower() in SUFFIXES for q in p.iterdir())
    )
    hint = f" Its sub-folders {', '.join(nested[:8])} have some: give one of them." if nested else ""
    raise UnreadableError(
        f"this folder holds no weights; looked for {', '.join(FOLDER_NAMES)} and any other *{', *'.join(SUFFIXES)}."
        f"{hint}"
    )


def _read_config(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    if file_size(path) > 1 << 20:
        raise UnreadableError("its config.json is larger than 1 MB, so it is not the config of a VAE.")
    try:
        config: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UnreadableError("its config.json is damaged: get it again, or give the weight file itself.") from error
    if not isinstance(config, dict):
        raise UnreadableError("its config.json is not a JSON object: get it again, or give the weight file itself.")
    return dict(config)  # pyright: ignore[reportUnknownArgumentType]


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    header = read_header(path)
    try:
        with open_safetensors(path) as file:
            return {name: file.get_tensor(name) for name in header.shapes}, header.metadata
    except Exception as error:  # a dtype that this torch lacks, or a header that the library finds wrong
        raise UnreadableError(f"cannot be read by safetensors ({brief(error)}). Get it again.") from error


def _read_torch(path: Path, kind: str) -> dict[str, Tensor]:
    size = file_size(path)
    if kind == "zip":
        _check_zip(path, size)
    else:
        _refuse_tar(path)
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")
    except Exception as error:  # damage shows in torch as nearly every exception there is
        raise UnreadableError(_why_not(error)) from error
    tensors = _unwrap(loaded)
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, size)
    return tensors


def _check_zip(path: Path, size: int) -> None:
    """Refuse an archive that torch.save did not write, or whose records do not lie in the file as they should."""
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


def _refuse_tar(path: Path) -> None:
    """A tar file can be made to start like a pickle, and older versions of torch would unpickle what is in it."""
    try:
        with tarfile.open(path, "r:"):
            pass
    except Exception:  # tarfile: TarError, and others where bytes are wrong; either way not a tar file
        return
    raise UnreadableError("is a tar archive: convert it to .safetensors in a trusted environment.")


def _why_not(error: Exception) -> str:
    text = str(error)
    if "nsupported global" in text or "nsupported class" in text or "GLOBAL " in text or "torch.jit" in text:
        name = re.search(r"GLOBAL (\S+)", text)
        needs = f" ({name[1][:80].rstrip(',.')})" if name else ""
        return (
            f"holds pickled code{needs} and is refused, because loading it could run anything: convert it to "
            ".safetensors in an environment that you trust with it."
        )
    return f"is a truncated or damaged PyTorch file ({brief(error)}). Get it again."


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


def _check_tensor(name: str, tensor: Tensor, size: int) -> None:
    """A pickle may describe a tensor that its stored bytes do not back: a huge one, a sparse one, one without any."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if len(name) > NAME_LIMIT:
        raise UnreadableError(f"is damaged: it has a tensor name of {len(name):,} characters. Get it again.")
    if not plain or tensor.is_nested or tensor.is_complex():
        raise UnreadableError(f"holds {name[:80]!r}, which is not a plain tensor of numbers. Give float weights.")
    stored = tensor.untyped_storage().nbytes()
    needed = tensor.numel() * tensor.element_size()
    if stored > size or needed > stored - tensor.storage_offset() * tensor.element_size():
        raise UnreadableError(
            f"is damaged: {name[:80]!r} has shape {tuple(tensor.shape)}, more than the file holds. Get it again."
        )
