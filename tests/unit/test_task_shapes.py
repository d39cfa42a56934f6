"""Tasks of any size and shape through the commands: prepare, train, evaluate, report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from commands import gmeta, train_words

from gmeta.data.pack import open_pack

SCHEMA = {"task": "film", "label": "click", "time": "at", "item": "user", "categorical": ["user", "tag"]}


def write_log(folder: Path, sizes: Sequence[int], **columns: object) -> Path:
    """A Parquet log with one task of each size, and its schema beside it."""
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(len(sizes)), sizes)
    table = {"film": [f"f{t}" for t in task], "click": rng.integers(0, 2, len(task)), "at": np.arange(len(task))}
    table |= {"user": rng.integers(0, 20, len(task)), "tag": rng.integers(0, 3, len(task)), **columns}
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(table), folder / "log.parquet")
    (folder / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    return folder / "log.parquet"


def prepare(folder: Path, *words: object) -> Path:
    schema = folder / "schema.yaml"
    gmeta("prepare", "--input", folder / "log.parquet", "--schema", schema, "--out", folder / "pack", *words)
    return folder / "pack"


def test_tasks_without_support_are_trained_on_and_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of a long tail: half of the tasks have one row, and the smallest that a limit leaves out are told of."""
    write_log(tmp_path, [1] * 30 + [2] * 10 + [3, 8, 20] * 10)
    pack = prepare(tmp_path, "--max_task_rows", 15, "--test_fraction", 0.3)
    printed = " ".join(capsys.readouterr().out.split())
    assert "left out: 10 tasks (200 rows): more rows than max_task_rows" in printed
    assert "small: 30 tasks: one row, which is their query" in printed
    assert "small: 30 tasks: too few rows for query_size" in printed
    gmeta(*train_words(pack, tmp_path / "run", epochs=1))
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([loss for loss in losses if loss is not None]).all()
    capsys.readouterr()
    gmeta("evaluate", "--run_dir", tmp_path / "run", "--resamples", 20)
    (sentence,) = open_pack(pack).left_out("test")
    tasks = open_pack(pack).manifest["counts"]["left_out"]["test"]["more rows than max_task_rows"][0]
    assert 0 < tasks < 10
    assert (
        sentence == f"the pack left {tasks} tasks ({20 * tasks} rows) of split test out: more rows than max_task_rows"
    )
    assert sentence in " ".join(capsys.readouterr().out.split())
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["left_out"] == [sentence]
    cases = {case["case"]: case for case in evaluation["cases"]}
    assert cases["support_0"]["tasks"] == cases["support_0"]["rows"] > 0
    gmeta("report", "--run_dir", tmp_path / "run")
    assert sentence in (tmp_path / "run" / "report.html").read_text()


def test_an_older_pack_tells_of_all_splits_together(tmp_path: Path) -> None:
    write_log(tmp_path, [4] * 12 + [9] * 2)
    pack = open_pack(prepare(tmp_path, "--max_task_rows", 8, "--query_size", 2))
    del pack.manifest["counts"]["left_out"]
    expected = "the pack left 2 tasks (18 rows) of all splits together out: more rows than max_task_rows"
    assert pack.left_out("test") == [expected]
