"""AntM2C at its released size: what a clone of ten million rows takes to write, and to read into a pack.

    python benchmarks/antm2c_large.py [--quick] [--json FILE]

Peak memory is that of the largest process, beside the same for a million rows; CPU seconds include the start. The pack
is made with `--memory_limit 2GB` and one thread, as it is without images.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import Record, arguments, publish, table

ROWS, QUICK = (1_000_000, 10_000_000), (10_000, 20_000)
LIMIT = "2GB"


def main() -> int:
    """Write and read logs of each size, and publish."""
    args = arguments(__doc__ or "")
    records, lines = [], []
    for rows in QUICK if args.quick else ROWS:
        with tempfile.TemporaryDirectory() as temporary:
            log, pack = Path(temporary) / "log", Path(temporary) / "pack"
            read = ["--dataset", "antm2c", "--root", log, "--out", pack, "--memory_limit", LIMIT, "--threads", 1]
            programs: dict[str, Sequence[object]] = {
                "synth": ["synth", "--kind", "antm2c", "--rows", rows, "--out", log],
                "prepare": ["prepare", *read],
            }
            for name, words in programs.items():
                cpu, peak = _spent(words)
                lines.append([name, f"{rows:,}", f"{cpu:.0f}", f"{peak:,.0f}"])
                case = f"{rows}"
                records += [Record(case, name, "cpu_s", cpu, "s"), Record(case, name, "peak", peak, "MB")]
    told = table(["command", "rows", "CPU s", "peak MB"], lines)
    publish("antm2c_large", told, records, {"memory_limit": LIMIT, "threads": 1}, args)
    return 0


def _spent(words: Sequence[object]) -> tuple[float, float]:
    """Return CPU seconds and the peak memory in MB of a command."""
    argv = [sys.executable, "-m", "gmeta", *map(str, words)]
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(argv)} ended with {child.returncode}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
