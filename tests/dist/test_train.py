"""Training on 1, 2 and 4 processes is the same training: same losses, same weights, same rows."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Pool, run_ranks
from packs import make_pack, small_model

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, no package

from steps import one_step, start_step
from study.variants import parts

from gmeta.config.train import (
    CommConfig,
    DenseConfig,
    EmbeddingConfig,
    LoaderConfig,
    MetaConfig,
    ModelConfig,
    TrainConfig,
)
from gmeta.evaluation.score import score_split
from gmeta.parallel.collectives import gather_to_rank_0
from gmeta.parallel.mesh import Mesh, PeerLost
from gmeta.training.build import build_run
from gmeta.training.records import traffic_record
from gmeta.training.run import Run

pytestmark = pytest.mark.dist
SLOW = pytest.mark.slow


def config(pack: Path, **changes: Any) -> TrainConfig:
    """Ragged tasks, second order, embeddings and every layer adapted, learned rates, clipping that bites, float64."""
    values: dict[str, Any] = {
        "pack": str(pack),
        "run_dir": "unused",
        "precision": "float64",
        "model": ModelConfig(
            name="melu", embedding_dim=5, args={"hidden": [12, 6], "layer_norm": True, "dropout": 0.1}
        ),
        "meta": MetaConfig(inner_steps=2, learn_inner_lr=True, inner_lr=0.3),
        "embedding": EmbeddingConfig(lr=0.1, weight_decay=0.01, init_std=0.5),
        "dense": DenseConfig(lr=0.01, clip_norm=0.05, warmup_steps=5, decay="cosine", weight_decay=0.1),
        "loader": LoaderConfig(tasks_per_batch=7, window_batches=3),
    }
    return TrainConfig(**{**values, **changes})


def run_steps(mesh: Mesh, settings: TrainConfig, steps: int, switches: tuple[str, ...] = ()) -> dict[str, Any]:
    """Losses and norms of each step, then every weight, on rank 0. `switches` are the study's."""
    run = build_run(settings, mesh, threading.Event(), parts=parts(*switches))
    trace = []
    with run.loader:
        for _ in range(steps):
            stats = one_step(run)
            trace.append([stats["loss"], stats["support_loss"], stats["grad_norm"], stats["samples"]])
    return learned(run, trace)


def learned(run: Run, trace: list[list[float]]) -> dict[str, Any]:
    """`trace`, and every weight, on rank 0; the run is over."""
    run.state.dense.close()
    dense = {name: p.detach().cpu().numpy().copy() for name, p in run.state.system.objective.named_parameters()}
    rows = {
        f"{name}.{key}": gather_to_rank_0(value.cpu().numpy(), run.state.mesh)
        for name, table in run.state.system.tables.fused.items()
        for key, value in (("weight", table.weight), *table.state.items())
    }
    return {"trace": np.array(trace), **dense, **rows}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    ("nproc", "optimizer"),
    [
        (2, "rowwise_adagrad"),
        *(
            pytest.param(*case, marks=SLOW)
            for case in ((2, "adagrad"), (2, "adam"), (4, "adam"), (4, "rowwise_adagrad"))
        ),
    ],
)
def test_twenty_steps_equal_one_process(tmp_path: Path, nproc: int, optimizer: str) -> None:
    settings = config(
        make_pack(tmp_path / "pack"), embedding=EmbeddingConfig(optimizer=optimizer, lr=0.05, init_std=0.5)
    )
    alone = run_steps(Mesh(), settings, 20)
    together = run_ranks(nproc, run_steps, settings, 20)[0]
    assert_same(together, alone, 1e-9)
    assert not np.allclose(alone["trace"][0], alone["trace"][-1])


@pytest.mark.parametrize(
    ("kind", "nproc"), [("cluster", 2), *(pytest.param("film", ranks, marks=SLOW) for ranks in (2, 4))]
)
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


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=SLOW)])
def test_episodes_and_tasks_without_support_equal_one_process(tmp_path: Path, nproc: int) -> None:
    def take_support(arrays: dict[str, np.ndarray]) -> None:
        arrays["num_support"][::3] = 0

    pack = make_pack(tmp_path / "pack", train=9, change=take_support)
    settings = config(pack, loader=LoaderConfig(tasks_per_batch=4, episode_rows=4))
    alone = run_steps(Mesh(), settings, 10)
    assert_same(run_ranks(nproc, run_steps, settings, 10)[0], alone, 1e-9)
    assert np.isfinite(alone["trace"]).all()
    whole = run_steps(Mesh(), config(pack, loader=LoaderConfig(tasks_per_batch=4)), 10)
    assert whole["trace"][:, 3].sum() > alone["trace"][:, 3].sum()  # an episode has fewer rows than its task


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


CHOICES = [
    ("separate",),
    ("copies",),
    ("central",),
    ("central", "no_overlap"),
    ("no_overlap",),
    ("ids_in_step",),
    ("nothing_ahead",),
    ("separate", "copies", "central", "no_overlap", "nothing_ahead"),
]


@pytest.mark.parametrize("switches", CHOICES, ids="-".join)
@pytest.mark.parametrize("nproc", [pytest.param(1, marks=SLOW), 2, pytest.param(4, marks=SLOW)])
def test_no_switch_of_the_study_changes_what_is_learned(tmp_path: Path, nproc: int, switches: tuple[str, ...]) -> None:
    settings = config(make_pack(tmp_path / "pack"))
    alone = run_steps(Mesh(), settings, 4)
    assert_same(run_ranks(nproc, run_steps, settings, 4, switches)[0], alone, 1e-9)


def test_nodes_do_not_change_what_is_learned(tmp_path: Path) -> None:
    settings = config(make_pack(tmp_path / "pack"))
    together = run_ranks(4, run_steps, settings, 8, node_size=2)[0]
    assert_same(together, run_steps(Mesh(), settings, 8), 1e-9)


def losses_and_dense_bits(mesh: Mesh, settings: TrainConfig) -> tuple[list[float], list[bytes]]:
    run = build_run(settings, mesh, threading.Event())
    with run.loader:
        losses = [one_step(run)["loss"] for _ in range(4)]
    run.state.dense.close()
    return losses, [p.detach().numpy().tobytes() for p in run.state.system.objective.parameters()]


@pytest.mark.parametrize(("wire", "tolerance"), [("bf16", 2**-7), ("fp16", 2**-10)])
def test_short_types_on_the_wire_keep_ranks_equal_and_near(tmp_path: Path, wire: Any, tolerance: float) -> None:
    """Dense weights are the same bits on every rank; losses are near those of exact rows, and differ from them."""
    pack = make_pack(tmp_path / "pack")
    exact, _ = losses_and_dense_bits(Mesh(), config(pack))
    for nproc in (1, 2):
        ranks = run_ranks(nproc, losses_and_dense_bits, config(pack, comm=CommConfig(wire=wire)))
        assert all(rank == ranks[0] for rank in ranks)
        assert ranks[0][0] == pytest.approx(exact, abs=tolerance)
        assert ranks[0][0] != pytest.approx(exact, abs=1e-6)


def ask_to_stop(mesh: Mesh, settings: TrainConfig, who: int) -> list[bool]:
    """Rank `who` is told to stop before the second step."""
    stop = threading.Event()
    run = build_run(settings, mesh, stop)
    stops = []
    with run.loader:
        for step in range(3):
            if step == 1 and mesh.rank == who:
                stop.set()
            stats = one_step(run)
            stops.append(stats["stop"] > 0)
    run.state.dense.close()
    return stops


@pytest.mark.parametrize("nproc", [1, 2, pytest.param(4, marks=SLOW)])
def test_all_ranks_stop_at_the_same_step(tmp_path: Path, nproc: int) -> None:
    settings = config(make_pack(tmp_path / "pack"))
    assert run_ranks(nproc, ask_to_stop, settings, nproc - 1) == [[False, True, True]] * nproc


def traffic_of_steps(mesh: Mesh, settings: TrainConfig, switches: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    run = build_run(settings, mesh, threading.Event(), parts=parts(*switches))
    found = []
    with run.loader:
        for _ in range(3):
            started = start_step(run)
            found.append(traffic_record(run.state, started))
    run.state.dense.close()
    return found


@pytest.mark.parametrize(
    ("switches", "wire"),
    [
        ((), "float32"),
        (("separate", "copies"), "float32"),
        (("central",), "float32"),
        (("no_overlap", "ids_in_step"), "bf16"),
        ((), "fp16"),
    ],
    ids=["default", "separate", "central", "bf16", "fp16"],
)
@pytest.mark.parametrize(("nproc", "node_size"), [(1, 0), (2, 0), pytest.param(4, 0, marks=SLOW), (4, 2)])
def test_a_step_sends_what_the_formulas_say(
    tmp_path: Path, nproc: int, node_size: int, switches: tuple[str, ...], wire: Any
) -> None:
    settings = config(make_pack(tmp_path / "pack"), precision="float32", comm=CommConfig(wire=wire))
    ranks = run_ranks(nproc, traffic_of_steps, settings, switches, node_size=node_size)
    for steps in ranks:
        for found in steps:
            assert found["measured"] == found["predicted"]
    if nproc == 1:
        assert not any(kind["calls"] for kind in ranks[0][0]["measured"].values())
        return
    size = 4 * sum(p.numel() for p in build_run(settings, Mesh(), threading.Event()).state.system.learner.parameters())
    for rank, steps in enumerate(ranks):
        dense = steps[0]["measured"]["dense"]
        if "central" in switches:
            assert dense == {
                "bytes": size * (nproc - 1 if rank == 0 else 1),
                "remote_bytes": dense["bytes"],
                "calls": 2,
            }
        else:
            assert dense["bytes"] == dense["remote_bytes"] == round(2 * size * (nproc - 1) / nproc)
        assert steps[0]["measured"]["control"]["calls"] == 2
        assert steps[0]["measured"]["rows"]["bytes"] > steps[0]["measured"]["rows"]["remote_bytes"] > 0


def validate_between_steps(mesh: Mesh, settings: TrainConfig) -> list[float]:
    """Losses of steps around validations, which exchange ids of their own while batches are ahead."""
    run = build_run(settings, mesh, threading.Event())
    losses = []
    with run.loader:
        for _ in range(4):
            losses.append(one_step(run)["loss"])
            run.loader.settle()
            scores = score_split(run.state.system, run.pack.split("valid"), tasks_per_batch=4)
            losses.append(0.0 if scores is None else float(scores.after.sum()))
    run.state.dense.close()
    return losses


@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=SLOW)])
def test_validation_between_steps_equals_one_process(tmp_path: Path, nproc: int) -> None:
    settings = config(make_pack(tmp_path / "pack"))
    (alone,) = run_ranks(1, validate_between_steps, settings)
    assert run_ranks(nproc, validate_between_steps, settings)[0] == pytest.approx(alone, rel=1e-9)


def fail_in_the_thread(mesh: Mesh, settings: TrainConfig) -> str:
    """Rank 1's loader fails at its third batch and closes at once; what does every rank end with?"""
    run = build_run(settings, mesh, threading.Event())
    real, made = run.loader._transform, []

    def transform(batch: Any) -> Any:
        made.append(batch)
        if mesh.rank == 1 and len(made) == 3:
            raise ValueError("shard 7 is damaged")
        return real(batch)

    run.loader._transform = transform
    try:
        with run.loader:
            while True:
                start_step(run)
    except ValueError as error:
        assert len(made) == 3, "a batch was made, and its ids sent, after the one that failed"
        os._exit(int(str(error) != "shard 7 is damaged"))  # as a process with a user's mistake ends
    except PeerLost as error:
        return str(error)


def test_an_error_in_one_loader_thread_ends_the_others_as_lost_peers(tmp_path: Path) -> None:
    pool = Pool(2, 60, 0)
    started = time.monotonic()
    try:
        with pytest.raises(AssertionError, match="--- rank 1 ---\nthe process died, exit code 0"):
            pool.run(fail_in_the_thread, (config(make_pack(tmp_path / "pack")),), 60)
        assert "rank 0 lost its peers" in pool.results[0]
        assert "resume from the last checkpoint" in pool.results[0]
    finally:
        pool.close()
    assert time.monotonic() - started < 50, "it waited for the time-out"


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
        model=small_model(model),
        meta=MetaConfig(inner_steps=2, inner_lr=0.3, learn_inner_lr=True, adapt=adapt, order=order, engine=engine),
        loader=LoaderConfig(tasks_per_batch=7, window_batches=3, resample=True),
    )
    steps = 4 if engine == "reference" else 20
    assert_same(run_ranks(nproc, run_steps, settings, steps)[0], run_steps(Mesh(), settings, steps), 1e-9)
