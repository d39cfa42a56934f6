"""Days of all inputs are delivered: several labels, weights, a scenario, vectors of rows and items, histories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from commands import gmeta
from histories import WIDE, history_rows

import gmeta as package

pytestmark = [pytest.mark.dist, pytest.mark.slow]

LATER = 20_000
DAYS = 10
RULES = """rules:
  - {rule: finite}
  - {rule: difference, metric: auc/click, slices: [all], margin: 1}
"""
SCHEMA: dict[str, Any] = {
    **{key: value for key, value in WIDE.items() if key != "label"},
    "labels": {"click": "bce", "stay": "bce"},
    "weight": "weight",
    "scenario": "place",
    "vector": [{"name": "text", "dim": 3, "owner": "item", "dtype": "fp16"}, {"name": "picture", "dim": 2}],
}


def day_rows(day: int) -> dict[str, list[Any]]:
    """Rows of users of the days before and some new ones, with items of the day's own."""
    rng = np.random.default_rng(day)
    rows = history_rows(80, 8, seed=day, first_user=60 * day)
    rows["time"] = [time + day * LATER for time in rows["time"]]
    rows["item"][3::8] = [f"i{1000 + day}"] * len(rows["item"][3::8])
    rows["stay"] = [None if rng.random() < 0.2 else int(rng.random() < 0.5) for _ in rows["click"]]
    rows["weight"] = rng.uniform(0.5, 2.0, len(rows["click"])).tolist()
    rows["text"] = [[int(item[1:]) / 100, 1.0, -float(int(item[1:]) % 3)] for item in rows["item"]]
    rows["picture"] = rng.normal(size=(len(rows["click"]), 2)).tolist()
    return rows


def test_ten_days_become_versions(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(RULES)
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    train = {
        "model": {"name": "din", "embedding_dim": 4, "args": {"hidden": [6], "attention": [4], "history": "last"}},
        "meta": {"adapt": ["decision"], "inner_lr": 0.1},
        "schedule": {"epochs": 1},
        "loader": {"tasks_per_batch": 20},
    }
    for day in range(DAYS):
        (tmp_path / f"day{day}").mkdir()
        pq.write_table(pa.table(day_rows(day)), tmp_path / f"day{day}" / "rows.parquet")
        words: list[object] = ["deliver", "--registry", tmp_path / "registry", "--work", tmp_path / "work"]
        words += ["--input", tmp_path / f"day{day}", "--rules", tmp_path / "rules.yaml"]
        if day == 0:
            words += ["--schema", tmp_path / "schema.yaml", "--train_with", json.dumps(train)]
        gmeta(*words)
    current = json.loads((tmp_path / "registry" / "current.json").read_text())
    assert len(list((tmp_path / "registry" / "versions").iterdir())) >= 1
    version = sorted((tmp_path / "registry" / "versions").iterdir())[-1]
    rec = package.load(version)
    rows = pa.table(day_rows(0))
    scores = rec.adapt(rows).predict(rows)
    assert np.isfinite(np.asarray(scores)).all(), current
