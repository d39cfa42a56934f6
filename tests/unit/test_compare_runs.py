"""`gmeta compare`: runs are measured on the same rows or refused, and paired over tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import fails, gmeta
from test_report import EVIL, Page

from gmeta.config.parse import name_bare_words
from gmeta.evaluation.metrics import Bootstrap, make_rows

Capture = pytest.CaptureFixture[str]


def table(noise: float = 1.0, *, binary: bool = True, num_tasks: int = 30, variants: Any = None) -> pa.Table:
    """Predictions of 8 rows a task, whose logits all lie beyond the sigmoid's reach."""
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(num_tasks), 8)
    truth = rng.normal(size=len(task))
    label = (truth > 0).astype(float) if binary else np.clip(np.round(3 + truth), 1, 5)
    value = truth + noise * np.random.default_rng(1).normal(size=len(task))
    names = variants or ["before", "after"]
    columns = {
        "task_id": task,
        "task": [f"u{i}" for i in task],
        "item": [None if i % 5 == 0 else f"item{i}" for i in range(len(task))],
        "row": np.arange(len(task)) * 2,
        "label": label,
    }
    for name in names:
        columns[name] = np.ones(len(task)) if binary else 3 + value
        if binary:
            columns[f"{name}.ranking"] = 100 + value
    told = {"step": "7", "loss": "bce" if binary else "mse", "variants": json.dumps(names)}
    return pa.table(columns).replace_schema_metadata(told)


def make_run(path: Path, found: pa.Table) -> Path:
    path.mkdir(parents=True)
    pq.write_table(found, path / "predictions.parquet")
    return path


def changed(found: pa.Table, name: str, change: Any) -> pa.Table:
    """The same predictions with other values in a column."""
    values = found[name].to_pylist()
    change(values)
    position = found.column_names.index(name)
    return found.set_column(position, name, pa.array(values, found.schema.field(name).type))


def test_runs_are_paired_with_the_first(tmp_path: Path, capsys: Capture) -> None:
    """By the logits, though all probabilities are 1; rows in another order are the same rows."""
    good, bad, same = table(0.5), table(3.0), table(3.0)
    shuffled = good.take(pa.array(np.random.default_rng(0).permutation(good.num_rows)))
    runs = [
        make_run(tmp_path / name, found)
        for name, found in (
            ("bad", bad),
            ("good", shuffled.replace_schema_metadata(good.schema.metadata)),
            ("same", same),
        )
    ]
    gmeta("compare", *runs, "--out", tmp_path / "out", "--resamples", 40)
    document = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [run["run"] for run in document["runs"]] == ["bad", "good", "same"]
    assert {(run["variant"], run["step"]) for run in document["runs"]} == {("after", 7)}
    assert (document["tasks"], document["rows"], document["resamples"]) == (30, 240, 40)
    label, task = good["label"].to_numpy(), good["task_id"].to_numpy()
    bootstrap = Bootstrap(30, resamples=40, seed=0)
    for name, found in (("bad", bad), ("good", good)):
        rows = make_rows(found["after"].to_numpy(), label, task, logit=found["after.ranking"].to_numpy())
        bootstrap.add(name, "auc", rows)
    bootstrap.run()
    expected = bootstrap.estimate("good", against="bad")
    by_run = {(d["run"], d["metric"]): d for d in document["differences"]}
    found = by_run["good", "auc"]
    assert (found["against"], found["value"], found["n"]) == ("bad", pytest.approx(expected.value), 30)
    assert expected.value > 0.1
    assert (found["low"], found["high"]) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert found["verdict"] == "better"
    equal = by_run["same", "auc"]
    assert (equal["value"], equal["low"], equal["high"], equal["verdict"]) == (0, 0, 0, "not distinguishable")
    assert by_run["good", "calibration"]["verdict"] is by_run["good", "ece"]["verdict"] is None
    text = capsys.readouterr().out
    assert "good against bad, 240 query rows of 30 tasks" in text
    assert f"{found['low']:+.4f} … {found['high']:+.4f}" in text
    html = (tmp_path / "out" / "comparison.html").read_text()
    words = " ".join(Page(html).words)
    for part in ("recall@10", "AUC", "run − bad", f"{found['value']:+.4f}", "better", "step 7", str(runs[1])):
        assert part in words, part


def test_without_out_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    for name in ("a/run", "b/run"):
        make_run(tmp_path / name, table())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b" / "run" / "predictions.parquet").rename(tmp_path / "b" / "run" / "predictions-other-1.parquet")
    before = sorted(tmp_path.rglob("*"))
    gmeta("compare", "--resamples", 2, "a/run", "b/run/predictions-other-1.parquet")
    assert sorted(tmp_path.rglob("*")) == before
    assert "predictions-other-1.parquet against run" in capsys.readouterr().out


def test_runs_of_one_name_are_named_by_their_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    for name in ("a/run", "b/run"):
        make_run(tmp_path / name, table(num_tasks=3))
    monkeypatch.chdir(tmp_path)
    gmeta("compare", "a/run", "b/run", "--resamples", 2)
    assert "b/run against a/run" in capsys.readouterr().out


def test_few_tasks_have_no_verdict(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(i), table(float(i), num_tasks=19)) for i in (5, 0)]
    gmeta("compare", *runs, "--out", tmp_path / "out", "--resamples", 20)
    document = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert {d["verdict"] for d in document["differences"]} == {"too few tasks", None}


def test_ratings_and_runs_that_adapt_nothing(tmp_path: Path, capsys: Capture) -> None:
    plain = table(2.0, binary=False, variants=["before"])
    runs = [make_run(tmp_path / "plain", plain), make_run(tmp_path / "meta", table(binary=False))]
    gmeta("compare", *runs, "--out", tmp_path / "out", "--resamples", 20, "--relevant_label", 4)
    document = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [run["variant"] for run in document["runs"]] == ["before", "after"]
    assert document["headline"] == {"metric": "mae", "higher_is_better": False}
    found = {d["metric"]: d["verdict"] for d in document["differences"]}
    assert found["mae"] == "better"
    assert "map@5" in found
    clicks = [make_run(tmp_path / name, table()) for name in ("c", "d")]
    fails(["compare", *clicks, "--relevant_label", 4], capsys, "relevant_label is 4", "for ratings")


def grown(values: list[Any]) -> None:
    values[3] = (values[3] or 0) + 1


def renamed(values: list[Any]) -> None:
    values[3] = "other"


@pytest.mark.parametrize(
    ("name", "change", "here", "there"),
    [
        ("task", renamed, "task u0, item item3, row 6", "task other, item item3, row 6"),
        ("item", renamed, "task u0, item item3, row 6", "task u0, item other, row 6"),
        ("row", grown, "item item3, row 6", "item item3, row 7"),
        ("label", lambda values: values.__setitem__(3, 1 - values[3]), "row 6, label", "row 6, label"),
    ],
)
def test_other_rows_are_refused(tmp_path: Path, capsys: Capture, name: str, change: Any, here: str, there: str) -> None:
    runs = [make_run(tmp_path / "a", table()), make_run(tmp_path / "b", changed(table(), name, change))]
    said = fails(["compare", *runs, "--out", tmp_path / "out"], capsys, "b was not measured on the query rows of a")
    assert "1 rows only in a (first: " in said
    assert "1 rows only in b (first: " in said
    assert here in said
    assert there in said
    assert "evaluate both runs on one pack and split" in said
    assert not (tmp_path / "out").exists()


def test_missing_rows_are_counted(tmp_path: Path, capsys: Capture) -> None:
    runs = [make_run(tmp_path / "a", table()), make_run(tmp_path / "b", table().slice(0, 228))]
    said = fails(["compare", *runs], capsys, "12 rows only in a (first: task u28, item item228, row 456")
    assert "only in b" not in said
    nameless = make_run(tmp_path / "c", table().drop_columns(["item"]))
    fails(["compare", runs[0], nameless], capsys, "predictions of a name items, those of c do not")


def test_what_is_no_measured_run_is_refused(tmp_path: Path, capsys: Capture) -> None:
    good = make_run(tmp_path / "good", table())
    fails(["compare", good], capsys, "runs is", "name at least two")
    fails(["compare", good, good], capsys, "named twice")
    (tmp_path / "empty").mkdir()
    fails(["compare", good, tmp_path / "empty"], capsys, "predictions.parquet is missing", "gmeta evaluate --run_dir")
    old = make_run(tmp_path / "old", table().replace_schema_metadata({"step": "3"}))
    fails(["compare", good, old], capsys, "of an earlier release", "run `gmeta evaluate` again")
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "predictions.parquet").write_bytes(b"PAR1 torn")
    fails(["compare", good, torn], capsys, "torn", "run `gmeta evaluate` again")
    nan = make_run(tmp_path / "nan", changed(table(), "after", lambda values: values.__setitem__(3, float("nan"))))
    fails(["compare", good, nan], capsys, "column 'after'", "not finite in row 3")
    (tmp_path / "file").write_text("")
    words = ["compare", good, make_run(tmp_path / "b", table()), "--resamples", 2, "--out", tmp_path / "file"]
    fails(words, capsys, "out is", "no folder can be made there")


def test_no_name_becomes_markup(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, table()) for name in (EVIL, "other")]
    gmeta("compare", *runs, "--out", tmp_path / "out", "--resamples", 2)
    page = (tmp_path / "out" / "comparison.html").read_text()
    Page(page)
    assert "<script" not in page


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["a", "b c", "--out", "x"], ["--out", "x", '--runs=["a", "b c"]']),
        (["--out=x", "a", "--seed", "--3", "1"], ["--out=x", "--seed", "--3", '--runs=["a", "1"]']),
        (["--runs", "[a, b]"], ["--runs", "[a, b]"]),
    ],
)
def test_bare_words_are_named(words: list[str], named: list[str]) -> None:
    assert name_bare_words(words, "runs") == named
