"""Whether a run goes on, and from where, is decided once for all ranks."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from commands import gmeta, train_words
from harness import run_ranks
from packs import make_pack

from gmeta.config.train import ElasticConfig, TrainConfig
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.build import load_system
from gmeta.runs.directory import prepare_run_dir, read_config

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trained")
    gmeta(*train_words(make_pack(place / "pack"), place / "run"))
    return place / "run"


@pytest.fixture
def config(trained: Path, tmp_path: Path) -> TrainConfig:
    shutil.copytree(trained, tmp_path / "run")
    return replace(read_config(trained), run_dir=str(tmp_path / "run"))


def prepare(mesh: Mesh, of_rank_0: TrainConfig, of_others: TrainConfig) -> Path | str | None:
    try:
        return prepare_run_dir(of_others if mesh.rank else of_rank_0, mesh)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("nproc", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_rank_0_decides(config: TrainConfig, nproc: int) -> None:
    """Whatever the others were told: a node that joins a job was started for the first time."""
    last = Path(config.run_dir) / "checkpoints" / "step-00000006"
    assert run_ranks(nproc, prepare, replace(config, resume=True), config) == [last] * nproc
    refused = run_ranks(nproc, prepare, config, replace(config, resume=True))
    assert all("already holds a run: continue it with --resume true" in str(answer) for answer in refused)


@pytest.mark.parametrize("nproc", [1, 2])
def test_an_elastic_run_always_goes_on(config: TrainConfig, nproc: int) -> None:
    """Its job may have been scheduled again from scratch, with or without a checkpoint to go on from."""
    elastic = replace(config, elastic=ElasticConfig(enabled=True))
    last = Path(config.run_dir) / "checkpoints" / "step-00000006"
    assert run_ranks(nproc, prepare, elastic, elastic) == [last] * nproc
    other = replace(elastic, seed=99)
    assert all("seed is 99, but the run to resume has" in str(a) for a in run_ranks(nproc, prepare, other, other))
    shutil.rmtree(last.parent)
    assert run_ranks(nproc, prepare, elastic, elastic) == [None] * nproc


def load(mesh: Mesh, run_dir: Path, which: str) -> int | str:
    try:
        return load_system(run_dir, which, mesh)[2]
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("nproc", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_all_ranks_load_the_same_checkpoint_or_none(config: TrainConfig, nproc: int) -> None:
    run_dir = Path(config.run_dir)
    assert run_ranks(nproc, load, run_dir, "last") == [6] * nproc
    file = run_dir / "config.yaml"
    file.write_text(file.read_text().replace("seed: ", "seed: 1"))
    assert all("config.yaml has seed" in str(answer) for answer in run_ranks(nproc, load, run_dir, "last"))
