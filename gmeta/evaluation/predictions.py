"""predictions.parquet: what each variant predicted for each query row, beside raw task and item.

docs/evaluation.md shows the columns.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gmeta.config.train import LossName
from gmeta.core.files import replacing
from gmeta.data.pack import TaskPack
from gmeta.data.shards import PackSplit
from gmeta.evaluation.score import Floats, Ints, Scores, to_predictions

PREDICTIONS_FILE = "predictions.parquet"
RANKING_SUFFIX = ".ranking"
"""Ends the name of the column that ranking metrics sort by, where it is not the prediction itself."""
_BLOCK_ROWS = 1 << 16
"""Rows written at a time, so that the table is never held a second time."""


@dataclass(frozen=True)
class Variants:
    """What was scored: one entry a query row, by name of the variant."""

    predictions: dict[str, Floats]  # [N], probabilities under bce, values otherwise
    ranking: dict[str, Floats]  # [N], what ranking metrics sort by, where it may differ: logits, unclipped baselines

    @staticmethod
    def of(logits: dict[str, Floats], loss: LossName) -> Variants:
        """Make the variants that a network trained with `loss` scored."""
        return Variants({name: to_predictions(values, loss) for name, values in logits.items()}, logits)

    def joined(self, other: Variants | None) -> Variants:
        """Return these variants and then those of another."""
        if other is None:
            return self
        return Variants(self.predictions | other.predictions, self.ranking | other.ranking)


def task_keys(pack: TaskPack, task_id: Ints) -> pa.ChunkedArray:
    """Return the raw keys of the tasks with these ids [T], which are in the pack."""
    tasks = pq.read_table(pack.tasks_file(), columns=["task_id", "key"])
    ids = tasks["task_id"].to_numpy()
    order = np.argsort(ids, kind="stable")
    return tasks["key"].take(pa.array(order[np.searchsorted(ids[order], task_id)]))


def item_values(pack: TaskPack) -> pa.Array | None:
    """Return the raw value of each item id, null for id 0; None where the items are no feature with a vocabulary."""
    features = [f for f in pack.schema.features if f.name == pack.schema.item and f.kind == "categorical"]
    if not features or features[0].table not in pack.manifest["vocab"]:
        return None
    values = pq.read_table(pack.vocab_file(features[0].table), columns=["value"])["value"].combine_chunks()
    return pa.concat_arrays([pa.nulls(1, values.type), values])


def write_predictions(
    path: Path, pack: TaskPack, split: PackSplit, scores: Scores, found: Variants, *, step: int, loss: LossName
) -> None:
    """Write the file in blocks of rows. Its metadata has `step`, `loss` and `variants`, a JSON list of their names."""
    keys, items = task_keys(pack, split.task_id), item_values(pack)
    item_id = None if items is None else split.feature_ids(str(pack.schema.item))
    measured = {}
    for name, values in found.predictions.items():
        measured[name] = values
        ranking = found.ranking.get(name, values)
        if not np.array_equal(ranking, values):
            measured[name + RANKING_SUFFIX] = ranking
    metadata = {"step": str(step), "loss": loss, "variants": json.dumps(list(found.predictions))}

    def block(rows: slice) -> pa.Table:
        task = scores.task[rows]
        columns = {"task_id": split.task_id[task], "task": keys.take(pa.array(task))}
        if items is not None and item_id is not None:
            columns["item"] = items.take(pa.array(item_id[scores.row[rows]]))
        columns |= {"row": scores.row[rows], "label": scores.label[rows]}
        columns |= {name: values[rows] for name, values in measured.items()}
        return pa.table(columns).replace_schema_metadata(metadata)

    with replacing(path) as partial, pq.ParquetWriter(partial, block(slice(0)).schema) as writer:
        for begin in range(0, len(scores.row), _BLOCK_ROWS):
            writer.write_table(block(slice(begin, begin + _BLOCK_ROWS)))
