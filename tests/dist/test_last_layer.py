"""A last layer in closed form, and rows that start from factor analysis, on 1, 2 and 4 processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import fails, gmeta, train_words
from harness import run_ranks
from packs import make_pack
from test_train import assert_same, config, run_steps

from gmeta.config.train import MetaConfig, ModelConfig, TrainConfig
from gmeta.data.pack import open_pack
from gmeta.evaluation.baselines import FactorModel, fold_in
from gmeta.parallel.mesh import Mesh
from gmeta.runs.log import read_metrics
from gmeta.training.bayes_factors import fit_items

pytestmark = pytest.mark.dist

MODEL = ModelConfig(name="neural_linear", embedding_dim=5, args={"hidden": [6], "task_features": ["group"]})


def settings(pack: Path, adapt: tuple[str, ...] = ("last_layer",), **changes: Any) -> TrainConfig:
    return config(pack, model=MODEL, meta=MetaConfig(adapt=list(adapt), inner_steps=2, inner_lr=0.1), **changes)


@pytest.mark.parametrize("sharding", ["NNN", pytest.param("IIG", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "adapt", [("last_layer",), pytest.param(("embeddings.item", "last_layer"), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_learn_what_one_learns(tmp_path: Path, nproc: int, adapt: tuple[str, ...], sharding: str) -> None:
    pack = make_pack(tmp_path / "pack")
    alone = run_steps(Mesh(), settings(pack, adapt), 12)
    dense = replace(settings(pack).dense, sharding=sharding, node_size=1)
    together = run_ranks(nproc, run_steps, settings(pack, adapt, dense=dense), 12)[0]
    assert_same(together, alone, 1e-9)
    assert not np.allclose(alone["trace"][0], alone["trace"][-1])


# From factor analysis

WORDS = ["--model.name", "neural_linear", "--model.features", "[item]", "--model.numeric", "false"]
WORDS += ["--model.embedding_dim", "5", "--meta.adapt", "[last_layer]", "--embedding.start", "factors"]


def scores(run_dir: Path) -> np.ndarray:
    gmeta("evaluate", "--run_dir", run_dir, "--resamples", 2, "--baselines", "false", "--checkpoint", 0)
    return pq.read_table(run_dir / "predictions.parquet")["after"].to_numpy()


def test_the_start_is_factor_analysis(tmp_path: Path) -> None:
    """With squared losses and no bias of a task's own, step 0 scores what the items' posterior means predict."""
    pack = make_pack(tmp_path / "pack", train=60, valid=8, test=9)
    words = [*WORDS, "--loss", "mse", "--model.args.bias_std", 1e-6, "--precision", "float64"]
    words += ["--embedding.init_std", 0]  # loadings stay as they are found, small as they are
    gmeta(*train_words(pack, tmp_path / "run", epochs=1), *words)
    found = scores(tmp_path / "run")
    train, test = (open_pack(pack).split(name).columns(("item",)) for name in ("train", "test"))
    items, position = np.unique(train.ids["item"], return_inverse=True)
    _, task = np.unique(train.task, return_inverse=True)
    fitted = fit_items(task, position, train.label, seed=0, num_factors=4, binary=False)
    at = np.minimum(np.searchsorted(items, test.ids["item"]), len(items) - 1)
    at = np.where(items[at] == test.ids["item"], at, -1)
    _, task = np.unique(test.task, return_inverse=True)
    support = ~test.is_query
    model = FactorModel(fitted.mean[:, :-1], fitted.mean[:, -1], fitted.variance)
    latent = fold_in(model, task[support], at[support], test.label[support], num_tasks=int(task.max()) + 1)
    np.testing.assert_allclose(found, model.score(latent[task[~support]], at[~support]), rtol=1e-5, atol=1e-5)
    steps = [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "valid"]
    assert steps[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_start_alike_and_resume(tmp_path: Path, nproc: int) -> None:
    pack = make_pack(tmp_path / "pack", train=60, valid=8, test=9)
    base = [*WORDS, "--precision", "float64"]
    gmeta(*train_words(pack, tmp_path / "one", epochs=2), *base)
    gmeta(*train_words(pack, tmp_path / "many", epochs=1), *base, "--nproc", nproc)
    gmeta(*train_words(pack, tmp_path / "many", epochs=2), *base, "--nproc", nproc, "--resume", "true")
    one, many = (scores(tmp_path / name) for name in ("one", "many"))
    np.testing.assert_allclose(many, one, atol=1e-9)
    last = [
        [r["loss_after"] for r in read_metrics(tmp_path / name / "metrics.jsonl") if r["kind"] == "valid"]
        for name in ("one", "many")
    ]
    np.testing.assert_allclose(last[1], last[0], atol=1e-9)


def test_a_start_that_does_not_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack = make_pack(tmp_path / "pack")
    words = train_words(pack, tmp_path / "run", "--embedding.start", "factors", epochs=1)
    fails(words, capsys, "embedding.start is factors, which are the item rows of model neural_linear")
