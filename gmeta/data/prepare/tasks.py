"""Stage 2 of `prepare` decides which tasks a pack holds, their splits and sizes, and the place of each in its shard.

It reads view `raw_rows`, the rows that `check` gave, and leaves table `tasks`, one row a kept task.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from gmeta.config.data import PrepareConfig
from gmeta.core.errors import nearest
from gmeta.data.datasets import DATA_SETS
from gmeta.data.pack import SPLITS
from gmeta.data.schema import DataSchema, load_data_schema
from gmeta.data.sources import Connection, literal, md5_64, scalar

FOLDS = 10
"""Training tasks fall into so many folds: an item's statistics in a training row leave the row's own fold out."""

_UNKNOWN_PARTITION = "is not in partitions"
_SHOWN_PARTITIONS = 5
"""So many values of a partition column are named: of a wrong column there are as many as rows."""


@dataclass(frozen=True)
class Settings:
    """What decides the content of a pack besides its rows and the schema."""

    split_query: str
    query_size: int | None
    query_ratio: float | None
    min_task_rows: int
    max_task_rows: int | None
    task_split: str
    partitions: dict[str, str]
    valid_fraction: float
    test_fraction: float
    shard_mb: int
    seed: int


@dataclass(frozen=True)
class ShardJob:
    """One shard to be written."""

    index: int
    split: str


def resolve_settings(config: PrepareConfig) -> tuple[DataSchema, Settings]:
    """Return the data schema and the settings; what is unset is taken from the named data set or the defaults."""
    usual: dict[str, Any] = {}
    if config.dataset is not None:
        if config.dataset not in DATA_SETS:
            raise ValueError(f"dataset is {config.dataset!r}: {nearest(config.dataset, DATA_SETS)}")
        if config.input or config.schema is not None:
            raise ValueError(f"dataset {config.dataset} comes with its files and schema: leave input and schema out")
        schema, usual = DATA_SETS[config.dataset].schema, dict(DATA_SETS[config.dataset].settings)
    elif not config.input or config.schema is None:
        raise ValueError("name --input and --schema, or --dataset and --root; `gmeta prepare --help` explains them")
    else:
        schema = load_data_schema(config.schema)
    if config.label_threshold is not None:
        schema = replace(schema, label_threshold=float(config.label_threshold))
    if config.task_split not in (None, usual.get("task_split")):
        usual = {k: v for k, v in usual.items() if k not in ("partitions", "valid_fraction", "test_fraction")}

    def pick(key: str, default: Any) -> Any:
        value = getattr(config, key)
        return usual.get(key, default) if value is None else value

    task_split = pick("task_split", "user" if schema.partition is None else "column")
    partitions = config.partitions or usual.get("partitions") or {name: name for name in SPLITS}
    by_column = task_split == "column"
    given_valid = by_column and "valid" in partitions.values()
    settings = Settings(
        split_query=pick("split_query", "random" if schema.time is None else "last"),
        query_size=None if config.query_ratio is not None else pick("query_size", 10),
        query_ratio=config.query_ratio,
        min_task_rows=pick("min_task_rows", 2),
        max_task_rows=pick("max_task_rows", None),
        task_split=task_split,
        partitions=partitions if by_column else {},
        valid_fraction=(config.valid_fraction or 0.0) if given_valid else pick("valid_fraction", 0.1),
        test_fraction=0.0 if by_column else pick("test_fraction", 0.1),
        shard_mb=config.shard_mb,
        seed=config.seed,
    )
    _check_settings(config, schema, settings)
    return schema, settings


def _check_settings(config: PrepareConfig, schema: DataSchema, settings: Settings) -> None:
    if schema.time is None:
        for key, value in (("split_query", "last"), ("task_split", "time")):
            if getattr(settings, key) == value:
                raise ValueError(f"{key} is {value!r}, but the schema names no time column: add the key time to it")
    if settings.task_split == "column" and schema.partition is None:
        raise ValueError("task_split is 'column', but the schema names no column: add the key partition to it")
    if settings.task_split == "column" and config.test_fraction is not None:
        raise ValueError("test_fraction has no effect with task_split column: map a partition to test")
    if settings.task_split != "column" and config.partitions:
        raise ValueError(f"partitions has no effect with task_split {settings.task_split}: set task_split to column")
    if settings.task_split == "column" and "train" not in settings.partitions.values():
        raise ValueError(f"partitions is {settings.partitions}: map a partition to train")


def make_tasks(con: Connection, schema: DataSchema, settings: Settings, counts: dict[str, Any]) -> list[ShardJob]:
    """Make table `tasks`; returns its shards.

    It holds task, key (its text), partition, split, num_rows, num_support, fold (of training tasks), task_id, shard.
    """
    _group_tasks(con, settings)
    dropped = _dropped(con)
    counts["dropped_tasks"] = {reason: tasks for reason, (tasks, _) in dropped.items()}
    counts["dropped_rows"] = {reason: rows for reason, (_, rows) in dropped.items()}
    why = "; ".join(f"{tasks} left out: {reason}" for reason, (tasks, _) in dropped.items())
    if any(reason.endswith(_UNKNOWN_PARTITION) for reason in dropped):
        why += f"; partitions names {', '.join(map(repr, settings.partitions))}"
    kept = scalar(con, "SELECT count(*) FROM grouped WHERE dropped IS NULL")
    if kept < 2:
        raise ValueError(
            f"there are {kept} tasks to use, at least 2 are needed{f' ({why})' if why else ''}: "
            f"is {schema.task!r} the right task column, and do query_size and min_task_rows suit the data?"
        )
    _split_tasks(con, settings)
    _place_tasks(con, schema, settings)
    found = con.execute("SELECT DISTINCT shard, split FROM tasks ORDER BY shard").fetchall()
    if not any(split == "train" for _, split in found):
        raise ValueError(f"no task is left to train on{f' ({why})' if why else ''}: check partitions and fractions")
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


def _group_tasks(con: Connection, settings: Settings) -> None:
    query_rows = (
        f"CAST(round({settings.query_ratio!r} * num_rows) AS BIGINT)"
        if settings.query_size is None
        else str(settings.query_size)
    )
    names = " ".join(f"WHEN {literal(k)} THEN {literal(v)}" for k, v in settings.partitions.items())
    mapped = f"CASE partition {names} END" if names else "''"
    first_time = "min(time)" if settings.task_split == "time" else "0"
    partition = "partition" if settings.task_split == "column" else "'' AS partition"
    too_large = f"WHEN num_rows > {settings.max_task_rows} THEN 'more rows than max_task_rows'"
    con.execute(f"""
        CREATE TABLE grouped AS
        SELECT *, num_rows - num_query AS num_support, CASE
            WHEN mapped IS NULL THEN {literal(_UNKNOWN_PARTITION)}
            WHEN num_rows < {settings.min_task_rows} THEN 'fewer rows than min_task_rows'
            {too_large if settings.max_task_rows is not None else ""}
            WHEN num_rows <= num_query THEN 'no row is left for the support'
            WHEN num_query = 0 THEN 'no row is left for the query' END AS dropped
        FROM (SELECT *, CAST(task AS VARCHAR) AS key, {query_rows} AS num_query, {mapped} AS mapped
              FROM (SELECT task, {partition}, count(*) AS num_rows, {first_time} AS first_time
                    FROM raw_rows GROUP BY ALL))""")


def _split_tasks(con: Connection, settings: Settings) -> None:
    """Make table `split_tasks`, the kept tasks with their split. A key is held out whole, with all of its tasks."""
    drawn = md5_64(literal(f"split|{settings.seed}"), "key")
    if settings.task_split == "column":
        pool, split = "WHERE mapped = 'train'", "mapped"
    else:
        pool, split = "", "'train'"
    order = "min(first_time) DESC, key" if settings.task_split == "time" else f"{drawn}, key"
    query = f"SELECT count(DISTINCT key) FROM (SELECT * FROM grouped WHERE dropped IS NULL) {pool}"
    keys = scalar(con, query)
    test = _held_out(settings.test_fraction, keys)
    valid = _held_out(settings.valid_fraction, keys)
    con.execute(f"""
        CREATE TABLE split_tasks AS
        SELECT g.*, CASE WHEN h.rank <= {test} THEN 'test' WHEN h.rank <= {test + valid} THEN 'valid'
                         ELSE {split} END AS split
        FROM grouped g LEFT JOIN (
            SELECT key, row_number() OVER (ORDER BY {order}) AS rank
            FROM (SELECT * FROM grouped WHERE dropped IS NULL) {pool} GROUP BY key
        ) h ON h.key = g.key {"AND g.mapped = 'train'" if pool else ""}
        WHERE g.dropped IS NULL""")


def _held_out(fraction: float, total: int) -> int:
    """Return how many tasks to hold out: at least one where any is asked for and two are left."""
    return max(round(fraction * total), 1 if fraction > 0 and total > 2 else 0)


def row_bytes(con: Connection, schema: DataSchema) -> float:
    """Return the mean number of bytes of an encoded row."""
    many = [i for i, f in enumerate(schema.features) if f.kind != "categorical"]
    one_valued = len(schema.features) - len(many)
    fixed = 4 * one_valued + 4 * len(schema.numeric_names()) + 4 + 1 + 8 * (schema.time is not None) + 8 * len(many)
    if not many:
        return float(fixed)
    lengths = " + ".join(f"sum(len(f{i}))" for i in many)
    query = f"SELECT ({lengths}) / greatest(count(*), 1) FROM raw_rows"
    values = scalar(con, query)
    return fixed + 4 * float(values or 0)


def _place_tasks(con: Connection, schema: DataSchema, settings: Settings) -> None:
    """Make table `tasks`. Its order is random within a split; shards are cut from it, about equal in rows."""
    rows_per_shard = max(1.0, settings.shard_mb * 1e6 / row_bytes(con, schema))
    order = f"{md5_64(literal(f'order|{settings.seed}'), 'key', 'partition')}, key, partition"
    fold = f"CAST({md5_64(literal(f'fold|{settings.seed}'), 'key')} % {FOLDS} AS INTEGER)"
    split_rank = " ".join(f"WHEN {literal(name)} THEN {i}" for i, name in enumerate(SPLITS))
    con.execute(f"""
        CREATE TABLE tasks AS
        SELECT task, key, partition, split, num_rows, num_support, CASE WHEN split = 'train' THEN {fold} END AS fold,
               row_number() OVER (ORDER BY split_rank, place) - 1 AS task_id,
               dense_rank() OVER (ORDER BY split_rank, rows_before * num_shards // split_rows) - 1 AS shard
        FROM (SELECT *, greatest(1, CAST(round(split_rows / {rows_per_shard!r}) AS BIGINT)) AS num_shards
              FROM (SELECT *, CASE split {split_rank} END AS split_rank,
                           row_number() OVER (PARTITION BY split ORDER BY {order}) AS place,
                           CAST(sum(num_rows) OVER (PARTITION BY split) AS BIGINT) AS split_rows,
                           CAST(sum(num_rows) OVER (PARTITION BY split ORDER BY {order} ROWS UNBOUNDED PRECEDING)
                                AS BIGINT) - num_rows AS rows_before
                    FROM split_tasks))""")
