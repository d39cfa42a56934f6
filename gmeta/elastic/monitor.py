"""From what ranks report to what a policy sees: medians over a short and a long window of steps, per rank. Pure."""

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
    compute_s: float  # forward, backward, update; without waiting for others, which would hide a straggler
    input_s: float  # waiting for its own loader
    wait_s: float  # in exchanges with others
    work: float  # the slots it computed, weighed by their rows: sums over ranks to the slots of the batch


@dataclass(frozen=True)
class StepStats:
    """A rank's last steps."""

    steps: int
    compute_s: float  # median a step
    input_s: float  # median
    wait_s: float  # median
    slot_s: float  # median over steps of compute seconds a slot; nan where it had no slot to compute


@dataclass(frozen=True)
class WorkerView:
    """What is known of one rank."""

    rank: int
    role: str = "worker"  # peers are ranks of one role
    device: str = ""  # class of device, for policy dd
    node: str = ""
    max_slots: int | None = None  # slots of a micro-batch that fit its memory
    silent_s: float = 0.0  # since its last report
    short: StepStats | None = None  # None: nothing reported yet in this generation
    long: StepStats | None = None  # None: fewer steps than the window has
    facts: Mapping[str, float] = field(default_factory=dict)  # of its node: cpu_steal, load, memory: shares of 1

    def speed(self, long: bool = False) -> float | None:
        """Slots a second of compute, from the short or the long window; None where unknown."""
        window = self.long if long else self.short
        return 1 / window.slot_s if window is not None and window.slot_s > 0 else None


@dataclass(frozen=True)
class Snapshot:
    """All that a policy decides on; a decision is a function of it alone, so a trace of them can be replayed."""

    now: float  # seconds, of the coordinator's clock
    step: int  # that every rank has finished
    setting: Setting  # the last decided; in force if `step` has reached it
    settled_steps: int  # steps that every rank has finished and reported under `setting`; 0 while it is still to come
    workers: tuple[WorkerView, ...]
    restarts_left: int  # KILL_RESTARTs that budget and cool-down allow now

    @property
    def batch(self) -> int:
        """Slots of the global batch (G)."""
        return sum(self.setting.tasks_per_rank)


class Monitor:
    """LeaseBook over the reports of `world_size` ranks, whose next step is `first_step`."""

    def __init__(self, world_size: int, first_step: int = 0, short_steps: int = 3, long_steps: int = 100) -> None:
        self.first_step = first_step
        self.short_steps = short_steps
        self._steps: list[deque[StepTime]] = [deque(maxlen=long_steps) for _ in range(world_size)]
        self._leader = 0  # the rank that is furthest: kept, because every report asks for it
        self._last: list[float | None] = [None] * world_size
        self._about: list[dict[str, Any]] = [{} for _ in range(world_size)]

    def introduce(self, rank: int, **about: Any) -> None:
        """Fixed facts of a rank: role, device, node, max_slots."""
        self._about[rank].update(about)

    def report(self, rank: int, now: float, steps: Sequence[StepTime], facts: Mapping[str, float]) -> None:
        """Steps of a rank since its last report, in order; repeated ones are passed over."""
        seen = self._steps[rank]
        seen.extend(s for s in steps if not seen or s.step > seen[-1].step)
        if self._next(rank) > self.furthest:
            self._leader = rank
        self._last[rank] = now
        self._about[rank]["facts"] = dict(facts)

    @property
    def finished(self) -> int:
        """Steps that every rank has finished, those before `first_step` included."""
        return min(self._next(rank) for rank in range(len(self._steps)))

    @property
    def furthest(self) -> int:
        """Steps that the first rank has finished."""
        return self._next(self._leader)

    def _next(self, rank: int) -> int:
        seen = self._steps[rank]
        return seen[-1].step + 1 if seen else self.first_step

    def step_s(self) -> float | None:
        """Median seconds of a step, waits included, of the rank that is furthest; None before the first."""
        recent = list(self._steps[self._leader])[-self.short_steps :]
        return statistics.median(s.compute_s + s.input_s + s.wait_s for s in recent) if recent else None

    def snapshot(self, now: float, setting: Setting, restarts_left: int) -> Snapshot:
        """What a policy sees."""
        workers = tuple(self._view(rank, now) for rank in range(len(self._steps)))
        settled = max(0, self.finished - setting.step)
        return Snapshot(now, self.finished, setting, settled, workers, restarts_left)

    def _view(self, rank: int, now: float) -> WorkerView:
        seen, last = list(self._steps[rank]), self._last[rank]
        short = _window(seen[-self.short_steps :]) if seen else None
        long = _window(seen) if len(seen) == self._steps[rank].maxlen else None
        silent = 0.0 if last is None else max(0.0, now - last)
        return WorkerView(rank, silent_s=silent, short=short, long=long, **self._about[rank])


def _window(steps: Sequence[StepTime]) -> StepStats:
    median = statistics.median
    return StepStats(
        len(steps),
        median(s.compute_s for s in steps),
        median(s.input_s for s in steps),
        median(s.wait_s for s in steps),
        median([s.compute_s / s.work for s in steps if s.work > 0] or [float("nan")]),
    )


def snapshot_to_json(snapshot: Snapshot) -> dict[str, Any]:
    """For a trace; NaN becomes null."""
    values: dict[str, Any] = _finite({**asdict(snapshot), "setting": to_wire(snapshot.setting)})
    return values


def snapshot_from_json(values: Mapping[str, Any]) -> Snapshot:
    """The inverse of `snapshot_to_json`."""

    def window(found: Mapping[str, Any] | None) -> StepStats | None:
        if found is None:
            return None
        numbers: dict[str, Any] = {key: float("nan") if value is None else value for key, value in found.items()}
        return StepStats(**numbers)

    workers = tuple(
        WorkerView(**{**worker, "short": window(worker["short"]), "long": window(worker["long"])})
        for worker in values["workers"]
    )
    return Snapshot(**{**values, "setting": setting_from_json(values["setting"]), "workers": workers})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value != value else value
