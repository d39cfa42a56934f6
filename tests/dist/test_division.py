"""Who computes which part of a batch never changes what is learned: fractions, micro-batches, tasks put back."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import run_ranks
from packs import make_pack
from steps import end_of, start_step
from test_train import assert_same, config, learned, parts, run_steps

from gmeta.config.train import MetaConfig, TrainConfig
from gmeta.core.batch import TaskBatch
from gmeta.data.loader import SplitSpec
from gmeta.parallel.mesh import Mesh
from gmeta.training.build import Parts, build_run
from gmeta.training.statistics import Stopwatch
from gmeta.training.step import finish_step, train_step

pytestmark = pytest.mark.dist

TASKS = 7


def changing(world_size: int, step: int) -> SplitSpec:
    """Another split every second step: a rank with nothing, one with nearly all, one to three micro-batches."""
    rng = np.random.default_rng(step // 2)
    tasks = rng.multinomial(TASKS, rng.dirichlet([0.5] * world_size))
    return SplitSpec(tuple(tasks.tolist()), tuple(rng.integers(1, 4, world_size).tolist()))


def always_late(world_size: int, step: int) -> SplitSpec:
    """Every rank is late after its first micro-batch, in two steps of three."""
    return SplitSpec(None, (3,) * world_size, 1e-9 if step % 3 else None)


def run_divided(
    mesh: Mesh, settings: TrainConfig, steps: int, divide: Any, switches: tuple[str, ...] = ()
) -> dict[str, Any]:
    """As `run_steps`, and which tasks each step finished."""
    run = build_run(settings, mesh, threading.Event(), parts=parts(*switches))
    run.loader.split_by(lambda step: divide(mesh.world_size, step))
    trace, finished, places = [], [], []
    with run.loader:
        for _ in range(steps):
            started = start_step(run)
            stats = end_of(run, started)
            division = started.batch.batch_split
            assert division is not None
            left = set()
            if division.drop_after_s is not None:
                left = set(division.unfinished([int(stats[f"finished_{r}"]) for r in range(mesh.world_size)]).tolist())
            finished.append([task for task in division.tasks.tolist() if task not in left])
            assert stats["tasks"] == len(finished[-1])
            places.append((started.batch.epoch, started.batch.index))
            trace.append([stats["loss"], stats["support_loss"], stats["grad_norm"], stats["samples"]])
    return {"learned": learned(run, trace), "finished": finished, "places": places}


def run_given(settings: TrainConfig, batches: list[list[int]], places: list[tuple[int, int]]) -> dict[str, Any]:
    """One process, one step on each list of tasks."""
    run = build_run(settings, Mesh(), threading.Event())
    split, trace = run.pack.split("train"), []
    for tasks, (epoch, index) in zip(batches, places, strict=True):
        batch = TaskBatch(*split.examples(np.array(tasks)), len(tasks), epoch, index)
        stats = finish_step(
            run.state, train_step(run.state, run.state.system.prepare(batch), Stopwatch(run.state.mesh.device))
        )
        trace.append([stats["loss"], stats["support_loss"], stats["grad_norm"], stats["samples"]])
    return learned(run, trace)


SETTINGS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({}, ()),
    ({"meta": MetaConfig(inner_steps=1, inner_lr=0.3, engine="reference")}, ()),
    ({"meta": MetaConfig(adapt=[])}, ()),
    ({}, ("ids_in_step", "no_overlap")),
]


@pytest.mark.parametrize(("changes", "switches"), SETTINGS, ids=["factored", "reference", "plain", "naive"])
@pytest.mark.parametrize("nproc", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_no_division_changes_what_is_learned(
    tmp_path: Path, nproc: int, changes: dict[str, Any], switches: tuple[str, ...]
) -> None:
    settings = config(make_pack(tmp_path / "pack"), **changes)
    alone = run_steps(Mesh(), settings, 12)
    assert_same(run_ranks(nproc, run_divided, settings, 12, changing, switches)[0]["learned"], alone, 1e-10)


@pytest.mark.parametrize("nproc", [1, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (2, 4))])
def test_tasks_that_are_late_come_again_in_their_epoch(tmp_path: Path, nproc: int) -> None:
    """Every task takes effect once an epoch, and a step's update is that of one process on the tasks it finished."""
    settings = config(make_pack(tmp_path / "pack"))
    num_tasks = build_run(settings, Mesh(), threading.Event()).pack.split("train").num_tasks
    ran = run_ranks(nproc, run_divided, settings, 40, always_late)[0]
    whole = range(ran["places"][-1][0])
    assert len(whole) >= 1, "no epoch was finished"
    for epoch in whole:
        steps = [tasks for tasks, (e, _) in zip(ran["finished"], ran["places"], strict=True) if e == epoch]
        assert sorted(task for tasks in steps for task in tasks) == list(range(num_tasks))
        assert len(steps) > -(-num_tasks // TASKS), "nothing was late"
    alone = run_given(settings, ran["finished"], ran["places"])
    # warm-up and decay follow the order, and the tail has its last batch's rate in both
    assert_same(ran["learned"], alone, 1e-10)


def resumed(mesh: Mesh, settings: TrainConfig, cut: int, steps: int) -> list[list[int]]:
    """The tasks of every batch handed out, with a new loader after `cut` steps, at the state of the first."""
    batches: list[list[int]] = []
    state: dict[str, Any] = {"epoch": 0, "index": 0}
    for count in (cut, steps - cut):
        run = build_run(settings, mesh, threading.Event())
        run.loader.load_state_dict(state)
        run.loader.split_by(lambda step: always_late(mesh.world_size, step))
        with run.loader:
            for _ in range(count):
                started = start_step(run)
                end_of(run, started)
                assert started.batch.batch_split is not None
                batches.append(started.batch.batch_split.tasks.tolist())
            state = run.loader.state_dict()
        run.state.dense.close()
    return batches


@pytest.mark.parametrize("cuts", [(6, 17), pytest.param((3, 7, 9), marks=pytest.mark.slow)])
def test_a_tail_survives_a_restart(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    settings = config(make_pack(tmp_path / "pack"))
    expected = resumed(Mesh(), settings, 0, 20)
    for cut in cuts:
        assert resumed(Mesh(), settings, cut, 20) == expected


def run_within(mesh: Mesh, settings: TrainConfig, steps: int, max_cells: int) -> dict[str, Any]:
    """As `run_steps`, with a budget of cells; and how many steps had several micro-batches on some rank."""
    run = build_run(settings, mesh, threading.Event(), parts=Parts(loader_arguments={"max_cells": max_cells}))
    trace, cut = [], 0
    with run.loader:
        for _ in range(steps):
            started = start_step(run)
            stats = end_of(run, started)
            trace.append([stats["loss"], stats["support_loss"], stats["grad_norm"], stats["samples"]])
            cut += started.batch.batch_split is not None and started.batch.batch_split.in_parts
    return {"learned": learned(run, trace), "cut": cut}


@pytest.mark.parametrize(
    "changes",
    [{}, {"meta": MetaConfig(inner_steps=1, inner_lr=0.3, engine="reference")}, {"meta": MetaConfig(adapt=[])}],
    ids=["factored", "reference", "plain"],
)
@pytest.mark.parametrize("nproc", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_budget_of_cells_changes_only_how_much_is_computed_at_once(
    tmp_path: Path, nproc: int, changes: dict[str, Any]
) -> None:
    settings = config(make_pack(tmp_path / "pack"), **changes)
    alone = run_steps(Mesh(), settings, 12)
    within = run_ranks(nproc, run_within, settings, 12, 60 // nproc)[0]
    assert within["cut"] > 6
    assert_same(within["learned"], alone, 1e-10)
