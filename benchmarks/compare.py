"""Two source trees on one machine: is one slower than the other?

    python benchmarks/compare.py --base OTHER_CHECKOUT [--pairs 7] [--quick]

The other tree is a checkout of an earlier commit. Each pair runs a benchmark in both trees, one after the other, the
earlier tree first in every second pair. A run gives one number for each metric that it times; a pair gives the
geometric mean, over metrics, of time here / time there. What is told is the median over pairs, and the interval
between the order statistics that holds the true median with at least 95 % (7 pairs: the whole range, 98 %).

Both trees run in this environment, each with its own `gmeta` on the path.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from common import ROOT, Record, add_json, median, parse, publish, table

ENGINE_VARIANTS = ("plain", "factored-first", "factored-second")
LAB_STEPS = 120


def run_in(tree: Path, *words: object) -> None:
    """Run Python in a tree, with the tree's own gmeta."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, *map(str, words)]
    done = subprocess.run(argv, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)} in {tree} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")


def quick_records(tree: Path, name: str, folder: Path) -> list[dict[str, Any]]:
    """Return the records of `benchmarks/NAME.py --quick` in a tree."""
    file = folder / "records.json"
    run_in(tree, f"benchmarks/{name}.py", "--quick", "--json", file)
    found: list[dict[str, Any]] = json.loads(file.read_text())
    return found


def engine(tree: Path, folder: Path) -> dict[str, float]:
    """Return the milliseconds of whole steps, by case and variant."""
    return {
        f"{record['case']}, {record['variant']}": record["value"]
        for record in quick_records(tree, "engine", folder)
        if record["metric"] == "step_ms" and record["variant"] in ENGINE_VARIANTS
    }


def io(tree: Path, folder: Path) -> dict[str, float]:
    """Return microseconds a sample, of the task pack's loader alone and of training on it."""
    wanted = {"pack": "loader", "all on": "training"}
    return {
        wanted[record["variant"]]: 1e6 / record["value"]
        for record in quick_records(tree, "io", folder)
        if record["metric"] == "samples_per_s" and record["variant"] in wanted
    }


def stragglers(tree: Path, folder: Path) -> dict[str, float]:
    """Return the seconds of a job in the laboratory in which one of four workers takes twice as long.

    `benchmarks/stragglers.py --quick` takes a quarter of an hour a run; this is one of its cases with fewer steps.
    """
    out = folder / "lab"
    scenario = ROOT / "examples" / "scenarios" / "deterministic-2x.yaml"
    words = ("--scenario", scenario, "--policy", "nd", "--steps", LAB_STEPS, "--out", out)
    run_in(tree, "-m", "gmeta", "lab", *words)
    result = json.loads((out / "result.json").read_text())
    return {"job": float(result["jct_s"])}


BENCHMARKS: dict[str, Callable[[Path, Path], dict[str, float]]] = {"engine": engine, "io": io, "stragglers": stragglers}


def paired(here: Mapping[str, float], there: Mapping[str, float]) -> float:
    """Return the geometric mean of time here / time there over the metrics of both."""
    if here.keys() != there.keys():
        raise ValueError(f"the trees time different things: {sorted(here)} and {sorted(there)}")
    return math.exp(sum(math.log(here[name] / there[name]) for name in here) / len(here))


def interval(ratios: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return the narrowest pair of order statistics that holds the median with `level`; the range where none does."""
    ordered, n = sorted(ratios), len(ratios)
    below = list(accumulate(math.comb(n, k) / 2**n for k in range(n + 1)))  # P(at most k of n lie below the median)
    for k in range((n - 1) // 2, 0, -1):
        if 1 - 2 * below[k - 1] >= level:
            return ordered[k - 1], ordered[n - k]
    return ordered[0], ordered[-1]


def compare(base: Path, pairs: int) -> list[Record]:
    """Run all benchmarks in alternating pairs."""
    records = []
    for name, benchmark in BENCHMARKS.items():
        ratios = []
        for number in range(pairs):
            found: dict[Path, dict[str, float]] = {}
            for tree in (base, ROOT) if number % 2 == 0 else (ROOT, base):
                with tempfile.TemporaryDirectory() as folder:
                    found[tree] = benchmark(tree, Path(folder))
            ratios.append(paired(found[ROOT], found[base]))
            print(f"{name}, pair {number + 1} of {pairs}: {ratios[-1]:.3f}", file=sys.stderr, flush=True)
            records.append(Record(name, f"pair {number + 1}", "time_ratio", ratios[-1], "x"))
        low, high = interval(ratios)
        records += [
            Record(name, "median", metric, value, "x")
            for metric, value in (("time_ratio", median(ratios)), ("low", low), ("high", high))
        ]
    return records


def main() -> None:
    """Compare, print a table, write results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--base", type=Path, required=True, help="checkout of the commit to compare with")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="two pairs; writes no result files")
    add_json(parser)
    args = parse(parser)
    records = compare(args.base.resolve(), 2 if args.quick else args.pairs)
    rows = []
    for name in BENCHMARKS:
        value = {
            record.metric: record.value for record in records if record.case == name and record.variant == "median"
        }
        ratios = [record.value for record in records if record.case == name and record.variant != "median"]
        spread = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        rows.append([name, f"{value['time_ratio']:.3f}", f"{value['low']:.3f} to {value['high']:.3f}", spread])
    body = table(("benchmark", "time here / there, median", "interval", "pairs"), rows)
    there = subprocess.run(
        ["git", "-C", args.base, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    publish("compare", body, records, {"pairs": args.pairs, "commit there": there, "laboratory steps": LAB_STEPS}, args)


if __name__ == "__main__":
    main()
