"""`gmeta evaluate` and `gmeta compare` of next-item runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import fails, gmeta, train_words
from next_items import next_item_pack
from packs import make_pack

from gmeta.data.pack import open_pack
from gmeta.evaluation import evaluate
from gmeta.evaluation.documents import read_evaluation
from gmeta.evaluation.next_item import Places
from gmeta.evaluation.ranking import PLACE_METRICS
from gmeta.evaluation.report import build_report

Capture = pytest.CaptureFixture[str]


def train(pack: Path, run: Path, *words: object) -> None:
    """Train a small model for one epoch; by default it adapts nothing."""
    args = {"model.args.heads": 2, "model.args.blocks": 1, "meta.adapt": "[]"}
    given = [word for name, value in args.items() for word in (f"--{name}", value)]
    gmeta("train", "--pack", pack, "--run_dir", run, "--model.name", "sasrec", *given, "--schedule.epochs", 1, *words)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two runs on one pack: `a` adapts nothing, `b` a prompt."""
    folder = tmp_path_factory.mktemp("next_item")
    pack = next_item_pack(folder / "events")
    train(pack, folder / "a")
    train(pack, folder / "b", "--meta.adapt", "[prompt]", "--meta.inner_lr", 3, "--seed", 1)
    return folder


def measure(run: Path, out: Path, *words: object) -> dict[str, Any]:
    gmeta("evaluate", "--run_dir", run, "--out", out, "--resamples", 30, *words)
    document = read_evaluation(out / "evaluation.json")
    assert document is not None
    return document


@pytest.fixture
def without_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write no reports, which take seconds."""
    monkeypatch.setattr(evaluate, "build_report", lambda run_dir, folder: folder / "report.html")


@pytest.mark.usefixtures("without_reports")
def test_a_next_item_run_is_measured(runs: Path, tmp_path: Path, capsys: Capture) -> None:
    document = measure(runs / "a", tmp_path / "out")
    pack = open_pack(runs / "events" / "pack")
    split = pack.split("test")
    names = ["model", "popularity", "item-knn", "last-item-knn"]
    assert document["variants"] == names
    assert document["baselines"] == names[1:]
    told = {
        "objective": "next_item",
        "candidates": "domain",
        "exclude_history": True,
        "sample_seed": 0,
        "split": "test",
    }
    assert told.items() <= document["settings"].items()
    table = pq.read_table(tmp_path / "out" / "predictions.parquet")
    assert table.num_rows == split.num_tasks
    tasks = table["task"].to_pylist()
    assert tasks == [f"{u}|{d}" for u, d in zip(table["user"].to_pylist(), table["scenario"].to_pylist(), strict=True)]
    cases = {case["case"]: case for case in document["cases"]}
    assert (cases["all"]["tasks"], cases["all"]["rows"]) == (len(set(table["user"].to_pylist())), split.num_tasks)
    assert cases["scenario=toys"]["rows"] == table["scenario"].to_pylist().count("toys") > 0
    values = {(r["case"], r["variant"], r["metric"]): r["value"] for r in document["records"]}
    for name in names:
        places = Places(table[f"{name}.rank"].to_numpy(), table[f"{name}.sampled_rank"].to_numpy())
        assert (places.rank == places.sampled_rank).all(), "12 items are fewer than 1,000"
        for metric in PLACE_METRICS:
            assert values["all", name, metric] == pytest.approx(places.values(metric).mean())
    columns, catalogue = split.columns(("item", "domain")), pack.catalogue()
    for place, row in enumerate(table["row"].to_pylist()):
        ids, task = columns.ids["item"], columns.task[row]
        history = set(ids[(columns.task == task) & ~columns.is_query].tolist())
        pool = {e for e in range(1, catalogue.num_ids) if catalogue.owned["domain"][e] == columns.ids["domain"][row]}
        pool = (pool - history) | {int(ids[row])}
        assert table["candidates"][place].as_py() == len(pool)
        popular = sum(catalogue.count[e] >= catalogue.count[ids[row]] for e in pool)
        assert table["popularity.rank"][place].as_py() == popular
        expected = sum(columns.task == task) - 1
        assert table["history"][place].as_py() == expected
    text = capsys.readouterr().out
    assert all(word in text for word in ("books", "item-knn", "R@50", "written to"))
    page = build_report(runs / "a", tmp_path / "out").read_text()
    assert "several domains" in page


@pytest.mark.usefixtures("without_reports")
def test_a_last_training_is_measured_on_the_same_targets(runs: Path, tmp_path: Path) -> None:
    pack = next_item_pack(tmp_path / "events", holdout="leave_last_out")
    train(pack, tmp_path / "last")
    measure(tmp_path / "last", tmp_path / "out", "--baselines", "false")
    table = pq.read_table(tmp_path / "out" / "predictions.parquet", columns=["task", "user", "scenario", "row"])
    tasks = [f"{u}|{d}" for u, d in zip(table["user"].to_pylist(), table["scenario"].to_pylist(), strict=True)]
    assert table["task"].to_pylist() == tasks
    last, usual = open_pack(pack), open_pack(runs / "events" / "pack")
    assert "valid" not in last.splits
    assert last.split("train").num_rows == usual.split("train").num_rows + usual.split("valid").num_tasks
    targets = []
    for path, of in ((pack, last), (runs / "events" / "pack", usual)):
        names = ["", *pq.read_table(path / "vocab" / "catalogue.parquet", columns=["item"])["item"].to_pylist()]
        columns = of.split("test").columns(("item",))
        targets.append(sorted(names[item] for item in columns.ids["item"][columns.is_query].tolist()))
    assert targets[0] == targets[1]


@pytest.mark.usefixtures("without_reports")
def test_who_is_ranked_is_chosen_by_options(runs: Path, tmp_path: Path) -> None:
    words = ("--baselines", "false")
    usual = measure(runs / "a", tmp_path / "usual", *words)
    wide = measure(runs / "a", tmp_path / "wide", *words, "--candidates", "all", "--exclude_history", "false")
    assert usual["variants"] == ["model"]
    assert usual["differences"] == usual["baselines"] == []
    found = [pq.read_table(tmp_path / name / "predictions.parquet") for name in ("usual", "wide")]
    items = open_pack(runs / "events" / "pack").catalogue().num_ids - 1
    assert set(found[1]["candidates"].to_pylist()) == {items}
    assert max(found[0]["candidates"].to_pylist()) <= items // 2
    assert wide["settings"]["candidates"] == "all"
    assert wide["settings"]["exclude_history"] is False


@pytest.mark.usefixtures("without_reports")
def test_a_run_that_adapts_is_measured_before_it_does(runs: Path, tmp_path: Path) -> None:
    found = measure(runs / "b", tmp_path / "out", "--baselines", "false")
    assert found["variants"] == ["model", "before"]
    table = pq.read_table(tmp_path / "out" / "predictions.parquet")
    assert table["model.rank"].to_pylist() != table["before.rank"].to_pylist()
    assert {d["against"] for d in found["differences"]} == {"before"}
    measure(runs / "b", tmp_path / "more", "--baselines", "false", "--steps", 3)
    other = pq.read_table(tmp_path / "more" / "predictions.parquet")
    assert other["before.rank"].to_pylist() == table["before.rank"].to_pylist()
    assert other["model.rank"].to_pylist() != table["model.rank"].to_pylist()


def test_options_of_the_other_objective_are_refused(runs: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["evaluate", "--run_dir", runs / "a"]
    for option, value in (("inner_lr", 2), ("support_sizes", "1,2"), ("relevant_label", 4), ("truth", "folder")):
        fails([*words, f"--{option}", value], capsys, f"{option} is", "score rows", "leave it out")
    fails([*words, "--steps", 3], capsys, "steps is 3", "adapt nothing")
    make_pack(tmp_path / "rows")
    gmeta(*train_words(tmp_path / "rows", tmp_path / "run", epochs=1))
    words = ["evaluate", "--run_dir", tmp_path / "run"]
    fails([*words, "--candidates", "all"], capsys, "candidates is 'all'", "rank next items", "leave it out")
    fails([*words, "--exclude_history", "false"], capsys, "exclude_history is False")


@pytest.mark.usefixtures("without_reports")
def test_next_item_runs_are_compared(runs: Path, tmp_path: Path, capsys: Capture) -> None:
    measure(runs / "a", tmp_path / "a", "--baselines", "false")
    measure(runs / "b", tmp_path / "b", "--baselines", "false")
    measure(runs / "a", tmp_path / "wide", "--baselines", "false", "--candidates", "all")
    table = pq.read_table(tmp_path / "b" / "predictions.parquet")
    shuffled = table.take(np.random.default_rng(0).permutation(table.num_rows))
    pq.write_table(shuffled.replace_schema_metadata(table.schema.metadata), tmp_path / "b" / "predictions.parquet")
    gmeta("compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out", "--resamples", 30)
    document = json.loads((tmp_path / "out" / "comparison.json").read_text())
    first = pq.read_table(tmp_path / "a" / "predictions.parquet")
    gap = (1 / table["model.rank"].to_numpy()).mean() - (1 / first["model.rank"].to_numpy()).mean()
    difference = next(d for d in document["differences"] if d["metric"] == "mrr")
    assert (difference["run"], difference["against"], difference["n"]) == ("b", "a", 40)
    assert difference["value"] == pytest.approx(gap)
    assert difference["low"] <= difference["value"] <= difference["high"]
    assert [run["variant"] for run in document["runs"]] == ["model", "model"]
    sizes = {part["case"]: part["rows"] for part in document["slices"]}
    assert sizes["scenario=books"] + sizes["scenario=toys"] == document["rows"] == table.num_rows
    assert "ndcg@10 by slice" in capsys.readouterr().out
    assert "several_domains" in (tmp_path / "out" / "comparison.html").read_text()
    a, wide = tmp_path / "a", tmp_path / "wide"
    fails(["compare", a, wide], capsys, "wide ranked with candidates all, a with domain", "--candidates")
    fails(["compare", a, tmp_path / "b", "--relevant_label", 4], capsys, "of next items each target")
    scored = tmp_path / "scored"
    shutil.copytree(a, scored)
    told = {"step": "1", "loss": "bce", "variants": '["before"]'}
    columns = first.append_column("before", first["row"]).append_column("label", first["row"])
    pq.write_table(columns.replace_schema_metadata(told), scored / "predictions.parquet")
    fails(["compare", scored, a], capsys, "a ranks next items, scored scores rows")
    pq.write_table(first.slice(2).replace_schema_metadata(first.schema.metadata), scored / "predictions.parquet")
    fails(["compare", a, scored], capsys, "2 rows only in a", "candidates")
