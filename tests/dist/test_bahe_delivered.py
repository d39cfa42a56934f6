"""BAHE from day to day: delivered with its encoder and its texts, and served as it was evaluated."""

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
from encoders import WHY, tiny
from serving import Client, tasks_of, with_client
from text_models import TEXTS, day_rows, in_words, text_pack, text_rows

import gmeta as package
from gmeta.data.pack import open_pack
from gmeta.evaluation.score import score_split, to_predictions
from gmeta.runs.registry import open_registry

pytest.importorskip("transformers", reason=WHY)
pytestmark = pytest.mark.dist

RULES = """rules:
  - {rule: finite}
  - {rule: difference, metric: auc, slices: [all], margin: 1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack, an encoder, and a run of the model that adapts its head."""
    folder = tmp_path_factory.mktemp("delivered")
    tiny(folder / "bert", "bert")
    text_pack(folder, **in_words(text_rows()))
    package.train({**settings_of(folder), "pack": str(folder / "pack"), "run_dir": str(folder / "run")})
    return folder


def settings_of(folder: Path) -> dict[str, Any]:
    args = {"encoder": str(folder / "bert"), "layers": 2, "hidden": [6], "max_tokens": 8}
    return {
        "model": {"name": "bahe", "args": args},
        "meta": {"adapt": ["decision"], "inner_lr": 0.3},
        "dense": {"lr": 0.01},
        "schedule": {"epochs": 1},
        "loader": {"tasks_per_batch": 20},
    }


def judged(folder: Path) -> tuple[pa.Table, pa.Table, np.ndarray]:
    """Support and query of the test tasks as raw rows, and the scores of the query as the pack gives them."""
    pack, rec = open_pack(folder / "pack"), package.load(folder / "run")
    split = pack.split("test")
    scores = score_split(rec.system, split, tasks_per_batch=20, max_support_rows=0)
    assert scores is not None
    listed = pq.read_table(pack.tasks_file()).to_pydict()
    keys = dict(zip(listed["task_id"], listed["key"], strict=True))
    rows = pa.table(in_words(text_rows())).drop_columns(["kinds", "gaps"])
    users = np.array(rows["user"].to_pylist())
    parts = [rows.take(np.flatnonzero(users == keys[number])) for number in split.task_id.tolist()]
    support, query = (pa.concat_tables(part[some] for part in parts) for some in (slice(0, 8), slice(8, 12)))
    return support, query.drop_columns(["click"]), to_predictions(scores.after[np.argsort(scores.row)], "bce")


def test_what_is_served_is_what_was_evaluated(folder: Path, tmp_path: Path) -> None:
    """From a run, its bundle in another place without the encoder's folder, and a server."""
    support, query, expected = judged(folder)
    assert expected.std() > 0.01
    gmeta("bundle", "--run_dir", folder / "run", "--out", tmp_path / "bundle")
    away = (folder / "bert").rename(folder / "away")
    try:
        for values in ({}, {"mapped": True}):
            found = package.load(tmp_path / "bundle", **values).adapt(support).predict(query)
            np.testing.assert_allclose(
                found, expected, atol=1e-3
            )  # texts outside of the vocabulary are not rounded alike

        async def work(client: Client) -> None:
            tasks = tasks_of(support.drop_columns(["time"]), query.drop_columns(["time"]))
            answered = await client.score(*tasks)
            assert answered.status_code == 200, answered.text
            scores = [score for task in answered.json()["tasks"] for score in task["scores"]]
            np.testing.assert_allclose(scores, expected, atol=1e-3)

        with_client(tmp_path / "bundle", work)
    finally:
        away.rename(folder / "bert")
    found = package.load(folder / "run").adapt(support).predict(query)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.slow
def test_days_of_texts_are_delivered(folder: Path, tmp_path: Path) -> None:
    """A second day with new texts: a delta that leaves the encoder and the earlier vectors where they are."""
    (tmp_path / "rules.yaml").write_text(RULES)
    schema = {key: value for key, value in TEXTS.items() if key not in ("multi", "numeric_sequence")}
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(schema))
    for day in range(3):
        (tmp_path / f"day{day}").mkdir()
        rows = text_rows() if day == 0 else day_rows(day)
        pq.write_table(pa.table(in_words(rows)), tmp_path / f"day{day}" / "rows.parquet")
        words: list[object] = ["deliver", "--registry", tmp_path / "registry", "--work", tmp_path / "work"]
        words += ["--input", tmp_path / f"day{day}", "--rules", tmp_path / "rules.yaml"]
        if day == 0:
            words += ["--schema", tmp_path / "schema.yaml", "--train_with", json.dumps(settings_of(folder))]
        gmeta(*words)
    registry = open_registry(str(tmp_path / "registry"))
    assert registry is not None
    version = sorted((tmp_path / "registry" / "versions").iterdir())[-1]
    rec = package.load(version)
    rows = pa.table(in_words(day_rows(2)))
    texts = rec.system.learner.model._texts
    assert {*rows["item"].to_pylist()} & {*texts}
    assert np.isfinite(rec.adapt(rows).predict(rows)).all()
