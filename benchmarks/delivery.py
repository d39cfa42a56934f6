"""What a new day costs: a full training on all rows so far beside a warm start on the day alone, ten days in a row.

    python benchmarks/delivery.py [--quick] [--json FILE] [--folder DIR] [--seeds N] [--jobs N] [--case NAME …]

Both sides run `gmeta deliver`, into registries of their own that begin with the same version, made of 30 base days:
prepare, train, bundle, gate, publish; then the new version is loaded and answers a first request. `full` prepares and
trains on all days so far (`--full true`), `warm` on the new day from the current version. A version of each is then
asked for the day after: the last rows of each user, with what came before as support, raw rows as a server gets them.

`--case items` measures deltas alone, on a stream of many items of which a day sees few: three warm days of one seed.
Its results go to files of their own, `delivery_items_…`.

One thread a process. With `--folder` every delivery is kept, and not made again: an end in between costs the one that
was running. The settings of both sides were chosen on a seed of their own (`SETTINGS` says how).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from common import DATA, Record, add_json, median, parse, publish, table
from delivery_days import SLICES, Stream, begins, columns, deliver, movielens, scored, synthetic
from delivery_deltas import FEW_ITEMS, QUICK_ITEMS, deliver_few_items, measured, sizes
from numpy.typing import NDArray

from gmeta.evaluation.metrics import Bootstrap, make_rows

SIDES = ("full", "warm")
ITEMS = "items"
METRICS = ("auc", "logloss")
RESAMPLES = 1000
MIN_ROWS = 20_000
"""Slices of fewer query rows are shown, and not held to a bound."""
MARGIN = -0.002

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"schedule": {"epochs": 2}},
    "warm": {"schedule": {"epochs": 5}, "embedding": {"lr": 0.005}},
}
"""Settings of `gmeta train` on each side, beside what a recipe chooses (5 epochs, rate .002), from a stream of seed 99.

Of warm starts 2, 5 and 10 epochs and rates .002, .005 and .01 were tried on three days. Of full trainings 1, 2 and 3
epochs on one: AUC .8365, .8378 and .8380 on the day after, so that the third epoch, half as much again, buys .0002.
"""


@dataclass(frozen=True)
class Scale:
    """The size of a run."""

    base: int
    days: int
    users: int
    seeds: int
    rules: str = ""  # of the gate; its own without


_FEW = "rules: [{rule: finite}, {rule: evidence, min_tasks: 2, min_rows: 10}]"
FULL, QUICK = Scale(base=30, days=10, users=6000, seeds=3), Scale(base=3, days=2, users=400, seeds=1, rules=_FEW)


def rules_of(case: str, scale: Scale, kept: Path) -> tuple[object, ...]:
    """Return the words that name the gate's rules, where these are not its own.

    A day of MovieLens-100K has some thirty held-out users, too few for the gate's own, which refuse all ten days.
    """
    rules = _FEW if case == "ml-100k" else scale.rules
    if not rules:
        return ()
    (kept / "rules.yaml").write_text(rules)
    return "--rules", kept / "rules.yaml"


def run_seed(case: str, seed: int, scale: Scale, folder: Path) -> Path:
    """Deliver all days of a seed on both sides; returns the folder of its records."""
    kept = folder / case / f"seed-{seed}"
    kept.mkdir(parents=True, exist_ok=True)
    stream = (
        synthetic(kept / "log", seed, base=scale.base, days=max(scale.days, FULL.days), users=scale.users)
        if case == "stream"
        else movielens(kept / "log", base=scale.base, days=scale.days)
    )
    first = kept / "first"
    if not first.exists():
        made = kept / "first.partial"
        shutil.rmtree(made, ignore_errors=True)
        given = ("--input", json.dumps(stream.until(scale.base - 1)), "--train_with", json.dumps({"seed": seed}))
        deliver("--registry", made, *given, *begins(stream), "--work", kept / "work")
        made.rename(first)
    for side in SIDES:
        if not (kept / side).exists():
            shutil.copytree(first, kept / f"{side}.partial", dirs_exist_ok=True)
            (kept / f"{side}.partial").rename(kept / side)
    for day in range(scale.base, scale.base + scale.days):
        for side in SIDES if (day + seed) % 2 else SIDES[::-1]:  # what disturbs the machine for long disturbs both
            record = kept / f"{side}-{day:02d}.json"
            if not record.exists():
                record.write_text(json.dumps(_deliver(stream, kept, side, day, scale)))
        _score(stream, kept, day)
    return kept


def _deliver(stream: Stream, kept: Path, side: str, day: int, scale: Scale) -> dict[str, Any]:
    """Deliver a day on one side; returns seconds by stage, and what was made."""
    registry, work = kept / side, kept / f"work-{side}"
    given = stream.until(day) if side == "full" else [str(stream.day(day))]
    words: list[object] = ["--registry", registry, "--input", json.dumps(given), "--work", work, "--keep", "true"]
    words += ["--train_with", json.dumps(SETTINGS[side]), *rules_of(stream.name, scale, kept)]
    words += ["--full", "true", *begins(stream)] if side == "full" else []
    support, query, _ = stream.next_rows(day)
    some = query.slice(0, 10)
    start = time.perf_counter()
    deliver(*words)
    delivered = time.perf_counter()
    version = json.loads((registry / "current.json").read_text())["version"]
    scored(f"{registry}/current", support.slice(0, 100), some)
    answering = time.perf_counter()
    (folder,) = [path for path in work.iterdir() if (path / "delivery.json").exists()]
    record = json.loads((folder / "delivery.json").read_text())
    manifest = json.loads((folder / "pack" / "manifest.json").read_text())
    rows = sum(split["rows"] for split in manifest["splits"].values())
    shutil.rmtree(work)
    return {
        "seconds": {**record["seconds"], "load": answering - delivered},
        "total": answering - start,
        "rows": rows,
        "version": version,
        "passed": record["passed"],
    }


def _score(stream: Stream, kept: Path, day: int) -> None:
    """Ask the versions that serve after `day` for the day after it."""
    file = kept / f"scores-{day:02d}.npz"
    if file.exists():
        return
    support, query, slices = stream.next_rows(day + 1)
    found = {side: scored(f"{kept / side}/current", support, query) for side in SIDES}
    found["first"] = scored(f"{kept / 'first'}/current", support, query)
    partial = file.with_suffix(".partial.npz")
    np.savez(partial, **columns(stream, query, slices), **found)
    partial.rename(file)


@dataclass(frozen=True)
class Slice:
    """What both sides scored on a slice, over days and seeds, and the paired difference warm - full."""

    name: str
    metric: str
    rows: int
    values: dict[str, float]
    difference: tuple[float, float, float]  # mean, low and high end of the 95 % interval


def compare(kept: Sequence[Path], days: range) -> list[Slice]:
    """Return the metrics of both sides by slice: means over days and seeds; tasks are drawn with replacement, each with
    all of its rows.
    """
    loaded = {
        (seed, day): dict(np.load(folder / f"scores-{day:02d}.npz")) for seed, folder in enumerate(kept) for day in days
    }
    keys = [f"{seed}|{task}" for (seed, _), one in loaded.items() for task in one["task"]]
    tasks, index = np.unique(np.array(keys), return_inverse=True)
    ends = np.cumsum([len(one["task"]) for one in loaded.values()])
    of_day = dict(zip(loaded, np.split(index, ends[:-1]), strict=True))
    found = []
    for name in ("all", *SLICES):
        parts = {key: _rows(one, of_day[key], name) for key, one in loaded.items()}
        used = {key: part for key, part in parts.items() if part is not None}
        if used:
            found += [_compared(name, metric, used, len(tasks)) for metric in METRICS]
    return found


_Part = tuple[NDArray[Any], NDArray[Any], dict[str, NDArray[Any]]]


def _rows(one: dict[str, NDArray[Any]], task: NDArray[np.int64], name: str) -> _Part | None:
    chosen = np.full(len(task), True) if name == "all" else one["slice"] == name
    label = one["label"][chosen]
    if len(np.unique(label)) < 2:
        return None  # it has no AUC
    return task[chosen], label, {side: one[side][chosen] for side in (*SIDES, "first")}


def _compared(name: str, metric: str, parts: dict[tuple[int, int], _Part], num_tasks: int) -> Slice:
    bootstrap = Bootstrap(num_tasks, resamples=RESAMPLES, seed=0)
    for key, (task, label, scores) in parts.items():
        for side, score in scores.items():
            rows = replace(make_rows(score, label, task), task=task, num_tasks=num_tasks)
            bootstrap.add((*key, side), metric, rows)
    bootstrap.run()
    drawn = {side: np.stack([bootstrap.resampled((*key, side)).values for key in parts]) for side in (*SIDES, "first")}
    by_resample = np.nanmean(drawn["warm"] - drawn["full"], axis=0)
    low, high = np.quantile(by_resample[1:], [0.025, 0.975])
    return Slice(
        name,
        metric,
        sum(len(label) for _, label, _ in parts.values()),
        {side: float(values[:, 0].mean()) for side, values in drawn.items()},
        (float(by_resample[0]), float(low), float(high)),
    )


def costs(case: str, kept: Sequence[Path], days: range) -> tuple[list[Record], str]:
    """Return what deliveries took, by stage, and the ratio of the sums over all days."""
    found: dict[str, list[dict[str, Any]]] = {
        side: [json.loads((folder / f"{side}-{day:02d}.json").read_text()) for folder in kept for day in days]
        for side in SIDES
    }
    stages = list(found["full"][0]["seconds"])
    rows, records = [], []
    for stage in [*stages, "total"]:
        of_side = {
            side: [one["total"] if stage == "total" else one["seconds"].get(stage, 0.0) for one in ones]
            for side, ones in found.items()
        }
        sums = {side: sum(seconds) for side, seconds in of_side.items()}
        ratio = sums["full"] / sums["warm"] if sums["warm"] else float("nan")
        rows.append([stage, *(f"{median(of_side[side]):.2f}" for side in SIDES), f"{ratio:.1f}"])
        records += [Record(case, side, f"{stage}_s", median(of_side[side]), "s") for side in SIDES]
    records.append(Record(case, "warm", "speedup_over_full", float(rows[-1][-1]), "x"))
    by_seed = [_speedup(found, number, len(days)) for number in range(len(kept))]
    trained = {side: median([one["rows"] for one in ones]) for side, ones in found.items()}
    refused = {side: sum(not one["passed"] for one in ones) for side, ones in found.items()}
    said = (
        f"Seconds from closed data to the first answer of the new version, medians of {len(found['full'])} deliveries "
        f"a side; the ratio is of the sums. By seed: {', '.join(f'{ratio:.1f}' for ratio in by_seed)}. Rows of a pack: "
        f"{trained['full']:,.0f} and {trained['warm']:,.0f}. Refused by the gate: {refused['full']}, {refused['warm']}."
    )
    return records, "\n\n".join([table(["stage", *SIDES, "full / warm"], rows), said])


def _speedup(found: dict[str, list[dict[str, Any]]], seed: int, days: int) -> float:
    of_seed = slice(seed * days, (seed + 1) * days)
    sums = {side: sum(one["total"] for one in ones[of_seed]) for side, ones in found.items()}
    return sums["full"] / sums["warm"]


def quality(case: str, kept: Sequence[Path], days: range) -> tuple[list[Record], str]:
    """Return what the versions predict of the day after, by slice."""
    rows, records = [], []
    for one in compare(kept, days):
        mean, low, high = one.difference
        records += [Record(case, side, f"{one.metric} {one.name}", value, "1") for side, value in one.values.items()]
        records += [
            Record(case, "warm", f"{one.metric}_difference {one.name}", mean, "1"),
            Record(
                case,
                "warm",
                f"{one.metric}_difference_{'low' if one.metric == 'auc' else 'high'} {one.name}",
                low if one.metric == "auc" else high,
                "1",
            ),
        ]
        verdict = "too few rows" if one.rows < MIN_ROWS else ""
        if one.metric == "auc" and one.rows >= MIN_ROWS:
            verdict = "within" if low >= MARGIN else "NOT within"
        values = [f"{one.values[side]:.4f}" for side in ("first", *SIDES)]
        rows.append(
            [one.name, one.metric, f"{one.rows:,}", *values, f"{mean:+.4f}", f"{low:+.4f} … {high:+.4f}", verdict]
        )
    header = [
        "slice",
        "metric",
        "query rows",
        "first version",
        *SIDES,
        "warm - full",
        "95 % over tasks",
        f"{MARGIN} of AUC",
    ]
    return records, table(header, rows)


def run(args: argparse.Namespace, scale: Scale, folder: Path) -> Iterator[tuple[str, list[Record], str]]:
    """Yield the name, the records and the text of each case."""
    days = range(scale.base, scale.base + scale.days)
    for case in args.case:
        if case == "ml-100k" and not (DATA / "ml-100k").is_dir():
            print(f"ml-100k is left out: {DATA / 'ml-100k'} does not exist; set GMETA_DATA to the data's folder")
            continue
        seeds = range(1 if case == "ml-100k" else args.seeds or scale.seeds)
        os.environ["OMP_NUM_THREADS"] = "1"
        with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
            kept = list(pool.map(run_seed, *zip(*((case, seed, scale, folder) for seed in seeds), strict=True)))
        deltas = sizes(case, [one for folder in kept for one in measured(folder / "warm")])
        parts = [costs(case, kept, days), quality(case, kept, days), deltas]
        yield case, [record for records, _ in parts for record in records], "\n\n".join(text for _, text in parts)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Full retraining and warm start, ten days in a row.")
    parser.add_argument("--quick", action="store_true", help="two small days of one seed; writes no result files")
    add_json(parser)
    parser.add_argument("--folder", type=Path, help="keep what is done here, and go on from it")
    parser.add_argument("--seeds", type=int, help="seeds of the stream, 0 to N - 1; 3 when unset")
    parser.add_argument("--days", type=int, help="days to deliver; 10 when unset")
    parser.add_argument("--jobs", type=int, default=2, help="seeds run at a time, one thread each")
    parser.add_argument("--case", nargs="+", choices=("stream", "ml-100k", ITEMS), default=["stream", "ml-100k"])
    args = parse(parser)
    if ITEMS in args.case and (args.case != [ITEMS] or args.folder or args.seeds or args.days):
        parser.error(f"--case {ITEMS} goes alone: it has results of its own, one seed, and days of its own")
    return args


def publish_items(args: argparse.Namespace) -> None:
    """Measure the case `items`, and publish it beside the other cases' results."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        records, text = deliver_few_items(Path(scratch), quick=args.quick)
    config = {"scale": QUICK_ITEMS if args.quick else FEW_ITEMS, "threads": "1"}
    publish("delivery_items", text, records, config, args)


def main() -> None:
    args = options()
    if args.case == [ITEMS]:
        publish_items(args)
        return
    scale = QUICK if args.quick else FULL
    scale = replace(scale, days=args.days or scale.days)
    with tempfile.TemporaryDirectory() as scratch:
        found = list(run(args, scale, args.folder or Path(scratch)))
    bodies = [f"## {case}\n\n{text}" for case, _, text in found]
    if args.quick:
        bodies.insert(0, "QUICK: two small days of one seed; the numbers say only that everything runs.")
    config = {
        "scale": scale,
        "settings": json.dumps(SETTINGS),
        "intervals": f"{RESAMPLES} bootstrap resamples of the users, paired; means over days and seeds",
        "threads": f"1 a process, {args.jobs} processes at a time",
    }
    publish("delivery", "\n\n".join(bodies), [record for _, records, _ in found for record in records], config, args)


if __name__ == "__main__":
    main()
