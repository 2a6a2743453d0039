"""Frozen dataclasses from TOML tables, and back, strictly: no key too many, none too few, each of its declared type."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")
Table = dict[str, Any]


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


def from_table(cls: type[T], table: Mapping[str, Any], where: str, section: str = "") -> T:
    """The dataclass `cls` from a TOML table: no key too many, none too few, each of its declared type.

    Raises ConfigError, whose text begins with `where`, names the section and the key, and says what is allowed.
    """
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cast("Any", cls))}
    here = f"{where}: [{section}]" if section else f"{where}:"
    unknown = [name for name in table if name not in fields]
    if unknown:
        raise ConfigError(f"{here} has no key {unknown[0]!r}. Allowed are {', '.join(fields)}.")
    missing = [name for name, field in fields.items() if _is_required(field) and name not in table]
    if missing:
        raise ConfigError(f"{here} needs {', '.join(missing)}. Allowed are {', '.join(fields)}.")
    inside = f"{section}." if section else ""
    values = {name: _value(hints[name], value, where, f"{inside}{name}") for name, value in table.items()}
    try:
        return cast("Any", cls)(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{here} {error}") from error


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(hint: object, value: object, where: str, name: str) -> object:
    """`value` as the type `hint`. Raises ConfigError for any other."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _value(inner, value, where, name)
    if origin is Literal:
        if value in arguments:
            return value
        raise ConfigError(f"{where}: {name} is {value!r}; allowed are {', '.join(map(repr, arguments))}.")
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_table(cast("type[object]", hint), cast("Table", value), where, name)
    if origin is tuple and isinstance(value, list):
        items = cast("list[object]", value)
        if arguments[-1] is Ellipsis or len(items) == len(arguments):
            return tuple(_value(arguments[0], item, where, name) for item in items)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint in (str, int, bool) and type(value) is hint:
        return value
    raise ConfigError(f"{where}: {name} is {value!r}; needed is {_words(hint)}.")


def _words(hint: object) -> str:
    if get_origin(hint) is tuple:
        arguments = get_args(hint)
        count = "a list" if arguments[-1] is Ellipsis else f"a list of {len(arguments)}"
        return f"{count}, each {_words(arguments[0])}"
    known: dict[object, str] = {
        str: "a text in quotes", Path: "a path in quotes", int: "a whole number", float: "a number",
        bool: "true or false",
    }  # fmt: skip
    return known.get(hint, "a table")


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in cast("Table", value).items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in cast("Sequence[object]", value)]
    return str(value) if isinstance(value, Path) else value
