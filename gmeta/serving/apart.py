"""The tasks of one request apart: where they cannot be read together, and where each is kept.

The values of a column in JSON may be of another type in each task: a number here, a text there. Each is right alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gmeta.data.prepare.direct import text_of
from gmeta.data.prepare.encoder import EncodedTables
from gmeta.data.tables import TableLike, as_arrow
from gmeta.recommender.recommender import Recommender
from gmeta.recommender.tasks import encode_rows, join_tables
from gmeta.serving.wire import Query

Part = Literal["support", "candidates"]
_MOST_MIXES = 16
"""Each may take a query of the database, and other requests wait for it."""
_Rows = dict[int, NDArray[np.int64]]
"""Task's place in the request -> its rows."""


def encode_request(rec: Recommender, query: Query, table: TableLike, part: Part) -> EncodedTables | None:
    """Return the rows of a request in the model's encoding, None without rows.

    Raises ValueError for rows that cannot be used; of a JSON body it names the task, and counts the rows within it.
    """
    try:
        return encode_rows(rec, table, part)
    except ValueError as error:
        if not query.tasks:
            raise
        sizes = np.array([task.support if part == "support" else task.candidates for task in query.tasks])
        ends = np.cumsum(sizes)
        rows = {place: np.arange(ends[place] - sizes[place], ends[place]) for place in np.flatnonzero(sizes).tolist()}
        if len(rows) == 1:
            raise _named(query, next(iter(rows)), error) from None
    alike: dict[object, _Rows] = {}
    for place, of_task in rows.items():
        alike.setdefault(_types(_taken(table, of_task)), {})[place] = of_task
    if len(alike) > _MOST_MIXES:
        raise ValueError(
            f"the tasks' {part} differ in the types of values in {len(alike)} ways: send one type a column"
        )
    found = [one for group in alike.values() for one in _halved(rec, query, table, group, part)]
    joined = join_tables([encoded for encoded, _ in found], rec.schema)
    if part == "support":
        return joined
    return replace(joined, query_row=np.concatenate([of_part[encoded.query_row] for encoded, of_part in found]))


def _halved(
    rec: Recommender, query: Query, table: TableLike, rows: _Rows, part: Part
) -> list[tuple[EncodedTables, NDArray[np.int64]]]:
    """Encode tasks together, or else each half of them, so that few tries find the one that cannot be used."""
    together = np.concatenate(list(rows.values()))
    try:
        encoded = encode_rows(rec, _taken(table, together), part)
        assert encoded is not None
        return [(encoded, together)]
    except ValueError as error:
        places = list(rows)
        if len(places) == 1:
            raise _named(query, places[0], error) from None
    middle = len(places) // 2
    halves = ({place: rows[place] for place in half} for half in (places[:middle], places[middle:]))
    return [one for half in halves for one in _halved(rec, query, table, half, part)]


def _named(query: Query, place: int, error: ValueError) -> ValueError:
    return ValueError(f"tasks[{place}] (key {query.tasks[place].key!r}): {error}")


def _taken(table: TableLike, rows: NDArray[np.int64]) -> dict[str, list[Any]]:
    chosen = rows.tolist()
    return {name: [values[row] for row in chosen] for name, values in table.items()}


def _types(table: dict[str, list[Any]]) -> object:
    """Return the types of values in each column, and of values in its lists."""
    flat = (
        [part for value in values for part in (value if isinstance(value, list) else [value])]
        for values in table.values()
    )
    return tuple(
        (any(isinstance(value, list) for value in values), frozenset(type(part) for part in parts if part is not None))
        for values, parts in zip(table.values(), flat, strict=True)
    )


def split_tasks(support: TableLike, keys: Sequence[str], task: str) -> dict[str, pa.Table]:
    """Return the support rows of each task as a table of its own, which shares no memory with others; `keys` are the
    tasks, and come in the order in which the rows name them.
    """
    in_arrow = isinstance(support, pa.Table)
    if len(keys) == 1:
        return {keys[0]: support if in_arrow else as_arrow(support, "support", list(support))}
    of_task: dict[Any, list[int]] = {}
    for row, value in enumerate(support[task].to_pylist() if in_arrow else support[task]):
        of_task.setdefault(text_of(value), []).append(row)
    if in_arrow:
        return {key: support.take(rows) for key, rows in of_task.items()}
    return {key: as_arrow(_taken(support, np.array(rows)), "support", list(support)) for key, rows in of_task.items()}
