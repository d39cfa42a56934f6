"""Replay: an epoch trains on the new tasks and on a share of those of an older pack, other ones in each epoch.

A split of both packs' shards has the new tasks first. The tasks of an epoch are numbered through: those from the number
of new ones on stand for older tasks. Which ones is a function of (seed, epoch, number) alone, so that batches, exact
resume and the split over ranks know nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmeta.core.batch import Bag, Examples, TaskBatch, joined
from gmeta.data.identity import vocabulary_values
from gmeta.data.order import Tasks, keyed_hash
from gmeta.data.pack import TaskPack
from gmeta.data.schema import OOV
from gmeta.data.schema_difference import schema_difference, without_sizes
from gmeta.data.text_tables import TextTable

_DRAW = 4  # keeps the draws apart from the other hashes of (seed, epoch)


@dataclass(frozen=True)
class Replay:
    """How many tasks an epoch has of each kind."""

    seed: int
    num_new: int
    num_old: int
    fraction: float  # of an epoch's tasks that are older ones, as far as there are so many

    @property
    def num_drawn(self) -> int:
        """Return how many older tasks an epoch has."""
        return min(self.num_old, max(1, round(self.num_new * self.fraction / (1 - self.fraction))))

    @property
    def num_tasks(self) -> int:
        """Return how many tasks an epoch has."""
        return self.num_new + self.num_drawn

    def positions(self, tasks: Tasks, epoch: int) -> Tasks:
        """Return what tasks of an epoch stand for, int64 [T]: positions in a split of new tasks and old ones.

        The older tasks are cut into as many equal stretches as are drawn, and one of each is. So none comes twice in an
        epoch, each comes about equally often in the long run, and they are read in stored order.
        """
        drawn = np.maximum(tasks - self.num_new, 0)
        first, end = (n * self.num_old // self.num_drawn for n in (drawn, drawn + 1))
        choice = keyed_hash(drawn, self.seed, epoch, 0, _DRAW) % (end - first).astype(np.uint64)
        found: Tasks = np.where(tasks < self.num_new, tasks, self.num_new + first + choice.astype(np.int64))
        return found


def require_older(pack: TaskPack, older: TaskPack) -> None:
    """Raise ValueError with what differs, unless ids and numbers of an older pack mean the same in `pack`: its
    vocabularies begin with the older ones, but for ids that were evicted since.
    """
    lines = schema_difference(without_sizes(pack.schema), without_sizes(older.schema))
    data, theirs = pack.manifest["data_schema"], older.manifest["data_schema"]
    lines += [
        f"{key} is {theirs.get(key)!r}, expected {data.get(key)!r}"
        for key in ("label_threshold", "hash_seed")
        if theirs.get(key) != data.get(key)
    ]
    for table in dict.fromkeys(feature.table for feature in pack.schema.features) if not lines else ():
        lines += _ids_difference(table, pack, older)
    if lines:
        raise ValueError(
            f"{older.path} cannot be replayed beside {pack.path}: {'; '.join(lines)}. Replay a pack that {pack.path} "
            "was prepared on as its base, or leave replay.pack out"
        )


def replayed_texts(pack: TaskPack, older: TaskPack) -> dict[str, TextTable]:
    """Return the texts of a pack, and behind them those that only an older one's rows have, as `followed_by` of their
    splits numbers them.
    """
    theirs, sizes = older.text_tables(), {feature.table: feature.num_ids for feature in older.schema.features}
    return {table: ours.followed_by(theirs[table], sizes[table]) for table, ours in pack.text_tables().items()}


def _ids_difference(table: str, pack: TaskPack, older: TaskPack) -> list[str]:
    hashed = [table not in some.manifest["vocab"] for some in (pack, older)]
    if all(hashed):
        sizes = [next(f.num_ids for f in some.schema.features if f.table == table) for some in (pack, older)]
        return [] if sizes[0] == sizes[1] else [f"table {table!r} is hashed to {sizes[1]} ids, expected {sizes[0]}"]
    if any(hashed):
        return [f"table {table!r} is hashed in one of the two"]
    ours, theirs = (_values(some, table) for some in (pack, older))
    if len(theirs) > len(ours):
        return [f"vocabulary {table!r} has {len(theirs):,} ids, more than the {len(ours):,} of the newer pack"]
    ours = ours.slice(0, len(theirs))
    same = pc.or_kleene(pc.equal(ours, theirs), pc.is_null(ours)).fill_null(False)
    wrong = np.flatnonzero(~same.to_numpy(zero_copy_only=False))
    if not len(wrong):
        return []
    at = int(wrong[0])
    return [f"id {at + 1} of vocabulary {table!r} is {theirs[at].as_py()!r}, expected {ours[at].as_py()!r}"]


def _values(pack: TaskPack, table: str) -> pa.Array:
    return vocabulary_values(pack.vocab_file(table), "copy the pack again")


@dataclass(frozen=True)
class Evicted:
    """Makes ids that were evicted since unknown ones, as later rows have them; call it with a TaskBatch.

    The row of an evicted id is nobody's: no value of a later day reads it.
    """

    gone: Mapping[str, NDArray[np.bool_]]  # feature -> bool [num_ids], its table's evicted ids

    def __call__(self, batch: TaskBatch) -> TaskBatch:
        """Return the batch with ids of its own. Tensors of the given batch do not change."""
        if batch.parts:
            return joined([self(part) for part in batch.parts])
        return replace(batch, support=self._side(batch.support), query=self._side(batch.query))

    def _side(self, side: Examples) -> Examples:
        ids, bags = dict(side.ids), dict(side.bags)
        for name, gone in self.gone.items():
            if name in bags:
                bags[name] = Bag(_without(bags[name].values, gone), bags[name].lengths)
            else:
                ids[name] = _without(ids[name], gone)
        return replace(side, ids=ids, bags=bags)


def _without(ids: Tensor, gone: NDArray[np.bool_]) -> Tensor:
    return ids.masked_fill(torch.from_numpy(gone[ids.numpy()]), OOV)


def evicted_ids(pack: TaskPack) -> Evicted | None:
    """Return what hides the ids that a pack's vocabularies no longer have; None where they have all."""
    found: dict[str, NDArray[np.bool_]] = {}
    for table in pack.manifest["vocab"]:
        gone = np.append(False, _values(pack, table).is_null().to_numpy(zero_copy_only=False))
        if gone.any():
            found |= {feature.name: gone for feature in pack.schema.features if feature.table == table}
    return Evicted(found) if found else None
