"""Weights of rows, from the log to what is served."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from commands import fails, gmeta, logged, train_words
from packs import DATA_SCHEMA, SCHEMA, make_pack
from serving import make_version, with_client

import gmeta as package
from gmeta.data.pack import open_pack
from gmeta.data.prepare.direct import DirectEncoder
from gmeta.data.schema import data_schema_from_json, pack_schema_from_json, parse_data_schema
from gmeta.evaluation.metrics import metric

RAW: dict[str, Any] = {"task": "user", "label": "click", "weight": "w", "time": "at", "categorical": ["item"]}


def log(rows: int = 400, **changes: Any) -> pa.Table:
    rng = np.random.default_rng(0)
    columns = {
        "user": rng.integers(0, 30, rows),
        "item": rng.integers(0, 9, rows),
        "click": rng.integers(0, 2, rows),
        "w": rng.integers(0, 4, rows) / 2,
        "at": np.arange(rows),
    }
    return pa.table({**columns, **changes})


def prepare(folder: Path, rows: pa.Table, schema: dict[str, Any] = RAW, name: str = "pack") -> list[object]:
    folder.mkdir(exist_ok=True, parents=True)
    pq.write_table(rows, folder / "log.parquet")
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema))
    words: list[object] = ["prepare", "--input", folder / "log.parquet", "--schema", folder / "schema.yaml"]
    return [*words, "--query_size", 3, "--out", folder / name]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a log, its pack, and a run."""
    folder = tmp_path_factory.mktemp("weights")
    gmeta(*prepare(folder, log()))
    gmeta(*train_words(folder / "pack", folder / "run", epochs=1))
    gmeta("evaluate", "--run_dir", folder / "run", "--out", folder / "report", "--resamples", 20)
    return folder


def test_a_pack_keeps_the_weights_of_its_rows(trained: Path) -> None:
    pack, rows = open_pack(trained / "pack"), log().to_pydict()
    assert pack.schema.weight == "w"
    weight_at = dict(zip(rows["at"], rows["w"], strict=True))
    seen = 0
    for name in pack.splits:
        split = pack.split(name)
        time, weight = split.times(), split.columns().weight
        assert time is not None
        assert weight is not None
        assert weight.tolist() == [weight_at[at] for at in time.tolist()]
        support, query, _ = split.examples(np.arange(split.num_tasks))
        for side in (support, query):
            assert side.weight is not None
            assert side.weight[side.mask].tolist() == [weight_at[time[row]] for row in side.row[side.mask].tolist()]
            assert not side.weight[~side.mask].any()
        seen += len(weight)
    assert seen == 400


def test_without_a_weight_the_pack_is_as_before(tmp_path: Path) -> None:
    plain = {key: value for key, value in RAW.items() if key != "weight"}
    gmeta(*prepare(tmp_path, log(), plain))
    pack = open_pack(tmp_path / "pack")
    assert "weight" not in pack.manifest["schema"]
    assert "weight" not in pack.manifest["data_schema"]
    support, _, _ = pack.split("train").examples(np.arange(3))
    assert support.weight is None
    for schema, back in ((DATA_SCHEMA, data_schema_from_json), (SCHEMA, pack_schema_from_json)):
        assert "weight" not in schema.to_json()
        again = replace(schema, weight="w")  # type: ignore[type-var]
        assert back(json.loads(json.dumps(again.to_json()))) == again


@pytest.mark.parametrize(
    ("bad", "reason"),
    [(-1.0, "is negative, as a weight"), (None, "is missing"), (float("inf"), "is infinite or beyond float32")],
)
def test_weights_that_cannot_be_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: float | None, reason: str
) -> None:
    weights: list[float | None] = [1.0] * 400
    weights[6] = bad
    fails(prepare(tmp_path, log(w=weights)), capsys, "log.parquet, row 7, column 'w'", reason)


def test_a_weight_is_a_column_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(prepare(tmp_path, log(), {**RAW, "weight": "v"}), capsys, "has no column 'v'")
    with pytest.raises(ValueError, match="is the label and the weight"):
        parse_data_schema({**RAW, "weight": "click"})


def test_the_report_says_that_it_is_weighted(trained: Path) -> None:
    found = json.loads((trained / "report" / "evaluation.json").read_text())
    assert found["settings"]["weight"] == "w"
    assert any("count rows by their weights" in note for note in found["notes"])
    assert "count rows by their weights" in (trained / "report" / "report.html").read_text()
    rows = pq.read_table(trained / "report" / "predictions.parquet").to_pydict()
    columns = [np.array(rows[name]) for name in ("after", "label", "task_id", "weight")]
    for name in ("logloss", "rmse", "calibration"):
        (record,) = (r for r in found["records"] if (r["case"], r["variant"], r["metric"]) == ("all", "after", name))
        assert record["value"] == pytest.approx(metric(name, *columns[:3], weight=columns[3]), rel=1e-9)
        assert record["value"] != pytest.approx(metric(name, *columns[:3]), rel=1e-6)


def test_runs_are_compared_by_weight(trained: Path, tmp_path: Path) -> None:
    file = trained / "report" / "predictions.parquet"
    gmeta("compare", trained / "report", file, "--out", tmp_path / "c", "--resamples", 20)
    found = json.loads((tmp_path / "c" / "comparison.json").read_text())
    evaluation = json.loads((trained / "report" / "evaluation.json").read_text())
    (value,) = {r["value"] for r in found["records"] if r["metric"] == "auc"}
    records = [r for r in evaluation["records"] if (r["case"], r["variant"], r["metric"]) == ("all", "after", "auc")]
    assert value == records[0]["value"]
    assert any("count rows by their weights" in note for note in found["notes"])


def test_validation_is_weighted(trained: Path) -> None:
    assert {"auc_after", "loss_after"} <= logged(trained / "run")[-1].keys() | logged(trained / "run")[-2].keys()


SUPPORT: dict[str, list[Any]] = {"user": ["a"] * 4, "item": [1, 2, 3, 1], "click": [1, 0, 1, 0]}
CANDIDATES: dict[str, list[Any]] = {"user": ["a"] * 3, "item": [1, 2, 3]}


def test_a_support_may_have_weights(trained: Path) -> None:
    rec = package.load(trained / "run")

    def scores(support: dict[str, list[Any]], weight: list[float] | None = None) -> np.ndarray:
        given = support if weight is None else {**support, "w": weight}
        return rec.adapt(given).predict(CANDIDATES)

    plain = scores(SUPPORT)
    assert np.array_equal(plain, scores(SUPPORT, [1.0, 1.0, 1.0, 1.0]))
    twice = {name: [*values, values[0]] for name, values in SUPPORT.items()}
    np.testing.assert_allclose(scores(SUPPORT, [2.0, 1.0, 1.0, 1.0]), scores(twice), rtol=1e-5)
    nothing = rec.adapt({name: values[:0] for name, values in SUPPORT.items()}).predict(CANDIDATES)
    np.testing.assert_allclose(scores(SUPPORT, [0.0] * 4), nothing, rtol=1e-6)
    with pytest.raises(ValueError, match=r"row 2, column 'w': '-1.0' is negative, as a weight"):
        scores(SUPPORT, [1.0, -1.0, 1.0, 1.0])


def test_predict_reads_weights_of_a_support_file(trained: Path, tmp_path: Path) -> None:
    weight = [0.5, 2.0, 0.0, 1.0]
    pq.write_table(pa.table({**SUPPORT, "w": weight}), tmp_path / "support.parquet")
    pq.write_table(pa.table(CANDIDATES), tmp_path / "query.parquet")
    words = ["predict", "--run_dir", trained / "run", "--support", tmp_path / "support.parquet"]
    gmeta(*words, "--query", tmp_path / "query.parquet", "--out", tmp_path / "scores.parquet")
    expected = package.load(trained / "run").adapt({**SUPPORT, "w": weight}).predict(CANDIDATES)
    np.testing.assert_allclose(pq.read_table(tmp_path / "scores.parquet")["score"].to_numpy(), expected, rtol=1e-6)


def test_a_request_may_give_weights(tmp_path: Path) -> None:
    schema, raw = replace(SCHEMA, weight="w"), replace(DATA_SCHEMA, weight="w")

    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays["weight"] = np.random.default_rng(1).random(len(arrays["label"])).astype(np.float32)

    make_pack(tmp_path / "pack", schema=schema, data_schema=raw, change=change)
    bundle = make_version(tmp_path, "a")
    rows = {"group": ["group1"] * 2, "item": ["item1", "item2"], "tags": [[], ["tags1"]], "age": [0.1, 0.2]}
    rows["price"] = [1.0, 2.0]
    support = {**rows, "click": [1, 0]}

    async def work(client: Any) -> list[Any]:
        tasks = [{"key": f"k{i}", "support": s, "candidates": rows} for i, s in enumerate(supports)]
        alone = [(await client.score(task)).json()["tasks"][0]["scores"] for task in tasks]
        together = [(await client.score(*part)).json() for part in (tasks[:1], tasks[1:])]
        found = [task["scores"] for answer in together for task in answer["tasks"]]
        np.testing.assert_allclose(found, alone, rtol=1e-5)
        return alone

    supports = [support, {**support, "w": [1, 1]}, {**support, "w": [3.0, 0.5]}]
    plain, ones, other = with_client(bundle, work)
    assert plain == ones
    assert np.abs(np.array(other) - plain).max() > 1e-4
    expected = package.load(bundle).adapt({**supports[2], "user": ["k2"] * 2}).predict({**rows, "user": ["k2"] * 2})
    np.testing.assert_allclose(other, expected, rtol=1e-5)


def test_plain_rows_have_the_weights_that_the_database_reads(trained: Path) -> None:
    """`DirectEncoder` against DuckDB, on the same rows as text."""
    rec = package.load(trained / "run")
    weight = [0.25, 3.0, 0.0, 1e-3]
    found = rec._encode({**SUPPORT, "w": weight}, "support")
    slow = rec._encode({**SUPPORT, "w": list(map(str, weight))}, "support")
    assert isinstance(rec._encoder._direct, DirectEncoder)
    assert found is not None
    assert slow is not None
    assert found.arrays.keys() == slow.arrays.keys()
    for name, array in found.arrays.items():
        assert np.array_equal(array, slow.arrays[name]), name
