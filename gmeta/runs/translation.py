"""Ids of a pack in the vocabularies of a run or a bundle: an id means nothing but the raw value that it stands for.

A version that was trained before has fewer ids than the pack of a new day. What it does not know reads its row of
unknown values, as in serving.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gmeta.core.batch import Bag, Examples, TaskBatch, mask_of
from gmeta.data.identity import ids_of_values, vocabulary_file, vocabulary_values
from gmeta.data.pack import TaskPack
from gmeta.data.schema import OOV, NumericColumn, NumericSequence, PackSchema
from gmeta.data.schema_difference import schema_difference
from gmeta.runs.directory import read_schema

NEW, GONE = -1, -2
"""Sources of ids whose values are not known, and of tombstones."""

_CURE = "copy the run or the bundle again"


@dataclass(frozen=True)
class Translation:
    """Turns the ids of a pack's batches into those of a model; call it with a TaskBatch."""

    tables: Mapping[str, Tensor]  # feature -> int64 [ids of the pack], the model's ids; of equal vocabularies none
    rescale: tuple[Tensor, Tensor] | None = None  # scale and shift [F] make the model's numbers of the pack's
    sequences: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # numeric sequence -> scale and shift

    def __call__(self, batch: TaskBatch) -> TaskBatch:
        """Return the batch with the model's ids. Tensors of the given batch do not change."""
        if not self.tables and self.rescale is None and not self.sequences:
            return batch
        parts = tuple(self(part) for part in batch.parts)
        return replace(batch, support=self._side(batch.support), query=self._side(batch.query), parts=parts)

    def of_feature(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Return the model's ids of a feature's ids in the pack, int64 of the same shape."""
        return self.tables[name].numpy()[ids] if name in self.tables else ids.astype(np.int64)

    def _side(self, side: Examples) -> Examples:
        ids = {name: self.tables[name][found] if name in self.tables else found for name, found in side.ids.items()}
        bags = {
            name: Bag(self.tables[name][bag.values], bag.lengths) if name in self.tables else bag
            for name, bag in side.bags.items()
        }
        dense = side.dense
        if self.rescale is not None:
            scale, shift = self.rescale
            dense = dense * scale + shift
        given = dict(side.given)
        for name, (by, more) in self.sequences.items():
            if name in given:  # a batch in parts has it in these
                given[name] = torch.where(given[mask_of(name)].unsqueeze(-1), given[name] * by + more, 0)
        return replace(side, ids=ids, bags=bags, dense=dense, given=given)


def translation_of(source: Path, pack: TaskPack) -> Translation:
    """Return how a run or a bundle reads the pack's ids and numbers.

    Numbers that were prepared with other means and deviations, as those of a full version are, are counted anew. One
    that was missing stays the pack's mean.

    Raises ValueError where columns or hashes mean something else there, with what differs, and where a vocabulary is
    damaged.
    """
    if lines := meaning_difference(source, pack, moments=False):
        raise ValueError(
            f"{pack.path} does not mean what {source} was trained on: {'; '.join(lines)}. Prepare the rows with "
            "`gmeta prepare` as a day that continues its pack, or train a new version on this pack"
        )
    found = {}
    for table in dict.fromkeys(feature.table for feature in pack.schema.features):
        ids = known_ids(source, pack, table).clamp(min=OOV)
        if not torch.equal(ids, torch.arange(len(ids))):
            found[table] = ids
    tables = {f.name: found[f.table] for f in pack.schema.features if f.table in found}
    schema = read_schema(source)[0]
    sequences = {
        a.name: _between(a, b)
        for a, b in zip(schema.numeric_sequence, pack.schema.numeric_sequence, strict=True)
        if a != b
    }
    if schema.numeric == pack.schema.numeric:
        return Translation(tables, None, sequences)
    pairs = [_between(a, b) for a, b in zip(schema.numeric, pack.schema.numeric, strict=True)]
    scale, shift = torch.tensor(pairs, dtype=torch.float32).unbind(1)
    return Translation(tables, (scale, shift), sequences)


def _between(ours: NumericColumn | NumericSequence, theirs: NumericColumn | NumericSequence) -> tuple[float, float]:
    """Return scale and shift that make numbers as `ours` says of those as `theirs` says."""
    return theirs.std / ours.std, (theirs.mean - ours.mean) / ours.std


def meaning_difference(source: Path, pack: TaskPack, *, moments: bool = True) -> list[str]:
    """Say where a raw row means something else in a run or a bundle than in a pack, one line each.

    Vocabularies may differ; the sizes of hashed tables may not, nor with `moments` what a number counts from.
    """
    schema, data_schema = read_schema(source)
    theirs = pack.manifest["data_schema"]
    mine, other = _without_vocabularies(schema, source), _without_vocabularies(pack.schema, pack)
    if not moments:
        mine, other = _without_moments(mine), _without_moments(other)
    lines = schema_difference(mine, other)
    lines += [
        f"{key} of the pack is {theirs.get(key)!r}, expected {data_schema.get(key)!r}"
        for key in ("label_threshold", "hash_seed")
        if theirs.get(key) != data_schema.get(key)
    ]
    return lines


def _without_vocabularies(schema: PackSchema, owner: Path | TaskPack) -> PackSchema:
    """Return a schema without the sizes of vocabularies, which grow."""

    def grows(table: str) -> bool:
        if isinstance(owner, TaskPack):
            return table in owner.manifest["vocab"]
        return vocabulary_file(owner / "vocab", table).exists()

    sizes = [1 if grows(feature.table) else feature.num_ids for feature in schema.features]
    features = tuple(replace(f, num_ids=size) for f, size in zip(schema.features, sizes, strict=True))
    return replace(schema, features=features, identity=None)


def _without_moments(schema: PackSchema) -> PackSchema:
    return replace(
        schema,
        numeric=tuple(replace(column, mean=0.0, std=1.0) for column in schema.numeric),
        numeric_sequence=tuple(replace(column, mean=0.0, std=1.0) for column in schema.numeric_sequence),
    )


def known_ids(source: Path, pack: TaskPack, table: str, theirs: str | None = None) -> Tensor:
    """Return for each id of a pack's table the id of the same value in a run or a bundle, int64 [num_ids].

    It is `NEW` where the value is not known there, and `GONE` for a tombstone of the pack. `theirs` is what the table
    is called there, where that is another name.
    """
    if table not in pack.manifest["vocab"]:  # hashed alike: ids mean the same
        return torch.arange(next(f.num_ids for f in pack.schema.features if f.table == table))
    known = vocabulary_values(vocabulary_file(source / "vocab", theirs or table), _CURE)
    asked = vocabulary_values(pack.vocab_file(table), _CURE)
    found = ids_of_values(asked, known, NEW)
    found[1:][asked.is_null().to_numpy(zero_copy_only=False)] = GONE
    return torch.from_numpy(found)
