"""What workers did over time: throughput and batch time of each, for the page and the metrics. A restart loses it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gmeta.elastic.ledger import Committed, Leased, Ledger, Renewed
from gmeta.elastic.monitor import StepTime
from gmeta.elastic.records import Record

MOST_POINTS = 120
MOST_WORKERS = 4096
FORGET_S = 600.0
"""Seconds of silence after which a worker that holds nothing is no longer shown."""

Point = float | None


@dataclass
class WorkerActivity:
    """What one worker did since the last point of its history."""

    seen: float  # when it was last heard of
    since: float  # when it finished the last thing that is in the history
    ended: float = 0.0  # when it finished the last thing of all
    samples: float = 0.0
    batches: int = 0  # steps of a rank, or work items of a worker that pulls them
    seconds: float | None = None  # of computing those batches, where they were reported
    latest: tuple[Point, Point] = (None, None)

    def rates(self, now: float) -> tuple[Point, Point]:
        """Return samples a second and seconds a batch. While a worker is amid a batch and not late with it, they stay
        as they were.
        """
        if not self.batches:
            known = self.latest[1]
            return self.latest if known is not None and now - self.since < 3 * max(known, 1.0) else (0.0, None)
        elapsed = self.ended - self.since  # none at a rank's first report: nobody knows when it began
        seconds = elapsed if self.seconds is None else self.seconds
        self.latest = self.samples / elapsed if elapsed > 0 else None, seconds / self.batches
        self.since, self.samples, self.batches, self.seconds = self.ended, 0.0, 0, None
        return self.latest

    def finished(self, now: float, samples: float, batches: int) -> None:
        """Note that the worker says it finished so much."""
        self.ended, self.samples, self.batches = now, self.samples + samples, self.batches + batches


@dataclass
class History:
    """Points at equal spacing. When there are too many, each pair becomes one and the spacing doubles."""

    spacing_s: float = 1.0
    times: list[float] = field(default_factory=list)
    throughput: dict[str, list[Point]] = field(default_factory=dict)
    batch_s: dict[str, list[Point]] = field(default_factory=dict)
    drawn: dict[str, Any] | None = None  # what the page was told of these points

    def add(self, now: float, rates: Mapping[str, tuple[Point, Point]]) -> None:
        """Add a point for every worker; those not in `rates` are forgotten."""
        self.drawn = None
        self.times.append(now)
        for which, store in enumerate((self.throughput, self.batch_s)):
            for name in store.keys() - rates.keys():
                del store[name]
            for name, values in rates.items():
                store.setdefault(name, [None] * (len(self.times) - 1)).append(values[which])
        if len(self.times) >= MOST_POINTS:
            self.spacing_s *= 2
            self.times = self.times[1::2]
            for store in (self.throughput, self.batch_s):
                for name, series in store.items():
                    store[name] = [_mean(pair) for pair in zip(series[::2], series[1::2], strict=False)]

    @property
    def due(self) -> float:
        """Return when the next point is due."""
        return self.times[-1] + self.spacing_s if self.times else 0.0


def _mean(values: Iterable[Point]) -> Point:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


class Activity:
    """Hears of every change and every report; `sample` adds a point to the history when it is time."""

    def __init__(self) -> None:
        self.workers: dict[str, WorkerActivity] = {}
        self.history = History()

    def seen(self, worker: str, now: float) -> WorkerActivity:
        """Return the account of a worker from which a message has just come."""
        if worker not in self.workers and len(self.workers) >= MOST_WORKERS:
            del self.workers[min(self.workers, key=lambda name: self.workers[name].seen)]
        work = self.workers.setdefault(worker, WorkerActivity(now, now))
        work.seen = now
        return work

    def changed(self, ledger: Ledger, record: Record, now: float) -> None:
        """Take a record that is about to be applied to `ledger`."""
        if isinstance(record, Leased):
            for lease in record.leases:
                work = self.seen(lease.worker, now)
                if ledger.spec.mode == "at_most_once":  # nobody will say that it is done
                    work.finished(now, len(ledger.spec.positions(lease.work_item)) - lease.done, 1)
        elif isinstance(record, Renewed):
            done = record.lease.done - ledger.doing[record.lease.work_item].done
            self.seen(record.lease.worker, now).finished(now, done, 0)
        elif isinstance(record, Committed):
            held = ledger.doing[record.work_item]
            self.seen(held.worker, now).finished(now, len(ledger.spec.positions(record.work_item)) - held.done, 1)

    def reported(self, rank: int, steps: Sequence[StepTime], now: float) -> None:
        """Take steps of a rank."""
        work = self.seen(f"rank {rank}", now)
        work.finished(now, sum(step.work for step in steps), len(steps))
        work.seconds = (work.seconds or 0.0) + sum(step.compute_s for step in steps)

    def sample(self, now: float, shown: Sequence[str], holding: Mapping[str, int]) -> None:
        """Add a point for the workers in `shown`, when it is due; `holding` has the leases of each."""
        for name, work in list(self.workers.items()):
            if now - work.seen > FORGET_S and not holding.get(name):
                del self.workers[name]
        self.history.add(now, {name: self.workers[name].rates(now) for name in shown if name in self.workers})

    def restart(self) -> None:
        """Begin the accounts of a new worker group. Those of the old one are closed, and the history goes on."""
        self.workers = {}
