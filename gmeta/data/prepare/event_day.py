"""`gmeta prepare --base` of a base of events: a pack of a later day's events, whose ids and histories go on.

Events of the day become rows as those of a first pack do, beside the last events of earlier days (`gmeta.data.events`),
so that no encoded row of a base is read. Vocabularies grow as those of every later day.
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from gmeta.config.data import PrepareConfig
from gmeta.data.events.catalogue import write_items
from gmeta.data.events.columns import event_columns_of
from gmeta.data.events.days import EVENTS, EarlierEvents
from gmeta.data.events.findings import mend_cold_tasks
from gmeta.data.events.rows import make_event_rows
from gmeta.data.events.settings import OF_EVENTS
from gmeta.data.pack import PackWriter
from gmeta.data.prepare.base import Base, refuse_delivered, write_chain
from gmeta.data.prepare.deal import deal
from gmeta.data.prepare.growth import PENDING, Eviction, UnknownCounts, drift, grow
from gmeta.data.prepare.history import INCREMENT
from gmeta.data.prepare.increment import OfShards, grown_ids, interval_of
from gmeta.data.prepare.read import check_all
from gmeta.data.prepare.scratch import connect, disk_errors, require_space, scratch_directory
from gmeta.data.prepare.summary import Report, console_report
from gmeta.data.prepare.tasks import make_tasks, row_bytes
from gmeta.data.prepare.texts import learn_texts, write_further_texts
from gmeta.data.prepare.write import write_shards, write_vocabularies
from gmeta.data.sources import find_files, scalar


def prepare_event_day(config: PrepareConfig, base: Base, report: Report | None = None) -> dict[str, Any]:
    """Make the task pack `config.out` of a later day's events; returns what `prepare_day` does, and raises as that."""
    out, schema, settings = Path(config.out), base.schema, replace(base.settings, shard_mb=config.shard_mb)
    inputs, columns = refuse_delivered(base, find_files(config.inputs)), event_columns_of(base.vocabularies)
    domains = base.manifest["settings"].get("domains", [])
    kept = base.increment / EVENTS if base.increment is not None else Path()
    earlier = EarlierEvents(base.pack_schema, base.vocabularies, kept, config.history_rows, domains)
    reporting = console_report() if report is None else nullcontext(report)
    with reporting as tell, scratch_directory(out) as scratch, disk_errors(scratch), connect(scratch, config) as con:
        events = make_event_rows(config, settings, columns, scratch, tell, earlier)
        day = {"number": base.day, "base": base.manifest["xxh3"]}
        day |= interval_of(base, *events.times, earlier.last_time(con))
        counts = check_all(con, config, schema, settings, scratch, tell, [events.part(con)])
        del counts["files"]
        tell("making tasks", 0, 1)
        con.execute("CREATE TABLE known_tasks (key VARCHAR, split VARCHAR, num_known BIGINT)")
        shards = make_tasks(con, schema, settings, counts, goes_on=True)
        rows = scalar(con, "SELECT coalesce(sum(num_rows), 0)::BIGINT FROM tasks")
        require_space(out, needed=int(2 * rows * row_bytes(con, schema)))
        tell("dealing rows to shards", 0, 1)
        deal(con, schema, settings, scratch)
        of_base = (base.pack_schema, base.vocabularies, (base.increment or scratch) / PENDING)
        values = events.values()
        pack_schema = grow(con, of_base, schema, scratch, shards, base.day, Eviction(None, None), tell, values)
        pack_schema = learn_texts(con, schema, pack_schema, scratch, shards, known=values)
        counts |= {**events.counts, **grown_ids(base.pack_schema, pack_schema), "tombstones": {}}
        counts["drift"] = drift(con, schema, base.pack_schema, scratch, shards)
        made_with = {**settings.to_json(), "input": config.inputs, "dataset": None, "history_rows": config.history_rows}
        made_with |= {key: base.manifest["settings"][key] for key in OF_EVENTS if key in base.manifest["settings"]}
        with PackWriter(out, pack_schema, made_with, schema.to_json(), day) as writer:
            folder, vocab = writer.directory / INCREMENT, writer.directory / "vocab"
            folder.mkdir()
            write_vocabularies(con, writer, schema, totals="totals_after")
            write_further_texts(con, schema, vocab)
            write_items(con, schema, pack_schema, columns, events.catalogue, vocab, events.gap_unit, events.max_history)
            of_shards = OfShards(None, UnknownCounts(base.pack_schema))
            write_shards(con, writer, schema, pack_schema, settings, scratch, shards, counts, tell, of_shards)
            counts["drift"]["unknown"] = of_shards.unknown.shares()
            mend_cold_tasks(counts)
            assert events.last is not None  # a base of events has times
            shutil.copyfile(events.last, folder / EVENTS)
            write_chain(base, folder, inputs)
            if counts["bad_rows"]:
                shutil.copyfile(scratch / "rejects.parquet", writer.directory / "rejects.parquet")
            writer.finish(counts=counts)
    return {"out": str(out), "day": base.day, **counts}
