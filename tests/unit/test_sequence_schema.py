"""Sequences that are not pooled, and what is aligned with them, in the schema and the pack."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import fails
from histories import SCHEMA, WIDE, history_pack, history_rows

from gmeta.data.pack import PackWriter, open_pack
from gmeta.data.schema import data_schema_from_json, pack_schema_from_json, parse_data_schema
from gmeta.data.schema_difference import schema_difference
from gmeta.models.inputs import input_spec


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return history_pack(tmp_path_factory.mktemp("wide"), WIDE)


def test_a_schema_is_read_back(pack: Path) -> None:
    schema = parse_data_schema(WIDE)
    assert data_schema_from_json(json.loads(json.dumps(schema.to_json()))) == schema
    stored = open_pack(pack).schema
    assert pack_schema_from_json(json.loads(json.dumps(stored.to_json()))) == stored
    assert schema.features[3].max_length == 4, "that of the sequence it is aligned with"


def test_what_a_schema_does_not_name_is_not_written() -> None:
    """So that packs without it keep their bytes."""
    for entry in ({**SCHEMA, "sequence": []}, {**SCHEMA, "sequence": ["last"]}):
        told = parse_data_schema(entry).to_json()
        assert "numeric_sequence" not in told
        assert all("aligned" not in feature for feature in told["features"])


def test_rows_hold_the_last_values_side_by_side(pack: Path) -> None:
    """As a plain reading of the log gives them, in the order of tasks and times."""
    raw, found = history_rows(), open_pack(pack)
    words = {name: values_of(found, name) for name in ("item", "kinds")}
    number = found.schema.numeric_sequence[0]
    seen = 0
    keys = dict(zip(*(found_tasks(found)[name] for name in ("task_id", "key")), strict=True))
    by_user = {user: [i for i, u in enumerate(raw["user"]) if u == user] for user in set(raw["user"])}
    for name in found.splits:
        split = found.split(name)
        arrays = next(split.shard_arrays())
        starts = [*arrays["row_start"].tolist(), split.num_rows]
        for task, (start, end) in enumerate(itertools.pairwise(starts)):
            rows = by_user[keys[int(arrays["task_id"][task])]]
            for row, i in zip(range(start, end), rows, strict=True):
                part = slice(*arrays["last.offsets"][row : row + 2])
                expected = [raw["last"][i][-4:], raw["kinds"][i][-4:]]
                assert [words["item"].get(v) for v in arrays["last.values"][part]] == [
                    value if value in words["item"].values() else None for value in expected[0]
                ]
                assert [words["kinds"][v] for v in arrays["kinds.values"][part]] == expected[1]
                gaps = (np.log1p(np.array(raw["gaps"][i][-4:])) - number.mean) / number.std
                np.testing.assert_allclose(arrays["gaps.values"][part], gaps, rtol=1e-5, atol=1e-6)
                seen += len(expected[0])
        support, _, _ = split.examples(np.arange(split.num_tasks))
        mask, lengths = support.given["gaps.mask"], support.bags["last"].lengths
        assert mask.sum(-1).equal(lengths)
        assert support.given["gaps"].shape == (*mask.shape, 1)
        assert not support.given["gaps"][~mask].any()
    assert seen > 100


def found_tasks(pack: Any) -> dict[str, list[Any]]:
    return pq.read_table(pack.tasks_file()).to_pydict()


def values_of(pack: Any, table: str) -> dict[int, str]:
    found = pq.read_table(pack.vocab_file(table)).to_pydict()
    return dict(zip(found["id"], found["value"], strict=True))


def test_what_a_model_is_told(pack: Path) -> None:
    schema = open_pack(pack).schema
    inputs = input_spec(schema, features=[], numeric=True, embedding_dim=8)
    assert dict(inputs.features) == {"item": 8, "place": 8}
    assert dict(inputs.sequences) == {"last": 8, "kinds": 8, "gaps": 1}
    assert dict(inputs.tables) == {"item": "item", "place": "place", "last": "item", "kinds": "kinds"}
    assert (inputs.width, inputs.embedding_dim) == (2 * 8 + 2 * 8 + 1 + 1, 8)
    some = input_spec(schema, features=["item", "gaps"], numeric=False, embedding_dim=8)
    assert (dict(some.features), dict(some.sequences)) == ({"item": 8}, {"gaps": 1})
    with pytest.raises(ValueError, match=r"names 'gap'.*'gaps'"):
        input_spec(schema, features=["gap"], numeric=False, embedding_dim=8)


def test_packs_that_differ_in_a_sequence_do_not_fit(pack: Path, tmp_path: Path) -> None:
    ours = open_pack(pack).schema
    theirs = open_pack(history_pack(tmp_path, {**WIDE, "numeric_sequence": []})).schema
    assert schema_difference(ours, theirs) == ["numeric sequences are [], expected ['gaps']"]
    pooled = {**SCHEMA, "sequence": [{**SCHEMA["sequence"][0], "pooling": "sum"}]}
    lines = schema_difference(open_pack(history_pack(tmp_path / "sum", pooled)).schema, theirs)
    assert "feature 'last': pooling is 'none', expected 'sum'" in lines


def test_a_shard_that_is_not_aligned_is_refused(pack: Path, tmp_path: Path) -> None:
    found = open_pack(pack)
    arrays = {name: array.copy() for name, array in next(found.split("test").shard_arrays()).items()}
    arrays["gaps.offsets"][1:] = arrays["gaps.offsets"][-1]
    with (
        PackWriter(tmp_path / "pack", found.schema) as writer,
        pytest.raises(ValueError, match="gaps has not as many values in every row as last"),
    ):
        writer.add_shard("test", arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"multi": [{"name": "last", "pooling": "none"}], "sequence": []}, "pooling is 'none': must be mean or sum"),
        ({"sequence": [{"name": "last", "aligned": "lst"}, "lst2"]}, "'last' is aligned with 'lst'.*'lst2'"),
        ({"sequence": ["last", {"name": "kinds", "aligned": "last"}]}, "one of them is pooled"),
        (
            {"sequence": [*SCHEMA["sequence"], {"name": "kinds", "aligned": "last", "max_length": 3}]},
            "keeps 3 values and not 4: leave its max_length out",
        ),
        ({"numeric_sequence": [{"name": "gaps"}]}, "aligned is None: must be the name of the sequence"),
        ({"numeric_sequence": [{"name": "gaps", "aligned": "item"}]}, "aligned with 'item', which is no sequence"),
        ({"numeric_sequence": [{"name": "last", "aligned": "last"}]}, "'last' is listed twice"),
        ({"numeric_sequence": [{"name": "gaps", "aligned": "last", "lag": 1}]}, "unknown key 'lag': .*'log'"),
        ({"numeric_sequence": [{"name": "click", "aligned": "last"}]}, "'click' is the label and a feature"),
    ],
)
def test_bad_schemas(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_data_schema({**SCHEMA, **change})


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("kinds", ["k1"] * 9, "has not as many values as 'last', which it is aligned with"),
        ("gaps", [1.0] * 9, "has not as many values as 'last', which it is aligned with"),
        ("gaps", None, "is missing"),
        ("last", None, "is missing"),
    ],
)
def test_bad_rows_are_named(
    column: str, value: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = history_rows()
    rows[column][7] = value
    tmp_path.joinpath("schema.json").write_text(json.dumps(WIDE))
    pq.write_table(pa.table(rows), tmp_path / "log.parquet")
    words = ["prepare", "--input", tmp_path / "log.parquet", "--schema", tmp_path / "schema.json"]
    fails([*words, "--out", tmp_path / "pack"], capsys, f"log.parquet, row 8, column '{column}'", message)


def test_missing_numbers_are_the_mean(tmp_path: Path) -> None:
    rows = history_rows()
    rows["gaps"] = [[None, *values[1:]] if values else values for values in rows["gaps"]]
    schema = {**WIDE, "numeric_sequence": [{"name": "gaps", "aligned": "last", "nulls": "mean"}]}
    split = open_pack(history_pack(tmp_path, schema, gaps=rows["gaps"])).split("train")
    arrays = next(split.shard_arrays())
    starts = arrays["gaps.offsets"]
    short = np.flatnonzero((np.diff(starts) > 0) & (np.diff(starts) < 4))  # which lost no value at the front
    assert (arrays["gaps.values"][starts[short]] == 0).all()
    assert np.abs(arrays["gaps.values"]).max() > 1


def test_text_with_a_separator(pack: Path, tmp_path: Path) -> None:
    """The same values from a CSV give the same arrays."""
    rows = history_rows()
    schema = json.loads(json.dumps(WIDE))
    for entry in (*schema["sequence"], *schema["numeric_sequence"]):
        entry["separator"] = "|"
        rows[entry["name"]] = ["|".join(map(str, values)) for values in rows[entry["name"]]]
    found = history_pack(tmp_path, schema, **rows)
    ours, theirs = (next(open_pack(path).split("train").shard_arrays()) for path in (found, pack))
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, name)
