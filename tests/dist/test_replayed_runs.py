"""Runs that replay tasks of an older pack: the same on any number of workers, and after a resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import fails, gmeta, logged, train_words
from days import tensors
from packs import make_pack

from gmeta.runs.directory import read_config


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an `old` pack, a `new` one of the same ids, and a version that was trained on the old one."""
    place = tmp_path_factory.mktemp("replay")
    make_pack(place / "old", 50, seed=2)
    make_pack(place / "new", 40)
    gmeta(*train_words(place / "old", place / "base", "--precision", "float64", epochs=1))
    gmeta("bundle", "--run_dir", place / "base", "--out", place / "version")
    return place


def train(place: Path, run_dir: Path, *more: object) -> Path:
    """Warm start on the new pack; an epoch has 40 of its tasks, and 10 older ones."""
    words = ["train", "--pack", place / "new", "--run_dir", run_dir, "--warm_start", place / "version"]
    gmeta(*words, "--replay.pack", place / "old", "--replay.fraction", 0.2, "--schedule.epochs", 3, *more)
    return run_dir


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    return train(place, place / "whole")


@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_workers_agree(place: Path, whole: Path, tmp_path: Path, nproc: int) -> None:
    several = train(place, tmp_path / "run", "--nproc", nproc)
    found, expected = tensors(several), tensors(whole)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-11)
    losses = [[r["loss"] for r in logged(run) if "loss" in r] for run in (several, whole)]
    assert len(losses[0]) == 9  # 3 batches of 20, 20 and 10 tasks an epoch
    np.testing.assert_allclose(*losses, rtol=1e-9)


def test_a_run_resumes_exactly(place: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It stops amid an epoch; the older pack may have moved, but must be the same."""
    run_dir = train(place, tmp_path / "run", "--schedule.max_steps", 5, "--schedule.checkpoint_every", 5)
    assert "replay: an epoch has 10 of the 50 tasks of" in capsys.readouterr().err
    words = ["train", "--pack", place / "new", "--run_dir", run_dir, "--resume", "true", "--schedule.epochs", 3]
    make_pack(tmp_path / "other", 50, seed=3)
    fails([*words, "--replay.pack", tmp_path / "other"], capsys, "is not what run", "give that pack, or a copy of it")
    fails([*words, "--replay.pack", ""], capsys, "replay.pack is ''", "is not what run")
    shutil.copytree(place / "old", tmp_path / "copy")
    fails([*words, "--replay.pack", tmp_path / "copy", "--replay.fraction", 0.3], capsys, "replay.fraction is 0.3, but")
    gmeta(*words, "--replay.pack", tmp_path / "copy", "--schedule.max_steps", 0)
    found = tensors(run_dir)
    for name, tensor in tensors(whole).items():
        assert torch.equal(found[name], tensor), name


def test_the_next_training_replays_what_it_is_given(place: Path, tmp_path: Path) -> None:
    """Nothing, unless it names a pack; then as much as the bundle's did, and a run of its own by default a fifth."""
    train(place, tmp_path / "run", "--replay.fraction", 0.1, "--schedule.max_steps", 1)
    gmeta("bundle", "--run_dir", tmp_path / "run", "--out", tmp_path / "version", "--training", "true")
    words = ["train", "--pack", place / "new", "--schedule.max_steps", 1, "--run_dir"]
    replays = ("--replay.pack", place / "old")
    more = [(tmp_path / "version",), (tmp_path / "version", *replays), (place / "version", *replays)]
    for number, (version, *given) in enumerate(more):
        gmeta(*words, tmp_path / str(number), "--warm_start", version, *given)
    assert [read_config(tmp_path / str(n)).replay.fraction for n in range(3)] == [None, 0.1, 0.2]


def test_bad_replay_is_named(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--pack", place / "new", "--run_dir", tmp_path / "run", "--warm_start", place / "version"]
    fails([*words, "--replay.pack", "nowhere"], capsys, "nowhere is no task pack")
    fails([*words, "--replay.fraction", 1], capsys, "replay.fraction is 1")
    fails([*words, "--replay.fraction", 0.3], capsys, "replay.fraction is 0.3", "name that pack too")
    make_pack(tmp_path / "other", 20, values=lambda table, n: [f"{table}{i}" for i in range(2, n + 1)])
    fails([*words, "--replay.pack", tmp_path / "other"], capsys, "id 1 of vocabulary 'group' is 'group2', expected")
    here = ["--replay.pack", place / "old", "--schedule.position", "continue"]
    words[2] = place / "old"
    fails([*words, *here], capsys, "was trained with another replay.pack, or with none")
