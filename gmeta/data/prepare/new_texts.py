"""Texts that a run does not know: encoded rows bring them along, and their ids go on from the run's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmeta.data.schema import PackSchema

Array = NDArray[Any]


class NewTexts:
    """Gives the new texts of some rows ids, table by table, in the order in which they come."""

    def __init__(self, schema: PackSchema) -> None:
        self._first = {f.table: f.num_texts for f in schema.features if f.num_texts is not None}
        self._ids: dict[str, dict[str, int]] = {}

    def id_of(self, table: str, text: str) -> int:
        """Return the id of a new text of a table of texts."""
        ids = self._ids.setdefault(table, {})
        return ids.setdefault(text, self._first[table] + len(ids))

    def lists(self) -> dict[str, list[str]]:
        """Return table -> its new texts, in the order of their ids."""
        return {table: list(ids) for table, ids in self._ids.items()}


def renumbered(arrays: Mapping[str, Array], schema: PackSchema, ids: Mapping[str, Array]) -> dict[str, Array]:
    """Return the arrays of a shard in which new text n of a table has the id `ids[table][n]`; ids are int64 then."""
    out = dict(arrays)
    for feature in schema.features:
        if feature.num_texts is None or feature.table not in ids:
            continue
        if feature.kind != "categorical":
            name = f"{feature.name}.values"
            out[name] = _replaced(out[name], feature.num_texts, ids[feature.table])
            continue
        if out["ids"] is arrays["ids"]:
            out["ids"] = arrays["ids"].astype(np.int64)
        column = [f.name for f in schema.features if f.kind == "categorical"].index(feature.name)
        out["ids"][:, column] = _replaced(out["ids"][:, column], feature.num_texts, ids[feature.table])
    return out


def _replaced(values: Array, first: int, ids: Array) -> Array:
    out, new = values.astype(np.int64), values >= first
    out[new] = ids[values[new] - first]
    return out
