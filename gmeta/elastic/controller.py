"""Turns reports into settings. Pure, with the time passed in: the coordinator and the simulator both drive it.

All ranks must change at the same step. So a rank may load the batch of step k only when it was *granted* k, and with a
grant it hears of every setting up to there. A decision takes effect at the first step that nobody was granted yet. So
no rank can have divided a batch the old way that another divides the new way, and no collective is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gmeta.elastic.actions import Action, Setting, apply_actions
from gmeta.elastic.monitor import Monitor, Snapshot, StepTime

Policy = Callable[[Snapshot], Sequence[Action]]
"""Decides: it gets a snapshot and returns actions. An empty list is NONE."""


@dataclass(frozen=True)
class Limits:
    """How often, and how much, a controller may do."""

    max_restarts: int = 2  # KILL_RESTARTs in a run
    cooldown_s: float = 300.0  # between two KILL_RESTARTs
    short_steps: int = 3  # of the short statistics; 5 answer bursts later, for .01 to .02 of the ideal (simulated)
    long_steps: int = 100  # of the long statistics


@dataclass(frozen=True)
class Granted:
    """Ranks may load batches of steps up to and including `until`. A record of the journal."""

    until: int


@dataclass(frozen=True)
class Decided:
    """A policy's actions, and the setting that they lead to. A record of the journal."""

    now: float
    actions: tuple[Action, ...]
    setting: Setting


@dataclass(frozen=True)
class RejectedDecision:
    """A policy raised, or asked for the impossible: nothing was done."""

    now: float
    problem: str


@dataclass
class Controller:
    """One generation of a worker group that trains in step.

    `ahead` is how many batches a rank loads before it needs them, `report_s` how often it reports. `settings` are those
    that some rank may still need, oldest first; `restarts` are the times of the run's KILL_RESTARTs in all generations.
    """

    policy: Policy
    monitor: Monitor
    settings: list[Setting]
    ahead: int
    report_s: float
    limits: Limits = field(default_factory=Limits)
    until: int = -1
    restarts: list[float] = field(default_factory=list)

    @staticmethod
    def begin(
        policy: Policy,
        *,
        world_size: int,
        batch: int,
        first_step: int = 0,
        ahead: int = 3,
        report_s: float = 0.25,
        limits: Limits | None = None,
        restarts: Sequence[float] = (),
    ) -> Controller:
        """Return a new controller: ranks have equally many tasks, and nothing is granted."""
        limits = limits or Limits()
        monitor = Monitor(world_size, first_step, limits.short_steps, limits.long_steps)
        first = Setting.equal(batch, world_size, first_step)
        return Controller(policy, monitor, [first], ahead, report_s, limits, first_step - 1, list(restarts))

    def report(self, rank: int, now: float, steps: Sequence[StepTime], facts: Mapping[str, float]) -> None:
        """Take what a rank measured since its last report."""
        self.monitor.report(rank, now, steps, facts)

    def grant(self) -> Granted | None:
        """Return how far ranks may load now; None where that is as far as before.

        It is two reports' worth of steps beyond what ranks load ahead, so that one report may be late and nobody waits.
        A longer reach would delay every decision by as much. Until a step was reported nobody knows how many steps that
        are, and it counts as one.
        """
        step_s = self.monitor.step_s()
        spare = 1 if step_s is None else min(1000, math.ceil(2 * self.report_s / max(step_s, 1e-6)))
        until = self.monitor.furthest + self.ahead + spare
        return Granted(until) if until > self.until else None

    def decide(self, now: float) -> tuple[Snapshot, Decided | RejectedDecision | None]:
        """Ask the policy. None: it had nothing to do, or what it asked for is in force already."""
        snapshot = self.monitor.snapshot(now, self.settings[-1], self._restarts_left(now))
        if self.settings[-1].restart is not None:  # the generation ends there
            return snapshot, None
        try:
            actions = tuple(self.policy(snapshot))
            setting = apply_actions(self.settings[-1], actions, self.until + 1)
        except (Exception, SystemExit) as error:  # whatever a user's function raises, training goes on
            return snapshot, RejectedDecision(now, f"{type(error).__name__}: {error}")
        if setting.restart is not None and snapshot.restarts_left < 1:
            return snapshot, RejectedDecision(
                now, f"KILL_RESTART of rank {setting.restart}: budget or cool-down forbids it"
            )
        last = self.settings[-1]
        same = replace(setting, number=last.number, step=last.step) == last
        return snapshot, None if same else Decided(now, actions, setting)

    def apply(self, record: Granted | Decided) -> None:
        """Make the change; the journal holds it already."""
        if isinstance(record, Granted):
            self.until = record.until
            return
        self.settings.append(record.setting)
        if record.setting.restart is not None:
            self.restarts.append(record.now)
        finished = self.monitor.finished
        while len(self.settings) > 1 and self.settings[1].step <= finished:  # no rank will ask for it again
            self.settings.pop(0)

    def newer(self, number: int) -> list[Setting]:
        """Return the settings that a rank which knows those up to `number` has not heard of."""
        return [setting for setting in self.settings if setting.number > number]

    def _restarts_left(self, now: float) -> int:
        left = self.limits.max_restarts - len(self.restarts)
        cooling = bool(self.restarts) and now - self.restarts[-1] < self.limits.cooldown_s
        return 0 if cooling else max(0, left)
