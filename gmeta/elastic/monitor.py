"""Turns what ranks report into what a policy sees: medians of each rank's last few steps and of its last hundred.
Pure."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gmeta.elastic.actions import Setting, setting_from_json
from gmeta.elastic.wire import to_wire


@dataclass(frozen=True)
class StepTime:
    """One step of one rank, measured where it ran."""

    step: int
    compute_s: float  # forward, backward and update; without waiting for others, which would hide a straggler
    input_s: float  # waiting for its own loader
    wait_s: float  # exchanging with others
    work: float  # the tasks it computed, weighed by their rows; ranks sum to the tasks of the batch


@dataclass(frozen=True)
class StepStats:
    """Statistics of a rank's last steps."""

    steps: int
    compute_s: float  # median of a step
    input_s: float  # median of a step
    wait_s: float  # median of a step
    slot_s: float  # median of compute seconds a task; nan where it had no task to compute


@dataclass(frozen=True)
class WorkerView:
    """What is known of one rank."""

    rank: int
    role: str = "worker"  # peers are ranks of one role
    device: str = ""  # the class of device, for policy dd
    node: str = ""
    max_slots: int | None = None  # tasks of a micro-batch that fit its memory
    silent_s: float = 0.0  # seconds since its last report
    short: StepStats | None = None  # the last few steps; None: nothing was reported yet in this generation
    long: StepStats | None = None  # the last hundred steps; None while there are fewer
    facts: Mapping[str, float] = field(default_factory=dict)  # cpu_steal, load, memory of its node: fractions of 1

    def speed(self, long: bool = False) -> float | None:
        """Return the tasks a second of compute, from the last few steps or from the last hundred; None where it is
        unknown.
        """
        stats = self.long if long else self.short
        return 1 / stats.slot_s if stats is not None and stats.slot_s > 0 else None


@dataclass(frozen=True)
class Snapshot:
    """All that a policy decides on. A decision is a function of it alone, so that a trace of snapshots can be
    replayed."""

    now: float  # seconds of the coordinator's clock
    step: int  # steps that every rank has finished
    setting: Setting  # the last that was decided; it is in force if `step` has reached it
    settled_steps: int  # steps that every rank has finished and reported under `setting`; 0 before it is in force
    workers: tuple[WorkerView, ...]
    restarts_left: int  # KILL_RESTARTs that budget and cool-down allow now

    @property
    def batch(self) -> int:
        """Return the tasks of the global batch (G)."""
        return sum(self.setting.tasks_per_rank)


class Monitor:
    """Keeps the reports of `world_size` ranks, whose next step is `first_step`."""

    def __init__(self, world_size: int, first_step: int = 0, short_steps: int = 3, long_steps: int = 100) -> None:
        self.first_step = first_step
        self.short_steps = short_steps
        self._steps: list[deque[StepTime]] = [deque(maxlen=long_steps) for _ in range(world_size)]
        self._leader = 0  # the rank that is furthest; it is kept because every report asks for it
        self._last: list[float | None] = [None] * world_size
        self._about: list[dict[str, Any]] = [{} for _ in range(world_size)]

    def introduce(self, rank: int, **about: Any) -> None:
        """Take fixed facts of a rank: role, device, node, max_slots."""
        self._about[rank].update(about)

    def report(self, rank: int, now: float, steps: Sequence[StepTime], facts: Mapping[str, float]) -> None:
        """Take the steps of a rank since its last report, in order; repeated ones are passed over."""
        seen = self._steps[rank]
        seen.extend(s for s in steps if not seen or s.step > seen[-1].step)
        if self._next(rank) > self.furthest:
            self._leader = rank
        self._last[rank] = now
        self._about[rank]["facts"] = dict(facts)

    @property
    def finished(self) -> int:
        """Return the number of steps that every rank has finished, those before `first_step` included."""
        return min(self._next(rank) for rank in range(len(self._steps)))

    @property
    def furthest(self) -> int:
        """Return the number of steps that the foremost rank has finished."""
        return self._next(self._leader)

    def _next(self, rank: int) -> int:
        seen = self._steps[rank]
        return seen[-1].step + 1 if seen else self.first_step

    def step_s(self) -> float | None:
        """Return the median seconds of a step, waits included, of the rank that is furthest; None before the first."""
        recent = list(self._steps[self._leader])[-self.short_steps :]
        return statistics.median(s.compute_s + s.input_s + s.wait_s for s in recent) if recent else None

    def snapshot(self, now: float, setting: Setting, restarts_left: int) -> Snapshot:
        """Return what a policy sees now."""
        workers = tuple(self._view(rank, now) for rank in range(len(self._steps)))
        settled = max(0, self.finished - setting.step)
        return Snapshot(now, self.finished, setting, settled, workers, restarts_left)

    def _view(self, rank: int, now: float) -> WorkerView:
        seen, last = list(self._steps[rank]), self._last[rank]
        short = _stats(seen[-self.short_steps :]) if seen else None
        long = _stats(seen) if len(seen) == self._steps[rank].maxlen else None
        silent = 0.0 if last is None else max(0.0, now - last)
        return WorkerView(rank, silent_s=silent, short=short, long=long, **self._about[rank])


def _stats(steps: Sequence[StepTime]) -> StepStats:
    median = statistics.median
    return StepStats(
        len(steps),
        median(s.compute_s for s in steps),
        median(s.input_s for s in steps),
        median(s.wait_s for s in steps),
        median([s.compute_s / s.work for s in steps if s.work > 0] or [float("nan")]),
    )


def snapshot_to_json(snapshot: Snapshot) -> dict[str, Any]:
    """Return a snapshot for a trace; NaN becomes null."""
    values: dict[str, Any] = _finite({**asdict(snapshot), "setting": to_wire(snapshot.setting)})
    return values


def snapshot_from_json(values: Mapping[str, Any]) -> Snapshot:
    """Return the snapshot that `snapshot_to_json` wrote."""

    def stats(found: Mapping[str, Any] | None) -> StepStats | None:
        if found is None:
            return None
        numbers: dict[str, Any] = {key: float("nan") if value is None else value for key, value in found.items()}
        return StepStats(**numbers)

    workers = tuple(
        WorkerView(**{**worker, "short": stats(worker["short"]), "long": stats(worker["long"])})
        for worker in values["workers"]
    )
    return Snapshot(**{**values, "setting": setting_from_json(values["setting"]), "workers": workers})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value != value else value
