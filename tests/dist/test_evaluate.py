"""Scores of a split are the same whoever computes them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import run_ranks
from packs import make_pack

from gmeta.config.train import MetaConfig, ModelConfig, TrainConfig
from gmeta.data.loader import MAX_CELLS
from gmeta.data.pack import open_pack
from gmeta.evaluation.metrics import metric
from gmeta.evaluation.score import Scores, score_split, to_predictions, validation_metrics
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.build import build_system

pytestmark = pytest.mark.dist


def scores_of(mesh: Mesh, settings: TrainConfig, tasks_per_batch: int) -> dict[str, Any] | None:
    pack = open_pack(settings.pack)
    found = score_split(build_system(settings, pack.schema, mesh), pack.split("test"), tasks_per_batch=tasks_per_batch)
    if found is None:
        return None
    columns = {name: getattr(found, name) for name in ("row", "task", "label", "before", "after")}
    return {**columns, **validation_metrics(found, "bce")}


@pytest.mark.parametrize("nproc", [2, 4])
def test_sharded_scores_equal_those_of_one_process(tmp_path: Path, nproc: int) -> None:
    settings = TrainConfig(
        pack=str(make_pack(tmp_path / "pack", test=33)),
        run_dir="unused",
        precision="float64",
        model=ModelConfig(args={"hidden": [8], "dropout": 0.5}),
        meta=MetaConfig(inner_steps=3, inner_lr=0.5),
    )
    alone = scores_of(Mesh(), settings, 256)
    together, *others = run_ranks(nproc, scores_of, settings, 5)
    assert alone is not None
    assert others == [None] * (nproc - 1)
    for name, value in alone.items():
        np.testing.assert_allclose(together[name], value, rtol=1e-10, atol=1e-12, err_msg=name)
    assert not np.allclose(alone["before"], alone["after"])


def test_validation_sorts_by_logits() -> None:
    """Logits beyond the sigmoid's reach keep their order in AUC and GAUC; small ones change no bit."""
    rng = np.random.default_rng(0)
    task, label = np.repeat(np.arange(20), 6), rng.integers(2, size=120).astype(np.float64)
    logits = rng.normal(size=120) + label
    found = validation_metrics(Scores(np.arange(120), task, label, before=logits, after=logits + 300), "bce")
    for name in ("auc", "gauc"):
        assert found[f"{name}_after"] == found[f"{name}_before"] == metric(name, logits, label, task)
        assert found[f"{name}_before"] == metric(name, to_predictions(logits, "bce"), label, task)
        assert metric(name, to_predictions(logits + 300, "bce"), label, task) == 0.5
    assert found["logloss_after"] > found["logloss_before"]


def test_a_split_without_query_rows_has_no_metrics() -> None:
    nothing, none = np.zeros(0), np.zeros(0, dtype=np.int64)
    assert validation_metrics(Scores(none, none, nothing, nothing, nothing), "bce") == {}


def test_rows_labels_and_tasks_are_those_of_the_pack(tmp_path: Path) -> None:
    settings = TrainConfig(pack=str(make_pack(tmp_path / "pack")), run_dir="unused")
    found = scores_of(Mesh(), settings, 7)
    assert found is not None
    columns = open_pack(settings.pack).split("test").columns()
    np.testing.assert_array_equal(found["row"], np.flatnonzero(columns.is_query))
    np.testing.assert_array_equal(found["label"], columns.label[columns.is_query])
    np.testing.assert_array_equal(found["task"], columns.task[columns.is_query])


def test_batches_cut_to_a_budget_of_cells_give_the_same_scores(tmp_path: Path) -> None:
    settings = TrainConfig(
        pack=str(make_pack(tmp_path / "pack", test=33)),
        run_dir="unused",
        precision="float64",
        model=ModelConfig(args={"hidden": [8]}),
        meta=MetaConfig(inner_steps=2, inner_lr=0.5),
    )
    pack = open_pack(settings.pack)
    split, system = pack.split("test"), build_system(settings, pack.schema, Mesh())
    usual = score_split(system, split, tasks_per_batch=33, max_cells=10**9)
    assert usual is not None
    for max_cells, equal in (
        (MAX_CELLS, np.testing.assert_array_equal),
        (300, partial(np.testing.assert_allclose, rtol=1e-12)),
    ):
        found = score_split(system, split, tasks_per_batch=33, max_cells=max_cells)
        assert found is not None
        for name in ("row", "task", "label", "before", "after"):
            equal(getattr(found, name), getattr(usual, name), err_msg=name)
    longest = 3
    short = score_split(system, split, tasks_per_batch=33, max_support_rows=longest)
    assert short is not None
    np.testing.assert_allclose(short.before, usual.before, rtol=1e-12)
    changed = ~np.isclose(short.after, usual.after, rtol=1e-10)
    assert set(short.task[changed].tolist()) == set(np.flatnonzero(split.num_support > longest).tolist())
