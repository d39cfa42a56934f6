"""A loop of one's own has everything that `gmeta train` has, and learns the same bits."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from commands import logged
from harness import run_ranks
from packs import make_pack
from safetensors.torch import load_file
from test_division import always_late, changing
from test_train import config
from torch import Tensor, nn

import gmeta
from gmeta.config.train import EmbeddingConfig, ScheduleConfig, TrainConfig
from gmeta.data.loader import SplitSpec
from gmeta.models.inputs import InputSpec
from gmeta.parallel.launch import EXIT_STOPPED
from gmeta.parallel.mesh import Mesh
from gmeta.runs import checkpoint
from gmeta.training import session
from gmeta.training.loop import training_loop
from gmeta.training.trainer import Trainer

pytestmark = pytest.mark.dist


def all_on_the_first(world_size: int, step: int) -> SplitSpec:
    return SplitSpec((1, *(0 for _ in range(1, world_size))))


SPLITS = {"changing": changing, "late": always_late, "first": all_on_the_first}


class Towers(nn.Module):
    def __init__(self, inputs: InputSpec, *, hidden: int = 4) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(inputs.width, hidden), nn.Linear(hidden, 1)

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        return self.last(torch.relu(self.layer(torch.cat([dense, *embedded.values()], -1)))).squeeze(-1)


_SCHEDULE = ScheduleConfig(epochs=2, eval_every=5, checkpoint_every=4, keep_last=99)


def settings_of(tmp_path: Path, name: str, **changes: Any) -> TrainConfig:
    pack = tmp_path / "pack"
    if not pack.exists():
        make_pack(pack)
    values = {
        "run_dir": str(tmp_path / name),
        "embedding": EmbeddingConfig(optimizer="adam", lr=0.05, weight_decay=0.1, init_std=0.5),
        "schedule": _SCHEDULE,
        **changes,
    }
    return config(pack, **values)


def own_loop(mesh: Mesh, settings: TrainConfig, split: str | None = None, **how: Any) -> dict[str, Any]:
    """Train by a loop of one's own, or (`product`) by that of `gmeta train`, on ranks that are joined already."""
    with (
        mock.patch.object(session, "open_mesh", return_value=mesh),
        mock.patch.object(session, "close_mesh"),
        Trainer(settings, model=how.get("model")) as trainer,
    ):
        if split is not None:
            trainer.run.loader.split_by(lambda step: SPLITS[split](mesh.world_size, step))
        if how.get("product"):
            training_loop(trainer.run)
        else:
            _loop(trainer, **how)
    result = trainer.result
    return {"step": result.step, "exit_code": result.exit_code, "best": result.best}


def _loop(
    trainer: Trainer, *, penalty: float = 0.0, leave_at: int = -1, leave: str = "", stop_at: int = -1, **_: Any
) -> None:
    for batch in trainer:
        leaving = leave if trainer.run.state.progress.step == leave_at else ""
        if leaving == "before forward":
            break
        loss, output = trainer.forward(batch)
        if leaving == "before backward":
            break
        trainer.backward(loss + penalty * output.query_logits.square().mean() if penalty else loss)
        if leaving == "before step":
            break
        trainer.step()
        if leaving == "after step":
            break
        if trainer.run.state.progress.step == stop_at:
            trainer.run.state.stop.set()


def saved(run_dir: Path) -> dict[str, Tensor]:
    """Every tensor of every checkpoint."""
    files = sorted(run_dir.glob("checkpoints/step-*/*.safetensors"))
    return {f"{f.parent.name} {f.name} {name}": value for f in files for name, value in load_file(f).items()}


def assert_same_run(one: Path, other: Path) -> None:
    first, second = saved(one), saved(other)
    assert first.keys() == second.keys()
    assert first
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert logged(one) == logged(other)


@pytest.mark.parametrize(
    ("nproc", "split"),
    [
        (1, "late"),
        (2, "changing"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, None), (2, None), (4, "late"))),
    ],
)
def test_the_same_bits_as_gmeta_train(tmp_path: Path, nproc: int, split: str | None) -> None:
    """Also where ranks get several micro-batches, none at all, or leave some for later."""
    results = {}
    for name in ("own", "product"):
        settings = settings_of(tmp_path, name, schedule=replace(_SCHEDULE, epochs=1))
        results[name] = run_ranks(nproc, own_loop_of(name), settings, split)
    assert results["own"] == results["product"]
    assert_same_run(tmp_path / "own", tmp_path / "product")


def own_loop_of(name: str) -> Any:
    return product_loop if name == "product" else own_loop


def product_loop(mesh: Mesh, settings: TrainConfig, split: str | None) -> dict[str, Any]:
    return own_loop(mesh, settings, split, product=True)


def with_penalty(mesh: Mesh, settings: TrainConfig) -> dict[str, Any]:
    return own_loop(mesh, settings, "first", penalty=0.1)


def test_ranks_without_tasks_need_no_special_case(tmp_path: Path) -> None:
    """A mean over nothing is no number; it must not reach the loss, the weights or the log."""
    settings = settings_of(tmp_path, "run", schedule=ScheduleConfig(max_steps=3))
    assert {result["step"] for result in run_ranks(4, with_penalty, settings)} == {3}
    losses = [record["loss"] for record in logged(tmp_path / "run") if record["kind"] == "train"]
    assert all(isinstance(loss, float) for loss in losses)


def test_a_term_of_ones_own_reaches_the_weights(tmp_path: Path) -> None:
    for name, penalty in (("without", 0.0), ("with", 0.1)):
        own_loop(Mesh(), settings_of(tmp_path, name, schedule=ScheduleConfig(max_steps=3)), penalty=penalty)
    without, penalised = saved(tmp_path / "without"), saved(tmp_path / "with")
    assert not all(torch.equal(without[name], penalised[name]) for name in without)


def leave_early(mesh: Mesh, settings: TrainConfig, at: int, leave: str) -> dict[str, Any]:
    return own_loop(mesh, settings, leave_at=at, leave=leave)


LEAVING = ("before forward", "before backward", "before step", "after step")
_LEAVING = [*(pytest.param(leave, marks=pytest.mark.slow) for leave in LEAVING[:2]), *LEAVING[2:]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process whose loop nobody left."""
    folder = tmp_path_factory.mktemp("whole")
    own_loop(Mesh(), settings_of(folder, "whole"))
    return folder / "whole"


@pytest.mark.parametrize(
    ("nproc", "leave", "at"),  # validation is due after step 10
    [
        *((1, leave, 9) for leave in LEAVING[2:]),
        pytest.param(2, "after step", 9, marks=pytest.mark.slow),
        *(pytest.param(1, leave, 9, marks=pytest.mark.slow) for leave in LEAVING[:2]),
        pytest.param(2, "before step", 9, marks=pytest.mark.slow),
        *(pytest.param(1, leave, 6, marks=pytest.mark.slow) for leave in LEAVING),
        *(pytest.param(2, leave, 6, marks=pytest.mark.slow) for leave in ("before step", "after step")),
    ],
)
def test_a_loop_that_is_left_goes_on_exactly(tmp_path: Path, whole: Path, nproc: int, leave: str, at: int) -> None:
    """A batch without a step comes again; what is due after a step is done."""
    if nproc > 1:
        whole = tmp_path / "whole"
        run_ranks(nproc, own_loop, settings_of(tmp_path, "whole"), None)
    run_ranks(nproc, leave_early, settings_of(tmp_path, "parts"), at, leave)
    assert checkpoint.steps_saved(tmp_path / "parts" / "checkpoints")[-1] == at + (leave == "after step")
    run_ranks(nproc, own_loop, settings_of(tmp_path, "parts", resume=True), None)
    expected, found = saved(whole), saved(tmp_path / "parts")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert logged(whole) == logged(tmp_path / "parts")


@pytest.mark.parametrize("leave", _LEAVING)
def test_a_second_loop_goes_on_where_the_first_was_left(tmp_path: Path, whole: Path, leave: str) -> None:
    with Trainer(settings_of(tmp_path, "twice")) as trainer:
        _loop(trainer, leave_at=6, leave=leave)
        if leave == "before step":
            with pytest.raises(RuntimeError, match=r"left before trainer.step"):
                _loop(trainer)
            return
        _loop(trainer)
    expected, found = saved(whole), saved(tmp_path / "twice")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_stop_is_saved_and_told(tmp_path: Path) -> None:
    result = own_loop(Mesh(), settings_of(tmp_path, "run"), stop_at=3)
    assert result["exit_code"] == EXIT_STOPPED
    assert result["step"] == checkpoint.steps_saved(tmp_path / "run" / "checkpoints")[-1] == 4


@pytest.mark.parametrize("loss", [0.5, torch.zeros(())])
def test_a_loss_without_a_gradient_is_named(tmp_path: Path, loss: Any) -> None:
    with pytest.raises(ValueError, match=r"which has no gradient"), Trainer(settings_of(tmp_path, "run")) as trainer:
        _backward_of(trainer, loss)


def _backward_of(trainer: Trainer, loss: Any) -> None:
    for batch in trainer:
        trainer.forward(batch)
        trainer.backward(loss)


def test_a_class_of_ones_own(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "run")
    plain = {"pack": settings.pack, "run_dir": settings.run_dir, "schedule": {"max_steps": 3}}
    with gmeta.Trainer(plain, model=Towers) as trainer:
        _loop(trainer)
        assert isinstance(trainer.run.state.system.learner.model, Towers)
    assert trainer.config.model.name == f"{Towers.__module__}:Towers"
    assert trainer.config.model.args == {"hidden": 4}
    run = gmeta.train({**plain, "run_dir": str(tmp_path / "again")}, model=Towers)
    assert_same_run(tmp_path / "run", run.path)


def test_in_another_thread(tmp_path: Path) -> None:
    """Python takes signals in the main thread only; training elsewhere must not need them."""
    results: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: results.append(own_loop(Mesh(), settings_of(tmp_path, "run"))))
    thread.start()
    thread.join()
    assert results[0]["exit_code"] == 0


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ("step", r"trainer.step needs trainer.backward"),
        ("backward", r"trainer.backward needs trainer.forward"),
        ("forward", r"went on without trainer.step"),
        ("forward backward", r"went on without trainer.step"),
        ("forward backward backward", r"called twice"),
    ],
)
def test_calls_that_are_left_out_are_named(tmp_path: Path, calls: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        _make_calls(settings_of(tmp_path, "run"), calls.split())


def _make_calls(settings: TrainConfig, calls: list[str]) -> None:
    with Trainer(settings) as trainer:
        for batch in trainer:
            loss = torch.zeros((), dtype=torch.float64, requires_grad=True)
            for call in calls:
                if call == "forward":
                    loss, _ = trainer.forward(batch)
                elif call == "backward":
                    trainer.backward(loss)
                else:
                    trainer.step()


def test_a_trainer_that_is_not_open(tmp_path: Path) -> None:
    trainer = Trainer(settings_of(tmp_path, "run"))
    with pytest.raises(RuntimeError, match=r"use it as `with gmeta.Trainer"):
        next(iter(trainer))
    assert not (tmp_path / "run").exists()
