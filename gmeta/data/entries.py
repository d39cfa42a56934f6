"""Checks of the entries of a schema, in YAML or JSON, whose messages name the key.

`where` says what an entry is part of, such as `schema.numeric[2]`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any

from gmeta.core.errors import nearest

_MOST = 2**31 - 1
_LARGEST = sys.float_info.max


def whole_object(value: Any, kind: type, where: str) -> dict[str, Any]:
    """Return a JSON object that has fields of a dataclass only, and all that have no default."""
    known = fields(kind)
    entry = require_keys(value, where, [field.name for field in known])
    for field in known:
        if field.default is MISSING and field.name not in entry:
            raise ValueError(f"{where}: key {field.name!r} is missing")
    return entry


def require_keys(value: Any, where: str, known: Iterable[str]) -> dict[str, Any]:
    """Return a copy of a mapping. ValueError for another value, and for an unknown key, with the nearest."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}: must be a mapping with the keys {', '.join(known)}")
    for key in value:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}: {nearest(str(key), known)}")
    return dict(value)


def as_list(value: Any, where: str) -> list[Any]:
    """Return a list, of nothing an empty one. ValueError for another value."""
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where} is {value!r}: must be a list of columns")
    return list(value)


def require_type(
    entry: dict[str, Any], key: str, types: tuple[type, ...], where: str, rule: str, required: bool = False
) -> None:
    """Raise ValueError unless a value, where there is one or it is required, has one of some types."""
    if key not in entry and not required:
        return
    value = entry.get(key)
    # YAML's true is an int to Python.
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types) or value == "":
        raise ValueError(f"{where}.{key} is {value!r}: must be {rule}")


def require_count(entry: dict[str, Any], key: str, where: str) -> None:
    """Raise ValueError unless a value, where there is one, is a whole number that an int32 id can reach."""
    require_type(entry, key, (int,), where, "a whole number of at least 1")
    if entry.get(key, 1) < 1:
        raise ValueError(f"{where}.{key} is {entry[key]!r}: must be at least 1")
    if entry.get(key, 1) >= _MOST:
        raise ValueError(f"{where}.{key} is {_short(entry[key])}: must be below 2^31 - 1")


def require_number(entry: dict[str, Any], key: str, where: str) -> None:
    """Raise ValueError unless a value, where there is one, is a number that float64 holds."""
    require_type(entry, key, (int, float), where, "a number")
    if not abs(entry.get(key, 0)) <= _LARGEST:
        raise ValueError(f"{where}.{key} is {_short(entry[key])}: must be a finite number")


def _short(value: object) -> str:
    """Show a value; of a number with thousands of digits Python itself refuses to."""
    return f"of {value.bit_length()} bits" if isinstance(value, int) and value.bit_length() > 256 else repr(value)


def is_whole_number(value: object) -> bool:
    """Say whether a value is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def require_choice(entry: dict[str, Any], key: str, choices: tuple[str, ...], where: str) -> None:
    """Raise ValueError unless a value, where there is one, is one of the choices."""
    if entry.get(key, choices[0]) not in choices:
        raise ValueError(f"{where}.{key} is {entry[key]!r}: must be {' or '.join(choices)}")


def require_column(value: Any, where: str, known: Iterable[str]) -> dict[str, Any]:
    """Return a column's mapping, of which a bare name is the shortest. ValueError for anything else."""
    if not isinstance(value, str | dict):
        rule = f"must be a column name (a number in quotes), or a mapping with the keys {', '.join(known)}"
        raise ValueError(f"{where} is {value!r}: {rule}")
    return require_keys({"name": value} if isinstance(value, str) else value, where, known)
