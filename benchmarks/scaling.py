"""What more processes buy: 1, 2 and 4 of them, with fixed work per rank (weak) and fixed work in all (strong).

    python benchmarks/scaling.py [--quick] [--json FILE]

Real training on a synthetic pack runs with gloo over the loopback interface. A process has one thread and is held to
one core; cores are dealt in turn, so that more processes than cores share them, and the table says so. Runs alternate.
Efficiency is the speed over that of one process times the *cores* in use, which are what there is to win; where every
process has a core of its own, that is the usual definition. *Apart* are as many processes as there are cores that train
at once and know nothing of each other: what the cores, their caches and their memory give at most.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import Record, arguments, median, publish, table
from ranks import Ranks, Workload, read_steps, write_pack

PROCESSES = (1, 2, 4)
LOAD = Workload(tasks=4096, features=20, num_ids=5000, dim=16, hidden=(256, 128))
TASKS = {"weak": 32, "strong": 128}
"""Tasks of a step: of each rank (weak), of all ranks (strong)."""
MODES = (*TASKS, "apart")


@dataclass(frozen=True)
class Effort:
    """How much is run. Turns go on while one more fits into `budget_s`."""

    turns: int
    warm_up: int
    steps: int
    budget_s: float


FULL = Effort(turns=6, warm_up=3, steps=15, budget_s=150)
QUICK = Effort(turns=1, warm_up=2, steps=6, budget_s=30)


@dataclass
class Sample:
    """Steps of all runs of one number of processes."""

    samples_per_s: list[float] = field(default_factory=list)
    exchange_share: list[float] = field(default_factory=list)
    input_share: list[float] = field(default_factory=list)


def core_of(rank: int, cores: Sequence[int]) -> int:
    """Return the core of a rank. Cores are dealt in turn."""
    return cores[rank % len(cores)]


def tasks_per_batch(mode: str, processes: int) -> int:
    """Return the tasks of one global batch."""
    return TASKS[mode] * (processes if mode == "weak" else 1)


def environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """Return the environment variables that torchrun would set."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def measure(effort: Effort, cores: Sequence[int], folder: Path) -> dict[tuple[str, int], Sample]:
    """Return the samples by (mode, processes)."""
    samples: dict[tuple[str, int], Sample] = defaultdict(Sample)
    start = time.monotonic()
    with Ranks([["taskset", "-c", str(core_of(rank, cores))] for rank in range(max(PROCESSES))]) as ranks:
        for turn in range(effort.turns):
            if turn and (time.monotonic() - start) * (turn + 1) / turn > effort.budget_s:
                break
            for mode in TASKS:
                for processes in PROCESSES:
                    run_once(ranks, mode, processes, effort, folder, samples[mode, processes])
            run_apart(ranks, min(len(cores), max(PROCESSES)), effort, folder, samples)
    return samples


def options(folder: Path, tasks: int, effort: Effort) -> list[str]:
    """Return the options of `gmeta train`, without the run directory."""
    return [
        *["--pack", str(folder / "pack"), "--timeout_s", "60", *LOAD.options],
        *["--loader.tasks_per_batch", str(tasks), "--schedule.max_steps", str(effort.warm_up + effort.steps)],
    ]


def run_once(ranks: Ranks, mode: str, processes: int, effort: Effort, folder: Path, sample: Sample) -> None:
    """Make one short run, and add it to `sample`. RuntimeError where it fails."""
    run_dir = folder / "run"
    argv = [*options(folder, tasks_per_batch(mode, processes), effort), "--run_dir", str(run_dir)]
    port = free_port()
    failure = ranks.train(argv, [environment(rank, processes, port) for rank in range(processes)])
    if failure:
        raise RuntimeError(f"{mode}, {processes} processes: {failure}")
    for step in read_steps(run_dir, effort.warm_up):
        sample.samples_per_s.append(step["samples_per_s"])
        sample.exchange_share.append(step["exchange_share"])
        sample.input_share.append(step["input_share"])
    shutil.rmtree(run_dir)


def run_apart(
    ranks: Ranks, processes: int, effort: Effort, folder: Path, samples: dict[tuple[str, int], Sample]
) -> None:
    """Make as many runs of one process at the same time, and add their speeds, step by step."""
    run_dirs = [folder / f"run{i}" for i in range(processes)]
    argv = options(folder, TASKS["weak"], effort)
    alone = [environment(0, 1, free_port())] * processes
    failure = ranks.train(argv, alone, [["--run_dir", str(run_dir)] for run_dir in run_dirs])
    if failure:
        raise RuntimeError(f"{processes} runs apart: {failure}")
    sample = samples["apart", processes]
    for steps in zip(*(read_steps(run_dir, effort.warm_up) for run_dir in run_dirs), strict=True):
        sample.samples_per_s.append(sum(step["samples_per_s"] for step in steps))
        sample.exchange_share.append(0.0)
        sample.input_share.append(max(step["input_share"] for step in steps))
    for run_dir in run_dirs:
        shutil.rmtree(run_dir)


def free_port() -> int:
    """Return a port of the loopback interface that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def efficiency(speed: float, speed_of_one: float, processes: int, cores: int) -> float:
    """Return speed over that of one process times the cores that `processes` keep busy."""
    return speed / (speed_of_one * min(processes, cores))


def records_of(samples: Mapping[tuple[str, int], Sample], cores: int) -> list[Record]:
    """Return flat records, one case a mode, one variant a number of processes."""
    found = []
    for (mode, processes), sample in samples.items():
        name, speed = f"{processes} processes", median(sample.samples_per_s)
        one = median(samples["weak" if mode == "apart" else mode, 1].samples_per_s)
        found += [
            Record(mode, name, "cores", min(processes, cores), "1"),
            Record(mode, name, "samples_per_s", speed, "1/s"),
            Record(mode, name, "speed_up", speed / one, "1"),
            Record(mode, name, "efficiency", efficiency(speed, one, processes, cores), "1"),
            Record(mode, name, "exchange_share", median(sample.exchange_share), "1"),
            Record(mode, name, "input_share", median(sample.input_share), "1"),
            Record(mode, name, "steps", len(sample.samples_per_s), "1"),
        ]
    return found


def show(records: Sequence[Record]) -> str:
    """Return a table of both modes."""
    found: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for record in records:
        found[record.case, record.variant][record.metric] = record.value
    work = {"weak": f"{TASKS['weak']} tasks a rank", "strong": f"{TASKS['strong']} tasks in all"}
    rows = []
    for (mode, name), values in sorted(found.items(), key=lambda item: MODES.index(item[0][0])):
        processes, cores = int(name.split()[0]), int(values["cores"])
        rows.append(
            [
                f"{mode}: {work.get(mode, work['weak'])}",
                str(processes),
                f"{cores}" + (f", shared by {processes}" if cores < processes else ""),
                f"{values['samples_per_s']:,.0f}",
                f"{values['speed_up']:.2f} ×",
                f"{values['efficiency']:.0%}",
                f"{values['exchange_share']:.0%}",
                f"{values['input_share']:.0%}",
            ]
        )
    header = ["work", "processes", "cores", "samples/s", "speed-up", "efficiency per core", "exchange", "input wait"]
    return table(header, rows)


def main() -> int:
    args = arguments(__doc__.splitlines()[0])
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if not cores or shutil.which("taskset") is None:
        print("skipped: processes are held to cores with taskset, which is not here")
        return 0
    effort = QUICK if args.quick else FULL
    with tempfile.TemporaryDirectory(prefix="gmeta-scaling-") as name:
        write_pack(Path(name) / "pack", LOAD)
        samples = measure(effort, cores, Path(name))
    records = records_of(samples, len(cores))
    shared = [f"{n} processes share {len(cores)}" for n in PROCESSES if n > len(cores)]
    note = f"{len(cores)} cores, one thread a process, every process held to one core"
    body = f"{show(records)}\n\n{'; '.join([note, *shared])}. Medians of {len(samples['weak', 1].samples_per_s)} steps."
    publish("scaling", body, records, {"workload": str(LOAD), "tasks a step": TASKS, "steps a run": effort.steps}, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
