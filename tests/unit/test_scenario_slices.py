"""A scenario column slices evaluations, comparisons and verdicts, and models find it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from commands import fails, gmeta, train_words

from gmeta.cli import run as run_command
from gmeta.data.pack import open_pack
from gmeta.data.schema import data_schema_from_json, pack_schema_from_json, parse_data_schema
from gmeta.evaluation.metrics import metric
from gmeta.models.inputs import input_spec

RAW: dict[str, Any] = {"task": "user", "label": "click", "scenario": "shop", "categorical": ["item", "shop"]}


def log(rows: int = 3000) -> pa.Table:
    """30 shops, of which the first are the most frequent."""
    rng = np.random.default_rng(0)
    shop = np.minimum(rng.exponential(6, rows).astype(int), 29)
    user = rng.integers(0, 120, rows)
    return pa.table(
        {
            "user": user,
            "item": rng.integers(0, 9, rows),
            "shop": [f"s_{i}" for i in shop],
            "click": (rng.random(rows) < 0.2 + 0.02 * shop).astype(int),
        }
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pack, a run of it, and what `evaluate` wrote."""
    folder = tmp_path_factory.mktemp("scenario")
    pq.write_table(log(), folder / "log.parquet")
    (folder / "schema.yaml").write_text(yaml.safe_dump(RAW))
    words = ("--input", folder / "log.parquet", "--schema", folder / "schema.yaml", "--test_fraction", 0.5)
    gmeta("prepare", *words, "--split_query", "random", "--query_size", 8, "--out", folder / "pack")
    gmeta(*train_words(folder / "pack", folder / "run", epochs=1))
    gmeta("evaluate", "--run_dir", folder / "run", "--out", folder / "report", "--resamples", 20)
    return folder


def frequent(folder: Path) -> list[str]:
    """The shops of training rows, the most frequent first."""
    pack = open_pack(folder / "pack")
    names = pq.read_table(pack.vocab_file("shop"))["value"].to_pylist()
    counts = Counter(pack.split("train").feature_ids("shop").tolist())
    return [names[i - 1] for i, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))]


def test_an_evaluation_is_sliced_by_scenario(world: Path) -> None:
    found = json.loads((world / "report" / "evaluation.json").read_text())
    cases = {case["case"]: case for case in found["cases"] if case["case"].startswith("scenario=")}
    expected = frequent(world)
    assert len(expected) > 20
    assert set(cases) == {*(f"scenario={name}" for name in expected[:20]), "scenario=other"}
    rows = pq.read_table(world / "report" / "predictions.parquet")
    scenario = np.array([text or "" for text in rows["scenario"].to_pylist()])
    assert sum(case["rows"] for case in cases.values()) == len(rows)
    assert cases["scenario=other"]["rows"] == (~np.isin(scenario, expected[:20])).sum()
    mask = scenario == expected[0]
    assert cases[f"scenario={expected[0]}"]["rows"] == mask.sum()
    columns = [rows[name].to_numpy()[mask] for name in ("after", "label", "task_id")]
    records = [r for r in found["records"] if r["case"] == f"scenario={expected[0]}" and r["variant"] == "after"]
    values = {record["metric"]: record["value"] for record in records}
    assert values["logloss"] == pytest.approx(metric("logloss", *columns), rel=1e-12)
    page = (world / "report" / "report.html").read_text()
    assert "By scenario" in page
    assert f"scenario={expected[0]}" in page  # the underscore stays


def test_raw_scenarios_are_those_of_the_log(world: Path) -> None:
    rows = pq.read_table(world / "report" / "predictions.parquet")
    log_of = {(str(u), s) for u, s in zip(*(log()[n].to_pylist() for n in ("user", "shop")), strict=True)}
    pairs = set(zip(rows["task"].to_pylist(), rows["scenario"].to_pylist(), strict=True))
    assert {pair for pair in pairs if pair[1] is not None} <= log_of


def test_runs_are_compared_by_scenario(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions = world / "report" / "predictions.parquet"
    found = pq.read_table(predictions)
    worse = found.set_column(found.column_names.index("after"), "after", pa.array(1 - found["after"].to_numpy()))
    worse = worse.drop_columns([name for name in worse.column_names if name == "after.ranking"])
    (tmp_path / "worse").mkdir()
    pq.write_table(worse.replace_schema_metadata(found.schema.metadata), tmp_path / "worse" / "predictions.parquet")
    gmeta("compare", world / "report", tmp_path / "worse", "--out", tmp_path / "c", "--resamples", 20)
    assert "auc by scenario" in capsys.readouterr().out
    document = json.loads((tmp_path / "c" / "comparison.json").read_text())
    evaluation = json.loads((world / "report" / "evaluation.json").read_text())
    cases = {c["case"]: c["rows"] for c in evaluation["cases"] if c["case"].startswith("scenario=")}
    assert {part["case"]: part["rows"] for part in document["slices"]} == cases
    for part in document["slices"]:
        values = {r["metric"]: r["value"] for r in part["records"] if r["run"] == "report"}
        theirs = {
            r["metric"]: r["value"]
            for r in evaluation["records"]
            if (r["case"], r["variant"]) == (part["case"], "after")
        }
        assert values == theirs
    assert "By scenario" in (tmp_path / "c" / "comparison.html").read_text()


def judged(world: Path, out: Path, rules: list[dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    out.mkdir(exist_ok=True)
    (out / "rules.yaml").write_text(yaml.safe_dump({"rules": rules}))
    words = ["gate", "--candidate", world / "run", "--current", world / "run", "--pack", world / "pack"]
    code = run_command([str(w) for w in [*words, "--rules", out / "rules.yaml", "--out", out, "--resamples", 20]])
    return code, json.loads((out / "verdict.json").read_text())


def test_a_rule_of_the_gate_names_scenarios(world: Path, tmp_path: Path) -> None:
    names = frequent(world)
    seen = pq.read_table(world / "report" / "predictions.parquet")["scenario"].to_pylist()
    rare = next(name for name in names[20:] if name in seen)
    slices = [f"scenario={name}" for name in (names[0], rare, "nowhere")] + ["scenario=other"]
    rules = [{"rule": "difference", "metric": "logloss", "slices": slices, "margin": 0.1}]
    code, document = judged(world, tmp_path / "out", rules)
    assert code == 0
    judged_by = {outcome["slice"]: outcome for outcome in document["rules"]}
    assert judged_by[slices[0]]["judged"]
    assert judged_by["scenario=other"]["judged"]
    assert not judged_by["scenario=nowhere"]["judged"]
    rows = {case["case"]: case["rows"] for case in document["evaluation"]["cases"]}
    assert rows[slices[1]] > 0  # beyond the 20, but named
    assert sum(count for case, count in rows.items() if case.startswith("scenario=")) == rows["all"]


def test_wrong_slices_are_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rules.yaml").write_text("rules: [{rule: difference, metric: auc, slices: [scenarios], margin: 0}]")
    words = ["gate", "--candidate", world / "run", "--current", world / "run", "--pack", world / "pack"]
    more = ["--rules", tmp_path / "rules.yaml", "--out", tmp_path / "out"]
    fails([*words, *more], capsys, "slices has 'scenarios', which is unknown")


def test_models_find_the_scenario(world: Path) -> None:
    schema = open_pack(world / "pack").schema
    assert input_spec(schema, features=[], numeric=True, embedding_dim=4).scenario == "shop"
    assert input_spec(schema, features=["item"], numeric=True, embedding_dim=4).scenario is None
    assert pack_schema_from_json(json.loads(json.dumps(schema.to_json()))) == schema
    assert data_schema_from_json(open_pack(world / "pack").manifest["data_schema"]).scenario == "shop"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scenario": "shops"},
            "schema.scenario is 'shops', which is no feature under categorical: did you mean 'shop'",
        ),
        ({"categorical": ["item"], "multi": ["shop"]}, "which is no feature under categorical"),
        (
            {"categorical": ["item", {"name": "shop", "hash_buckets": 9}]},
            "which is hashed, and reports name its values",
        ),
    ],
)
def test_a_scenario_is_a_feature_of_one_value_with_a_vocabulary(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_data_schema({**RAW, **change})
    assert "scenario" not in parse_data_schema({**RAW, "scenario": None}).to_json()
