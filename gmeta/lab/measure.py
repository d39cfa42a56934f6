"""What a laboratory run came to: times from the devices' own files, what was done by whom, and how good that was."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gmeta.elastic.scenario import Scenario
from gmeta.lab.folder import LabFolder, read_lines


@dataclass
class Execution:
    """One step of one rank, as its device computed it, in seconds. After a rollback a step is executed again."""

    step: int
    begin: float  # since the start of the run
    end: float
    busy_s: float
    work: float  # tasks, weighed by their rows
    factor: float  # how many times slower than speed 1 the device was
    target_s: float = 0.0
    spent_s: float = 0.0  # in real computing


@dataclass
class LabResult:
    """The numbers of a run. Seconds of busy and waiting are sums over ranks."""

    policy: str
    workers: int
    steps: int
    jct_s: float  # job completion time: from the first step's start to the last one's end
    ideal_s: float  # had each step been balanced exactly, by its true speeds, and cost nothing else
    busy_s: float
    overhead_s: float  # median over steps of what a step took besides its slowest rank's computing
    restarts: int
    restart_s: float  # mean seconds without a step at a restart of the group; 0 without restarts
    repeated_steps: int
    tail_tasks: int  # that were put back and done at an epoch's end
    decisions: int
    actions: dict[str, int] = field(default_factory=dict)
    agent_cpu_share: float = 0.0  # CPU time of rank 0's agent, as a fraction of the time of steps
    not_emulated: float = 0.0  # fraction of micro-batches whose real computing took longer than the emulated
    metrics: dict[str, float] = field(default_factory=dict)  # of the last validation
    expected: int = 0
    lost: int = 0
    repeated: int = 0
    problems: list[str] = field(default_factory=list)
    difference: dict[str, float] | None = None  # from an undisturbed run

    @property
    def achieved(self) -> float:
        """Return the fraction of the ideal speed; 1 is perfect."""
        return self.ideal_s / self.jct_s

    @property
    def utilisation(self) -> float:
        """Return the fraction of all ranks' time in which they compute."""
        return self.busy_s / (self.workers * self.jct_s)


def executions(folder: LabFolder, rank: int) -> list[Execution]:
    """Return every step that the rank's device computed, in order of time."""
    found: list[Execution] = []
    for part in read_lines(folder.worker(rank)):
        if part["kind"] != "part":
            continue
        if part["first"]:
            found.append(Execution(part["step"], part["at"], part["at"], 0.0, 0.0, part["factor"]))
        last = found[-1]
        last.end = part["at"] + part["took_s"]
        last.busy_s += part["took_s"]
        last.work += part["work"]
        last.target_s += part["target_s"]
        last.spent_s += part["spent_s"]
        last.factor = part["factor"]
    return found


def measure(
    folder: LabFolder, scenario: Scenario, policy: str, records: Sequence[Mapping[str, Any]], batches_per_epoch: int
) -> LabResult:
    """Return all numbers but those of the audit and the comparison. `records` are those of metrics.jsonl."""
    by_rank = [executions(folder, rank) for rank in range(scenario.workers)]
    last = [{e.step: e for e in found} for found in by_rank]
    train = [record for record in records if record["kind"] == "train"]
    in_order = [record for record in train if record["index"] < batches_per_epoch]
    ideal = sum(
        scenario.ideal_step_s(sum(r["slots"]), [steps[r["step"] - 1].factor for steps in last]) for r in in_order
    )
    gaps = _gaps(folder)
    everything = [e for found in by_rank for e in found]
    decided = [line for line in read_lines(folder.trace) if line["kind"] == "decide" and line["setting"]]
    names = [action["action"] for line in decided for action in line["actions"]]
    valid = [record for record in records if record["kind"] == "valid"]
    emulated = [e for e in everything if e.work > 0]
    return LabResult(
        policy=policy,
        workers=scenario.workers,
        steps=len(train),
        jct_s=max(e.end for e in everything),
        ideal_s=ideal,
        busy_s=sum(e.busy_s for e in everything),
        overhead_s=_overhead(by_rank),
        restarts=len(gaps),
        restart_s=statistics.mean(gaps) if gaps else 0.0,
        repeated_steps=len(by_rank[0]) - len(last[0]),
        tail_tasks=sum(len(record["put_back"]) for record in train),
        decisions=len(decided),
        actions={name: names.count(name) for name in sorted(set(names))},
        agent_cpu_share=_agent_fraction(train),
        not_emulated=sum(e.spent_s > e.target_s for e in emulated) / len(emulated),
        metrics={k: v for k, v in valid[-1].items() if k.endswith("_after")} if valid else {},
    )


def _gaps(folder: LabFolder) -> list[float]:
    """Return the seconds without a step at each restart of the group."""
    kinds = [(line["kind"], line.get("at", 0.0), line.get("took_s", 0.0)) for line in read_lines(folder.worker(0))]
    gaps: list[float] = []
    for before, start, after in zip(kinds, kinds[1:], kinds[2:], strict=False):
        if (before[0], start[0], after[0]) == ("part", "start", "part"):
            gaps.append(after[1] - before[1] - before[2])
    return gaps


def _overhead(by_rank: Sequence[Sequence[Execution]]) -> float:
    """Return the median over steps of the time from a step's begin to the next one's, less the slowest rank's
    computing.
    """
    busy = [{e.step: e.busy_s for e in found} for found in by_rank]
    pairs = [(a, b) for a, b in itertools.pairwise(by_rank[0]) if b.step == a.step + 1]
    over = [b.begin - a.begin - max(steps.get(a.step, 0.0) for steps in busy) for a, b in pairs]
    return statistics.median(over) if over else 0.0


def _agent_fraction(train: Sequence[Mapping[str, Any]]) -> float:
    """Return the CPU seconds of rank 0's agent, in all generations, per second of its steps."""
    cpu: dict[int, float] = {}
    for record in train:
        cpu[record["generation"]] = max(cpu.get(record["generation"], 0.0), record["agent_cpu_s"])
    return sum(cpu.values()) / float(train[-1]["time_s"])
