"""New users of `amazon-3domain` (Beauty): does a model of next items that adapts to their first events find more?

    python benchmarks/next_item_cold.py --folder DIR          the same command goes on after a stop
    python benchmarks/next_item_cold.py --quick

A tenth of the users is held out to choose on, a tenth to measure on: nothing of them is trained on, and each of their
events is a target, with what they did before as its history. Variants share one model, trained plainly to its best:

    plain        reads the history as it is
    fine-tuned   takes gradient steps on a prompt, a vector beside all of the user's events, that starts at zero; the
                 number of steps and the rate are the best ones of the choosing users
    adapted      the same steps after meta training through them (second order), which goes on from the plain model; its
                 embedding rows stay as they are: with them trained, on targets of the query alone, ndcg@10 before
                 adaptation fell from .069 to .043 within 350 steps
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import DATA, Record, gmeta, here, parse, publish, table
from next_item import FOLDER, SETTINGS
from text.kept_cells import (
    asked_for,
    best_validation,
    cell_parser,
    cpu_of,
    encoder_beside,
    in_words,
    keep_cell,
    over_seeds,
    place_of,
)

DOMAIN = "Beauty"
SLICES = ("all", "history_1-4", "history_5-9", "history_10-19", "history_20+")
METRICS = ("recall@10", "ndcg@10")
VARIANTS = ("plain", "fine-tuned", "adapted")
TRIALS = ((1, 0.003), (1, 0.03), (3, 0.03), (1, 0.3))
"""Inner steps and rates that are tried."""
LATER = 1_000_000
"""Times of held-out users begin here, twice as late for those that are measured."""


@dataclass(frozen=True)
class Cell:
    """One kind of model: what it reads, with one seed."""

    variant: str
    seed: int = 0
    steps: int = 0  # 0: to the best of the choosing users
    trials: tuple[tuple[int, float], ...] = TRIALS

    @property
    def name(self) -> str:
        """Return the name of the cell's folder."""
        return f"cold-{self.variant}-{self.seed}"


def main() -> int:
    """Run the cells that are asked for, and write their table."""
    args = parse(cell_parser(__doc__, "20 steps and one trial; writes no result files"))
    encoder = encoder_beside(FOLDER)
    if encoder is None:
        return 0
    quick = [Cell("ids", steps=20, trials=TRIALS[:1])]
    cells = quick if args.quick else [Cell(variant, seed) for seed in range(3) for variant in ("ids", "text")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        found = [(cell, kept or _run(cell, folder, encoder)) for cell, kept in asked_for(cells, folder, args)]
    _tell(found, {"data": FOLDER, "encoder": Path(encoder).parent.name, "threads": 1}, args)
    return 0


def _tell(found: list[tuple[Cell, dict[str, Any]]], facts: dict[str, Any], args: argparse.Namespace) -> None:
    """Write means over seeds, and each seed's gains over plain with their intervals over users."""
    records, lines, seeds = [], [], []
    of_reads: dict[str, list[dict[str, Any]]] = {}
    for cell, measured in found:
        of_reads.setdefault(cell.variant, []).append(measured)
        for case, of in measured["gains"].items():
            for variant, gains in of.items():
                told = [in_words(**gains[metric]) for metric in METRICS]
                seeds.append([case, cell.variant, variant, str(cell.seed), measured["rule"][variant], *told])
    for reads, every in of_reads.items():
        for case in SLICES:
            for variant in VARIANTS:
                values = {m: [of["measured"][case][variant][m] for of in every] for m in METRICS}
                cpu = f"{np.mean([of['cpu_s'][variant] for of in every]):.0f}"
                lines.append([case, reads, variant, str(len(every)), *map(over_seeds, values.values()), cpu])
                records += [Record(case, f"{reads}, {variant}", m, float(np.mean(v)), "") for m, v in values.items()]
    means = table(["targets", "reads", "variant", "seeds", *METRICS, "CPU s"], lines)
    gains = ["targets", "reads", "variant", "seed", "steps, rate", *(f"{m} - plain" for m in METRICS)]
    publish("next_item_cold", f"{means}\n\n{table(gains, seeds)}", records, facts, args)


def _run(cell: Cell, folder: Path, encoder: str) -> dict[str, Any]:
    """Train and measure all variants, and keep what was measured."""
    place = place_of(cell, folder)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    model, args, words = SETTINGS[cell.variant]
    args = {"encoder": encoder, **args} if model == "llmrec" else args
    common: list[object] = ["--pack", _pack(folder), "--seed", cell.seed, "--model.name", model]
    common += ["--model.args", json.dumps(args), *words]  # widths among them, which parts of the plain model need
    plain = ["--schedule.epochs", 25, "--schedule.eval_every", 700, "--schedule.max_steps", cell.steps]
    cpu = {"plain": cpu_of("train", *common, *plain, "--run_dir", place / "plain")}
    bundle = place / "bundle"
    gmeta("bundle", "--run_dir", place / "plain", "--out", bundle, "--training", "false")
    go_on: list[object] = [*common, "--init_from", bundle, "--meta.adapt", "[prompt]"]
    still = ["--dense.lr", 0, "--embedding.lr", 0, "--schedule.max_steps", 1]
    trials = {}
    for number, (steps, rate) in enumerate(cell.trials):
        run = place / f"tuned-{number}"
        inner = ["--meta.inner_steps", steps, "--meta.inner_lr", rate]
        cpu[str(number)] = cpu_of("train", *go_on, *inner, *still, "--run_dir", run)
        trials[best_validation(run)["ndcg@10_after"]] = (number, steps, rate)
    number, steps, rate = trials[max(trials)]
    cpu["fine-tuned"] = sum(cpu.pop(str(n)) for n in range(len(cell.trials)))
    inner = ["--meta.inner_steps", steps, "--meta.inner_lr", rate, "--meta.learn_inner_lr", "true"]
    longer = ["--schedule.max_steps", cell.steps or 1400, "--schedule.eval_every", 350]
    gently = ["--dense.lr", 1e-4, "--embedding.lr", 0]
    cpu["adapted"] = cpu_of("train", *go_on, *inner, *longer, *gently, "--run_dir", place / "adapted")
    runs = {"plain": place / "plain", "fine-tuned": place / f"tuned-{number}", "adapted": place / "adapted"}
    for run in runs.values():
        gmeta("evaluate", "--run_dir", run, "--resamples", 10, "--baselines", str(run.name == "plain").lower())
    gmeta("compare", *runs.values(), "--out", place / "compared", "--resamples", 400)
    rule = {"plain": "-", "fine-tuned": f"{steps}, {rate:g}", "adapted": f"{steps}, {rate:g} at first"}
    return keep_cell(cell, folder, {"cpu_s": cpu, "rule": rule, **_compared(place / "compared", list(runs))})


def _compared(folder: Path, names: list[str]) -> dict[str, Any]:
    """Return slice -> variant -> metric -> value, and the gains over plain with their intervals."""
    document = json.loads((folder / "comparison.json").read_text())
    measured: dict[str, Any] = {}
    gains: dict[str, Any] = {}
    for part in ({"case": "all", **document}, *document["slices"]):
        for record in part["records"]:
            of = measured.setdefault(part["case"], {}).setdefault(names[_number(document, record["run"])], {})
            of[record["metric"]] = record["value"]
        for record in part["differences"]:
            of = gains.setdefault(part["case"], {}).setdefault(names[_number(document, record["run"])], {})
            of[record["metric"]] = {key: record[key] for key in ("value", "low", "high")}
    return {"measured": measured, "gains": gains}


def _number(document: dict[str, Any], run: str) -> int:
    return [one["run"] for one in document["runs"]].index(run)


def _pack(folder: Path) -> Path:
    """Return the pack whose held-out users have times from LATER on."""
    out = folder / "packs" / "new-users"
    if not (out / "manifest.json").exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(_events(), out.parent / "events.parquet")
        (out.parent / "events.yaml").write_text("user: user\nitem: item\ntime: time\ntext: text\n")
        words = ["--input", out.parent / "events.parquet", "--events", out.parent / "events.yaml"]
        here("prepare", *words, "--holdout", LATER, "--max_task_rows", 50, "--max_task_rows_keep", "last", "--out", out)
    return out


def _events() -> pa.Table:
    """Return the events. Users are dealt at random; those to choose on have as many events as those to measure on."""
    lines = [line.split() for line in (DATA / FOLDER / f"{DOMAIN}.user_sequence.txt").read_text().splitlines()]
    texts = dict(line.split(" ", 1) for line in (DATA / FOLDER / f"{DOMAIN}.item_text.txt").read_text().splitlines())
    lines = [lines[i] for i in np.random.default_rng(0).permutation(len(lines))]
    held_out = sum(len(items) for _, *items in lines) // 10
    rows: dict[str, list[Any]] = {"user": [], "item": [], "time": [], "text": []}
    seen = 0
    for user, *items in lines:
        kind = 2 if seen < held_out else 1 if seen < 2 * held_out else 0
        seen += len(items)
        rows["user"] += [user] * len(items)
        rows["item"] += items
        rows["time"] += [kind * LATER + place for place in range(len(items))]
        rows["text"] += [texts.get(item, "") for item in items]
    return pa.table(rows)


if __name__ == "__main__":
    sys.exit(main())
