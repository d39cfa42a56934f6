"""What a tuning prints, on standard output."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from gmeta.tuning.halving import deviation_over_seeds, latest
from gmeta.tuning.journal import Done
from gmeta.tuning.space import TrialSettings

_PIPE_WIDTH = 240


def say(*lines: str) -> None:
    """Print lines at once, also into a pipe."""
    for line in lines:
        print(line, flush=True)


def print_trials(
    trials: list[TrialSettings], metric: str, rungs: int, results: Iterable[Done], best: int | None
) -> None:
    """Print every trial with its settings and its metric in each rung: the mean over seeds, and their deviation."""
    found = {(done.trial, done.rung): done for done in results}
    reached = {done.trial: done.rung for done in latest(found.values())}
    table = Table(title=f"{metric} on valid, mean ± standard deviation over seeds")
    table.add_column("trial", justify="right", no_wrap=True)
    for key in trials[0]:
        table.add_column(key, justify="right", no_wrap=True)
    for rung in range(rungs):
        table.add_column(f"rung {rung + 1}", justify="right", no_wrap=True)
    for trial in sorted(range(len(trials)), key=lambda number: (number != best, -reached.get(number, -1), number)):
        cells = [_cell(found.get((trial, rung))) for rung in range(rungs)]
        style = "bold" if trial == best else ""
        table.add_row(str(trial + 1), *map(str, trials[trial].values()), *cells, style=style)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _PIPE_WIDTH)  # a pipe has no width of its own: 80 would cut the table
    console.print(table)


def _cell(done: Done | None) -> str:
    if done is None:
        return ""
    if done.failed is not None:
        return "failed"
    deviation = f" ± {deviation_over_seeds(done.values):.4f}" if len(done.values) > 1 else ""
    return f"{statistics.fmean(done.values):.4f}{deviation}"
