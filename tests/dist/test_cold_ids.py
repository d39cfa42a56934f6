"""Cold ids: the row that they read is trained, on any ranks and however often a run stops; a task's key is not read."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import fails, gmeta, train_words
from harness import run_ranks
from packs import DATA_SCHEMA, SCHEMA, make_pack
from steps import one_step
from test_division import changing, run_divided
from test_train import assert_same, config, run_steps
from test_trainer import assert_same_run, own_loop

from gmeta.config.train import EmbeddingConfig, LoaderConfig, ScheduleConfig, TrainConfig
from gmeta.data.pack import open_pack
from gmeta.data.schema import OOV
from gmeta.embedding.table import FusedTable
from gmeta.evaluation.score import score_split
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.build import load_system
from gmeta.training import session
from gmeta.training.build import build_run
from gmeta.training.run import Run

pytestmark = pytest.mark.dist


def warm(arrays: dict[str, np.ndarray]) -> None:
    """No row has an unknown value."""
    for name in ("ids", "tags.values"):
        np.maximum(arrays[name], 1, out=arrays[name])


def cold_in_test(arrays: dict[str, np.ndarray]) -> None:
    """Of the splits of `make_pack`, only test has 21 tasks."""
    warm(arrays)
    if len(arrays["task_id"]) == 21:
        arrays["ids"][::3, 1] = OOV


def settings_of(pack: Path, share: float | None, **changes: Any) -> TrainConfig:
    embedding = EmbeddingConfig(optimizer="adam", lr=0.05, weight_decay=0.1, init_std=0.5, id_dropout=share)
    return config(pack, embedding=embedding, **changes)


def recorded(run_dir: Path) -> Any:
    return yaml.safe_load((run_dir / "config.yaml").read_text())["embedding"]["id_dropout"]


def unknown_rows(run: Run) -> dict[str, torch.Tensor]:
    """The row of unknown ids of each table, in one process."""
    (table,) = run.state.system.tables.fused.values()
    assert isinstance(table, FusedTable)
    keys = {name: table.permutation.forward(torch.tensor([table.offset(name) + OOV])) for name in table.features}
    return {name: table.weight[row].clone() for name, row in keys.items()}


def changed(pack: Path, share: float) -> dict[str, bool]:
    run = build_run(settings_of(pack, share), Mesh(), threading.Event())
    before = unknown_rows(run)
    with run.loader:
        for _ in range(3):
            one_step(run)
    return {name: not torch.equal(before[name], row) for name, row in unknown_rows(run).items()}


def test_the_row_of_unknown_ids_is_trained(tmp_path: Path) -> None:
    """Also by weight decay and the optimizer's moments: without masks nothing touches it."""
    pack = make_pack(tmp_path / "pack", change=warm)
    assert changed(pack, 0.0) == {"group": False, "item": False, "tags": False}
    assert changed(pack, 0.5) == {"group": True, "item": True, "tags": True}


@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_learn_the_same(tmp_path: Path, nproc: int) -> None:
    pack = make_pack(tmp_path / "pack", change=warm)
    alone = run_steps(Mesh(), settings_of(pack, 0.2), 8)
    assert_same(run_ranks(nproc, run_steps, settings_of(pack, 0.2), 8)[0], alone, 1e-9)
    unmasked = run_steps(Mesh(), settings_of(pack, 0.0), 8)
    assert not np.allclose(alone["trace"], unmasked["trace"])


def test_prefetch_changes_nothing(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack", change=warm)
    ahead, at_once = (
        run_steps(Mesh(), settings_of(pack, 0.2, loader=LoaderConfig(tasks_per_batch=7, prefetch=n)), 4) for n in (3, 0)
    )
    assert_same(ahead, at_once, 0.0)


@pytest.mark.parametrize("nproc", [1, 2])
def test_micro_batches_change_nothing(tmp_path: Path, nproc: int) -> None:
    """A batch that ranks share out in parts is masked as one that is computed at once."""
    settings = settings_of(make_pack(tmp_path / "pack", change=warm), 0.2)
    assert_same(
        run_ranks(nproc, run_divided, settings, 4, changing)[0]["learned"], run_steps(Mesh(), settings, 4), 1e-9
    )


def test_a_run_that_stops_inside_an_epoch_goes_on_exactly(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack", change=warm)

    def train(name: str, steps: int, *more: object) -> None:
        words = ["--loader.tasks_per_batch", 7, "--schedule.max_steps", steps, *more]
        gmeta(*train_words(pack, tmp_path / name, "--schedule.checkpoint_every", 5, "--schedule.eval_every", 5, *words))

    train("whole", 14, "--embedding.id_dropout", 0.2)
    train("stopped", 5, "--embedding.id_dropout", 0.2)
    train("stopped", 14, "--resume", "true")  # which keeps the share
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert recorded(tmp_path / "stopped") == 0.2


def one_epoch(mesh: Mesh, settings: TrainConfig) -> None:
    own_loop(mesh, settings)


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_it_is_on_where_a_split_has_cold_ids(tmp_path: Path, nproc: int) -> None:
    cold, none = (
        make_pack(tmp_path / name, test=tests, counts=1000, change=cold_in_test)
        for name, tests in (("cold", 21), ("none", 20))
    )
    for pack, share in ((cold, 0.02), (none, 0.0)):
        settings = settings_of(
            pack, None, run_dir=str(tmp_path / f"of-{pack.name}"), schedule=ScheduleConfig(max_steps=1)
        )
        run_ranks(nproc, one_epoch, settings)
        assert recorded(Path(settings.run_dir)) == share


def test_a_run_that_masked_nothing_goes_on_so(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack", test=21, counts=1000, change=cold_in_test)
    gmeta(*train_words(pack, tmp_path / "run", "--embedding.id_dropout", 0, epochs=1))
    gmeta(*train_words(pack, tmp_path / "run", "--resume", "true"))
    assert recorded(tmp_path / "run") == 0.0


def test_evaluation_masks_nothing(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack", change=warm)
    masked, plain = (build_run(settings_of(pack, share), Mesh(), threading.Event()) for share in (0.9, 0.0))
    found, expected = (
        score_split(run.state.system, open_pack(pack).split("train"), tasks_per_batch=64) for run in (masked, plain)
    )
    assert found is not None
    assert expected is not None
    np.testing.assert_array_equal(found.after, expected.after)


@pytest.mark.parametrize("share", ["1", "-0.1", "nan"])
def test_a_share_outside_0_to_1_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], share: str) -> None:
    words = train_words(make_pack(tmp_path / "pack"), tmp_path / "run", "--embedding.id_dropout", share)
    fails(words, capsys, "embedding.id_dropout")


KEYED = {  # the pack's task column is also a feature, as user_id is in MovieLens packs
    "schema": replace(SCHEMA, task="group"),
    "data_schema": replace(DATA_SCHEMA, task="group"),
}


def features_of(run_dir: Path) -> list[str]:
    features: list[str] = yaml.safe_load((run_dir / "config.yaml").read_text())["model"]["features"]
    assert sorted(load_system(run_dir, "last", Mesh())[0].learner.features) == sorted(
        features or ["group", "item", "tags"]
    )
    return features


def test_the_key_of_the_task_is_read_only_if_it_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """New tasks are what a model adapts to: their keys are unknown."""
    pack = make_pack(tmp_path / "pack", **KEYED)
    gmeta(*train_words(pack, tmp_path / "usual", epochs=1))
    assert "the model does not read 'group', the task's own key" in capsys.readouterr().err
    assert features_of(tmp_path / "usual") == ["item", "tags"]
    gmeta(*train_words(pack, tmp_path / "usual", "--resume", "true"))
    capsys.readouterr()
    gmeta(*train_words(pack, tmp_path / "named", "--model.features", "[item, group]", epochs=1))
    assert "own key" not in capsys.readouterr().err
    assert features_of(tmp_path / "named") == ["item", "group"]
    taste = ["--model.name", "taste", "--model.args.task_features", "[group]"]
    fails(train_words(pack, tmp_path / "taste", *taste), capsys, "names 'group'", "only if model.features names it")
    gmeta(*train_words(pack, tmp_path / "taste", *taste, "--model.features", "[item, group]", epochs=1))


def test_a_run_of_a_release_that_read_the_key_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lists no features, which meant all."""
    pack = make_pack(tmp_path / "pack", **KEYED)
    with monkeypatch.context() as patch:
        patch.setattr(session, "usual_features", lambda schema: [])
        gmeta(*train_words(pack, tmp_path / "run", epochs=1))
    words = train_words(pack, tmp_path / "run", "--resume", "true")
    gmeta(*words)
    assert features_of(tmp_path / "run") == []
    gmeta(*words, "--model.features", "[group, item, tags]", "--schedule.epochs", 3)  # the same in words
    fails([*words, "--model.features", "[item]"], capsys, "model.features is ['item']", "['group', 'item', 'tags']")
