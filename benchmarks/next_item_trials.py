"""Models of next items tuned alike: the same number of trials each, chosen by the targets of valid (Beauty).

    python benchmarks/next_item_trials.py --folder DIR          the same command goes on after a stop
    python benchmarks/next_item_trials.py --quick

A trial is a training with another dropout, for 10 passes, a fifth to a half of those of `next_item.py`, whose settings
it has besides. `popularity` and `item-knn` have no settings.
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

from common import Record, parse, publish, table
from next_item import FOLDER, SETTINGS, pack_of
from text.kept_cells import asked_for, best_validation, cell_parser, cpu_of, encoder_beside, keep_cell, place_of

DOMAIN = "Beauty"
METRICS = ("recall@10", "ndcg@10")
TRIED = {"ids": (0.3, 0.5, 0.7), "text": (0.1, 0.2, 0.4), "ids+text": (0.1, 0.2, 0.4)}
"""Variant -> the values of `dropout` that are tried. Of ids+text it is that of the reader of texts."""


@dataclass(frozen=True)
class Cell:
    """One trial."""

    variant: str
    value: float
    epochs: int = 10
    steps: int = 0  # 0: all passes

    @property
    def name(self) -> str:
        """Return the name of the cell's folder."""
        return f"trial-{self.variant}-{self.value}"


def main() -> int:
    """Run the trials that are asked for, and write their table."""
    args = parse(cell_parser(__doc__, "20 steps of one trial each; writes no result files"))
    encoder = encoder_beside(FOLDER)
    if encoder is None:
        return 0
    cells = [Cell(variant, value) for variant, values in TRIED.items() for value in values]
    if args.quick:
        cells = [Cell(variant, values[1], steps=20) for variant, values in TRIED.items()]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        found = [(cell, kept or _try(cell, folder, encoder)) for cell, kept in asked_for(cells, folder, args)]
    _tell(found, {"data": f"{FOLDER}, {DOMAIN}", "encoder": Path(encoder).parent.name, "threads": 1}, args)
    return 0


def _tell(found: list[tuple[Cell, dict[str, Any]]], facts: dict[str, Any], args: argparse.Namespace) -> None:
    records, lines = [], []
    best: dict[str, float] = {}
    for cell, kept in found:
        best[cell.variant] = max(best.get(cell.variant, 0.0), kept["measured"]["ndcg@10"])
    for cell, kept in found:
        tried, values = f"dropout {cell.value}", kept["measured"]
        records += [Record(cell.variant, tried, m, values[m], "") for m in METRICS]
        chosen = "yes" if values["ndcg@10"] == best[cell.variant] else ""
        told = [f"{values[m]:.4f}" for m in METRICS]
        lines.append([cell.variant, tried, str(cell.epochs), *told, chosen, f"{kept['cpu_s']:.0f}"])
    head = ["variant", "trial", "passes", *(f"{m} of valid" for m in METRICS), "best", "CPU s"]
    publish("next_item_trials", table(head, lines), records, facts, args)


def _try(cell: Cell, folder: Path, encoder: str) -> dict[str, Any]:
    """Train, and keep the best validation."""
    place = place_of(cell, folder)
    shutil.rmtree(place, ignore_errors=True)
    model, args, words = SETTINGS[cell.variant]
    args = {**args, "dropout": cell.value, **({"encoder": encoder} if model == "llmrec" else {})}
    told: list[object] = ["--pack", pack_of(folder, DOMAIN), "--run_dir", place / "run", "--model.name", model]
    told += ["--model.args", json.dumps(args), *words, "--schedule.epochs", cell.epochs]
    told += ["--schedule.eval_every", 440, "--schedule.max_steps", cell.steps]
    cpu = cpu_of("train", *told)
    best = best_validation(place / "run")
    shutil.rmtree(place / "run" / "checkpoints", ignore_errors=True)
    return keep_cell(cell, folder, {"cpu_s": cpu, "measured": {m: best[f"{m}_after"] for m in METRICS}})


if __name__ == "__main__":
    sys.exit(main())
