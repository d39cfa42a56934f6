"""Scores of a split are the same whoever computes them."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from commands import gmeta, train_words
from harness import run_ranks
from packs import make_pack

from gmeta.config.evaluation import EvaluateConfig
from gmeta.config.train import MetaConfig, ModelConfig, ScheduleConfig, TrainConfig
from gmeta.data.loader import MAX_CELLS
from gmeta.data.pack import open_pack
from gmeta.evaluation.evaluate import evaluate_on
from gmeta.evaluation.metrics import metric
from gmeta.evaluation.score import Scores, score_split, to_predictions, validation_metrics
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.build import build_system
from gmeta.training.validation import validate

pytestmark = pytest.mark.dist


def scores_of(mesh: Mesh, settings: TrainConfig, tasks_per_batch: int) -> dict[str, Any] | None:
    pack = open_pack(settings.pack)
    found = score_split(build_system(settings, pack.schema, mesh), pack.split("test"), tasks_per_batch=tasks_per_batch)
    if found is None:
        return None
    columns = {name: getattr(found, name) for name in ("row", "task", "label", "before", "after")}
    return {**columns, **validation_metrics(found, "bce")}


@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sharded_scores_equal_those_of_one_process(tmp_path: Path, nproc: int) -> None:
    settings = TrainConfig(
        pack=str(make_pack(tmp_path / "pack", test=33)),
        run_dir="unused",
        precision="float64",
        model=ModelConfig(name="melu", args={"hidden": [8], "dropout": 0.5}),
        meta=MetaConfig(inner_steps=3, inner_lr=0.5),
    )
    alone = scores_of(Mesh(), settings, 256)
    together, *others = run_ranks(nproc, scores_of, settings, 5)
    assert alone is not None
    assert others == [None] * (nproc - 1)
    for name, value in alone.items():
        np.testing.assert_allclose(together[name], value, rtol=1e-10, atol=1e-12, err_msg=name)
    assert not np.allclose(alone["before"], alone["after"])


TEXTS, NUMBERS = ("size", "from_size", "variant", "against", "metric", "unit", "n"), ("value", "low", "high")


@pytest.mark.slow
@pytest.mark.parametrize("several", [2, 4])
def test_a_learning_curve_is_the_same_on_any_number_of_ranks(tmp_path: Path, several: int) -> None:
    """Each point is the evaluation of a run that reads so many support rows; of baselines, of a shorter log."""
    pack, run_dir = make_pack(tmp_path / "pack", test=33), tmp_path / "run"
    words = ("--precision", "float64", "--meta.inner_lr", 0.5, "--loader.max_support_rows", 3)
    gmeta(*train_words(pack, run_dir, *words, epochs=1))
    found = []
    for nproc in (1, several):
        out = str(tmp_path / f"out{nproc}")
        sizes = "3,0,1,99,100"
        run_ranks(
            nproc,
            evaluate_on,
            EvaluateConfig(run_dir=str(run_dir), out=out, support_sizes=sizes, resamples=5, tasks_per_batch=7),
        )
        found.append(json.loads((tmp_path / f"out{nproc}" / "evaluation.json").read_text()))
    curve, support = found[0]["support_curve"], open_pack(pack).split("test").num_support
    short = [{"size": size, "short_tasks": int((support < size).sum())} for size in (0, 1, 3, 99, 100)]
    assert curve["sizes"] == short
    assert (curve["tasks"], short[0]["short_tasks"], short[-1]["short_tasks"]) == (33, 0, 33)
    for other in found[1:]:
        for kind in ("records", "differences", "gains"):
            assert len(curve[kind]) == len(other["support_curve"][kind]) > 0
            for one, two in zip(curve[kind], other["support_curve"][kind], strict=True):
                assert [one[key] for key in TEXTS if key in one] == [two[key] for key in TEXTS if key in two]
                numbers = [np.array([point[key] for key in NUMBERS], np.float64) for point in (one, two)]
                np.testing.assert_allclose(*numbers, rtol=1e-9, atol=1e-12)  # null is nan
    values = {(r["size"], r["variant"], r["metric"]): r["value"] for r in curve["records"]}
    for record in (r for r in found[0]["records"] if r["case"] == "all"):
        # The run saw 3 rows in training and is measured so; the baselines of the main evaluation see all.
        variant, name = record["variant"], record["metric"]
        size = 3 if variant in ("before", "after") else 100
        assert values[size, variant, name] == pytest.approx(record["value"], rel=1e-9), (variant, name)
        assert values[99, variant, name] == values[100, variant, name]
    for variant, start in (("after", "before"), ("task-mean", "global-mean")):
        assert values[0, variant, "auc"] == values[0, start, "auc"]
        assert values[100, variant, "auc"] != values[3, variant, "auc"] != values[0, variant, "auc"]
    assert len({values[size, "item-mean", "auc"] for size in (0, 3, 100)}) == 1, "item means see no support"
    gain = next(g for g in curve["gains"] if (g["size"], g["variant"], g["metric"]) == (3, "after", "auc"))
    assert gain["from_size"] == 1
    assert gain["value"] == pytest.approx(values[3, "after", "auc"] - values[1, "after", "auc"])


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


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_the_worst(bad: float) -> None:
    task, label = np.repeat(np.arange(4), 5), np.tile([0.0, 1, 1, 0, 1], 4)
    before, after = np.linspace(-1, 1, 20), np.where(np.arange(20) == 7, bad, 0.1)
    found = validation_metrics(Scores(np.arange(20), task, label, before, after), "bce")
    assert {name: value for name, value in found.items() if name.endswith("_after")} == {
        f"{name}_after": -math.inf if name in ("auc", "gauc") else math.inf
        for name in (name.removesuffix("_before") for name in found if name.endswith("_before"))
    }
    assert all(math.isfinite(value) for name, value in found.items() if name.endswith("_before"))


@pytest.mark.parametrize(("name", "good"), [("auc", 0.7), ("loss", 0.4)])
def test_a_validation_that_is_not_finite_is_not_better(monkeypatch: pytest.MonkeyPatch, name: str, good: float) -> None:
    said: list[str] = []
    worst = -math.inf if name == "auc" else math.inf
    values = [worst, good, worst, math.nan, worst]
    metrics = iter([{f"{name}_after": value} for value in values])
    monkeypatch.setattr("gmeta.training.validation.score_split", lambda *args, **kwargs: ())
    monkeypatch.setattr("gmeta.training.validation.validation_metrics", lambda *args: next(metrics))
    progress = SimpleNamespace(step=1, best=None, best_step=0, bad_validations=0)
    dense = SimpleNamespace(unsharded=nullcontext)
    run = SimpleNamespace(
        config=TrainConfig(pack="unused", run_dir="unused", schedule=ScheduleConfig(metric=name, patience=3)),
        state=SimpleNamespace(progress=progress, dense=dense, mesh=Mesh(), system=None),
        pack=SimpleNamespace(
            splits=("valid",), split=lambda name: None, schema=SimpleNamespace(labels=(), next_item=False)
        ),
        loader=SimpleNamespace(settle=lambda: None),
        log=SimpleNamespace(say=said.append, valid=lambda record: None),
        out_of_patience=False,
    )
    bad = []
    for _ in values:
        validate(run)  # type: ignore[arg-type]
        bad.append(progress.bad_validations)
    assert bad == [1, 0, 1, 1, 2]
    assert progress.best == good
    assert [("not finite" in text, "not defined" in text) for text in said] == [(True, False)] * 2 + [
        (False, True),
        (True, False),
    ]


def test_validation_ties_what_differs_by_rounding_alone() -> None:
    """Which checkpoint is best must not depend on how many ranks computed the scores."""
    rng = np.random.default_rng(0)
    task, label = np.repeat(np.arange(40), 6), rng.integers(2, size=240).astype(np.float64)
    logits = rng.integers(5, size=240) * 0.5
    found = []
    for _ in range(2):
        noisy = logits + rng.normal(size=240) * 1e-6
        found.append(validation_metrics(Scores(np.arange(240), task, label, noisy, noisy), "bce"))
    assert metric("gauc", logits, label, task) == found[0]["gauc_after"] == found[1]["gauc_after"]
    assert found[0]["auc_after"] == found[1]["auc_after"]


def test_a_split_without_query_rows_has_no_metrics() -> None:
    nothing, none = np.zeros(0), np.zeros(0, dtype=np.int64)
    assert validation_metrics(Scores(none, none, nothing, nothing, nothing), "bce") == {}


def test_rows_labels_and_tasks_are_those_of_the_pack(tmp_path: Path) -> None:
    settings = TrainConfig(pack=str(make_pack(tmp_path / "pack")), run_dir="unused", model=ModelConfig(name="melu"))
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
        model=ModelConfig(name="melu", args={"hidden": [8]}),
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
