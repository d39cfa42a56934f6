"""Runs on next items are delivered: days of events become versions, a wrecked one is refused, what serves is judged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import fails
from encoders import WHY, tiny
from event_days import NEW, USERS, day_of_events, write_days
from stopped_deliveries import stopped_after

from gmeta.cli import run
from gmeta.config.delivery import GateConfig
from gmeta.data.pack import TaskPack, open_pack
from gmeta.delivery import deliver as stages
from gmeta.delivery.gate import judge
from gmeta.delivery.gate_next_item import rank_day
from gmeta.parallel.mesh import local_mesh
from gmeta.recommender.next_items import NextItems
from gmeta.recommender.smoke import check_smoke
from gmeta.runs.delta import apply_delta, make_delta
from gmeta.runs.registry import open_registry
from gmeta.runs.translation import translation_of
from gmeta.serving.metrics import Metrics
from gmeta.serving.versions import RegistrySource, Versions

pytestmark = pytest.mark.dist

TRAIN = {
    "model": {"name": "sasrec", "embedding_dim": 16, "args": {"heads": 2, "blocks": 1, "dropout": 0.1}},
    "dense": {"lr": 0.01},
    "embedding": {"lr": 0.01},
    "schedule": {"epochs": 2},
    "loader": {"tasks_per_batch": 20, "max_support_rows": 10},
}
RULES = """rules:
  - {rule: evidence, min_tasks: 3, min_rows: 10}
  - {rule: finite}
  - {rule: unknown_ids}
  - {rule: current_drop, metric: ndcg@10, max_drop: 0.9, min_rows: 10}
  - {rule: difference, metric: ndcg@10, slices: [all, target_head], margin: 0.3}
"""


@pytest.fixture(scope="module", autouse=True)
def few_resamples() -> Iterator[None]:
    """The gate's thousand take longer than all that a delivery does besides."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "GateConfig", partial(GateConfig, resamples=100))
        yield


def deliver(folder: Path, registry: Path, day: int, **more: Any) -> int:
    words: list[object] = ["deliver", "--registry", registry, "--work", f"{registry}-work"]
    words += ["--input", folder / f"day={day:02d}", "--rules", more.pop("rules", folder / "rules.yaml")]
    for key, value in more.items():
        words += [f"--{key}", json.dumps(value) if isinstance(value, dict) else value]
    return run([str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Days of events, rules, and a registry whose first version was made of the first day."""
    folder = tmp_path_factory.mktemp("delivered")
    write_days(folder, 10)
    (folder / "rules.yaml").write_text(RULES)
    assert deliver(folder, folder / "first", 0, events=folder / "events.yaml", train_with=TRAIN) == 0
    return folder


@pytest.fixture
def registry(folder: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(folder / "first", tmp_path / "registry"))


def places_in_lists(version: Path, pack: Path) -> np.ndarray:
    """Where a version recommends the target of each test task, after the raw events that the pack says came before:
    from 1, and 0 where it does not.
    """
    found, rec = open_pack(pack), NextItems.open(version, device="cpu")
    rows = found.split("test").columns(("item",))
    names = ["", *pq.read_table(found.vocab_file("item"))["value"].to_pylist()]
    item, task = rows.ids["item"].tolist(), rows.task.tolist()
    told = {"user": [f"t{number}" for number in task], "item": [names[number] for number in item]}
    events = pa.table({**told, "time": list(range(len(item)))}).filter(pa.array(~rows.is_query))
    domains = {"b": "books", "t": "toys"}
    listed = rec.recommend(events, k=1000).to_pylist()
    rank = {(row["user"], row["item"]): row["rank"] for row in listed}
    targets = np.flatnonzero(rows.is_query).tolist()
    assert {row["domain"] for row in listed} == set(domains.values())
    return np.array([rank.get((f"t{task[at]}", names[item[at]]), 0) for at in targets])


def had_before(pack: TaskPack) -> np.ndarray:
    """Whether the user of each test target had its item before: lists leave such items out."""
    rows = pack.split("test").columns(("item",))
    item, task = rows.ids["item"], rows.task
    at = np.flatnonzero(rows.is_query)
    return np.array([(item[(task == task[row]) & ~rows.is_query] == item[row]).any() for row in at])


def test_a_day_of_events_becomes_the_version_that_serves(folder: Path, registry: Path, tmp_path: Path) -> None:
    """Each version is judged as it serves: what the gate ranked is where its lists have the targets."""
    found = open_registry(str(registry))
    served = Versions(RegistrySource(found, tmp_path / "served", None), Metrics(), trust_model=False, device="cpu")
    known = served.current.next_items.num_items
    assert deliver(folder, registry, 1, keep="true") == 0
    assert served.refresh()
    assert served.current.next_items.num_items == known + 2 * NEW
    one, two = found.versions()
    assert found.current().version == 2  # type: ignore[union-attr]
    assert (two.manifest["parent"], two.manifest["day"]) == (one.id, 1)
    assert one.manifest["metrics"]["all"]["rows"] > 100, "both domains of nearly all users"
    assert 0 < two.manifest["metrics"]["all"]["ndcg@10"] < 1
    assert two.manifest["metrics"]["all"]["rows"] == 6 * two.manifest["metrics"]["all"]["tasks"], "users have six each"
    assert two.manifest["gate"]["data"]["before_from"] == "as its manifest says"
    before, after = (registry / "versions" / number for number in ("1", "2"))
    trained = json.dumps((after / "config.yaml").read_text())
    assert "targets: last" in trained
    (pack,) = Path(f"{registry}-work").glob("*/pack")
    day = open_pack(pack)
    for version in (before, after):
        config = GateConfig(candidate=str(after), current=str(before), pack=str(pack), out=str(tmp_path / "gate"))
        ranked = rank_day(local_mesh("cpu"), config, version, day, day.split("test"), translation_of(version, day))
        assert ranked is not None
        listed, ranks = places_in_lists(version, pack), ranked.ranks
        new = ranks.target >= open_pack(pack).schema.feature("item").num_ids - 2 * NEW
        again = had_before(day)
        np.testing.assert_array_equal(listed == 0, again | (new & (version == before)))
        np.testing.assert_array_equal(listed[listed > 0], ranks.rank[listed > 0])
        unknown = (listed == 0) & ~again
        assert unknown.any() == (version == before)
        np.testing.assert_array_equal(ranks.rank[unknown], ranks.candidates[unknown])
    both = {"candidate": str(after), "current": str(before), "pack": str(pack), "previous_pack": str(pack)}
    data = judge(GateConfig(**both, out=str(tmp_path / "gate"), resamples=20)).document["data"]
    assert data["before_from"] == f"on {pack}"
    assert data["current_before"] == data["current_now"] == two.manifest["gate"]["data"]["current_now"]
    make_delta(before, after, tmp_path / "delta")
    apply_delta(before, tmp_path / "delta", tmp_path / "applied")
    rec = NextItems.open(tmp_path / "applied", device="cpu")
    assert check_smoke(rec)
    assert rec.num_items == known + 2 * NEW
    events = pa.Table.from_pylist(day_of_events(0))
    assert rec.recommend(events, k=5).equals(NextItems.open(after, device="cpu").recommend(events, k=5))


def test_a_candidate_that_learned_nothing_of_use_is_refused(
    folder: Path, registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = tmp_path / "strict.yaml"
    strict.write_text("rules: [{rule: difference, metric: ndcg@10, margin: 0.001}]")
    wrecked = {"dense": {"lr": 3}, "embedding": {"lr": 3}}
    words: list[object] = ["deliver", "--registry", registry, "--work", f"{registry}-work", "--rules", strict]
    words += ["--input", folder / "day=01", "--train_with", json.dumps(wrecked)]
    assert run([str(word) for word in words]) == 3
    assert "version 1 stays current" in capsys.readouterr().out
    (verdict,) = Path(f"{registry}-work").glob("*/gate/verdict.json")
    (rule,) = json.loads(verdict.read_text())["rules"]
    assert (rule["passed"], rule["judged"], rule["value"] > 0.001) == (False, True, True)


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ("{rule: current_chance}", "auc is no metric of next items: choose one of recall@1"),
        ("{rule: calibration}", "is for versions that score rows, and these find next items: leave it out"),
        ("{rule: difference, metric: ndcg@10, margin: 0, slices: [target_tale]}", "did you mean 'target_tail'?"),
    ],
)
def test_rules_of_scores_are_refused(
    folder: Path, registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rule: str, told: str
) -> None:
    (tmp_path / "rules.yaml").write_text(f"rules: [{rule}]")
    words = ["deliver", "--registry", registry, "--work", tmp_path / "work", "--input", folder / "day=01"]
    fails([*words, "--rules", tmp_path / "rules.yaml"], capsys, told)


def test_events_are_named_once(
    folder: Path, registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["deliver", "--registry", registry, "--work", tmp_path / "work", "--input", folder / "day=01"]
    words += ["--events", folder / "events.yaml"]
    fails(words, capsys, "a day has that of the current version, leave it out")
    fails([*words, "--schema", folder / "events.yaml"], capsys, "rows have a schema, or are events: leave one")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prepare", "train", "gate"])
def test_a_delivery_of_events_that_was_stopped_goes_on(
    folder: Path, registry: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stopped_after(stage, monkeypatch):
        assert deliver(folder, registry, 1) == 130
    assert deliver(folder, registry, 1) == 0
    assert [one.number for one in open_registry(str(registry)).versions()] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [2, 4])
def test_several_workers_deliver_what_one_does(folder: Path, registry: Path, tmp_path: Path, nproc: int) -> None:
    events, vectors = pa.Table.from_pylist(day_of_events(0)), []
    for workers in (1, nproc):
        mine = Path(shutil.copytree(registry, tmp_path / f"registry-{workers}"))
        assert deliver(folder, mine, 1, nproc=workers, train_with={"precision": "float64"}) == 0
        table = NextItems.open(f"{mine}/current", device="cpu", cache=tmp_path / "cache").user_vectors(events)
        vectors.append(np.array(table["vector"].to_pylist()))
    np.testing.assert_allclose(*vectors, atol=1e-6)


@pytest.mark.slow
def test_ten_days_are_delivered(folder: Path, registry: Path, tmp_path: Path) -> None:
    """Every day brings items, which the next version recommends; a reader follows the registry by deltas or in full."""
    rules = tmp_path / "rules.yaml"  # ten tasks tell little
    rules.write_text("rules: [{rule: finite}, {rule: difference, metric: ndcg@10, margin: 1}]")
    for day in range(1, 10):
        assert deliver(folder, registry, day, rules=rules) == 0
        rec = NextItems.open(f"{registry}/current", device="cpu", cache=tmp_path / "cache")
        assert check_smoke(rec)
    found = open_registry(str(registry))
    assert [one.manifest["day"] for one in found.versions()] == list(range(10))
    assert rec.num_items == len({row["item"] for day in range(10) for row in day_of_events(day)})
    listed = rec.recommend(pa.Table.from_pylist(day_of_events(9)), k=3)
    assert len(set(listed["user"].to_pylist())) == USERS
    assert found.versions()[-1].manifest["metrics"]["all"]["ndcg@10"] > 0.1


@pytest.mark.slow
def test_days_of_texts_are_delivered(folder: Path, tmp_path: Path) -> None:
    """A model that reads texts alone: a version brings new texts, and lists new items where the gate ranked them."""
    pytest.importorskip("transformers", reason=WHY)
    args = {"encoder": str(tiny(tmp_path / "bert", "bert")), "layers": 2, "hidden": [6], "heads": 2, "max_tokens": 8}
    model = {"name": "llmrec", "embedding_dim": 8, "args": {**args, "ids": False}, "features": ["title"]}
    registry, rules = tmp_path / "registry", tmp_path / "rules.yaml"
    rules.write_text("rules: [{rule: finite}, {rule: difference, metric: ndcg@10, margin: 1}]")
    assert deliver(folder, registry, 0, events=folder / "events.yaml", train_with={**TRAIN, "model": model}) == 0
    for day in (1, 2):
        assert deliver(folder, registry, day, rules=rules, keep="true") == 0
    after = registry / "versions" / "3"
    packs = [path for path in Path(f"{registry}-work").glob("*/pack") if open_pack(path).manifest["day"]["number"] == 2]
    day2, config = open_pack(packs[0]), GateConfig(candidate="", current="", pack="", out="")
    ranked = rank_day(local_mesh("cpu"), config, after, day2, day2.split("test"), translation_of(after, day2))
    assert ranked is not None
    listed = places_in_lists(after, packs[0])
    np.testing.assert_array_equal(listed == 0, had_before(day2))
    assert (listed[listed > 0] == ranked.ranks.rank[listed > 0]).mean() > 0.9, "kept vectors may be rounded"
    assert check_smoke(NextItems.open(after, device="cpu"))
