"""Whether a latent file was made by what stands before a node now: a hash of that graph, kept in the file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comfy_execution.utils import get_executing_context

from ...vae_core.media.latents import open_latent
from .paths import SUFFIX, reused_path

MADE_BY, ITEM = "made_by", "item"  # texts of the file


def made_by(hidden: Any, names: tuple[str, ...]) -> str | None:
    """A hash of all that leads to the inputs `names` of the node that `hidden` belongs to; None where none is known.

    Of each node before it counts: its kind, its widgets, and what it says of the files it reads.
    """
    try:
        node = _node(hidden, str(hidden.unique_id))
        inputs = {name: value for name, value in node["inputs"].items() if name in names}
        return _digest(_described(hidden, inputs, {}))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):  # a graph that holds more than JSON
        return None


def item_of_list() -> int:
    """The number of the item that a node runs for, of a list that came to it; 0 for one that is none."""
    context = get_executing_context()
    return (None if context is None else context.list_index) or 0


def reusable(prefix: str, made: str | None) -> dict[int, Path]:
    """The files of this name, numbered ones, too, that were made so, by the number of their item."""
    if made is None:
        return {}
    first = reused_path(prefix)
    name = first.name.removesuffix(SUFFIX)
    pattern = re.compile(rf"{re.escape(name)}(_\d+)?{re.escape(SUFFIX)}", re.IGNORECASE)
    found: dict[int, Path] = {}
    for path in sorted(first.parent.iterdir()) if first.parent.is_dir() else []:
        if pattern.fullmatch(path.name):
            texts = _texts(path)
            if texts.get(MADE_BY) == made and texts.get(ITEM, "").isdigit():
                found.setdefault(int(texts[ITEM]), path)
    return found


def stamp_of_files(prefix: str) -> str:
    """A hash that changes when a file of this name comes, goes or changes; it tells nothing of this machine."""
    try:
        first = reused_path(prefix)
    except (ValueError, OSError) as error:
        return _digest(str(error))
    start = first.name.removesuffix(SUFFIX)
    files = sorted(first.parent.glob(f"*{SUFFIX}")) if first.parent.is_dir() else []
    return _digest([[path.name, *_stamp(path)] for path in files if path.name.startswith(start)])


def _stamp(path: Path) -> tuple[int, int]:
    if not path.exists():
        return 0, 0
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _texts(path: Path) -> Mapping[str, str]:
    try:
        return open_latent(path).meta.extra
    except ValueError:
        return {}


def _described(hidden: Any, inputs: Mapping[str, Any], known: dict[str, str]) -> dict[str, Any]:
    """Inputs with every link replaced by a hash of the node behind it."""
    return {name: _value(hidden, inputs[name], known) for name in sorted(inputs)}


def _value(hidden: Any, value: Any, known: dict[str, str]) -> Any:
    if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)):
        return value
    name, output = value
    if name not in known:
        node = _node(hidden, name)
        changed = node.get("is_changed")
        known[name] = _digest(
            [
                node["class_type"],
                _described(hidden, node["inputs"], known),
                changed if changed == changed and changed != [float("nan")] else None,  # NaN: always another
            ]
        )
    return [known[name], output]


def _node(hidden: Any, name: str) -> Mapping[str, Any]:
    return hidden.dynprompt.get_node(name)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
