"""Sequences that are not pooled, through the whole way: prepared, trained on any ranks, evaluated, predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import gmeta, train_words
from harness import run_ranks
from histories import SCHEMA, WIDE, history_pack, history_rows
from test_division import changing, run_divided
from test_train import assert_same, config, run_steps

import gmeta as package
from gmeta.config.train import LoaderConfig, MetaConfig, ModelConfig, TrainConfig
from gmeta.data import loader
from gmeta.data.loader import TaskLoader
from gmeta.data.pack import open_pack
from gmeta.parallel.mesh import Mesh

pytestmark = pytest.mark.dist

MODELS = {
    "din": ModelConfig(name="din", embedding_dim=4, args={"hidden": [6], "attention": [4]}),
    "transformer": ModelConfig(name="transformer", embedding_dim=4, args={"hidden": [6], "blocks": 1}),
    "melu": ModelConfig(name="melu", embedding_dim=4, args={"hidden": [6]}),
}


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return history_pack(tmp_path_factory.mktemp("histories"), WIDE)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack with vectors of items and of rows too."""
    rows = history_rows()
    vectors = [{"name": "text", "dim": 3, "owner": "item", "dtype": "fp16"}, {"name": "picture", "dim": 2}]
    text = [[int(item[1:]) / 8, 1.0, -float(int(item[1:]) % 3)] for item in rows["item"]]
    picture = np.random.default_rng(1).normal(size=(len(text), 2)).tolist()
    folder = tmp_path_factory.mktemp("everything")
    return history_pack(folder, {**WIDE, "vector": vectors}, text=text, picture=picture)


def settings_of(pack: Path, model: str, **changes: Any) -> TrainConfig:
    return config(pack, model=MODELS[model], **changes)


@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", ["din", pytest.param("transformer", marks=pytest.mark.slow)])
def test_ranks_learn_the_same(everything: Path, model: str, nproc: int) -> None:
    settings = settings_of(everything, model)
    assert_same(run_ranks(nproc, run_steps, settings, 3)[0], run_steps(Mesh(), settings, 3), 1e-9)


def test_micro_batches_change_nothing(everything: Path) -> None:
    """Each is padded to its own longest history."""
    settings = settings_of(everything, "din")
    assert_same(run_ranks(2, run_divided, settings, 3, changing)[0]["learned"], run_steps(Mesh(), settings, 3), 1e-9)


def test_both_engines_learn_the_same(everything: Path) -> None:
    loader_config = LoaderConfig(tasks_per_batch=4)
    found = [
        run_steps(
            Mesh(),
            settings_of(everything, "din", meta=MetaConfig(inner_steps=2, engine=engine), loader=loader_config),
            2,
        )
        for engine in ("factored", "reference")
    ]
    assert_same(*found, 1e-9)


def test_the_mean_of_a_sequence_is_what_pooling_gives(tmp_path: Path) -> None:
    """`melu` of the sequence learns what it learns of the pooled one, bit for bit but for rounding."""
    whole = history_pack(tmp_path / "whole")
    pooled = history_pack(tmp_path / "pooled", {**SCHEMA, "sequence": [{**SCHEMA["sequence"][0], "pooling": "mean"}]})
    ours, theirs = (run_steps(Mesh(), settings_of(path, "melu"), 3) for path in (whole, pooled))
    assert_same(ours, theirs, 1e-9)


def test_batches_are_cut_where_a_history_is_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row with 400 values makes its task a part of its own; the others are not padded to it."""
    rows = history_rows()
    rows["last"][7] = [f"i{i % 30}" for i in range(400)]
    schema = {**SCHEMA, "sequence": [{"name": "last", "table": "item", "pooling": "none"}]}
    path = history_pack(tmp_path, schema, last=rows["last"])
    monkeypatch.setattr(loader, "MAX_CELLS", 12 * 401)
    split = open_pack(path).split("train")
    batches = TaskLoader(split, tasks_per_batch=16, seed=1, max_cells=12 * 401, prefetch=0)
    seen = 0
    for _, batch in zip(range(batches.batches_per_epoch), batches, strict=False):
        for part in batch.parts or (batch,):
            longest = max(int(side.bags["last"].lengths.max()) for side in (part.support, part.query))
            cells = part.num_tasks * (part.support.mask.shape[1] + part.query.mask.shape[1]) * (1 + longest)
            assert cells <= 12 * 401 or part.num_tasks == 1
            assert longest < 400 or part.num_tasks == 1
            seen += part.num_tasks
    assert seen == split.num_tasks
    whole_pass = TaskLoader(split, tasks_per_batch=16, seed=1, shuffle=False, max_cells=12 * 401, prefetch=0)
    sizes = [(b.num_tasks, max(int(s.bags["last"].lengths.max()) for s in (b.support, b.query))) for b in whole_pass]
    assert sum(number for number, _ in sizes) == split.num_tasks
    assert all(longest < 400 or number == 1 for number, longest in sizes)
    settings = settings_of(path, "din", loader=LoaderConfig(tasks_per_batch=16))
    assert np.isfinite(run_steps(Mesh(), settings, 2)["trace"]).all()


@pytest.fixture(scope="module")
def trained(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    words = [
        "--model.name",
        "din",
        "--model.args.attention",
        "[8]",
        "--meta.adapt",
        "[decision]",
        "--embedding.lr",
        0.05,
    ]
    gmeta(*train_words(pack, out / "run", epochs=6), *words, "--meta.inner_lr", 0.2)
    return out / "run"


def test_a_run_is_evaluated_and_predicts(trained: Path, tmp_path: Path) -> None:
    """`predict` scores raw rows as `gmeta.load` does, one task at a time or all at once."""
    gmeta("evaluate", "--run_dir", trained, "--out", tmp_path / "evaluation")
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert {record["variant"] for record in found["records"]} >= {"after", "before"}
    rows = pa.table(history_rows(3, 12, seed=5, first_user=900))
    early = np.tile(np.arange(12) < 8, 3)
    support, query = rows.filter(pa.array(early)), rows.filter(pa.array(~early)).drop_columns(["click"])
    for name, table in (("support", support), ("query", query)):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    words = ["--support", tmp_path / "support.parquet", "--query", tmp_path / "query.parquet"]
    gmeta("predict", "--run_dir", trained, *words, "--out", tmp_path / "scores.parquet")
    scores = pq.read_table(tmp_path / "scores.parquet")["score"].to_numpy()
    rec = package.load(trained)
    np.testing.assert_allclose(rec.adapt(support).predict(query), scores, atol=1e-6)
    user = support["user"].to_pylist()[0]
    mine = [table.filter(pa.compute.equal(table["user"], user)) for table in (support, query)]
    np.testing.assert_allclose(rec.adapt(mine[0]).predict(mine[1]), scores[:4], atol=1e-6)


def test_the_history_counts(trained: Path) -> None:
    """Cut to its last four values as in training, and empty where there is none."""
    rec = package.load(trained)
    rows = history_rows(1, 12, seed=6, first_user=950)
    query = {name: [values[-1]] * 4 for name, values in rows.items() if name != "click"}
    query["last"] = [[], ["i1"], ["i2", "i1"], ["i9", "i9", "i4", "i7", "i2", "i1"]]
    query["kinds"] = [["k0"] * len(values) for values in query["last"]]
    query["gaps"] = [[float(i) for i in range(len(values))] for values in query["last"]]
    found = rec.adapt(rows).predict(query)
    assert len({round(score, 9) for score in found}) == 4
    for name in ("last", "kinds", "gaps"):
        query[name][3] = query[name][3][-4:]
    assert found.tolist() == rec.adapt(rows).predict(query).tolist()
