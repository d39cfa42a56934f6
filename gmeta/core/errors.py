"""Messages that teach: what was found, what it must be, and the nearest name that exists."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def require(ok: bool, key: str, value: object, rule: str) -> None:
    """Raise ValueError unless `ok`. The message says what was found and what it must be."""
    if not ok:
        raise ValueError(f"{key} is {value!r}: {rule}")


def require_finite(config: DataclassInstance, prefix: str = "") -> None:
    """Raise ValueError where a field of `config` is infinite or no number; `prefix` precedes its name."""
    for item in fields(config):
        value = getattr(config, item.name)
        finite = not isinstance(value, float) or math.isfinite(value)
        require(finite, prefix + item.name, value, "must be a finite number")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `did you mean x?` for the nearest known name, or the list of all known names."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"there is: {', '.join(map(repr, names))}"


class UserCodeError(ValueError):
    """Code that the user named (a model, a policy) raised; `__cause__` holds its own traceback, which is shown."""
