"""What a run on next items recommends is what evaluation ranks, and a bundle recommends what its run does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import fails
from commands import gmeta as command
from next_items import ITEMS, event_rows, histories_of_split, next_item_pack, next_item_run, require_equal_places, timed
from packs import make_pack

import gmeta
from gmeta.config.delivery import BundleConfig
from gmeta.data.events.interleave import interleaved
from gmeta.data.pack import open_pack
from gmeta.delivery.bundle import make_bundle
from gmeta.recommender.approximate import recall
from gmeta.recommender.next_items import NextItems
from gmeta.recommender.smoke import SMOKE, check_smoke
from gmeta.recommender.top_items import ExactShelf, TopItems, highest

MOST = 6
"""Events that the run reads of a history."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recommend")


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return next_item_run(next_item_pack(folder, timed(event_rows())), folder / "run", most=MOST)


@pytest.fixture(scope="module")
def bundle(folder: Path, run: Path) -> Path:
    return make_bundle(BundleConfig(run_dir=str(run), out=str(folder / "bundle"))).path


@pytest.fixture(scope="module")
def rec(run: Path) -> NextItems:
    return NextItems.open(run, device="cpu")


@pytest.fixture
def events(folder: Path, run: Path) -> Path:
    return folder / "events.parquet"


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_target_is_recommended_where_evaluation_ranks_it(run: Path, rec: NextItems, split: str) -> None:
    require_equal_places(run, rec, split, MOST)


@pytest.mark.parametrize("draw", ["uniform", "popularity"])
def test_users_that_adapt_are_recommended_what_evaluation_ranks(folder: Path, run: Path, draw: str) -> None:
    few = {"in_batch": 20, "each": 4, "own_items": "left_out"} if draw == "uniform" else {}
    adapts = next_item_run(folder / "pack", folder / draw, most=MOST, adapt=["prompt"], next_item={"draw": draw, **few})
    rec = NextItems.open(adapts, device="cpu")
    require_equal_places(adapts, rec, "test", MOST)
    events, _ = histories_of_split(adapts, "test")
    plain = NextItems.open(run, device="cpu").user_vectors(events)
    assert rec.user_vectors(events)["vector"] != plain["vector"]


def test_a_run_that_reads_gaps_recommends_what_evaluation_ranks(folder: Path) -> None:
    start = 1_700_000_000
    rows = timed(event_rows(users=24))
    rows["time"] = [start + 40 * time * time for time in rows["time"]]
    run = next_item_run(next_item_pack(folder / "gaps", rows, gaps=True), folder / "gaps" / "run", most=MOST)
    rec = NextItems.open(run, device="cpu")
    require_equal_places(run, rec, "test", MOST)

    events, _ = histories_of_split(run, "test")
    later = events.set_column(3, "time", pa.array(start + np.arange(len(events)) * 7919))
    assert rec.user_vectors(later)["vector"] != rec.user_vectors(events)["vector"]
    in_ms = events.set_column(3, "time", pa.array(1000 * events["time"].to_numpy()))
    with pytest.raises(ValueError, match="in milliseconds, and the run reads gaps between times in seconds"):
        rec.recommend(in_ms)
    others = in_ms.set_column(0, "user", pa.array([f"other {user}" for user in in_ms["user"].to_pylist()]))
    for beside in ([events, others], [others, events]):  # whoever is asked about beside
        with pytest.raises(ValueError, match="in milliseconds, and the run reads gaps"):
            rec.recommend(pa.concat_tables(beside))
    bundle = make_bundle(BundleConfig(run_dir=str(run), out=str(folder / "gaps" / "bundle"))).path
    from_bundle = NextItems.open(bundle, device="cpu")
    assert check_smoke(from_bundle)
    assert from_bundle.recommend(events, k=5).equals(rec.recommend(events, k=5))


def test_without_times_events_of_the_domain_asked_for_are_read_last(folder: Path) -> None:
    run = next_item_run(next_item_pack(folder / "untimed"), folder / "untimed" / "run", most=MOST)
    rec = NextItems.open(run, device="cpu")
    require_equal_places(run, rec, "test", MOST)

    one, other = rec.domains[:2]
    items = {
        name: [row["item"] for row in rec.item_vectors().to_pylist() if row["domain"] == name] for name in (one, other)
    }
    history = {"user": ["u"] * 3, "item": [*items[one][:2], items[other][0]], "domain": [one, one, other]}
    read = rec.histories(history)  # by shares: one, other, one
    shelves = rec.shelves(other, "domain")
    (best,), (shelf,) = rec.best(read, 5, shelves), shelves.values()
    of_other_last = rec.vectors(read.at(np.array([0, 2, 1])))
    assert torch.equal(best.score, shelf.top(of_other_last, 5, read.seen(best.score.device)).score)
    assert not torch.equal(of_other_last, rec.vectors(read))


def test_histories_are_no_longer_than_those_of_the_pack(folder: Path) -> None:
    bounds = {"holdout": "1200", "max_task_rows": 4, "max_task_rows_keep": "last"}
    pack = next_item_pack(folder / "short", timed(event_rows()), **bounds)
    rec = NextItems.open(next_item_run(pack, folder / "short" / "run", most=0), device="cpu")
    rows = pq.read_table(folder / "short" / "events.parquet").sort_by([("user", "ascending"), ("time", "ascending")])
    place = pa.array(rows.to_pandas().groupby("user").cumcount(ascending=False))
    last = rows.filter(pa.compute.less(place, 3))
    assert rec.user_vectors(rows).equals(rec.user_vectors(last))
    assert not rec.user_vectors(rows).equals(rec.user_vectors(rows.filter(pa.compute.less(place, 2))))


def test_a_bundle_recommends_what_its_run_does(rec: NextItems, bundle: Path, events: Path) -> None:
    rows = pq.read_table(events)
    for mapped in (False, True):
        from_bundle = NextItems.open(bundle, device="cpu", mapped=mapped)
        assert from_bundle.recommend(rows, k=5).equals(rec.recommend(rows, k=5))
        assert from_bundle.item_vectors().equals(rec.item_vectors())


def test_a_bundle_has_a_smoke_sample_that_other_weights_fail(bundle: Path) -> None:
    opened = NextItems.open(bundle, device="cpu")
    assert (bundle / SMOKE).exists()
    assert check_smoke(opened)
    with torch.no_grad():
        for parameter in opened.system.objective.parameters():
            parameter.mul_(1.1)
    with pytest.raises(ValueError, match="smoke sample otherwise"):
        check_smoke(opened)


def test_vectors_multiply_to_scores(rec: NextItems, events: Path) -> None:
    rows = pq.read_table(events)
    items, users = rec.item_vectors(), rec.user_vectors(rows)
    item = dict(zip(items["item"].to_pylist(), np.array(items["vector"].to_pylist()), strict=True))
    user = dict(zip(users["user"].to_pylist(), np.array(users["vector"].to_pylist()), strict=True))

    found = rec.recommend(rows, k=4, candidates="all").to_pylist()

    assert len(found) == 4 * len(user)
    for row in found:
        assert row["score"] == pytest.approx(user[row["user"]] @ item[row["item"]], abs=1e-5)


def test_the_command_writes_what_the_object_recommends(
    rec: NextItems, bundle: Path, events: Path, tmp_path: Path
) -> None:
    out = [tmp_path / name for name in ("recs.parquet", "items.parquet", "users.parquet")]
    words = ["--k", 3, "--out", out[0], "--item_vectors", out[1], "--user_vectors", out[2], "--device", "cpu"]
    command("recommend", "--run_dir", bundle, "--events", events, *words)

    rows = pq.read_table(events)
    found = pq.read_table(out[0])
    assert found.column_names == ["user", "rank", "item", "domain", "score"]
    assert found.equals(rec.recommend(rows, k=3))
    assert pq.read_table(out[1]).equals(rec.item_vectors())
    assert pq.read_table(out[2]).equals(rec.user_vectors(rows))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_users_domain_history_and_k(rec: NextItems, run: Path, events: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "recs.parquet"
    words = ["recommend", "--run_dir", run, "--events", events, "--out", out, "--device", "cpu"]

    command(*words, "--users", "u3,u1,nobody", "--domain", "toys", "--exclude_history", "false", "--k", 99)

    told = capsys.readouterr().out
    assert "users without a known event, left out: 1 ('nobody')" in told
    assert "k is 99, more than the 12 items of the largest list" in told
    found = pq.read_table(out)
    assert found["user"].to_pylist() == ["u1"] * ITEMS + ["u3"] * ITEMS
    assert found["rank"].to_pylist() == [*range(1, ITEMS + 1)] * 2
    assert set(found["domain"].to_pylist()) == {"toys"}
    scores = found["score"].to_numpy().reshape(2, ITEMS)
    assert (np.diff(scores, axis=1) <= 0).all()

    for written in ("[u3, u1]", '["u3", "u1"]', "u3, u1"):
        command(*words, "--users", written, "--k", 1)
        assert sorted(set(pq.read_table(out)["user"].to_pylist())) == ["u1", "u3"]
    command(*words, "--users", "[1, 2]")
    assert "left out: 2 ('1', '2')" in capsys.readouterr().out
    pq.write_table(pa.table({"user": ["u1", "nobody"]}), tmp_path / "who.parquet")
    command(*words, "--users", tmp_path / "who.parquet", "--popular_for_unknown", "true", "--k", 2)
    found = pq.read_table(out)
    popular = found.filter(pa.compute.equal(found["user"], "nobody"))
    catalogue = pq.read_table(run / "vocab/catalogue.parquet").to_pylist()
    for domain, letter in (("books", "b"), ("toys", "t")):
        best = sorted((row for row in catalogue if row["item"][0] == letter), key=lambda r: (-r["count"], r["id"]))[:2]
        mine = popular.filter(pa.compute.equal(popular["domain"], domain))
        assert mine["item"].to_pylist() == [row["item"] for row in best]
    assert popular["score"].null_count == 4


@pytest.mark.parametrize("index", ["exact", "faiss"])
def test_users_of_whom_nothing_is_known_alone(run: Path, tmp_path: Path, index: str, capsys: Any) -> None:
    if index == "faiss":
        pytest.importorskip("faiss", reason="needs faiss: pip install 'gmeta[faiss]'")
    strange = {"user": ["x", "y"], "item": ["b77", "b78"], "domain": ["books"] * 2, "time": [1, 2]}
    pq.write_table(pa.table(strange), tmp_path / "events.parquet")
    out = [tmp_path / "recs.parquet", tmp_path / "users.parquet"]
    words = ["--out", out[0], "--user_vectors", out[1], "--index", index, "--device", "cpu"]
    command("recommend", "--run_dir", run, "--events", tmp_path / "events.parquet", *words)
    assert "users without a known event, left out: 2 ('x', 'y')" in capsys.readouterr().out
    assert pq.read_table(out[0]).num_rows == pq.read_table(out[1]).num_rows == 0


def test_unknown_domains_and_files_of_users_that_are_none_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = {"user": ["a", "a"], "item": ["x", "y"], "domain": ["galaxy", "galaxy"], "time": [1, 2]}
    pq.write_table(pa.table(events), tmp_path / "events.parquet")
    words = ["recommend", "--run_dir", run, "--events", tmp_path / "events.parquet", "--out", tmp_path / "out.parquet"]
    command(*words)
    assert "unknown domains, whose events are left out: 'galaxy'; the run knows" in capsys.readouterr().out
    fails([*words, "--users", "nobody.txt"], capsys, "users is 'nobody.txt'", "Parquet or CSV")


def test_a_lost_catalogue_is_told_of(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "vocab/catalogue.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"catalogue.parquet is missing or damaged .* copy it again from the pack"):
        NextItems.open(copy)


def test_unknown_items_are_left_out_and_counted(rec: NextItems) -> None:
    known = {"user": ["a"] * 3, "item": ["b1", "t2", "b3"], "domain": ["books", "toys", "books"], "time": [3, 1, 2]}
    more = {
        "user": ["a", "z", "a"],
        "item": ["b99", "b1", "b1"],
        "domain": ["books", "music", "toys"],
        "time": [1, 2, 9],
    }

    found = rec.histories({name: known[name] + more[name] for name in known})  # type: ignore[operator]

    assert (found.users, found.length.tolist(), found.unknown) == (["a", "z"], [3, 0], 3)
    assert rec._names.names(found.items).to_pylist() == ["t2", "b3", "b1"]
    one, other = rec.recommend(known, k=5), rec.recommend({name: known[name] + more[name] for name in known}, k=5)  # type: ignore[operator]
    assert one.equals(other)


def test_domains_are_interleaved_as_at_prepare() -> None:
    user = np.array([0, 0, 0, 0, 0, 1, 1])
    domain = np.array([1, 1, 1, 0, 2, 0, 1])
    # 1/6, 3/6, 5/6 of domain 1, 1/2 of domains 0 and 2; ties by the domain
    assert interleaved(user, domain, None).tolist() == [0, 3, 1, 4, 2, 5, 6]
    assert interleaved(user, domain, np.array([5, 5, 1, 5, 0, 2, 1])).tolist() == [4, 2, 3, 0, 1, 6, 5]


def test_training_histories_are_ordered_as_their_pack_is(tmp_path: Path) -> None:
    """Without times: the support and query of the training tasks, from their events in any mix of domains."""
    pack = open_pack(next_item_pack(tmp_path))
    split = pack.split("train")
    columns = split.columns(("item", "domain"))
    for task in range(split.num_tasks):
        mine = columns.task == task
        item, domain = columns.ids["item"][mine], columns.ids["domain"][mine]
        by_domain = np.argsort(domain, kind="stable")
        order = interleaved(np.zeros(len(item), np.int64), domain[by_domain].astype(np.int64), None)
        assert item[by_domain][order].tolist() == item.tolist()


@pytest.mark.parametrize("k", [1, 3, 7, 40])
def test_ties_go_by_the_items_id(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randint(0, 4, (50, 40), generator=generator).float()
    expected = [sorted(range(40), key=lambda i: (-row[i], i))[:k] for row in scores.tolist()]
    assert highest(scores, k).tolist() == expected

    monkeypatch.setattr("gmeta.recommender.top_items._ITEMS", 16)
    monkeypatch.setattr("gmeta.recommender.top_items._USERS", 7)
    vectors = torch.cat([torch.zeros(1, 50), scores.mT])  # a user is a unit vector
    nothing = torch.zeros(0, dtype=torch.int64)
    shelf = ExactShelf(np.arange(1, 41), vectors)
    assert (shelf.top(torch.eye(50), k, (nothing, nothing)).item - 1).tolist() == expected

    left_out = torch.tensor([0, 0, 49]), torch.tensor([1 + expected[0][0], 999, 5])
    found = shelf.top(torch.eye(50), k, left_out)
    known = found.item[found.score > -torch.inf]
    assert 1 + expected[0][0] not in found.item[0][found.score[0] > -torch.inf].tolist()
    assert len(known) == 50 * k - (2 if k == 40 else 0)


def test_many_users_in_small_parts_are_the_same(rec: NextItems, events: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pq.read_table(events)
    expected = rec.recommend(rows, k=3)
    monkeypatch.setattr("gmeta.data.events.raw_events._USERS", 7)
    monkeypatch.setattr("gmeta.recommender.catalogue_vectors._EVENTS_AT_ONCE", 20)
    found = rec.recommend(rows, k=3)
    assert found.drop_columns("score").equals(expected.drop_columns("score"))
    np.testing.assert_allclose(found["score"], expected["score"], atol=1e-5)


def test_an_approximate_index_tells_its_recall(
    rec: NextItems, run: Path, events: Path, tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("faiss", reason="needs faiss: pip install 'gmeta[faiss]'")
    out = tmp_path / "recs.parquet"
    words = ["recommend", "--run_dir", run, "--events", events, "--out", out, "--device", "cpu", "--k", 3]
    command(*words, "--index", "faiss")
    assert "index faiss found 1.0000 of the exact lists of 40 users" in capsys.readouterr().out  # of 24 items all
    found, expected = pq.read_table(out), rec.recommend(pq.read_table(events), k=3)
    assert found.drop_columns("score").equals(expected.drop_columns("score"))


def test_recall_counts_what_is_found() -> None:
    exact = TopItems(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[2.0, 1.0], [2.0, -torch.inf]]))
    found = TopItems(torch.tensor([[2, 5], [3, 1]]), torch.tensor([[1.0, 0.5], [-torch.inf, -torch.inf]]))
    assert recall(found, exact) == (1, 3)
    assert recall(exact, exact) == (3, 3)


def test_what_cannot_be_used_is_refused(run: Path, rec: NextItems, events: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["recommend", "--run_dir", run, "--device", "cpu", "--out", tmp_path / "recs.parquet"]
    rows = pq.read_table(events)

    def given(table: pa.Table, *more: object) -> list[object]:
        pq.write_table(table, tmp_path / "given.parquet")
        return [*words, "--events", tmp_path / "given.parquet", *more]

    fails([*words, "--events", events, "--k", 0], capsys, "k is 0", "at least 1")
    fails(given(rows.slice(0, 0)), capsys, "there are no events")
    (tmp_path / "empty.csv").write_text("")
    fails([*words, "--events", tmp_path / "empty.csv"], capsys, "empty.csv is empty")
    fails(given(rows.rename_columns(["user", "thing", *rows.column_names[2:]])), capsys, "has no column 'item'")
    texts = rows.set_column(rows.column_names.index("time"), "time", rows["time"].cast(pa.string()))
    fails(given(texts), capsys, "time column 'time' holds texts")
    holes = rows.set_column(1, "item", pa.array([None, *rows["item"].to_pylist()[1:]]))
    fails(given(holes), capsys, "1 rows cannot be used", "row 1, column 'item'", "is missing")
    fails(given(rows, "--domain", "toy"), capsys, "domain is 'toy'", "did you mean 'toys'?")
    fails(given(rows, "--items", events), capsys, "knows items by their ids alone", "llmrec")
    fails([*words[:-1], tmp_path / "given.parquet", "--events", tmp_path / "given.parquet"], capsys, "would overwrite")
    fails(["recommend", "--run_dir", run, "--events", events], capsys, "nothing is to be written")
    assert not (tmp_path / "recs.parquet").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": 2.5}, "k is 2.5: must be a whole number"),
        ({"k": True}, "k is True"),
        ({"k": None}, "k is None"),
        ({"candidates": "domains"}, "candidates is 'domains': must be domain or all"),
    ],
)
def test_wrong_values_are_named(rec: NextItems, events: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rec.recommend(pq.read_table(events), **given)


def test_a_run_of_the_other_kind_names_what_to_use(run: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(ValueError, match=r"finds next items and scores no examples: use gmeta recommend"):
        gmeta.load(run)
    words = ["--support", run.parent / "events.parquet", "--query", run.parent / "events.parquet"]
    fails(["predict", "--run_dir", run, *words, "--out", tmp_path / "c.csv"], capsys, "use gmeta recommend")
    fails(["export", "--run_dir", run, "--out", tmp_path / "exported"], capsys, "use gmeta recommend")

    make_pack(tmp_path / "pack")
    config = {"pack": str(tmp_path / "pack"), "run_dir": str(tmp_path / "run"), "schedule": {"epochs": 1}}
    scoring = gmeta.train({**config, "model": {"name": "melu"}}).path
    with pytest.raises(ValueError, match=r"scores examples and finds no next items: use gmeta predict"):
        NextItems.open(scoring)
    with pytest.raises(ValueError, match=r"sasrec finds next items, and the pack has rows with labels: .*dlrm"):
        gmeta.train({**config, "run_dir": str(tmp_path / "other"), "model": {"name": "sasrec"}})
