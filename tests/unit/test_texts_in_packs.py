"""Texts as values: schema, packs whose rows have an id of each text, batches, and models that read them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import fails, gmeta, train_words
from histories import SCHEMA, history_pack
from text_models import TEXTS, Titles, text_pack, text_rows

from gmeta.core.batch import Examples, text_ids_of
from gmeta.data.pack import open_pack, verify_pack
from gmeta.data.schema import data_schema_from_json, pack_schema_from_json, parse_data_schema
from gmeta.data.shards import PackSplit
from gmeta.data.text_tables import further_texts_file, open_text_tables
from gmeta.models.inputs import input_spec
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.build import load_system


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_pack(tmp_path_factory.mktemp("texts"))


def test_a_schema_is_read_back(pack: Path) -> None:
    schema, stored = parse_data_schema(TEXTS), open_pack(pack).schema
    assert data_schema_from_json(json.loads(json.dumps(schema.to_json()))) == schema
    assert pack_schema_from_json(json.loads(json.dumps(stored.to_json()))) == stored
    plain = json.dumps([parse_data_schema(SCHEMA).to_json(), stored.to_json()["features"][1]])
    assert "text" not in plain, "packs without texts keep their bytes"


def texts_of(side: Examples, name: str, table: Sequence[str]) -> list[list[list[str]]]:
    return [[[table[i] for i in row if i] for row in task] for task in side.given[text_ids_of(name)].tolist()]


def raw_texts(rows: Mapping[str, list[Any]], user: str) -> list[tuple[str, list[str]]]:
    return [(rows["item"][i], rows["last"][i][-4:]) for i, name in enumerate(rows["user"]) if name == user]


def compare_with_log(split: PackSplit, tables: Mapping[str, Sequence[str]], keys: list[str]) -> None:
    """Each row of a split has the texts of the log."""
    rows = text_rows()
    sides = split.examples(np.arange(split.num_tasks))
    for task, user in enumerate(keys):
        found = []
        for side in sides[:2]:
            item, last = (texts_of(side, name, tables["item"])[task] for name in ("item", "last"))
            size = int(side.mask[task].sum())
            assert not any([*item[size:], *last[size:]]), "padding has no text"
            found += [(own[0], history) for own, history in zip(item[:size], last[:size], strict=True)]
        assert found == raw_texts(rows, user)


def test_every_row_has_its_texts(pack: Path) -> None:
    """Cold ones too, whose ids are unknown to all but who reads texts."""
    found = open_pack(pack)
    verify_pack(pack)
    tables, item = found.text_tables(), found.schema.feature("item")
    assert item.num_texts is not None
    assert item.num_texts > item.num_ids
    assert (list(tables), len(tables["item"]), tables["item"][0]) == (["item"], item.num_texts, "")
    assert list(tables["item"]) == tables["item"][:]
    listed = pq.read_table(found.tasks_file()).to_pydict()
    keys = dict(zip(listed["task_id"], listed["key"], strict=True))
    for name in found.splits:
        split = found.split(name)
        compare_with_log(split, tables, [keys[number] for number in split.task_id.tolist()])
        ids = split.feature_ids("item"), split.feature_ids("last")
        assert max(part.max() for part in ids) < item.num_ids
        cold = sum(int((part == 0).sum()) for part in ids)
        assert cold == (0 if name == "train" else 2 * split.num_tasks), "what a user's row alone has"
        support, query, _ = split.examples(np.arange(split.num_tasks))
        for side in (support, query):
            assert int(side.ids["item"].max()) < item.num_ids > int(side.bags["last"].values.max())
        assert int(support.item_cold.sum() + query.item_cold.sum()) == (0 if name == "train" else split.num_tasks)


def test_further_texts_are_sorted_and_their_own(pack: Path) -> None:
    found = open_pack(pack)
    file = further_texts_file(pack / "vocab", "item")
    values = pq.read_table(file).to_pydict()
    assert values["value"] == sorted(values["value"])
    num_ids = found.schema.feature("item").num_ids
    assert values["id"] == list(range(num_ids, num_ids + len(values["id"])))
    known = set(pq.read_table(found.vocab_file("item"))["value"].to_pylist())
    assert not known & set(values["value"])
    held_out = sum(found.split(name).num_tasks for name in ("valid", "test"))
    assert len(values["id"]) == 2 * held_out


def test_rare_texts_have_ids_too(tmp_path: Path) -> None:
    """With `min_count` an embedding row needs more; a text does not."""
    common = {"min_count": 4, "text": True}
    schema = {**TEXTS, "categorical": [{"name": "item", **common}, "place"]}
    schema["sequence"] = [{**TEXTS["sequence"][0], **common}]
    found = open_pack(text_pack(tmp_path, schema))
    listed = pq.read_table(found.tasks_file()).to_pydict()
    keys = dict(zip(listed["task_id"], listed["key"], strict=True))
    split = found.split("train")
    compare_with_log(split, found.text_tables(), [keys[number] for number in split.task_id.tolist()])
    assert (split.feature_ids("item") == 0).any()


def test_missing_texts_and_no_further_ones(tmp_path: Path) -> None:
    rows = text_rows()
    items = [None if text.startswith("Only") else text for text in rows["item"]]
    last = [["" if text.startswith("Written") else text for text in texts] for texts in rows["last"]]
    schema = {**TEXTS, "item": None, "categorical": [{"name": "item", "text": True, "nulls": "oov"}, "place"]}
    schema["sequence"] = [{**TEXTS["sequence"][0], "nulls": "oov"}]
    found = open_pack(text_pack(tmp_path, schema, item=items, last=last))
    item = found.schema.feature("item")
    assert item.num_texts == item.num_ids
    assert not further_texts_file(found.path / "vocab", "item").exists()
    support, query, _ = found.split("train").examples(np.arange(found.split("train").num_tasks))
    missing = sum(int((side.given["item.text"][..., 0] == 0)[side.mask].sum()) for side in (support, query))
    assert missing == found.split("train").num_tasks
    assert int((found.split("train").feature_ids("last") == 0).sum()) == missing, "also within a history"


def test_numbers_may_be_texts(tmp_path: Path) -> None:
    schema = {**SCHEMA, "categorical": ["item", "place", {"name": "time", "text": True, "table": "clock"}]}
    found = open_pack(history_pack(tmp_path, schema))
    split = found.split("test")
    side, _, _ = split.examples(np.arange(split.num_tasks))
    table, times = found.text_tables()["clock"], split.times()
    assert times is not None
    ids = side.given["time.text"][..., 0]
    for row, number in zip(side.row[side.mask].tolist(), ids[side.mask].tolist(), strict=True):
        assert table[number] == str(times[row])


def test_what_a_model_is_told(pack: Path) -> None:
    found = open_pack(pack)
    schema, tables = found.schema, found.text_tables()
    inputs = input_spec(schema, features=[], numeric=True, embedding_dim=4, text_tables=tables)
    assert inputs.texts == {"item": schema.feature("item").num_texts, "last": schema.feature("item").num_texts}
    assert inputs.text_tables["item"][-1] == tables["item"][:][-1]
    with pytest.raises(ValueError, match=r"Titles.texts names 'last', no feature of texts"):
        input_spec(schema, features=["item"], numeric=True, embedding_dim=4, text_tables=tables).texts_of(
            Titles(inputs)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"multi": [{"name": "tags", "text": True}]}, r"schema.multi\[0\]: unknown key 'text'"),
        ({"sequence": [{"name": "last", "text": True}]}, r"sequence\[0\]: text needs `pooling: none`"),
        ({"sequence": [{"name": "last", "text": True, "pooling": "sum"}]}, "text needs `pooling: none`"),
        ({"categorical": [{"name": "item", "text": True, "hash_buckets": 9}]}, "leave hash_buckets out"),
        ({"categorical": [{"name": "item", "text": "yes"}]}, "text is 'yes': must be true or false"),
        ({"categorical": ["item"]}, "'last' and 'item' share table 'item', and only the first has text: true"),
    ],
)
def test_bad_schemas(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_data_schema({**TEXTS, **change})


def test_a_pack_schema_is_checked(pack: Path) -> None:
    told = open_pack(pack).schema.to_json()
    told["features"][0]["num_texts"] = 3
    with pytest.raises(ValueError, match=r"features\[0\].num_texts is 3: must be a whole number of at least num_ids"):
        pack_schema_from_json(told)


def test_a_damaged_file_is_named_when_it_is_read(tmp_path: Path) -> None:
    pack = text_pack(tmp_path)
    file = further_texts_file(pack / "vocab", "item")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"item\+texts\.parquet is damaged"):
        list(open_pack(pack).text_tables()["item"])
    schema = open_pack(pack).schema
    file.unlink()
    with pytest.raises(ValueError, match=r"item\+texts\.parquet is missing"):
        open_pack(pack)
    with pytest.raises(ValueError, match=r"item\+texts\.parquet is missing or damaged"):
        list(open_text_tables(pack / "vocab", schema)["item"])


@pytest.fixture(scope="module")
def run_dir(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("run") / "run"
    gmeta(*text_words(pack, run_dir))
    return run_dir


def text_words(pack: Path, run_dir: Path, *more: object) -> list[str]:
    words = [*train_words(pack, run_dir), "--model.name", "text_models:Titles", "--meta.adapt", "[head]", *more]
    at = words.index("--model.args.hidden")
    return [str(word) for word in [*words[:at], *words[at + 2 :]]]


def test_a_run_is_evaluated(run_dir: Path, tmp_path: Path) -> None:
    gmeta("evaluate", "--run_dir", run_dir, "--out", tmp_path / "out", "--trust_model", "true", "--baselines", "false")
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["records"]


def test_a_run_knows_its_texts(run_dir: Path, pack: Path) -> None:
    """Without the pack; with another pack's texts where that is read."""
    own, _, _ = load_system(run_dir, "best", Mesh(), trust_model=True)
    tables = open_pack(pack).text_tables()
    theirs, _, _ = load_system(run_dir, "best", Mesh(), trust_model=True, text_tables={"item": tables["item"][:5]})
    ours = own.learner.model.numbers
    assert len(ours) == len(tables["item"]) == own.learner.texts["item"].num_texts
    assert theirs.learner.model.numbers.tolist() == ours[:5].tolist()


def test_a_run_goes_on_bit_for_bit(run_dir: Path, pack: Path, tmp_path: Path) -> None:
    gmeta(*text_words(pack, tmp_path / "half", "--schedule.max_steps", 2))
    gmeta(*text_words(pack, tmp_path / "half", "--resume", "true"))
    whole, resumed = (load_system(path, "last", Mesh(), trust_model=True)[0] for path in (run_dir, tmp_path / "half"))
    for (name, ours), theirs in zip(whole.tensors().items(), resumed.tensors().values(), strict=True):
        assert ours.equal(theirs), name


def test_other_texts_are_not_this_runs_data(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = history_pack(tmp_path, {**TEXTS, "categorical": ["item", "place"], "sequence": SCHEMA["sequence"]})
    words = ["evaluate", "--run_dir", run_dir, "--out", tmp_path / "out", "--trust_model", "true", "--pack", plain]
    fails(words, capsys, "feature 'item' has no texts, expected the contrary")
