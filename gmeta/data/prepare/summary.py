"""`prepare` tells its progress while it works, and prints tables when it is done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from gmeta.data.antm2c.told import log_lines
from gmeta.data.events.findings import audit_lines
from gmeta.data.order import bucket_by_size
from gmeta.data.pack import SPLITS
from gmeta.data.sources import Connection, literal, scalar

Report: TypeAlias = Callable[[str, int, int], None]
"""It is told (stage, done, total) as work goes on."""

_SHOWN = 5
"""So many columns that drift are named."""
BATCH_TASKS = 64
"""The summary states the padding that batches of so many tasks have."""


@contextmanager
def console_report(command: str = "prepare") -> Iterator[Report]:
    """Report progress on stderr: a bar on a terminal, a line a stage elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(command, total=None)
        last = ""

        def report(name: str, done: int, total: int) -> None:
            nonlocal last
            progress.update(task, description=name, completed=done, total=total)
            if name != last and not console.is_terminal:
                print(f"{command}: {name} ({total})", file=sys.stderr)
            last = name

        yield report


def split_summary(con: Connection, split: str, cold_rows: int) -> dict[str, Any]:
    """Return the sizes of a split's tasks, and the fractions that are padding, cold tasks and rows of cold items."""
    where = f"WHERE split = {literal(split)}"
    sizes = con.execute(
        f"SELECT num_support + num_older AS support, num_rows + num_older AS rows FROM tasks {where} ORDER BY task_id"
    ).fetchnumpy()
    support = sizes["support"].astype(np.int64)
    query = sizes["rows"].astype(np.int64) - support
    seen = f"SELECT count(*) FROM tasks {where} AND key IN (SELECT key FROM tasks WHERE split = 'train')"
    warm = scalar(con, seen)
    rows = int(support.sum() + query.sum())
    return {
        "tasks": len(support),
        "rows": rows,
        "support": [int(support.min()), float(np.median(support)), int(support.max())],
        "query": [int(query.min()), float(np.median(query)), int(query.max())],
        "padding": round(_expected_padding(support, query), 4),
        "cold_tasks": round(1 - warm / len(support), 4),
        "cold_item_rows": round(cold_rows / rows, 4),
    }


def _expected_padding(support: npt.NDArray[Any], query: npt.NDArray[Any]) -> float:
    """Return the fraction of cells that is padding when tasks are bucketed by size into batches of BATCH_TASKS."""
    cells = sum(
        len(tasks) * int(support[tasks].max() + query[tasks].max())
        for tasks in bucket_by_size(support, query, BATCH_TASKS)
    )
    return 1 - int(support.sum() + query.sum()) / cells


def _day_lines(summary: dict[str, Any]) -> Iterator[str]:
    """Say what a day adds to its base, and how far its rows have drifted from it; nothing of a first pack."""
    if "drift" not in summary:
        return
    drift = summary["drift"]
    yield f"day {summary['day']}, new ids: " + ", ".join(f"{t} {n:,}" for t, n in summary["new_ids"].items())
    if gone := {table: ids for table, ids in summary["tombstones"].items() if ids}:
        yield "ids that stand for nothing any more: " + ", ".join(f"{t} {n:,}" for t, n in gone.items())
    label = drift["label_mean"]
    yield f"mean training label: {label['day']:.4g}, the base's {label['base']:.4g}"
    farthest = sorted(drift["numeric"].items(), key=lambda item: -abs(item[1]["mean"]))[:_SHOWN]
    if farthest:
        columns = ", ".join(f"{name} {d['mean']:+.2f} (deviation x{d['std']:.2f})" for name, d in farthest)
        yield f"numeric columns, by the distance of their mean from the base's in its deviations: {columns}"
    unknown = sorted(((share, name) for name, share in drift["unknown"].items() if share > 0), reverse=True)[:_SHOWN]
    if unknown:
        yield "values that the base has no id for: " + ", ".join(f"{name} {share:.1%}" for share, name in unknown)


def print_summary(summary: dict[str, Any]) -> None:
    """Print what `prepare` returned as tables."""
    console = Console(markup=False, emoji=False)  # names are the user's own: `rate[/s]` is no markup
    table = Table(title=f"task pack {summary['out']}")
    table.add_column("split")
    for name in ("tasks", "rows", "support", "query", "padding", "cold tasks", "rows of cold items"):
        table.add_column(name, justify="right")
    for name, s in summary["splits"].items():
        sizes = [f"{low} / {middle:g} / {high}" for low, middle, high in (s["support"], s["query"])]
        fractions = [f"{s[key]:.1%}" for key in ("padding", "cold_tasks", "cold_item_rows")]
        table.add_row(name, f"{s['tasks']:,}", f"{s['rows']:,}", *sizes, *fractions)
    console.print(table)
    console.print(f"support and query: min / median / max rows of a task; padding at {BATCH_TASKS} tasks a batch")
    console.print(f"items in no training row: {summary['cold_items']:,}")
    console.print("ids: " + ", ".join(f"{name} {size:,}" for name, size in summary["vocab"].items()))
    for line in audit_lines(summary) if "audit" in summary else ():
        console.print(line)
    for line in log_lines(summary["antm2c"]) if "antm2c" in summary else ():
        console.print(line)
    for line in _day_lines(summary):
        console.print(line)
    if "only_label" in summary:
        console.print(
            f"warning: every training label is {summary['only_label']:g}: there is nothing to rank by; the log needs "
            "rows of both kinds, such as what was shown and not clicked"
        )
    if missing := [name for name in SPLITS if name not in summary["splits"]]:
        console.print(f"no tasks in {' and '.join(missing)}: there are too few, or none was asked for")
    if summary.get("empty_files"):
        console.print(f"skipped: {summary['empty_files']:,} empty files")
    for reason, tasks in summary["dropped_tasks"].items():
        console.print(f"left out: {tasks:,} tasks ({summary['dropped_rows'][reason]:,} rows): {reason}")
    for split, reasons in summary.get("shortened_tasks", {}).items():
        for reason, (tasks, rows) in reasons.items():
            console.print(f"left out: {rows:,} rows of {tasks:,} tasks of split {split}: {reason}")
    if both := summary.get("rows_on_both_sides"):
        console.print(
            f"warning: {both['rows']:,} query rows of {both['tasks']:,} tasks (such as {both['example']!r}) are in the "
            "support too, label and all: models have seen their labels when they are judged by them"
        )
    for reason, tasks in summary.get("small_tasks", {}).items():
        console.print(f"small: {tasks:,} tasks: {reason}")
    for reason, rows in summary["bad_rows"].items():
        console.print(f"in rejects.parquet: {rows:,} rows: {reason}")
