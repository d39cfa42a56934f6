"""gmeta's trainer with sharded dense layers learns what it learns with replicated ones."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_ranks
from packs import make_pack
from steps import end_of, one_step, start_step
from test_division import always_late, changing, run_divided
from test_train import assert_same, config, run_steps, traffic_of_steps

from gmeta.config.train import DenseConfig, MetaConfig, TrainConfig
from gmeta.evaluation.score import score_split
from gmeta.parallel.mesh import Mesh
from gmeta.training.build import build_run, bytes_of_rows
from gmeta.training.records import traffic_record
from gmeta.training.saving import load_checkpoint, save_checkpoint
from gmeta.training.validation import validate

DENSE: dict[str, Any] = {"lr": 0.01, "clip_norm": 0.05, "warmup_steps": 5, "decay": "cosine", "weight_decay": 0.1}


def placed(strategy: str, group_size: int = 2) -> DenseConfig:
    return DenseConfig(**DENSE, sharding=strategy, node_size=group_size)


@pytest.mark.parametrize(
    ("nproc", "strategy"),
    [
        (1, "GGG"),
        (2, "III"),
        pytest.param(4, "NII", marks=pytest.mark.slow),
        pytest.param(4, "IIG", marks=pytest.mark.slow),
        pytest.param(4, "GGG", marks=pytest.mark.slow),
    ],
)
def test_twenty_steps_equal_replicated_ones(tmp_path: Path, nproc: int, strategy: str) -> None:
    """Second order, learned inner rates, clipping, weight decay of matrices alone."""
    pack = make_pack(tmp_path / "pack")
    alone = run_steps(Mesh(), config(pack), 20)
    together = run_ranks(nproc, run_steps, config(pack, dense=placed(strategy)), 20)[0]
    assert_same(together, alone, 1e-9)
    assert not np.allclose(alone["trace"][0], alone["trace"][-1])


_OTHERS = [("IIG", 2), ("GGG", 1), ("GGG", 4), *(("NIG", ranks) for ranks in (1, 2, 4))]


@pytest.mark.parametrize(
    ("strategy", "nproc"),
    [("IIG", 1), ("GGG", 2), ("IIG", 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in _OTHERS)],
)
def test_a_step_sends_what_the_formulas_say(tmp_path: Path, nproc: int, strategy: str) -> None:
    """From the second step on: what the first one updated is sent before the second one's end."""
    settings = config(make_pack(tmp_path / "pack"), dense=placed(strategy))
    for steps in run_ranks(nproc, traffic_of_steps, settings):
        for found in steps[1:]:
            assert found["measured"] == found["predicted"]
        assert (nproc > 1) == bool(steps[1]["measured"]["dense"]["remote_bytes"])
        assert steps[0]["measured"]["dense"]["calls"] == (nproc > 1)


def traffic_around_validation(mesh: Mesh, settings: TrainConfig) -> list[dict[str, Any]]:
    run = build_run(settings, mesh, threading.Event())
    run.log.start()
    found = []
    with run.loader:
        for step in range(4):
            started = start_step(run)
            found.append(traffic_record(run.state, started))
            end_of(run, started)
            if step == 1:
                validate(run)
    run.log.close()
    run.state.dense.close()
    return found


def test_what_validation_gathers_is_expected(tmp_path: Path) -> None:
    settings = config(make_pack(tmp_path / "pack", valid=6), run_dir=str(tmp_path / "run"), dense=placed("IIG"))
    for steps in run_ranks(4, traffic_around_validation, settings):
        sent = [found["measured"]["dense"]["bytes"] for found in steps]
        assert sent[1] == sent[3] < sent[2]
        assert all(found["measured"] == found["predicted"] for found in steps[1:])


@pytest.mark.parametrize(
    ("nproc", "memory_gb", "engine"),
    [(1, None, "Replicated"), pytest.param(4, None, "Replicated", marks=pytest.mark.slow), (4, 7e-6, "Sharded")],
)
def test_the_planner_chooses(tmp_path: Path, nproc: int, memory_gb: float | None, engine: str) -> None:
    """The strategy that the planner takes learns the same; with little memory it is a sharded one."""
    pack = make_pack(tmp_path / "pack")
    auto = DenseConfig(**DENSE, sharding="auto", node_size=2, memory_gb=memory_gb)
    assert set(run_ranks(nproc, engine_of, config(pack, dense=auto))) == {f"{engine}Dense"}
    (expected, *_) = run_ranks(nproc, run_steps, config(pack), 4)
    (found, *_) = run_ranks(nproc, run_steps, config(pack, dense=auto), 4)
    assert_same(found, expected, 1e-9)


def rows_of(mesh: Mesh, settings: TrainConfig) -> tuple[float, float, dict[str, Any]]:
    """Return what the planner is told, the same counted from ids, and where the loader is then."""
    run = build_run(settings, mesh, threading.Event())
    with run.loader:
        told = bytes_of_rows(run.loader, run.state.system, torch.float32)
        at = run.loader.state_dict()
        counted = 0.0
        for _ in range(4):
            batch = next(run.loader).batch
            request = run.state.system.exchange.request(batch.support, batch.query)
            counted += sum(len(rows) * run.state.system.tables.fused[name].dim for name, rows in request.rows.items())
    run.state.dense.close()
    return told, counted, at


@pytest.mark.parametrize("nproc", [1, 2])
def test_the_planner_knows_the_rows_of_the_first_batches(tmp_path: Path, nproc: int) -> None:
    for told, counted, at in run_ranks(nproc, rows_of, config(make_pack(tmp_path / f"pack{nproc}"))):
        assert told == pytest.approx(counted)  # four batches, four bytes
        assert told > 0
        assert at == {"epoch": 0, "index": 0}


def engine_of(mesh: Mesh, settings: TrainConfig) -> str:
    run = build_run(settings, mesh, threading.Event())
    run.loader.close()
    run.state.dense.close()
    return type(run.state.dense).__name__


@pytest.mark.slow
def test_plain_training(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack")
    alone = run_steps(Mesh(), config(pack, meta=MetaConfig(adapt=[])), 20)
    together = run_ranks(4, run_steps, config(pack, meta=MetaConfig(adapt=[]), dense=placed("IIG")), 20)[0]
    assert_same(together, alone, 1e-9)


def trained_on(mesh: Mesh, settings: TrainConfig, load: bool, steps: int) -> dict[str, Any]:
    """Steps from the last checkpoint, or from none to a checkpoint; losses, and the valid split's scores."""
    run = build_run(settings, mesh, threading.Event())
    run.log.start()
    trace = []
    with run.loader:
        if load:
            (found,) = (run.state.run_dir / "checkpoints").glob("step-*")
            load_checkpoint(run, found)
        for _ in range(steps):
            stats = one_step(run)
            trace.append([stats["loss"], stats["grad_norm"]])
        if not load:
            save_checkpoint(run)
        validate(run)
        with run.state.dense.unsharded():
            scores = score_split(run.state.system, run.pack.split("valid"), tasks_per_batch=8)
    run.log.close()
    run.state.dense.close()
    return {"trace": np.array(trace), "after": scores.after if scores is not None else None}


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("NNN", "IIG"),
        pytest.param("IIG", "NNN", marks=pytest.mark.slow),
        pytest.param("GGG", "NIG", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_of_one_placement_continues_under_another(tmp_path: Path, saved: str, loaded: str) -> None:
    pack = make_pack(tmp_path / "pack", valid=6)

    def settings(strategy: str) -> TrainConfig:
        return config(pack, run_dir=str(tmp_path / "run"), dense=placed(strategy))

    run_ranks(4, trained_on, settings(saved), False, 4)
    (expected, *_) = run_ranks(4, trained_on, settings(saved), True, 4)
    (found, *_) = run_ranks(4, trained_on, settings(loaded), True, 4)
    assert_same(found, expected, 1e-9)


@pytest.mark.parametrize("divide", [pytest.param(changing, marks=pytest.mark.slow), always_late])
@pytest.mark.parametrize(
    "strategy", ["IIG", pytest.param("NIG", marks=pytest.mark.slow), pytest.param("GGG", marks=pytest.mark.slow)]
)
def test_ranks_with_different_numbers_of_micro_batches(tmp_path: Path, strategy: str, divide: Any) -> None:
    """Unequal slots, a rank without one, parts left over: gradients are reduced once, after all of them."""
    pack = make_pack(tmp_path / "pack")
    (expected, *_) = run_ranks(4, run_divided, config(pack), 8, divide)
    (found, *_) = run_ranks(4, run_divided, config(pack, dense=placed(strategy)), 8, divide)
    assert_same(found["learned"], expected["learned"], 1e-9)


def test_a_placement_that_breaks_the_rule(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nearest are GGG"):
        build_run(config(make_pack(tmp_path / "pack"), dense=placed("GGN")), Mesh(), threading.Event())
