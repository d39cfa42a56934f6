"""What a recipe looks at in a pack: its labels, its tasks, and what they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gmeta.core.hashing import splitmix64
from gmeta.data.layout import one_valued
from gmeta.data.pack import TaskPack
from gmeta.data.schema import PackSchema
from gmeta.data.shards import PackSplit

SAMPLE_TASKS = 1000
"""Tasks whose rows are looked at to see which features vary within a task."""
SAMPLE_ROWS = 200_000


@dataclass(frozen=True)
class PackFacts:
    """Facts of a pack, as a model reads it, that decide on settings; of training tasks."""

    binary: bool  # labels are 0 or 1
    label_std: float  # 0: all labels are alike
    num_tasks: int
    median_rows: int  # of a task
    item: str | None  # the schema's item, where it is a feature whose ids tasks share
    num_items: int  # ids of it
    task_features: tuple[str, ...]  # features that never vary within a task
    lists: tuple[str, ...]  # those of them that have several values
    varying: bool  # some feature or numeric column is left that may vary within one
    query_is_last: bool  # by time
    roles_are_given: bool  # by a column of the user's
    has_valid: bool  # there are valid tasks


def read_facts(pack: TaskPack, features: Sequence[str], *, numeric: bool = True) -> PackFacts:
    """Look at a pack whose model reads these features, and its numeric columns. Reads the sizes of all tasks, some
    bytes each, and the rows of the first shard.
    """
    schema, split = pack.schema, pack.split("train")
    constant = _constant_features(split, features)
    item = _item(schema, [name for name in features if name not in constant])
    labels = split.first_shard().columns().label
    support, query = split.unverified_sizes()
    return PackFacts(
        binary=schema.binary_label,
        label_std=float(labels.std(dtype=np.float64)) if labels.min() < labels.max() else 0.0,
        num_tasks=split.num_tasks,
        median_rows=int(np.median(support + query)),
        item=item,
        num_items=0 if item is None else schema.feature(item).num_ids - 1,
        task_features=tuple(name for name in features if name in constant),
        lists=tuple(name for name in features if name in constant and schema.feature(name).kind == "multi"),
        varying=len(constant) < len(features) or (numeric and bool(schema.numeric)),
        query_is_last=pack.query_is_last,
        roles_are_given=pack.roles_are_given,
        has_valid="valid" in pack.splits,
    )


def _item(schema: PackSchema, varying: Sequence[str]) -> str | None:
    """Return the schema's item where it is a one-valued feature that varies within tasks."""
    return schema.item if schema.item in one_valued(schema) and schema.item in varying else None


def _constant_features(split: PackSplit, features: Sequence[str]) -> set[str]:
    """Return the features that never vary within one of the first tasks: they say what the task is."""
    first = split.first_shard()
    start = np.cumsum(first.num_task_rows) - first.num_task_rows
    rows = min(int(start[:SAMPLE_TASKS].max(initial=0)) or first.num_rows, SAMPLE_ROWS)
    task = np.repeat(np.arange(first.num_tasks), first.num_task_rows)[:rows]
    within = task[1:] == task[:-1]
    keys = {name: _row_keys(first, name)[:rows] for name in features}
    return {name for name, key in keys.items() if within.any() and (key[1:] == key[:-1])[within].all()}


def _row_keys(split: PackSplit, name: str) -> NDArray[np.int64]:
    """Return a number for each row, equal where the feature's values are: its id, or a sum of hashes of its ids."""
    ids = split.feature_ids(name).astype(np.int64)
    lengths = split.lengths(name)
    if lengths is None:
        return ids
    sums = np.append(np.zeros(1, np.uint64), np.cumsum(splitmix64(ids.astype(np.uint64))))
    ends = np.cumsum(lengths)
    keys: NDArray[np.int64] = (sums[ends] - sums[ends - lengths]).astype(np.int64)
    return keys
