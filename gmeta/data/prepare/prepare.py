"""`gmeta prepare`: raw rows to a task pack, in memory that does not grow with the data.

    check       every file's rows; those that cannot be used apart. CSV goes to a table, Parquet stays where it is
    tasks       rows to tasks: which are kept, their split, support size, place and shard
    deal        rows to one Parquet file a shard; from here on a shard is an independent job
    vocabulary  vocabularies, item statistics, means and deviations, all of training rows only
    encode      a shard's rows to arrays, sorted
    write       a shard, while the next one is encoded

Each stage is a module of this name beside this one. Everything random is a seeded MD5 of (key) or (file, row), every
order is total, and sums are exact, so that the pack depends neither on threads nor on the memory limit.
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from gmeta.config.data import HISTORY_ROWS, PrepareConfig
from gmeta.data.antm2c.rows import log_schema, make_log_rows
from gmeta.data.events.catalogue import write_items
from gmeta.data.events.columns import EventColumns, schema_of_rows
from gmeta.data.events.days import EVENTS
from gmeta.data.events.findings import mend_cold_tasks
from gmeta.data.events.rows import EventRows, make_event_rows
from gmeta.data.events.settings import event_columns, settings_of_events
from gmeta.data.pack import PackWriter
from gmeta.data.prepare.base import FIRST_INPUTS, input_checksums, open_base
from gmeta.data.prepare.cut import rows_on_both_sides
from gmeta.data.prepare.deal import deal
from gmeta.data.prepare.event_day import prepare_event_day
from gmeta.data.prepare.growth import write_pending
from gmeta.data.prepare.history import INCREMENT, keep_left_out
from gmeta.data.prepare.increment import prepare_day
from gmeta.data.prepare.read import check_all, take_rows
from gmeta.data.prepare.scratch import connect, disk_errors, require_space, scratch_directory
from gmeta.data.prepare.settings import resolve_settings
from gmeta.data.prepare.summary import Report, console_report, print_summary
from gmeta.data.prepare.tasks import make_tasks, place_left_out, row_bytes
from gmeta.data.prepare.texts import learn_texts, write_further_texts
from gmeta.data.prepare.vectors import find_item_vectors, write_item_vectors
from gmeta.data.prepare.vocabulary import learn
from gmeta.data.prepare.write import write_shards, write_vocabularies
from gmeta.data.schema import DataSchema, PackSchema
from gmeta.data.sources import Connection, find_files, scalar

__all__ = ["prepare", "print_summary"]


def prepare(config: PrepareConfig, report: Report | None = None) -> dict[str, Any]:
    """Make the task pack `config.out`; returns the summary that `print_summary` prints.

    Raises ValueError for everything that is the user's to mend: files, columns, rows that cannot be used, settings
    that do not go together, tasks that are too few, a full disk. No pack is left behind then.
    """
    if config.base is not None:
        base = open_base(config)
        return (prepare_event_day if base.pack_schema.next_item else prepare_day)(config, base, report)
    out = Path(config.out)
    columns = event_columns(config)
    of_log = log_schema(config)
    of_rows = of_log if columns is None else schema_of_rows(columns, gaps=bool(config.gaps))
    schema, settings = resolve_settings(config, of_rows)
    inputs = None if config.dataset is not None else sorted(input_checksums(find_files(config.inputs)))
    reporting = console_report() if report is None else nullcontext(report)
    with reporting as tell, scratch_directory(out) as scratch, disk_errors(scratch), connect(scratch, config) as con:
        events = None if columns is None else make_event_rows(config, settings, columns, scratch, tell)
        log = None if of_log is None else make_log_rows(con, config, settings, scratch, tell)
        made, schema = events or log, log.schema if log else schema
        known, vectors = events.values() if events else {}, log.vectors() if log else {}
        if log is not None:
            counts = take_rows(con, config, log.rows, ["the log"], scratch, log.refused)
        else:
            counts = check_all(con, config, schema, settings, scratch, tell, [events.part(con)] if events else None)
        tell("making tasks", 0, 1)
        shards = make_tasks(con, schema, settings, counts)
        if settings.split_query == "column" and made is None and (both := rows_on_both_sides(con, schema, settings)):
            counts["rows_on_both_sides"] = both
        # With a partition column tasks bring no older rows to later days.
        waiting = [] if settings.task_split == "column" else place_left_out(con, schema, settings, HISTORY_ROWS)
        rows = scalar(con, "SELECT coalesce(sum(num_rows), 0)::BIGINT FROM tasks")
        require_space(out, needed=int(2 * rows * row_bytes(con, schema)))
        find_item_vectors(con, schema, counts.pop("files"), vectors)
        tell("dealing rows to shards", 0, 1)
        deal(con, schema, settings, scratch)
        learned = learn(con, schema, scratch, shards, tell, known)
        pack_schema = learn_texts(con, schema, learned, scratch, [*shards, *waiting], known=known)
        counts |= {} if made is None else made.counts
        if events is not None:
            pack_schema = replace(pack_schema, next_item=True, catalogue=events.owned)
        counts["vocab"] = {f.table: f.num_ids for f in pack_schema.features}
        if pack_schema.binary_label and pack_schema.label_mean in (0, 1) and events is None:
            counts["only_label"] = pack_schema.label_mean
        made_with = {**settings.to_json(), "input": config.inputs, "dataset": config.dataset}
        made_with |= {FIRST_INPUTS: inputs} if inputs is not None else {}
        made_with |= settings_of_events(config) if events is not None else {}
        with PackWriter(out, pack_schema, settings=made_with, data_schema=schema.to_json()) as writer:
            write_vocabularies(con, writer, schema)
            write_further_texts(con, schema, writer.directory / "vocab")
            write_item_vectors(con, schema, pack_schema, writer.directory / "vocab")
            write_pending(con, schema, writer.directory / INCREMENT)
            if events and columns:
                _write_events(con, (schema, pack_schema), columns, events, writer.directory)
            kept = keep_left_out(con, pack_schema, writer.directory / INCREMENT, scratch) if waiting else None
            write_shards(con, writer, schema, pack_schema, settings, scratch, [*shards, *waiting], counts, tell, kept)
            if events is not None:
                mend_cold_tasks(counts)
            if counts["bad_rows"]:
                shutil.copyfile(scratch / "rejects.parquet", writer.directory / "rejects.parquet")
            writer.finish(counts=counts)
    return {"out": str(out), **counts}


def _write_events(
    con: Connection, schemas: tuple[DataSchema, PackSchema], columns: EventColumns, events: EventRows, folder: Path
) -> None:
    """Write the catalogue and, where events have times, the last events of every user for later days."""
    write_items(con, *schemas, columns, events.catalogue, folder / "vocab", events.gap_unit, events.max_history)
    if events.last is not None:
        (folder / INCREMENT).mkdir(exist_ok=True)
        shutil.copyfile(events.last, folder / INCREMENT / EVENTS)
