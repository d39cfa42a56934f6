"""Stage 2 of `prepare` decides which tasks a pack holds, their splits and sizes, and the place of each in its shard.

It reads view `raw_rows`, the rows that `check` gave, and leaves table `tasks`, one row a kept task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gmeta.data.pack import SPLITS
from gmeta.data.prepare.cut import size_tasks
from gmeta.data.prepare.settings import Settings
from gmeta.data.prepare.slices import sliced_features
from gmeta.data.schema import DataSchema
from gmeta.data.sources import Connection, literal, md5_64, scalar

FOLDS = 10
"""Training tasks fall into so many folds: an item's statistics in a training row leave the row's own fold out."""

LEFT_OUT = "left out"
"""Stands for a split where the rows of tasks that a pack leaves out are kept for later days."""

_UNKNOWN_PARTITION = "is not in partitions"
_SHOWN_PARTITIONS = 5
"""So many values of a partition column are named: of a wrong column there are as many as rows."""


@dataclass(frozen=True)
class ShardJob:
    """One shard to be written."""

    index: int
    split: str


def make_tasks(
    con: Connection, schema: DataSchema, settings: Settings, counts: dict[str, Any], *, goes_on: bool = False
) -> list[ShardJob]:
    """Make table `tasks`; returns its shards.

    It holds task, key (its text), partition, split, num_found (raw rows), num_within and num_rows (see `cut`),
    num_support, fold (of training tasks), num_older (see `history`), task_id, shard.
    `counts` gets what is left out, by reason, and what is cut unusually. A pack that `goes_on` with a base finds what
    the base knows of its tasks in table `known_tasks`.
    """
    if not goes_on:
        con.execute("CREATE TABLE known_tasks (key VARCHAR, split VARCHAR, num_known BIGINT)")
    _group_tasks(con, settings)
    dropped = _dropped(con)
    counts["dropped_tasks"] = {reason: tasks for reason, (tasks, _) in dropped.items()}
    counts["dropped_rows"] = {reason: rows for reason, (_, rows) in dropped.items()}
    why = "; ".join(f"{tasks} left out: {reason}" for reason, (tasks, _) in dropped.items())
    if any(reason.endswith(_UNKNOWN_PARTITION) for reason in dropped):
        why += f"; partitions names {', '.join(map(repr, settings.partitions))}"
    kept = scalar(con, "SELECT count(*) FROM grouped WHERE dropped IS NULL")
    if goes_on and kept == 0:
        raise ValueError(
            f"the day has no task to use{f' ({why})' if why else ''}: leave it out, or add more files to it"
        )
    if kept < 2 and not goes_on:
        raise ValueError(
            f"there are {kept} tasks to use, at least 2 are needed{f' ({why})' if why else ''}: "
            f"is {schema.task!r} the right task column, and do min_task_rows and max_task_rows suit the data? "
            "(max_task_rows_keep last shortens long tasks, and leaves none out)"
        )
    _keep_splits(con, settings) if goes_on else _split_tasks(con, settings)
    if dropped:
        counts["left_out"] = _left_out(con)
    size_tasks(con, settings, counts)
    if not scalar(con, "SELECT count(*) FROM sized WHERE num_support + num_older > 0"):
        raise ValueError(
            f"none of the {kept} tasks has a support row, so that nothing could adapt: "
            + (
                "the role column calls all of them query"
                if settings.split_query == "column"
                else f"each has one row; is {schema.task!r} the right task column?"
            )
        )
    _place_tasks(con, schema, settings, folds=not goes_on)
    found = con.execute("SELECT DISTINCT shard, split FROM tasks ORDER BY shard").fetchall()
    if not any(split == "train" for _, split in found):
        raise ValueError(
            f"no task is left to train on{f' ({why})' if why else ''}: check partitions and fractions"
            if not goes_on
            else f"the day has no task to train on{f' ({why})' if why else ''}: leave it out, or add more files to it"
        )
    return [ShardJob(shard, split) for shard, split in found]


def _dropped(con: Connection) -> dict[str, tuple[int, int]]:
    """Return reason -> tasks and rows that are left out for it; of unknown partitions the most frequent are named."""
    found = con.execute(f"""
        SELECT dropped, CASE dropped WHEN {literal(_UNKNOWN_PARTITION)} THEN partition END AS value, count(*) AS tasks,
               sum(num_rows)::BIGINT
        FROM grouped WHERE dropped IS NOT NULL GROUP BY ALL ORDER BY dropped, tasks DESC, value""").fetchall()
    named = [value for _, value, _, _ in found if value is not None]
    others = len(named) - _SHOWN_PARTITIONS
    sums: dict[str, tuple[int, int]] = {}
    for reason, value, tasks, rows in found:
        if value is not None:
            known = value in named[:_SHOWN_PARTITIONS]
            reason = f"partition {value[:80] if known else f'(one of {others} others)'} {reason}"
        before = sums.get(reason, (0, 0))
        sums[reason] = (before[0] + tasks, before[1] + rows)
    return dict(sorted(sums.items()))


def _left_out(con: Connection) -> dict[str, dict[str, list[int]]]:
    """Return split -> reason -> tasks and rows that would lie in the split and are left out."""
    found = con.execute("""
        SELECT split, dropped, count(*), sum(num_rows)::BIGINT
        FROM split_tasks WHERE dropped IS NOT NULL AND split IS NOT NULL GROUP BY ALL ORDER BY split, dropped""")
    sums: dict[str, dict[str, list[int]]] = {}
    for split, reason, tasks, rows in found.fetchall():
        sums.setdefault(split, {})[reason] = [tasks, rows]
    return sums


def _group_tasks(con: Connection, settings: Settings) -> None:
    names = " ".join(f"WHEN {literal(k)} THEN {literal(v)}" for k, v in settings.partitions.items())
    mapped = f"CASE partition {names} END" if names else "''"
    first_time = "min(time)" if settings.task_split == "time" else "0"
    partition = "partition" if settings.task_split == "column" else "'' AS partition"
    asked = "count(*) FILTER (is_query)" if settings.split_query == "column" else "NULL"
    too_large = f"WHEN num_rows > {settings.max_task_rows} THEN 'more rows than max_task_rows'"
    con.execute(f"""
        CREATE TABLE grouped AS
        SELECT *, CASE
            WHEN mapped IS NULL THEN {literal(_UNKNOWN_PARTITION)}
            WHEN num_rows + num_known < {settings.min_task_rows} THEN 'fewer rows than min_task_rows'
            {too_large if settings.max_task_rows is not None and not settings.shortens else ""}
            WHEN num_asked = 0 THEN 'no row is query' END AS dropped
        FROM (SELECT g.*, coalesce(k.num_known, 0) AS num_known, {mapped} AS mapped
              FROM (SELECT task, {partition}, count(*) AS num_rows, {asked} AS num_asked, {first_time} AS first_time,
                           CAST(task AS VARCHAR) AS key FROM raw_rows GROUP BY ALL) g
              LEFT JOIN known_tasks k USING (key))""")


def _split_tasks(con: Connection, settings: Settings) -> None:
    """Make table `split_tasks`, all tasks with their split. A key is held out whole, with all of its tasks.

    A task that is left out has the split in which it would lie: that of the next kept key in the order of the draw
    (NULL where its partition belongs to none).
    """
    drawn = md5_64(literal(f"split|{settings.seed}"), "key")
    if settings.task_split == "column":
        pool, split = "WHERE mapped = 'train'", "mapped"
    else:
        pool, split = "", "'train'"
    order = "first_time DESC, key" if settings.task_split == "time" else f"{drawn}, key"
    query = f"SELECT count(DISTINCT key) FROM (SELECT * FROM grouped WHERE dropped IS NULL) {pool}"
    keys = scalar(con, query)
    test = _held_out(settings.test_fraction, keys)
    valid = _held_out(settings.valid_fraction, keys)
    con.execute(f"""
        CREATE TABLE split_tasks AS
        SELECT g.*, CASE WHEN h.rank <= {test} THEN 'test' WHEN h.rank <= {test + valid} THEN 'valid'
                         ELSE {split} END AS split
        FROM grouped g LEFT JOIN (
            SELECT key, sum(kept) OVER (ORDER BY {order} ROWS UNBOUNDED PRECEDING) + 1 - kept AS rank
            FROM (SELECT key, min(first_time) AS first_time, max(CAST(dropped IS NULL AS INTEGER)) AS kept
                  FROM grouped {pool} GROUP BY key)
        ) h ON h.key = g.key {"AND g.mapped = 'train'" if pool else ""}""")


def drawn_split(settings: Settings, key: str) -> str:
    """Return SQL of the split of a new key of a pack that goes on with a base: by the hash that ranks the base's."""
    share = f"{md5_64(literal(f'split|{settings.seed}'), key)} / {2.0**64!r}"
    test, valid = settings.test_fraction, settings.valid_fraction
    return f"CASE WHEN {share} < {test!r} THEN 'test' WHEN {share} < {test + valid!r} THEN 'valid' ELSE 'train' END"


def _keep_splits(con: Connection, settings: Settings) -> None:
    """Make table `split_tasks` of a pack that goes on with a base: a known key keeps its split."""
    split = f"coalesce(k.split, {drawn_split(settings, 'g.key')})"
    if settings.task_split == "column":
        split = f"CASE WHEN mapped = 'train' THEN {split} ELSE mapped END"
    con.execute(f"""CREATE TABLE split_tasks AS
                    SELECT g.*, {split} AS split FROM grouped g LEFT JOIN known_tasks k USING (key)""")


def _held_out(fraction: float, total: int) -> int:
    """Return how many tasks to hold out: at least one where any is asked for and two are left."""
    return max(round(fraction * total), 1 if fraction > 0 and total > 2 else 0)


def row_bytes(con: Connection, schema: DataSchema) -> float:
    """Return the mean number of bytes of an encoded row."""
    many = [i for i, f in enumerate(schema.features) if f.kind != "categorical"]
    one_valued = len(schema.features) - len(many)
    fixed = 4 * one_valued + 4 * len(schema.numeric_names()) + 4 + 1 + 8 * (schema.time is not None) + 8 * len(many)
    fixed += 4 * (schema.weight is not None) + 4 * max(0, len(schema.labels) - 1) + 8 * len(schema.numeric_sequence)
    fixed += sum(v.dim * (2 if v.dtype == "fp16" else 4) for v in schema.vector if v.owner == "row")
    sliced = sliced_features(con)
    lists = [f"f{i}.length" if i in sliced else f"len(f{i})" for i in many]
    lists += [f"len(s{i})" for i in range(len(schema.numeric_sequence))]
    if not lists:
        return float(fixed)
    lengths = " + ".join(f"sum({length})" for length in lists)
    query = f"SELECT ({lengths}) / greatest(count(*), 1) FROM raw_rows"
    values = scalar(con, query)
    return fixed + 4 * float(values or 0)


def _place_tasks(con: Connection, schema: DataSchema, settings: Settings, *, folds: bool) -> None:
    """Make table `tasks`. Its order is random within a split; shards are cut from it, about equal in rows."""
    rows_per_shard = max(1.0, settings.shard_mb * 1e6 / row_bytes(con, schema))
    order = f"{md5_64(literal(f'order|{settings.seed}'), 'key', 'partition')}, key, partition"
    fold = f"CAST({md5_64(literal(f'fold|{settings.seed}'), 'key')} % {FOLDS} AS INTEGER)"
    split_rank = " ".join(f"WHEN {literal(name)} THEN {i}" for i, name in enumerate(SPLITS))
    con.execute(f"""
        CREATE TABLE tasks AS
        SELECT task, key, partition, split, num_found, num_within, num_rows, num_support,
               CASE WHEN split = 'train' AND {folds} THEN {fold} END AS fold, num_known, num_older,
               row_number() OVER (ORDER BY split_rank, place) - 1 AS task_id,
               dense_rank() OVER (ORDER BY split_rank, rows_before * num_shards // split_rows) - 1 AS shard
        FROM (SELECT *, greatest(1, CAST(round(split_rows / {rows_per_shard!r}) AS BIGINT)) AS num_shards
              FROM (SELECT *, CASE split {split_rank} END AS split_rank,
                           row_number() OVER (PARTITION BY split ORDER BY {order}) AS place,
                           CAST(sum(size) OVER (PARTITION BY split) AS BIGINT) AS split_rows,
                           CAST(sum(size) OVER (PARTITION BY split ORDER BY {order} ROWS UNBOUNDED PRECEDING)
                                AS BIGINT) - size AS rows_before
                    FROM (SELECT *, num_rows + num_known AS size FROM sized)))""")


def place_left_out(con: Connection, schema: DataSchema, settings: Settings, most: int) -> list[ShardJob]:
    """Add the tasks that are left out to table `tasks`, after the others, with `most` of their rows, about the last
    ones; return their shards.
    """
    rows_per_shard = max(1.0, settings.shard_mb * 1e6 / row_bytes(con, schema))
    kept, support = f"least(num_rows, {most})", "0"
    if settings.split_query == "column":
        support = f"least(num_rows - num_asked, {most} - least(num_asked, {most}))"
        kept = f"{support} + least(num_asked, {most})"
    con.execute(f"""
        INSERT INTO tasks BY NAME
        SELECT *, (SELECT count(*) FROM tasks) + row_number() OVER (ORDER BY key) - 1 AS task_id,
               1 + (SELECT max(shard) FROM tasks)
               + CAST(floor(sum(num_rows + num_known) OVER (ORDER BY key) / {rows_per_shard!r}) AS BIGINT) AS shard
        FROM (SELECT task, key, partition, {literal(LEFT_OUT)} AS split, num_rows AS num_found, {kept} AS num_within,
                     {kept} AS num_rows, {support} AS num_support, num_known, 0 AS num_older
              FROM split_tasks WHERE dropped IS NOT NULL)""")
    found = con.execute(f"SELECT DISTINCT shard FROM tasks WHERE split = {literal(LEFT_OUT)} ORDER BY shard").fetchall()
    return [ShardJob(shard, LEFT_OUT) for (shard,) in found]
