"""Successive halving: which trials train on, and how far (Jamieson & Talwalkar, AISTATS 2016).

All trials train a little, the best third of them three times as long, and so on; the last ones train to the end. It is
one bracket of Hyperband (Li et al., JMLR 2018).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gmeta.tuning.journal import Done, TrialJournal

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


@dataclass(frozen=True)
class Ending:
    """Why trials ended before the last rung was finished; neither field is set where it was."""

    stopped: bool = False
    not_tried: str = ""  # where the budget was spent: what is left


def climb(
    journal: TrialJournal,
    num_trials: int,
    rungs: int,
    *,
    budget_s: float,
    higher_is_better: bool,
    train: Callable[[int, int], Done | None],
    finished: Callable[[Done], None],
    dropped: Callable[[set[int]], None] = lambda trials: None,
) -> Ending:
    """Take the trials from rung to rung, from where the journal stands, until the budget is spent.

    `train(trial, rung)` trains one to the end of a rung, and returns None where a stop was requested. `finished` gets
    its result, and `dropped` the trials that are not promoted. Without the clock, what is done depends on results only.
    """
    alive = list(range(num_trials))
    for rung in range(rungs):
        for number, trial in enumerate(alive):
            if (trial, rung) in journal.done:
                continue
            if journal.seconds >= budget_s:
                return Ending(not_tried=_not_tried(rung, rungs, alive[number:]))
            done = train(trial, rung)
            if done is None:
                return Ending(stopped=True)
            journal.done[trial, rung] = done
            finished(done)
        if rung + 1 < rungs:
            results = [journal.done[trial, rung] for trial in alive]
            best = ranked(results, higher_is_better)[: num_survivors(num_trials, rung + 1)]
            promoted = sorted(done.trial for done in best)
            dropped(set(alive) - set(promoted))
            alive = promoted
    return Ending()


def _not_tried(rung: int, rungs: int, left: list[int]) -> str:
    numbers = ", ".join(str(trial + 1) for trial in left)
    later = f", and the {rungs - rung - 1} rung(s) after it" if rung + 1 < rungs else ""
    return f"trial {numbers} in rung {rung + 1}{later}"
