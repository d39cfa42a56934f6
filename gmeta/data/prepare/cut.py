"""How many rows of a task are support and query: a part of stage 2 of `prepare`.

A task that is too small for the usual cut gives up query rows first, then support rows, and keeps one of each; a task
of one row has that row as its query.
"""

from __future__ import annotations

from gmeta.data.prepare.settings import Settings
from gmeta.data.sources import Connection, scalar


def size_tasks(con: Connection, settings: Settings) -> dict[str, int]:
    """Make table `sized`: the kept tasks of `split_tasks` with `num_support`; returns reason -> tasks cut unusually."""
    usual = (
        f"CAST(round({settings.query_ratio!r} * num_rows) AS BIGINT)"
        if settings.query_size is None
        else str(settings.query_size)
    )
    con.execute(f"""
        CREATE TABLE sized AS
        SELECT * EXCLUDE (usual), num_rows - greatest(1, least(usual, num_rows - 1)) AS num_support,
               num_rows > 1 AND usual NOT BETWEEN 1 AND num_rows - 1 AS is_small
        FROM (SELECT *, {usual} AS usual FROM split_tasks WHERE dropped IS NULL)""")
    name = "query_ratio" if settings.query_size is None else "query_size"
    found = {
        f"too few rows for {name}, so that they keep one support and one query row at least": "is_small",
        "one row, which is their query: they have no support": "num_rows = 1",
    }
    counts = {why: int(scalar(con, f"SELECT count(*) FROM sized WHERE {where}")) for why, where in found.items()}
    return {why: tasks for why, tasks in counts.items() if tasks}
