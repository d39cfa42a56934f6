"""Texts in raw rows of a trained run: known ones, and those that nobody knew before they were asked for."""

from __future__ import annotations

import asyncio
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from commands import fails, gmeta
from serving import Client, tasks_of, with_client
from text_models import TEXTS, Titles, text_pack, text_rows

import gmeta as package
from gmeta.config.delivery import BundleConfig
from gmeta.data.pack import open_pack
from gmeta.data.prepare.encoder import EncodedTables, Encoder
from gmeta.data.text_tables import further_texts_file, open_text_tables
from gmeta.delivery.bundle import make_bundle
from gmeta.evaluation.score import score_split, to_predictions
from gmeta.recommender import model_texts
from gmeta.recommender.recommender import Recommender
from gmeta.recommender.tasks import adapt_tasks, encode_rows, score_tasks, task_digests
from gmeta.runs.directory import read_schema


def settings_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = {"pack": str(folder / "pack"), "run_dir": str(folder / "run")}
    config |= {"loader": {"tasks_per_batch": 20}, "schedule": {"epochs": 2}, "dense": {"lr": 0.05}}
    config |= {"model": {"name": "text_models:Titles"}, "meta": {"adapt": ["dense"], "inner_lr": 0.5}}
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack, a run on it, its bundle, and a copy of the run that knows the texts of its vocabulary alone."""
    folder = tmp_path_factory.mktemp("requests")
    text_pack(folder)
    package.train(settings_of(folder))
    make_bundle(BundleConfig(run_dir=str(folder / "run"), out=str(folder / "bundle"), trust_model=True))
    for name in ("run", "bundle"):
        shutil.copytree(folder / name, folder / f"bare-{name}")
    further_texts_file(folder / "bare-run" / "vocab", "item").unlink()
    schemas = json.loads((folder / "run" / "schema.json").read_text())
    for feature in schemas["pack"]["features"]:
        feature |= {"num_texts": feature["num_ids"]} if "num_texts" in feature else {}
    (folder / "bare-run" / "schema.json").write_text(json.dumps(schemas))
    return folder


def opened(path: Path, **values: Any) -> Recommender:
    return package.load(path, model=Titles, **values)


def held_out(folder: Path) -> tuple[pa.Table, pa.Table, np.ndarray]:
    """Support and query of the test tasks as raw rows, and the scores of the query as the pack gives them."""
    pack, rec = open_pack(folder / "pack"), opened(folder / "run")
    split = pack.split("test")
    scores = score_split(rec.system, split, tasks_per_batch=20, max_support_rows=0)
    assert scores is not None
    listed = pq.read_table(pack.tasks_file()).to_pydict()
    keys = dict(zip(listed["task_id"], listed["key"], strict=True))
    rows = pa.table(text_rows()).drop_columns(["kinds", "gaps"])
    parts = [rows.filter(pc.equal(rows["user"], keys[number])) for number in split.task_id.tolist()]
    assert {len(part) for part in parts} == {12}
    support, query = (pa.concat_tables(part[some] for part in parts) for some in (slice(0, 8), slice(8, 12)))
    return support, query.drop_columns(["click"]), to_predictions(scores.after[np.argsort(scores.row)], "bce")


def moved(support: pa.Table, query: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The same with cold texts in the query too, which no other row has."""
    items = query["item"].to_pylist()
    items[1::4] = [f"Never seen {i}" for i, _ in enumerate(items[1::4])]
    return support, query.set_column(query.column_names.index("item"), "item", pa.array(items))


def test_what_is_served_is_what_was_evaluated(folder: Path, tmp_path: Path) -> None:
    """From a run, a bundle, files and a server, also where all cold texts are news to it."""
    support, query, expected = held_out(folder)
    assert sum(text.startswith("Only") for text in support["item"].to_pylist()) == len(query) // 4
    for name, values in (("run", {}), ("bundle", {"mapped": True}), ("bare-run", {})):
        found = opened(folder / name, **values).adapt(support).predict(query)
        np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=name)
    for name, table in (("support", support), ("query", query)):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    words = ["--support", tmp_path / "support.parquet", "--query", tmp_path / "query.parquet", "--trust_model", "true"]
    for name in ("run", "bare-run"):
        gmeta("predict", "--run_dir", folder / name, *words, "--out", tmp_path / f"{name}.parquet")
        scores = pq.read_table(tmp_path / f"{name}.parquet")["score"].to_numpy()
        np.testing.assert_allclose(scores, expected, atol=1e-6, err_msg=name)


def test_texts_that_nobody_knew_are_read(folder: Path, tmp_path: Path) -> None:
    """Alone, together, and by the server, in whatever order they come."""
    support, query = moved(*held_out(folder)[:2])
    rec = opened(folder / "bundle")
    expected = rec.adapt(support).predict(query)
    known = rec.adapt(support).predict(query.set_column(query.column_names.index("item"), "item", support["item"][:16]))
    assert not np.allclose(expected, known), "the texts of items count"
    bare = opened(folder / "bare-run")
    np.testing.assert_allclose(bare.adapt(support).predict(query), expected, atol=1e-6)
    tasks = tasks_of(support.drop_columns(["time"]), query.drop_columns(["time"]))
    by_key = {key: expected[np.array(query["user"].to_pylist()) == key] for key in query["user"].to_pylist()}

    async def work(client: Client) -> None:
        for some in (tasks[2:], tasks, tasks[:1], list(reversed(tasks))):
            answered = await client.score(*some)
            assert answered.status_code == 200, answered.text
            for task in answered.json()["tasks"]:
                assert task["scores"] == pytest.approx(by_key[task["key"]].tolist(), abs=1e-6)

    with_client(folder / "bundle", work, trust_model=True)


def test_new_texts_of_a_pass_are_bounded(folder: Path) -> None:
    """Encoding them holds up everyone else. Texts that were encoded before do not count."""
    tasks = tasks_of(*moved(*held_out(folder)[:2]))[:4]  # of each one candidate is new

    async def work(client: Client) -> None:
        refused = await client.score(*tasks)
        assert refused.status_code == 413
        assert refused.json()["error"] == {
            "code": "too_many_new_texts",
            "message": "4 texts are new to the model, more than 3: send them in parts",
        }
        together = await asyncio.gather(client.score(*tasks[:2]), client.score(*tasks[2:]))
        assert sorted(answer.status_code for answer in together) == [200, 503]
        (busy,) = [answer for answer in together if answer.status_code == 503]
        assert busy.json()["error"]["code"] == "busy_with_texts"
        assert busy.headers["retry-after"] == "1"
        for some in (tasks[:2], tasks[2:], tasks):
            assert (await client.score(*some)).status_code == 200

    with_client(folder / "bare-bundle", work, trust_model=True, max_new_texts=3, batch_wait_ms=50)


def test_requests_of_all_kinds_are_joined(folder: Path) -> None:
    """Each table numbers its new texts by itself."""
    support, query = moved(*held_out(folder)[:2])
    rec, users = opened(folder / "bare-run"), support["user"].unique().to_pylist()
    expected = [float(score) for score in rec.adapt(support).predict(query)]
    of_users = [[table.filter(pc.equal(table["user"], user)) for table in (support, query)] for user in users]
    encoded = [[encode_rows(rec, own[0], "support"), encode_rows(rec, own[1], "candidates")] for own in of_users]
    states = adapt_tasks(rec, [own[0] for own in encoded])  # type: ignore[misc]
    scores = score_tasks(rec, [own[1] for own in encoded], [[state] for state in states])  # type: ignore[misc]
    np.testing.assert_allclose(np.concatenate(scores), expected, atol=1e-6)


def test_added_texts_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    support, query = moved(*held_out(folder)[:2])
    expected = opened(folder / "bare-run").adapt(support).predict(query)
    monkeypatch.setattr(model_texts, "MOST_TEXTS", 5)
    rec, users = opened(folder / "bare-run"), support["user"].unique().to_pylist()

    def scored(user: str) -> np.ndarray:
        parts = [table.filter(pc.equal(table["user"], user)) for table in (support, query)]
        return rec.adapt(parts[0]).predict(parts[1])

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(scored, users * 3))
    np.testing.assert_allclose(np.concatenate(found), np.tile(expected, 3), atol=1e-6)
    model: Any = rec.system.learner.model
    assert model.num_given < len(model.numbers) <= model.num_given + 5


def test_a_model_that_takes_no_texts_sees_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    support, query = moved(*held_out(folder)[:2])
    monkeypatch.delattr(Titles, "add_texts")
    users = opened(folder / "run").adapt(support)
    other = [text + "!" if text.startswith("Never") else text for text in query["item"].to_pylist()]
    changed = query.set_column(query.column_names.index("item"), "item", pa.array(other))
    assert users.predict(query).tolist() == users.predict(changed).tolist()


def test_supports_that_differ_in_a_new_text_are_two(folder: Path) -> None:
    """A server remembers what a task learned by a checksum of its support, whatever stood beside it."""
    support, _, _ = held_out(folder)
    rec, column = opened(folder / "bare-run"), support.column_names.index("item")
    users = support["user"].unique().to_pylist()
    alone = support.filter(pc.equal(support["user"], users[1]))
    items = [text + "!" if text.startswith("Only") else text for text in alone["item"].to_pylist()]
    tables = (support, alone, alone.set_column(column, "item", pa.array(items)))
    found = []
    for table in tables:
        encoded = encode_rows(rec, table, "support")
        assert encoded is not None
        found.append(task_digests(encoded, rec.schema))
    assert found[0][1] == found[1][0]
    assert found[1] != found[2]


def texts_in(encoded: EncodedTables, rec: Recommender) -> dict[str, list[str]]:
    known = open_text_tables(rec.source / "vocab", rec.schema)["item"]
    every = [*known, *encoded.texts.get("item", [])]
    ids = {"item": encoded.arrays["ids"][:, 0], "last": encoded.arrays["last.values"]}
    return {name: [every[i] for i in values.tolist()] for name, values in ids.items()}


@pytest.mark.parametrize("name", ["run", "bare-run"])
def test_requests_are_encoded_alike_with_a_database_and_without(folder: Path, name: str) -> None:
    support, _ = moved(*held_out(folder)[:2])
    rec = opened(folder / name)
    schema, data_schema = read_schema(rec.source)
    encoders = [Encoder(data_schema, rec.source / "vocab", schema) for _ in range(2)]
    encoders[1]._direct = None
    assert encoders[0]._direct is not None
    assert encoders[0]._direct.rows(support, support=True) is not None
    found, expected = (encoder.table(support, "support") for encoder in encoders)
    assert texts_in(found, rec) == texts_in(expected, rec)
    assert texts_in(found, rec)["item"] == support["item"].to_pylist()
    assert sorted(found.texts.get("item", [])) == expected.texts["item"]
    for array in ("last.offsets", "dense", "label"):
        np.testing.assert_array_equal(found.arrays[array], expected.arrays[array], array)


def test_a_missing_text_has_none(tmp_path: Path) -> None:
    """As in `prepare`: an empty text is a missing one, also in a sequence, where the schema allows it."""
    schema = {**TEXTS, "item": None, "categorical": [{"name": "item", "text": True, "nulls": "oov"}, "place"]}
    schema["sequence"] = [{**TEXTS["sequence"][0], "nulls": "oov"}]
    pack = open_pack(text_pack(tmp_path, schema))
    rows = pa.table({name: values[:12] for name, values in text_rows().items()})
    rows = rows.set_column(rows.column_names.index("item"), "item", pa.array(["", None, *rows["item"].to_pylist()[2:]]))
    last = [["", "new"], *rows["last"].to_pylist()[1:]]
    rows = rows.set_column(rows.column_names.index("last"), "last", pa.array(last))
    encoders = [Encoder(pack.manifest["data_schema"], pack.path / "vocab", pack.schema) for _ in range(2)]
    encoders[1]._direct = None
    for encoder in encoders:
        found = encoder.table(rows, "support")
        num_texts = pack.schema.feature("item").num_texts
        assert found.arrays["ids"][:3, 0].tolist()[:2] == [0, 0]
        assert found.arrays["last.values"][:2].tolist() == [0, num_texts]
        assert found.texts == {"item": ["new"]}


def test_what_cannot_read_texts_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes: list[str] = []
    opened(folder / "bundle", mapped=True).record({}, notes.append)  # type: ignore[arg-type]
    assert notes == ["passes are not recorded of a model that reads texts (item, last)"]
    words = ["export", "--run_dir", folder / "run", "--out", tmp_path / "out", "--trust_model", "true"]
    fails(words, capsys, "the model reads the texts of 'item', which exported graphs have no input for")
    config = settings_of(folder)
    config |= {"run_dir": str(tmp_path / "run"), "meta": {"adapt": ["dense"], "modulation": "film"}}
    with pytest.raises(ValueError, match=r"meta.modulation is 'film', and the model reads the texts of 'item'"):
        package.train(config)
