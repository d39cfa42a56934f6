"""Where rows of new items should begin in a warm start: made of attributes, as the row of unknown items, or at random.

    python benchmarks/first_rows.py [--quick] [--json FILE]

A synthetic shop: an item's vector is that of its genre, of its brand, and something of its own; a user clicks where it
suits his taste. A base model is trained on the items of day 0. On day 1, three items in ten are new. Other users of
that day give the test: their first half is the support, and the other half is scored, apart for new and for old items:
before any training on day 1, and after one pass and five over its rows. The base is trained with a generator
(`embedding.generator`) and without.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from common import Record, arguments, here, publish, table
from numpy.typing import NDArray

import gmeta
from gmeta.evaluation.metrics import auc, logloss

FLOATS = NDArray[np.float64]
WIDTH, GENRES, BRANDS = 6, 12, 40
OLD_ITEMS, NEW_ITEMS, ROWS = 420, 180, 40
USERS = {"base": 2000, "day": 400, "test": 1000}
SHARE_OF_ITS_OWN = 0.5  # of an item's deviation
SEEDS = 3
REFERENCE = "oov, no generator"
MODEL = ("--model.name", "melu", "--model.args.hidden", "[32]", "--model.embedding_dim", 12)
TRAINING = ("--embedding.id_dropout", 0.05, "--loader.tasks_per_batch", 32, "--schedule.eval_every", 10**6)
GENERATOR = ("--embedding.generator", "{item: [genre, brand]}")
STARTS = {"generator": ("generated", "oov", "random"), "no generator": ("oov", "random")}
MOMENTS = {
    "before": ("--schedule.max_steps", 1, "--dense.lr", 0, "--embedding.lr", 0),
    "1 pass": ("--schedule.epochs", 1),
    "5 passes": ("--schedule.epochs", 5),
}
METRICS: dict[str, Callable[[FLOATS, FLOATS], float]] = {"auc": auc, "logloss": logloss}


@dataclass(frozen=True)
class Shop:
    """The truth: what users and items are like."""

    rng: np.random.Generator
    genre: NDArray[np.int64]  # [items]
    brand: NDArray[np.int64]  # [items]
    vectors: FLOATS  # [items, WIDTH]
    bias: FLOATS  # [items]

    @staticmethod
    def of(seed: int) -> Shop:
        """Draw a shop."""
        rng, items = np.random.default_rng(seed), OLD_ITEMS + NEW_ITEMS
        genre, brand = rng.integers(0, GENRES, items), rng.integers(0, BRANDS, items)
        parts = [rng.normal(size=(n, WIDTH + 1)) for n in (GENRES, BRANDS, items)]
        shared, own = (1 - SHARE_OF_ITS_OWN) / 2, SHARE_OF_ITS_OWN
        all_of = shared**0.5 * (parts[0][genre] + parts[1][brand]) + own**0.5 * parts[2]
        return Shop(rng, genre, brand, all_of[:, :-1], all_of[:, -1])

    def log(self, name: str, items: int) -> pd.DataFrame:
        """Rows of users, each of whom meets ROWS of the first so many items, with the truth in column p."""
        users = np.repeat(np.arange(USERS[name]), ROWS)
        taste = self.rng.normal(size=(USERS[name], WIDTH))[users]
        item = self.rng.integers(0, items, len(users))
        p = 1 / (1 + np.exp(1 - self.bias[item] - (taste * self.vectors[item]).sum(1) / WIDTH**0.5))
        columns = {"user": [f"{name}{u}" for u in users], "at": np.tile(np.arange(ROWS), USERS[name])}
        words = {"item": item, "genre": self.genre[item], "brand": self.brand[item]}
        columns |= {key: [f"{key}{value}" for value in values] for key, values in words.items()}
        return pd.DataFrame(
            {**columns, "click": (self.rng.random(len(p)) < p).astype(int), "p": p, "is_new": item >= OLD_ITEMS}
        )


def prepare(place: Path, name: str, rows: pd.DataFrame) -> Path:
    rows.drop(columns=["p", "is_new"]).to_parquet(place / f"{name}.parquet")
    schema = {"task": "user", "label": "click", "time": "at", "item": "item", "categorical": ["item", "genre", "brand"]}
    (place / "schema.yaml").write_text(yaml.safe_dump(schema))
    words = ("--input", place / f"{name}.parquet", "--schema", place / "schema.yaml", "--out", place / name)
    here("prepare", *words, "--query_size", ROWS // 2)
    return place / name


def measured(seed: int, place: Path, epochs: int, moments: Sequence[str]) -> Iterator[tuple[str, str, str, str, float]]:
    """Yield (rows, variant, moment, metric, value) of one seed."""
    shop = Shop.of(seed)
    base, day, test = shop.log("base", OLD_ITEMS), *(shop.log(name, OLD_ITEMS + NEW_ITEMS) for name in ("day", "test"))
    packs = prepare(place, "base", base), prepare(place, "day", day)
    support, query = test[test["at"] < ROWS // 2], test[test["at"] >= ROWS // 2]

    def of(variant: str, moment: str, scores: FLOATS) -> Iterator[tuple[str, str, str, str, float]]:
        for rows, chosen in (("new items", query["is_new"].to_numpy()), ("old items", ~query["is_new"].to_numpy())):
            label = query["click"].to_numpy(np.float64)[chosen]
            yield from (
                (rows, variant, moment, name, measure(scores[chosen], label)) for name, measure in METRICS.items()
            )

    yield from of("truth", "before", query["p"].to_numpy())
    yield from of("base rate", "before", np.full(len(query), base["click"].mean()))
    means = base.groupby("genre")["click"].mean()
    yield from of("genre's rate", "before", query["genre"].map(means).to_numpy())
    for kind, starts in STARTS.items():
        run_dir, version = place / kind, place / f"{kind} version"
        more = GENERATOR if kind == "generator" else ()
        words = (*MODEL, *TRAINING, *more, "--schedule.epochs", epochs, "--seed", seed)
        here("train", "--pack", packs[0], "--run_dir", run_dir, *words)
        here("bundle", "--run_dir", run_dir, "--checkpoint", "last", "--out", version)
        for start in starts:
            for moment in moments:
                grown = place / f"{kind} {start} {moment}"
                words = ("--warm_start", version, "--embedding.new_rows", start, *MOMENTS[moment])
                here("train", "--pack", packs[1], "--run_dir", grown, *words)
                model = gmeta.load(grown, checkpoint="last")
                yield from of(f"{start}, {kind}", moment, model.adapt(support).predict(query))


Found = dict[tuple[str, str, str, str], list[float]]
"""(rows, variant, moment, metric) -> its value for each seed."""


def main() -> None:
    args = arguments("First rows of new ids in a warm start.")
    seeds, epochs, moments = (1, 1, ["before"]) if args.quick else (SEEDS, 8, list(MOMENTS))
    found: Found = {}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as place:
            for rows, variant, moment, metric, value in measured(seed, Path(place), epochs, moments):
                found.setdefault((rows, variant, moment, metric), []).append(value)
    differences = {
        (rows, variant, moment, f"{metric} difference"): [
            a - b for a, b in zip(values, found[rows, REFERENCE, moment, metric], strict=True)
        ]
        for (rows, variant, moment, metric), values in found.items()
        if variant.partition(", ")[2] and variant != REFERENCE
    }
    records = [
        Record(f"{rows}, {moment}", variant, metric, statistics.mean(values), "1")
        for (rows, variant, moment, metric), values in (found | differences).items()
    ]
    bodies = [
        f"Means of {seeds} seeds, ± their standard deviation: every seed is another shop. No training before, then "
        "passes over the rows of day 1."
    ]
    for rows in ("new items", "old items"):
        bodies += [f"## {rows}", _table(rows, found), f"Less {REFERENCE}, shop by shop:", _table(rows, differences)]
    config = {"users": USERS, "rows a user": ROWS, "items": f"{OLD_ITEMS} old, {NEW_ITEMS} new", "base epochs": epochs}
    config |= {"share of an item that its attributes do not tell": SHARE_OF_ITS_OWN, "threads": "1"}
    publish("first_rows", "\n\n".join(bodies), records, config, args)


def _table(rows: str, found: Found) -> str:
    variants = dict.fromkeys(variant for of, variant, _, _ in found if of == rows)
    columns = dict.fromkeys((metric, moment) for _, _, moment, metric in found)
    ordered = sorted(columns, key=lambda column: (column[0], list(MOMENTS).index(column[1])))

    def cell(variant: str, metric: str, moment: str) -> str:
        values = found.get((rows, variant, moment, metric))
        if values is None:
            return ""
        return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")

    lines = [[variant, *(cell(variant, *column) for column in ordered)] for variant in variants]
    return table(["first rows", *(f"{metric}, {moment}" for metric, moment in ordered)], lines)


if __name__ == "__main__":
    main()
