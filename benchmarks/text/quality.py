"""Cells of the quality part: a training by `gmeta train`, judged on rows later than those that it was chosen on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from common import gmeta

from gmeta.evaluation.metrics import auc, gauc
from text.kept_cells import cpu_of, keep_cell, kept_cell, place_of
from text.rows import Rows, make_pack

TEXTS = ("title", "history")
BATCH_ROWS = 64


@dataclass(frozen=True)
class Cell:
    """One training. `args` are the model's, `words` those of `gmeta train` besides."""

    variant: str
    seed: int
    titles: int = 10
    train_rows: int = 0  # 0: all
    by_user: bool = False
    model: str = "bahe"  # empty: what the recipe for the pack chooses
    features: tuple[str, ...] = TEXTS
    numeric: tuple[str, ...] = ()
    args: Mapping[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    lr: float = 2e-4
    epochs: int = 6
    bundled: bool = False  # its model is kept too, for cells that begin with it
    start: str = ""  # the variant, of this seed, whose model it begins with

    @property
    def name(self) -> str:
        """Return the name of the cell's folder."""
        return f"{self.variant}-{self.titles}-{self.train_rows or 'all'}-{self.seed}"


def run_cell(cell: Cell, rows: Rows, folder: Path, encoder: str) -> dict[str, Any]:
    """Return what a cell measures, and keep it: metrics on the judging rows, the valid curve, CPU seconds."""
    if (done := kept_cell(cell, folder)) is not None:
        return done
    place = place_of(cell, folder)
    shutil.rmtree(place, ignore_errors=True)
    of = {"titles": cell.titles, "numeric": cell.numeric, "train_rows": cell.train_rows, "by_user": cell.by_user}
    pack = make_pack(folder / "packs", rows, **of)
    run = place / "run"
    words = _train_words(cell, pack, run, encoder)
    if cell.start:
        words += ["--init_from", place_of(replace(cell, variant=cell.start), folder) / "bundle"]
    cpu = cpu_of("train", *words)
    if cell.bundled:
        gmeta("bundle", "--run_dir", run, "--out", place / "bundle", "--training", "false")
    gmeta("evaluate", "--run_dir", run, "--baselines", "false", "--resamples", 10)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [(line["step"], line["auc_after"]) for line in metrics if line["kind"] == "valid"]
    measured = {"cpu_s": cpu, "curve": curve, "judged": judged(run, rows, by_user=cell.by_user)}
    found = keep_cell(cell, folder, measured)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)  # 90 MB each
    return found


def _train_words(cell: Cell, pack: Path, run: Path, encoder: str) -> list[object]:
    words: list[object] = ["--pack", pack, "--run_dir", run]
    if not cell.model:
        return [*words, "--model.features", json.dumps(list(cell.features)), "--seed", cell.seed, *cell.words]
    args = {"encoder": encoder, "max_tokens": 32, **cell.args} if cell.model == "bahe" else dict(cell.args)
    words += ["--model.name", cell.model, "--model.args", json.dumps(args)]
    words += ["--model.features", json.dumps(list(cell.features)), "--model.numeric", str(bool(cell.numeric)).lower()]
    words += [] if cell.by_user else ["--meta.adapt", "[]"]
    words += ["--dense.lr", cell.lr, "--dense.weight_decay", 0.05, "--seed", cell.seed]
    words += ["--loader.tasks_per_batch", 16 if cell.by_user else BATCH_ROWS // 2]
    words += ["--schedule.epochs", cell.epochs]
    return [*words, "--schedule.metric", "auc", "--schedule.patience", 2, *cell.words]


def judged(run: Path, rows: Rows, *, by_user: bool) -> dict[str, dict[str, float]]:
    """Return variant -> metrics of a run's predictions on the judging rows."""
    table = pq.read_table(run / "predictions.parquet").to_pydict()
    keys = [str(key) for key in table["task"]]
    place = None if by_user else np.array([int(key.partition(" ")[2]) for key in keys])
    users = rows.uid[place] if place is not None else np.array([int(key.partition("|")[0]) for key in keys])
    label = np.array(table["label"], float)
    names = {"before": "before", "after": "after"} if by_user else {"before": "after"}  # plain training adapts nothing
    return {told: measures(np.array(table[name], float), label, users, rows, place) for name, told in names.items()}


def measures(
    score: np.ndarray,
    label: np.ndarray,
    users: np.ndarray,
    rows: Rows,
    place: np.ndarray | None = None,
) -> dict[str, float]:
    """Return AUC, AUC within users, and those of rows whose film or user training rows know, or do not."""
    found = {"auc": auc(score, label), "uauc": gauc(score, label, users), "rows": float(len(label))}
    train = rows.of("train")
    flags = {} if place is None else {"item": np.isin(rows.iid[place], rows.iid[train])}
    flags["user"] = np.isin(users, rows.uid[train])
    for name, known in flags.items():
        for word, mask in (("warm", known), ("cold", ~known)):
            if 0 < label[mask].sum() < mask.sum():
                found[f"auc {word} {name}"] = auc(score[mask], label[mask])
    return found
