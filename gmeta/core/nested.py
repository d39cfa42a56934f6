"""Sections of settings as dotted keys, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


def flat(values: Mapping[str, Any], prefix: str = "", *, whole: Collection[str] = ()) -> dict[str, Any]:
    """Return nested settings by dotted key; empty sections vanish. Mappings under the keys `whole` are values: their
    own keys are the user's, and may have dots.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        inside = isinstance(value, Mapping) and key not in whole
        found |= flat(value, f"{key}.", whole=whole) if inside else {key: value}
    return found


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted key as sections."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, name = key.split(".")
        inside = found
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[name] = value
    return found
