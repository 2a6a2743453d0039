"""Which files hold the weights: of a Hugging Face folder, an index of shards, or one shard of several."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from .headers import UnreadableError, brief, dangling, file_size

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
_INDEX = re.compile(r"(.+)\.index(\.\w+)?\.json")  # diffusers puts a variant such as fp16 between
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
    if is_index(path):
        return _of_index(path)
    shard = _SHARD.fullmatch(path.name)
    if shard is None or not path.is_file():
        return (path,)
    stem, _, count, suffix = shard.groups()
    for index in _indices(path.parent, suffix):
        base, variant = cast("re.Match[str]", _INDEX.fullmatch(index.name)).groups("")
        found = _named_by(index) if stem == base.removesuffix(suffix) + variant else []
        if path.name in found:
            return _all_there(path.parent, found, path.name)
    return _all_there(
        path.parent, [f"{stem}-{number:05d}-of-{count}{suffix}" for number in range(1, int(count) + 1)], path.name
    )


def is_index(path: Path) -> bool:
    """Whether this is the name of an index of shards."""
    return _INDEX.fullmatch(path.name) is not None


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


def _indices(folder: Path, suffix: str) -> list[Path]:
    """The indices of a folder for weight files of this ending."""
    found = ((path, _INDEX.fullmatch(path.name)) for path in sorted(folder.glob("*.json")))
    return [path for path, match in found if match is not None and match[1].endswith(suffix) and path.is_file()]


def _of_index(path: Path) -> tuple[Path, ...]:
    return _all_there(path.parent, _named_by(path), path.name)


def _named_by(path: Path) -> list[str]:
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
    return names


def _plain(name: object) -> str:
    if not isinstance(name, str) or re.search(r"[/\\\x00]", name) or not name.endswith(SUFFIXES):
        raise ValueError(f"{str(name)[:80]!r} is not the name of a weight file in the same folder")
    return name


def _all_there(folder: Path, names: list[str], given: str) -> tuple[Path, ...]:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        links = [text for name in missing if (text := dangling(folder / name))]
        if links:
            raise UnreadableError(f"belongs to weights in {len(names)} shards, of which {missing[0]} {links[0]}")
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
        for there in (folder / name, folder / f"{name}.index.json"):
            if there.is_file():
                return there
    for suffix in SUFFIXES:
        indices = _indices(folder, suffix)
        found = sorted(path for path in folder.glob(f"*{suffix}") if path.is_file())
        sets = {match[1]: path for path in found if (match := _SHARD.fullmatch(path.name)) is not None}
        single = [path for path in found if _SHARD.fullmatch(path.name) is None]
        choices = indices or [*sets.values(), *single]
        if len(choices) == 1:
            return choices[0]
        if choices:
            names = ", ".join(path.name for path in choices[:5])
            raise UnreadableError(f"this folder holds several weights ({names}): give one of them.")
    for path in folder.iterdir():
        if path.suffix.lower() in SUFFIXES and (why := dangling(path)):
            raise UnreadableError(f"this folder holds no weights; {path.name} {why}")
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
