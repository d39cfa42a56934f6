"""Vectors of items, kept once for each id: a mapped file beside the vocabularies, of which a batch reads its rows.

`vocab/<name>.npy` is [ids of the item, dim]. Row 0 and the rows of items without a vector are zeros. It lies beside the
vocabularies because it means something only with them: what copies, verifies and bundles these takes it along.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from gmeta.data.schema import PackSchema, Vector

DTYPE = {"fp32": "float32", "fp16": "float16"}


def vector_file(directory: Path, name: str) -> Path:
    """Return where a directory of vocabularies holds the vectors of items called `name`."""
    return directory / f"{quote(name, safe='')}.npy"


def array_name(vector: str) -> str:
    """Return what the array of a vector of rows is called: no vector hides an array that every shard has."""
    return f"{vector}.vector"


class ItemVectors:
    """The vectors of items by id. The file is opened, and with `verify` verified, when it is first read."""

    def __init__(self, file: Path, vector: Vector, num_ids: int, verify: Any = None) -> None:
        self._file, self._vector, self._shape = file, vector, (num_ids, vector.dim)
        self._verify = verify
        self._rows: NDArray[Any] | None = None

    def rows(self, ids: NDArray[Any]) -> NDArray[Any]:
        """Return the vectors of ids: int [...] -> [..., dim]. ValueError where the file is missing or damaged."""
        if self._rows is None:
            if self._verify is not None:
                self._verify()
            self._rows = self._opened()
        found: NDArray[Any] = self._rows[ids]
        return found

    def _opened(self) -> NDArray[Any]:
        cure = "copy it again from the pack, or prepare the pack again"
        try:
            rows: NDArray[Any] = np.load(self._file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self._file} is missing or damaged ({error}): {cure}") from None
        if rows.shape != self._shape or rows.dtype != DTYPE[self._vector.dtype]:
            raise ValueError(
                f"{self._file} holds {rows.dtype} {list(rows.shape)}, the schema says {DTYPE[self._vector.dtype]} "
                f"{list(self._shape)}: {cure}"
            )
        return rows


def open_item_vectors(
    directory: Path, schema: PackSchema, verify: Mapping[str, Any] | None = None
) -> dict[str, ItemVectors]:
    """Return the vectors of items by name, from a directory of vocabularies. `verify[file name]` verifies one."""
    found = {}
    for vector in schema.vector:
        if vector.owner == "item":
            file, num_ids = vector_file(directory, vector.name), schema.feature(str(schema.item)).num_ids
            found[vector.name] = ItemVectors(file, vector, num_ids, (verify or {}).get(file.name))
    return found
