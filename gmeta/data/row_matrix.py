"""Which rows each side of each task of a batch has, as matrices with -1 on padding."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmeta.data.order import keyed_hash

Array = NDArray[Any]


def row_matrix(start: Array, count: Array) -> Array:
    """Return int64 [T, max(count)]: task t's row holds start[t], start[t] + 1, … and -1 beyond count[t]."""
    column = np.arange(count.max(initial=0))
    return np.where(column < count[:, None], start[:, None] + column, -1)


def redrawn_rows(start: Array, support: Array, rows: Array, seed: int, epoch: int) -> tuple[Array, Array]:
    """Return support and query row matrices after a new draw of each task's support."""
    first = np.cumsum(rows) - rows
    task = np.repeat(np.arange(len(rows)), rows)
    flat = np.arange(int(rows.sum())) - first[task] + start[task]
    by_key = np.lexsort((keyed_hash(flat, seed, epoch), task))
    rank = np.empty_like(flat)
    rank[by_key] = np.arange(len(flat)) - first[task]
    is_support = rank < support[task]
    return _scatter_rows(flat[is_support], support), _scatter_rows(flat[~is_support], rows - support)


def _scatter_rows(flat: Array, count: Array) -> Array:
    """Return int64 [T, max(count)]: the first count[0] of `flat` in task 0's row, and so on; -1 beyond."""
    out = np.full((len(count), count.max(initial=0)), -1, np.int64)
    out[np.arange(out.shape[1]) < count[:, None]] = flat
    return out
