"""What a named data set consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gmeta.data.schema import DataSchema
from gmeta.data.sources import Connection, RawPart


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A named data set: what its columns mean, how its files are read, and how it is usually prepared."""

    schema: DataSchema
    """The roles and features of the columns that `open` gives."""
    open: Callable[[Connection, Path], RawPart]
    """Makes raw rows of the files in a directory, all of which are there."""
    files: tuple[str, ...]
    """Names of the files; `a or b` where one of two is enough."""
    origin: str
    """Where to get the files, in a sentence that an error message ends with."""
    settings: Mapping[str, Any]
    """Settings of `gmeta prepare` that the user left unset."""
