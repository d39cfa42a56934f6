"""Columns whose values a run does not know: a sign that they are of another kind, or written in another way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gmeta.data.schema import OOV, PackSchema
from gmeta.data.shards import many_valued, one_valued

MOSTLY = 0.95
"""From this share of unknown values on a column is told."""
ENOUGH = 10
"""Fewer values may all be new ones."""

Ids = Mapping[str, npt.NDArray[Any]]


def ids_by_feature(arrays: Ids, schema: PackSchema) -> dict[str, npt.NDArray[Any]]:
    """Feature -> all its ids, from the arrays of a shard."""
    ids = {name: arrays["ids"][:, i] for i, name in enumerate(one_valued(schema))}
    return ids | {name: arrays[f"{name}.values"] for name in many_valued(schema)}


def describe_unknown(ids: Ids, schema: PackSchema) -> list[str]:
    """A sentence for every feature of which (nearly) all ids are out of vocabulary.

    The task column is left out: tasks that a run adapts to are new as a rule.
    """
    lines = []
    for name, values in ids.items():
        share = float(np.mean(values == OOV)) if len(values) else 0.0
        if name == schema.task or len(values) < ENOUGH or share < MOSTLY:
            continue
        lines.append(
            f"column {name!r}: {share:.0%} of {len(values):,} values are not in the vocabulary of the run, or missing; "
            "check that it holds what it held in training, written in the same way"
        )
    return lines
