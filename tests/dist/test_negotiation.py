"""Domain negotiation: rounds are what algorithm 1 of MAMDR says, on any ranks, and go on after a stop."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import fails, train_words
from commands import gmeta as gmeta_command
from harness import run_ranks
from packs import SCHEMA, make_pack
from steps import one_step
from test_train import assert_same, config, learned

import gmeta
from gmeta.config.train import LoaderConfig, MetaConfig, TrainConfig
from gmeta.data.pack import open_pack
from gmeta.parallel.mesh import Mesh
from gmeta.training.build import build_run
from gmeta.training.loop import training_loop
from gmeta.training.run import Run
from gmeta.training.saving import load_checkpoint

pytestmark = pytest.mark.dist

WINDOW = 3
STEPS = 13  # 9 batches an epoch: four rounds, and one that is not over
ENDS = (3, 6, 9, 12)
SHARE = 0.4


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("scenes") / "pack", schema=replace(SCHEMA, scenario="group"))


def settings_of(pack: Path, share: float, **changes: Any) -> TrainConfig:
    meta = changes.pop("meta", MetaConfig(adapt=[], negotiation=share))
    return config(pack, meta=meta, loader=LoaderConfig(tasks_per_batch=7, window_batches=WINDOW), **changes)


def begun(mesh: Mesh, settings: TrainConfig) -> Run:
    run = build_run(settings, mesh, threading.Event())
    assert run.state.negotiation is not None
    run.state.negotiation.begin()
    return run


def negotiated(mesh: Mesh, settings: TrainConfig) -> dict[str, Any]:
    run, trace = begun(mesh, settings), []
    with run.loader:
        trace = [[one_step(run)["loss"]] for _ in range(STEPS)]
    return learned(run, trace)


def by_hand(settings: TrainConfig, ends: Sequence[int]) -> dict[str, Any]:
    """Rounds that keep the whole way; after those steps that end one the weights are put where they belong."""
    run, trace = begun(Mesh(), settings), []
    system = run.state.system
    weights = [p.data for p in system.objective.parameters()] + [t.weight for t in system.tables.fused.values()]
    before = [w.clone() for w in weights]
    with run.loader:
        for step in range(1, STEPS + 1):
            trace.append([one_step(run)["loss"]])
            if step in ends:
                for old, new in zip(before, weights, strict=True):
                    new.copy_(old + SHARE * (new - old))
                before = [w.clone() for w in weights]
    return learned(run, trace)


@pytest.mark.parametrize("adapt", [[], ["decision"]])
def test_a_round_keeps_its_share_of_the_way(pack: Path, adapt: list[str]) -> None:
    ours, whole = (
        settings_of(pack, 0, meta=MetaConfig(adapt=adapt, inner_lr=0.3, negotiation=share)) for share in (SHARE, 1.0)
    )
    expected = by_hand(whole, ENDS)
    assert_same(negotiated(Mesh(), ours), expected, 1e-12)
    assert not np.allclose(negotiated(Mesh(), whole)["trace"], expected["trace"], rtol=1e-4)


def test_an_epoch_and_the_last_step_end_a_round(pack: Path) -> None:
    base = settings_of(pack, SHARE)
    longer = replace(base, loader=replace(base.loader, window_batches=5))
    ours = replace(longer, schedule=replace(base.schedule, max_steps=STEPS))
    whole = replace(ours, meta=replace(ours.meta, negotiation=1.0))
    assert_same(negotiated(Mesh(), ours), by_hand(whole, (5, 9, 13)), 1e-12)


@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_learn_the_same(pack: Path, nproc: int) -> None:
    settings = settings_of(pack, SHARE)
    assert_same(run_ranks(nproc, negotiated, settings)[0], negotiated(Mesh(), settings), 1e-9)


def scenarios_of_batches(settings: TrainConfig, batches: int) -> list[list[int]]:
    with build_run(settings, Mesh(), threading.Event()).loader as loader:
        taken = [next(loader).batch for _ in range(batches)]
    return [[int(ids[mask][0]) for ids, mask in zip(b.query.ids["group"], b.query.mask, strict=True)] for b in taken]


@pytest.mark.parametrize("episode_rows", [0, 4])
def test_a_window_goes_scenario_by_scenario(pack: Path, episode_rows: int) -> None:
    base = settings_of(pack, SHARE)
    settings = replace(base, loader=replace(base.loader, episode_rows=episode_rows))
    orders = []
    for batches in np.split(np.array(scenarios_of_batches(settings, 4 * WINDOW - 4), object), [WINDOW, 2 * WINDOW]):
        row = [scenario for batch in batches for scenario in batch]
        changes = 1 + sum(a != b for a, b in itertools.pairwise(row))
        assert changes == len(set(row)) > 2
        orders.append(list(dict.fromkeys(row)))
    assert orders[0] != orders[1]


def gone_on(mesh: Mesh, settings: TrainConfig, checkpoint: Path, steps: int) -> dict[str, Any]:
    run = build_run(settings, mesh, threading.Event())
    load_checkpoint(run, checkpoint)
    with run.loader:
        trace = [[one_step(run)["loss"]] for _ in range(steps)]
    return learned(run, trace)


@pytest.mark.parametrize("nproc", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_that_was_stopped_within_a_round_goes_on(pack: Path, tmp_path: Path, nproc: int) -> None:
    settings = settings_of(pack, SHARE, run_dir=str(tmp_path / "run"))
    with gmeta.Trainer(settings) as trainer:
        training_loop(trainer.run, until=WINDOW + 1)
    checkpoint = tmp_path / "run" / "checkpoints" / f"step-{WINDOW + 1:08}"
    found = run_ranks(nproc, gone_on, settings, checkpoint, STEPS - WINDOW - 1)[0]
    expected = negotiated(Mesh(), settings)
    expected["trace"] = expected["trace"][WINDOW + 1 :]
    assert_same(found, expected, 0 if nproc == 1 else 1e-9)


def test_a_step_that_is_not_finite_leaves_the_weights(pack: Path) -> None:
    run = begun(Mesh(), settings_of(pack, SHARE))
    with run.loader:
        one_step(run)
    weight = next(iter(run.state.system.tables.fused.values())).weight
    before = weight.clone()
    assert run.state.negotiation is not None
    run.state.negotiation.end_round(torch.tensor(False))
    assert torch.equal(weight, before)
    run.state.negotiation.end_round(torch.tensor(True))
    assert torch.equal(weight, before)  # which the round that was left began with


def test_commands_use_what_a_negotiated_run_learned(pack: Path, tmp_path: Path) -> None:
    words = [*train_words(pack, tmp_path / "run"), "--meta.adapt", "[]", "--meta.negotiation", "0.5"]
    gmeta_command(*words)
    gmeta_command("evaluate", "--run_dir", tmp_path / "run", "--out", tmp_path / "report")
    gmeta_command("bundle", "--run_dir", tmp_path / "run", "--out", tmp_path / "bundle")
    rest = ("--run_dir", tmp_path / "next", "--warm_start", tmp_path / "bundle")
    gmeta_command("train", "--pack", pack, *rest, "--schedule.max_steps", "4")
    assert "negotiation: 0.5" in (tmp_path / "next" / "config.yaml").read_text()


def test_what_does_not_fit_is_said(pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*train_words(pack, tmp_path / "run"), "--meta.negotiation"]
    fails([*words, "1.5"], capsys, "meta.negotiation is 1.5: must be in [0, 1]; 0 is off")
    fails([*words, "0.5", "--dense.sharding", "GGG"], capsys, "keeps a copy of every layer on every rank")
    fails([*words, "0.5", "--schedule.eval_every", "2"], capsys, "weights are on their way; leave it out")
    without = make_pack(tmp_path / "without")
    fails([*train_words(without, tmp_path / "run"), *words[-1:], "0.5"], capsys, "`scenario: COLUMN`")

    def mix(arrays: dict[str, np.ndarray]) -> None:
        arrays["ids"][:, 0] = np.arange(len(arrays["ids"])) % 3

    mixed = make_pack(tmp_path / "mixed", schema=replace(SCHEMA, scenario="group"), change=mix)
    many = open_pack(mixed).split("train").num_tasks
    told = f"{many} of {many} tasks of split train of the pack have rows of several ('group')"
    fails([*train_words(mixed, tmp_path / "run"), *words[-1:], "0.5"], capsys, told, "--tasks user_scene")
