"""Weights, a scenario and several labels from day to day: the history of tasks, a warm start, and the gate."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from commands import fails, gmeta, train_words

from gmeta.cli import run as run_command
from gmeta.data.pack import open_pack

RAW: dict[str, Any] = {
    "task": "user",
    "labels": {"click": "bce", "stay": "mse"},
    "weight": "w",
    "time": "at",
    "item": "item",
    "scenario": "shop",
    "categorical": ["item", "shop"],
}


def day(number: int) -> pa.Table:
    rng = np.random.default_rng(number)
    rows = 900
    click = (rng.random(rows) < 0.4).astype(float)
    click[::5] = np.nan
    stay = rng.normal(size=rows)
    stay[1::5] = np.nan
    return pa.table(
        {
            "user": rng.integers(0, 60, rows),
            "item": rng.integers(number, 9 + number, rows),
            "shop": [f"s{i}" for i in rng.integers(0, 3, rows)],
            "click": pa.array(click, from_pandas=True),
            "stay": pa.array(stay, from_pandas=True),
            "w": rng.integers(0, 4, rows) / 2,
            "at": np.arange(rows) + 1000 * number,
        }
    )


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two days: a pack and a bundle of each, the second of which goes on with the first bundle."""
    folder = tmp_path_factory.mktemp("days")
    (folder / "schema.yaml").write_text(yaml.safe_dump(RAW, sort_keys=False))
    for number in range(2):
        pq.write_table(day(number), folder / f"{number}.parquet")
    words = ["--schema", folder / "schema.yaml", "--query_size", 4, "--test_fraction", 0.4]
    gmeta("prepare", "--input", folder / "0.parquet", *words, "--out", folder / "pack0")
    gmeta(*train_words(folder / "pack0", folder / "run0", epochs=1))
    gmeta("bundle", "--run_dir", folder / "run0", "--out", folder / "v0", "--training", "true")
    gmeta("prepare", "--input", folder / "1.parquet", "--base", folder / "v0", "--out", folder / "pack1")
    words = ["--loader.tasks_per_batch", 20, "--schedule.epochs", 1]
    gmeta("train", "--pack", folder / "pack1", "--run_dir", folder / "run1", "--warm_start", folder / "v0", *words)
    return folder


def test_older_rows_keep_their_labels_and_weights(days: Path) -> None:
    known = {}
    for number in range(2):
        for row in day(number).to_pylist():
            known[row["at"]] = row
    pack = open_pack(days / "pack1")
    assert pack.schema.labels == open_pack(days / "pack0").schema.labels
    older = 0
    for name in pack.splits:
        split = pack.split(name)
        time, weight = split.times(), split.columns().weight
        assert time is not None
        assert weight is not None
        older += int((time < 1000).sum())
        assert weight.tolist() == [known[at]["w"] for at in time.tolist()]
        for position, label in enumerate(("click", "stay")):
            expected = [math.nan if known[at][label] is None else known[at][label] for at in time.tolist()]
            np.testing.assert_allclose(split.columns(label=position).label, expected, rtol=1e-6)
    assert older > 100


def test_the_second_day_is_gated_by_label(days: Path, tmp_path: Path) -> None:
    rules = [
        {"rule": "difference", "metric": "rmse/stay", "margin": 5.0, "slices": ["all", "scenario=s0"]},
        {"rule": "difference", "metric": "logloss", "margin": 5.0},
        {"rule": "label_mean", "max_change": 0.9},
    ]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"rules": rules}))
    words = ["gate", "--candidate", days / "run1", "--current", days / "v0", "--pack", days / "pack1"]
    words += ["--rules", tmp_path / "rules.yaml", "--out", tmp_path / "out", "--resamples", 20]
    assert run_command([str(word) for word in words]) == 0
    document = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert all(outcome["passed"] and outcome["judged"] for outcome in document["rules"])
    assert any("count rows by their weights" in note for note in document["evaluation"]["notes"])
    assert "RMSE of stay" in (tmp_path / "out" / "verdict.html").read_text()


def test_other_labels_do_not_go_on_with_a_base(days: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = {**RAW, "labels": {"click": "bce", "stay": "huber"}}
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(schema, sort_keys=False))
    words = ["prepare", "--input", days / "1.parquet", "--base", days / "v0", "--out", tmp_path / "pack"]
    fails([*words, "--schema", tmp_path / "schema.yaml"], capsys, "labels is")
