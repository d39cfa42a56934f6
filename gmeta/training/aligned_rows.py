"""Rows of a bundle under the ids of another pack: an id's row is that of the same raw value."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from gmeta.data.identity import vocabulary_file
from gmeta.data.pack import TaskPack
from gmeta.data.schema import OOV
from gmeta.runs.bundle import CURE, Bundle
from gmeta.training.first_rows import set_generated_rows
from gmeta.training.run import Run

_NEW, _GONE = -1, -2
"""Sources of ids that the bundle does not have, and of tombstones."""


def align_rows(run: Run, bundle: Bundle, tables: Mapping[str, str], *, moments: bool) -> dict[str, Tensor]:
    """Overwrite rows of tables, and with `moments` the optimizer's state for them, by those of a bundle; collective.

    `tables` names the bundle's table for each table of the run. A tombstone is 0. Ids that the bundle does not have
    begin as `embedding.new_rows` says, without moments. Returns them, int64 [n] by table, and says what it did.
    """
    start, system = run.config.embedding.new_rows, run.state.system
    new: dict[str, Tensor] = {}
    for fused in system.tables.fused.values():
        found = {spec.name: tables[spec.name] for spec in fused.specs if spec.name in tables}
        sources = {name: (theirs, _sources(bundle.path, run.pack, name, theirs)) for name, theirs in found.items()}
        bundle.fill_rows(fused, sources, moments=moments)
        for table, (theirs, source) in sources.items():
            new[table], gone = ((source == what).nonzero()[:, 0] for what in (_NEW, _GONE))
            fused.set_ids(table, gone, torch.zeros(len(gone), fused.dim))
            if start != "random":
                fused.set_ids(table, new[table], bundle.rows(theirs, torch.tensor([OOV])).expand(len(new[table]), -1))
            known = len(source) - len(new[table]) - len(gone)
            run.log.say(f"  {table}: {known:,} ids go on, {len(new[table]):,} are new, {len(gone):,} are gone")
    if start == "generated":
        for name in system.generated:
            if (table := run.pack.schema.feature(name).table) in new:
                set_generated_rows(run, name, new[table])
    return new


def _sources(path: Path, pack: TaskPack, table: str, theirs: str) -> Tensor:
    """Return for each id of the pack the bundle's id of the same value, int64 [num_ids], or `_NEW` or `_GONE`."""
    if table not in pack.manifest["vocab"]:  # hashed alike: ids mean the same
        return torch.arange(next(f.num_ids for f in pack.schema.features if f.table == table))
    known, asked = (_values(file) for file in (vocabulary_file(path / "vocab", theirs), pack.vocab_file(table)))
    place = pc.index_in(asked, value_set=known, skip_nulls=True)
    found = pc.fill_null(pc.add(place.cast(pa.int64()), 1), _NEW).to_numpy(zero_copy_only=False)
    found = np.where(asked.is_null().to_numpy(zero_copy_only=False), _GONE, found)
    return torch.from_numpy(np.concatenate([[OOV], found]))


def _values(file: Path) -> pa.Array:
    try:
        return pq.read_table(file, columns=["value"])["value"].combine_chunks()
    except (OSError, pa.ArrowException, KeyError) as error:
        raise ValueError(f"{file} is missing or damaged ({error}): {CURE}") from None
