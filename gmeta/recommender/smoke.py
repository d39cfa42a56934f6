"""A few tasks that a bundle carries with their scores: whoever loads it can tell whether it computes what it should.

`smoke.safetensors` holds encoded rows of valid tasks, laid out as a pack's shard is, and `score` of each query row: of
a model of next items that of the query's item after the support.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from gmeta.data.cells import ranges
from gmeta.data.shards import PackSplit, split_in_memory
from gmeta.recommender.next_items import Histories, NextItems
from gmeta.recommender.recommender import Recommender

SMOKE = "smoke.safetensors"
TOLERANCE = 1e-5


def smoke_scores(rec: Recommender | NextItems, arrays: dict[str, NDArray[Any]]) -> NDArray[np.float64]:
    """Return the score of each query row of encoded tasks, in stored order."""
    split = split_in_memory(arrays, rec.schema)
    if isinstance(rec, NextItems):
        return _scores_of_next_items(rec, split)
    at = split.locate(np.arange(split.num_tasks)).last_support(rec.config.loader.max_support_rows)
    support, query, _ = split.gather(at)
    logits = rec._score(rec._adapt(support), query)[query.mask].cpu().double()
    return rec._predictions(logits)


def _scores_of_next_items(rec: NextItems, split: PackSplit) -> NDArray[np.float64]:
    """Return the score of each query row's item after its task's support."""
    item = rec.schema.item
    assert item is not None  # a next-item pack has one
    schema, sizes = rec.schema, split.num_task_rows
    others = [feature.name for feature in schema.features if feature.name not in (item, *schema.catalogue)]
    columns = split.columns((item, *others))
    items, query = columns.ids[item].astype(np.int64), np.flatnonzero(columns.is_query)
    first, length = (values[columns.task[query]] for values in (np.cumsum(sizes) - sizes, split.num_support))
    read = ranges(first, length)
    beside = {name: columns.ids[name].astype(np.int64)[read] for name in others}
    histories = Histories([str(row) for row in query.tolist()], items[read], length, beside=beside)
    return rec.scores_of(histories, items[query]).double().cpu().numpy()


def check_smoke(rec: Recommender | NextItems) -> bool:
    """Score the sample of the bundle that `rec` was loaded from; return whether there is one.

    ValueError where a score differs by more than 1e-5 from what was computed when the bundle was made.
    """
    file = Path(rec.source) / SMOKE
    if not file.exists():
        return False
    try:
        arrays = load_file(file)
        expected = arrays.pop("score")
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{file} cannot be read ({error}): make the bundle again") from None
    found = smoke_scores(rec, arrays)
    worst = np.abs(found - expected).max(initial=0.0)
    if not worst <= TOLERANCE:
        raise ValueError(
            f"{rec.version} scores its smoke sample otherwise than where it was made (off by {worst:.1e}): the code, "
            "or the machine, computes something else"
        )
    return True
