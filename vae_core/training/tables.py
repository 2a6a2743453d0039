"""Frozen dataclasses from TOML tables, and back, strictly: no key too many, none too few, each of its type."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

T = TypeVar("T")
Table = dict[str, Any]
STRICT = ConfigDict(extra="forbid")  # of every table: no key too many


class ConfigError(ValueError):
    """A training config says something that cannot be carried out."""


def as_table(config: object) -> Table:
    """A config as plain values, as they can be kept in a checkpoint."""
    return cast("Table", _plain(dataclasses.asdict(cast("Any", config))))


def changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line for every key in which two tables of `as_table` differ, such as "run.steps: 100, now 200"."""
    lines: list[str] = []
    for name in [*now, *(name for name in before if name not in now)]:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += changes(cast("Table", old), cast("Table", new), f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name}: {old}, now {new}")
    return lines


def from_table(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """The pydantic dataclass `cls` from a TOML table: no key too many, none too few, each of its type and in its range.

    Raises ConfigError, whose text begins with `where` and names every key that is wrong, with what is allowed.
    """
    try:
        return TypeAdapter(cls).validate_json(json.dumps(table, default=str), strict=True)
    except ValidationError as error:
        lines = [_line(cls, found) for found in error.errors()]
        many = f" {len(lines)} things are wrong.\n  " if len(lines) > 1 else " "
        raise ConfigError(f"{where}:{many}" + "\n  ".join(dict.fromkeys(lines))) from error


def schema(cls: type[object]) -> Table:
    """The JSON schema of `cls`, by which editors complete and check a TOML file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **TypeAdapter(cls).json_schema()}


def _line(cls: type[object], found: ErrorDetails) -> str:
    """One error in the words of this project."""
    *path, last = found["loc"] or ("",)
    kind, got = found["type"], found["input"]
    if kind == "unexpected_keyword_argument":
        allowed = ", ".join(field.name for field in dataclasses.fields(cast("Any", _at(cls, path))))
        return f"{_section(path)} has no key {last!r}. Allowed are {allowed}."
    if kind == "missing" and isinstance(last, int):
        return f"{_name(path)} is too short: it needs a value number {last + 1}."
    if kind in ("missing", "missing_argument"):
        return f"{_section(path)} needs {last}."
    if kind == "value_error":
        return f"{_section(found['loc'])} {found['msg'].removeprefix('Value error, ')}".strip()
    return f"{_name(found['loc'])} is {got!r}; {_needed(kind, found)}."


def _needed(kind: str, found: ErrorDetails) -> str:
    limits: Mapping[str, Any] = found.get("ctx", {})
    words = {
        "literal_error": "allowed are {expected}",
        "greater_than_equal": "needed is {ge:g} or more",
        "greater_than": "needed is more than {gt:g}",
        "less_than_equal": "needed is {le:g} or less",
        "less_than": "needed is less than {lt:g}",
        "multiple_of": "needed is a multiple of {multiple_of:g}",
        "too_short": "needed is a list of {min_length} or more",
        "too_long": "needed is a list of {max_length}",
        "int_type": "needed is a whole number", "int_from_float": "needed is a whole number",
        "float_type": "needed is a number", "finite_number": "needed is a number",
        "bool_type": "needed is true or false", "string_type": "needed is a text in quotes",
        "tuple_type": "needed is a list", "dataclass_type": "needed is a table",
    }  # fmt: skip
    return words[kind].format(**limits) if kind in words else found["msg"]


def _at(cls: object, path: Sequence[int | str]) -> object:
    """The dataclass that the tables of `path` are read into."""
    for name in path:
        if isinstance(name, str):
            cls = next(d for d in _types(get_type_hints(cls)[name]) if dataclasses.is_dataclass(d))
    return cls


def _types(hint: object) -> Iterator[object]:
    yield hint
    for inner in get_args(hint):
        yield from _types(inner)


def _name(path: Sequence[int | str]) -> str:
    """A key of the file, such as "data.batches[2].size[1]"; tables and list items are counted from 1."""
    return "".join(f"[{one + 1}]" if isinstance(one, int) else f".{one}" for one in path).removeprefix(".")


def _section(path: Sequence[int | str]) -> str:
    """A table, such as "[model]", or "[[data.batches]] number 2"."""
    if path and isinstance(path[-1], int):
        return f"[[{_name(path[:-1])}]] number {path[-1] + 1}:"
    return f"[{_name(path)}]" if path else "the file"


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in cast("Table", value).items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in cast("Sequence[object]", value)]
    return str(value) if isinstance(value, Path) else value
