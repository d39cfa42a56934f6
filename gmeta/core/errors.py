"""Messages that teach: what was found, what it must be, and the nearest name that exists."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def require(ok: bool, key: str, value: object, rule: str) -> None:
    """Raise ValueError unless `ok`. The message says what was found and what it must be."""
    if not ok:
        raise ValueError(f"{key} is {value!r}: {rule}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `did you mean x?` for the nearest known name, or the list of all known names."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"there is: {', '.join(map(repr, names))}"


class UserCodeError(ValueError):
    """Code that the user named (a model, a policy) raised; `__cause__` holds its own traceback, which is shown."""
