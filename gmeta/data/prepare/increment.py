"""`gmeta prepare --base`: a pack of a new day, whose ids and tasks go on from a base.

The stages are those of `prepare`. Growth takes the place of learning, known tasks keep their split and bring their last
rows, and the pack carries in `increment/` what the next day needs: pending values, the history, and what was delivered.
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gmeta.config.data import PrepareConfig
from gmeta.data.pack import PackWriter
from gmeta.data.prepare.base import Base, refuse_delivered, write_chain
from gmeta.data.prepare.cut import rows_on_both_sides
from gmeta.data.prepare.deal import deal
from gmeta.data.prepare.growth import PENDING, Eviction, UnknownCounts, drift, grow, tombstones, write_pending
from gmeta.data.prepare.history import (
    INCREMENT,
    PARTS,
    TASKS,
    Array,
    TaskHistory,
    carry_history,
    deal_history,
    know_tasks,
    last_time,
    write_tasks,
)
from gmeta.data.prepare.read import check_all
from gmeta.data.prepare.scratch import connect, disk_errors, require_space, scratch_directory
from gmeta.data.prepare.summary import Report, console_report
from gmeta.data.prepare.tasks import LEFT_OUT, ShardJob, make_tasks, place_left_out, row_bytes
from gmeta.data.prepare.texts import find_older_texts, ids_today, learn_texts, write_further_texts
from gmeta.data.prepare.times import time_unit, to_microseconds
from gmeta.data.prepare.vectors import find_item_vectors, write_item_vectors
from gmeta.data.prepare.write import write_shards, write_vocabularies
from gmeta.data.schema import PackSchema
from gmeta.data.sources import Connection, find_files, scalar


def prepare_day(config: PrepareConfig, base: Base, report: Report | None = None) -> dict[str, Any]:
    """Make the task pack `config.out` of a new day; returns the summary that `print_summary` prints.

    Raises ValueError as `prepare` does, for files that a day of the base had already, for times of another unit than
    the base's, and for a day without a task to train on.
    """
    out, schema, settings = Path(config.out), base.schema, replace(base.settings, shard_mb=config.shard_mb)
    inputs = refuse_delivered(base, find_files(config.inputs))
    reporting = console_report() if report is None else nullcontext(report)
    with reporting as tell, scratch_directory(out) as scratch, disk_errors(scratch), connect(scratch, config) as con:
        rows = 0 if settings.task_split == "column" else config.history_rows
        counts = check_all(con, config, schema, settings, scratch, tell)
        tell("reading the base", 0, 1)
        known = base.history(scratch, rows)
        ((first, last),) = con.execute("SELECT min(time), max(time) FROM raw_rows").fetchall()
        before = last_time(con, known) if schema.time is not None else None
        day = {"number": base.day, "base": base.manifest["xxh3"], **interval_of(base, first, last, before)}
        know_tasks(con, known, rows, settings)
        tell("making tasks", 0, 1)
        shards = make_tasks(con, schema, settings, counts, goes_on=True)
        if settings.split_query == "column" and (both := rows_on_both_sides(con, schema, settings)):
            counts["rows_on_both_sides"] = both
        every = [*shards, *(place_left_out(con, schema, settings, rows) if rows else [])]
        size = scalar(con, "SELECT coalesce(sum(num_rows + 2 * num_known), 0)::BIGINT FROM tasks")
        require_space(out, needed=int(2 * size * row_bytes(con, schema)))
        tell("dealing rows to shards", 0, 1)
        older = deal_history(con, scratch)
        find_item_vectors(con, schema, counts.pop("files"))
        deal(con, schema, settings, scratch)
        of_base = (base.pack_schema, base.vocabularies, (base.increment or scratch) / PENDING)
        evicted = Eviction(config.evict_after_days, config.evict_below)
        pack_schema = grow(con, of_base, schema, scratch, shards, base.day, evicted, tell)
        find_older_texts(con, schema, base.pack_schema, base.vocabularies)
        pack_schema = learn_texts(con, schema, pack_schema, scratch, every, goes_on=True)
        counts |= grown_ids(base.pack_schema, pack_schema)
        counts["drift"] = drift(con, schema, base.pack_schema, scratch, shards)
        made_with = {**settings.to_json(), "input": config.inputs, "dataset": None}
        made_with |= {key: getattr(config, key) for key in ("history_rows", "evict_after_days", "evict_below")}
        with PackWriter(out, pack_schema, made_with, schema.to_json(), day) as writer:
            folder = writer.directory / INCREMENT
            (folder / PARTS).mkdir(parents=True)
            write_vocabularies(con, writer, schema, totals="totals_after")
            write_further_texts(con, schema, writer.directory / "vocab")
            write_item_vectors(con, schema, pack_schema, writer.directory / "vocab", base.vocabularies)
            gone = tombstones(con, schema, pack_schema)
            counts["tombstones"] = {f.table: int(gone[f.name].sum()) for f in pack_schema.features if f.name in gone}
            today = ids_today(con, schema, base.pack_schema, gone)
            history = TaskHistory(pack_schema, base.day, rows, older, folder / PARTS, today)
            of_shards = OfShards(history, UnknownCounts(base.pack_schema))
            write_shards(con, writer, schema, pack_schema, settings, scratch, every, counts, tell, of_shards)
            counts["drift"]["unknown"] = of_shards.unknown.shares()
            tell("keeping the history", 0, 1)
            carry_history(con, history, every[-1].index + 1, config.evict_after_days)
            write_tasks(con, folder / TASKS, settings, base.day, config.evict_after_days)
            write_pending(con, schema, folder)
            write_chain(base, folder, inputs)
            if counts["bad_rows"]:
                shutil.copyfile(scratch / "rejects.parquet", writer.directory / "rejects.parquet")
            writer.finish(counts=counts)
    return {"out": str(out), "day": base.day, **counts}


def interval_of(base: Base, first: int, last: int, before: int | None) -> dict[str, int | None]:
    """Return the first and last time of the day's rows in microseconds; None where they are no dates.

    Raises ValueError where they count another unit than the base's, whose last time is `before`.
    """
    none: dict[str, int | None] = {"first_time": None, "last_time": None}
    if base.schema.time is None:
        return none
    unit = time_unit(last)
    if before is not None and unit != time_unit(before):
        units = [
            f"{found} (up to {at})" if found else f"no dates (up to {at})"
            for found, at in ((unit, last), (time_unit(before), before))
        ]
        raise ValueError(
            f"column {base.schema.time!r} counts {units[0]}, but {units[1]} in base {base.path}: all days have one "
            "unit of time; convert the new files"
        )
    return (
        none if unit is None else {"first_time": to_microseconds(first, unit), "last_time": to_microseconds(last, unit)}
    )


def grown_ids(before: PackSchema, after: PackSchema) -> dict[str, Any]:
    """Return table -> ids, and table -> ids that are new."""
    sizes = {f.table: f.num_ids for f in before.features}
    found = {f.table: f.num_ids for f in after.features}
    return {"vocab": found, "new_ids": {table: size - sizes[table] for table, size in found.items()}}


@dataclass(frozen=True)
class OfShards:
    """What a day does with the arrays of each shard."""

    history: TaskHistory | None  # None: rows bring the older ones along
    unknown: UnknownCounts

    def add(self, con: Connection, shard: ShardJob, arrays: dict[str, Array]) -> dict[str, Array]:
        """Return the arrays with older rows."""
        if shard.split != LEFT_OUT:
            self.unknown.add(arrays)
        return self.history.add(con, shard, arrays) if self.history is not None and self.history.rows else arrays
