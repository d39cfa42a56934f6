"""Runs that train layers of an encoder resume bit by bit, and recommend what evaluation ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoders import WHY, tiny
from next_items import event_rows, in_words, next_item_pack, next_item_run, require_equal_places, timed

pytest.importorskip("transformers", reason=WHY)

import gmeta
from gmeta.config.delivery import BundleConfig
from gmeta.data.pack import open_pack
from gmeta.delivery.bundle import make_bundle
from gmeta.recommender.catalogue_vectors import item_vectors
from gmeta.recommender.next_items import NextItems

MOST = 6
HIGH = {"reader": "high", "layers": 3, "ids": True}
REFRESHED = {"reader": "blocks", "layers": 2, "ids": False, "refresh": 2}
TOKENS = {"reader": "tokens", "layers": 2, "window": 4, "ids": False, "similarity": "dot", "tune": "lora", "rank": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llmrec")


@pytest.fixture(scope="module")
def pack(folder: Path) -> Path:
    return next_item_pack(folder, timed(in_words(event_rows())))


def model(folder: Path, args: dict[str, Any]) -> dict[str, Any]:
    encoder = folder / "bert"
    if not encoder.exists():
        tiny(encoder, "bert")
    usual = {"encoder": str(encoder), "hidden": [6], "max_tokens": 8}
    return {"name": "llmrec", "features": [] if args["ids"] else ["title"], "args": {**usual, **args}}


@pytest.mark.parametrize(
    ("args", "adapt"),
    [(HIGH, ["prompt"]), (REFRESHED, ["prompt"]), (TOKENS, [])],
    ids=["high", "refreshed", "tokens"],
)
def test_targets_are_recommended_where_evaluation_ranks_them(
    pack: Path, folder: Path, args: dict[str, Any], adapt: list[str]
) -> None:
    run = next_item_run(pack, folder / args["reader"], most=MOST, adapt=adapt, **model(folder, args))
    rec = NextItems.open(run, device="cpu")
    require_equal_places(run, rec, "test", MOST)

    bundle = make_bundle(BundleConfig(run_dir=str(run), out=str(folder / f"{args['reader']}-bundle"))).path
    events = {"user": ["a", "a"], "item": ["b1", "t3"], "domain": ["books", "toys"], "time": [1, 2]}
    assert NextItems.open(bundle, device="cpu").recommend(events).equals(rec.recommend(events))


def test_an_item_without_training_rows_is_told_by_its_text(pack: Path, folder: Path) -> None:
    run = next_item_run(pack, folder / "new", most=MOST, **model(folder, HIGH))
    rec, catalogue = NextItems.open(run, device="cpu"), open_pack(pack).catalogue()
    trained = replace(catalogue, count=np.ones_like(catalogue.count))
    of_text, of_id = item_vectors(rec.system, trained, rec.schema).chunk(2, -1)
    assert of_id[1:].any(-1).all()
    new = item_vectors(rec.system, replace(catalogue, count=np.zeros_like(catalogue.count)), rec.schema)
    torch.testing.assert_close(new, torch.cat([2 * of_text, torch.zeros_like(of_id)], -1))


def test_titles_that_are_cut_are_counted(pack: Path, folder: Path) -> None:
    rec = NextItems.open(next_item_run(pack, folder / "cut", most=MOST, **model(folder, HIGH)), device="cpu")
    text: Any = rec.system.objective.model
    assert text.told() == []
    text.add_texts(rec.schema.feature("title").table, ["w1 " * 10_000])
    (line,) = text.told()
    assert line.startswith("texts cut at 8 tokens: 1 of ")


@pytest.mark.parametrize(
    "args",
    [
        pytest.param(HIGH, id="high", marks=pytest.mark.slow),
        pytest.param(REFRESHED, id="refreshed"),
        pytest.param(TOKENS, id="tokens"),
    ],
)
def test_a_run_goes_on_bit_by_bit(pack: Path, folder: Path, tmp_path: Path, args: dict[str, Any]) -> None:
    def train(name: str, steps: int, *, resume: bool = False) -> dict[str, torch.Tensor]:
        config: dict[str, Any] = {"pack": str(pack), "run_dir": str(tmp_path / name), "resume": resume}
        config |= {"model": {"embedding_dim": 8, **model(folder, args)}, "meta": {"adapt": []}}
        config |= {"loader": {"tasks_per_batch": 20}, "schedule": {"epochs": 2, "max_steps": steps}}
        run = gmeta.train(config)
        learner = NextItems.open(run.path, checkpoint="last", device="cpu").system.objective
        return learner.state_dict()

    expected = train("whole", 3)
    train("parts", 1)
    found = train("parts", 3, resume=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_prompts_and_tokens_do_not_go_together(pack: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reads no vectors of events, as llmrec with reader tokens"):
        next_item_run(pack, tmp_path / "run", adapt=["prompt"], **model(folder, TOKENS))
