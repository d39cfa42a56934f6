"""What the coordinator of straggler mitigation bears: 8 client processes that lease and commit work items over HTTP.

    python benchmarks/coordinator.py [--quick] [--json FILE]

Each exchange commits the work items of the one before and leases as many more, in one transaction of the journal.
Paced: the clients together ask at a fixed rate, and latency is what a training loop would wait. Otherwise every client
asks again as soon as it was answered, so that latency is mostly the wait for the other seven. CPU time is that of a
process for an exchange; clients and coordinator share the machine.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import psutil
from common import Record, arguments, publish, table

from gmeta.elastic.client import Client
from gmeta.elastic.ledger import JobSpec

CLIENTS = 8
PLAN = JobSpec(num_samples=50_000, work_item_size=1, epochs=1000, lease_s=600.0)
WARM_S = 1.0


@dataclass(frozen=True)
class Case:
    """How the clients ask."""

    name: str
    work_items: int  # leased and committed an exchange
    rate: float | None = None  # leases a second of all clients together; None: closed loop
    durable: bool = False


CASES = (
    Case("paced, 32 a message", 32, rate=2500.0),
    Case("32 a message", 32),
    Case("1 a message", 1),
    Case("32 a message, durable", 32, durable=True),
)


def main() -> None:
    """Run every case against a coordinator of its own."""
    args = arguments((__doc__ or "").split("\n")[0])
    seconds = 1.5 if args.quick else 20.0
    records, rows = [], []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(case, Path(folder), seconds)
        units = {"leases_per_s": "1/s", "p50": "ms", "p99": "ms", "client_cpu": "ms", "coordinator_cpu": "ms"}
        records += [Record("coordinator", case.name, key, found[key], units[key]) for key in units]
        rows.append([case.name, f"{found['leases_per_s']:,.0f}", *(f"{found[k]:.2f}" for k in list(units)[1:])])
    header = ["case", "leases + commits/s", "p50 ms", "p99 ms", "client CPU ms", "coordinator CPU ms"]
    config = {"clients": CLIENTS, "seconds": seconds, "work items an epoch": PLAN.num_work_items}
    publish("coordinator", table(header, rows), records, config, args)


def measure(case: Case, folder: Path, seconds: float) -> dict[str, float]:
    """Return the numbers of one case; milliseconds are of an exchange."""
    words = [sys.executable, "-m", "gmeta", "coordinate", "--journal", str(folder / "journal")]
    words += ["--durable", str(case.durable).lower()]
    context = multiprocessing.get_context("spawn")
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as coordinator:
        try:
            assert coordinator.stdout is not None
            url = coordinator.stdout.readline().split()[-1]
            barrier = context.Barrier(CLIENTS + 1)
            pipes = [context.Pipe(duplex=False) for _ in range(CLIENTS)]
            for number, (_, send) in enumerate(pipes):
                context.Process(target=ask, args=(url, case, number, seconds, barrier, send), daemon=True).start()
            barrier.wait()
            usage = psutil.Process(coordinator.pid)
            time.sleep(WARM_S)
            before = sum(usage.cpu_times()[:2])
            time.sleep(seconds)
            spent = sum(usage.cpu_times()[:2]) - before
            found = [receive.recv() for receive, _ in pipes]
        finally:
            coordinator.terminate()
    latencies = sorted(latency for latency_s, _ in found for latency in latency_s)
    return {
        "leases_per_s": len(latencies) * case.work_items / seconds,
        "p50": 1e3 * latencies[len(latencies) // 2],
        "p99": 1e3 * latencies[int(0.99 * len(latencies))],
        "client_cpu": 1e3 * sum(cpu_s for _, cpu_s in found) / len(latencies),
        "coordinator_cpu": 1e3 * spent / len(latencies),
    }


def ask(url: str, case: Case, number: int, seconds: float, barrier: Barrier, send: Connection) -> None:
    """Be one client, and send (seconds of each exchange in the window, CPU seconds of all of them)."""
    client = Client(url, run="benchmark")
    client.open_job("none", PLAN)
    held: list[list[int]] = []
    latencies, cpu = [], 0.0
    pause = CLIENTS * case.work_items / case.rate if case.rate else 0.0
    barrier.wait()
    start = time.monotonic()
    due = start + pause * number / CLIENTS
    while True:
        time.sleep(max(0.0, due - time.monotonic()))
        if pause:  # who fell behind leaves out a turn, and keeps its own
            due += pause * max(1, -(-(time.monotonic() - due) // pause))
        began, cpu_before = time.monotonic(), time.process_time()
        if began > start + WARM_S + seconds:
            break
        reply = client.call(
            "exchange", worker=f"w{number}", count=case.work_items, generation=0, commit=held, progress=[]
        )
        held = [[lease["epoch"], lease["shard"], lease["attempt"]] for lease in reply.get("leases", [])]
        if began > start + WARM_S:
            latencies.append(time.monotonic() - began)
            cpu += time.process_time() - cpu_before
    send.send((latencies, cpu))


if __name__ == "__main__":
    main()
