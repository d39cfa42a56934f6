"""Next items are learned the same on any ranks and sharded, and a run that stops goes on bit by bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoders import WHY, tiny
from harness import run_ranks
from next_items import event_rows, in_words, next_item_pack
from test_division import changing, run_divided
from test_sharded_dense import placed
from test_train import assert_same, config, run_steps

from gmeta.config.train import LoaderConfig, MetaConfig, ModelConfig, NextItemConfig, TrainConfig
from gmeta.data.pack import open_pack
from gmeta.evaluation.rank_split import candidates_of, rank_split
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.build import build_system, domain_of
from gmeta.text.readers import TokenReader

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return next_item_pack(tmp_path_factory.mktemp("events"))


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack whose titles the tiny tokenizer can tell apart."""
    return next_item_pack(tmp_path_factory.mktemp("worded"), in_words(event_rows()))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers", reason=WHY)
    return tiny(tmp_path_factory.mktemp("encoder") / "bert", "bert")


def settings_of(pack: Path, model: ModelConfig | None = None, **changes: Any) -> TrainConfig:
    args = {"heads": 2, "blocks": 2, "dropout": 0.3, "positions": 8}
    values = {
        "model": model or ModelConfig(name="sasrec", embedding_dim=8, args=args),
        "meta": MetaConfig(adapt=[]),
        "next_item": NextItemConfig(candidates=6, draw="popularity"),
        "loader": LoaderConfig(tasks_per_batch=9, max_support_rows=7),
    }
    return config(pack, **{**values, **changes})


def text_model(encoder: Path, **more: Any) -> ModelConfig:
    args = {"encoder": str(encoder), "layers": 2, "hidden": [6], "heads": 2, "max_tokens": 8, **more}
    return ModelConfig(name="llmrec", embedding_dim=8, args=args, features=[] if more["ids"] else ["title"])


@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_and_micro_batches_learn_the_same(pack: Path, nproc: int) -> None:
    settings = settings_of(pack)
    expected = run_steps(Mesh(), settings, 3)
    assert_same(run_ranks(nproc, run_steps, settings, 3)[0], expected, 1e-8)
    if nproc == 2:
        assert_same(run_ranks(2, run_divided, settings, 3, changing)[0]["learned"], expected, 1e-8)


@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_events_of_the_batch_are_the_same_candidates_on_any_ranks(pack: Path, nproc: int) -> None:
    settings = settings_of(pack, next_item=NextItemConfig(candidates=6, in_batch=10, each=3, own_items="left_out"))
    expected = run_steps(Mesh(), settings, 3)
    assert_same(run_ranks(nproc, run_divided, settings, 3, changing)[0]["learned"], expected, 1e-8)
    without = NextItemConfig(candidates=6, each=3, own_items="left_out")
    other = run_steps(Mesh(), settings_of(pack, next_item=without), 3)
    assert not np.array_equal(other["trace"], expected["trace"])


@pytest.mark.parametrize(
    "args",
    [
        pytest.param({"ids": True}, id="views"),
        pytest.param({"ids": True, "fusion": "gate"}, id="gate", marks=pytest.mark.slow),
        pytest.param({"ids": False}, id="texts", marks=pytest.mark.slow),
        pytest.param({"ids": False, "refresh": 2}, id="refreshed"),
        pytest.param({"ids": True, "reader": "high", "tune": "lora", "rank": 2}, id="high"),
        pytest.param({"ids": False, "reader": "tokens", "layers": 1, "window": 3, "similarity": "dot"}, id="tokens"),
    ],
)
@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_texts_are_learned_the_same_by_ranks(worded: Path, encoder: Path, args: dict[str, Any], nproc: int) -> None:
    settings = settings_of(worded, text_model(encoder, **args))
    expected = run_steps(Mesh(), settings, 2)
    assert_same(run_ranks(nproc, run_steps, settings, 2)[0], expected, 1e-8)
    if nproc == 2 and (args.get("reader") == "tokens" or "refresh" in args):
        assert_same(run_ranks(2, run_divided, settings, 2, changing)[0]["learned"], expected, 1e-8)


@pytest.mark.parametrize("targets", ["every", "last"])
def test_all_states_that_count_are_made(
    worded: Path, encoder: Path, targets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that makes the states alone that the loss asks for learns what one does that makes all."""
    model = text_model(encoder, ids=False, reader="tokens", window=3, similarity="dot")
    settings = settings_of(worded, model, next_item=NextItemConfig(candidates=6, targets=targets))
    expected = run_steps(Mesh(), settings, 2)
    some = TokenReader.forward
    monkeypatch.setattr(TokenReader, "forward", lambda self, x, of: some(self, x, replace(of, wanted=None)))
    assert_same(run_steps(Mesh(), settings, 2), expected, 1e-8)


def test_prompts_adapt_the_same_on_two_ranks(pack: Path) -> None:
    meta = MetaConfig(adapt=["prompt"], inner_steps=2, inner_lr=0.5, learn_inner_lr=True)
    settings = settings_of(pack, meta=meta)
    expected = run_steps(Mesh(), settings, 2)
    assert_same(run_ranks(2, run_steps, settings, 2)[0], expected, 1e-8)
    assert_same(run_ranks(2, run_divided, settings, 2, changing)[0]["learned"], expected, 1e-8)


def test_layers_train_sharded(pack: Path) -> None:
    expected = run_steps(Mesh(), settings_of(pack), 2)
    assert_same(run_ranks(2, run_steps, settings_of(pack, dense=placed("GGG")), 2)[0], expected, 1e-8)


def ranks(mesh: Mesh, settings: TrainConfig) -> dict[str, Any] | None:
    pack = open_pack(settings.pack)
    system = build_system(settings, pack.schema, mesh, text_tables=pack.text_tables())
    catalogue = pack.catalogue()
    found = rank_split(system, pack.split("test"), catalogue, candidates_of(catalogue, domain_of(pack.schema)))
    return None if found is None else found.columns()


@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_targets_rank_the_same_on_any_ranks(pack: Path, nproc: int) -> None:
    expected = ranks(Mesh(), settings_of(pack))
    found = run_ranks(nproc, ranks, settings_of(pack))[0]

    assert expected is not None
    assert len(expected["row"]) == open_pack(pack).split("test").num_tasks
    assert expected["candidates"].max() <= 12
    for name, column in expected.items():
        np.testing.assert_array_equal(found[name], column, err_msg=name)
