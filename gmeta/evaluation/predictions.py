"""predictions.parquet: what each variant predicted for each query row, beside raw task and item.

docs/evaluation.md shows the columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
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
from gmeta.evaluation.slices import Scenarios

PREDICTIONS_FILE = "predictions.parquet"
RANKING_SUFFIX = ".ranking"
"""Ends the name of the column that ranking metrics sort by, where it is not the prediction itself."""
MOST_SCENARIOS = 20
"""So many scenarios have a slice of their own."""
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


def values_of_ids(pack: TaskPack, feature: str | None) -> pa.Array | None:
    """Return the raw value of each id of a feature, null for id 0; None where it is no one-valued feature with a
    vocabulary.
    """
    features = [f for f in pack.schema.features if f.name == feature and f.kind == "categorical"]
    if not features or features[0].table not in pack.manifest["vocab"]:
        return None
    values = pq.read_table(pack.vocab_file(features[0].table), columns=["value"])["value"].combine_chunks()
    return pa.concat_arrays([pa.nulls(1, values.type), values])


def scenarios_of(pack: TaskPack, split: PackSplit, row: Ints, named: Iterable[str] = ()) -> Scenarios | None:
    """Return the scenarios of rows [N] of a split; None where the schema names none, or it has no vocabulary.

    The `MOST_SCENARIOS` that training rows had most often have a name, and those in `named`.
    """
    feature = pack.schema.scenario
    values = values_of_ids(pack, feature)
    if values is None or feature is None:
        return None
    table = next(f.table for f in pack.schema.features if f.name == feature)
    counts = pq.read_table(pack.vocab_file(table), columns=["count"])["count"].to_numpy()
    texts = values.cast(pa.string()).to_pylist()
    ids = 1 + np.argsort(-counts, kind="stable")
    often = [int(i) for i in ids.tolist() if texts[i] is not None][:MOST_SCENARIOS]
    names = list(dict.fromkeys([*(str(texts[i]) for i in often), *named]))
    place = {name: number for number, name in enumerate(names)}
    of_id = np.array([place.get(text, len(names)) for text in texts])
    return Scenarios(tuple(names), of_id[split.feature_ids(feature)[row]])


def write_predictions(
    path: Path, pack: TaskPack, split: PackSplit, scores: Scores, found: Variants, *, step: int, loss: LossName
) -> None:
    """Write the file in blocks of rows. Its metadata has `step`, `loss` and `variants`, a JSON list of their names, and
    `scenarios`, one of those that have a slice.
    """
    keys = task_keys(pack, split.task_id)
    values = {"item": values_of_ids(pack, pack.schema.item), "scenario": values_of_ids(pack, pack.schema.scenario)}
    known = {
        name: (found, split.feature_ids(str(getattr(pack.schema, name))))
        for name, found in values.items()
        if found is not None
    }
    scenarios = scenarios_of(pack, split, scores.row)
    measured = {}
    for name, predicted in found.predictions.items():
        measured[name] = predicted
        ranking = found.ranking.get(name, predicted)
        if not np.array_equal(ranking, predicted):
            measured[name + RANKING_SUFFIX] = ranking
    metadata = {"step": str(step), "loss": loss, "variants": json.dumps(list(found.predictions))}
    if scenarios is not None:
        metadata["scenarios"] = json.dumps(scenarios.names)

    def block(rows: slice) -> pa.Table:
        task = scores.task[rows]
        columns = {"task_id": split.task_id[task], "task": keys.take(pa.array(task))}
        columns |= {name: found.take(pa.array(ids[scores.row[rows]])) for name, (found, ids) in known.items()}
        columns |= {"row": scores.row[rows], "label": scores.label[rows]}
        if scores.weight is not None:
            columns["weight"] = scores.weight[rows]
        columns |= {name: column[rows] for name, column in measured.items()}
        return pa.table(columns).replace_schema_metadata(metadata)

    with replacing(path) as partial, pq.ParquetWriter(partial, block(slice(0)).schema) as writer:
        for begin in range(0, len(scores.row), _BLOCK_ROWS):
            writer.write_table(block(slice(begin, begin + _BLOCK_ROWS)))
