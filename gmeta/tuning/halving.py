"""Successive halving: which trials train on, and how far (Jamieson & Talwalkar, AISTATS 2016).

All trials train a little, the best third of them three times as long, and so on; the last ones train to the end. It is
one bracket of Hyperband (Li et al., JMLR 2018).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from gmeta.tuning.journal import Done

ETA = 3
"""One in so many trials is promoted, and trains so many times as long; Hyperband's default is 3 or 4."""


def num_rungs(num_trials: int, num_validations: int) -> int:
    """Count the rungs: until one trial is left, as long as the first rung still has one validation."""
    rungs = 1
    while ETA**rungs <= min(num_trials, num_validations):
        rungs += 1
    return rungs


def validations_of(rung: int, rungs: int, num_validations: int) -> int:
    """Return after how many validations of a whole schedule a rung ends."""
    parts: int = ETA ** (rungs - 1 - rung)
    return round(num_validations / parts)


def num_survivors(num_trials: int, rung: int) -> int:
    """Return how many of all trials train in a rung."""
    parts: int = ETA**rung
    return max(1, num_trials // parts)


def deviation_over_seeds(values: list[float]) -> float:
    """Return the standard deviation over seeds; 0 for one seed."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def ranked(results: Iterable[Done], higher_is_better: bool) -> list[Done]:
    """Sort by the mean over seeds, the best first; what failed is left out. The lower number wins a tie."""
    sign = -1 if higher_is_better else 1
    fine = [done for done in results if done.failed is None]
    return sorted(fine, key=lambda done: (sign * statistics.fmean(done.values), done.trial))


def latest(results: Iterable[Done]) -> list[Done]:
    """Return the last rung of each trial. Its values are the best validations so far: they include earlier rungs."""
    found: dict[int, Done] = {}
    for done in results:
        if done.trial not in found or found[done.trial].rung < done.rung:
            found[done.trial] = done
    return list(found.values())
