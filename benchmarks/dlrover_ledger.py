"""gmeta's coordinator and DLRover 0.6.1's local master as services that give out shards of data, side by side.

    python benchmarks/dlrover_ledger.py --dlrover_python PATH [--quick] [--json FILE]

PATH is the interpreter of an environment of DLRover's own; without it DLRover's rows are left out:

    python -m venv DIR && DIR/bin/pip install 'dlrover[k8s]==0.6.1' protobuf

What a worker takes is called a shard here; in gmeta it is a work item. For speed, workers take and finish shards one
after the other and do nothing between. The audits run the same script of events for every system (ledger_audit.py), and
count from what workers finish. DLRover runs at its best: gRPC (its default; 690 shards/s with one worker, 210 over its
HTTP), without a log line for every shard (with it, as by default, 510), and state in memory. Its
`--task_process_timeout` is set to gmeta's lease, though its local master does not use it. gmeta runs on its defaults:
every change is in its journal before the reply.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import Record, add_json, parse, publish, table
from ledger_audit import AUDITS, Effort, Numbers, System, dlrover_system, gmeta_system, running
from puppet import Puppet

DLROVER = "0.6.1"
SHARD_SIZE = 100
FULL = Effort(shards=60, shard_size=SHARD_SIZE, lease_s=3.0, max_failures=4, watch_s=60.0)
QUICK = Effort(shards=30, shard_size=SHARD_SIZE, lease_s=1.0, max_failures=4, watch_s=2.0)
HOW = {
    "gmeta": "two messages",  # as DLRover: one says that a shard is done, one asks for the next
    "gmeta-exchange": "exchange",
    "gmeta-batch": "batch",
    "dlrover": "",
}
UNITS = {"shards/s": "1/s", "wait p50": "ms", "wait p99": "ms", "served again after": "s"}
NOTES = {
    "speed, 1 worker": (
        "gmeta and dlrover: one message says that a shard is done, one asks for the next. gmeta-exchange: one message "
        "does both. gmeta-batch: one message does both for 32 shards; its waits are of a message."
    ),
    "worker killed": (
        "SIGKILL of one of 4 workers amid a shard. On Kubernetes DLRover's master watches the pods and gives back what "
        "a failed one held; its local master, measured here, hears of no death."
    ),
    "server killed": (
        "SIGKILL of the server while 3 of 4 workers are amid a shard; the same command again. DLRover's state is in "
        "memory, so its workers announce the data set anew. `checkpoint restored`: its own checkpoint of the shards, "
        "taken 7 shards before; a model restored from the same moment needs those 7 again."
    ),
    "failing shard": (
        "The first shard fails in every worker's hands. gmeta stops the job after 4 failures, by default at once, and "
        "tells every worker why; with skip_quarantined it goes on, and names the shard in its state. DLRover drops the "
        "shard after 4 failures and says so in its master's log."
    ),
    "late report": (
        "A worker is stopped amid the only shard and taken for dead (a lease that ran out; for DLRover a failure "
        "reported in its name, as its master on Kubernetes does); another has the shard when the first one wakes and "
        "says that it is done; then the other one fails."
    ),
}
SKIPPED = (
    "DLRover's rows are left out: name an interpreter that has it with --dlrover_python PATH "
    f"(python -m venv DIR && DIR/bin/pip install 'dlrover[k8s]=={DLROVER}' protobuf; PATH is DIR/bin/python)"
)


@dataclass
class Speed:
    """What was measured of one way to take shards, over all turns."""

    rates: list[float] = field(default_factory=list)  # shards/s, one a turn
    waits: list[float] = field(default_factory=list)  # seconds from a finished shard (or batch) to the next

    def numbers(self) -> Numbers:
        """Return the numbers of the median turn, with the waits of all turns together."""
        waits = sorted(self.waits)
        return {
            "shards/s": sorted(self.rates)[len(self.rates) // 2],
            "wait p50": 1e3 * waits[len(waits) // 2],
            "wait p99": 1e3 * waits[int(0.99 * len(waits))],
        }


def main() -> int:
    """Measure speed in turns, then run the audits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few shards, under 50 s; writes no result files")
    parser.add_argument("--dlrover_python", type=Path, help=f"interpreter of an environment with DLRover {DLROVER}")
    add_json(parser)
    args = parse(parser)
    python = args.dlrover_python.absolute() if args.dlrover_python else None  # not resolved: a venv's is a link
    if python is not None and (problem := unusable(python)):
        parser.error(f"--dlrover_python {python}: {problem}")
    loads = [os.getloadavg()[0]]
    effort, shards, turns = (QUICK, {1: 100, 8: 400}, 1) if args.quick else (FULL, {1: 1000, 8: 4000}, 5)
    with tempfile.TemporaryDirectory(prefix="gmeta-dlrover-") as name:
        speeds = measure_speed(python, shards, turns, Path(name), loads)
        audits = {
            case: {
                system.variant: run(system, Path(name) / case / system.variant, effort) for system in of(case, python)
            }
            for case, run in AUDITS.items()
        }
    found = {f"speed, {case}": numbers for case, numbers in speeds.items()} | audits
    config = {
        "turns of the speed part": turns,
        "shards a turn, by workers": shards,
        "audits": effort,
        "dlrover": DLROVER if python else "left out",
        "load average before the speed part and after each turn": ", ".join(f"{load:.1f}" for load in loads),
    }
    publish("dlrover_ledger", show(found, effort, python is not None), records_of(found), config, args)
    return 0


def unusable(python: Path) -> str:
    """Return why this interpreter cannot run DLRover; empty where it can."""
    program = (
        "from importlib.metadata import version; import dlrover.python.elastic_agent.master_client; "
        "print(version('dlrover'))"
    )
    try:
        ended = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"cannot be run ({error.strerror})"
    if ended.returncode:
        return f"cannot import DLRover ({ended.stderr.strip().splitlines()[-1]}): {SKIPPED.split(': ', 1)[1]}"
    installed = ended.stdout.strip()
    return "" if installed == DLROVER else f"has DLRover {installed}: this benchmark speaks to {DLROVER}"


def of(case: str, python: Path | None) -> list[System]:
    """Return the systems that an audit is made of."""
    systems = [gmeta_system()]
    if case == "failing shard":
        systems.append(gmeta_system("gmeta, skip_quarantined", skip=True))
    if python is not None:
        systems.append(dlrover_system(python))
        if case == "server killed":
            systems.append(dlrover_system(python, "dlrover, checkpoint restored", checkpoints=True))
    return systems


def measure_speed(
    python: Path | None, shards: Mapping[int, int], turns: int, folder: Path, loads: list[float]
) -> dict[str, dict[str, Numbers]]:
    """Return speed by case and variant. In each turn both systems start anew, and every way is run on each number of
    workers.

    The machine's load average after each turn is added to `loads`: 8 workers and a server alone make about 2 to 3.
    """
    speeds: dict[tuple[int, str], Speed] = defaultdict(Speed)
    for turn in range(turns):
        for system in [gmeta_system(), *([dlrover_system(python)] if python else [])][:: -1 if turn % 2 else 1]:
            ways = [variant for variant in HOW if variant.startswith(system.variant)]
            plan = {"num_samples": 8 * sum(shards.values()) * SHARD_SIZE, "shard_size": SHARD_SIZE}
            with running(
                system,
                folder / f"speed-{turn}-{system.variant}",
                max(shards),
                **plan,
                lease_s=600.0,
                max_failures=4,
                skip=False,
            ) as found:
                pull(found.workers, HOW[ways[0]], 10 * max(shards))
                for number, total in shards.items():
                    for variant in ways:
                        rate, waits = pull(found.workers[:number], HOW[variant], total)
                        speeds[number, variant].rates.append(rate)
                        speeds[number, variant].waits.extend(waits)
        loads.append(os.getloadavg()[0])
    cases: dict[str, dict[str, Numbers]] = defaultdict(dict)
    for number, variant in sorted(speeds, key=lambda key: (key[0], list(HOW).index(key[1]))):
        cases[f"{number} worker{'s' if number > 1 else ''}"][variant] = speeds[number, variant].numbers()
    return cases


def pull(workers: Sequence[Puppet], how: str, shards: int) -> tuple[float, list[float]]:
    """Let all workers together take so many shards; returns shards/s, and each wait in seconds."""
    for worker in workers:
        worker.send("run", how=how, shards=shards // len(workers))
    answers = [worker.receive() for worker in workers]
    seconds = max(answer["ended"] for answer in answers) - min(answer["began"] for answer in answers)
    taken = sum(answer["shards"] for answer in answers)
    return taken / seconds, [wait for answer in answers for wait in answer["waits"]]


def records_of(found: Mapping[str, Mapping[str, Numbers]]) -> list[Record]:
    """Return flat records; a metric without a unit of its own is a count."""
    return [
        Record(case, variant, metric, value, UNITS.get(metric, "1"))
        for case, variants in found.items()
        for variant, numbers in variants.items()
        for metric, value in numbers.items()
    ]


def show(found: Mapping[str, Mapping[str, Numbers]], effort: Effort, with_dlrover: bool) -> str:
    """Print a table for each case."""
    parts = [
        f"An epoch of an audit: {effort.shards} shards of {effort.shard_size} samples. `wait` is what a worker waits "
        "from having finished a shard (gmeta-batch: 32) until it has the next. `missing` and `repeated` are samples; "
        "`told the end` counts workers, while samples were missing. "
        f"gmeta's lease_s is {effort.lease_s:g} in the audits. After a worker was told the end it asked again for "
        f"{effort.watch_s:g} s; what was not served again by then is missing."
    ]
    if not with_dlrover:
        parts.append(SKIPPED)
    for case, variants in found.items():
        metrics = list(dict.fromkeys(metric for numbers in variants.values() for metric in numbers))
        rows = [
            [variant, *(cell(numbers[metric]) if metric in numbers else "never" for metric in metrics)]
            for variant, numbers in variants.items()
        ]
        header = [metric + (f", {UNITS[metric]}" if UNITS.get(metric) in ("ms", "s") else "") for metric in metrics]
        parts += [f"## {case}", *([NOTES[case]] if case in NOTES else []), table([case, *header], rows)]
    return "\n\n".join(parts)


def cell(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
