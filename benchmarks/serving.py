"""How fast `gmeta serve` answers: the demo's `taste`, 5 inner steps, 20 support rows and 100 candidates a task.

    python benchmarks/serving.py [--quick]

The server has one core, the client, a process of its own, another. Each adapt + score request is of a task that the
server has not seen; `cached` ones name a state. In-process numbers are of the same calls without HTTP, on one core.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from common import ROOT, Record, arguments, gmeta, median, publish, table

from gmeta.meta.recorded import Programs
from gmeta.recommender.recommender import Recommender, load
from gmeta.recommender.tasks import adapt_tasks, encode_rows, score_tasks

SUPPORT, CANDIDATES, TASKS = 20, 100, 8
HOST = "127.0.0.1"
ARROW = "application/vnd.apache.arrow.stream"
OF_TASK = ("gender", "age", "city")


def main() -> None:
    args = arguments(__doc__ or "")
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        bundle, log = prepare(Path(folder), quick=args.quick)
        os.sched_setaffinity(0, cores[-1:])
        records = in_process(bundle, log, args)
        with server(bundle, cores[:1]) as port:
            records += over_http(port, log, args)
    body = table(
        ["case", "variant", "metric", "value"],
        [[r.case, r.variant, r.metric, f"{r.value:,.3g} {r.unit}"] for r in records],
    )
    config = {"support rows": SUPPORT, "candidates": CANDIDATES, "inner steps": 5, "cores": "server 1, client 1"}
    publish("serving", body, records, config, args)


def prepare(folder: Path, *, quick: bool) -> tuple[Path, pa.Table]:
    """Make the demo's model, trained a little, and return its bundle and the log's rows."""
    config = yaml.safe_load((ROOT / "examples" / "demo.yaml").read_text())
    config |= {"pack": str(folder / "pack"), "run_dir": str(folder / "run")}
    config["meta"]["inner_steps"], config["schedule"]["epochs"] = 5, 1
    (folder / "taste.yaml").write_text(yaml.safe_dump(config))
    gmeta("synth", "--out", folder / "log", "--users", 1000 if quick else 12000)
    gmeta(
        "prepare",
        "--input",
        folder / "log" / "*.parquet",
        "--schema",
        folder / "log" / "schema.yaml",
        "--out",
        folder / "pack",
    )
    gmeta("train", "--config", folder / "taste.yaml")
    gmeta("bundle", "--run_dir", folder / "run", "--out", folder / "bundle")
    log = pa.concat_tables([pq.read_table(file) for file in sorted((folder / "log").glob("*.parquet"))])
    plain = [c.cast(pa.string()) if pa.types.is_dictionary(c.type) else c for c in log.columns]
    return folder / "bundle", pa.table(dict(zip(log.column_names, plain, strict=True)))


def rows_of(log: pa.Table, tasks: Sequence[str], each: int, seed: int, *, label: bool) -> pa.Table:
    """Return rows drawn from the log, `each` for every task; a task has its own gender, age and city."""
    rng = np.random.default_rng(seed)
    total = len(tasks) * each
    drawn = log.take(rng.integers(0, log.num_rows, total))
    own = np.repeat(rng.integers(0, log.num_rows, len(tasks)), each)
    columns = {name: log[name].take(own) if name in OF_TASK else drawn[name] for name in log.column_names}
    columns["user_id"] = pa.array(np.repeat(list(tasks), each))
    return pa.table({name: c for name, c in columns.items() if name != "timestamp" and (label or name != "label")})


def in_process(bundle: Path, log: pa.Table, args: argparse.Namespace) -> list[Record]:
    """Measure adapting and scoring without HTTP: a batch of 64 against 64 single calls, by the learner and, as the
    server does, by recorded programs.
    """
    torch.set_num_threads(1)
    rec, recorded = load(bundle, device="cpu", mapped=True), load(bundle, device="cpu", mapped=True)
    recorded.record(Programs(), print)
    names = [f"t{i}" for i in range(64)]
    supports = [encode_rows(rec, rows_of(log, [n], SUPPORT, i, label=True), "support") for i, n in enumerate(names)]
    candidates = [
        encode_rows(rec, rows_of(log, [n], CANDIDATES, i, label=False), "candidates") for i, n in enumerate(names)
    ]

    def single(one: Recommender) -> None:
        for support, rows in zip(supports, candidates, strict=True):
            score_tasks(one, [rows], [adapt_tasks(one, [support])])

    def batch(one: Recommender) -> None:
        score_tasks(one, candidates, [[state] for state in adapt_tasks(one, supports)])

    functions = {"single": single, "batch": batch, "adapt": lambda one: adapt_tasks(one, supports)}
    for _ in range(20):  # until programs are made
        batch(recorded)
    single(recorded)
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(2 if args.quick else 15):
        for name, function in functions.items():
            for variant, one in (("learner", rec), ("recorded", recorded)):
                start = time.perf_counter()
                function(one)
                seconds.setdefault((name, variant), []).append(time.perf_counter() - start)
    records = []
    for variant in ("learner", "recorded"):
        one, together, adapted = (median(seconds[name, variant]) for name in functions)
        records += [
            Record("64 tasks", variant, "batch_speedup", one / together, "x"),
            Record("64 tasks", variant, "adapted_tasks_per_s", 64 / adapted, "tasks/s"),
            Record("64 tasks", variant, "adapted_and_scored_tasks_per_s", 64 / together, "tasks/s"),
            Record("1 task", variant, "p50_ms", one / 64 * 1e3, "ms"),
        ]
    return records


@contextlib.contextmanager
def server(bundle: Path, cores: Sequence[int]) -> Iterator[int]:
    """Start a server on some cores; give its port."""
    words = ["serve", "--bundle", bundle, "--port", 0, "--access_log", "false", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gmeta", *map(str, words)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("the server did not start")
        yield int(line.rpartition(":")[2])
    finally:
        process.terminate()
        process.wait()


@dataclass(frozen=True)
class Request:
    """A request as it is sent."""

    content: bytes
    kind: str = "application/json"
    path: str = "/v1/score"

    def message(self, port: int) -> bytes:
        """Return its bytes."""
        head = f"POST {self.path} HTTP/1.1\r\nhost: {HOST}:{port}\r\ncontent-type: {self.kind}\r\n"
        return f"{head}content-length: {len(self.content)}\r\n\r\n".encode() + self.content


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: bytes) -> bytes:
    """Send a request and return the answer's body."""
    writer.write(message)
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(re.search(rb"content-length: (\d+)", head).group(1))  # type: ignore[union-attr]
    body = await reader.readexactly(length)
    if b" 200 " not in head[:15]:
        raise RuntimeError(f"{head.decode()}{body.decode()}")
    return body


async def load_of(port: int, requests: Sequence[Request], clients: int) -> tuple[list[float], float]:
    """Send requests over some connections, one after another on each; return each one's seconds, and those of all."""
    messages, seconds = iter([request.message(port) for request in requests]), []

    async def client() -> None:
        reader, writer = await asyncio.open_connection(HOST, port, limit=1 << 24)
        for message in messages:
            start = time.perf_counter()
            await ask(reader, writer, message)
            seconds.append(time.perf_counter() - start)
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return seconds, time.perf_counter() - start


def of_json(rows: pa.Table) -> dict[str, object]:
    """Return one task's columns; those of the task stand there once."""
    return {n: v[0] if n in OF_TASK else v for n, v in rows.to_pydict().items() if n != "user_id"}


def over_http(port: int, log: pa.Table, args: argparse.Namespace) -> list[Record]:
    """Measure requests to the server."""
    few, many = (30, 300) if args.quick else (1000, 8000)
    pool = 64

    def fresh(count: int, seed: int) -> list[Request]:
        names = [f"f{seed}-{i}" for i in range(count)]
        support = rows_of(log, names, SUPPORT, seed, label=True)
        rows = rows_of(log, names[:pool], CANDIDATES, seed + 1, label=False)
        bodies = []
        for i, name in enumerate(names):
            own = of_json(rows.slice(i % pool * CANDIDATES, CANDIDATES))
            task = {"key": name, "support": of_json(support.slice(i * SUPPORT, SUPPORT)), "candidates": own}
            bodies.append(Request(json.dumps({"tasks": [task]}).encode()))
        return bodies

    names = [f"k{i}" for i in range(pool)]
    support, rows = rows_of(log, names, SUPPORT, 1, label=True), rows_of(log, names, CANDIDATES, 2, label=False)
    tasks = [{"key": n, "support": of_json(support.slice(i * SUPPORT, SUPPORT))} for i, n in enumerate(names)]
    states = {task["key"]: task["state"] for task in post(port, "/v1/adapt", {"tasks": tasks})["tasks"]}
    cached = [
        Request(
            json.dumps(
                {
                    "tasks": [
                        {"key": n, "state": states[n], "candidates": of_json(rows.slice(i * CANDIDATES, CANDIDATES))}
                    ]
                }
            ).encode()
        )
        for i, n in enumerate(names)
    ]
    in_arrow = []
    for start in range(0, pool, TASKS):
        own = {n: states[n] for n in names[start : start + TASKS]}
        in_arrow.append(Request(arrow(rows.slice(start * CANDIDATES, TASKS * CANDIDATES), own), ARROW))

    def repeated(requests: Sequence[Request], count: int) -> list[Request]:
        return [requests[i % len(requests)] for i in range(count)]

    records: list[Record] = []
    asyncio.run(load_of(port, [*fresh(20, 90), *repeated(cached, 20), *repeated(in_arrow, 5)], 4))  # warm up
    cases = [
        ("1 client", "adapt+score", fresh(few, 10), 1),
        ("1 client", "cached", repeated(cached, few), 1),
        ("64 clients", "adapt+score", fresh(many, 30), 64),
        ("64 clients", "cached", repeated(cached, many), 64),
        (f"8 clients, {TASKS} tasks, Arrow", "cached", repeated(in_arrow, max(40, many // 4)), 8),
    ]
    for case, variant, requests, clients in cases:
        before = stages(port)
        seconds, whole = asyncio.run(load_of(port, requests, clients))
        records += [
            Record(case, variant, "p50_ms", float(np.quantile(seconds, 0.5)) * 1e3, "ms"),
            Record(case, variant, "p99_ms", float(np.quantile(seconds, 0.99)) * 1e3, "ms"),
            Record(case, variant, "requests_per_s", len(requests) / whole, "requests/s"),
        ]
        if "Arrow" in case:
            rate = len(requests) * TASKS * CANDIDATES / whole
            records.append(Record(case, variant, "candidates_per_s", rate, "candidates/s"))
        busy = {stage: value - before.get(stage, 0.0) for stage, value in stages(port).items() if stage != "queue"}
        records += [Record(case, variant, f"share_{s}", v / whole, "of the time") for s, v in busy.items() if v > 0]
    return records


def arrow(rows: pa.Table, states: dict[str, str]) -> bytes:
    """Return candidates as an Arrow body that names their states."""
    named = rows.replace_schema_metadata({"part": "candidates", "states": json.dumps(states)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, named.schema) as stream:
        stream.write_table(named)
    return sink.getvalue().to_pybytes()


def post(port: int, path: str, document: object) -> dict[str, list[dict[str, str]]]:
    """Send JSON and return the answer."""
    request = urllib.request.Request(
        f"http://{HOST}:{port}{path}", json.dumps(document).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)  # type: ignore[no-any-return]


def stages(port: int) -> dict[str, float]:
    """Return the seconds that the server has spent in each stage."""
    with urllib.request.urlopen(f"http://{HOST}:{port}/metrics") as page:
        text = page.read().decode()
    return {
        stage: float(value)
        for stage, value in re.findall(r'gmeta_stage_seconds_sum{stage="(\w+)",worker="0"} (\S+)', text)
    }


if __name__ == "__main__":
    main()
