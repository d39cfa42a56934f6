"""The reader of AntM2C, from CSV files to a task pack, against reading the files alone: DuckDB's scan, and pandas.

    python benchmarks/antm2c_reading.py [--quick] [--json FILE]

The files are a clone of a million rows with images. The scan reads all columns as text to a table in memory; pandas
reads them in chunks of 100,000 rows with types of its own. Prepare also checks every row, makes histories and copies of
supports, types the columns without a meaning, builds vocabularies, encodes, writes, syncs and checksums. One thread
each; CPU seconds, start included, once each. What vectors of images take, kept once an item, stands beside what they
would take once a row.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import Record, arguments, here, median, publish, table

ROWS, QUICK, DIM = 1_000_000, 30_000, 512
SCAN = """
import duckdb, sys
with duckdb.connect(config={"threads": 1}) as con:
    con.execute(f"CREATE TABLE t AS SELECT * FROM read_csv('{sys.argv[1]}/antm2c_*.csv', all_varchar = true)")
"""
PANDAS = """
import glob, pandas, sys
for file in sorted(glob.glob(sys.argv[1] + "/antm2c_*.csv")):
    for chunk in pandas.read_csv(file, chunksize=100_000):
        pass
"""


def main() -> int:
    """Time all in turn, and publish."""
    args = arguments(__doc__ or "")
    rows, repetitions = (QUICK, 1) if args.quick else (ROWS, 1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        here("synth", "--kind", "antm2c", "--rows", rows, "--out", folder / "log")
        images = _vectors(folder / "images", rows)
        prepare = ["-m", "gmeta", "prepare", "--dataset", "antm2c", "--root", folder / "log", "--threads", 1]
        programs: dict[str, Sequence[object]] = {
            "DuckDB, scan to a table": ["-c", SCAN, folder / "log"],
            "pandas, in chunks": ["-c", PANDAS, folder / "log"],
            "prepare": prepare,
            "prepare, with images": [*prepare, "--images", images],
        }
        spent: dict[str, list[float]] = {name: [] for name in programs}
        for turn in range(repetitions):
            for name, words in programs.items():
                out = ["--out", folder / f"{name}-{turn}"] if name.startswith("prepare") else []
                spent[name].append(_cpu(*words, *out))
        counted = sum(1 for part in (folder / "log").glob("*.csv") for _ in part.open()) - 3
        csv = sum(part.stat().st_size for part in (folder / "log").glob("*.csv"))
        packs = {name: _size(folder / f"{name}-0") for name in programs if name.startswith("prepare")}
    _tell(args, spent, counted, csv, packs)
    return 0


def _tell(args: object, spent: dict[str, list[float]], rows: int, csv: int, packs: dict[str, int]) -> None:
    scan = median(spent["DuckDB, scan to a table"])
    records, lines = [], []
    for name, seconds in spent.items():
        took = median(seconds)
        size = packs.get(name)
        share = "-" if size is None else f"{size / csv:.2f}"
        lines.append([name, f"{took:.1f}", f"{rows / took:,.0f}", f"{took / scan:.1f}", share])
        records += [Record("reading", name, "cpu_s", took, "s"), Record("reading", name, "of_scan", took / scan, "x")]
        if size is not None:
            records.append(Record("reading", name, "pack_of_csv", size / csv, "x"))
    once = packs["prepare, with images"] - packs["prepare"]
    each = rows * DIM * 2
    records += [
        Record("images", "once an item", "bytes", once, "B"),
        Record("images", "once a row", "bytes", each, "B"),
    ]
    head = ["program", "CPU s", "rows a CPU second", "x the scan", "pack / CSV"]
    told = (
        f"Vectors of images, {DIM} float16 each: {once / 1e6:,.0f} MB, {each / 1e6:,.0f} MB if every row had its own."
    )
    facts = {"rows": rows, "csv_bytes": csv, "threads": 1}
    publish("antm2c_reading", f"{table(head, lines)}\n\n{told}", records, facts, args)  # type: ignore[arg-type]


def _vectors(folder: Path, rows: int) -> Path:
    """Write vectors for most items, as `gmeta embed-images` leaves them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    items = [str(item) for item in range(rows * 7586 // 1_000_000)]
    vectors = rng.standard_normal((len(items), DIM)).astype(np.float32)
    pq.write_table(pa.table({"item": items, "vector": list(vectors)}), folder / "part-00000.parquet")
    (folder / "images.json").write_text(f'{{"dim": {DIM}}}')
    return folder


def _cpu(*words: object) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *map(str, words)], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    sys.exit(main())
