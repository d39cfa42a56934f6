"""Mixed load on `gmeta serve` for long: a new version every minute, no error, no torn version, memory that stays flat.

    python benchmarks/serving_soak.py [--quick] [--json FILE] [--minutes 30]

Two versions of the demo's `taste` take turns behind a link. Clients adapt and score, score by states, erase states, and
send what must be refused. Every answer is held against the scores of the version that it names, computed beside.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
from common import Record, add_json, gmeta, parse, publish, table
from serving import CANDIDATES, HOST, SUPPORT, of_json, prepare, rows_of, server

from gmeta.recommender.recommender import load
from gmeta.runs.bundle import read_manifest

CLIENTS, TASKS = 4, 16
TOLERANCE = 1e-6


@dataclass
class Seen:
    """What was counted."""

    answers: Counter[str] = field(default_factory=Counter)  # by version, and by what is refused
    wrong: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)  # seconds, MiB


def main() -> None:
    parser = argparse.ArgumentParser(description="Mixed load on gmeta serve, with reloads.")
    parser.add_argument(
        "--quick", action="store_true", help="half a minute, a reload every 5 s; writes no result files"
    )
    add_json(parser)
    parser.add_argument("--minutes", type=float, default=30.0)
    args = parse(parser)
    seconds, every = (30.0, 5.0) if args.quick else (60 * args.minutes, 60.0)
    with tempfile.TemporaryDirectory() as folder:
        bundles, log = versions(Path(folder), quick=args.quick)
        link = Path(folder) / "current"
        link.symlink_to(bundles[0])
        tasks, expected = examples(bundles, log)
        seen = Seen()
        with server(link, sorted(os.sched_getaffinity(0))) as port:
            asyncio.run(load_server(port, tasks, expected, bundles, link, seconds, every, seen))
    told(seen, seconds, every, args)


def versions(folder: Path, *, quick: bool) -> tuple[list[Path], pa.Table]:
    """Return two versions of a model, of other steps of a training, and the log."""
    bundle, log = prepare(folder, quick=quick)
    other = folder / "other"
    gmeta("train", "--config", folder / "taste.yaml", "--run_dir", folder / "run2", "--seed", 1)
    gmeta("bundle", "--run_dir", folder / "run2", "--out", other)
    return [bundle, other], log


def examples(bundles: Sequence[Path], log: pa.Table) -> tuple[list[dict[str, object]], dict[str, list[np.ndarray]]]:
    """Return tasks as requests have them, and by version what is to be answered."""
    names = [f"t{i}" for i in range(TASKS)]
    support = rows_of(log, names, SUPPORT, 1, label=True)
    candidates = rows_of(log, names, CANDIDATES, 2, label=False)
    tasks = [
        {
            "key": name,
            "support": of_json(support.slice(i * SUPPORT, SUPPORT)),
            "candidates": of_json(candidates.slice(i * CANDIDATES, CANDIDATES)),
        }
        for i, name in enumerate(names)
    ]
    # A request holds a task's own columns once, those of its support and of its candidates apart.
    expected = {}
    for bundle in bundles:
        rec = load(bundle, device="cpu")
        found = [
            rec.adapt(support.slice(i * SUPPORT, SUPPORT)).predict(candidates.slice(i * CANDIDATES, CANDIDATES))
            for i in range(TASKS)
        ]
        expected[str(read_manifest(bundle)["id"])] = found
    return tasks, expected


async def load_server(
    port: int,
    tasks: Sequence[dict[str, object]],
    expected: dict[str, list[np.ndarray]],
    bundles: Sequence[Path],
    link: Path,
    seconds: float,
    every: float,
    seen: Seen,
) -> None:
    """Send requests, change the version, and watch memory until the time is over."""
    end = time.monotonic() + seconds
    await asyncio.gather(
        *(client(port, number, tasks, expected, end, seen) for number in range(CLIENTS)),
        change(bundles, link, every, end),
        watch(port, end, seen),
    )


async def client(
    port: int,
    number: int,
    tasks: Sequence[dict[str, object]],
    expected: dict[str, list[np.ndarray]],
    end: float,
    seen: Seen,
) -> None:
    """Ask without pause, each time something else."""
    reader, writer = await asyncio.open_connection(HOST, port, limit=1 << 24)
    turn = number
    while time.monotonic() < end:
        at = turn % len(tasks)
        task = tasks[at]
        try:
            status, answer = await ask(reader, writer, "POST", "/v1/adapt", {"tasks": [_without(task, "candidates")]})
            state = answer["tasks"][0]["state"]
            bodies = [{"tasks": [task]}, {"tasks": [{**_without(task, "support"), "state": state}]}]
            for body in bodies:
                status, answer = await ask(reader, writer, "POST", "/v1/score", body)
                _check(answer, expected, at, status, seen)
            status, _ = await ask(reader, writer, "DELETE", f"/v1/states/{state}", None)
            _expect(status == 204, f"DELETE: {status}", seen)
            status, _ = await ask(reader, writer, "POST", "/v1/score", bodies[1])
            _expect(status == 410, f"an erased state: {status}", seen)
            bad = {"tasks": [{**task, "candidates": {"item_id": ["x"], "nonsense": [1]}}]}
            status, _ = await ask(reader, writer, "POST", "/v1/score", bad)
            _expect(status == 422, f"an unknown feature: {status}", seen)
        except (OSError, KeyError, ValueError, asyncio.IncompleteReadError) as error:
            seen.wrong.append(f"{type(error).__name__}: {error}")
            writer.close()
            reader, writer = await asyncio.open_connection(HOST, port, limit=1 << 24)
        turn += CLIENTS
    writer.close()


def _without(task: dict[str, object], key: str) -> dict[str, object]:
    return {name: value for name, value in task.items() if name != key}


def _check(answer: dict[str, object], expected: dict[str, list[np.ndarray]], at: int, status: int, seen: Seen) -> None:
    """Hold an answer against what the version that it names gives."""
    if status != 200:
        seen.wrong.append(f"{status}: {answer}")
        return
    version = re.sub(r" mapped$", "", str(answer["version"]))
    seen.answers[version] += 1
    scores = np.array(answer["tasks"][0]["scores"])  # type: ignore[index]
    off = float(np.abs(scores - expected[version][at]).max())
    if off > TOLERANCE:
        seen.wrong.append(f"task {at} is {off:.2g} off {version}")


def _expect(fine: bool, said: str, seen: Seen) -> None:
    seen.answers["refused or erased"] += fine
    if not fine:
        seen.wrong.append(said)


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str, path: str, document: object
) -> tuple[int, dict[str, object]]:
    """Send a request; return status and answer."""
    content = b"" if document is None else json.dumps(document).encode()
    head = f"{method} {path} HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    head_of = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head_of)
    body = await reader.readexactly(int(length[1])) if length else b""
    return int(head_of.split()[1]), json.loads(body) if body else {}


async def change(bundles: Sequence[Path], link: Path, every: float, end: float) -> None:
    """Let the link lead to the other version, again and again."""
    turn = 0
    while time.monotonic() + every < end:
        await asyncio.sleep(every)
        turn += 1
        new = link.with_name("next")
        new.symlink_to(bundles[turn % len(bundles)])
        new.rename(link)


async def watch(port: int, end: float, seen: Seen) -> None:
    """Note the server's memory each second."""
    found = [c.pid for c in psutil.net_connections("tcp") if c.laddr.port == port and c.status == "LISTEN"]
    process, start = psutil.Process(found[0]), time.monotonic()
    while time.monotonic() < end:
        seen.memory.append((time.monotonic() - start, process.memory_info().rss / 2**20))
        await asyncio.sleep(1)


def told(seen: Seen, seconds: float, every: float, args: argparse.Namespace) -> None:
    """Publish what was counted. The slope is that of the second half, when all buffers have their size."""
    at, memory = np.array(seen.memory).T
    late = at > at[-1] / 2
    slope = float(np.polyfit(at[late] / 60, memory[late], 1)[0])
    answers = sum(seen.answers.values())
    values = [
        ("answers", answers, "1"),
        ("errors", len(seen.wrong), "1"),
        ("memory_slope", slope, "MiB/min"),
        ("memory_end", float(memory[-1]), "MiB"),
        ("memory_half", float(memory[late][0]), "MiB"),
    ]
    records = [Record("mixed load", "server", name, float(value), unit) for name, value, unit in values]
    rows = [[name, f"{value:,.4g}", unit] for name, value, unit in values]
    by_version = "; ".join(f"{name}: {count:,}" for name, count in seen.answers.items())
    body = f"{table(['metric', 'value', 'unit'], rows)}\n\n{by_version}\n" + "\n".join(seen.wrong[:10])
    publish("serving_soak", body, records, {"seconds": seconds, "a new version every": f"{every:.0f} s"}, args)


if __name__ == "__main__":
    main()
