"""What adaptation buys on real ratings and clicks of cold users, over seeds, beside plain training and means.

    python benchmarks/quality.py [--quick] [--json FILE] [--seeds N] [--jobs N] [--case NAME] [--folder DIR]

With `--folder` every seed's predictions are kept there when they are made, and not made again: an end in between
costs the seeds that were running.

Everything runs through the commands and the files in examples/ that users run: prepare, train, train again with
`meta.adapt: []` (plain), evaluate. A seed sets the random query rows, where they are random, the split of users, where
it is random, the initialisation and the order. A rating model has two plain twins: one with its own loss, and one with
the Huber loss (`plain-huber`), which predicts means and so fine-tunes better than one that predicts medians.

Data is read from GMETA_DATA (default ../shared/data); a case without its data is left out, and says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from common import DATA, ROOT, Record, add_json, gmeta, parse, publish, table
from numpy.typing import NDArray

from gmeta.core.files import replacing
from gmeta.evaluation.baselines import BASELINES
from gmeta.evaluation.metrics import HIGHER_IS_BETTER, Bootstrap, Rows

UNITS = {"mae": "label", "logloss": "nat"}
RESAMPLES = 1000
ROUNDED = ("-after", "-finetuned", "factor-analysis", "+task-bias")
"""Ends of the names of variants that are measured in whole stars too, which a mean absolute error favours."""
EARLY = ("--schedule.patience", "4")  # plain training ends when the valid metric no longer improves


@dataclass(frozen=True)
class Case:
    """A data set, the models trained on it, and what is measured; the first metric is the one compared."""

    name: str
    folder: str  # in DATA
    prepare: str  # in examples/
    models: dict[str, str]  # model -> its config in examples/
    plain: dict[str, tuple[str, ...]]  # plain twin -> what it is trained with besides `meta.adapt: []`
    metrics: tuple[str, ...]


CASES = (
    Case(
        name="ml-1m-melu/user_item_cold",
        folder="ml-1m-subset",
        prepare="ml-1m-melu-prepare.yaml",
        models={
            "neural_linear": "ml-1m-melu-neural-linear.yaml",
            "taste": "ml-1m-melu.yaml",
            "melu": "ml-1m-melu-own-features.yaml",
        },
        plain={"plain": EARLY, "plain-huber": ("--loss", "huber", *EARLY)},
        metrics=("mae",),
    ),
    Case(
        name="ml-100k/user_cold",
        folder="ml-100k",
        prepare="ml-100k-prepare.yaml",
        models={"neural_linear": "ml-100k-neural-linear.yaml", "taste": "ml-100k.yaml"},
        plain={"plain": EARLY},
        metrics=("auc", "gauc", "logloss"),
    ),
)


@dataclass(frozen=True)
class Outcome:
    """Test query rows of one seed: the user and the label of each, and what every variant predicts.

    Ranking metrics sort by `ranking`: by logits, and by baselines before they are clipped.
    """

    user: NDArray[np.str_]
    label: NDArray[np.float64]
    scores: dict[str, NDArray[np.float64]]
    ranking: dict[str, NDArray[np.float64]]


def kept_seed(kept: Path, case: Case, seed: int, folder: Path, extra: Sequence[str]) -> Outcome:
    """Run a seed, or read what was kept of it. The file names the configs, of which each must be as it was."""
    configs = "".join((ROOT / "examples" / name).read_text() for name in (case.prepare, *case.models.values()))
    name = f"{case.name} {case.models} {case.plain} {configs}"
    file = kept / f"{case.folder}-{seed}-{hashlib.sha256(name.encode()).hexdigest()[:12]}.npz"
    if not file.exists():
        outcome = run_seed(case, seed, folder, extra)
        file.parent.mkdir(parents=True, exist_ok=True)
        columns = {f"scores/{name}": values for name, values in outcome.scores.items()}
        columns |= {f"ranking/{name}": values for name, values in outcome.ranking.items()}
        with replacing(file) as partial, partial.open("wb") as out:
            np.savez_compressed(out, user=outcome.user, label=outcome.label, **columns)
    with np.load(file) as found:
        scores, ranking = (
            {key.partition("/")[2]: found[key] for key in found.files if key.startswith(kind)}
            for kind in ("scores/", "ranking/")
        )
        return Outcome(found["user"], found["label"], scores, ranking)


def run_seed(case: Case, seed: int, folder: Path, extra: Sequence[str]) -> Outcome:
    """Prepare, train and evaluate everything of one seed; `extra` are options of every training."""
    pack, number = folder / "pack", ("--seed", str(seed))
    examples = ROOT / "examples"
    gmeta("prepare", "--config", examples / case.prepare, "--root", DATA / case.folder, "--out", pack, *number)
    scores: dict[str, NDArray[np.float64]] = {}
    ranking: dict[str, NDArray[np.float64]] = {}
    found: dict[str, list[Any]] = {}
    for model, config in case.models.items():
        meta = folder / model
        train = ("train", "--config", examples / config, "--pack", pack, *number, *extra)
        gmeta(*train, "--run_dir", meta)
        for twin, options in case.plain.items():
            plain = folder / f"{model}-{twin}"
            gmeta(*train, "--run_dir", plain, "--meta.adapt", "[]", *options)
            gmeta("evaluate", "--run_dir", meta, "--plain_run", plain, "--resamples", 1)
            found = pq.read_table(meta / "predictions.parquet").to_pydict()
            names = {"plain": twin, "plain-finetuned": f"{twin}-finetuned", "before": "before", "after": "after"}
            named = {f"{model}-{name}": key for key, name in names.items()} | {name: name for name in BASELINES}
            scores |= {name: np.array(found[key]) for name, key in named.items()}
            ranking |= {name: np.array(found.get(f"{key}.ranking", found[key])) for name, key in named.items()}
    if "mae" in case.metrics:
        scores |= {f"{name}-rounded": np.rint(scores[name]) for name in scores if name.endswith(ROUNDED)}
        ranking |= {name: scores[name] for name in scores if name not in ranking}
    tasks = pq.read_table(pack / "tasks.parquet").to_pydict()
    key = dict(zip(tasks["task_id"], tasks["key"], strict=True))
    user = np.array([str(key[task]) for task in found["task_id"]])
    print(f"{case.name}, seed {seed}: done", flush=True)
    return Outcome(user, np.array(found["label"], np.float64), scores, ranking)


@dataclass(frozen=True)
class Difference:
    """The difference of a model after adaptation to another variant: mean over seeds, interval over test users."""

    variant: str
    against: str
    metric: str
    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Return the interval in words."""
        if self.low <= 0 <= self.high:
            return "does NOT beat it: within the interval"
        better = (self.value > 0) == (self.metric in HIGHER_IS_BETTER)
        return "beats it" if better else "does NOT beat it: it is worse"


def measure(case: Case, outcomes: Sequence[Outcome]) -> tuple[list[Record], list[Difference]]:
    """Return every variant's metrics, mean and standard deviation over seeds, and the paired differences.

    Intervals are of the mean over seeds: users are drawn with replacement, each with their rows of all seeds and of
    both variants.
    """
    users = np.unique(np.concatenate([o.user for o in outcomes]))
    variants = list(outcomes[0].scores)
    bootstrap = Bootstrap(len(users), resamples=RESAMPLES, seed=0)
    for seed, outcome in enumerate(outcomes):
        index = np.searchsorted(users, outcome.user)
        for variant in variants:
            score, ranking = (of[variant].astype(np.float64) for of in (outcome.scores, outcome.ranking))
            rows = Rows(score, outcome.label, index, len(users), ranking)
            for metric in case.metrics:
                bootstrap.add((seed, variant, metric), metric, rows)
    bootstrap.run()
    records, differences = [], []
    for metric in case.metrics:
        drawn = {
            v: np.stack([bootstrap.resampled((s, v, metric)).values for s in range(len(outcomes))]) for v in variants
        }
        for variant in variants:
            values = drawn[variant][:, 0].tolist()
            unit = UNITS.get(metric, "1")
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            records.append(Record(case.name, variant, metric, statistics.mean(values), unit))
            records.append(Record(case.name, variant, f"{metric}_std", spread, unit))
        for model in case.models:
            after = f"{model}-after"
            plain = {v: v.removesuffix("-rounded") for v in variants}
            others = [v for v in variants if plain[v] in BASELINES or (v.startswith(f"{model}-") and plain[v] != after)]
            for other in others:
                resampled = (drawn[after] - drawn[other]).mean(0)
                low, high = np.quantile(resampled[1:], [0.025, 0.975])
                differences.append(Difference(after, other, metric, float(resampled[0]), float(low), float(high)))
    return records, differences


def render(case: Case, records: Sequence[Record], differences: Sequence[Difference]) -> str:
    """Return the case in Markdown: values, then differences with a verdict each."""
    values = {(r.variant, r.metric): r.value for r in records}
    variants = list(dict.fromkeys(r.variant for r in records))
    rows = [
        [v, *(f"{values[v, m]:.4f} ± {values[v, m + '_std']:.4f}" for m in case.metrics)]
        for v in sorted(variants, key=lambda v: (v.removesuffix("-rounded") in BASELINES, v))
    ]
    compared = [
        [d.metric, f"{d.variant} − {d.against}", f"{d.value:+.4f}", f"{d.low:+.4f} … {d.high:+.4f}", d.verdict]
        for d in differences
    ]
    return "\n\n".join(
        [
            f"## {case.name}",
            table(["variant", *case.metrics], rows),
            table(["metric", "difference", "mean over seeds", "95 % over users", "after"], compared),
            _in_words(case, differences),
        ]
    )


def _in_words(case: Case, differences: Sequence[Difference]) -> str:
    lines = []
    for model in case.models:
        for metric in case.metrics:
            mine = [d for d in differences if d.variant == f"{model}-after" and d.metric == metric]
            lost = [d.against for d in mine if d.verdict != "beats it"]
            said = f"does NOT beat {', '.join(lost)}" if lost else "beats all of them"
            lines.append(f"- {model}, {metric}: after adaptation it {said} outside the 95 % interval.")
    return "\n".join(lines)


def _first(entries: dict[str, Any]) -> dict[str, Any]:
    return dict(list(entries.items())[:1])


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Quality on cold users of real data, over seeds.")
    parser.add_argument("--quick", action="store_true", help="one seed, one model, 20 steps; writes no result files")
    add_json(parser)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N - 1")
    parser.add_argument("--jobs", type=int, default=2, help="seeds run at a time, one thread each")
    parser.add_argument("--folder", type=Path, help="keep what is done here, and go on from it")
    parser.add_argument("--case", choices=[case.name for case in CASES], help="only this one")
    return parse(parser)


def main() -> None:
    args = options()
    cases = [case for case in CASES if args.case in (None, case.name)]
    present = [case for case in cases if (DATA / case.folder).is_dir()]
    for case in cases:
        if case not in present:
            print(f"{case.name} is left out: {DATA / case.folder} does not exist; set GMETA_DATA to the data's folder")
    if not present:
        return
    seeds = 1 if args.quick else args.seeds
    if args.quick:
        present = [replace(c, models=_first(c.models), plain=_first(c.plain)) for c in present]
    extra = ("--schedule.max_steps", "20", "--dense.warmup_steps", "5") if args.quick else ()
    bodies, records = [], []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(args.jobs) as pool:
        kept = Path(scratch) if args.folder is None or args.quick else args.folder
        started = {
            (case.name, seed): pool.submit(kept_seed, kept, case, seed, Path(scratch) / case.folder / str(seed), extra)
            for seed in range(seeds)
            for case in present
        }
        for case in present:
            found, differences = measure(case, [started[case.name, seed].result() for seed in range(seeds)])
            records += found
            bodies.append(render(case, found, differences))
    if args.quick:
        bodies.insert(0, "QUICK: one seed, one model, 20 steps a training; the numbers say only that everything runs.")
    config = {
        "seeds": seeds,
        "values": "mean ± standard deviation over seeds",
        "intervals": f"{RESAMPLES} bootstrap resamples of the test users, of the mean over seeds, paired",
        "threads": "1 a process",
        "configs": json.dumps({case.name: [case.prepare, *case.models.values()] for case in present}),
    }
    publish("quality", "\n\n".join(bodies), records, config, args)


if __name__ == "__main__":
    main()
