"""Logs of users who meet items, packs of them, and what runs on them hold by raw value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from commands import gmeta
from torch import Tensor

from gmeta.parallel.mesh import Mesh
from gmeta.recommender.build import load_system

SCHEMA = {"task": "user", "label": "click", "time": "at", "item": "item", "categorical": ["item", "city", "genre"]}
NEW = ("--model.name", "melu", "--model.args.hidden", "[8]", "--model.embedding_dim", 6)
NEW += ("--embedding.optimizer", "adam")
STILL = ("--dense.lr", 0, "--embedding.lr", 0, "--dense.inner_lr_lr", 0, "--schedule.max_steps", 1)
"""With rates of 0 a run keeps what it begins with."""
Prepare = Callable[..., Path]


def log(items: Sequence[int], users: Sequence[int], seed: int, item: str) -> str:
    """CSV rows of users, each of whom meets 12 of these items."""
    rng = np.random.default_rng(seed)
    lines = [f"user,{item},city,genre,click,at"]
    for user in users:
        for at, met in enumerate(rng.choice(items, 12)):
            click = int(rng.random() < (0.8 if (user + met) % 3 == 0 else 0.2))
            lines.append(f"u{user},i{met},c{user % 5},g{met % 4},{click},{at}")
    return "\n".join(lines) + "\n"


def preparing(place: Path) -> Prepare:
    """Return what makes a pack of a log by its name, once; its ids have an order of their own."""

    def made(
        name: str,
        items: Sequence[int] = range(30),
        users: Sequence[int] = range(40),
        *,
        item: str = "item",
        changes: Mapping[str, Any] | None = None,
    ) -> Path:
        if not (place / name).exists():
            renamed = {"item": item, "categorical": [item, "city", "genre"]}
            (place / f"{name}.yaml").write_text(yaml.safe_dump({**SCHEMA, **renamed, **(changes or {})}))
            (place / f"{name}.csv").write_text(log(items, users, len(items) + users[0], item))
            words = ["--input", place / f"{name}.csv", "--schema", place / f"{name}.yaml", "--out", place / name]
            gmeta("prepare", *words, "--query_size", 4)
        return place / name

    return made


def train(pack: Path, run_dir: Path, *more: object) -> Path:
    words = ["--loader.tasks_per_batch", 10, "--schedule.eval_every", 2, "--precision", "float64"]
    gmeta("train", "--pack", pack, "--run_dir", run_dir, *words, *more)
    return run_dir


def tensors(source: Path, which: str = "last") -> dict[str, Tensor]:
    system, _, _ = load_system(source, which, Mesh())
    return system.tensors()


def by_value(source: Path, table: str, which: str = "last") -> dict[str, Tensor]:
    """Raw value -> row; that of unknown values is under the empty text."""
    system, _, _ = load_system(source, which, Mesh())
    (fused,) = system.tables.fused.values()
    spec = next(spec for spec in fused.specs if spec.name == table)
    rows = fused.weight[fused.permutation.forward(torch.arange(spec.num_ids) + fused.offsets[table])]
    values = pq.read_table(source / "vocab" / f"{table}.parquet")["value"].to_pylist()
    return dict(zip(["", *values], rows, strict=True))
