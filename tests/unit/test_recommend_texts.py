"""A model that reads texts recommends items that it was trained without, by their texts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import fails
from commands import gmeta as command
from encoders import WHY, tiny
from next_items import event_rows, in_words, next_item_pack, next_item_run, words_of

from gmeta.config.delivery import BundleConfig
from gmeta.delivery.bundle import make_bundle
from gmeta.recommender.next_items import NextItems


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    pytest.importorskip("transformers", reason=WHY)
    rows = in_words(event_rows())
    args = {"encoder": str(tiny(folder / "bert", "bert")), "layers": 2, "hidden": [6], "heads": 2, "max_tokens": 8}
    args |= {"ids": False, "blocks": 1}
    return next_item_run(next_item_pack(folder, rows), folder / "run", name="llmrec", features=["title"], args=args)


@pytest.fixture
def rec(run: Path) -> NextItems:
    return NextItems.open(run, device="cpu")


NEW = {"item": ["b90", "t91", "b1"], "domain": ["books", "toys", "books"], "title": [words_of("b5"), "w9 w8", "w4"]}
HISTORY = {"user": ["a"] * 3, "item": ["b1", "b2", "t3"], "domain": ["books", "books", "toys"]}


def test_a_new_item_is_what_its_text_says(rec: NextItems) -> None:
    before = rec.item_vectors()
    assert rec.add_items(NEW) == 2  # b1 was known
    assert rec.add_items(NEW) == 0

    after = rec.item_vectors()
    assert after.slice(0, before.num_rows).equals(before)
    assert after["item"].to_pylist()[-2:] == ["b90", "t91"]
    vectors = dict(zip(after["item"].to_pylist(), np.array(after["vector"].to_pylist()), strict=True))
    np.testing.assert_allclose(vectors["b90"], vectors["b5"], atol=1e-6)  # of one text

    found = {row["item"]: row for row in rec.recommend(HISTORY, k=99).to_pylist()}
    assert found["b90"]["score"] == pytest.approx(found["b5"]["score"], abs=1e-5)
    assert found["t91"]["domain"] == "toys"
    assert len(found) == 26 - 3


def test_a_new_item_stands_in_histories(rec: NextItems) -> None:
    mine = {**HISTORY, "item": ["b5", "b2", "t3"]}
    other = {**HISTORY, "item": ["b90", "b2", "t3"]}
    assert rec.histories(other).unknown == 1
    rec.add_items(NEW)
    assert rec.histories(other).unknown == 0
    ours, theirs = (np.array(rec.user_vectors(rows)["vector"].to_pylist()) for rows in (mine, other))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert "b90" not in rec.recommend(other, k=99)["item"].to_pylist()


def test_an_unknown_event_is_read_by_its_text_and_not_recommended(rec: NextItems) -> None:
    told = {**HISTORY, "item": ["b77", "b2", "t3"], "title": [words_of("b5"), "", None]}
    mine = {**HISTORY, "item": ["b5", "b2", "t3"]}
    assert rec.histories(told).unknown == 0
    ours, theirs = (np.array(rec.user_vectors(rows)["vector"].to_pylist()) for rows in (mine, told))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert "b77" not in rec.recommend(told, k=99)["item"].to_pylist()
    assert rec.num_items == 24


def test_an_item_of_a_history_may_be_added_later(rec: NextItems) -> None:
    """By the text that it is added with, whatever an event said of it before."""
    rec.recommend({**HISTORY, "item": ["b90", "b2", "t3"], "title": ["w20 w21", "", None]})
    assert rec.add_items(NEW) == 2
    assert rec.add_items(NEW) == 0
    vectors = {row["item"]: row["vector"] for row in rec.item_vectors().to_pylist()}
    np.testing.assert_allclose(vectors["b90"], vectors["b5"], atol=1e-6)
    assert {"b90", "t91"} <= set(rec.recommend(HISTORY, k=99)["item"].to_pylist())


def test_a_name_of_another_domain_is_another_item(rec: NextItems) -> None:
    assert rec.add_items({"item": ["b1"], "domain": ["toys"], "title": ["w30"]}) == 1
    found = rec.recommend({**HISTORY, "domain": ["toys", "books", "toys"]}, k=99)["item"].to_pylist()
    assert "b1" in found  # that of books; the event is of the one of toys
    assert "toys|b1" not in found


def test_the_command_takes_new_items(run: Path, folder: Path, tmp_path: Path, capsys: Any) -> None:
    bundle = make_bundle(BundleConfig(run_dir=str(run), out=str(tmp_path / "bundle"))).path
    pq.write_table(pa.table(NEW), tmp_path / "new.parquet")
    pq.write_table(pa.table(HISTORY), tmp_path / "events.parquet")
    out = tmp_path / "recs.parquet"
    words = ["recommend", "--run_dir", bundle, "--events", tmp_path / "events.parquet", "--out", out, "--device", "cpu"]

    command(*words, "--items", tmp_path / "new.parquet", "--k", 99)

    assert "new items: 2; rows of items that are known or came before, unread: 1" in capsys.readouterr().out
    rec = NextItems.open(run, device="cpu")
    rec.add_items(NEW)
    expected = rec.recommend(HISTORY, k=99)
    found = pq.read_table(out)
    assert found.drop_columns("score").equals(expected.drop_columns("score"))
    np.testing.assert_allclose(found["score"], expected["score"], atol=1e-5)

    pq.write_table(pa.table({**NEW, "domain": ["books", "musik", "books"]}), tmp_path / "new.parquet")
    fails([*words, "--items", tmp_path / "new.parquet"], capsys, "domain 'musik', which the run does not know")
    pq.write_table(pa.table({**NEW, "title": ["w5", None, "w7"]}), tmp_path / "new.parquet")
    fails([*words, "--items", tmp_path / "new.parquet"], capsys, "row 2, column 'title'", "is missing")
