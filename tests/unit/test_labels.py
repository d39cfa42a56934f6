"""Several labels, from the log to what is served."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from commands import fails, gmeta, logged, train_words
from serving import with_client

import gmeta as package
from gmeta.cli import run as run_command
from gmeta.config.delivery import BundleConfig
from gmeta.data.pack import open_pack
from gmeta.data.prepare.direct import DirectEncoder
from gmeta.data.schema import data_schema_from_json, pack_schema_from_json, parse_data_schema
from gmeta.delivery.bundle import make_bundle
from gmeta.evaluation.metrics import metric
from gmeta.models.inputs import input_spec

LABELS = {"click": "bce", "pay": "bce", "stay": "mse"}
RAW: dict[str, Any] = {
    "task": "user",
    "labels": LABELS,
    "label_weights": {"pay": 0.5},
    "time": "at",
    "item": "item",
    "scenario": "shop",
    "categorical": ["item", "shop"],
}


def log(rows: int = 2400, **changes: Any) -> pa.Table:
    """`pay` is known of rows that were clicked, `stay` of two thirds; every row has some label."""
    rng = np.random.default_rng(0)
    item, shop = rng.integers(0, 9, rows), rng.integers(0, 3, rows)
    click = (rng.random(rows) < 0.2 + 0.06 * item).astype(float)
    pay = np.where(click == 1, (rng.random(rows) < 0.3 + 0.1 * shop).astype(float), np.nan)
    stay = np.where(rng.random(rows) < 2 / 3, item + rng.normal(size=rows), np.nan)
    columns = {
        "user": rng.integers(0, 100, rows),
        "item": item,
        "shop": [f"s{i}" for i in shop],
        "click": click,
        "pay": pa.array(pay, from_pandas=True),
        "stay": pa.array(stay, from_pandas=True),
        "at": np.arange(rows),
    }
    return pa.table({**columns, **changes})


def prepare(folder: Path, rows: pa.Table, schema: dict[str, Any] = RAW, name: str = "pack") -> list[object]:
    folder.mkdir(exist_ok=True, parents=True)
    pq.write_table(rows, folder / "log.parquet")
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema, sort_keys=False))
    words: list[object] = ["prepare", "--input", folder / "log.parquet", "--schema", folder / "schema.yaml"]
    return [*words, "--query_size", 8, "--test_fraction", 0.4, "--out", folder / name]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pack, a run and a plain twin of it, and what `evaluate` wrote."""
    folder = tmp_path_factory.mktemp("labels")
    gmeta(*prepare(folder, log()))
    gmeta(*train_words(folder / "pack", folder / "run", "--schedule.metric", "auc", epochs=3))
    words = ["evaluate", "--run_dir", folder / "run", "--out", folder / "report", "--resamples", 20]
    gmeta(*words, "--support_sizes", "0,2")
    return folder


def test_a_pack_keeps_all_labels(world: Path) -> None:
    pack, rows = open_pack(world / "pack"), log().to_pydict()
    schema = pack.schema
    assert schema.label_names == ("click", "pay", "stay")
    assert [label.weight for label in schema.labels] == [1.0, 0.5, 1.0]
    train = pack.split("train")
    assert schema.labels[1].mean == pytest.approx(np.nanmean(train.columns(label=1).label), rel=1e-6)
    assert schema.label_mean == schema.labels[0].mean
    for name in pack.splits:
        split = pack.split(name)
        time = split.times()
        assert time is not None
        for number, label in enumerate(LABELS):
            expected = [math.nan if rows[label][at] is None else rows[label][at] for at in time.tolist()]
            np.testing.assert_allclose(split.columns(label=number).label, expected, rtol=1e-6)
        support, query, _ = split.examples(np.arange(split.num_tasks))
        for side in (support, query):
            assert side.label.shape == (*side.mask.shape, 3)
            assert not side.label[~side.mask].any()
    assert pack_schema_from_json(json.loads(json.dumps(schema.to_json(), sort_keys=True))) == schema
    again = data_schema_from_json(json.loads(json.dumps(pack.manifest["data_schema"], sort_keys=True)))
    assert again == parse_data_schema(RAW)
    spec = input_spec(schema, features=[], numeric=True, embedding_dim=4)
    assert spec.num_labels == 3
    assert spec.base_rates[2] == pytest.approx(schema.labels[2].mean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "click"}, "label and labels are both there"),
        ({"labels": {"click": "bce"}}, "must map two columns or more to their losses"),
        ({"labels": {"click": "bce", "pay": "hinge"}}, "schema.labels.pay is 'hinge': must be bce or mse"),
        ({"label_weights": {"paid": 1}}, "schema.label_weights: unknown key 'paid': there is: 'click', 'pay', 'stay'"),
        ({"label_weights": {"pay": 0}}, "label_weights.pay is 0.0: must be more than 0"),
        ({"label_threshold": 3}, "label_threshold is of one label"),
        ({"item_statistics": True}, "item_statistics is of one label"),
        ({"categorical": ["item", "shop", "pay"]}, "'pay' is the label and a feature"),
        ({"weight": "stay"}, "'stay' is the label and the weight"),
    ],
)
def test_labels_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_data_schema({**RAW, **change})


def test_one_label_is_as_before() -> None:
    found = parse_data_schema({"task": "user", "label": "click", "categorical": ["item"]})
    assert "labels" not in found.to_json()
    with pytest.raises(ValueError, match="label_weights has no meaning without labels"):
        parse_data_schema({"task": "user", "label": "click", "categorical": ["item"], "label_weights": {"click": 2}})


@pytest.mark.parametrize(
    ("column", "bad", "reason"),
    [
        ("pay", 0.5, "column 'pay': '0.5' is not 0 or 1, which its loss bce needs"),
        ("stay", math.inf, "column 'stay': 'inf' is infinite"),
        ("all", None, "column 'click': is missing, as all labels of the row are"),
    ],
)
def test_bad_labels_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], column: str, bad: float | None, reason: str
) -> None:
    rows = log().to_pydict()
    for name in LABELS if column == "all" else [column]:
        rows[name][4] = bad
    fails(prepare(tmp_path, pa.table(rows)), capsys, "log.parquet, row 5, ", reason)


def test_training_logs_the_metrics_of_each_label(world: Path) -> None:
    valid = [record for record in logged(world / "run") if "loss_after" in record]
    assert {"auc/click_after", "gauc/pay_after", "mae/stay_before", "rmse/stay_after"} <= valid[-1].keys()
    assert not {"auc_after", "auc/stay_after"} & valid[-1].keys()
    assert valid[-1]["auc/click_before"] > 0.55
    assert "Validation AUC of click" in (world / "report" / "report.html").read_text()


def test_an_evaluation_measures_each_label(world: Path) -> None:
    found = json.loads((world / "report" / "evaluation.json").read_text())
    assert found["headline"]["metric"] == "auc/click"
    assert found["labels"] == list(LABELS)
    rows = pq.read_table(world / "report" / "predictions.parquet")
    assert {"label/click", "label/pay", "after/pay", "item-mean/stay"} <= set(rows.column_names)
    split, everything = open_pack(world / "pack").split("test"), found["cases"][0]["labels"]
    for number, (label, loss) in enumerate(LABELS.items()):
        column = rows[f"label/{label}"].to_numpy()
        known = ~np.isnan(column)
        columns = split.columns(label=number)
        assert everything[label]["rows"] == known.sum() == (~np.isnan(columns.label[columns.is_query])).sum()
        name = "logloss" if loss == "bce" else "mae"
        for variant in ("before", "after", "item-mean", "global-mean"):
            score = rows[f"{variant}/{label}"].to_numpy()
            expected = metric(name, score[known], column[known], rows["task_id"].to_numpy()[known])
            values = [
                r["value"]
                for r in found["records"]
                if (r["case"], r["variant"], r["metric"]) == ("all", variant, f"{name}/{label}")
            ]
            assert values == [pytest.approx(expected, rel=1e-9)]
    mean = np.nanmean([v for v in log().to_pydict()["stay"] if v is not None])
    assert rows["global-mean/stay"].to_numpy() == pytest.approx(mean, abs=0.3)
    assert {r["metric"] for r in found["support_curve"]["records"]} >= {"auc/click", "mae/stay"}
    assert any(case["case"] == "scenario=s1" for case in found["cases"])
    page = (world / "report" / "report.html").read_text()
    assert "AUC of pay" in page
    assert "MAE of stay" in page


def test_runs_are_compared_by_label(world: Path, tmp_path: Path) -> None:
    gmeta("compare", world / "report", world / "report" / "predictions.parquet", "--out", tmp_path, "--resamples", 20)
    found = json.loads((tmp_path / "comparison.json").read_text())
    evaluation = json.loads((world / "report" / "evaluation.json").read_text())
    theirs = {r["metric"]: r["value"] for r in evaluation["records"] if (r["case"], r["variant"]) == ("all", "after")}
    assert {r["metric"]: r["value"] for r in found["records"]} == pytest.approx(
        theirs, rel=1e-12
    )  # sums of other order
    assert found["headline"]["metric"] == "auc/click"
    assert {part["case"] for part in found["slices"]} >= {"scenario=s0", "scenario=other"}


def judged(world: Path, out: Path, rules: list[dict[str, Any]] | None) -> tuple[int, dict[str, Any]]:
    out.mkdir(exist_ok=True)
    words = ["gate", "--candidate", world / "run", "--current", world / "run", "--pack", world / "pack", "--out", out]
    if rules is not None:
        (out / "rules.yaml").write_text(yaml.safe_dump({"rules": rules}))
        words += ["--rules", out / "rules.yaml"]
    code = run_command([str(w) for w in [*words, "--resamples", 20]])
    return code, json.loads((out / "verdict.json").read_text())


def test_the_gate_judges_labels(world: Path, tmp_path: Path) -> None:
    rules = [
        {"rule": "difference", "metric": "logloss", "margin": 0.1},
        {"rule": "difference", "metric": "auc/pay", "margin": 0.1, "slices": ["all", "scenario=s1"]},
        {"rule": "difference", "metric": "mae/stay", "margin": 0.1},
        {"rule": "baselines", "metric": "auc"},
    ]
    code, document = judged(world, tmp_path / "out", rules)
    assert code == 0
    assert all(outcome["judged"] for outcome in document["rules"])
    metrics = document["metrics"]["all"]
    assert {"auc", "auc/pay", "mae/stay"} <= metrics.keys()
    _, document = judged(world, tmp_path / "usual", None)
    assert {outcome["metric"] for outcome in document["rules"]} >= {"auc", "logloss"}


def test_rules_of_labels_that_are_not_there(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, message in (
        ("auc/paid", "names the label 'paid': there is: 'click', 'pay', 'stay'"),
        ("auc/stay", "no metric of ratings"),
    ):
        (tmp_path / "r.yaml").write_text(f"rules: [{{rule: difference, metric: {name}, margin: 0}}]")
        words = ["gate", "--candidate", world / "run", "--current", world / "run", "--pack", world / "pack"]
        fails([*words, "--rules", tmp_path / "r.yaml", "--out", tmp_path / "out"], capsys, message)


SUPPORT: dict[str, list[Any]] = {
    "user": ["a"] * 4,
    "item": [1, 2, 3, 1],
    "shop": ["s0", "s1", "s2", "s0"],
    "click": [1, 0, 1, None],
    "pay": [0, None, 1, None],
    "stay": [None, 0.5, None, 3.0],
}
CANDIDATES: dict[str, list[Any]] = {"user": ["a"] * 3, "item": [1, 2, 3], "shop": ["s0", "s1", "s1"]}


def test_a_support_may_lack_labels(world: Path, tmp_path: Path) -> None:
    rec = package.load(world / "run")
    assert rec.labels == tuple(LABELS)
    scores = rec.adapt(SUPPORT).predict(CANDIDATES)
    assert scores.shape == (3, 3)
    assert ((scores[:, :2] > 0) & (scores[:, :2] < 1)).all()
    assert np.abs(scores - rec.adapt({**SUPPORT, "click": [0, 1, 0, 1]}).predict(CANDIDATES)).max() > 1e-4
    assert rec.adapt({name: [] for name in SUPPORT}).predict(CANDIDATES).shape == (3, 3)
    pq.write_table(pa.table(SUPPORT), tmp_path / "support.parquet")
    pq.write_table(pa.table(CANDIDATES), tmp_path / "query.parquet")
    words = ["predict", "--run_dir", world / "run", "--support", tmp_path / "support.parquet"]
    gmeta(*words, "--query", tmp_path / "query.parquet", "--out", tmp_path / "scores.parquet")
    found = pq.read_table(tmp_path / "scores.parquet")
    for number, label in enumerate(LABELS):
        np.testing.assert_allclose(found[f"score_{label}"].to_numpy(), scores[:, number], rtol=1e-5)
        assert f"score_before_{label}" in found.column_names
    with pytest.raises(ValueError, match="is missing, as all labels of the row are"):
        rec.adapt({**SUPPORT, **{name: [None] * 4 for name in LABELS}})


def test_plain_rows_are_what_the_database_reads(world: Path) -> None:
    rec = package.load(world / "run")
    text = {name: [None if v is None else str(v) for v in SUPPORT[name]] for name in LABELS}
    found, slow = (rec._encode(given, "support") for given in (SUPPORT, {**SUPPORT, **text}))
    assert isinstance(rec._encoder._direct, DirectEncoder)
    assert rec._encoder._direct.rows(rec._arrow(SUPPORT, "support"), support=True) is not None
    assert found is not None
    assert slow is not None
    assert found.arrays.keys() == slow.arrays.keys()
    for name, array in found.arrays.items():
        assert np.array_equal(array, slow.arrays[name], equal_nan=array.dtype.kind == "f"), name


def test_a_server_answers_scores_by_label(world: Path, tmp_path: Path) -> None:
    bundle = make_bundle(BundleConfig(run_dir=str(world / "run"), out=str(tmp_path / "bundle"))).path
    rows = {name: values for name, values in CANDIDATES.items() if name != "user"}
    support = {name: values for name, values in SUPPORT.items() if name != "user"}

    async def work(client: Any) -> Any:
        task = {"key": "a", "support": support, "candidates": rows}
        answers = [(await client.score(task)).json() for _ in range(5)]  # the last by recorded programs
        about = (await client.http.get("/v1/model")).json()
        body = {
            "inputs": [
                {"name": f"candidates.{n}", "datatype": "BYTES", "shape": [3], "data": v}
                for n, v in {**rows, "user": ["a"] * 3}.items()
            ]
        }
        infer = (await client.post("/v2/models/gmeta/infer", body)).json()
        return answers, about, infer

    answers, about, infer = with_client(bundle, work)
    expected = package.load(bundle).adapt(SUPPORT).predict(CANDIDATES)
    for answer in answers:
        scores = answer["tasks"][0]["scores"]
        assert list(scores) == list(LABELS)
        for number, label in enumerate(LABELS):
            np.testing.assert_allclose(scores[label], expected[:, number], rtol=1e-4)
    assert about["labels"] == list(LABELS)
    assert [output["name"] for output in infer["outputs"]] == [f"score_{label}" for label in LABELS]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.name", "taste"], "taste predicts one label, and the pack has 3"),
        (["--model.name", "neural_linear"], "neural_linear predicts one label, and the pack has 3"),
        (["--loss", "mse"], "it must be that of the first, 'click'"),
        (["--meta.inner_loss", "mse"], "meta.inner_loss is for one label, and the pack has click, pay, stay"),
        (["--meta.modulation", "film"], "meta.modulation is for one label"),
    ],
)
def test_what_knows_one_label_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    words = train_words(world / "pack", tmp_path / "run", *more)
    if "--model.name" in more:
        at = words.index("--model.args.hidden")
        del words[at : at + 2]
    fails(words, capsys, message)


def test_recipes_and_exports_are_for_one_label(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(["train", "--pack", world / "pack", "--run_dir", tmp_path / "r"], capsys, "recipes are for one")
    fails(["export", "--run_dir", world / "run", "--out", tmp_path / "e"], capsys, "export is for models of one label")
