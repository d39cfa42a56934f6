"""Next items of three domains (`amazon-3domain`), leave-one-out, every target ranked among all items of its domain; and
of Office (`amazon-office`), trained on the histories of validation rows alone.

    python benchmarks/next_item.py --folder DIR                      all cells; the same command goes on after a stop
    python benchmarks/next_item.py --folder DIR --cells beauty-ids   those whose names begin so
    python benchmarks/next_item.py --quick

A cell is a training on one domain or on all three mixed, with ids, texts, or both; it is evaluated on test targets
beside popularity and item-kNN, which need no training. Settings and passes are chosen by the targets of valid. A last
training has these events among its own, and takes all passes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common import DATA, Record, gmeta, here, parse, publish, table
from text.kept_cells import asked_for, cell_parser, cpu_of, encoder_beside, in_words, keep_cell, over_seeds, place_of

FOLDER = "amazon-3domain"
DOMAINS = ("Beauty", "Sports", "Toys")
MIXED = "mixed"
OFFICE = "Office"
METRICS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "sampled_recall@10")
PAIRED = ("recall@10", "ndcg@10")
BASELINES = ("popularity", "item-knn", "last-item-knn")
RESAMPLES = 400


@dataclass(frozen=True)
class Cell:
    """One training. `args` are the model's, `words` those of `gmeta train` besides."""

    case: str  # a domain, or mixed
    variant: str
    seed: int = 0
    model: str = "sasrec"
    args: Mapping[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    last: bool = False

    @property
    def name(self) -> str:
        """Return the name of the cell's folder."""
        return f"{self.told.lower()}-{self.variant}-{self.seed}"

    @property
    def told(self) -> str:
        """Return the case with the training's kind, as tables name it."""
        return f"{self.case}, last training" if self.last else self.case


IDS = {"dropout": 0.5, "blocks": 1, "heads": 1, "similarity": "dot"}
TEXT = {"layers": 5, "hidden": [256], "dropout": 0.2, "ids": False}
BOTH = {**TEXT, "ids": True}
GATE = {**BOTH, "dropout": 0.3, "fusion": "gate"}
SETTINGS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "ids": ("sasrec", IDS, ("--schedule.epochs", "50")),
    "text": ("llmrec", TEXT, ("--schedule.epochs", "20", "--model.embedding_dim", "128")),
    "ids+text": ("llmrec", BOTH, ("--schedule.epochs", "40")),
    "ids+text, gate": ("llmrec", GATE, ("--schedule.epochs", "20", "--model.embedding_dim", "128")),
}
"""Variant -> model, its arguments, and words of `gmeta train`."""
OF_MIXED = {"ids": "20", "text": "14", "ids+text": "32", "ids+text, gate": "8"}
"""Variant -> passes over all three domains, which have 3.2 times the users: fewer, so that cells end."""
HIGH = {"layers": 4, "reader": "high", "ids": False, "dropout": 0.2, "similarity": "cosine"}
TUNED = ("--schedule.epochs", "5", "--dense.lr", "0.0003")
PUBLISHED = {"layers": 0, "reader": "tokens", "window": 10, "max_tokens": 40, "template": "{text}; ", "ids": False}
READERS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "text, upper layers": ({**HIGH, "tune": "full"}, TUNED),
    "text, upper layers by LoRA": ({**HIGH, "tune": "lora"}, TUNED),
    "text, upper layers frozen": ({**HIGH, "tune": "none"}, TUNED),
    "LLM-Rec as published, not converged": (
        {**PUBLISHED, "similarity": "dot"},
        (
            *("--dense.lr", "5e-5", "--dense.weight_decay", "1e-3", "--dense.clip_norm", "1"),
            *("--next_item.candidates", "960", "--next_item.each", "10", "--loader.tasks_per_batch", "16"),
            *("--schedule.max_steps", "60", "--schedule.eval_every", "100000"),
        ),
    ),
}
"""Other readers of texts -> arguments and words; on Beauty, with one seed."""


def cells(quick: bool) -> list[Cell]:
    """Return all trainings."""
    if quick:
        short = ("--schedule.max_steps", "20")
        return [Cell("Beauty", name, 0, *SETTINGS[name][:2], short) for name in ("ids", "text")]
    found = []
    for seed in range(3):
        for name in ("ids", "text", "ids+text"):
            found += [_cell(case, name, seed) for case in (*DOMAINS, MIXED)]
            model, args, words = SETTINGS[name]
            found.append(Cell("Beauty", name, seed, model, args, words, last=True))
            found.append(Cell(OFFICE, name, seed, model, args, (*words, "--schedule.eval_every", "56")))
    found += [_cell(case, "ids+text, gate", 0) for case in ("Beauty", MIXED)]
    for name, (args, words) in READERS.items():
        found.append(Cell("Beauty", name, 0, "llmrec", args, words))
    return found


def _cell(case: str, variant: str, seed: int) -> Cell:
    model, args, words = SETTINGS[variant]
    if case == MIXED:
        more = ("--schedule.epochs", OF_MIXED[variant], "--schedule.eval_every", "1815")
    else:
        more = ("--schedule.eval_every", "875")
    return Cell(case, variant, seed, model, args, (*words, *more))


def main() -> int:
    """Run the cells that are asked for, and write their table."""
    args = parse(cell_parser(__doc__, "20 steps of two cells; writes no result files"))
    encoder = encoder_beside(FOLDER)
    if encoder is None:
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        _run(args.folder or Path(temporary), encoder, args)
    return 0


def _run(folder: Path, encoder: str, args: argparse.Namespace) -> None:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell, kept in asked_for(cells(args.quick), folder, args):
        found.setdefault((cell.told, cell.variant), []).append(kept or _train(cell, folder, encoder))
    records, lines = [], []
    for case, variant, measured, cpu in _measured(found):
        records += [Record(case, variant, m, float(np.mean([of[m] for of in measured])), "") for m in METRICS]
        told = [over_seeds([of[metric] for of in measured]) for metric in METRICS]
        lines.append([case, variant, str(len(measured)), *told, cpu])
    head = ["targets", "variant", "seeds", *METRICS, "CPU s"]
    facts = {"data": FOLDER, "encoder": Path(encoder).parent.name, "threads": 1}
    differences = table(["targets", "how many", "variant", "against", *PAIRED], _differences(found, folder))
    publish("next_item", f"{table(head, sorted(lines))}\n\n{differences}", records, facts, args)


def _measured(
    found: Mapping[tuple[str, str], list[dict[str, Any]]],
) -> Iterator[tuple[str, str, list[dict[str, float]], str]]:
    """Yield targets, variant, what each seed measures of them, and CPU seconds. Baselines need no training."""
    told = set()
    for (case, variant), every in found.items():
        cpu = f"{np.mean([one['cpu_s'] for one in every]):.0f}"
        for slice_ in every[0]["measured"]:
            targets = _targets(case, slice_)
            if targets is None:
                continue
            yield targets, _told(variant, case), [one["measured"][slice_]["model"] for one in every], cpu
            for name in BASELINES:
                if (targets, case, name) not in told:
                    told.add((targets, case, name))
                    yield targets, _told(name, case), [every[0]["measured"][slice_][name]], "-"


def _told(variant: str, case: str) -> str:
    return f"{variant}, mixed" if case == MIXED else variant


def _targets(case: str, slice_: str) -> str | None:
    """Return the name of a run's slice among those of all runs; None where another slice has the same targets."""
    if case != MIXED and (slice_.startswith("scenario=") or slice_ == "one_domain"):
        return None
    if slice_.startswith("scenario="):
        return slice_.removeprefix("scenario=").lower()
    return case.lower() if slice_ == "all" else f"{case.lower()}, {slice_}"


def _train(cell: Cell, folder: Path, encoder: str) -> dict[str, Any]:
    """Train and evaluate a cell, and keep what it measures: slice -> variant -> metric, and CPU seconds."""
    place = place_of(cell, folder)
    shutil.rmtree(place, ignore_errors=True)
    run = place / "run"
    args = {"encoder": encoder, **cell.args} if cell.model == "llmrec" else dict(cell.args)
    words: list[object] = ["--pack", pack_of(folder, cell.case, last=cell.last), "--run_dir", run, "--seed", cell.seed]
    words += ["--model.name", cell.model, "--model.args", json.dumps(args), *cell.words]
    cpu = cpu_of("train", *words)
    gmeta("evaluate", "--run_dir", run, "--resamples", 10)
    measured: dict[str, dict[str, dict[str, float]]] = {}
    for record in json.loads((run / "evaluation.json").read_text())["records"]:
        measured.setdefault(record["case"], {}).setdefault(record["variant"], {})[record["metric"]] = record["value"]
    found = keep_cell(cell, folder, {"cpu_s": cpu, "measured": measured})
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return found


def pack_of(folder: Path, case: str, *, last: bool = False) -> Path:
    """Return the pack of a domain, of all three or of Office; it is made where it is not there."""
    out = folder / "packs" / Cell(case, "", last=last).told.lower()
    if not (out / "manifest.json").exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        data = "amazon-office" if case == OFFICE else FOLDER
        words = ["--domains", json.dumps([case])] if case in DOMAINS else []
        words += ["--holdout", "leave_last_out"] if last else []
        here("prepare", "--dataset", data, "--root", DATA / data, "--out", out, *words)
    return out


def _differences(found: Mapping[tuple[str, str], list[dict[str, Any]]], folder: Path) -> list[list[str]]:
    """Return lines of paired differences to ids of one domain: means over seeds, 95 % of resampled users.

    Of each domain, and of all three the targets that no training row has and those of users of several domains.
    """
    lines = []
    ids = {case: len(every) for (case, variant), every in found.items() if variant == "ids"}
    for domain in (*DOMAINS, MIXED):
        cases = DOMAINS if domain == MIXED else (domain,)
        if not all(case in ids for case in cases):
            continue
        base = pd.concat([_values(folder, case, "ids", ids[case]) for case in cases])
        for told, other in _others(found, folder, domain):
            both = base.merge(other, on=["scenario", "user", "item"], suffixes=("", ".other"))
            if len(both) != len(base):
                raise ValueError(f"{told} and ids have other targets: remove their folders, and run again")
            for name, mask in _slices(both, domain):
                if len(some := both[mask]):
                    lines.append([name, str(len(some)), told, "ids", *_paired(some)])
    return lines


def _others(
    found: Mapping[tuple[str, str], list[dict[str, Any]]], folder: Path, domain: str
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield what is compared with ids of a domain, and its targets; of all three also those that each has by itself."""
    for (case, variant), every in found.items():
        if case in (domain, MIXED) and (case, variant) != (domain, "ids"):
            yield _told(variant, case), _values(folder, case, variant, len(every))
    for variant in sorted({variant for _, variant in found} - {"ids"}) if domain == MIXED else ():
        if all((case, variant) in found for case in DOMAINS):
            parts = [_values(folder, case, variant, len(found[case, variant])) for case in DOMAINS]
            yield variant, pd.concat(parts)


def _slices(both: pd.DataFrame, domain: str) -> Iterator[tuple[str, pd.Series]]:
    if domain != MIXED:
        yield domain.lower(), both["item"].notna()
        return
    yield f"{MIXED}, target_unseen", both["popularity"] == "unseen"
    yield f"{MIXED}, several_domains", both["domains.other"] > 1


def _values(folder: Path, case: str, variant: str, seeds: int) -> pd.DataFrame:
    """Return the targets of a run with the metrics of its own ranks, means over seeds."""
    what = ["scenario", "user", "item", "popularity", "domains"]
    tables = []
    for seed in range(seeds):
        file = place_of(Cell(case, variant, seed), folder) / "run" / "predictions.parquet"
        read = pd.read_parquet(file, columns=[*what, "model.rank"])
        read["item"] = read["item"].str.rpartition("|")[2]  # one id is in two domains, and is told apart where both are
        rank = read["model.rank"].to_numpy()
        tables.append(read[what].assign(**{"recall@10": rank <= 10, "ndcg@10": (rank <= 10) / np.log2(rank + 1)}))
    return pd.concat(tables).groupby(what, as_index=False)[list(PAIRED)].mean()


def _paired(both: pd.DataFrame) -> list[str]:
    """Return each metric's mean difference with its interval."""
    gains = pd.DataFrame({metric: both[f"{metric}.other"] - both[metric] for metric in PAIRED})
    of_user = gains.assign(targets=1.0).groupby(both["user"]).sum()
    draws = np.random.default_rng(0).integers(0, len(of_user), (RESAMPLES, len(of_user)))
    targets = of_user["targets"].to_numpy()[draws].sum(1)
    found = []
    for metric in PAIRED:
        low, high = np.quantile(of_user[metric].to_numpy()[draws].sum(1) / targets, [0.025, 0.975])
        found.append(in_words(gains[metric].mean(), low, high))
    return found


if __name__ == "__main__":
    sys.exit(main())
