"""Which rows of a task are support, which are query, and which a limit leaves out: a part of stages 2 and 3.

A task is shortened to its limit first, then cut. One that is too small for the usual cut gives up query rows first (of
`support_size`, support rows), and keeps one of each side; a task of one row has that row as its query.
"""

from __future__ import annotations

from typing import Any

from gmeta.data.prepare.columns import label_columns, value_columns
from gmeta.data.prepare.settings import Settings
from gmeta.data.schema import DataSchema
from gmeta.data.sources import Connection, literal, md5_64, scalar


def size_tasks(con: Connection, settings: Settings, counts: dict[str, Any]) -> None:
    """Make table `sized`: the kept tasks of `split_tasks`, with the sizes that they have in the pack.

    A task has `num_found` raw rows, of which its limit leaves `num_within`; `num_rows` of these are its support
    (`num_support`) and query; `num_older` rows of earlier days come before its support. `counts` gets the tasks that
    are shortened or cut unusually, where there are any.
    """
    support, rows, unusual = _cut(settings)
    con.execute(f"""
        CREATE TABLE sized AS
        SELECT *, {rows} AS num_rows FROM (
            SELECT *, {support} AS num_support, num_within > 1 AND num_older = 0 AND {unusual} AS is_small FROM (
                SELECT *, {_older(settings)} AS num_older FROM (
                    SELECT * EXCLUDE (num_rows), num_rows AS num_found, {_limited(settings, "num_rows")} AS num_within
                    FROM split_tasks WHERE dropped IS NULL)))""")
    if small := _small(con, settings):
        counts["small_tasks"] = small
    if shortened := _shortened(con, settings):
        counts["shortened_tasks"] = shortened


def _limited(settings: Settings, rows: str) -> str:
    """Return SQL of `rows`, or of the limit of a task's rows where that is less."""
    most = settings.max_task_rows if settings.shortens else None
    limits = (settings.max_train_task_rows or most, most)
    train, other = (rows if limit is None else f"least({rows}, {limit})" for limit in limits)
    return f"CASE split WHEN 'train' THEN {train} ELSE {other} END"


def _older(settings: Settings) -> str:
    """Return SQL of the rows of earlier days that a task's support has: what its limits leave for them."""
    most = "num_known" if settings.support_size is None else f"least(num_known, {settings.support_size})"
    if settings.max_task_rows is None and settings.max_train_task_rows is None:
        return most
    other = settings.max_task_rows or 2**62
    limit = f"CASE split WHEN 'train' THEN {settings.max_train_task_rows or other} ELSE {other} END"
    return f"least({most}, greatest(0, {limit} - num_within))"


def _cut(settings: Settings) -> tuple[str, str, str]:
    """Return SQL of a task's support rows, of its rows, and of whether it is too small for the usual cut."""
    if settings.split_query == "column":
        # A task beyond its limit gives up support rows first, but for one.
        return "least(num_found - num_asked, greatest(1, num_within - num_asked))", "num_within", "false"
    if (size := settings.support_size) is not None:
        most = settings.query_size
        rows = "num_within" if most is None else f"least(num_within, num_support + {most})"
        return f"least(greatest({size} - num_older, 0), num_within - 1)", rows, f"num_within <= {size}"
    usual = (
        f"CAST(round({settings.query_ratio!r} * num_within) AS BIGINT)"
        if settings.query_size is None
        else str(settings.query_size)
    )
    needed = "CASE WHEN num_older = 0 THEN 1 ELSE 0 END"  # support rows of the day itself
    support = f"num_within - greatest(1, least({usual}, num_within - {needed}))"
    return support, "num_within", f"{usual} NOT BETWEEN 1 AND num_within - 1"


def _small(con: Connection, settings: Settings) -> dict[str, int]:
    """Return reason -> tasks that are too small for the usual cut."""
    name = "support_size" if settings.support_size is not None else "query_size"
    name = "query_ratio" if settings.query_ratio is not None else name
    found = {
        f"too few rows for {name}, so that they keep one support and one query row at least": "is_small",
        "one row, which is their query: they have no support": "num_support + num_older = 0",
    }
    if settings.split_query == "column":
        found = {"all rows are query: they have no support": "num_support + num_older = 0"}
    counts = {why: int(scalar(con, f"SELECT count(*) FROM sized WHERE {where}")) for why, where in found.items()}
    return {why: tasks for why, tasks in counts.items() if tasks}


def _shortened(con: Connection, settings: Settings) -> dict[str, dict[str, list[int]]]:
    """Return split -> reason -> tasks of which rows are left out, and those rows."""
    limit = "max_train_task_rows" if settings.max_train_task_rows is not None else "max_task_rows"
    found = con.execute(f"""
        SELECT split, why, count(*), sum(rows)::BIGINT FROM (
            SELECT split, CASE split WHEN 'train' THEN {literal(limit)} ELSE 'max_task_rows' END AS why,
                   num_found - num_within AS rows FROM sized
            UNION ALL SELECT split, 'support_size and query_size', num_within - num_rows FROM sized)
        WHERE rows > 0 GROUP BY ALL ORDER BY split, why""")
    sums: dict[str, dict[str, list[int]]] = {}
    for split, reason, tasks, rows in found.fetchall():
        sums.setdefault(split, {})[f"rows beyond {reason}"] = [tasks, rows]
    return sums


def choose_rows(con: Connection, settings: Settings) -> bool:
    """Make table `chosen` (file, row): the rows that shortened tasks keep; return whether there is such a task.

    It sorts the places and times of these tasks' rows alone, which DuckDB may do on disk.
    """
    if not scalar(con, "SELECT count(*) FROM tasks WHERE num_rows < num_found"):
        return False
    drawn = {name: md5_64(literal(f"{name}|{settings.seed}"), "file", "row") for name in ("keep", "query")}
    within = f"{drawn['keep']}, file, row" if settings.keeps == "random" else "time DESC, file DESC, row DESC"
    cut = f"{drawn['query']}, file, row" if settings.split_query == "random" else "time, file, row"
    shortened = f"""(SELECT s.file, s.row, s.time, s.is_query, t.* EXCLUDE (task)
                     FROM {_joined(settings)} WHERE t.num_rows < t.num_found)"""
    if settings.split_query == "column":
        side = "CASE WHEN is_query THEN num_rows - num_support ELSE num_support END"
        chosen = f"""SELECT file, row FROM {shortened}
                     QUALIFY row_number() OVER (PARTITION BY task_id, is_query ORDER BY {within}) <= {side}"""
    else:
        chosen = f"""
            SELECT file, row FROM (
                SELECT * FROM {shortened}
                QUALIFY row_number() OVER (PARTITION BY task_id ORDER BY {within}) <= num_within)
            QUALIFY row_number() OVER (PARTITION BY task_id ORDER BY {cut}) <= num_rows"""
    con.execute(f"CREATE TABLE chosen AS {chosen}")
    return True


def rows_on_both_sides(con: Connection, schema: DataSchema, settings: Settings) -> dict[str, Any]:
    """Count the query rows that are in the support of their task too, label and all; nothing where there are none.

    A log may hold one event twice, or two events that look alike, so that such rows are told of and not refused.
    """
    columns = [*label_columns(schema), "time", "item", *value_columns(schema)]
    columns = [f"s.{name}" for name in columns]
    found = con.execute(f"""
        SELECT count(DISTINCT task_id), sum(rows)::BIGINT, min(key) FROM (
            SELECT t.task_id, min(t.key) AS key, count(*) FILTER (s.is_query) AS rows
            FROM {_joined(settings)} GROUP BY t.task_id, hash({", ".join(columns)})
            HAVING bool_or(s.is_query) AND NOT bool_and(s.is_query))""").fetchone()
    assert found is not None
    tasks, rows, key = found
    return {"tasks": tasks, "rows": rows, "example": key} if tasks else {}


def _joined(settings: Settings) -> str:
    """Return SQL of the raw rows s of kept tasks t."""
    partition = "AND t.partition = s.partition" if settings.task_split == "column" else ""
    return f"raw_rows s JOIN tasks t ON t.task = s.task {partition}"
