"""Messages that teach: what was found, what it must be, and the nearest name that exists."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def require(ok: bool, key: str, value: object, rule: str) -> None:
    """Raise ValueError unless `ok`. The message says what was found and what it must be."""
    if not ok:
        raise ValueError(f"{key} is {value!r}: {rule}")


def require_numbers(config: DataclassInstance, prefix: str = "") -> None:
    """Raise ValueError where a number field of `config` holds no finite number; `prefix` precedes its name."""
    for item in fields(config):
        value = getattr(config, item.name)
        if isinstance(value, float):
            require(math.isfinite(value), prefix + item.name, value, "must be a finite number")
        # Annotations are text here: the modules of configs postpone them.
        elif item.type in ("int", "float") or (item.type in ("int | None", "float | None") and value is not None):
            number = isinstance(value, int) and not isinstance(value, bool)
            require(number, prefix + item.name, value, "must be a number")


def require_seed(seed: int) -> None:
    """Raise ValueError for a seed that random generators do not take."""
    require(0 <= seed < 2**63, "seed", seed, "must be in [0, 2^63)")


def require_size(key: str, value: str) -> None:
    """Raise ValueError unless a text is a size in bytes that DuckDB takes, such as 500MB."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)i?B", value, re.IGNORECASE)
    known = size is not None and float(size[1]) * 1000 ** " KMGT".index(size[2].upper() or " ") < 1e18
    require(known, key, value, "must be a size such as 500MB or 2GB")


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that `name` is probably meant to be; None where none is near."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `did you mean x?` for the nearest known name, or the list of all known names, which may be empty."""
    names = list(known)
    near = closest(name, names)
    return f"did you mean {near!r}?" if near else f"there is: {', '.join(map(repr, names)) or 'none'}"


class UserCodeError(ValueError):
    """Code that the user named (a model, a policy) raised; `__cause__` holds its own traceback, which is shown."""
