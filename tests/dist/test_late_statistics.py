"""Reading the statistics of a step after the next one has started, as CUDA runs do, changes nothing but when we know.

A step that is not finite, and those started before the host has read so, leave weights, rows and optimizers alone.
"""

from __future__ import annotations

import itertools
import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import logged
from harness import run_ranks
from packs import make_pack
from safetensors.torch import load_file
from test_train import config
from torch.distributed.tensor import DTensor

from gmeta.config.train import EmbeddingConfig, ScheduleConfig, TrainConfig
from gmeta.parallel.mesh import Mesh
from gmeta.runs import checkpoint
from gmeta.training import loop
from gmeta.training.build import build_run
from gmeta.training.run import Run
from gmeta.training.saving import checkpoint_tensors
from gmeta.training.state import TrainState
from gmeta.training.statistics import InFlightStep

pytestmark = pytest.mark.dist
STEPS, SAVE_EVERY = 8, 3


def settings_of(tmp_path: Path, name: str, optimizer: str = "adam") -> TrainConfig:
    pack = tmp_path / "pack"
    if not pack.exists():
        make_pack(pack)
    return config(
        pack,
        run_dir=str(tmp_path / name),
        embedding=EmbeddingConfig(optimizer=optimizer, lr=0.05, weight_decay=0.1, init_std=0.5),
        schedule=ScheduleConfig(max_steps=STEPS, checkpoint_every=SAVE_EVERY, keep_last=9),
    )


def everything(run: Run) -> list[torch.Tensor]:
    """Copies of all that an update changes."""
    return [tensor.detach().clone() for _, tensor in sorted(checkpoint_tensors(run.state).items())]


def run_loop(
    mesh: Mesh, settings: TrainConfig, late: bool, poison: int | None = None, stop_at: int | None = None
) -> tuple[str, list[bool]]:
    """How the training loop ended, and whether each step changed anything.

    poison: step in which a label of the last rank is not a number; stop_at: step before which rank 0 asks to stop.
    """
    run = build_run(settings, mesh, threading.Event())
    run.state.read_late = late
    states: list[list[torch.Tensor]] = []
    real = loop.train_step

    def step(state: TrainState, prepared: Any, watch: Any) -> InFlightStep:
        if run.state.progress.step == poison and mesh.rank == mesh.world_size - 1:
            prepared.batch.query.label.fill_(math.nan)
        if run.state.progress.step == stop_at and mesh.rank == 0:
            run.state.stop.set()
        states.append(everything(run))
        return real(state, prepared, watch)

    with pytest.MonkeyPatch.context() as patch, run.loader:
        patch.setattr(loop, "train_step", step)
        run.log.start()
        try:
            loop.training_loop(run)
            end = f"exit code {run.exit_code}"
        except ValueError as error:
            end = str(error)
    run.log.close()
    run.state.dense.close()
    states.append(everything(run))
    pairs = itertools.pairwise(states)
    return end, [not all(map(_same_whole, before, after)) for before, after in pairs]


def _same_whole(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(_local(a), _local(b))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def saved(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    files = sorted(checkpoint.step_dir(run_dir / "checkpoints", step).glob("*.safetensors"))
    return {f"{file.name} {name}": value for file in files for name, value in load_file(file).items()}


@pytest.mark.parametrize("nproc", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_read_late_is_the_same_run(tmp_path: Path, nproc: int) -> None:
    for name, late in (("late", True), ("early", False)):
        results = run_ranks(nproc, run_loop, settings_of(tmp_path, name), late)
        assert [end for end, _ in results] == ["exit code 0"] * nproc
    assert logged(tmp_path / "late") == logged(tmp_path / "early")
    steps = checkpoint.steps_saved(tmp_path / "late" / "checkpoints")
    assert steps == checkpoint.steps_saved(tmp_path / "early" / "checkpoints")
    for step in steps:
        late, early = saved(tmp_path / "late", step), saved(tmp_path / "early", step)
        assert late.keys() == early.keys()
        assert all(torch.equal(late[name], early[name]) for name in late)


_OTHERS = [(1, 3, True), (4, 3, True), (2, SAVE_EVERY - 1, False), (1, 7, False)]


@pytest.mark.parametrize(
    ("nproc", "poison", "ran_ahead"),
    [(2, 3, True), (1, SAVE_EVERY - 1, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in _OTHERS)],
)
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_no_step_after_a_bad_one_changes_anything(
    tmp_path: Path, optimizer: str, nproc: int, poison: int, ran_ahead: bool
) -> None:
    """Before a save, a validation and the end the host waits, so that no checkpoint ever holds a bad step."""
    settings = settings_of(tmp_path, "run", optimizer)
    results = run_ranks(nproc, run_loop, settings, True, poison)
    for end, changed in results:
        assert f"step {poison}: loss is nan, gradient norm is nan" in end
        assert "no weights were changed" in end
        assert changed == [True] * poison + [False] * (2 if ran_ahead else 1)
    found = json.loads((tmp_path / "run" / f"not-finite-step-{poison:08d}.json").read_text())
    assert found["step"] == poison
    assert len(found["task_id"]) == 7
    bad = [task for task, loss in zip(found["task_id"], found["query_loss"], strict=True) if isinstance(loss, str)]
    named = f"{len(bad)} of 7 tasks have such a loss, the first is task_id {bad[0]}" in results[0][0]
    assert named == (nproc > 1)  # those of the last rank; alone it has them all
    assert all(step <= poison for step in checkpoint.steps_saved(tmp_path / "run" / "checkpoints"))


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_stop_request_ends_all_ranks_after_the_same_step(tmp_path: Path, nproc: int) -> None:
    results = run_ranks(nproc, run_loop, settings_of(tmp_path, "run"), True, None, 3)
    assert [(end, len(changed)) for end, changed in results] == [("exit code 75", 5)] * nproc
    assert checkpoint.steps_saved(tmp_path / "run" / "checkpoints") == [3, 5]
    assert [record["step"] for record in logged(tmp_path / "run") if record["kind"] == "train"] == [1, 2, 3, 4, 5]
