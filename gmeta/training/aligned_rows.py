"""Rows of a bundle under the ids of another pack: an id's row is that of the same raw value."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gmeta.data.schema import OOV
from gmeta.runs.bundle import Bundle
from gmeta.runs.translation import GONE, NEW, known_ids
from gmeta.training.first_rows import set_generated_rows
from gmeta.training.run import Run


def align_rows(run: Run, bundle: Bundle, tables: Mapping[str, str], *, moments: bool) -> dict[str, Tensor]:
    """Overwrite rows of tables, and with `moments` the optimizer's state for them, by those of a bundle; collective.

    `tables` names the bundle's table for each table of the run. A tombstone is 0. Ids that the bundle does not have
    begin as `embedding.new_rows` says, without moments. Returns them, int64 [n] by table, and says what it did.
    """
    start, system = run.config.embedding.new_rows, run.state.system
    new: dict[str, Tensor] = {}
    for fused in system.tables.fused.values():
        found = {spec.name: tables[spec.name] for spec in fused.specs if spec.name in tables}
        sources = {name: (theirs, known_ids(bundle.path, run.pack, name, theirs)) for name, theirs in found.items()}
        bundle.fill_rows(fused, sources, moments=moments)
        for table, (theirs, source) in sources.items():
            new[table], gone = ((source == what).nonzero()[:, 0] for what in (NEW, GONE))
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
