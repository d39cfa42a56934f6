"""Sections of settings as dotted keys, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key; empty sections vanish."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
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
