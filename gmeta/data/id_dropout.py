"""Id dropout: some ids of training tasks are masked, as if no training row had had them.

An id that training never saw reads row 0 of its table, OOV. Every id of a training row is in the vocabulary, so without
masks that row would stay as it was drawn, and new ids would read noise. Masking inputs of training examples to learn a
cold start is DropoutNet (Volkovs, Yu and Poutanen, NeurIPS 2017). Cold ids are like rare ones, so an id with `count`
training rows is masked with probability a / (a + count), the word dropout of Kiperwasser and Goldberg (TACL 2016); a is
chosen for each table so that a given share of its ids in training is masked.

One draw decides for a (task, table, id) in an epoch. A masked item is then unknown in all of a task's rows, support and
query, and in lists of items, as a cold item is; the row that the task adapts for it is not split either. Draws are
hashes: they depend neither on the batch, nor on the number of ranks, nor on what was prefetched or resumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmeta.core.batch import Bag, Examples, TaskBatch, joined
from gmeta.core.hashing import splitmix64
from gmeta.data.coverage import unknown_fraction
from gmeta.data.order import keyed_hash
from gmeta.data.pack import TaskPack
from gmeta.data.schema import ITEM_STATISTICS, OOV, STATISTICS_COLUMNS, PackSchema

DEFAULT_SHARE = 0.02
"""The share of ids that is masked where nothing else is asked for and a pack has cold ids. It is not tuned."""

COLD_SHARE = 0.005
"""A table whose share of unknown ids is so much larger in valid or test tasks than in training has cold ids."""

_DRAW = 3  # keeps the draws apart from the other hashes of (seed, epoch)


@dataclass(frozen=True)
class TableMask:
    """How often the ids of one table are masked: a value for each run of neighbouring ids that have one count.

    Vocabularies are sorted by count, so that few runs stand for many ids.
    """

    number: int  # of the table, among those of the pack
    starts: NDArray[np.int64]  # [K], first id of each run; 0 is OOV, which a mask leaves as it is
    thresholds: NDArray[np.uint64]  # [K], draws below are masked, of 2^32

    def masked(self, key: NDArray[np.uint64], ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which ids are masked. `key` has one hash for each id's task, in a shape that fits that of `ids`."""
        draws = splitmix64(key + ids.astype(np.uint64)) >> np.uint64(32)
        below: NDArray[np.bool_] = draws < self.thresholds[np.searchsorted(self.starts, ids, side="right") - 1]
        return below


@dataclass(frozen=True)
class IdDropout:
    """Masks the ids of training batches; call it with a TaskBatch."""

    seed: int
    tables: Mapping[str, TableMask]  # of each feature that is masked
    item: str | None  # the feature with whose id an item's statistics go
    statistics: Mapping[int, float]  # numeric column -> what an item without training rows has there

    def __call__(self, batch: TaskBatch) -> TaskBatch:
        """Return the batch with masked ids, which are OOV. Tensors of the given batch do not change."""
        if batch.parts:
            return joined([self(part) for part in batch.parts])
        keys = {
            name: keyed_hash(batch.task_id.numpy(), self.seed, batch.epoch, _DRAW, table.number)
            for name, table in self.tables.items()
        }
        return replace(batch, support=self._side(batch.support, keys), query=self._side(batch.query, keys))

    def _side(self, side: Examples, keys: Mapping[str, NDArray[np.uint64]]) -> Examples:
        ids, bags, dense = dict(side.ids), dict(side.bags), side.dense
        for name, table in self.tables.items():
            key = keys[name]
            if name in bags:
                task = np.repeat(np.arange(len(key)), bags[name].lengths.sum(1).numpy())
                masked = table.masked(key[task], bags[name].values.numpy())
                bags[name] = Bag(_filled(bags[name].values, masked), bags[name].lengths)
                continue
            masked = table.masked(key[:, None], ids[name].numpy())
            ids[name] = _filled(ids[name], masked)
            if name == self.item and self.statistics:
                dense = dense.clone()
                for column, value in self.statistics.items():
                    dense[..., column].masked_fill_(torch.from_numpy(masked), value)
        return replace(side, ids=ids, bags=bags, dense=dense)


def _filled(ids: Tensor, masked: NDArray[np.bool_]) -> Tensor:
    return ids.masked_fill(torch.from_numpy(masked), OOV)


def build_id_dropout(pack: TaskPack, share: float, *, features: Iterable[str], seed: int) -> IdDropout | None:
    """Return the masks of these features, None with a share of 0 and for a model that reads no rows.

    Hashed tables have no cold ids: a new value reads the row of a bucket. ValueError where no feature has a vocabulary.
    """
    features = list(features)
    if share == 0 or not features:
        return None
    tables = list(dict.fromkeys(feature.table for feature in pack.schema.features))
    known = _with_vocabulary(pack, features)
    if not known:
        raise ValueError(
            f"embedding.id_dropout is {share}, but the model reads no feature that has a vocabulary, only hashed ones, "
            "which have no cold ids: set it to 0"
        )
    counts = {table: _counts(pack, table) for table in dict.fromkeys(known.values())}
    masks = {table: _table_mask(tables.index(table), count, share) for table, count in counts.items()}
    return IdDropout(
        seed,
        {feature: masks[table] for feature, table in known.items()},
        pack.schema.item,
        _unseen_item(pack.schema) if pack.manifest["data_schema"].get(ITEM_STATISTICS) else {},
    )


def default_share(pack: TaskPack, features: Iterable[str]) -> float:
    """Return DEFAULT_SHARE where valid or test tasks have cold ids in a table of these features, else 0.

    It reads one shard of either split: tasks lie there in random order.
    """
    held_out = [pack.split(name).first_shard() for name in pack.splits if name != "train"]
    for table, names in _by_table(_with_vocabulary(pack, features)).items():
        found = [unknown_fraction(np.concatenate([part.feature_ids(name) for name in names])) for part in held_out]
        if max(found, default=0.0) > _trained_unknown(pack, table) + COLD_SHARE:
            return DEFAULT_SHARE
    return 0.0


def _with_vocabulary(pack: TaskPack, features: Iterable[str]) -> dict[str, str]:
    """Return feature -> table of those that have a vocabulary."""
    tables = {name: pack.schema.feature(name).table for name in features}
    return {name: table for name, table in tables.items() if table in pack.manifest["vocab"]}


def _by_table(known: Mapping[str, str]) -> dict[str, list[str]]:
    return {table: [name for name in known if known[name] == table] for table in dict.fromkeys(known.values())}


def _trained_unknown(pack: TaskPack, table: str) -> float:
    """Return the share of a table's ids in training rows that are OOV: missing and rare values.

    Vocabularies count all others, so that no shard needs to be read.
    """
    train = pack.split("train")
    total = sum(train.num_values(feature.name) for feature in pack.schema.features if feature.table == table)
    return max(0.0, 1 - int(_counts(pack, table).sum()) / total) if total else 0.0


def _counts(pack: TaskPack, table: str) -> NDArray[np.int64]:
    """Return how often training rows have each id, int64 [ids], from id 1 on."""
    vocabulary = pq.read_table(pack.vocab_file(table), columns=["id", "count"])
    counts = np.zeros(len(vocabulary), np.int64)
    counts[vocabulary["id"].to_numpy() - 1] = vocabulary["count"].to_numpy()
    return counts


def _table_mask(number: int, counts: NDArray[np.int64], share: float) -> TableMask:
    runs = np.flatnonzero(np.diff(counts, prepend=-1))
    count = counts[runs].astype(np.float64)
    rate = _pseudo_count(count, np.diff(runs, append=len(counts)), share)
    thresholds = np.rint(rate / (rate + count) * 2.0**32).astype(np.uint64)
    return TableMask(number, np.append(0, runs + 1), np.append(np.uint64(0), thresholds))


def _pseudo_count(count: NDArray[np.float64], num_ids: NDArray[np.int64], share: float) -> float:
    """Return the a with which a / (a + count) masks `share` of all rows' ids, where num_ids ids have each count."""
    low, high = 0.0, float(count.max(initial=1.0)) * share / (1 - share)  # with which the most frequent id has `share`
    rows = float((num_ids * count).sum())
    for _ in range(60):
        rate = (low + high) / 2
        too_many = (num_ids * count * rate / (rate + count)).sum() > share * rows
        low, high = (low, rate) if too_many else (rate, high)
    return (low + high) / 2


def _unseen_item(schema: PackSchema) -> dict[int, float]:
    """Return the item statistics of an item without training rows: the mean of all labels, and no row."""
    raw = dict(zip(STATISTICS_COLUMNS, (schema.label_mean, 0.0), strict=True))
    return {
        place: (raw[column.name] - column.mean) / column.std
        for place, column in enumerate(schema.numeric)
        if column.name in raw
    }
