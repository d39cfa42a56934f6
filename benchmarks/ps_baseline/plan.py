"""Index work of one task, done in the read-ahead thread: which rows to pull from which server, and who reads them.

The rows of a task are numbered support first, then those that only the query needs: a row is pulled once a task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmeta.data.layout import one_valued
from gmeta.embedding.table import FusedTable, ShardedTables
from gmeta.meta.learner import MetaLearner
from ps_baseline.taskfiles import StoredTask, TaskFiles

Array = NDArray[Any]
_CHUNK = 1 << 20


@dataclass(frozen=True)
class BagFeature:
    """A many-valued feature of the model."""

    name: str
    adapted: bool
    mean: bool
    offset: int  # key of id 0


@dataclass(frozen=True)
class Features:
    """What the model reads. One-valued features come with the adapted ones first."""

    names: tuple[str, ...]  # one-valued
    num_adapted: int  # of `names`
    columns: Array  # int64 [F], where they are in a task file
    offsets: Array  # int64 [F, 1], key of id 0
    bags: tuple[BagFeature, ...]
    row_of: Array  # int64 [keys]: key -> physical row, gmeta's placement
    bounds: Array  # int64 [servers + 1]: server s holds the physical rows [bounds[s], bounds[s + 1])

    @property
    def mixed(self) -> bool:
        """Say whether some features adapt and others do not."""
        count = self.num_adapted + sum(bag.adapted for bag in self.bags)
        return 0 < count < len(self.names) + len(self.bags)


@dataclass(frozen=True)
class Bag:
    """A many-valued feature of one side: V values in n bags."""

    feature: BagFeature
    index: Tensor  # int64 [V] into the task's rows
    row: Tensor  # int64 [V], the example it belongs to
    lengths: Tensor  # int64 [n]
    weight: Tensor | None  # [V, 1], 1 / length; None for sums


@dataclass(frozen=True)
class Side:
    """Support or query of one task, n examples."""

    dense: Tensor  # [n, numeric columns]
    label: Tensor  # [n]
    index: Tensor  # int64 [F, n] into the task's rows
    bags: tuple[Bag, ...]


@dataclass(frozen=True)
class Task:
    """A task ready to be pulled and computed. U rows, the support's first."""

    task_id: int
    support: Side
    query: Side
    rows: Tensor  # int64 [U], physical
    support_counts: list[int]  # rows that the support pulls from each server
    query_counts: list[int]  # rows that the query pulls besides

    @property
    def num_samples(self) -> int:
        """Return the number of examples, support and query."""
        return len(self.support.label) + len(self.query.label)


def only_table(tables: ShardedTables) -> FusedTable:
    """Return the one fused table of a gmeta model (all its features have one width)."""
    (table,) = tables.fused.values()
    return table


def describe(learner: MetaLearner, tables: ShardedTables, files: TaskFiles) -> Features:
    """Return what of a task file the model reads, and where the rows are."""
    table = only_table(tables)
    stored = one_valued(files.schema)
    adapted = set(learner.adapted.features)
    flat = [name for name in learner.features if table.pooling(name) is None]
    names = [name for name in flat if name in adapted] + [name for name in flat if name not in adapted]
    bags = [name for name in learner.features if table.pooling(name) is not None]
    chunks = [
        table.permutation.forward(torch.arange(start, min(start + _CHUNK, table.num_rows)))
        for start in range(0, table.num_rows, _CHUNK)
    ]
    ranges = [table.local_range(server) for server in range(tables.mesh.world_size)]
    return Features(
        names=tuple(names),
        num_adapted=sum(name in adapted for name in names),
        columns=np.array([stored.index(name) for name in names], np.int64),
        offsets=np.array([table.offset(name) for name in names], np.int64).reshape(-1, 1),
        bags=tuple(BagFeature(n, n in adapted, table.pooling(n) == "mean", table.offset(n)) for n in bags),
        row_of=torch.cat(chunks).numpy(),
        bounds=np.array([0, *(part.stop for part in ranges)], np.int64),
    )


def plan_task(stored: StoredTask, features: Features, dtype: torch.dtype) -> Task:
    """Return everything about a task that needs no rows."""
    sides = (stored.support, stored.query)
    keys = [_keys(stored.arrays, chosen, features) for chosen in sides]
    rows, inverse = zip(*(np.unique(features.row_of[flat], return_inverse=True) for flat, _ in keys), strict=True)
    place = np.searchsorted(rows[0], rows[1])
    shared = rows[0][np.minimum(place, len(rows[0]) - 1)] == rows[1] if len(rows[0]) else np.zeros(len(rows[1]), bool)
    query_place = np.where(shared, place, len(rows[0]) + np.cumsum(~shared) - 1)
    more = rows[1][~shared]
    indexes = (inverse[0], query_place[inverse[1]])
    support, query = (
        _side(stored.arrays, chosen, features, torch.from_numpy(index.astype(np.int64)), lengths, dtype)
        for chosen, index, (_, lengths) in zip(sides, indexes, keys, strict=True)
    )
    counts = [np.diff(np.searchsorted(part, features.bounds)).tolist() for part in (rows[0], more)]
    return Task(stored.task_id, support, query, torch.from_numpy(np.concatenate([rows[0], more])), *counts)


def _keys(arrays: dict[str, Array], chosen: Array, features: Features) -> tuple[Array, list[Array]]:
    """Return the keys of a side, one-valued features [F * n] and then each bag's values, and the lengths [n] of each
    bag.
    """
    parts = [(arrays["ids"][features.columns[:, None], chosen] + features.offsets).reshape(-1)]
    bag_lengths = []
    for bag in features.bags:
        offsets = arrays[f"{bag.name}.offsets"]
        lengths = offsets[chosen + 1] - offsets[chosen]
        within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        parts.append(arrays[f"{bag.name}.values"][within + np.repeat(offsets[chosen], lengths)] + bag.offset)
        bag_lengths.append(lengths)
    return np.concatenate(parts).astype(np.int64, copy=False), bag_lengths


def _side(
    arrays: dict[str, Array],
    chosen: Array,
    features: Features,
    index: Tensor,
    bag_lengths: list[Array],
    dtype: torch.dtype,
) -> Side:
    fixed, *flat = index.split([len(features.names) * len(chosen), *(int(n.sum()) for n in bag_lengths)])
    bags = []
    for feature, part, lengths in zip(features.bags, flat, bag_lengths, strict=True):
        row = np.repeat(np.arange(len(chosen)), lengths)
        weight = torch.from_numpy(1 / lengths[row].reshape(-1, 1)).to(dtype) if feature.mean else None
        bags.append(Bag(feature, part, torch.from_numpy(row), torch.from_numpy(lengths), weight))
    return Side(
        dense=torch.from_numpy(arrays["dense"][chosen]).to(dtype),
        label=torch.from_numpy(arrays["label"][chosen]).to(dtype),
        index=fixed.view(len(features.names), len(chosen)),
        bags=tuple(bags),
    )
