"""Steps of a run without the loop around them."""

from __future__ import annotations

from gmeta.training.late_tasks import dropped_tasks
from gmeta.training.run import Run
from gmeta.training.statistics import InFlightStep, Stopwatch
from gmeta.training.step import finish_step, train_step


def start_step(run: Run) -> InFlightStep:
    """Start a step on the loader's next batch."""
    return train_step(run.state, next(run.loader), Stopwatch(run.state.mesh.device))


def end_of(run: Run, started: InFlightStep) -> dict[str, float]:
    """Return the step's statistics; what it left for later goes back to the loader."""
    stats = finish_step(run.state, started)
    run.loader.put_back(dropped_tasks(started.batch, stats))
    return stats


def one_step(run: Run) -> dict[str, float]:
    """Make one step and return its statistics."""
    return end_of(run, start_step(run))
