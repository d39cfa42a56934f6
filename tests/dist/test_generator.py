"""Vectors for unknown ids, made of other columns: exact on any ranks and in both engines, trained, saved and served."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import fails, gmeta, train_words
from harness import run_ranks
from packs import DATA_SCHEMA, TAGS, make_pack, raw_rows
from test_cold_ids import recorded, warm
from test_division import changing, run_divided
from test_train import assert_same, config, run_steps
from test_trainer import assert_same_run

import gmeta as package
from gmeta.config.train import DenseConfig, EmbeddingConfig, MetaConfig, TrainConfig
from gmeta.data.pack import open_pack
from gmeta.data.schema import OOV
from gmeta.evaluation.score import Scores, score_split
from gmeta.models.generator import NAME
from gmeta.parallel.mesh import Mesh
from gmeta.training.build import build_run
from gmeta.training.run import Run

pytestmark = pytest.mark.dist

GENERATOR = {"item": ["tags", "price"], "group": ["age"]}


def settings_of(pack: Path, share: float | None = 0.3, generator: Any = GENERATOR, **changes: Any) -> TrainConfig:
    embedding = EmbeddingConfig(lr=0.1, init_std=0.5, id_dropout=share, generator=generator)
    return config(pack, embedding=embedding, **changes)


def fill(run: Run) -> None:
    """Give the last layers, which start at 0, something to say."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in getattr(run.state.system.learner.model, NAME).parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_learn_the_same(tmp_path: Path, nproc: int) -> None:
    pack = make_pack(tmp_path / "pack", change=warm)
    alone = run_steps(Mesh(), settings_of(pack), 5)
    assert_same(run_ranks(nproc, run_steps, settings_of(pack), 5)[0], alone, 1e-9)
    assert np.abs(alone[f"model.{NAME}.networks.0.2.weight"]).max() > 0


def test_micro_batches_sharded_layers_and_modulation_change_nothing(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack", change=warm)
    settings = settings_of(pack, meta=MetaConfig(modulation="film"), dense=DenseConfig(sharding="GGG"))
    divided = run_ranks(2, run_divided, settings, 3, changing)[0]["learned"]
    assert_same(divided, run_steps(Mesh(), settings, 3), 1e-9)


@pytest.mark.parametrize("adapt", [["embeddings", "dense"], pytest.param(["embeddings"], marks=pytest.mark.slow)])
def test_both_engines_learn_the_same(tmp_path: Path, adapt: list[str]) -> None:
    pack = make_pack(tmp_path / "pack", train=12, valid=2, test=2)
    found = [
        run_steps(
            Mesh(), settings_of(pack, meta=MetaConfig(adapt=adapt, inner_steps=2, inner_lr=0.3, engine=engine)), 3
        )
        for engine in ("factored", "reference")
    ]
    assert_same(*found, 1e-9)


def test_it_starts_as_a_run_without_it(tmp_path: Path) -> None:
    """Before adaptation, that is: a task that adapts all dense layers adapts its layers too."""
    pack = make_pack(tmp_path / "pack", change=warm)
    trace, plain = (run_steps(Mesh(), settings_of(pack, generator=g), 3)["trace"] for g in (GENERATOR, {}))
    assert trace[0, 1] == pytest.approx(plain[0, 1], rel=1e-12)
    assert abs(trace[2, 1] - plain[2, 1]) > 1e-6


def test_only_unknown_ids_read_it(tmp_path: Path) -> None:
    """Row by row, under plain training, which mixes no rows; padding is no unknown id."""
    pack = make_pack(tmp_path / "pack")
    run = build_run(settings_of(pack, meta=MetaConfig(adapt=[])), Mesh(), threading.Event())
    test = open_pack(pack).split("test")

    def scores() -> Scores:
        found = score_split(run.state.system, test, tasks_per_batch=64)
        assert found is not None
        return found

    before = scores()
    fill(run)
    after = scores()
    unknown = (test.feature_ids("item") == OOV) | (test.feature_ids("group") == OOV)
    np.testing.assert_array_equal(before.after != after.after, unknown[after.row])
    assert 0 < unknown[after.row].sum() < len(after.row)


def test_a_task_adapts_the_row_of_unknown_ids(tmp_path: Path) -> None:
    """The vector is added to that row, so that what a task's support says of unknown items is not lost."""
    pack = make_pack(tmp_path / "pack", change=lambda arrays: arrays["ids"][:, 1].fill(OOV))
    settings = settings_of(pack, meta=MetaConfig(adapt=["embeddings.item"], inner_lr=0.5))
    run = build_run(settings, Mesh(), threading.Event())
    fill(run)
    found = score_split(run.state.system, open_pack(pack).split("test"), tasks_per_batch=64)
    assert found is not None
    assert np.abs(found.after - found.before).max() > 1e-6


def test_a_run_goes_on_is_evaluated_and_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The share of masks comes with a generator; other generators do not fit the checkpoint."""
    pack = make_pack(tmp_path / "pack", change=warm)

    def train(name: str, steps: int, *more: object) -> list[str]:
        words = ["--loader.tasks_per_batch", 7, "--schedule.max_steps", steps, "--schedule.eval_every", 5, *more]
        words += ["--embedding.generator", "{item: [tags, price]}"]
        return train_words(pack, tmp_path / name, "--schedule.checkpoint_every", 5, *words)

    gmeta(*train("whole", 14))
    gmeta(*train("stopped", 5))
    gmeta(*train("stopped", 14, "--resume", "true"))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert recorded(tmp_path / "whole") == 0.02
    words = train("stopped", 15, "--resume", "true")
    fails([*words, "--embedding.generator", "{item: [group]}"], capsys, "embedding.generator.item", "new run_dir")
    gmeta("evaluate", "--run_dir", tmp_path / "whole", "--resamples", 2, "--baselines", "false")

    rec = package.load(tmp_path / "whole")
    rows = {**raw_rows("group1"), "item": ["item1", "new", "item2"]}
    support = {**raw_rows("group1"), "click": [1, 0, 1]}
    known = rec.adapt(support).predict(rows)
    for parameter in getattr(rec.system.learner.model, NAME).parameters():
        parameter.data.fill_(0.3)
    np.testing.assert_array_equal(rec.adapt(support).predict(rows) != known, [False, True, False])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["{item: [tag]}"], ["embedding.generator.item names 'tag'", "did you mean 'tags'?"]),
        (["{item: [item]}"], ["embedding.generator.item names 'item'", "group"]),
        (["{itm: [tags]}"], ["embedding.generator names 'itm'", "did you mean 'item'?"]),
        (["{item: [tags]}", "--model.features", "[item, group]"], ["names 'tags', which the model does not read"]),
        (
            ["{item: [tags]}", "--model.features", "[item]", "--model.numeric", "false"],
            ["names 'tags', which the model does not read: there is: none"],
        ),
        (["{tags: [item]}"], ["embedding.generator names 'tags', which has many values a row"]),
        (["{item: tags}"], ["embedding.generator.item is 'tags'", "must be a list of columns"]),
        (["{item: []}"], ["embedding.generator.item is []", "must be a list of columns"]),
        (["[item]"], ["embedding.generator"]),
        (["{item: [tags]}", "--embedding.id_dropout", 0], ["embedding.id_dropout is 0", "learns from masked ids"]),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[object], words: list[str]
) -> None:
    pack = make_pack(tmp_path / "pack", train=4, valid=2, test=2)
    fails(train_words(pack, tmp_path / "run", "--embedding.generator", *more), capsys, *words)


def test_a_hashed_feature_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hashed = tuple(replace(f, hash_buckets=TAGS - 1) if f.name == "group" else f for f in DATA_SCHEMA.features)
    pack = make_pack(tmp_path / "pack", data_schema=replace(DATA_SCHEMA, features=hashed))
    words = train_words(pack, tmp_path / "run", "--embedding.generator", "{group: [age]}")
    fails(words, capsys, "embedding.generator names 'group', which is hashed")
