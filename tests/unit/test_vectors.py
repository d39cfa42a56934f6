"""Vectors of rows and of items: schema, pack, models, requests, bundles and later days."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import fails, gmeta
from histories import SCHEMA, history_pack, history_rows
from serving import Client, with_client

import gmeta as package
from gmeta.config.delivery import BundleConfig
from gmeta.config.train import EmbeddingConfig, ModelConfig, TrainConfig
from gmeta.data.item_vectors import vector_file
from gmeta.data.pack import open_pack, verify_pack
from gmeta.data.prepare.encoder import Encoder
from gmeta.data.schema import data_schema_from_json, pack_schema_from_json, parse_data_schema
from gmeta.delivery.bundle import make_bundle
from gmeta.models.inputs import input_spec
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.build import new_objective
from gmeta.recommender.tasks import encode_rows, task_digests

TEXT, PICTURE = 3, 2
VECTORS = {
    **SCHEMA,
    "vector": [
        {"name": "text", "dim": TEXT, "owner": "item", "dtype": "fp16"},
        {"name": "picture", "dim": PICTURE},
    ],
}


def text_of(item: str) -> list[float]:
    """A vector that fp16 holds exactly."""
    number = int(item[1:])
    return [number / 4, -float(number), float(number % 3)]


def vector_rows(*args: Any, **kwargs: Any) -> dict[str, list[Any]]:
    rows = history_rows(*args, **kwargs)
    rng = np.random.default_rng(len(rows["item"]))
    return {
        **rows,
        "text": [text_of(item) for item in rows["item"]],
        "picture": rng.normal(size=(len(rows["item"]), 2)).tolist(),
    }


def pack_in(folder: Path, schema: dict[str, Any] | None = None, **columns: Any) -> Path:
    rows = vector_rows()
    return history_pack(folder, schema or VECTORS, **{"text": rows["text"], "picture": rows["picture"], **columns})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack with vectors, a run on it and its bundle."""
    folder = tmp_path_factory.mktemp("vectors")
    pack = pack_in(folder)
    config: dict[str, Any] = {"pack": str(pack), "run_dir": str(folder / "run"), "loader": {"tasks_per_batch": 20}}
    config |= {"schedule": {"epochs": 2}, "embedding": {"init_std": 0.5}, "meta": {"adapt": ["decision"]}}
    config |= {"model": {"name": "melu", "features": ["item", "text", "picture"], "args": {"hidden": [8]}}}
    make_bundle(BundleConfig(run_dir=str(package.train(config).path), out=str(folder / "bundle")))
    return folder


def ids_of(pack: Any) -> dict[str, int]:
    found = pq.read_table(pack.vocab_file("item")).to_pydict()
    return dict(zip(found["value"], found["id"], strict=True))


def test_a_schema_is_read_back(folder: Path) -> None:
    schema, stored = parse_data_schema(VECTORS), open_pack(folder / "pack").schema
    assert data_schema_from_json(json.loads(json.dumps(schema.to_json()))) == schema
    assert pack_schema_from_json(json.loads(json.dumps(stored.to_json()))) == stored
    assert "vector" not in parse_data_schema(SCHEMA).to_json()


def test_a_batch_has_them(folder: Path) -> None:
    """Of the item by its id, zeros where it is unknown; of the row as it came; zeros on padding."""
    verify_pack(folder / "pack")
    pack, rows = open_pack(folder / "pack"), vector_rows()
    names = {number: value for value, number in ids_of(pack).items()}
    pictures = {tuple(np.float32(picture).tolist()) for picture in rows["picture"]}
    unknown = 0
    for name in pack.splits:
        split = pack.split(name)
        for side in split.examples(np.arange(split.num_tasks))[:2]:
            text, picture = side.given["text"], side.given["picture"]
            assert (text.dtype, picture.dtype) == (side.dense.dtype, side.dense.dtype)
            assert not text[~side.mask].any()
            assert not picture[~side.mask].any()
            for number, vector in zip(side.ids["item"][side.mask].tolist(), text[side.mask].tolist(), strict=True):
                assert vector == (text_of(names[number]) if number else [0.0] * TEXT)
                unknown += not number
            assert {tuple(vector) for vector in picture[side.mask].tolist()} <= pictures
    stored = np.load(vector_file(folder / "pack" / "vocab", "text"))
    assert (stored.dtype, stored.shape) == (np.float16, (len(names) + 1, TEXT))
    assert not stored[0].any()


def test_what_a_model_is_told(folder: Path) -> None:
    schema = open_pack(folder / "pack").schema
    inputs = input_spec(schema, features=[], numeric=True, embedding_dim=4)
    assert dict(inputs.vectors) == {"text": TEXT, "picture": PICTURE}
    assert (inputs.width, inputs.embedding_dim) == (3 * 4 + TEXT + PICTURE + 1, 4)


@pytest.mark.parametrize("name", ["melu", "dlrm", "taste", "neural_linear", "din", "transformer"])
def test_every_model_reads_them(folder: Path, name: str) -> None:
    """A trial finds what a model cannot do; a generator may make ids' first vectors of them."""
    adapt = ["last_layer"] if name == "neural_linear" else ["decision"]
    config = TrainConfig(pack="", run_dir="", model=ModelConfig(name=name, embedding_dim=4))
    config = TrainConfig(
        pack="",
        run_dir="",
        model=ModelConfig(name=name, embedding_dim=4),
        meta=type(config.meta)(adapt=adapt),
        embedding=EmbeddingConfig(generator={"item": ["text", "last"]}),
    )
    learner = new_objective(config, open_pack(folder / "pack").schema, Mesh())
    assert learner.vectors == {"text": TEXT, "picture": PICTURE}
    assert learner.engine_reason in ("factored", "closed form")


def support_and_query(num_users: int = 3) -> tuple[pa.Table, pa.Table]:
    rows = pa.table(vector_rows(num_users, 12, seed=5, first_user=900))
    early = np.tile(np.arange(12) < 8, num_users)
    return rows.filter(pa.array(early)), rows.filter(pa.array(~early)).drop_columns(["click"])


def test_requests_may_leave_items_vectors_out(folder: Path, tmp_path: Path) -> None:
    """They are known by id; a request that has them gives the same, and says more of an unknown item."""
    support, query = support_and_query()
    expected = package.load(folder / "run").adapt(support).predict(query)
    bare = [table.drop_columns(["text"]) for table in (support, query)]
    for mapped in (False, True):
        rec = package.load(folder / "bundle", mapped=mapped)
        np.testing.assert_allclose(rec.adapt(support).predict(query), expected, atol=1e-6)
        np.testing.assert_allclose(rec.adapt(bare[0]).predict(bare[1]), expected, atol=1e-6)
    for name, table in (("support", bare[0]), ("query", query)):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    words = ["--support", tmp_path / "support.parquet", "--query", tmp_path / "query.parquet"]
    gmeta("predict", "--run_dir", folder / "run", *words, "--out", tmp_path / "scores.parquet")
    found = pq.read_table(tmp_path / "scores.parquet")["score"].to_numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    new = {name: values[:1] for name, values in query.to_pydict().items()} | {"item": ["never seen"]}
    users = rec.adapt(support)
    said = [users.predict({**new, "text": [vector]})[0] for vector in ([0.0] * TEXT, [5.0, -9.0, 2.0])]
    assert said[0] == pytest.approx(users.predict({k: v for k, v in new.items() if k != "text"})[0])
    assert said[0] != said[1]


def test_requests_are_encoded_alike_with_a_database_and_without(folder: Path) -> None:
    pack = open_pack(folder / "pack")
    encoders = [Encoder(pack.manifest["data_schema"], folder / "pack" / "vocab", pack.schema) for _ in range(2)]
    encoders[1]._direct = None
    support, _ = support_and_query()
    single = support.set_column(
        support.column_names.index("picture"),
        "picture",
        pa.array(support["picture"].to_pylist(), pa.list_(pa.float32())),
    )
    for table in (support, support.drop_columns(["text"]), single):
        assert encoders[0]._direct is not None
        assert encoders[0]._direct.rows(table, support=True) is not None
        found, expected = (encoder.table(table, "support").arrays for encoder in encoders)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, name)
            assert found[name].dtype == array.dtype


def test_supports_that_differ_in_a_vector_are_two(folder: Path) -> None:
    """A server remembers what a task learned by a checksum of its support."""
    rec, (support, _) = package.load(folder / "bundle"), support_and_query(1)
    pictures = support["picture"].to_pylist()
    other = support.set_column(support.column_names.index("picture"), "picture", [[[9.0, 9.0], *pictures[1:]]])
    found = []
    for table in (support, support, other):
        encoded = encode_rows(rec, table, "support")
        assert encoded is not None
        found.append(task_digests(encoded, rec.schema))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_a_vector_may_have_any_name(tmp_path: Path) -> None:
    rows = vector_rows()
    schema = {**SCHEMA, "vector": [{"name": "dense", "dim": PICTURE}, {"name": "item_cold", "dim": TEXT}]}
    pack = open_pack(history_pack(tmp_path, schema, dense=rows["picture"], item_cold=rows["text"]))
    support, _, _ = pack.split("train").examples(np.arange(2))
    assert support.given["dense"].shape == (*support.mask.shape, PICTURE)
    assert support.dense.shape == (*support.mask.shape, 1)


def test_the_server_answers(folder: Path) -> None:
    support, query = support_and_query(1)
    expected = package.load(folder / "bundle").adapt(support).predict(query)
    parts = [table.drop_columns(["user", "time", "text", "kinds", "gaps"]).to_pydict() for table in (support, query)]
    task = {"key": support["user"].to_pylist()[0], "support": parts[0], "candidates": parts[1]}

    async def work(client: Client) -> None:
        found = await client.score(task)
        assert found.status_code == 200, found.text
        assert found.json()["tasks"][0]["scores"] == pytest.approx(expected.tolist(), abs=1e-6)
        given = {**parts[1], "text": query["text"].to_pylist()}
        found = await client.score({**task, "candidates": given})
        assert found.status_code == 200, found.text
        assert found.json()["tasks"][0]["scores"] == pytest.approx(expected.tolist(), abs=1e-6)
        refused = await client.score({**task, "candidates": {**given, "text": [[1.0]] * 4}})
        assert refused.status_code == 422
        assert f"has not {TEXT} numbers" in refused.text

    with_client(folder / "bundle", work)


def test_the_last_vector_of_an_item_counts(tmp_path: Path) -> None:
    rows = vector_rows()
    of_item = [row for row, item in enumerate(rows["item"]) if item == "i4"]
    last = max(of_item, key=lambda row: rows["time"][row])
    rows["text"][last] = [7.0, 8.0, 9.0]
    pack = open_pack(pack_in(tmp_path, text=rows["text"]))
    stored = np.load(vector_file(pack.path / "vocab", "text"))
    assert stored[ids_of(pack)["i4"]].tolist() == [7.0, 8.0, 9.0]
    assert stored[ids_of(pack)["i5"]].tolist() == text_of("i5")


def test_two_vectors_of_an_item_without_a_time_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = vector_rows()
    first, second = np.flatnonzero(np.array(rows["item"]) == "i4")[:2].tolist()
    rows["text"][second] = [7.0, 8.0, 9.0]
    schema = {key: value for key, value in VECTORS.items() if key != "time"}
    pq.write_table(pa.table(rows), tmp_path / "log.parquet")
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    words = ["prepare", "--input", tmp_path / "log.parquet", "--schema", tmp_path / "schema.json"]
    message = fails([*words, "--out", tmp_path / "pack"], capsys, "item 'i4' has two vectors 'text'", "Name the time")
    assert f"row {first + 1} and" in message
    assert f"row {second + 1}." in message


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("text", [1.0, 2.0], f"has not {TEXT} numbers"),
        ("text", None, "is missing"),
        ("text", [1.0, None, 2.0], "has a missing element"),
        ("picture", [1.0, float("nan")], "has a missing element"),
        ("picture", [1.0, float("inf")], "has an element that is infinite or beyond float32"),
        ("text", [1.0, 2.0, 70_000.0], "has an element beyond fp16: store it as fp32"),
    ],
)
def test_bad_vectors_are_named(
    column: str, value: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = vector_rows()
    rows[column][7] = value
    pq.write_table(pa.table(rows), tmp_path / "log.parquet")
    (tmp_path / "schema.json").write_text(json.dumps(VECTORS))
    words = ["prepare", "--input", tmp_path / "log.parquet", "--schema", tmp_path / "schema.json"]
    fails([*words, "--out", tmp_path / "pack"], capsys, f"log.parquet, row 8, column '{column}'", message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vector": ["text"]}, "dim is None: must be a whole number"),
        ({"vector": [{"name": "text", "dim": 0}]}, "dim is 0: must be at least 1"),
        ({"vector": [{"name": "text", "dim": 3, "owner": "user"}]}, "owner is 'user': must be row or item"),
        ({"vector": [{"name": "text", "dim": 3, "dtype": "int8"}]}, "dtype is 'int8': must be fp32 or fp16"),
        ({"vector": [{"name": "text", "dim": 3, "owner": "item"}], "item": None}, "is kept by the item's id"),
        ({"vector": [{"name": "item", "dim": 3}]}, "'item' is listed twice"),
    ],
)
def test_bad_schemas(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_data_schema({**SCHEMA, **change})


def test_a_damaged_file_is_named_when_it_is_read(folder: Path, tmp_path: Path) -> None:
    pack = pack_in(tmp_path)
    file = vector_file(pack / "vocab", "text")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"text\.npy is damaged"):
        open_pack(pack).split("train").examples(np.arange(1))
    file.unlink()
    with pytest.raises(ValueError, match=r"text\.npy is missing"):
        open_pack(pack)


def test_a_later_day_adds_its_items(folder: Path, tmp_path: Path) -> None:
    """Vectors of known items stay, or are the day's where it has some; new items get theirs; rows bring their own."""
    rows = vector_rows(3, 12, seed=9)
    rows["time"] = [time + 20_000 for time in rows["time"]]
    rows["item"][:6] = ["i77"] * 6
    rows["text"] = [[1.5, 2.5, 3.5] if item == "i77" else text_of(item) for item in rows["item"]]
    changed = rows["item"][8]
    rows["text"] = [
        [4.0, 5.0, 6.0] if item == changed else text for item, text in zip(rows["item"], rows["text"], strict=True)
    ]
    pq.write_table(pa.table(rows), tmp_path / "day.parquet")
    words = ["--input", tmp_path / "day.parquet", "--base", folder / "pack", "--out", tmp_path / "pack"]
    gmeta("prepare", *words, "--history_rows", 5)
    before, after = open_pack(folder / "pack"), open_pack(tmp_path / "pack")
    stored = np.load(vector_file(after.path / "vocab", "text"))
    for value, number in ids_of(after).items():
        new = {"i77": [1.5, 2.5, 3.5], changed: [4.0, 5.0, 6.0]}
        assert stored[number].tolist() == new.get(value, text_of(value)), value
    assert len(stored) == after.schema.feature("item").num_ids
    assert not stored[0].any()
    assert len(stored) >= before.schema.feature("item").num_ids
    pictures = {tuple(np.float32(p).tolist()) for p in [*vector_rows()["picture"], *rows["picture"]]}
    for name in after.splits:
        split = after.split(name)
        support, _, _ = split.examples(np.arange(split.num_tasks))
        found = {tuple(vector) for vector in support.given["picture"][support.mask].tolist()}
        assert found <= pictures
        assert int(support.mask.sum()) > 8 * split.num_tasks, "older rows are there"
