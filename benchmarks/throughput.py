"""Throughput of gmeta and of our PS-style baseline: by workers, data, model size, and optimisations switched on.

    python benchmarks/throughput.py [--quick] [--json FILE]

Whole training steps, input included, of the same tasks in batches of the same size; processes of one thread each.

    ps-baseline      ps_baseline/README.md: one task at a time, separate pulls, per-task files
    gmeta-off        gmeta's engine, its input and network optimisations off (`study.variants`)
    gmeta-input      input on: prefetch, sequential reads, size buckets, index work ahead
    gmeta-network    network on: one fused, deduplicated fetch, AllReduce, overlap
    gmeta            both on, the default

Public data is read from GMETA_DATA (default ../shared/data); a data set that is not there is left out, and says so.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# One thread a process, before torch is imported: workers share the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from common import DATA, ROOT, Record, arguments, gmeta, hardware, median, publish, table
from ps_baseline.session import open_session
from ps_baseline.taskfiles import TaskFiles, open_task_files
from ps_baseline.train import CONTEXT, parse
from ps_baseline.wire import Place, meet
from ps_baseline.worker import Client, work
from study.variants import parts
from synthetic import write_tasks
from torch.distributed import TCPStore

from gmeta.config.train import TrainConfig
from gmeta.parallel.launch import worker_environment
from gmeta.parallel.mesh import open_mesh
from gmeta.training.build import build_run
from gmeta.training.statistics import Stopwatch
from gmeta.training.step import finish_step, train_step

WAIT_S = 120.0

INPUT = ("random_reads", "no_size_buckets", "nothing_ahead")
NETWORK = ("separate", "copies", "central", "no_overlap")
"""What is off, as switches of the study (`study.variants`)."""
BASELINE = "ps-baseline"
VARIANTS: dict[str, tuple[str, ...]] = {
    "gmeta-off": (*INPUT, *NETWORK),
    "gmeta-input": NETWORK,
    "gmeta-network": INPUT,
    "gmeta": (),
}
"""Variant of gmeta -> the switches of what is off in it."""


@dataclass(frozen=True)
class Case:
    """Data and model: where the pack comes from, and gmeta's settings."""

    name: str
    settings: tuple[str, ...]
    folder: str | None = None  # of public data, in DATA; None: synthetic
    prepare: str = ""  # in examples/

    @property
    def pack(self) -> str:
        """Name of its pack; the synthetic cases share one."""
        return self.folder or "synthetic"


def synthetic(name: str, features: int, dim: int, hidden: str) -> Case:
    """Return the settings: everything adapts, second order, 64 tasks of 10 + 10 examples."""
    names = ",".join(f"f{i}" for i in range(features))
    size = ("--model.features", f"[{names}]", "--model.embedding_dim", str(dim), "--model.args.hidden", f"[{hidden}]")
    return Case(
        f"synthetic {name}: {features}x{dim} {hidden.replace(',', '-')}", (*size, "--loader.tasks_per_batch", "64")
    )


CASES = (
    Case("ml-100k", ("--config", "examples/ml-100k.yaml"), "ml-100k", "ml-100k-prepare.yaml"),
    Case(
        "ml-1m-melu", ("--config", "examples/ml-1m-melu-own-features.yaml"), "ml-1m-subset", "ml-1m-melu-prepare.yaml"
    ),
    synthetic("small", 8, 16, "64,64"),
    synthetic("medium", 20, 16, "256,128"),
    synthetic("large", 26, 32, "512,256"),
)
QUICK = ("ml-100k", "synthetic small")


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    cases: tuple[Case, ...]
    workers: tuple[int, ...]
    rounds: int
    steps: dict[str, int]  # by kind, warm-up included
    warm_up: int


@dataclass(frozen=True)
class Measured:
    """One run."""

    samples_per_s: list[float]  # of each step after warm-up
    cpu_s_per_sample: float  # of all processes, servers too


def servers_for(workers: int) -> int:
    """Return the number of servers beside `workers` workers."""
    return max(1, workers // 2)


def configure(case: Case, pack: Path, words: list[str]) -> TrainConfig:
    """Return the case's settings with `words` on top; the data's own run directory is not used."""
    config = case.settings
    if config[0] == "--config":
        config = (config[0], str(ROOT / config[1]), *config[2:])
    return parse([*config, "--pack", str(pack), "--run_dir", "unused", "--device", "cpu", *words])[1]


# what each process does


def ps_rank(config: TrainConfig, files: TaskFiles, place: Place, port: int, steps: int, results: Connection) -> None:
    """Run a worker or server of the baseline. It sends (samples, seconds) of each step, and its CPU seconds."""
    from ps_baseline.server import serve

    torch.set_num_threads(1)
    session = open_session(config, files.schema, files.num_tasks, place)
    links = meet(place, TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False))
    trace: list[tuple[float, float]] = []
    cpu = time.process_time()
    if place.server >= 0:
        serve(session, links)
    else:
        client = Client(session, links)
        trace = [(r.samples, sum(r.seconds.values())) for r in work(session, files, client, say=lambda text: None)]
        client.end()
    assert place.server >= 0 or len(trace) == steps
    results.send((trace, time.process_time() - cpu))
    results.recv()


def gmeta_rank(
    config: TrainConfig, switches: tuple[str, ...], rank: int, nproc: int, port: int, steps: int, results: Connection
) -> None:
    """Run a rank of gmeta. It sends the same."""
    os.environ.update(worker_environment(rank, nproc, port))
    torch.set_num_threads(1)
    run = build_run(config, open_mesh("cpu", int(WAIT_S)), threading.Event(), parts=parts(*switches))
    run.state.system.tables.state_dict()  # allocated here, not in the first step
    trace = []
    cpu = time.process_time()
    with run.loader:
        for _ in range(steps):
            start = time.perf_counter()
            stats = finish_step(run.state, train_step(run.state, next(run.loader), Stopwatch(run.state.mesh.device)))
            trace.append((stats["samples"], time.perf_counter() - start))
    results.send((trace, time.process_time() - cpu))
    results.recv()  # together: a rank that leaves takes its connections with it


def run_processes(target: Callable[..., None], places: list[tuple[Any, ...]], steps: int, warm_up: int) -> Measured:
    """Start one process for each of `places`, wait for all; RuntimeError when one dies or takes too long."""
    pipes, processes = [], []
    try:
        for args in places:
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=target, args=(*args, steps, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        results = []
        for pipe in pipes:
            if not pipe.poll(WAIT_S):
                raise RuntimeError(f"a process of {target.__name__} did not answer in {WAIT_S:g} s")
            results.append(pipe.recv())
        for pipe in pipes:
            pipe.send("done")
    except EOFError:
        raise RuntimeError(f"a process of {target.__name__} died; its error is above") from None
    finally:
        for process in processes:
            process.join(5)
            process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()
    trace = results[0][0]
    samples = sum(count for count, _ in trace)
    return Measured([count / seconds for count, seconds in trace[warm_up:]], sum(cpu for _, cpu in results) / samples)


def measure(case: Case, variant: str, pack: Path, workers: int, plan: Plan) -> Measured:
    """Make one run of one variant."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    steps = plan.steps["ps" if variant == BASELINE else "gmeta"]
    end = ["--schedule.max_steps", str(steps), "--schedule.epochs", "1000"]
    if variant != BASELINE:
        config = configure(case, pack, end)
        ranks = [(config, VARIANTS[variant], rank, workers, store.port) for rank in range(workers)]
        return run_processes(gmeta_rank, ranks, steps, plan.warm_up)
    config, servers = configure(case, pack, end), servers_for(workers)
    files = open_task_files(pack, pack.with_name(f"{pack.name}-task-files"))
    places = [Place(rank, workers, servers, WAIT_S) for rank in range(workers + servers)]
    return run_processes(ps_rank, [(config, files, place, store.port) for place in places], steps, plan.warm_up)


# data


def make_pack(case: Case, folder: Path) -> Path | None:
    """Return the case's pack, made once. Where its data is absent, say so and return None."""
    pack = folder / case.pack
    if pack.exists():
        return pack
    if case.folder is None:
        return synthetic_pack(pack)
    if not (DATA / case.folder).is_dir():
        print(f"{case.name}: left out, no data at {DATA / case.folder} (set GMETA_DATA)", file=sys.stderr)
        return None
    gmeta("prepare", "--config", f"examples/{case.prepare}", "--root", DATA / case.folder, "--out", pack)
    return pack


def synthetic_pack(path: Path, tasks: int = 2048, rows: int = 20, features: int = 26, vocabulary: int = 10_000) -> Path:
    """Return tasks of 10 + 10 rows, with ids drawn by a power law, every other feature constant in a task."""
    rng = np.random.default_rng(0)
    ids = (vocabulary * rng.random((tasks, rows, features)) ** 3).astype(np.int32)
    fixed = np.arange(features) % 2 == 0
    ids[:, :, fixed] = ids[:, :1, fixed]
    write_tasks(path, ids, rng.random(tasks * rows) < 0.5, vocabulary, rows // 2)
    return path


# results


def run_case(case: Case, pack: Path, variants: list[str], plan: Plan) -> list[Record]:
    """Run all variants of a case in turn, `rounds` times, for each number of workers."""
    records = []
    for workers in plan.workers:
        runs: dict[str, list[Measured]] = {variant: [] for variant in variants}
        for _ in range(plan.rounds):
            for variant in variants:
                runs[variant].append(measure(case, variant, pack, workers, plan))
        speed = {name: median([v for run in found for v in run.samples_per_s]) for name, found in runs.items()}
        for name, found in runs.items():
            title = f"{case.name}, {workers} worker{'s' if workers > 1 else ''}"
            cpu = median([run.cpu_s_per_sample for run in found])
            records += [
                Record(title, name, "samples_per_s", speed[name], "1/s"),
                Record(title, name, "ratio_to_baseline", speed[name] / speed[BASELINE], "x"),
                Record(title, name, "cpu_us_per_sample", cpu * 1e6, "us"),
            ]
    return records


def render(records: list[Record]) -> str:
    """Return the table, with a row for each case, number of workers and variant."""
    values = {(r.case, r.variant, r.metric): r.value for r in records}
    rows = []
    for case, variant in dict.fromkeys((r.case, r.variant) for r in records):
        speed, ratio, cpu = (
            values[case, variant, m] for m in ("samples_per_s", "ratio_to_baseline", "cpu_us_per_sample")
        )
        rows.append([case, variant, f"{speed:,.0f}", f"{ratio:.2f} x", f"{cpu:,.1f}"])
    cores = len(os.sched_getaffinity(0))
    note = (
        f"All processes share {cores} core{'s' if cores > 1 else ''} ({hardware()}), the baseline's servers too: "
        "1, 1 and 2 servers beside 1, 2 and 4 workers. More workers than cores take turns, so that these rows say what "
        "a step costs, not how it scales. CPU time is that of all processes, servers and warm-up included."
    )
    header = ["case", "variant", "samples/s", "to baseline", "CPU us/sample"]
    return f"{table(header, rows)}\n\n{note}"


def main() -> None:
    args = arguments("gmeta against our PS-style baseline: samples per second by workers, data and model size.")
    if args.quick:
        cases = tuple(case for case in CASES if case.name.startswith(QUICK))
        plan = Plan(cases, (1, 2), 1, {"ps": 4, "gmeta": 8}, 2)
    else:
        plan = Plan(CASES, (1, 2, 4), 2, {"ps": 6, "gmeta": 12}, 2)
    variants = [BASELINE, *VARIANTS]
    records = []
    with tempfile.TemporaryDirectory(prefix="gmeta-throughput-") as folder:
        for case in plan.cases:
            pack = make_pack(case, Path(folder))
            records += run_case(case, pack, variants, plan) if pack is not None else []
    facts = {
        "steps": f"{plan.steps} (warm-up {plan.warm_up}), {plan.rounds} run(s) of each variant, in turn",
        "threads": "1 a process",
        "synthetic": "64 tasks x (10 + 10) a batch; embeddings and all dense layers adapted, second order, K = 1",
        "public data": "settings of examples/ml-100k.yaml and examples/ml-1m-melu-own-features.yaml",
    }
    publish("throughput", render(records), records, facts, args)


if __name__ == "__main__":
    main()
