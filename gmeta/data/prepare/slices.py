"""Lists that many rows share, kept once: rows have slices of one long column.

Where view `values_<i>` (place, value) is there, rows hold of feature i the struct (start, length), a slice of its
places, in place of the list. Values are then counted and looked up once, however many rows have them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmeta.data.schema import OOV
from gmeta.data.sources import Connection

_PIECE = 1 << 20
"""So many ids are in memory at once, besides those that a shard has."""


def sliced_features(con: Connection) -> frozenset[int]:
    """Return the features of which rows have slices."""
    found = con.execute("SELECT view_name FROM duckdb_views() WHERE starts_with(view_name, 'values_')").fetchall()
    return frozenset(int(name.removeprefix("values_")) for (name,) in found)


def counted_slices(feature: int, source: str) -> str:
    """Return SQL of value and n: what the slices of a relation hold, each as often as rows have it."""
    slices = f"SELECT f{feature} AS slice, count(*) AS n FROM {source} GROUP BY slice"
    places = f"SELECT unnest(range(slice.start, slice.start + slice.length)) AS place, n FROM ({slices})"
    return f"SELECT value, n FROM ({places}) JOIN values_{feature} USING (place)"


def ids_of_slices(
    con: Connection, feature: int, vocab: str, start: NDArray[Any], length: NDArray[Any]
) -> NDArray[np.int32]:
    """Return the ids of the values of slices, one slice after the other. `vocab` is the relation of values and ids."""
    con.execute(f"""CREATE TEMP TABLE IF NOT EXISTS ids_{feature} AS
                    SELECT place, CAST(coalesce(v.id, {OOV}) AS INTEGER) AS id
                    FROM values_{feature} b LEFT JOIN {vocab} v ON v.value = b.value""")
    ends = np.cumsum(length, dtype=np.int64)
    places = np.repeat(start - (ends - length), length) + np.arange(ends[-1] if len(ends) else 0)
    ids = np.empty(len(places), np.int32)
    at = 0
    for batch in con.sql(f"SELECT id FROM ids_{feature} ORDER BY place").to_arrow_reader(_PIECE):
        piece = batch["id"].to_numpy()
        here = (places >= at) & (places < at + len(piece))
        ids[here] = piece[places[here] - at]
        at += len(piece)
    return ids
