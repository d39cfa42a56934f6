"""What the schemas' mappings may hold, from YAML and JSON: a key, its type, its range. Messages name the place."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from gmeta.core.errors import nearest

_MOST = 2**31 - 1
_LARGEST = sys.float_info.max


def column_entry(value: Any, where: str, known: Iterable[str]) -> dict[str, Any]:
    """Return the mapping that describes a column, of a name alone too."""
    if not isinstance(value, str | dict):
        rule = f"must be a column name (a number in quotes), or a mapping with the keys {', '.join(known)}"
        raise ValueError(f"{where} is {value!r}: {rule}")
    return mapping_entry({"name": value} if isinstance(value, str) else value, where, known)


def mapping_entry(value: Any, where: str, known: Iterable[str]) -> dict[str, Any]:
    """Return a copy of a mapping. ValueError for another value, and for an unknown key with the nearest."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}: must be a mapping with the keys {', '.join(known)}")
    for key in value:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}: {nearest(str(key), known)}")
    return dict(value)


def list_entry(value: Any, where: str) -> list[Any]:
    """Return a list, an empty one for None. ValueError for another value."""
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where} is {value!r}: must be a list of columns")
    return list(value)


def check_key(
    entry: dict[str, Any], key: str, types: tuple[type, ...], where: str, rule: str, required: bool = False
) -> None:
    """Raise ValueError unless the value of a key, where there is one or it is required, has one of these types."""
    if key not in entry and not required:
        return
    value = entry.get(key)
    # YAML's true is an int to Python.
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types) or value == "":
        raise ValueError(f"{where}.{key} is {value!r}: must be {rule}")


def check_count_key(entry: dict[str, Any], key: str, where: str) -> None:
    """Raise ValueError unless a value, where there is one, is a whole number that an int32 id can reach."""
    check_key(entry, key, (int,), where, "a whole number of at least 1")
    if entry.get(key, 1) < 1:
        raise ValueError(f"{where}.{key} is {entry[key]!r}: must be at least 1")
    if entry.get(key, 1) >= _MOST:
        raise ValueError(f"{where}.{key} is {_short(entry[key])}: must be below 2^31 - 1")


def check_number_key(entry: dict[str, Any], key: str, where: str) -> None:
    """Raise ValueError unless a value, where there is one, is a number that float64 holds."""
    check_key(entry, key, (int, float), where, "a number")
    if not abs(entry.get(key, 0)) <= _LARGEST:
        raise ValueError(f"{where}.{key} is {_short(entry[key])}: must be a finite number")


def _short(value: object) -> str:
    """Show a value; of a number with thousands of digits Python itself refuses to."""
    return f"of {value.bit_length()} bits" if isinstance(value, int) and value.bit_length() > 256 else repr(value)


def is_whole_number(value: object) -> bool:
    """Say whether a value is an int and no boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_choice_key(entry: dict[str, Any], key: str, choices: tuple[str, ...], where: str) -> None:
    """Raise ValueError unless a value, where there is one, is one of `choices`."""
    if entry.get(key, choices[0]) not in choices:
        raise ValueError(f"{where}.{key} is {entry[key]!r}: must be {' or '.join(choices)}")
