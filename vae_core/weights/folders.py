"""Which files hold the weights: of a Hugging Face folder, an index of shards, or one shard of several."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from .headers import UnreadableError, brief, file_size

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
INDEX = ".index.json"
FOLDER_NAMES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.bin",
    "diffusion_pytorch_model.ckpt",
)
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)", re.IGNORECASE)
_INDEX_LIMIT, _CONFIG_LIMIT = 8 << 20, 1 << 20  # bytes


def weight_files(source: Path) -> tuple[Path, ...]:
    """The files that `source` stands for: one, or all shards of an index, a folder, or of the one that is named.

    Raises UnreadableError where a folder has none or several to choose from, or a shard is missing.
    """
    path = _weights_in(source) if source.is_dir() else source
    if path.name.endswith(INDEX):
        return _of_index(path)
    shard = _SHARD.fullmatch(path.name)
    if shard is None or not path.is_file():
        return (path,)
    stem, _, count, suffix = shard.groups()
    index = path.with_name(f"{stem}{suffix}{INDEX}")
    if index.is_file():
        found = _of_index(index)
        if path in found:
            return found
    return _all_there(
        path.parent, [f"{stem}-{number:05d}-of-{count}{suffix}" for number in range(1, int(count) + 1)], path.name
    )


def read_config(folder: Path) -> dict[str, Any] | None:
    """config.json of a folder, None where there is none. Raises UnreadableError where it is damaged."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    if file_size(path) > _CONFIG_LIMIT:
        raise UnreadableError("its config.json is larger than 1 MB, so it is not the config of a VAE.")
    try:
        config: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UnreadableError("its config.json is damaged: get it again, or give the weight file itself.") from error
    if not isinstance(config, dict):
        raise UnreadableError("its config.json is not a JSON object: get it again, or give the weight file itself.")
    return dict(cast("dict[str, Any]", config))


def _of_index(path: Path) -> tuple[Path, ...]:
    """The shards that an index names, in the order of their names."""
    if file_size(path) > _INDEX_LIMIT:
        raise UnreadableError(f"is an index of more than {_INDEX_LIMIT:,} bytes, so it is not that of a VAE.")
    try:
        parsed: Any = json.loads(path.read_bytes())
        table = cast("Mapping[str, object]", parsed["weight_map"])
        names = sorted({_plain(name) for name in table.values()})
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableError(f"is no index of weights, or a damaged one ({brief(error)}). Get it again.") from error
    if not names:
        raise UnreadableError("is an index that names no files. Get it again.")
    return _all_there(path.parent, names, path.name)


def _plain(name: object) -> str:
    if not isinstance(name, str) or re.search(r"[/\\\x00]", name) or not name.endswith(SUFFIXES):
        raise ValueError(f"{str(name)[:80]!r} is not the name of a weight file in the same folder")
    return name


def _all_there(folder: Path, names: list[str], given: str) -> tuple[Path, ...]:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        are, them = ("is", "it") if len(missing) == 1 else ("are", "them")
        raise UnreadableError(
            f"belongs to weights in {len(names)} shards, of which {', '.join(missing[:3])}{more} {are} not in the "
            f"folder of {given}: get {them}, too."
        )
    return tuple(folder / name for name in names)


def _weights_in(folder: Path) -> Path:
    """The weight file of a folder, or its index: by the usual names, else the only one there is."""
    for name in FOLDER_NAMES:
        for there in (folder / name, folder / f"{name}{INDEX}"):
            if there.is_file():
                return there
    for suffix in SUFFIXES:
        indices = sorted(path for path in folder.glob(f"*{suffix}{INDEX}") if path.is_file())
        found = sorted(path for path in folder.glob(f"*{suffix}") if path.is_file())
        sets = {match[1]: path for path in found if (match := _SHARD.fullmatch(path.name)) is not None}
        single = [path for path in found if _SHARD.fullmatch(path.name) is None]
        choices = indices or [*sets.values(), *single]
        if len(choices) == 1:
            return choices[0]
        if choices:
            names = ", ".join(path.name for path in choices[:5])
            raise UnreadableError(f"this folder holds several weights ({names}): give one of them.")
    nested = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_dir() and any(inner.suffix.lower() in SUFFIXES for inner in path.iterdir())
    )
    hint = f" Its sub-folders {', '.join(nested[:8])} have some: give one of them." if nested else ""
    raise UnreadableError(
        f"this folder holds no weights; looked for {', '.join(FOLDER_NAMES)} and any other *{', *'.join(SUFFIXES)}, "
        f"whole or in shards.{hint}"
    )
