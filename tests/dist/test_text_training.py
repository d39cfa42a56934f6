"""A model that reads texts learns the same on any ranks, in micro-batches, and with either engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import run_ranks
from test_division import changing, run_divided
from test_train import assert_same, config, run_steps
from text_models import text_pack

from gmeta.config.train import MetaConfig, ModelConfig, TrainConfig
from gmeta.parallel.mesh import Mesh

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_pack(tmp_path_factory.mktemp("texts"))


def settings_of(pack: Path, **changes: Any) -> TrainConfig:
    return config(pack, model=ModelConfig(name="text_models:Titles", embedding_dim=4), **changes)


def test_ranks_and_micro_batches_learn_the_same(pack: Path) -> None:
    settings = settings_of(pack)
    expected = run_steps(Mesh(), settings, 3)
    assert_same(run_ranks(2, run_steps, settings, 3)[0], expected, 1e-9)
    assert_same(run_ranks(2, run_divided, settings, 3, changing)[0]["learned"], expected, 1e-9)


def test_both_engines_learn_the_same(pack: Path) -> None:
    metas = [MetaConfig(inner_steps=2, engine=engine) for engine in ("factored", "reference")]
    assert_same(*(run_steps(Mesh(), settings_of(pack, meta=meta), 2) for meta in metas), 1e-9)
