"""Which scenario each task of a split is of."""

from __future__ import annotations

import numpy as np

from gmeta.data.layout import Array, one_valued
from gmeta.data.shards import PackSplit

_OFF = "set it to 0 (a run that goes on from a bundle or a checkpoint keeps its own setting)"


def scenario_of_tasks(split: PackSplit, replayed: PackSplit | None = None) -> Array:
    """Return the scenario of each task, int64 [num_tasks], those of a replayed split behind. This reads the ids of all
    rows, a shard at a time.

    Raises:
        ValueError: a pack has no scenarios, or tasks have rows of several.
    """
    found = _scenarios(split, "the pack")
    return found if replayed is None else np.concatenate([found, _scenarios(replayed, "the replayed pack")])


def _scenarios(split: PackSplit, pack: str) -> Array:
    name = split.schema.scenario
    if name is None:
        raise ValueError(
            f"meta.negotiation goes scenario by scenario, and {pack} has none: give the schema a line "
            f"`scenario: COLUMN` and prepare again, or {_OFF}"
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
            f"{split.name} of {pack} have rows of several ({name!r}): prepare tasks of one each, such as a "
            f"user in a scenario (of AntM2C --tasks user_scene), or {_OFF}"
        )
    return np.concatenate(found)
