"""Later days of events: users' sequences, ids and the catalogue go on from a base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from event_packs import event_pack, later_config, later_pack, quiet, told_tasks

from gmeta.data.pack import TaskPack, open_pack
from gmeta.data.prepare.prepare import prepare
from gmeta.evaluation.evaluate_next_item import user_keys
from gmeta.evaluation.rank_split import candidates_of
from gmeta.evaluation.target_ranks import Targets, ranks_of

SPLITS = ("train", "valid", "test")


def timed(user: str, items: str, domain: str = "") -> list[dict[str, Any]]:
    """Events of a user, `item@time` each."""
    rows: list[dict[str, Any]] = []
    for word in items.split():
        item, _, time = word.partition("@")
        rows.append({"user": user, "item": item, "time": int(time)} | ({"domain": domain} if domain else {}))
    return rows


def texts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "text": f"text of {row['item']}"} for row in rows]


USERS = [f"u{number}" for number in range(30)]
FIRST = [row for user in USERS for row in timed(user, "a@1 b@2 c@3 d@4")]


def raw_catalogue(pack: TaskPack) -> list[dict[str, Any]]:
    """Item, domain, text and count of all items by id, raw."""
    found, schema = pq.read_table(pack.path / "vocab" / "catalogue.parquet").to_pylist(), pack.schema
    tables = pack.text_tables()
    for row in found:
        if "title" in row:
            row["title"] = tables[schema.feature("title").table][row["title"]]
        if "domain" in row:
            values = pq.read_table(pack.vocab_file("domain"))["value"].to_pylist()
            row["domain"] = ["", *values][row["domain"]]
    return found


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> tuple[TaskPack, TaskPack]:
    """A first pack, and a day on which every user has two events, the second one of a new item."""
    folder = tmp_path_factory.mktemp("days")
    first = event_pack(folder, texts(FIRST))
    return first, later_pack(folder, first.path, texts([r for u in USERS for r in timed(u, "a@11 e@12")]), "day1")


def test_events_of_a_day_are_targets_after_all_that_their_users_did_before(days: tuple[TaskPack, TaskPack]) -> None:
    found = {split: told_tasks(days[1], split) for split in SPLITS}
    assert all(len(tasks) >= 1 for tasks in found.values())
    assert set(found["train"].values()) == {"a b c d -> a -> e"}
    for split in ("valid", "test"):
        for key, words in found[split].items():
            assert words == {"1": "a b c d -> a", "2": "a b c d a -> e"}[key.partition("#")[2]]
    of_split = [{key.partition("#")[0] for key in tasks} for tasks in found.values()]
    assert sorted(user for users in of_split for user in users) == sorted(USERS), "each user is in one split"


def test_ids_stay_and_the_catalogue_grows(days: tuple[TaskPack, TaskPack]) -> None:
    first, day = days
    before, after = raw_catalogue(first), raw_catalogue(day)
    trained = len(told_tasks(day, "train"))
    assert [row["item"] for row in after] == [*(row["item"] for row in before), "e"]
    assert [row["title"] for row in after] == [f"text of {row['item']}" for row in after]
    counts = {row["item"]: row["count"] for row in before}
    grown = {row["item"]: row["count"] for row in after}
    assert grown == {**counts, "a": counts["a"] + trained, "e": trained}, "training targets of the day are added alone"
    assert day.manifest["day"]["number"] == 1
    audit = day.manifest["counts"]["audit"]
    assert (audit["events"], audit["users"], audit["targets_of_new_users"]) == (60, 30, {})


def test_the_same_day_gives_the_same_bytes(days: tuple[TaskPack, TaskPack], tmp_path: Path) -> None:
    first, day = days
    events = pq.read_table(first.path.parent / "day1.parquet").to_pylist()
    again = later_pack(tmp_path, first.path, events, "day1", threads=2)
    for file in sorted(path for path in day.path.rglob("*") if path.is_file() and path.name != "manifest.json"):
        assert (again.path / file.relative_to(day.path)).read_bytes() == file.read_bytes(), file
    assert again.manifest["tasks"] == day.manifest["tasks"]


def test_users_and_items_go_on_over_several_days(days: tuple[TaskPack, TaskPack], tmp_path: Path) -> None:
    """A user keeps the split, and brings the last rows; a new user begins; a late event is no target of training."""
    day = days[1]
    trained, tested = (next(iter(told_tasks(day, split))).partition("#")[0] for split in ("train", "test"))
    rows = [*timed(trained, "f@21 a@5"), *timed(tested, "g@21"), *timed("new", "a@21 b@22"), *timed("other", "c@21")]
    last = later_pack(
        tmp_path,
        day.path,
        texts(rows + [r for u in USERS if u not in (trained, tested) for r in timed(u, "b@23")]),
        "day2",
        history_rows=3,
    )
    assert told_tasks(last, "train")[trained] == "d a a e -> f", "the last three, and the late one in its place"
    assert told_tasks(last, "test")[f"{tested}#1"] == "d a e -> g"
    users = {split: {key.partition("#")[0] for key in told_tasks(last, split)} for split in SPLITS}
    for split in SPLITS:
        assert {key.partition("#")[0] for key in told_tasks(day, split)} == users[split] - {"new", "other"}
    assert sum("new" in found for found in users.values()) == 1
    assert last.manifest["counts"]["audit"]["targets_of_new_users"].keys() <= {"valid", "test"}
    assert [row["item"] for row in raw_catalogue(last)][:5] == [row["item"] for row in raw_catalogue(day)]
    kept = pq.read_table(last.path / "increment" / "events.parquet").to_pylist()
    assert max(row["place"] for row in kept) == 2
    assert {row["user"] for row in kept} == {*USERS, "new", "other"}


def test_an_item_of_another_domain_is_another_item_and_known_texts_stay(tmp_path: Path) -> None:
    rows = [r for u in USERS for r in [*timed(u, "a@1 b@2 c@3 x@4", "A"), *timed(u, "x@5 y@6 z@7", "B")]]
    first = event_pack(tmp_path, texts(rows))
    names = [row["item"] for row in raw_catalogue(first)]
    assert {"A|x", "B|x"} <= set(names)
    later = [r for u in USERS for r in [*timed(u, "x@11", "A"), *timed(u, "a@12", "B"), *timed(u, "a@13", "A")]]
    day = later_pack(tmp_path, first.path, [{**row, "text": "another"} for row in later], "day1")
    assert set(told_tasks(day, "train").values()) == {"a b c A|x B|x y z -> A|x -> B|a -> a"}
    found = {row["item"]: (row["domain"], row["title"]) for row in raw_catalogue(day)}
    assert found["B|a"] == ("B", "another")
    assert found["a"] == ("A", "text of a")
    assert [row["item"] for row in raw_catalogue(day)] == [*names, "B|a"]


def test_items_may_come_without_events_and_events_without_domains(tmp_path: Path) -> None:
    rows = [r for u in USERS for r in timed(u, "a@1 b@2 c@3 d@4", "A")]
    first = event_pack(tmp_path, texts(rows))
    items = [{"item": "n", "domain": "A", "text": "a new one"}]
    pq.write_table(pa.Table.from_pylist(items), tmp_path / "new.parquet")
    day = later_pack(
        tmp_path, first.path, [r for u in USERS for r in timed(u, "b@11")], "day1", items=str(tmp_path / "new.parquet")
    )
    assert raw_catalogue(day)[-1] == {"id": 5, "item": "n", "domain": "A", "title": "a new one", "count": 0}
    catalogue = day.catalogue()
    np.testing.assert_array_equal(catalogue.owned["domain"], [0, 1, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"events": "events.yaml"}, "events has no effect with base: only a first pack of events asks for it"),
        ({"core": 2}, "core has no effect with base"),
        ({"evict_after_days": 3}, "evict_after_days has no effect on a base of events"),
        ({"query_size": 3}, "query_size is 3, and None in base"),
    ],
)
def test_settings_that_a_day_has_no_use_for(
    days: tuple[TaskPack, TaskPack], tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    config = later_config(tmp_path, days[0].path, timed("u1", "a@11"), "later", **change)
    with pytest.raises(ValueError, match=told):
        prepare(config, quiet)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"user": "u1", "item": "a", "time": 1_700_000_000}], "counts seconds .*, but no dates"),
        ([{"user": "u1", "item": "a"}], "no column 'time'"),
        (timed("u1", "a@11")[:0] or [{"user": None, "item": "a", "time": 3}], "cannot be used"),
    ],
)
def test_days_that_do_not_go_on(
    days: tuple[TaskPack, TaskPack], tmp_path: Path, rows: list[dict[str, Any]], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        prepare(later_config(tmp_path, days[0].path, texts(rows), "later"), quiet)
    assert not (tmp_path / "later").exists()


def test_a_day_is_taken_once(days: tuple[TaskPack, TaskPack], tmp_path: Path) -> None:
    again = later_config(
        tmp_path, days[1].path, timed("u1", "a@31"), "later", input=days[1].manifest["settings"]["input"]
    )
    with pytest.raises(ValueError, match="was delivered already, with day 1 of base"):
        prepare(again, quiet)
    assert open_pack(days[1].path).manifest["day"]["base"] == days[0].manifest["xxh3"]


@pytest.mark.parametrize("settings", [{"holdout": 3}, {}])
def test_targets_of_one_user_belong_together(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Held-out tasks have the domain and a number behind the user's name; intervals resample users."""
    rows = [r for user in ("a#1", "b|c", "d") for r in [*timed(user, "p@1 q@2 p@3 q@4", "A"), *timed(user, "x@5", "B")]]
    pack = event_pack(tmp_path, rows, **settings)
    split, catalogue = pack.split("test"), pack.catalogue()
    targets = Targets.of_split(split, "item")
    candidates = candidates_of(catalogue, "domain")
    found = ranks_of(lambda some: torch.zeros(len(targets.row[some]), catalogue.num_ids), targets, candidates)
    assert set(user_keys(pack, split, found, candidates.domain).to_pylist()) == {"a#1", "b|c", "d"}


def test_gaps_of_a_day_go_on_from_earlier_events(tmp_path: Path) -> None:
    first = event_pack(tmp_path, FIRST, gaps=True)
    day = later_pack(tmp_path, first.path, [row for user in USERS for row in timed(user, "a@11 e@12")], "day1")
    names = [None, *pq.read_table(day.vocab_file("gap"))["value"].to_pylist()]
    rows = day.split("train").columns(("gap",))
    found = [names[gap] for gap in rows.ids["gap"][rows.task == 0].tolist()]
    assert found == [None, "1", "1", "1", "3", "1"], "floor(log2(1 + steps)) since the event before"
    dates = [{"user": "u0", "item": "a", "time": 1_700_000_000}]
    with pytest.raises(ValueError, match="times of the new events are in seconds, those of the base in counter"):
        later_pack(tmp_path, first.path, dates, "day2")
