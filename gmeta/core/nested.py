"""Sections of settings as dotted keys, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

_ARGUMENTS = "model.args."


def flat(values: Mapping[str, Any], prefix: str = "", *, whole: Collection[str] = ()) -> dict[str, Any]:
    """Return nested settings by dotted key; empty sections vanish, but not an argument of the model that is an empty
    mapping. Mappings under the keys `whole` are values: their own keys are the user's, and may have dots.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        is_value = key in whole or (key.startswith(_ARGUMENTS) and not value)
        inside = isinstance(value, Mapping) and not is_value
        found |= flat(value, f"{key}.", whole=whole) if inside else {key: value}
    return found


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted key as sections."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        put(found, key, value)
    return found


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested settings. Raises ValueError where one of its sections is a value."""
    *sections, last = key.split(".")
    for place, name in enumerate(sections, 1):
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ValueError(
                f"{'.'.join(sections[:place])} is {values!r}: it is a section, give it keys or leave it out"
            )
    values[last] = value
