"""Node schemas for old and new ComfyUI: keywords that the running version does not know are left out."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io

CATEGORY = "video vae"
GIB = 1 << 30
TILINGS = ("exact", "exact, else blended")

_SCHEMA_FIELDS = frozenset(field.name for field in dataclasses.fields(io.Schema))


def field(kind: Any, id: str, **keywords: Any) -> Any:  # noqa: A002, ComfyUI's name for it
    """An input of `kind` (io.Int, io.Vae, ...); `advanced` and other new keywords are dropped where unknown."""
    known = inspect.signature(kind.Input.__init__).parameters
    return kind.Input(id, **{name: value for name, value in keywords.items() if name in known})


def describe(**keywords: Any) -> io.Schema:
    """A schema in our category; `search_aliases` and other new keywords are dropped where unknown."""
    keywords = {"category": CATEGORY, **keywords}
    return io.Schema(**{name: value for name, value in keywords.items() if name in _SCHEMA_FIELDS})


def vae_input() -> Any:
    """The input `vae` that most nodes share."""
    return field(io.Vae, "vae", tooltip="A video VAE from Load Video VAE.")


def latent_input() -> Any:
    """The input `samples` that most nodes share."""
    return field(
        io.Latent,
        "samples",
        display_name="latent",
        tooltip="A latent of the VAE's family: from Video VAE Encode, a sampler or a file. 4-D (frames on the batch "
        "axis) and 5-D both work.",
    )


def budget_input() -> Any:
    """The input `memory_budget_gb` that most nodes share."""
    return field(
        io.Float,
        "memory_budget_gb",
        default=0.0,
        min=0.0,
        max=1024.0,
        step=0.1,
        tooltip="Device memory that working on one chunk may take, in GiB, weights not counted. A smaller budget gives "
        "smaller tiles and the same picture. 0 = as much as is free.",
        advanced=True,
    )


def tiling_input() -> Any:
    """The input `tiling` that the nodes share which encode and decode."""
    return field(
        io.Combo,
        "tiling",
        options=list(TILINGS),
        default=TILINGS[0],
        optional=True,
        tooltip="exact: the picture of whole frames, whatever the memory; where nothing exact fits, an error says how "
        "much would do. exact, else blended: then CV-VAE's official tiles, whose borders can be seen; the report says "
        "so.",
        advanced=True,
    )


def preview_input(*, optional: bool = False) -> Any:
    """The input `preview` of the nodes that encode and decode."""
    return field(
        io.Boolean,
        "preview",
        default=True,
        optional=optional,
        tooltip="Show the newest frame on this node while it works.",
        advanced=True,
    )


def dtype_words(dtype: torch.dtype) -> str:
    """A number format as users know it: float32, bfloat16, float16."""
    return str(dtype).removeprefix("torch.")


def size_words(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / (1 << 20):.0f} MiB"


def check_choice(what: str, got: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `got` is one of `allowed`; ComfyUI 0.3 does not check the choices of V3 nodes."""
    if got not in allowed:
        raise ValueError(f"{what} is {got!r}; choose one of: {', '.join(allowed)}.")


def before_run(*checks: tuple[Callable[[str], object], str | None]) -> bool | str:
    """The answer of `validate_inputs`: True, or what the first failing check says of its value.

    A value is None where it comes through a link and is not known yet.
    """
    try:
        for check, value in checks:
            if value is not None:
                check(value)
    except ValueError as error:
        return str(error)
    return True


def stamp(find: Callable[[Any], Path | None], name: Any) -> str:
    """For `fingerprint_inputs`: a hash that changes with the file that `find(name)` gives, or with why there is none.

    ComfyUI writes it into what it saves, so it tells nothing of this machine.
    """
    try:
        path = find(name)
        status = None if path is None else path.stat()
        told = "" if status is None else repr((str(path), status.st_mtime_ns, status.st_size))
    except (AttributeError, TypeError, ValueError, OSError) as error:  # AttributeError: the name comes through a link
        told = str(error)
    return hashlib.sha256(told.encode()).hexdigest()
