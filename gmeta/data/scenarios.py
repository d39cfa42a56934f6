"""Which scenario each task of a split is of."""

from __future__ import annotations

import numpy as np

from gmeta.data.layout import Array, one_valued
from gmeta.data.shards import PackSplit


def scenario_of_tasks(split: PackSplit) -> Array:
    """Return the scenario of each task, int64 [num_tasks]; this reads the ids of all rows, a shard at a time.

    Raises:
        ValueError: the pack has no scenarios, or tasks have rows of several.
    """
    name = split.schema.scenario
    if name is None:
        raise ValueError(
            "meta.negotiation goes scenario by scenario, and the pack has none: give the schema a line "
            "`scenario: COLUMN` and prepare again, or leave meta.negotiation out"
        )
    column, found, several = one_valued(split.schema).index(name), [np.zeros(0, np.int64)], 0
    for arrays in split.shard_arrays():
        ids, start = arrays["ids"][:, column], arrays["row_start"]
        least = np.minimum.reduceat(ids, start)
        several += int((least != np.maximum.reduceat(ids, start)).sum())
        found.append(least.astype(np.int64))
    if several:
        raise ValueError(
            f"meta.negotiation goes scenario by scenario, and {several:,} of {split.num_tasks:,} tasks of split "
            f"{split.name} have rows of several ({name!r}): prepare tasks of one each, such as a user in a scenario "
            "(of AntM2C --tasks user_scene), or leave meta.negotiation out"
        )
    return np.concatenate(found)
