"""What policies make of slow and dying workers: real training in the laboratory, the same work under each policy.

    python benchmarks/stragglers.py [--quick] [--json FILE] [--out FOLDER]

Four workers on emulated devices (`gmeta lab`) train the same batches in every run. `achieved / ideal` compares with
each step balanced exactly by the true speeds of that very step, when nothing else takes any time. So exchanges, the
trainer's own work on shared cores, the steps before the first decision, and restarts all count against it. Attainable
is the ideal plus, for each step, the run's median time of a step besides its slowest rank's computing: what is missing
from that is the policy's, or a restart's. The simulator runs the same scenarios. It is told what a step takes besides
computing, as measured in the first run, and what a restart takes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import Record, add_json, gmeta, parse, publish, table

from gmeta.elastic.actions import Action
from gmeta.elastic.balance import proportional
from gmeta.elastic.monitor import Snapshot
from gmeta.elastic.policies import load_policy
from gmeta.elastic.scenario import Contention, Deterministic, Devices, Event, Kill, Persistent, Scenario, Transient
from gmeta.elastic.simulate import simulate
from gmeta.lab.folder import LabFolder
from gmeta.lab.measure import executions
from gmeta.lab.run import difference
from gmeta.runs.log import METRICS_FILE, read_metrics

SLOT_S = 0.0125
"""With 16 tasks a rank a step takes 0.2 s. Four real trainers on two cores take 10 to 30 ms a step besides, in which
shorter steps would drown. Where balancing makes a step less than half as long, they would drown as well, so 4x has
longer tasks."""
TARGETS = {"deterministic": 0.90, "persistent": 0.90, "transient, 50": 0.80}
"""The target of a case, by how its name begins."""


@dataclass(frozen=True)
class Case:
    """A scenario, and who is compared in it. Policies may replace no worker, because the machine has none to spare."""

    name: str
    policies: tuple[str, ...]
    steps: int
    events: tuple[Event, ...] = ()
    devices: tuple[Devices, ...] = ()
    quick: tuple[str, ...] = ()
    slot_s: float = SLOT_S

    @property
    def scenario(self) -> Scenario:
        """Return the scenario as it is run."""
        return Scenario(
            workers=4,
            steps=self.steps,
            slot_s=self.slot_s,
            noise=0.02,
            checkpoint_steps=50,
            ahead=2,
            devices=self.devices,
            events=self.events,
        )


def cases(quick: bool) -> list[Case]:
    """Return the cases. There are more steps where the first ones, made before anything can be known, cost most."""
    everyone, devices = (0, 1, 2, 3), (Devices("fast", 2, 1.0, max_slots=32), Devices("slow", 2, 0.5, max_slots=8))
    longest, long, usual, short = (200, 200, 120, 100) if quick else (450, 300, 240, 160)
    found = [
        Case("deterministic 2x", ("static", "nd"), usual, (Deterministic(0, 2.0),), quick=("static", "nd")),
        Case("deterministic 4x", ("static", "nd"), longest, (Deterministic(0, 4.0),), slot_s=0.025),
        Case(
            "two device classes 1:2", ("static", "lb_bsp", "nd", "dd"), short, devices=devices, quick=("static", "dd")
        ),
        Case(
            "transient, 50 steps",
            ("static", "lb_bsp", "backup", "nd"),
            long,
            (Transient(everyone, 3.0, 0.2, mean_steps=50),),
            quick=("static", "nd"),
            slot_s=0.02,
        ),
        Case("transient, 10 steps", ("static", "nd"), usual, (Transient(everyone, 3.0, 0.2, mean_steps=10),)),
        Case(
            "persistent 3x",
            ("static", "lb_bsp", "nd"),
            usual,
            (Persistent(1, 3.0, from_step=usual // 5),),
            quick=("static", "nd"),
        ),
        Case("persistent contention", ("static", "nd"), usual, (Contention(1, from_s=5.0),)),
        Case("kill in the middle", ("nd",), short, (Kill("rank 2", at_step=short // 2 + 15),), quick=("nd",)),
    ]
    return [replace(case, policies=case.quick) for case in found if case.quick] if quick else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer runs and steps; no result files")
    parser.add_argument(
        "--out", type=Path, help="keep the runs, with their timelines, here; those it has are not made again"
    )
    add_json(parser)
    args = parse(parser)
    records: list[Record] = []
    with ExitStack() as stack:
        folder = args.out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gmeta-stragglers-")))
        folder.mkdir(parents=True, exist_ok=True)
        references: dict[int, dict[str, Any]] = {}
        overhead_s: float | None = None
        for case in cases(args.quick):
            if case.steps not in references:
                undisturbed = Case(f"undisturbed {case.steps}", (), case.steps)
                references[case.steps] = run(undisturbed.name, "static", folder, calm(undisturbed.scenario))
            static: dict[str, Any] | None = None
            for policy in case.policies:
                found = run(case.name, policy, folder, case.scenario)
                static = found if policy == "static" else static
                overhead_s = found["overhead_s"] if overhead_s is None else overhead_s
                records += measured(case, policy, found, references[case.steps], static)
                records += predicted(case, policy, found, overhead_s)
                print(progress(case, policy, found), file=sys.stderr, flush=True)
    config = {
        "workers": 4,
        "tasks_per_batch": 64,
        "slot_s": {case.name: case.slot_s for case in cases(args.quick)},
        "loader.prefetch": 1,
        "steps": {case.name: case.steps for case in cases(args.quick)},
        "targets": TARGETS,
    }
    publish("stragglers", body(records), records, config, args)


def calm(scenario: Scenario) -> Scenario:
    """Return the scenario of the same training as fast as it goes."""
    return replace(scenario, slot_s=1e-9, noise=0.0)


def run(name: str, policy: str, folder: Path, scenario: Scenario) -> dict[str, Any]:
    """Make one run, and return its result.json and where it is."""
    out = folder / f"{name} {policy}".replace(" ", "-").replace(",", "").replace(":", "-")
    source = folder / "scenario"
    source.mkdir(exist_ok=True)
    LabFolder(source).write_scenario(scenario)
    if (out / "result.json").exists():
        return {**json.loads((out / "result.json").read_text()), "out": out}
    words = ["--scenario", source / "scenario.yaml", "--policy", policy, "--out", out, "--max_restarts", 0]
    gmeta("lab", *words)
    return {**json.loads((out / "result.json").read_text()), "out": out}


def ideal_gain(scenario: Scenario, place: LabFolder) -> float:
    """Return how much faster than with equal batches the run's computing would have been, had every step been
    balanced.
    """
    last = [{e.step: e for e in executions(place, rank)} for rank in range(scenario.workers)]
    equal = ideal = 0.0
    for record in read_metrics(place.run_dir / METRICS_FILE):
        if record["kind"] != "train" or any(record["step"] - 1 not in steps for steps in last):
            continue
        factors, tasks = [steps[record["step"] - 1].factor for steps in last], sum(record["slots"])
        slots = proportional(tasks, [1.0] * scenario.workers)
        equal += max(f * n * scenario.slot_s for f, n in zip(factors, slots, strict=True))
        ideal += scenario.ideal_step_s(tasks, factors)
    return equal / ideal


def measured(
    case: Case, policy: str, found: dict[str, Any], reference: dict[str, Any], static: dict[str, Any] | None
) -> list[Record]:
    """Return the records of a run; `static` is that of the same work with equal batches."""
    changed = difference(LabFolder(found["out"]), LabFolder(reference["out"]))["weights"]
    loss = found["metrics"]["loss_after"] - reference["metrics"]["loss_after"]
    attainable_s = found["ideal_s"] + found["steps"] * max(0.0, found["overhead_s"])
    gain = ideal_gain(case.scenario, LabFolder(found["out"]))
    rows = (
        *((("achieved_over_ideal", static["jct_s"] / found["jct_s"] / gain, ""),) if static else ()),
        ("ideal_gain", gain, ""),
        ("ideal_over_time", found["achieved"], ""),
        ("achieved_over_attainable", attainable_s / found["jct_s"], ""),
        ("jct_s", found["jct_s"], "s"),
        ("ideal_s", found["ideal_s"], "s"),
        ("utilisation", found["utilisation"], ""),
        ("lost", found["lost"], "tasks"),
        ("repeated", found["repeated"], "tasks"),
        ("contradictions", len(found["problems"]), ""),
        ("tail_tasks", found["tail_tasks"], "tasks"),
        ("steps_done_again", found["repeated_steps"], "steps"),
        ("decisions", found["decisions"], ""),
        ("restart_s", found["restart_s"], "s"),
        ("overhead_s", found["overhead_s"], "s"),
        ("agent_cpu_share", found["agent_cpu_share"], ""),
        ("not_emulated", found["not_emulated"], ""),
        ("loss_minus_undisturbed", loss, ""),
        ("weights_minus_undisturbed", changed, ""),
    )
    return [Record(case.name, policy, metric, float(value), unit) for metric, value, unit in rows]


def predicted(case: Case, policy: str, found: dict[str, Any], overhead_s: float) -> list[Record]:
    """Return the simulator's time for the same scenario and policy over the measured one."""
    if any(isinstance(event, Contention) for event in case.events):
        return []  # no model says what a real burner does
    told = replace(case.scenario, comm_s=max(0.0, overhead_s), restart_s=found["restart_s"])
    simulated = simulate(told, without_restarts(load_policy(policy)), policy)
    return [Record(case.name, policy, "simulated_over_measured", simulated.jct_s / found["jct_s"], "")]


def without_restarts(policy: Callable[[Snapshot], Sequence[Action]]) -> Callable[[Snapshot], Sequence[Action]]:
    """Return the policy where no worker may be replaced."""
    return lambda snapshot: policy(replace(snapshot, restarts_left=0))


def progress(case: Case, policy: str, found: dict[str, Any]) -> str:
    return f"{case.name}, {policy}: {found['jct_s']:.1f} s, {found['achieved']:.2f} of the ideal speed"


def body(records: Sequence[Record]) -> str:
    """Return the table, and how targets were met."""
    values = {(r.case, r.variant, r.metric): r.value for r in records}
    rows = []
    for case, policy in dict.fromkeys((r.case, r.variant) for r in records):

        def number(metric: str, case: str = case, policy: str = policy) -> float:
            return values[case, policy, metric]

        simulated = values.get((case, policy, "simulated_over_measured"))
        rows.append(
            (
                case,
                policy,
                f"{number('jct_s'):.1f}",
                "" if (case, policy, "achieved_over_ideal") not in values else f"{number('achieved_over_ideal'):.2f}",
                f"{number('ideal_over_time'):.2f}",
                f"{number('achieved_over_attainable'):.2f}",
                f"{number('utilisation'):.0%}",
                f"{number('lost'):.0f}, {number('repeated'):.0f}",
                f"{number('weights_minus_undisturbed'):.1g}",
                f"{number('loss_minus_undisturbed'):+.4f}",
                f"{number('agent_cpu_share'):.1%}",
                f"{1e3 * number('overhead_s'):.0f}",
                "" if simulated is None else f"{simulated:.2f}",
            )
        )
    header = (
        "case",
        "policy",
        "seconds",
        "achieved / ideal",
        "ideal / time",
        "attainable / time",
        "computing",
        "lost, repeated",
        "weights differ by",
    )
    header += ("loss, less undisturbed", "agent CPU", "step overhead, ms", "simulated / measured")
    notes = [
        f"- {name}: nd {values[name, 'nd', 'achieved_over_ideal']:.2f}, target {target:.2f}"
        for name in dict.fromkeys(r.case for r in records)
        for start, target in TARGETS.items()
        if name.startswith(start) and (name, "nd", "achieved_over_ideal") in values
    ]
    return "\n".join([table(header, rows), "", "Achieved / ideal against the targets:", "", *notes])


if __name__ == "__main__":
    main()
