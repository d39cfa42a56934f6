"""`gmeta evaluate` and `gmeta compare` of next-item runs, with a stand-in for what ranks by the model."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import fails, gmeta, train_words
from packs import make_pack

from gmeta.config.evaluation import EvaluateConfig
from gmeta.data.catalogue import Catalogue
from gmeta.data.pack import open_pack
from gmeta.data.shards import PackSplit
from gmeta.evaluation import evaluate
from gmeta.evaluation.documents import read_evaluation
from gmeta.evaluation.next_item import Places
from gmeta.evaluation.ranking import PLACE_METRICS
from gmeta.evaluation.report import build_report
from gmeta.evaluation.target_ranks import Candidates, TargetRanks, Targets, gather_ranks, ranks_of
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.system import System

Capture = pytest.CaptureFixture[str]


def rank_by_noise(
    system: System,
    split: PackSplit,
    catalogue: Catalogue,
    *,
    candidates: Candidates,
    tasks_per_batch: int,
    max_support_rows: int,
    seed: int,
) -> TargetRanks | None:
    """Stand in for a model: fixed random scores of items, the same for every user; 0 for all where the seed is 0."""
    assert (tasks_per_batch, max_support_rows) == (256, 0)
    scores = torch.randn(catalogue.num_ids, generator=torch.Generator().manual_seed(seed)) * min(seed, 1)
    mesh = system.mesh
    targets = Targets.of_split(split, catalogue.item).where(slice(mesh.rank, None, mesh.world_size))
    return gather_ranks(ranks_of(lambda part: scores.expand(len(targets.where(part)), -1), targets, candidates), mesh)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a pack of events of 40 users in one or two domains; it holds what evaluation loads, a model."""
    folder, rng = tmp_path_factory.mktemp("next_item"), np.random.default_rng(0)
    lines = ["user,item,shop,when"]
    for user in range(40):
        for shop in ("Books", "Toys")[: 1 + user % 2]:
            lines += [f"u{user},{shop}{rng.integers(20)},{shop},{when}" for when in range(rng.integers(3, 9))]
    (folder / "events.csv").write_text("\n".join(lines) + "\n")
    (folder / "events.yaml").write_text("user: user\nitem: item\ndomain: shop\ntime: when\n")
    gmeta(
        "prepare",
        *("--input", folder / "events.csv", "--events", folder / "events.yaml", "--out", folder / "pack"),
    )
    gmeta(*train_words(folder / "pack", folder / "run", "--meta.adapt", "[]", epochs=1))
    return folder / "run"


@pytest.fixture
def as_next_item(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the run for a next-item run, and write no reports: they take seconds."""
    monkeypatch.setattr(evaluate, "is_next_item", lambda config: True)
    monkeypatch.setattr(evaluate, "build_report", lambda run_dir, folder: folder / "report.html")


def measure(run: Path, out: Path, *, seed: int = 1, **options: Any) -> dict[str, Any]:
    config = EvaluateConfig(run_dir=str(run), out=str(out), resamples=30, **options)
    evaluate.evaluate_on(Mesh(), config, partial(rank_by_noise, seed=seed))
    document = read_evaluation(out / "evaluation.json")
    assert document is not None
    return document


@pytest.mark.usefixtures("as_next_item")
def test_a_next_item_run_is_measured(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    document = measure(trained, tmp_path / "out")
    pack = open_pack(trained.parent / "pack")
    split = pack.split("test")
    names = ["model", "popularity", "item-knn", "last-item-knn"]
    assert document["variants"] == names
    assert document["baselines"] == names[1:]
    told = {"objective": "next_item", "candidates": "domain", "exclude_history": True, "sample_seed": 0, "step": 2}
    assert told.items() <= document["settings"].items()
    table = pq.read_table(tmp_path / "out" / "predictions.parquet")
    assert table.num_rows == split.num_tasks
    tasks = table["task"].to_pylist()
    assert tasks == [f"{u}|{d}" for u, d in zip(table["user"].to_pylist(), table["scenario"].to_pylist(), strict=True)]
    cases = {case["case"]: case for case in document["cases"]}
    assert (cases["all"]["tasks"], cases["all"]["rows"]) == (len(set(table["user"].to_pylist())), split.num_tasks)
    assert cases["scenario=Toys"]["rows"] == table["scenario"].to_pylist().count("Toys") > 0
    values = {(r["case"], r["variant"], r["metric"]): r["value"] for r in document["records"]}
    for name in names:
        places = Places(table[f"{name}.rank"].to_numpy(), table[f"{name}.sampled_rank"].to_numpy())
        assert (places.rank == places.sampled_rank).all(), "20 items are fewer than 1,000"
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
    assert all(word in text for word in ("Books", "item-knn", "R@50", "written to"))
    page = build_report(trained, tmp_path / "out").read_text()
    assert "several domains" in page


@pytest.mark.usefixtures("as_next_item")
def test_who_is_ranked_is_chosen_by_options(trained: Path, tmp_path: Path) -> None:
    usual = measure(trained, tmp_path / "usual", baselines=False)
    wide = measure(trained, tmp_path / "wide", baselines=False, candidates="all", exclude_history=False)
    constant = measure(trained, tmp_path / "constant", baselines=False, seed=0)
    assert usual["variants"] == ["model"]
    found = [pq.read_table(tmp_path / name / "predictions.parquet") for name in ("usual", "wide", "constant")]
    items = open_pack(trained.parent / "pack").catalogue().num_ids - 1
    assert set(found[1]["candidates"].to_pylist()) == {items}
    assert max(found[0]["candidates"].to_pylist()) < items
    assert wide["settings"]["candidates"] == "all"
    assert wide["settings"]["exclude_history"] is False
    assert found[2]["model.rank"].to_pylist() == found[2]["candidates"].to_pylist(), "a constant score is the worst"
    values = {r["metric"]: r["value"] for r in constant["records"] if r["case"] == "all"}
    assert values["recall@1"] == 0


def test_options_of_the_other_objective_are_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    words = ["evaluate", "--run_dir", trained]
    fails([*words, "--candidates", "all"], capsys, "candidates is 'all'", "rank next items", "leave it out")
    fails([*words, "--exclude_history", "false"], capsys, "exclude_history is False")
    monkeypatch.setattr(evaluate, "is_next_item", lambda config: True)
    for option, value in (("steps", 2), ("support_sizes", "1,2"), ("relevant_label", 4), ("plain_run", "other")):
        fails([*words, f"--{option}", value], capsys, f"{option} is", "score rows", "leave it out")
    make_pack(tmp_path / "rows")
    gmeta(*train_words(tmp_path / "rows", tmp_path / "run", epochs=1))
    with pytest.raises(ValueError, match="no catalogue"):
        measure(tmp_path / "run", tmp_path / "out")


@pytest.mark.usefixtures("as_next_item")
def test_next_item_runs_are_compared(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    for name, options in {"a": {"seed": 1}, "b": {"seed": 2}, "wide": {"seed": 2, "candidates": "all"}}.items():
        measure(trained, tmp_path / name, baselines=False, **options)
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
    assert sizes["scenario=Books"] + sizes["scenario=Toys"] == document["rows"] == table.num_rows
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
