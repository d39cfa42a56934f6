"""Tasks of several requests, adapted and scored together, are what each of them is alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packs import make_pack, user_rows

import gmeta
from gmeta.config.delivery import BundleConfig
from gmeta.delivery.bundle import make_bundle
from gmeta.meta.recorded import Programs
from gmeta.recommender.tasks import (
    adapt_tasks,
    encode_rows,
    join_states,
    score_tasks,
    split_states,
    state_without_support,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "many steps": {"meta": {"adapt": ["dense"], "inner_steps": 9, "inner_lr": 0.1, "order": "first"}},
    "biases": {"meta": {"adapt": ["*.bias"], "inner_steps": 3, "inner_lr": 0.5}},
    "decision": {"meta": {"adapt": ["decision"], "inner_steps": 2, "inner_lr": 0.5}},
    "embeddings": {"meta": {"adapt": ["embeddings", "head"], "inner_lr": 2.0, "order": "first"}},
    "reference": {"meta": {"engine": "reference", "inner_lr": 0.5}},
    "modulated": {"meta": {"adapt": ["head"], "modulation": "film", "inner_lr": 0.5}},
    "solved": {
        "model": {"name": "neural_linear", "args": {"task_features": ["group"]}},
        "meta": {"adapt": ["last_layer"]},
    },
    "plain": {"meta": {"adapt": []}},
}


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("tasks") / "pack")


def trained(pack: Path, name: str) -> gmeta.Recommender:
    config = {"pack": str(pack), "run_dir": str(pack.parent / name), "loader": {"tasks_per_batch": 20}}
    config |= {"schedule": {"epochs": 1}, "precision": "float64", "embedding": {"init_std": 0.5}, **SETTINGS[name]}
    if not (pack.parent / name).exists():
        gmeta.train(config | {"model": {"name": "melu", **config.get("model", {})}})
    return gmeta.load(pack.parent / name)


@pytest.mark.parametrize("name", SETTINGS)
def test_scores_are_those_of_each_request_alone(pack: Path, name: str) -> None:
    rec = trained(pack, name)
    assert_as_alone(rec, rec)


@pytest.mark.parametrize(("name", "programs"), [("many steps", 4), ("modulated", 4), ("solved", 3), ("embeddings", 0)])
def test_recorded_scores_are_too(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, programs: int
) -> None:
    """Of mapped rows, bags among them. What cannot be recorded is computed as ever."""
    monkeypatch.setattr("gmeta.meta.recorded._WORTH", 1)
    rec = trained(pack, name)
    make_bundle(BundleConfig(run_dir=str(rec.source), out=str(tmp_path / "bundle")))
    mapped, made, notes = gmeta.load(tmp_path / "bundle", mapped=True), Programs(), []
    mapped.record(made, notes.append)
    for _ in range(3):
        assert_as_alone(mapped, rec)
    assert len(made.made) >= programs
    assert bool(notes) == (name in ("embeddings", "solved"))


def assert_as_alone(rec: gmeta.Recommender, alone: gmeta.Recommender) -> None:
    """Compare tasks of several tables, adapted and scored together by one, with each table alone by the other."""
    supports = [
        user_rows(tasks, each, seed, label=True) for seed, (tasks, each) in enumerate([(1, 3), (3, 11), (2, 20)])
    ]
    candidates = [user_rows(tasks, each, 9 + tasks, label=False) for tasks, each in [(1, 7), (3, 2), (2, 30)]]
    expected = [alone.adapt(s).predict(c) for s, c in zip(supports, candidates, strict=True)]
    encoded = [encode_rows(rec, table, "support") for table in supports]
    states = adapt_tasks(rec, [table for table in encoded if table is not None])
    assert [state.num_support for state in states] == [3, 11, 11, 11, 20, 20]
    rows = [table for c in candidates if (table := encode_rows(rec, c, "candidates")) is not None]
    of_tables = [states[:1], states[1:4], states[4:]]
    for found, scores in zip(score_tasks(rec, rows, of_tables), expected, strict=True):
        np.testing.assert_allclose(found, scores, rtol=1e-9)
    again = split_states(join_states(states), np.array([state.num_support for state in states]))
    for found, scores in zip(
        score_tasks(rec, rows[::-1], [again[4:], again[1:4], again[:1]]), expected[::-1], strict=True
    ):
        np.testing.assert_allclose(found, scores, rtol=1e-9)
    nothing = state_without_support(rec)
    mixed = score_tasks(rec, rows[1:2], [[states[1], nothing, states[3]]])[0]
    np.testing.assert_allclose(mixed[1::3], alone.adapt({}).predict(candidates[1])[1::3], rtol=1e-9)
    np.testing.assert_allclose(mixed[::3], expected[1][::3], rtol=1e-9)
    assert adapt_tasks(rec, []) == score_tasks(rec, [], []) == []
    assert encode_rows(rec, {}, "support") is None
