"""`gmeta prepare` against a bare DuckDB sort of the same rows to one Parquet file: what a task pack costs to make.

    python benchmarks/prepare.py [--quick] [--json FILE]

Rows have 12 columns: user, item, time, label, six categorical columns of Zipf's law (one of text) and two numeric ones.
The sort (`COPY (SELECT * FROM rows ORDER BY user, time)`) is the least that any tool must do which brings a task's rows
together; prepare also checks rows, draws tasks, builds vocabularies, encodes, writes, syncs and checksums the pack.
Each run is a process of its own, start included, in turn; both have the same memory limit and threads. The system's
dirty pages are written out before each run. Needs 250 bytes of disk a row.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import duckdb
from common import Record, arguments, median, publish, table

MEMORY_LIMIT = "2GB"
ROWS_PER_USER = 100
FULL = {5_000_000: 2, 50_000_000: 1}  # rows: repetitions
QUICK = {500_000: 2}

SCHEMA = """
task: user
label: label
time: time
item: item
categorical: [item, brand, category, device, page, city, hour]
numeric: [{name: price, log: true}, age]
"""

SORT = """
import duckdb, sys
source, target, memory_limit, threads = sys.argv[1:]
settings = {"memory_limit": memory_limit, "threads": int(threads), "temp_directory": target + ".spill"}
with duckdb.connect(config=settings) as con:
    con.execute(f'COPY (SELECT * FROM read_parquet({source!r}) ORDER BY "user", "time") TO {target!r} (FORMAT parquet)')
"""


@dataclass(frozen=True)
class Run:
    """One process: wall and CPU seconds, peak resident memory, and the bytes of what it made."""

    seconds: float
    cpu_seconds: float
    max_rss: int
    bytes: int


def write_rows(path: Path, rows: int) -> None:
    """Write a log in order of time, the same for the same `rows`. User sizes are skewed (mean ROWS_PER_USER)."""

    def uniform(column: int) -> str:
        return f"(hash(i * 16 + {column}) / 18446744073709551616.0)"

    def zipf(column: int, values: int) -> str:
        return f"CAST(floor(pow({values}, {uniform(column)})) AS INTEGER)"

    with duckdb.connect(config={"memory_limit": MEMORY_LIMIT}) as con:
        con.execute(f"""
            COPY (SELECT CAST({rows // ROWS_PER_USER} * pow({uniform(1)}, 1.5) AS BIGINT) AS "user",
                         CAST({zipf(2, rows // 50)} AS BIGINT) AS item,
                         CAST(1700000000000 + i * 20 + hash(i * 16 + 3) % 100000 AS BIGINT) AS "time",
                         CAST({uniform(4)} < 0.2 AS INTEGER) AS label,
                         {zipf(5, 20_000)} AS brand, {zipf(6, 1000)} AS category, {zipf(7, 50)} AS device,
                         {zipf(8, 100_000)} AS page, 'city-' || {zipf(9, 50_000)} AS city, {zipf(10, 24)} AS "hour",
                         round(exp(3 * {uniform(11)}), 2) AS price, CAST({uniform(12)} * 80 AS FLOAT) AS age
                  FROM range({rows}) t(i)) TO '{path}' (FORMAT parquet)""")


def run(argv: list[str], made: Path) -> Run:
    """Run a command that makes the file or directory `made`, which is removed after it was measured."""
    os.sync()
    start = time.perf_counter()
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        error = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(error)
    size = sum(p.stat().st_size for p in (made, *made.rglob("*")) if p.is_file())
    shutil.rmtree(made) if made.is_dir() else made.unlink()
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, size)


def runners(directory: Path, rows: int, threads: int) -> dict[str, Callable[[], Run]]:
    """Return what is compared, on rows that are written now."""
    source, schema = directory / "rows.parquet", directory / "schema.yaml"
    write_rows(source, rows)
    schema.write_text(SCHEMA)
    pack, ordered = directory / "pack", directory / "sorted.parquet"
    limits = ["--memory_limit", MEMORY_LIMIT, "--threads", str(threads)]
    prepare = [sys.executable, "-m", "gmeta", "prepare", "--input", str(source), "--schema", str(schema)]
    sort = [sys.executable, "-c", SORT, str(source), str(ordered), MEMORY_LIMIT, str(threads)]

    return {
        "sort": lambda: run(sort, ordered),
        "prepare": lambda: run([*prepare, "--out", str(pack), *limits], pack),
    }


def measure(rows: int, repetitions: int, threads: int) -> tuple[list[Record], list[list[str]]]:
    """Alternate the runs, and return medians and the ratios of runs that were neighbours."""
    case = f"{rows:,} x 12"
    with tempfile.TemporaryDirectory(prefix="gmeta-prepare-") as directory:
        needed, free = 250 * rows, shutil.disk_usage(directory).free
        if free < needed:
            raise SystemExit(f"{case}: {directory} has {free:,} bytes free, {needed:,} are needed: set TMPDIR")
        variants = runners(Path(directory), rows, threads)
        found: dict[str, list[Run]] = {name: [] for name in variants}
        for _ in range(repetitions):
            for name, function in variants.items():
                found[name].append(function())
    records, lines = [], []
    for name, runs in found.items():
        ratio = median([a.seconds / b.seconds for a, b in zip(runs, found["sort"], strict=True)])
        seconds = median([r.seconds for r in runs])
        values = {
            "seconds": (seconds, "s"),
            "rows_per_s": (rows / seconds, "1/s"),
            "cpu_seconds": (median([r.cpu_seconds for r in runs]), "s"),
            "max_rss": (max(r.max_rss for r in runs), "B"),
            "bytes": (runs[-1].bytes, "B"),
            "over_sort": (ratio, "x"),
        }
        records += [Record(case, name, metric, value, unit) for metric, (value, unit) in values.items()]
        shown = f"{seconds:.1f} s", f"{rows / seconds:,.0f}", f"{ratio:.2f}", f"{values['cpu_seconds'][0]:.1f} s"
        sizes = f"{values['max_rss'][0] / 1e9:.2f} GB", f"{runs[-1].bytes / 1e9:.2f} GB"
        lines.append([case, name, *shown, *sizes])
    return records, lines


def main() -> None:
    """Measure every size and publish the table."""
    args = arguments(__doc__ or "")
    threads = len(os.sched_getaffinity(0))
    records, lines = [], []
    for rows, repetitions in (QUICK if args.quick else FULL).items():
        more_records, more_lines = measure(rows, repetitions, threads)
        records += more_records
        lines += more_lines
    header = ["rows x columns", "", "time", "rows/s", "over the sort", "CPU time", "peak memory", "written"]
    config = {
        "memory_limit": MEMORY_LIMIT,
        "threads": threads,
        "repetitions": ", ".join(f"{rows:,} rows: {n}" for rows, n in FULL.items()),
    }
    publish("prepare", table(header, lines), records, config, args)


if __name__ == "__main__":
    main()
