"""BAHE learns the same on any ranks and sharded, and is evaluated and predicts as any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from encoders import WHY, tiny
from harness import run_ranks
from test_division import changing, run_divided
from test_sharded_dense import placed
from test_train import assert_same, config, run_steps
from text_models import in_words, text_pack, text_rows

from gmeta.config.train import MetaConfig, ModelConfig, TrainConfig
from gmeta.parallel.mesh import Mesh

pytest.importorskip("transformers", reason=WHY)
pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_pack(tmp_path_factory.mktemp("texts"), **in_words(text_rows()))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("encoder") / "bert", "bert")


def settings_of(pack: Path, encoder: Path, args: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    given = {"encoder": str(encoder), "layers": 2, "hidden": [6], "max_tokens": 8, "positions": 4, **(args or {})}
    changes = {"meta": MetaConfig(adapt=["decision"], inner_lr=0.1), **changes}
    return config(pack, model=ModelConfig(name="bahe", embedding_dim=4, args=given), **changes)


@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "args",
    [
        {"tune": "lora", "rank": 2, "vectors": 2},
        pytest.param({"refresh": 2}, marks=pytest.mark.slow),
        pytest.param({"ids": True, "user": "target"}, marks=pytest.mark.slow),
        pytest.param({"encode": "tokens"}, marks=pytest.mark.slow),
    ],
)
def test_ranks_and_micro_batches_learn_the_same(pack: Path, encoder: Path, args: dict[str, Any], nproc: int) -> None:
    settings = settings_of(pack, encoder, args)
    expected = run_steps(Mesh(), settings, 2)
    if nproc == 2:
        assert_same(run_ranks(2, run_divided, settings, 2, changing)[0]["learned"], expected, 1e-8)
    else:
        assert_same(run_ranks(nproc, run_steps, settings, 2)[0], expected, 1e-8)


@pytest.mark.parametrize(
    ("nproc", "strategy", "args"),
    [
        (2, "GGG", {"refresh": 1}),
        *(pytest.param(*case, {}, marks=pytest.mark.slow) for case in ((4, "IIG"), (4, "NIG"), (1, "GGG"))),
    ],
)
def test_layers_train_sharded(pack: Path, encoder: Path, nproc: int, strategy: str, args: dict[str, Any]) -> None:
    settings = settings_of(pack, encoder, args)
    expected = run_steps(Mesh(), settings, 2)
    found = run_ranks(nproc, run_steps, settings_of(pack, encoder, args, dense=placed(strategy)), 2)[0]
    assert_same(found, expected, 1e-8)


def test_without_embedding_rows_too(pack: Path, encoder: Path) -> None:
    """A model of texts alone has no tables, and nothing to exchange."""
    given = {"encoder": str(encoder), "layers": 2, "hidden": [6], "max_tokens": 8}
    model = ModelConfig(name="bahe", embedding_dim=4, args=given, features=["item", "last"], numeric=False)
    for adapt in ([], ["decision"]):
        settings = config(pack, model=model, meta=MetaConfig(adapt=adapt))
        assert_same(run_ranks(2, run_steps, settings, 2)[0], run_steps(Mesh(), settings, 2), 1e-8)
