"""Do gmeta on 1, 2 and 4 workers and our PS-style baseline train equally good models? MAML, MeLU and CBML on MovieLens.

    python benchmarks/parity.py [--quick] [--json FILE] [--seeds N] [--case NAME]

A seed draws the split of users, the query rows where they are random, the initialisation and the order of the batches.
Ratings are trained with the squared error; the models are judged after adaptation, on the query rows of test users, who
are in no training task: AUC of ratings of 4 and more by predicted rating, and MAE. Means with 95 % intervals over seeds
(Student's t), and so the differences to the baseline, paired by seed. Two programs *agree* where the interval of their
difference lies within ±MARGIN. What training MAML again from another initialisation and in another order, on the same
users, does to the metrics stands beside it (`gmeta-1-reseeded`): agreement much closer than that is more than
statistical, it is the same training but for rounding.

Trainings are short and the models small: equality is what is tested, not the best accuracy (benchmarks/quality.py).
One training runs at a time, one thread a process; what needs one process runs in this one. Data is read from GMETA_DATA
(default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from common import DATA, ROOT, Record, add_json, gmeta, here, parse, publish, run_program, table

from gmeta.evaluation.baselines import BASELINES
from gmeta.evaluation.metrics import auc, mae

MARGIN = 0.005  # of AUC and of MAE
POSITIVE = 4  # ratings of at least this are the positives of the AUC
WORKERS = (1, 2, 4)
BASELINE = "ps-baseline"
BASELINE_WORKERS, BASELINE_SERVERS = 2, 1
RESEEDED = "gmeta-1-reseeded"
METRICS = ("auc", "mae")
UNITS = {"auc": "1", "mae": "label"}
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""97.5 % quantiles of Student's t by degrees of freedom."""


@dataclass(frozen=True)
class Case:
    """A data set and what of it the models read."""

    name: str
    folder: str  # in DATA
    prepare: tuple[str, ...]
    features: tuple[str, ...]
    epochs: int


CASES = (
    Case(
        "ml-100k/user_cold",
        "ml-100k",
        ("--dataset", "ml-100k", "--max_task_rows", "100", "--test_fraction", "0.2"),
        ("item_id", "release_year", "gender", "age", "occupation"),
        epochs=1,
    ),
    Case(  # by --case only: too long for a default run
        "ml-1m-melu/user_item_cold",
        "ml-1m-subset",
        ("--dataset", "ml-1m-melu"),
        ("rate", "genre", "director", "actor", "gender", "age", "occupation", "zip"),
        epochs=1,
    ),
)

METHODS: dict[str, dict[str, Any]] = {  # `meta` of the config
    "maml": {"adapt": ["embeddings", "dense"], "inner_steps": 2, "inner_lr": 0.05},
    "melu": {"adapt": ["decision"], "inner_steps": 2, "inner_lr": 0.05},
    "cbml": {"adapt": ["decision"], "inner_steps": 2, "inner_lr": 0.05, "modulation": "cluster"},
}


def config(case: Case, method: str, seed: int, max_steps: int) -> dict[str, Any]:
    """Return a training's config, the same for every program."""
    return {
        "loss": "mse",
        "model": {"name": "melu", "features": list(case.features), "embedding_dim": 8, "args": {"hidden": [32, 16]}},
        "meta": METHODS[method],
        "embedding": {"optimizer": "adam", "lr": 0.01, "init_std": 0.1},
        "dense": {"lr": 0.003, "clip_norm": 5.0},
        "loader": {"tasks_per_batch": 8},
        "schedule": {"epochs": case.epochs, "max_steps": max_steps, "eval_every": 1_000_000, "metric": "mae"},
        "seed": seed,
        "device": "cpu",
    }


def train(variant: str, settings: dict[str, Any], pack: Path, run_dir: Path) -> None:
    """Train as users do, by the command of the variant's program."""
    file = run_dir.with_suffix(".yaml")
    words: tuple[object, ...] = ("--config", file, "--pack", pack, "--run_dir", run_dir)
    if variant == RESEEDED:
        settings = settings | {"seed": settings["seed"] + 1000}
    file.write_text(yaml.safe_dump(settings))
    if variant != BASELINE:
        workers = variant.split("-")[1]
        if workers == "1":
            here("train", *words)
        else:
            gmeta("train", *words, "--nproc", workers)
        return
    words += ("--workers", BASELINE_WORKERS, "--servers", BASELINE_SERVERS)
    run_program(ROOT / "benchmarks" / "ps_baseline" / "train.py", *words)


def evaluate(run_dir: Path, baselines: bool) -> dict[str, dict[str, float]]:
    """Return variant -> metric -> value on test users: of `before`, `after` and, if asked for, of what needs no
    network.
    """
    words = ("--checkpoint", "last", "--resamples", 1, "--baselines", str(baselines).lower())
    here("evaluate", "--run_dir", run_dir, *words)
    found = pq.read_table(run_dir / "predictions.parquet").to_pydict()
    label = np.array(found["label"], np.float64)
    positive = (label >= POSITIVE).astype(np.float64)
    names = [name for name in ("before", "after", *BASELINES) if name in found]
    return {
        name: {"auc": auc(found.get(f"{name}.ranking", found[name]), positive), "mae": mae(found[name], label)}
        for name in names
    }


def of_method(method: str, variants: Sequence[str]) -> list[str]:
    """Return what trains a method. The control is measured on the first one only."""
    return [variant for variant in variants if variant != RESEEDED or method == next(iter(METHODS))]


Values = dict[tuple[str, str, str], list[float]]
"""(method, variant, metric) -> value of each seed; what needs no network has the method ""."""


def measure(case: Case, seeds: int, methods: Sequence[str], variants: Sequence[str], max_steps: int) -> Values:
    """Train and evaluate everything, seed after seed."""
    values: Values = {}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as scratch:
            pack = Path(scratch) / "pack"
            here("prepare", *case.prepare, "--root", DATA / case.folder, "--out", pack, "--seed", seed)
            for method in methods:
                for variant in of_method(method, variants):
                    run_dir = Path(scratch) / f"{method}-{variant}"
                    train(variant, config(case, method, seed, max_steps), pack, run_dir)
                    first = (method, variant) == (methods[0], variants[0])
                    for name, found in evaluate(run_dir, baselines=first).items():
                        where = ("", name) if name in BASELINES else (method, variant)
                        where = (method, f"{variant}-before") if name == "before" else where
                        for metric, value in found.items():
                            values.setdefault((*where, metric), []).append(value)
        print(f"{case.name}, seed {seed}: done", flush=True)
    return values


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval by Student's t; without one for a single seed."""

    mean: float
    half: float

    @classmethod
    def over(cls, values: Sequence[float]) -> Interval:
        """Return the interval of values of one seed each."""
        if len(values) < 2:
            return cls(values[0], math.nan)
        half = T_975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
        return cls(statistics.mean(values), half)

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if math.isnan(self.half) else f" ± {self.half:.4f}")

    @property
    def span(self) -> str:
        """Return the interval of a difference in words."""
        return "" if math.isnan(self.half) else f"{self.mean - self.half:+.1e} … {self.mean + self.half:+.1e}"

    @property
    def bound(self) -> float:
        """Return the largest absolute value in the interval."""
        return abs(self.mean) + self.half

    def verdict(self) -> str:
        """Return in words what a difference says."""
        if math.isnan(self.half):
            return "one seed: no interval"
        zero = "contains 0" if abs(self.mean) <= self.half else "does NOT contain 0"
        return f"{'agree' if self.bound <= MARGIN else 'do NOT agree'}: at most {self.bound:.1e} apart, interval {zero}"


def difference(values: Values, method: str, variant: str, metric: str) -> Interval:
    """Return the difference of a variant to the baseline, paired by seed."""
    pairs = zip(values[method, variant, metric], values[method, BASELINE, metric], strict=True)
    return Interval.over([ours - theirs for ours, theirs in pairs])


def to_records(case: Case, values: Values, methods: Sequence[str], variants: Sequence[str]) -> list[Record]:
    """Return means and differences with the ends of their intervals."""
    records = []

    def add(name: str, variant: str, metric: str, found: Interval) -> None:
        unit = UNITS[metric.removesuffix("_difference")]
        ends = {"": 0.0, "_low": -found.half, "_high": found.half}
        records.extend(
            Record(name, variant, metric + end, found.mean + by, unit) for end, by in ends.items() if not math.isnan(by)
        )

    for (method, variant, metric), found in values.items():
        add(f"{case.name} {method}".strip(), variant, metric, Interval.over(found))
    for method in methods:
        for variant in of_method(method, variants)[1:]:
            for metric in METRICS:
                found = difference(values, method, variant, metric)
                add(f"{case.name} {method}", f"{variant} - {BASELINE}", f"{metric}_difference", found)
    return records


def render(case: Case, values: Values, methods: Sequence[str], variants: Sequence[str]) -> str:
    """Return the case in Markdown: values, then differences to the baseline with a verdict each."""

    def cells(method: str, variant: str) -> list[str]:
        return [str(Interval.over(values[method, variant, metric])) for metric in METRICS]

    rows = [[method, variant, *cells(method, variant)] for method in methods for variant in of_method(method, variants)]
    rows += [[method, "before adaptation", *cells(method, f"{BASELINE}-before")] for method in methods]
    rows += [["none", name, *cells("", name)] for name in BASELINES if ("", name, "auc") in values]
    compared, agreed = [], []
    for method in methods:
        for variant in of_method(method, variants)[1:]:
            for metric in METRICS:
                found = difference(values, method, variant, metric)
                verdict = "" if variant == RESEEDED else found.verdict()
                compared.append([method, f"{variant} − {BASELINE}", metric, f"{found.mean:+.1e}", found.span, verdict])
                agreed += [verdict.startswith("agree")] if found.span and verdict else []
    parts = [
        f"## {case.name}",
        table(["method", "trained by", f"AUC (rating ≥ {POSITIVE})", "MAE"], rows),
        table(["method", "difference", "metric", "mean over seeds", "95 %", "verdict"], compared),
    ]
    if agreed:
        parts.append(f"{sum(agreed)} of {len(agreed)} comparisons agree within ±{MARGIN}.")
    return "\n\n".join(parts)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Statistical parity of gmeta with our PS-style baseline.")
    parser.add_argument(
        "--quick", action="store_true", help="one seed, two methods, 2 workers, 4 steps; no result files"
    )
    add_json(parser)
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 11), help="seeds 0 to N - 1")
    parser.add_argument("--case", choices=[case.name for case in CASES], default=CASES[0].name)
    return parse(parser)


def main() -> None:
    args = options()
    case = next(case for case in CASES if case.name == args.case)
    if not (DATA / case.folder).is_dir():
        print(f"{case.name} is left out: {DATA / case.folder} does not exist; set GMETA_DATA to the data's folder")
        return
    torch.set_num_threads(1)
    seeds, methods = args.seeds, list(METHODS)
    variants = [BASELINE, *(f"gmeta-{workers}" for workers in WORKERS), RESEEDED]
    if args.quick:
        seeds, methods, variants = 1, ["maml", "cbml"], [BASELINE, "gmeta-2"]
    values = measure(case, seeds, methods, variants, max_steps=4 if args.quick else 0)
    body = render(case, values, methods, variants)
    if args.quick:
        body = "QUICK: one seed, 4 steps a training; the numbers say only that everything runs.\n\n" + body
    settings = {
        "seeds": seeds,
        "values": "mean ± half of the 95 % interval over seeds (Student's t)",
        "threads": "1 a process, one training at a time",
        "baseline": f"our PS-style baseline, {BASELINE_WORKERS} workers, {BASELINE_SERVERS} server",
        "config": json.dumps({method: config(case, method, 0, 0) for method in methods}),
    }
    publish("parity", body, to_records(case, values, methods, variants), settings, args)


if __name__ == "__main__":
    main()
