"""Training on 1, 2 and 4 processes is the same training: same losses, same weights, same rows."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import run_ranks
from packs import make_pack

from gmeta.config import (
    DenseConfig,
    EmbeddingConfig,
    LoaderConfig,
    MetaConfig,
    ModelConfig,
    TrainConfig,
)
from gmeta.parallel.collectives import gather_to_rank_0
from gmeta.parallel.mesh import Mesh
from gmeta.stepping import Stopwatch
from gmeta.train import build_run, finish_step, train_step

pytestmark = pytest.mark.dist


def config(pack: Path, **changes: Any) -> TrainConfig:
    """Ragged tasks, second order, embeddings and every layer adapted, learned rates, clipping that bites, float64."""
    values: dict[str, Any] = {
        "pack": str(pack),
        "run_dir": "unused",
        "precision": "float64",
        "model": ModelConfig(hidden=[12, 6], embedding_dim=5, layer_norm=True, dropout=0.1),
        "meta": MetaConfig(inner_steps=2, learn_inner_lr=True, inner_lr=0.3),
        "embedding": EmbeddingConfig(lr=0.1, weight_decay=0.01, init_std=0.5),
        "dense": DenseConfig(lr=0.01, clip_norm=0.05, warmup_steps=5, decay="cosine", weight_decay=0.1),
        "loader": LoaderConfig(tasks_per_batch=7, window_batches=3),
    }
    return TrainConfig(**{**values, **changes})


def run_steps(mesh: Mesh, settings: TrainConfig, steps: int) -> dict[str, Any]:
    """Losses and norms of each step, then every weight, on rank 0."""
    run = build_run(settings, mesh, threading.Event())
    trace = []
    with run.loader:
        for _ in range(steps):
            stats = finish_step(run, train_step(run, next(run.loader), Stopwatch(mesh.device)))
            trace.append([stats["loss"], stats["support_loss"], stats["grad_norm"], stats["samples"]])
    run.buckets.close()
    dense = {name: p.detach().cpu().numpy().copy() for name, p in run.system.learner.named_parameters()}
    rows = {
        f"{name}.{key}": gather_to_rank_0(value.cpu().numpy(), mesh)
        for name, group in run.system.tables.groups.items()
        for key, value in (("weight", group.weight), *group.state.items())
    }
    return {"trace": np.array(trace), **dense, **rows}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
@pytest.mark.parametrize("nproc", [2, 4])
def test_twenty_steps_equal_one_process(tmp_path: Path, nproc: int, optimizer: str) -> None:
    settings = config(
        make_pack(tmp_path / "pack"), embedding=EmbeddingConfig(optimizer=optimizer, lr=0.05, init_std=0.5)
    )
    alone = run_steps(Mesh(), settings, 20)
    together = run_ranks(nproc, run_steps, settings, 20)[0]
    assert_same(together, alone, 1e-9)
    assert not np.allclose(alone["trace"][0], alone["trace"][-1])


@pytest.mark.parametrize(("kind", "nproc"), [("cluster", 2), ("film", 4)])
def test_modulated_training_equals_one_process(tmp_path: Path, kind: str, nproc: int) -> None:
    """Nine tasks in batches of four: the last batch of an epoch leaves ranks without one."""
    settings = config(
        make_pack(tmp_path / "pack", train=9),
        meta=MetaConfig(inner_steps=2, inner_lr=0.3, modulation=kind, modulation_dim=5, clusters=3),
        loader=LoaderConfig(tasks_per_batch=4),
    )
    alone = run_steps(Mesh(), settings, 20)
    assert_same(run_ranks(nproc, run_steps, settings, 20)[0], alone, 1e-9)
    start = run_steps(Mesh(), settings, 0)
    changed = [name for name in alone if name.startswith("modulator.") and not np.allclose(alone[name], start[name])]
    assert len(changed) == len([name for name in start if name.startswith("modulator.")]) > 0


def test_plain_training_equals_one_process(tmp_path: Path) -> None:
    settings = config(make_pack(tmp_path / "pack"), meta=MetaConfig(adapt=[]))
    assert_same(run_ranks(2, run_steps, settings, 20)[0], run_steps(Mesh(), settings, 20), 1e-9)


def test_a_rank_without_tasks_takes_part(tmp_path: Path) -> None:
    """The last batch of an epoch holds one task, so three of four ranks have none."""
    settings = config(make_pack(tmp_path / "pack", train=9), loader=LoaderConfig(tasks_per_batch=4))
    assert_same(run_ranks(4, run_steps, settings, 6)[0], run_steps(Mesh(), settings, 6), 1e-9)


def test_seed_and_order_matter(tmp_path: Path) -> None:
    """The comparison above has power: first order or another seed is another training."""
    pack = make_pack(tmp_path / "pack")
    base = run_steps(Mesh(), config(pack), 5)
    for changes in ({"seed": 1}, {"meta": MetaConfig(inner_steps=2, learn_inner_lr=True, inner_lr=0.3, order="first")}):
        other = run_steps(Mesh(), config(pack, **changes), 5)
        assert not np.allclose(other["trace"], base["trace"], rtol=1e-6)


def test_fewer_tasks_than_workers_is_refused(tmp_path: Path) -> None:
    settings = config(make_pack(tmp_path / "pack"), loader=LoaderConfig(tasks_per_batch=1))
    with pytest.raises(AssertionError, match=r"tasks_per_batch is 1, world size is 2"):
        run_ranks(2, run_steps, settings, 1)


ADAPTED = (["embeddings", "dense"], ["dense"], ["head"], ["embeddings.item"], ["decision"], [])
MATRIX = [
    *itertools.product(("auto",), ("melu", "dlrm", "taste"), ADAPTED, ("first", "second"), (2, 3, 4)),
    *itertools.product(("reference",), ("melu",), ADAPTED, ("first", "second"), (2,)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "model", "adapt", "order", "nproc"), MATRIX)
def test_matrix_equals_one_process(
    tmp_path: Path, engine: str, model: str, adapt: list[str], order: str, nproc: int
) -> None:
    settings = config(
        make_pack(tmp_path / "pack"),
        model=ModelConfig(name=model, hidden=[6], bottom=[6], embedding_dim=4, dropout=0.1, task_features=["group"]),
        meta=MetaConfig(inner_steps=2, inner_lr=0.3, learn_inner_lr=True, adapt=adapt, order=order, engine=engine),
        loader=LoaderConfig(tasks_per_batch=7, window_batches=3, resample=True),
    )
    steps = 4 if engine == "reference" else 20
    assert_same(run_ranks(nproc, run_steps, settings, steps)[0], run_steps(Mesh(), settings, steps), 1e-9)
