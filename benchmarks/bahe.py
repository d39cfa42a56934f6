"""BAHE beside its all-token twins on the titles of MovieLens-1M (`ml-1m-ctr`, encoder all-MiniLM-L6-v2).

    python benchmarks/bahe.py --folder runs/bahe                      all of it; the same command goes on after a stop
    python benchmarks/bahe.py --folder runs/bahe --part steps         time and memory of a step; wants a quiet machine
    python benchmarks/bahe.py --folder runs/bahe --part quality       AUC of trainings, cell by cell
    python benchmarks/bahe.py --quick

Twins have the same trained layers and head, in the same trainer, and differ in what the upper layers read: `behaviours`
(in the quality part `bahe`) kept vectors; `batch` the same, encoded in each step, each distinct text of the batch once;
`states` kept states of all tokens; `tokens` all tokens of a history behind each other, through all layers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import Record, parse, publish, table
from scipy.stats import t
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from text.kept_cells import asked_for, cell_parser, encoder_beside, in_words, over_seeds
from text.quality import TEXTS, Cell, measures, run_cell
from text.rows import FOLDER, NUMBERS, RATES, Rows, read_rows
from text.steps import BATCH, StepCase, measure

SPLITS = (2, 3, 4)
LENGTHS = (10, 50, 100)
DAY_LENGTHS = (10, 50, 100, 400)
DAY_HISTORIES = 6


def main() -> int:
    """Run the parts that are asked for, and write their tables."""
    parser = cell_parser(__doc__, "one small case of each part; writes no result files")
    parser.add_argument("--part", choices=("steps", "day", "quality"), help="one part alone")
    args = parse(parser)
    encoder = encoder_beside(FOLDER)
    if encoder is None:
        return 0
    rows = read_rows()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        parts = (args.part,) if args.part else ("steps", "day", "quality")
        for part in parts:
            {"steps": _steps, "day": _day, "quality": _quality}[part](rows, folder, encoder, args)
    return 0


def _histories(rows: Rows, titles: int, histories: int = 1) -> list[list[str]]:
    """Return BATCH random rows of full histories, the target's title last. Where a user has less, titles come again."""
    generator = np.random.default_rng(0)
    train = rows.of("train")
    long = [i for i in train if len(rows.history[i]) >= min(titles, 100)]
    picked = generator.choice(long, BATCH, replace=False)
    found = []
    for i in picked:
        own = rows.history[i]
        while len(own) < titles * histories:
            own = own + rows.history[int(generator.choice(long))]
        found.append([*own[-titles * histories :], rows.title[i]])
    return found


# ------------------------------------------------------------------------------------------ time and memory


def _steps(rows: Rows, folder: Path, encoder: str, args: argparse.Namespace) -> None:
    records, lines = [], []
    for layers in SPLITS if not args.quick else (3,):
        for titles in LENGTHS if not args.quick else (10,):
            case = StepCase(encoder, layers, titles, repetitions=1 if args.quick else 3)
            found = measure(case, _histories(rows, titles))
            records += _records(case.name, found)
            lines.append([case.name, *_line(found)])
    head = ["split, titles", "CPU s", "wall s", "MB", "batch CPU s", "tokens CPU s", "wall s", "MB"]
    body = table([*head, "tokens / behaviours: CPU", "wall", "memory", "batch / behaviours: CPU"], lines)
    publish("bahe_steps", body, records, _facts(encoder, batch=BATCH), args)


def _line(found: dict[str, dict[str, float]]) -> list[str]:
    ours, anew, tokens = (found[name] for name in ("behaviours", "batch", "tokens"))
    return [
        f"{ours['cpu_s']:.3f}",
        f"{ours['wall_s']:.3f}",
        f"{ours['peak_mb']:.0f}",
        f"{anew['cpu_s']:.3f}",
        f"{tokens['cpu_s']:.3f}",
        f"{tokens['wall_s']:.3f}",
        f"{tokens['peak_mb']:.0f}",
        f"{tokens['cpu_s'] / ours['cpu_s']:.1f}",
        f"{tokens['wall_s'] / ours['wall_s']:.1f}",
        f"{tokens['peak_mb'] / ours['peak_mb']:.1f}",
        f"{anew['cpu_s'] / ours['cpu_s']:.1f}",
    ]


def _records(case: str, found: dict[str, dict[str, float]]) -> list[Record]:
    units = {"cpu_s": "s", "wall_s": "s", "peak_mb": "MB"}
    records = [Record(case, name, key, value, units[key]) for name, of in found.items() for key, value in of.items()]
    ours = found["behaviours"]
    for name in found:
        if name != "behaviours":
            records.append(Record(case, name, "time_ratio", found[name]["cpu_s"] / ours["cpu_s"], "x"))
            records.append(Record(case, name, "wall_ratio", found[name]["wall_s"] / ours["wall_s"], "x"))
            if "peak_mb" in ours:
                records.append(Record(case, name, "memory_ratio", found[name]["peak_mb"] / ours["peak_mb"], "x"))
    return records


def _day(rows: Rows, folder: Path, encoder: str, args: argparse.Namespace) -> None:
    """Measure rows a second as histories grow, six of them a row; all tokens as far as a step ends within seconds."""
    records, lines = [], []
    for titles in DAY_LENGTHS if not args.quick else (10,):
        variants = ("behaviours", "tokens") if titles <= 10 else ("behaviours",)
        case = StepCase(encoder, 3, titles, DAY_HISTORIES, repetitions=1 if args.quick else 3)
        found = measure(case, _histories(rows, titles, DAY_HISTORIES), variants, memory=False)
        rates = {name: BATCH / of["cpu_s"] for name, of in found.items()}
        records += [Record(case.name, name, "rows_per_cpu_s", rate, "1/s") for name, rate in rates.items()]
        records += _records(case.name, found)
        tokens = f"{rates['tokens']:.2f}" if "tokens" in rates else "-"
        ratio = f"{rates['behaviours'] / rates['tokens']:.1f}" if "tokens" in rates else "-"
        lines.append([str(titles), f"{rates['behaviours']:.1f}", tokens, ratio])
    head = ["titles in each of 6 histories", "behaviours, rows a CPU s", "tokens, rows a CPU s", "ratio"]
    publish("bahe_day", table(head, lines), records, _facts(encoder, split="3/3", batch=BATCH), args)


# ------------------------------------------------------------------------------------------------- quality


TWINS: dict[str, dict[str, Any]] = {
    "bahe": {"encode": "behaviours"},
    "states": {"encode": "states"},
    "tokens": {"encode": "tokens"},
    "refresh": {"refresh": 50},
}
"""Variant -> what its upper layers read, and whether those below are trained too."""
TEXT = {"layers": 5, "dropout": 0.2}
OPTIONS: dict[str, dict[str, Any]] = {
    "k=4": {"layers": 4},
    "k=3": {"layers": 3},
    "2 vectors": {"vectors": 2},
    "4 vectors": {"vectors": 4},
    "LoRA": {"tune": "lora"},
    "target attention": {"user": "target"},
    "gated ids": {"ids": True},
}
"""What the twin of kept vectors is changed in."""
LEARNING: dict[str, dict[str, Any]] = {"lr 3e-4": {"lr": 3e-4}, "9 passes": {"epochs": 9}}
"""How the same twin learns otherwise."""
LONG = {**TEXT, "history_dropout": 0.5, "hidden": [256, 64]}
"""On all rows. Without leaving histories out in training the head learns users by heart, and new ones suffer."""
ADAPTED = ("--meta.adapt", "[last_layer]", "--loader.max_support_rows", "100", "--schedule.eval_every", "5")
WITH_IDS = (*TEXTS, "iid")


def cells(quick: bool) -> list[Cell]:
    """Return all trainings. Twins read titles alone, see the same 6,000 rows in the same order, and choose nothing."""
    if quick:
        return [Cell(name, 0, train_rows=600, epochs=1, args={**TEXT, **TWINS[name]}) for name in ("bahe", "states")]
    found = [_short(name, seed, TWINS[name]) for seed in range(3) for name in TWINS]
    found += [_short(name, 0, TWINS[name], titles=20) for name in ("bahe", "tokens", "refresh")]
    found += [_short(name, 0, TWINS["bahe"], **learning) for name, learning in LEARNING.items()]
    found += [_short(n, 0, more, features=WITH_IDS if "ids" in more else TEXTS) for n, more in OPTIONS.items()]
    for seed in range(3):
        of = {"epochs": 5, "lr": 3e-4, "words": ("--dense.decay", "cosine"), "bundled": True}
        found.append(Cell("text", seed, args=LONG, **of))
        found.append(Cell("text, rates, ids", seed, features=WITH_IDS, numeric=RATES, args=LONG, **of))
        found.append(Cell("text, rates, co-likes, ids", seed, features=WITH_IDS, numeric=NUMBERS, args=LONG, **of))
        adapted = {"by_user": True, "lr": 1e-4, "epochs": 1, "words": ADAPTED, "args": {**LONG, "taste": 8}}
        found.append(Cell("text, adapted", seed, start="text", **adapted))
        of = {"features": WITH_IDS, "numeric": RATES, "start": "text, rates, ids"}
        found.append(Cell("text, rates, ids, adapted", seed, **of, **adapted))
        found.append(Cell("ids, adapted", seed, by_user=True, model="", features=("iid",)))
    return found


def _short(variant: str, seed: int, args: dict[str, Any], **more: Any) -> Cell:
    """Return a training on 6,000 rows, which is measured at its end alone."""
    of = {"train_rows": 6000, "epochs": 3, "lr": 1e-4, "words": ("--schedule.eval_every", "10000"), **more}
    return Cell(variant, seed, args={**TEXT, **args}, **of)


def _quality(rows: Rows, folder: Path, encoder: str, args: argparse.Namespace) -> None:
    judged: dict[tuple[str, int, int], dict[int, dict[str, float]]] = {}
    judge = rows.of("judge")

    def measured(score: np.ndarray) -> dict[str, float]:
        return measures(score, rows.label[judge], rows.uid[judge], rows, judge)

    floor, later = measured(rows.floor[judge]), measured(rows.floor_of_all[judge])
    of_rates = {name: measured(score) for name, score in _fits(rows)}
    spent: dict[tuple[str, int, int], list[float]] = {}
    for cell, kept in asked_for(cells(args.quick), folder, args):
        found = kept or run_cell(cell, rows, folder, encoder)
        for name, of in found["judged"].items():
            key = (cell.variant if name == "after" else f"{cell.variant}, before", cell.titles, cell.train_rows)
            judged.setdefault(key, {})[cell.seed] = of
            spent.setdefault(key, []).append(found["cpu_s"])
    lines = [_row("floor", "-", "-", [floor], [0.0])]
    lines.append(_row("floor, with the choosing rows too", "-", "-", [later], [0.0]))
    lines += [_row(name, "-", "all", [of], [0.0]) for name, of in of_rates.items()]
    lines += [_row(n, str(m), str(r or "all"), [*of.values()], spent[n, m, r]) for (n, m, r), of in judged.items()]
    floors = {"floor": floor, "floor, adapted": later, **of_rates}
    records = [Record("ml-1m-ctr", name, key, value, "") for name, of in floors.items() for key, value in of.items()]
    for (name, titles, train_rows), of_seeds in judged.items():
        case, every = f"{train_rows or 'all'} rows, {titles} titles", [*of_seeds.values()]
        for key in every[0]:
            records.append(Record(case, name, key, float(np.mean([of[key] for of in every if key in of])), ""))
    head = ["variant", "titles", "training rows", "seeds", "AUC", "within users", "film known", "film new", "user new"]
    body = table([*head, "CPU s"], lines)
    beside = table(["variant - tokens", "titles", "training rows", "seeds", "AUC", "within users"], _twins(judged))
    publish("bahe_quality", f"{body}\n\n{beside}", records, _facts(encoder), args)


def _twins(judged: dict[tuple[str, int, int], dict[int, dict[str, float]]]) -> list[list[str]]:
    """Return lines of differences to the twin of all tokens by seed: mean, and the 95 % interval of Student's t."""
    lines = []
    for (name, titles, train_rows), of_seeds in judged.items():
        tokens = judged.get(("tokens", titles, train_rows), {})
        seeds = sorted(of_seeds.keys() & tokens)
        if name != "tokens" and len(seeds) > 1:
            told = [_interval([of_seeds[s][key] - tokens[s][key] for s in seeds]) for key in ("auc", "uauc")]
            lines.append([name, str(titles), str(train_rows), str(len(seeds)), *told])
    return lines


def _interval(gains: list[float]) -> str:
    half = t.ppf(0.975, len(gains) - 1) * np.std(gains, ddof=1) / np.sqrt(len(gains))
    mean = float(np.mean(gains))
    return in_words(mean, mean - half, mean + half)


def _fits(rows: Rows) -> Iterator[tuple[str, np.ndarray]]:
    """Yield baselines and their scores of the judging rows: fits of the numbers of the training rows."""
    train, judge = rows.of("train"), rows.of("judge")
    fits = {
        "logistic regression": make_pipeline(StandardScaler(), LogisticRegression()),
        "boosted trees": HistGradientBoostingClassifier(learning_rate=0.05, max_leaf_nodes=15, random_state=0),
    }
    for read, columns in (("rates", len(RATES)), ("rates, co-likes", len(NUMBERS))):
        numbers = rows.numbers[:, :columns]
        for name, fit in fits.items():
            fit.fit(numbers[train], rows.label[train])
            yield f"{read}, {name}", fit.predict_proba(numbers[judge])[:, 1]


def _row(name: str, titles: str, train_rows: str, every: list[dict[str, float]], spent: list[float]) -> list[str]:
    keys = ("auc", "uauc", "auc warm item", "auc cold item", "auc cold user")
    told = [over_seeds([of[key] for of in every if key in of]) for key in keys]
    known = [seconds for seconds in spent if seconds]
    return [name, titles, train_rows, str(len(every)), *told, f"{np.mean(known):.0f}" if known else "-"]


def _facts(encoder: str, **more: Any) -> dict[str, Any]:
    return {"encoder": Path(encoder).parent.name, "data": FOLDER, "threads": 1, **more}


if __name__ == "__main__":
    sys.exit(main())
