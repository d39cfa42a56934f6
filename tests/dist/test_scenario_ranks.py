"""Models of several scenarios learn the same by both engines, on any ranks, and in micro-batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from harness import run_ranks
from packs import SCHEMA, make_pack
from test_division import changing, run_divided
from test_train import assert_same, config, run_steps

from gmeta.config.train import MetaConfig, ModelConfig
from gmeta.parallel.mesh import Mesh

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    schema = replace(SCHEMA, scenario="group")
    return make_pack(tmp_path_factory.mktemp("scenes") / "pack", train=30, valid=8, test=8, schema=schema)


@pytest.mark.parametrize("adapt", [[], ["decision"]])
@pytest.mark.parametrize(
    "name", ["mmoe", *(pytest.param(n, marks=pytest.mark.slow) for n in ("star", "ple", "pepnet"))]
)
@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_learn_the_same(pack: Path, name: str, adapt: list[str], nproc: int) -> None:
    settings = config(pack, model=ModelConfig(name=name, embedding_dim=4), meta=MetaConfig(adapt=adapt))
    expected = run_steps(Mesh(), settings, 2)
    assert_same(run_ranks(nproc, run_divided, settings, 2, changing)[0]["learned"], expected, 1e-9)


@pytest.mark.parametrize("name", ["shared_bottom", "mmoe", "ple", "star", "pepnet", "hamur", "dcn", "deepfm"])
def test_engines_learn_the_same(pack: Path, name: str) -> None:
    """Through the inner loop, of what each model calls its decision layers; where the factored engine cannot, `auto`
    takes the reference.
    """
    model = ModelConfig(name=name, embedding_dim=4, args={"hidden": [6]})
    settings = [
        config(pack, model=model, meta=MetaConfig(inner_steps=2, adapt=["decision"], engine=engine))
        for engine in ("auto", "reference")
    ]
    assert_same(*(run_steps(Mesh(), one, 2) for one in settings), 1e-9)
