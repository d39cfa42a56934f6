"""Next-item packs from files of events: what a pack holds, its catalogue, and that it is the same every time."""

from __future__ import annotations

import json
import shutil
from datetime import datetime, timezone
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml
from commands import gmeta
from event_packs import event_config, event_pack, quiet, sequence, told_tasks
from packs import make_pack

from gmeta.data.catalogue import read_catalogue
from gmeta.data.events.gaps import gap_buckets, gap_sql
from gmeta.data.pack import TaskPack, open_pack, verify_pack
from gmeta.data.prepare.prepare import prepare
from gmeta.data.prepare.prepare import print_summary as print_pack
from gmeta.data.schema import data_schema_from_json, pack_schema_from_json

EVENTS = [
    *sequence("u1", "a b c d", "Films"),
    *sequence("u1", "x y z", "Books"),
    *sequence("u2", "b a c", "Films"),
    *sequence("u3", "y x", "Books"),
]
TITLES = {"a": "Alien", "b": "Brazil", "c": None, "d": "Dune", "x": "Xenophon", "y": "Dune", "z": "Zorba", "w": "Waste"}
ITEMS = [{"item": i, "domain": "Books" if i in "wxyz" else "Films", "text": text} for i, text in TITLES.items()]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> TaskPack:
    return event_pack(tmp_path_factory.mktemp("events"), EVENTS, items=ITEMS)


def raw(pack: TaskPack, table: str) -> list[str]:
    """Values of a vocabulary by id."""
    return ["", *pq.read_table(pack.vocab_file(table))["value"].to_pylist()]


def test_tasks(pack: TaskPack) -> None:
    verify_pack(pack.path)
    assert told_tasks(pack, "train") == {"u1": "a x -> b", "u2": "-> b", "u3": "y -> x"}
    assert told_tasks(pack, "valid") == {"u1|Films": "x a b -> c", "u1|Books": "a b x -> y", "u2|Films": "b -> a"}
    assert told_tasks(pack, "test") == {
        "u1|Films": "x a b c -> d",
        "u1|Books": "a b x y -> z",
        "u2|Films": "b a -> c",
    }


def test_schema(pack: TaskPack) -> None:
    schema = pack.schema
    assert (schema.task, schema.item, schema.scenario, schema.time) == ("user", "item", "domain", "time")
    assert (schema.next_item, schema.catalogue) == (True, ("domain", "title"))
    assert [f.name for f in schema.features] == ["item", "domain", "title"]
    assert pack_schema_from_json(json.loads(json.dumps(schema.to_json()))) == schema
    stored = data_schema_from_json(pack.manifest["data_schema"])
    assert [f.vocabulary for f in stored.features] == ["all", "all", "train"]
    labels = [pack.split(split).columns(()).label for split in pack.splits]
    assert all((label == 1).all() for label in labels)


def test_catalogue(pack: TaskPack) -> None:
    catalogue = pack.catalogue()
    names = raw(pack, "item")
    assert names[1:] == ["b", "x", "a", "y", "c", "d", "w", "z"], "by training rows, then by name"
    assert dict(zip(names, catalogue.count.tolist(), strict=True)) == {
        **dict.fromkeys(["", "c", "d", "w", "z"], 0),
        **{"b": 2, "x": 2, "a": 1, "y": 1},
    }
    domains = [raw(pack, "domain")[i] for i in catalogue.owned["domain"]]
    assert dict(zip(names, domains, strict=True)) == {"": ""} | {row["item"]: row["domain"] for row in ITEMS}
    texts = pack.text_tables()["title"]
    assert {name: texts[i] for name, i in zip(names, catalogue.owned["title"], strict=True)} == {"": ""} | {
        item: text or "" for item, text in TITLES.items()
    }
    title = pack.schema.feature("title")
    assert (title.num_ids, title.num_texts) == (5, 7), "titles of training rows have embedding rows, others are texts"
    assert (catalogue.item, catalogue.num_ids) == ("item", 9)


def test_rows_hold_what_the_catalogue_says(pack: TaskPack) -> None:
    catalogue = pack.catalogue()
    for split in pack.splits:
        for side in pack.split(split).examples(np.arange(pack.split(split).num_tasks))[:2]:
            items = side.ids["item"][side.mask].numpy()
            assert (items > 0).all()
            np.testing.assert_array_equal(side.ids["domain"][side.mask].numpy(), catalogue.owned["domain"][items])
            texts = side.given["title.text"][side.mask].numpy()[:, 0]
            np.testing.assert_array_equal(texts, catalogue.owned["title"][items])
            cold = side.item_cold[side.mask].numpy()
            np.testing.assert_array_equal(cold, catalogue.count[items] == 0)


def test_the_summary_says_what_the_audit_found(pack: TaskPack, capsys: pytest.CaptureFixture[str]) -> None:
    counts = pack.manifest["counts"]
    assert counts["audit"]["cold_targets"] == {"test": {"Books": 1, "Films": 2}, "valid": {"Books": 0, "Films": 1}}
    assert counts["audit"]["events_without_text"] == 2
    assert {name: split["cold_tasks"] for name, split in counts["splits"].items()} == dict.fromkeys(pack.splits, 0)
    print_pack({"out": "pack", **counts})
    told = " ".join(capsys.readouterr().out.split())
    assert "targets of test (cold: no training event has their item): Books 1 (cold 1), Films 2 (cold 2)" in told
    assert "12 of 3 users (1 of several domains, 0 of one event) and 7 items; the catalogue has 8 items" in told
    assert "nothing to rank by" not in told


def test_a_pack_of_a_file_sorted_by_item_says_so_for_good(tmp_path: Path) -> None:
    events = [event for u in range(12) for event in sequence(f"u{u}", " ".join(f"i{u + k:02d}" for k in range(5)))]
    (warning,) = event_pack(tmp_path, events).warnings()
    assert warning.startswith("the events are sorted by item id, not by time: 12 of 12 sequences of 4 events or more")


def test_events_alone_need_a_user_and_an_item(tmp_path: Path) -> None:
    events = [*sequence("7", "a b c"), *sequence("8", "c b")]
    pack = event_pack(tmp_path, events)
    assert (pack.schema.scenario, pack.schema.catalogue) == (None, ())
    assert told_tasks(pack, "test") == {"7": "a b -> c"}
    assert pack.catalogue().owned == {}


def test_the_most_frequent_text_of_an_item_counts(tmp_path: Path) -> None:
    texts = ["new", "old", "old", "other", "other"]
    events = [{"user": f"u{i}", "item": item, "text": text} for i, text in enumerate(texts) for item in ("a", "b")]
    pack = event_pack(tmp_path, [*events, {"user": "u9", "item": "c", "text": None}])
    catalogue, table = pack.catalogue(), pack.text_tables()["title"]
    assert [table[i] for i in catalogue.owned["title"]] == ["", "old", "old", ""]
    audit = pack.manifest["counts"]["audit"]
    assert (audit["items_of_several_texts"], audit["events_without_text"]) == (2, 1)


def test_a_text_of_the_items_comes_first(tmp_path: Path) -> None:
    events = [{"user": f"u{i % 2}", "item": "a", "text": "of events"} for i in range(4)]
    pack = event_pack(tmp_path, events, items=[{"item": "a", "text": "of items"}])
    assert list(pack.text_tables()["title"])[pack.catalogue().owned["title"][1]] == "of items"


def test_a_domain_may_be_that_of_the_item(tmp_path: Path) -> None:
    events = [*sequence("u", "a b c x y z"), *sequence("v", "a x")]
    pack = event_pack(tmp_path, events, items=[{"item": i, "domain": "AB"[i > "w"]} for i in "abcxyzz"])
    assert set(told_tasks(pack, "test")) == {"u|A", "u|B"}


def test_an_id_of_two_domains_is_two_items(tmp_path: Path) -> None:
    events = [*sequence("u", "1 2 3", "A"), *sequence("v", "1 3 4", "B")]
    pack = event_pack(tmp_path, events)
    assert sorted(raw(pack, "item")) == ["", "2", "4", "A|1", "A|3", "B|1", "B|3"]
    assert pack.manifest["counts"]["items_of_several_domains"] == 2


def test_domains_are_chosen(tmp_path: Path) -> None:
    pack = event_pack(tmp_path, EVENTS, items=ITEMS, domains=["Films"])
    assert told_tasks(pack, "test") == {"u1": "a b c -> d", "u2": "b a -> c"}
    assert sorted(raw(pack, "item")) == ["", "a", "b", "c", "d"]
    assert pack.manifest["settings"]["domains"] == ["Films"]


def test_a_core_and_a_time(tmp_path: Path) -> None:
    events = [{"user": f"u{u}", "item": f"i{k}", "time": 10 * k + u} for u in range(3) for k in range(4)]
    pack = event_pack(tmp_path, [*events, {"user": "rare", "item": "i0", "time": 1}], core=2, holdout="20")
    counts = pack.manifest["counts"]
    assert counts["audit"]["core"] == {"core": 2, "left_out": {"users": 1, "items": 0, "events": 1}}
    assert told_tasks(pack, "train") == {f"u{u}": "i0 -> i1" for u in range(3)}
    assert told_tasks(pack, "valid") == {f"u{u}#1": "i0 i1 -> i2" for u in range(3)}
    assert told_tasks(pack, "test") == {f"u{u}#1": "i0 i1 i2 -> i3" for u in range(3)}


def test_dates_of_a_config_file(tmp_path: Path) -> None:
    events = [{"user": f"u{u}", "item": f"i{k}", "time": datetime(2024, 1, 1 + k, u)} for u in (1, 2) for k in range(4)]
    config = event_config(tmp_path, events)
    (tmp_path / "prepare.yaml").write_text(yaml.safe_dump({"holdout": "2024-01-03", "threads": 1}))
    words = ["--input", config.input[0], "--events", config.events, "--out", config.out]
    gmeta("prepare", "--config", tmp_path / "prepare.yaml", *words)
    pack = open_pack(config.out)
    assert told_tasks(pack, "valid") == {"u1#1": "i0 i1 -> i2", "u2#1": "i0 i1 -> i2"}
    times = pack.split("train").times()
    assert times is not None
    assert times.max() == int(datetime(2024, 1, 2, 2, tzinfo=timezone.utc).timestamp() * 1e6)


def test_long_histories_keep_their_last_events(tmp_path: Path) -> None:
    events = [*sequence("u", "a b c d e f"), *sequence("v", "a b c")]
    pack = event_pack(tmp_path, events, max_task_rows=3, max_task_rows_keep="last")
    assert told_tasks(pack, "test") == {"u": "d e -> f", "v": "a b -> c"}
    assert told_tasks(pack, "train") == {"u": "b c -> d", "v": "-> a"}


def test_bad_rows_are_set_aside(tmp_path: Path) -> None:
    events = [*sequence("u", "a b c"), {"user": None, "item": "a"}, *sequence("v", "a b c")]
    pack = event_pack(tmp_path, events, on_bad_rows="quarantine")
    assert sum(pack.manifest["counts"]["bad_rows"].values()) == 1
    assert pq.read_table(pack.path / "rejects.parquet")["column"].to_pylist() == ["user"]


def test_the_same_bytes_whatever_threads_files_and_formats(tmp_path: Path) -> None:
    events = [
        {"user": f"u{u:02d}", "item": f"i{(u * 7 + k * k) % 23}", "domain": "AB"[(u + k) % 2], "text": f"t{k % 5}"}
        for u in range(40)
        for k in range(3 + u % 9)
    ]
    found = []
    for name, settings in {"one": {}, "four": {"threads": 4, "memory_limit": "1GB"}, "csv": {}}.items():
        folder = tmp_path / name
        folder.mkdir()
        config = event_config(folder, events, **settings)
        if name == "csv":
            pyarrow.csv.write_csv(pq.read_table(folder / "events.parquet"), folder / "events.csv")
            config = event_config(folder, events, input=[str(folder / "events.csv")])
        prepare(config, quiet)
        files = [file for file in sorted((folder / "pack").rglob("*")) if file.suffix in (".parquet", ".safetensors")]
        found.append({file.name: file.read_bytes() for file in files})
    assert len(found[0]) == 8
    assert all(pack == found[0] for pack in found[1:])


@pytest.mark.slow
def test_a_run_carries_the_catalogue(pack: TaskPack, tmp_path: Path) -> None:
    gmeta("train", "--pack", pack.path, "--run_dir", tmp_path / "run", "--schedule.epochs", 1)
    found, expected = read_catalogue(tmp_path / "run/vocab", pack.schema), pack.catalogue()
    np.testing.assert_array_equal(found.count, expected.count)
    np.testing.assert_array_equal(found.owned["title"], expected.owned["title"])


def test_a_missing_or_damaged_catalogue_is_told(pack: TaskPack, tmp_path: Path) -> None:
    shutil.copytree(pack.path, tmp_path / "copy")
    file = tmp_path / "copy/vocab/catalogue.parquet"
    copy = open_pack(tmp_path / "copy")
    data = file.read_bytes()
    file.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
    with pytest.raises(ValueError, match=r"catalogue\.parquet"):
        copy.catalogue()
    file.unlink()
    with pytest.raises(ValueError, match=r"catalogue\.parquet is missing or damaged"):
        read_catalogue(file.parent, copy.schema)


def test_a_trained_run_computes_gaps_as_prepare_does() -> None:
    edges = [n + d for n in (1, 2**31, 10**15, 2**62) for d in (-1, 0, 1)]
    time = np.sort(np.array([-(2**63), 0, *edges, 2**63 - 1]))
    user = np.array([0] * 9 + [1] * 6)
    for unit in ("seconds", "microseconds"):
        before = "lag(time) OVER (PARTITION BY u ORDER BY time)"
        with duckdb.connect() as con:
            con.register("events", pa.table({"u": user, "time": time}))
            query = f"SELECT coalesce({gap_sql('time', before, unit)}, -1) FROM events ORDER BY u, time"
            expected = [gap for (gap,) in con.execute(query).fetchall()]
        assert gap_buckets(user, time, unit).tolist() == expected
    assert max(expected) > 40
    assert gap_buckets(np.zeros(3, np.int64), np.array([0.5, 1.4, 2.75]), "seconds").tolist() == [-1, 0, 1]


@pytest.mark.parametrize("unit", ["seconds", "milliseconds", "dates", "counter"])
def test_gaps_are_between_the_events_of_a_task(unit: str, tmp_path: Path) -> None:
    start = 1000 if unit == "counter" else 1_700_000_000
    passed = {"a": 0, "b": 0, "x": 1, "c": 10, "y": 13, "d": 1_000_000, "z": 1_000_007}
    passed |= {"e": 0, "f": 9, "g": 20, "h": 20}

    def time(seconds: int) -> object:
        whole = start + seconds
        dates = {"milliseconds": 1000 * whole + 999, "dates": datetime.fromtimestamp(whole, timezone.utc)}
        return dates.get(unit, whole)

    events = [*sequence("u1", "a b c d", "Films"), *sequence("u1", "x y z", "Books"), *sequence("u2", "b a c", "Films")]
    events += sequence("u3", "e f g h", "Films")
    pack = event_pack(tmp_path, [{**event, "time": time(passed[event["item"]])} for event in events], gaps=True)

    gaps = ["-", *map(str, pq.read_table(pack.vocab_file("gap"))["value"].to_pylist())]
    columns = pack.split("test").columns(("item", "gap"))
    names = raw(pack, "item")
    found: dict[int, list[str]] = {}
    for task, item, gap in zip(columns.task, columns.ids["item"], columns.ids["gap"], strict=True):
        found.setdefault(int(task), []).append(f"{names[item]}{gaps[gap]}")
    told = sorted(" ".join(events) for events in found.values())
    assert told == ["a- b0 x1 c3 d-", "a- b0 x1 y3 z-", "b- a0 c3", "e- f3 g3 h0"]  # no training event has that of d


def test_a_catalogue_of_another_pack_is_refused(pack: TaskPack, tmp_path: Path) -> None:
    other = event_pack(tmp_path, EVENTS)
    with pytest.raises(ValueError, match=r"has not one row for each of the 8 items of 'item'"):
        read_catalogue(_without_titles(other.path / "vocab", pack), pack.schema)


def _without_titles(folder: Path, pack: TaskPack) -> Path:
    """A folder whose catalogue has the columns of `pack`, and other items."""
    table = pq.read_table(folder / "catalogue.parquet")
    for name in set(pack.schema.catalogue) - set(table.column_names):
        table = table.append_column(name, table["id"])
    pq.write_table(table, folder / "catalogue.parquet")
    return folder


def test_another_pack_has_no_catalogue(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only a next-item pack has one"):
        open_pack(make_pack(tmp_path / "pack")).catalogue()
