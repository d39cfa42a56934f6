"""Straggler mitigation on a virtual clock: the coordinator's own Controller, Monitor and policies, with simulated
workers.

What is modelled of a worker: its compute seconds s_i(t) * sum over micro-batches of (fixed_s + tasks * slot_s), the
wait for the slowest, the exchanges of a step, its reports (when, how late, what they carry), and the grant without
which it may not load a batch. What decides is the code that decides in a real run.

    gmeta simulate --scenario examples/scenarios/transient-50.yaml --policies '[nd, static]'
"""

from __future__ import annotations

import bisect
import heapq
import json
import random
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from gmeta.elastic.actions import Setting, to_json
from gmeta.elastic.balance import proportional
from gmeta.elastic.controller import Controller, Decided, Policy, RejectedDecision
from gmeta.elastic.monitor import Monitor, StepTime, snapshot_to_json
from gmeta.elastic.policies import load_policy
from gmeta.elastic.scenario import Contention, Cut, Kill, Pause, Scenario, parse_scenario
from gmeta.elastic.wire import to_wire

TICK_S = 0.05
"""Seconds between two questions to the policy while there is news."""
DECIDE_S = 1e-3
"""Seconds by which each rank delays the next decision: a coordinator gives policies a tenth of its time, and a snapshot
of 1,024 ranks takes it 0.1 s (measured)."""
IDLE_S = 1.0
"""Seconds between two questions to the policy while there is no news."""
DELAY_S = 0.005
"""Seconds that a message takes one way, over HTTP and into the journal."""
REPORTS_PER_S = 1000
"""Reports that one coordinator takes a second, about (benchmarks/coordinator.py); more ranks report less often."""
COHORTS = 8
"""Ranks report in so many groups, since 1,024 conversations one by one would take most of the simulator's time."""


class Slowness(Protocol):
    """`Scenario.slowdown`, or what a recorded trace shows."""

    def __call__(self, rank: int, *, step: int, time_s: float, incarnation: int = 0) -> float:
        """Return how many times longer than a scenario's `slot_s` a task takes."""
        ...


@dataclass
class SimulationResult:
    """What a run came to. Seconds are of the virtual clock; busy, waiting and input are sums over ranks."""

    policy: str
    workers: int
    steps: int
    jct_s: float = 0.0  # job completion time
    ideal_s: float = 0.0  # had each step been balanced exactly, by its true speeds, and nothing been lost
    busy_s: float = 0.0
    waiting_s: float = 0.0
    input_s: float = 0.0  # the part of waiting without leave to load the batch
    decisions: int = 0
    problems: int = 0
    problem: str = ""  # the first of them
    restarts: int = 0
    repeated_steps: int = 0
    tail_tasks: int = 0  # that were done at an epoch's end
    seconds: list[float] = field(default_factory=list)  # of each step that took effect

    @property
    def achieved(self) -> float:
        """Return the fraction of the ideal speed; 1 is perfect."""
        return self.ideal_s / self.jct_s

    @property
    def utilisation(self) -> float:
        """Return the fraction of all ranks' time in which they compute."""
        return self.busy_s / (self.workers * self.jct_s)

    @property
    def waiting(self) -> float:
        """Return the fraction of all ranks' time in which they wait for each other."""
        return self.waiting_s / (self.workers * self.jct_s)


def simulate(
    scenario: Scenario,
    policy: Policy,
    name: str = "",
    *,
    slowness: Slowness | None = None,
    trace: Callable[[dict[str, Any]], None] | None = None,
) -> SimulationResult:
    """Run a whole job. `trace` gets what a coordinator's trace file would hold, less the decisions that changed
    nothing.

    ValueError where the scenario has events that only the laboratory can make.
    """
    for event in scenario.events:
        if isinstance(event, Contention):
            raise ValueError("contention needs a real core: run this scenario in the laboratory, or use persistent")
    return _Run(scenario, policy, name, slowness or scenario.slowdown, trace).run()


class _Run:
    """A job's state: the clock, the coordinator, and what each cohort of ranks knows and has not told yet."""

    def __init__(
        self,
        scenario: Scenario,
        policy: Policy,
        name: str,
        slowness: Slowness,
        trace: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.scenario, self.policy, self.slowness, self.trace = scenario, policy, slowness, trace
        self.result = SimulationResult(name, scenario.workers, scenario.steps)
        n = scenario.workers
        self.cohorts = [range(c, n, COHORTS) for c in range(min(COHORTS, n))]
        self.report_s = max(scenario.report_s, n / REPORTS_PER_S)
        self.pause_s = max(TICK_S, n * DECIDE_S)
        self.outages = [[e.at_s, e.at_s + e.for_s] for e in scenario.events if isinstance(e, Cut)]
        self.pauses = sorted((e for e in scenario.events if isinstance(e, Pause)), key=lambda e: e.at_s)
        self.kills = [e for e in scenario.events if isinstance(e, Kill)]
        self.noise = random.Random(scenario.seed)
        self.now, self.generation = 0.0, 0
        self.incarnation = [0] * n
        self.tail = 0  # tasks put back in this epoch
        self.best: dict[frozenset[tuple[float, int]], float] = {}  # {(slowness, number of ranks)} -> ideal seconds
        self.events: list[tuple[float, int, Callable[[float], None]]] = []
        self.count = 0
        self.restarts: list[float] = []
        self.begin(0)

    # The coordinator

    def begin(self, first_step: int) -> None:
        """Start all workers, at first or again."""
        s = self.scenario
        self.generation += 1
        self.controller = Controller.begin(
            self.policy,
            world_size=s.workers,
            batch=s.tasks_per_batch,
            first_step=first_step,
            ahead=s.ahead,
            report_s=self.report_s,
            restarts=self.restarts,
        )
        self.introduce()
        self.events.clear()
        self.until = [first_step - 1] * len(self.cohorts)
        self.untold: list[list[StepTime]] = [[] for _ in range(s.workers)]
        self.talking = [False] * len(self.cohorts)
        self.news, self.decided = False, self.now
        values = {"world_size": s.workers, "batch": s.tasks_per_batch, "first_step": first_step}
        self.tell("begin", self.now, **values)
        for cohort in range(len(self.cohorts)):
            self.at(self.now, self.report, cohort)
        self.at(self.now + self.pause_s, self.decide)

    def introduce(self) -> None:
        for rank in range(self.scenario.workers):
            device = self.scenario.device(rank)
            about = {"device": device.name, "max_slots": device.max_slots} if device else {}
            self.controller.monitor.introduce(rank, **about)

    def tell(self, kind: str, now: float, **values: Any) -> None:
        if self.trace is not None:
            self.trace({"kind": kind, "now": now, "generation": self.generation, **values})

    def at(self, time: float, do: Callable[..., None], *args: Any) -> None:
        self.count += 1
        heapq.heappush(self.events, (time, self.count, lambda now: do(now, *args)))

    def reachable(self, now: float) -> float:
        """Return when a message sent at `now` reaches the coordinator, retries included."""
        for start, stop in self.outages:
            if start <= now < stop:
                now = stop
        return now

    def report(self, now: float, cohort: int) -> None:
        """Send what the ranks of a cohort have measured."""
        if self.talking[cohort]:
            return
        self.talking[cohort] = True
        steps = [self.untold[rank] for rank in self.cohorts[cohort]]
        for rank in self.cohorts[cohort]:
            self.untold[rank] = []
        self.at(self.reachable(now) + DELAY_S, self.receive, cohort, steps)

    def receive(self, now: float, cohort: int, reports: Sequence[list[StepTime]]) -> None:
        """Let the coordinator take a report and answer it."""
        for rank, steps in zip(self.cohorts[cohort], reports, strict=True):
            self.controller.report(rank, now, steps, {})
            self.news = self.news or bool(steps)
            if self.trace is not None and steps:
                rows = [[s.step, s.compute_s, s.input_s, s.wait_s, s.work] for s in steps]
                self.tell("report", now, rank=rank, steps=rows, facts={})
        granted = self.controller.grant()
        if granted is not None:
            self.controller.apply(granted)
        self.at(self.reachable(now) + DELAY_S, self.answer, cohort, self.controller.until)

    def answer(self, now: float, cohort: int, until: int) -> None:
        self.until[cohort], self.talking[cohort] = until, False
        self.at(now + self.report_s, self.report, cohort)

    def decide(self, now: float) -> None:
        self.at(now + self.pause_s, self.decide)
        if not self.news and now - self.decided < IDLE_S:
            return
        self.news, self.decided = False, now
        snapshot, made = self.controller.decide(now)
        if made is None:
            return
        decided = made if isinstance(made, Decided) else None
        if isinstance(made, Decided):
            self.controller.apply(made)
            self.result.decisions += 1
        else:
            self.result.problems += 1
            self.result.problem = self.result.problem or made.problem
        if self.trace is not None:
            self.tell(
                "decide",
                now,
                snapshot=snapshot_to_json(snapshot),
                actions=[to_json(action) for action in decided.actions] if decided else [],
                setting=to_wire(decided.setting) if decided else None,
                problem=made.problem if isinstance(made, RejectedDecision) else None,
            )

    def lose_coordinator(self, away_s: float) -> None:
        """Let the coordinator die. Its journal brings back settings and grants, and what was reported is lost."""
        self.outages.append([self.now, self.now + away_s])
        s, old = self.scenario, self.controller.monitor
        self.controller.monitor = Monitor(s.workers, old.first_step, old.short_steps)
        self.introduce()
        self.decided, self.news = self.now + away_s, False

    # The workers

    def run(self) -> SimulationResult:
        s, step, extra = self.scenario, 0, 0
        while step < s.steps or self.tail:
            killed = self.killed(step)
            if killed is not None:
                step = killed
                continue
            self.load(step + extra)
            setting = self.setting(step + extra)
            if setting.restart is not None:
                self.replace_worker(setting.restart, step + extra)
                continue
            if step < s.steps:
                self.compute(step + extra, setting, s.tasks_per_batch)
                step += 1
            else:
                self.compute(step + extra, setting, min(self.tail, s.tasks_per_batch), late=False)
                extra += 1
        self.result.jct_s = self.now
        for cohort in range(len(self.cohorts)):  # a rank that ends reports the rest
            self.report(self.now, cohort)
        self.advance(self.now + 2 * DELAY_S)
        return self.result

    def setting(self, step: int) -> Setting:
        return next(x for x in reversed(self.controller.settings) if x.step <= step)

    def advance(self, time: float) -> None:
        """Let everything happen that happens until `time`."""
        while self.events and self.events[0][0] <= time:
            now, _, do = heapq.heappop(self.events)
            do(now)
        self.now = time

    def load(self, step: int) -> None:
        """Wait until every rank may load the batch. A loader without leave has its rank report at once."""
        for cohort, until in enumerate(self.until):
            if until < step + self.scenario.ahead:
                self.report(self.now, cohort)
        start = self.now
        while min(self.until) < step:
            self.advance(self.events[0][0])
        self.result.input_s += (self.now - start) * self.scenario.workers
        self.waited = self.now - start

    def compute(self, step: int, setting: Setting, tasks: int, late: bool = True) -> None:
        """Make one step of `tasks`. What is not begun in time goes to the tail, in which nothing is late."""
        s, start = self.scenario, self.now
        tasks_per_rank = (
            setting.tasks_per_rank
            if tasks == s.tasks_per_batch
            else proportional(tasks, [n + 1e-9 for n in setting.tasks_per_rank])
        )
        after = setting.drop_after_s if late else None
        factors = [
            self.slowness(rank, step=step, time_s=start, incarnation=self.incarnation[rank])
            for rank in range(s.workers)
        ]
        took, done = [], []
        for rank, (n, parts) in enumerate(zip(tasks_per_rank, setting.micro_batches, strict=True)):
            factor = factors[rank] * (1 + max(-0.5, self.noise.gauss(0, s.noise)) if s.noise else 1.0)
            seconds, finished = _micro_batches(n, parts, factor * s.fixed_s, factor * s.slot_s, after)
            took.append(self.stopped(rank, start, seconds))
            done.append(finished)
        longest = max(took)
        self.advance(start + longest + s.comm_s)
        for rank, seconds in enumerate(took):
            wait = longest - seconds + s.comm_s
            self.untold[rank].append(StepTime(step, seconds, self.waited, wait, done[rank]))
        result = self.result
        result.busy_s += sum(took)
        result.waiting_s += longest * s.workers - sum(took)
        dropped = tasks - sum(done)
        self.tail += dropped if late else -sum(done)
        result.tail_tasks += dropped
        result.seconds.append(self.now - start)
        if late:
            result.ideal_s += self.ideal(factors) + s.comm_s

    def ideal(self, factors: list[float]) -> float:
        """Return the seconds of a step with the best possible division for these very speeds."""
        s, key = self.scenario, frozenset(Counter(factors).items())
        if key not in self.best:
            self.best[key] = s.ideal_step_s(s.tasks_per_batch, factors)
        return self.best[key]

    def stopped(self, rank: int, start: float, seconds: float) -> float:
        """Return the seconds that work of `seconds` takes from `start`, with what SIGSTOP adds."""
        end = start + seconds
        for pause in self.pauses:
            if pause.rank == rank and pause.at_s < end and start < pause.at_s + pause.for_s:
                end += pause.at_s + pause.for_s - max(start, pause.at_s)
        return end - start

    def killed(self, step: int) -> int | None:
        """Make the kills that are due; returns the step to go on from, if a worker was killed."""
        for kill in [kill for kill in self.kills if kill.due(step, self.now)]:
            self.kills.remove(kill)
            if kill.coordinator:
                self.lose_coordinator(kill.away_s)
            if kill.rank is not None:
                first = step - step % self.scenario.checkpoint_steps
                self.result.repeated_steps += step - first
                lost = self.result.seconds[first:]
                self.result.seconds = self.result.seconds[:first]
                self.result.ideal_s -= self.result.ideal_s * len(lost) / max(1, step)
                self.restart(first)
                return first
        return None

    def replace_worker(self, rank: int, step: int) -> None:
        """Carry out KILL_RESTART: everything was saved, and the rank gets another machine."""
        self.restarts = list(self.controller.restarts)
        self.incarnation[rank] += 1
        self.restart(step)

    def restart(self, step: int) -> None:
        self.result.restarts += 1
        self.now += self.scenario.restart_s
        self.begin(step)


def _micro_batches(tasks: int, parts: int, fixed_s: float, slot_s: float, after: float | None) -> tuple[float, int]:
    """Return (seconds, tasks that were computed). None is begun `after` seconds into the step, but the first always
    is.
    """
    if after is None and parts <= tasks:
        return (parts * fixed_s if tasks else 0.0) + tasks * slot_s, tasks
    seconds, done = 0.0, 0
    for n in proportional(tasks, [1.0] * parts):
        if n and (not done or after is None or seconds < after):
            seconds, done = seconds + fixed_s + n * slot_s, done + n
    return seconds, done


# Recorded traces


class Recorded:
    """Seconds a task of each rank, step by step, from a trace's reports; it begins anew after the last step.

    It goes by steps and not by time, so that every policy meets the same slowness. A step without a task takes the
    speed of the one before. More ranks than were recorded repeat them.
    """

    def __init__(self, reports: Sequence[Mapping[str, Any]]) -> None:
        points: dict[int, dict[int, float]] = {}
        for report in reports:
            for step, compute_s, _, _, work in report["steps"]:
                if work > 0 and compute_s > 0:
                    points.setdefault(report["rank"], {})[step] = compute_s / work
        self._points = [sorted(points[rank].items()) for rank in sorted(points)]
        self.first = min(found[0][0] for found in self._points)
        self._steps = max(found[-1][0] for found in self._points) + 1 - self.first

    def __call__(self, rank: int, *, step: int, time_s: float, incarnation: int = 0) -> float:
        """Return the seconds a task."""
        found = self._points[rank % len(self._points)]
        at = bisect.bisect_right(found, (self.first + step % self._steps, float("inf")))
        return found[max(0, at - 1)][1]


def read_trace(path: Path) -> tuple[Scenario, Recorded]:
    """Return the job that a trace shows, with as many steps, equal batches and nobody's decisions.

    ValueError where the file is no trace.
    """
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        begin = next(record for record in records if record["kind"] == "begin")
        reports = [record for record in records if record["kind"] == "report" and record["steps"]]
        recorded = Recorded(reports)
        steps = sorted((row[0], row[3]) for record in reports for row in record["steps"])
        # The rank that comes last waits for the exchange alone.
        comm = [min(wait for _, wait in rows) for _, rows in groupby(steps, key=lambda row: row[0])]
        scenario = Scenario(
            workers=begin["world_size"],
            steps=len(comm),
            tasks_per_batch=begin["batch"],
            slot_s=1.0,
            comm_s=max(0.0, statistics.median(comm)),
        )
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): name a trace, JSON lines") from None
    except (KeyError, TypeError, IndexError, StopIteration, ValueError) as error:
        raise ValueError(
            f"{path} is no trace of a training job ({type(error).__name__}: {error}): see coordinate --trace"
        ) from None
    return scenario, recorded


def run_simulations(
    scenario: str | None, trace_in: str | None, workers: int | None, policies: Sequence[str], out: str | None
) -> list[SimulationResult]:
    """Run one job for each policy, from a scenario file or a trace, and write a trace each if `out` is given.

    With several policies their names come before the suffix of `out`. ValueError says what cannot be read or written.
    """
    slowness: Slowness | None = None
    if scenario is not None:
        try:
            job = parse_scenario(Path(scenario).read_text(encoding="utf-8"), scenario)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"scenario {scenario} cannot be read ({error}): name a YAML file") from None
    else:
        job, slowness = read_trace(Path(trace_in or ""))
    if workers is not None:
        job = job.scaled(workers)
    results = []
    for name, policy in [(name, load_policy(name)) for name in policies]:
        with ExitStack() as files:
            write = None
            if out is not None:
                path = Path(out)
                path = path if len(policies) == 1 else path.with_suffix(f".{name.replace(':', '-')}{path.suffix}")
                write = _to_file(path, files)
            results.append(simulate(job, policy, name, slowness=slowness, trace=write))
    return results


def _to_file(path: Path, files: ExitStack) -> Callable[[dict[str, Any]], None]:
    try:
        file = files.enter_context(path.open("w", encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): name another place") from None
    return lambda record: print(json.dumps(record), file=file)


def print_results(results: Sequence[SimulationResult]) -> None:
    """Print a table with one line a policy."""
    from rich.console import Console
    from rich.table import Table

    for r in (r for r in results if r.problems):
        text = f"{r.policy}: the policy raised or asked for the impossible {r.problems} times, first: {r.problem}"
        Console(stderr=True).print(text, markup=False, highlight=False)
    table = Table(title=f"{results[0].workers} workers, {results[0].steps} steps")
    table.add_column("policy")
    for header in ("job s", "of ideal", "busy", "waiting", "decisions", "restarts", "put back"):
        table.add_column(header, justify="right")
    for r in results:
        fractions = [f"{r.achieved:.2f}", f"{r.utilisation:.0%}", f"{r.waiting:.0%}"]
        table.add_row(r.policy, f"{r.jct_s:.1f}", *fractions, str(r.decisions), str(r.restarts), str(r.tail_tasks))
    Console().print(table)
