"""`gmeta prepare --base` against a slow reference in plain Python, and by what it promises of ids, splits and bytes."""

import csv
import hashlib
import math
import shutil
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from gmeta.config.data import PrepareConfig
from gmeta.data.pack import TaskPack, open_pack, verify_pack
from gmeta.data.prepare import encode, history
from gmeta.data.prepare.encoder import encode_tables
from gmeta.data.prepare.prepare import prepare, print_summary

Row = dict[str, Any]

SCHEMA = {
    "task": "user",
    "label": "click",
    "time": "at",
    "item": "item",
    "categorical": [{"name": "item", "min_count": 3}, {"name": "city", "nulls": "oov"}],
    "multi": [{"name": "tags", "separator": "|"}],
    "numeric": ["price"],
    "item_statistics": True,
}
QUERY, MIN_ROWS, HISTORY, EVICT = 3, 4, 6, 2


def quiet(*_: object) -> None:
    """A report that says nothing."""


def day_rows(day: int, users: range, items: range, seed: int = 0) -> list[Row]:
    """A day's rows in no order; each twentieth is late, of the day before."""
    rng = np.random.default_rng(100 * seed + day)
    rows = []
    for user in users:
        for _ in range(int(rng.integers(1, 9))):
            at = 100 * (day - (rng.random() < 0.05)) + int(rng.integers(0, 100))
            rows.append(
                {
                    "user": f"u{user}",
                    "item": f"i{rng.choice(items)}",
                    "city": "" if rng.random() < 0.1 else f"c{user // 8}",
                    "tags": "|".join(f"t{t}" for t in rng.integers(2 * day, 2 * day + 6, int(rng.integers(0, 3)))),
                    "price": round(float(rng.normal(day, 1)), 3),
                    "click": int(rng.random() < 0.4),
                    "at": at,
                }
            )
    return [rows[i] for i in rng.permutation(len(rows))]


DAYS = [day_rows(n, range(8 * n, 40 + 8 * n), range(4 * n, 20 + 4 * n)) for n in range(3)]
DAYS.append(day_rows(3, range(0, 64, 2), range(30)))


def write_csv(path: Path, rows: list[Row]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def make_days(
    place: Path, days: list[list[Row]], schema: dict[str, Any] = SCHEMA, first: Row | None = None, **later: Any
) -> list[TaskPack]:
    """The packs of some days, each made on the one before."""
    place.mkdir(exist_ok=True)
    (place / "schema.yaml").write_text(yaml.safe_dump(schema))
    packs: list[TaskPack] = []
    for number, rows in enumerate(days):
        words: Row = {"out": str(place / f"pack{number}"), "input": [write_csv(place / f"day{number}.csv", rows)]}
        if packs:
            words |= {"base": str(packs[-1].path), **later}
        else:
            words |= {"schema": str(place / "schema.yaml"), "query_size": QUERY, **(first or {})}
        prepare(PrepareConfig(**words), quiet)
        verify_pack(words["out"])
        packs.append(open_pack(words["out"]))
    return packs


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> list[TaskPack]:
    place = tmp_path_factory.mktemp("days") / "a"
    return make_days(place, DAYS, first={"min_task_rows": MIN_ROWS}, history_rows=HISTORY, evict_after_days=EVICT)


def vocabulary(pack: TaskPack, table: str) -> dict[str, list[Any]]:
    return dict(pq.read_table(pack.vocab_file(table)).to_pydict())


def splits(pack: TaskPack) -> dict[str, str]:
    listed = pq.read_table(pack.tasks_file())
    return dict(zip(listed["key"].to_pylist(), listed["split"].to_pylist(), strict=True))


def tasks(pack: TaskPack) -> dict[str, tuple[int, list[Row]]]:
    """Key -> number of support rows, and rows as they are stored."""
    keys = pq.read_table(pack.tasks_file()).sort_by("task_id")["key"].to_pylist()
    many = [f.name for f in pack.schema.features if f.kind != "categorical"]
    found = {}
    for split in pack.splits:
        for arrays in pack.split(split).shard_arrays():
            end = [*arrays["row_start"][1:], len(arrays["label"])]
            for t, (start, stop) in enumerate(zip(arrays["row_start"], end, strict=True)):
                rows = [
                    {
                        name: arrays[name][r].tolist()
                        for name in ("ids", "dense", "label", "item_cold", "time")
                        if name in arrays
                    }
                    | {
                        name: arrays[f"{name}.values"][
                            arrays[f"{name}.offsets"][r] : arrays[f"{name}.offsets"][r + 1]
                        ].tolist()
                        for name in many
                    }
                    for r in range(start, stop)
                ]
                found[keys[arrays["task_id"][t]]] = (int(arrays["num_support"][t]), rows)
    return found


def drawn(key: str, valid: float = 0.1, test: float = 0.1) -> str:
    number = int.from_bytes(hashlib.md5(f"split|0|{key}".encode()).digest()[8:], "little") / 2**64
    return "test" if number < test else "valid" if number < test + valid else "train"


class Reference:
    """What the days after the first must give, a row at a time."""

    def __init__(self, first: TaskPack, rows: list[Row]) -> None:
        self.split = splits(first)
        self.numeric = first.schema.numeric
        self.known: dict[str, list[list[Any]]] = {}  # table -> [value, count, last day], in the order of ids
        self.pending: dict[str, dict[str, list[int]]] = {}
        train = [row for row in rows if self.split.get(row["user"]) == "train"]
        for table in ("item", "city", "tags"):
            counts = Counter(value for row in train for value in self.values(row, table))
            self.known[table], self.pending[table] = [], {}
            self.admit(table, {value: [count, 0] for value, count in counts.items()})
        self.totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        self.of_all = [0, 0]  # evicted items too
        self.count(train)
        self.last_seen = dict.fromkeys(self.split, 0)
        self.history = {}
        for key, (_, stored) in tasks(first).items():
            placed = [dict(row, day=0, place=place) for place, row in enumerate(stored)]
            self.history[key] = sorted(placed, key=lambda r: (r["time"], r["place"]))[-HISTORY:]
        self.leave_out(first, rows)

    def leave_out(self, first: TaskPack, rows: list[Row]) -> None:
        """Keep the rows of tasks that the first pack left out, as it would have encoded those of a held-out task."""
        listed = pq.read_table(first.path / "increment/left_out.parquet").to_pylist()
        by_key: dict[str, list[Row]] = {one["key"]: [] for one in listed}
        for row in rows:
            if row["user"] not in self.history:
                by_key[row["user"]].append(row)
        assert all(0 < len(own) < MIN_ROWS for own in by_key.values())
        for one in listed:
            key = one["key"]
            own = sorted(by_key[key], key=lambda row: row["at"])
            cold = [int(row["item"] not in self.totals) for row in own]
            coded = [self.encode(row) for row in own]
            self.history[key] = [
                dict(row, day=0, place=n, item_cold=new) for n, (row, new) in enumerate(zip(coded, cold, strict=True))
            ]
            self.split[key], self.last_seen[key] = one["split"], 0

    @staticmethod
    def values(row: Row, table: str) -> list[str]:
        return [value for value in row[table].split("|") if value]

    def admit(self, table: str, counts: dict[str, list[int]]) -> None:
        least = 3 if table == "item" else 1
        for value, (count, last) in sorted(counts.items(), key=lambda entry: (-entry[1][0], entry[0])):
            if count >= least:
                self.known[table].append([value, count, last])
        self.pending[table] = {value: entry for value, entry in counts.items() if entry[0] < least}

    def count(self, train: list[Row]) -> None:
        for row in train:
            for total in (self.totals[row["item"]], self.of_all):
                total[0] += row["click"]
                total[1] += 1

    def encode(self, row: Row) -> Row:
        ids = {t: {value: i for i, (value, _, _) in enumerate(self.known[t], 1) if value} for t in self.known}
        clicks, of = self.totals.get(row["item"], (0, 0))
        mean = self.of_all[0] / self.of_all[1]
        numbers = [row["price"], (clicks + 10 * mean) / (of + 10), math.log(1 + of)]
        return {
            "ids": [ids["item"].get(row["item"], 0), ids["city"].get(row["city"], 0)],
            "tags": [ids["tags"].get(tag, 0) for tag in self.values(row, "tags")],
            "dense": [(x - c.mean) / c.std for x, c in zip(numbers, self.numeric, strict=True)],
            "label": float(row["click"]),
            "time": row["at"],
        }

    def grow(self, day: int, train: list[Row]) -> None:
        for table in self.known:
            seen = Counter(value for row in train for value in self.values(row, table))
            gone = []
            for number, entry in enumerate(self.known[table], 1):
                if count := seen.pop(entry[0], 0) if entry[0] else 0:
                    entry[1:] = [entry[1] + count, day]
                elif entry[0] and day - entry[2] >= EVICT:
                    entry[:2] = [None, 0]
                    gone.append(number)
            waiting = {value: list(entry) for value, entry in self.pending[table].items()}
            for value, count in seen.items():
                waiting[value] = [waiting.get(value, [0, 0])[0] + count, day]
            self.admit(table, waiting)
            self.pending[table] = {v: e for v, e in self.pending[table].items() if day - e[1] < EVICT}
            if table == "item":
                kept = {value for value, _, _ in self.known[table]} | self.pending[table].keys()
                for item in self.totals.keys() - kept:
                    del self.totals[item]
            for rows in self.history.values():
                for row in rows:
                    if table == "tags":
                        row["tags"] = [0 if i in gone else i for i in row["tags"]]
                    else:
                        at = ("item", "city").index(table)
                        row["ids"][at] = 0 if row["ids"][at] in gone else row["ids"][at]

    def day(self, day: int, rows: list[Row]) -> dict[str, tuple[int, list[Row]]]:
        """Move on by a day; returns its tasks as `tasks` does."""
        by_key: dict[str, list[Row]] = defaultdict(list)
        for row in rows:  # in the file's order
            by_key[row["user"]].append(row)
        for key in by_key:
            self.split.setdefault(key, drawn(key))
        kept = {k for k, new in by_key.items() if len(new) + len(self.history.get(k, ())) >= MIN_ROWS}
        train = [row for row in rows if row["user"] in kept and self.split[row["user"]] == "train"]
        self.grow(day, train)
        seen = {item for item, (_, n) in self.totals.items() if n} | {row["item"] for row in train}
        found = {}
        for key, new in by_key.items():
            new.sort(key=lambda row: row["at"])
            older = self.history.get(key, [])
            support = len(new) - max(1, min(QUERY, len(new) - (not older)))
            coded = [
                dict(self.encode(row), day=day, place=place, item_cold=int(row["item"] not in seen))
                for place, row in enumerate(new)
            ]
            before = sorted(older + coded[:support], key=lambda r: (r["time"], r["day"], r["place"]))
            if key in kept:
                found[key] = (len(before), before + coded[support:])
            every = sorted(older + coded, key=lambda r: (r["time"], r["day"], r["place"]))[-HISTORY:]
            self.history[key] = [dict(row, place=place) for place, row in enumerate(every)]
            self.last_seen[key] = day
        self.count(train)
        for key, last in list(self.last_seen.items()):
            if day - last >= EVICT:
                self.history.pop(key, None)
                if self.split[key] == drawn(key):
                    del self.split[key], self.last_seen[key]
        return found


def test_days_equal_the_reference(packs: list[TaskPack]) -> None:
    reference = Reference(packs[0], DAYS[0])
    came_back = 0
    for day, pack in enumerate(packs[1:], start=1):
        before = set(reference.history)
        expected, found = reference.day(day, DAYS[day]), tasks(pack)
        assert found.keys() == expected.keys()
        came_back += len(before & found.keys())
        for key, (support, rows) in expected.items():
            stored_support, stored = found[key]
            assert (stored_support, len(stored)) == (support, len(rows)), key
            for a, b in zip(stored, rows, strict=True):
                assert {n: a[n] for n in ("ids", "tags", "label", "time", "item_cold")} == {
                    n: b[n] for n in ("ids", "tags", "label", "time", "item_cold")
                }, key
                np.testing.assert_allclose(a["dense"], b["dense"], rtol=1e-5, atol=1e-6)
        for table, entries in reference.known.items():
            stored_table = vocabulary(pack, table)
            assert stored_table["id"] == list(range(1, len(entries) + 1))
            assert stored_table["value"] == [value for value, _, _ in entries]
            assert stored_table["count"] == [count for _, count, _ in entries]
            assert stored_table["last_day"] == [last for _, _, last in entries]
        waiting = pq.read_table(pack.path / "increment/pending/item.parquet").to_pylist()
        assert [(w["value"], w["count"], w["last_day"]) for w in waiting] == [
            (value, *entry) for value, entry in sorted(reference.pending["item"].items())
        ]
        known = pq.read_table(pack.path / "increment/tasks.parquet").to_pylist()
        assert {row["key"]: (row["split"], row["last_day"]) for row in known} == {
            key: (split, reference.last_seen[key]) for key, split in reference.split.items()
        }
        sums = pq.read_table(pack.path / "vocab/item_statistics.parquet").to_pylist()
        assert {r["value"]: [r["label_sum"], r["count"]] for r in sums if r["value"]} == reference.totals
        assert [[r["label_sum"], r["count"]] for r in sums if r["value"] is None] == [reference.of_all]
    assert came_back > 50
    assert any(None in vocabulary(packs[-1], table)["value"] for table in ("item", "tags"))


def test_ids_means_and_the_chain_go_on(packs: list[TaskPack]) -> None:
    for base, pack in pairwise(packs):
        for table in ("item", "city", "tags"):
            before, after = (vocabulary(p, table)["value"] for p in (base, pack))
            assert all(new in (old, None) for old, new in zip(before, after, strict=False))
            assert len(after) >= len(before)
        assert pack.schema.numeric == packs[0].schema.numeric
        assert pack.schema.label_mean == packs[0].schema.label_mean
        assert pack.manifest["day"]["base"] == base.manifest["xxh3"]
        drift = pack.manifest["counts"]["drift"]
        assert 0 < drift["unknown"]["item"] < 1
    assert [pack.manifest.get("day", {}).get("number") for pack in packs] == [None, 1, 2, 3]
    # prices rise by 1, which is a deviation, a day
    assert packs[2].manifest["counts"]["drift"]["numeric"]["price"]["mean"] == pytest.approx(2, abs=0.3)
    assert "vocab/item_statistics.parquet" in [entry["file"] for entry in packs[0].manifest["others"]]
    identities = [pack.manifest["schema"]["identity"] for pack in packs]
    assert all(a[table] != b[table] for a, b in pairwise(identities) for table in a)


def test_no_held_out_task_was_ever_trained_on(packs: list[TaskPack]) -> None:
    found: dict[str, set[str]] = defaultdict(set)
    for pack in packs:
        for key, split in splits(pack).items():
            found[key].add(split)
    assert {key: of for key, of in found.items() if len(of) > 1} == {}
    assert {split for of in found.values() for split in of} == {"train", "valid", "test"}


def files(pack: TaskPack) -> dict[str, bytes]:
    return {p.relative_to(pack.path).as_posix(): p.read_bytes() for p in pack.path.rglob("*") if p.is_file()}


def test_same_bytes_whatever_the_threads(
    packs: list[TaskPack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In small shards and pieces too: each is then read and written on its own."""
    made = []
    for threads, group in ((1, 64), (4, 64)):
        monkeypatch.setattr(history, "_GROUP_ROWS", group)
        words: Row = {"base": str(packs[2].path), "input": [str(packs[0].path.parent / "day3.csv")]}
        out = str(tmp_path / str(threads))
        prepare(PrepareConfig(out=out, threads=threads, history_rows=HISTORY, evict_after_days=EVICT, **words), quiet)
        made.append(files(open_pack(out)))
    assert made[0] == made[1]
    assert tasks(open_pack(tmp_path / "1")) == tasks(packs[3])
    carried = [name for name in made[0] if name.startswith("increment/history/")]
    assert len(carried) > 3
    assert max(pq.read_metadata(tmp_path / "1" / name).num_row_groups for name in carried) > 1


def test_several_shards_give_the_same_tasks(tmp_path: Path) -> None:
    """History is read shard by shard, and rows of tasks that are left out lie in shards of their own."""
    rng = np.random.default_rng(0)
    seen = [" ".join(map(str, rng.integers(0, 99, 60))) for _ in range(50)]
    days = [
        [{"user": f"u{u}", "seen": seen[(u + k) % 50], "click": u % 2, "at": n} for u in range(300) for k in range(20)]
        for n in range(2)
    ]
    days[1] += [{"user": f"new{u}", "seen": "1", "click": 1, "at": 1} for u in range(300) for _ in range(u % 3)]
    schema = {"task": "user", "label": "click", "time": "at", "sequence": [{"name": "seen", "separator": " "}]}
    first = {"shard_mb": 1, "min_task_rows": 2}
    whole, cut = (make_days(tmp_path / str(size), days, schema, first=first, shard_mb=size) for size in (128, 1))
    assert len(cut[1].manifest["splits"]["train"]["shards"]) > 1 == len(whole[1].manifest["splits"]["train"]["shards"])
    found = tasks(cut[1])
    assert found == tasks(whole[1])
    assert {support for support, _ in found.values()} >= {20 + 17}
    last = [pq.read_table(sorted((p[1].path / "increment/history").glob("*"))) for p in (whole, cut)]
    key = [("key", "ascending"), ("place", "ascending")]
    assert last[0].sort_by(key).equals(last[1].sort_by(key))
    assert "new1" in last[0]["key"].to_pylist()
    assert "new1" not in splits(cut[1])


def stream(counts: dict[str, list[int]], at: int = 0) -> list[Row]:
    """Rows of users, with an item for each number."""
    return [
        {"user": user, "item": f"i{item}", "city": "", "tags": "", "price": item, "click": item % 2, "at": at + k}
        for user, items in counts.items()
        for k, item in enumerate(items)
    ]


PLAIN = {**SCHEMA, "categorical": ["item"], "item_statistics": False}
FIRST = stream({f"u{u}": [1, 2, 3, 4, 5] for u in range(30)})


@pytest.mark.parametrize(
    ("first", "later", "expected"),
    [
        ({}, {}, (6, 3)),  # 5 rows of the day before, 1 of 4 new ones
        ({}, {"history_rows": 2}, (3, 3)),
        ({}, {"history_rows": 0}, (1, 3)),
        ({"query_size": None, "support_size": 3}, {}, (3, 4)),  # older rows count
        ({"query_size": None, "support_size": 7}, {}, (7, 2)),
        ({"query_size": None, "query_ratio": 0.5}, {}, (7, 2)),
        ({"max_task_rows": 6, "max_task_rows_keep": "last"}, {}, (3, 3)),  # older rows give way
        ({"max_train_task_rows": 5}, {}, (2, 3)),
    ],
)
def test_limits_hold_for_tasks_that_go_on(tmp_path: Path, first: Row, later: Row, expected: tuple[int, int]) -> None:
    pack = make_days(tmp_path, [FIRST, stream({f"u{u}": [6, 7, 8, 9] for u in range(30)}, 10)], PLAIN, first, **later)[
        1
    ]
    of = splits(pack)
    found = {(s, len(rows) - s) for key, (s, rows) in tasks(pack).items() if of[key] == "train"}
    assert found == {expected}
    for support, rows in tasks(pack).values():
        price = [round(row["dense"][0] * pack.schema.numeric[0].std + pack.schema.numeric[0].mean) for row in rows]
        assert price == sorted(price)
        assert price[-1] == 9
        assert price[support:] == [6, 7, 8, 9][-expected[1] :]


def test_a_single_new_row_is_the_query_of_a_known_task(tmp_path: Path) -> None:
    pack = make_days(tmp_path, [FIRST, stream({f"u{u}": [9] for u in range(30)} | {"v": [1]}, 10)], PLAIN)[1]
    assert {(key == "v", support, len(rows)) for key, (support, rows) in tasks(pack).items()} == {
        (False, 5, 6),
        (True, 0, 1),
    }


def test_values_below_a_count_are_evicted(tmp_path: Path) -> None:
    """Ids of 3 rare values go by age; a frequent one stays; one that comes back is new, and waits anew."""
    schema = {**PLAIN, "categorical": [{"name": "item", "min_count": 2}]}
    old = stream({f"u{u}": [1, 2, 2, 3] for u in range(30)}) + stream({"u0": [8]})
    days = [old, *(stream({f"u{u}": [1, 1, 50] for u in range(30)}, 10 * n) for n in (1, 2)), FIRST[:50]]
    packs = make_days(tmp_path, days, schema, evict_after_days=2, evict_below=40)
    item = [vocabulary(pack, "item") for pack in packs]
    assert item[1]["value"][: len(item[0]["value"])] == item[0]["value"]
    gone = item[0]["value"].index("i3") + 1
    assert item[2]["value"][gone - 1] is None
    assert item[2]["count"][gone - 1] == 0
    assert "i2" in item[2]["value"]  # seen more often
    assert item[3]["value"].index("i3") + 1 > len(item[2]["value"])
    assert packs[2].manifest["counts"]["tombstones"] == {"item": 1}
    assert gone not in [row["ids"][0] for _, rows in tasks(packs[2]).values() for row in rows]
    assert gone in [row["ids"][0] for _, rows in tasks(packs[1]).values() for row in rows]  # of older rows
    assert pq.read_table(packs[0].path / "increment/pending/item.parquet")["value"].to_pylist() == ["i8"]
    assert pq.read_table(packs[2].path / "increment/pending/item.parquet")["value"].to_pylist() == []


@pytest.mark.parametrize("least", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_statistics_of_items_that_come_and_go_do_not_grow(tmp_path: Path, least: int) -> None:
    """Ten items a day, each of which lives three days; with a count of 3 some wait for an id when they leave."""
    days = [
        stream({f"u{u}": [10 * day - shift + (u + shift) % 10 for shift in (0, 10, 20)] for u in range(30)}, 100 * day)
        for day in range(11)
    ]
    for day, rows in enumerate(days):
        rows += stream({"u30": [1000 + day]}, 100 * day)
    schema = {**PLAIN, "categorical": [{"name": "item", "min_count": least}], "item_statistics": True}
    packs = make_days(tmp_path, days, schema, first={"min_task_rows": 1}, evict_after_days=2)
    found = [pq.read_table(pack.path / "vocab/item_statistics.parquet").to_pydict() for pack in packs]
    assert [len(one["value"]) for one in found[4:]] == [len(found[4]["value"])] * 7
    last = found[-1]
    waiting = pq.read_table(packs[-1].path / "increment/pending/item.parquet")["value"].to_pylist() if least > 1 else []
    known = {value for value in vocabulary(packs[-1], "item")["value"] if value is not None}
    assert set(last["value"]) == known | set(waiting) | {None}
    assert last["count"][last["value"].index(None)] > 10 * sum(last["count"]) / len(last["count"])  # of all rows ever


def test_tombstones_stand_for_nothing(packs: list[TaskPack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a missing value nor the evicted one has a tombstone's id, whichever way values are looked up."""
    pack = packs[-1]
    tags = vocabulary(pack, "tags")["value"]
    assert tags.count(None) > 1
    evicted = next(v for v in vocabulary(packs[0], "tags")["value"] if v not in tags)
    row = {"user": "x", "item": "i20", "city": "", "tags": f"{evicted}|t9", "price": 1, "click": 1, "at": 1}
    file = write_csv(tmp_path / "rows.csv", [row])
    found = encode_tables(file, file, pack.manifest["data_schema"], pack.path / "vocab", pack.schema)
    assert found.arrays["ids"][:, 1].tolist() == [0, 0]
    assert found.arrays["tags.values"].tolist() == 2 * [0, tags.index("t9") + 1]
    monkeypatch.setattr(encode, "COLUMNS_A_QUERY", 4)  # looked up by Arrow
    words: Row = {"input": [str(packs[0].path.parent / "day3.csv")], "history_rows": HISTORY, "evict_after_days": EVICT}
    prepare(PrepareConfig(out=str(tmp_path / "pack"), base=str(packs[2].path), **words), quiet)
    assert tasks(open_pack(tmp_path / "pack")) == tasks(pack)


def test_tasks_that_a_first_pack_leaves_out_come_back(packs: list[TaskPack], tmp_path: Path) -> None:
    """With their rows of then, at most 50 and the last ones; in the split in which they would have lain."""
    listed = pq.read_table(packs[0].path / "increment/left_out.parquet").to_pydict()
    dropped = packs[0].manifest["counts"]["dropped_tasks"]
    assert len(listed["key"]) == dropped["fewer rows than min_task_rows"] > 3
    assert set(listed["split"]) <= {"train", "valid", "test"}
    bot = {"bot": list(range(70))}  # left out for its length
    first = {"max_task_rows": 60, "min_task_rows": 3}
    days = [
        FIRST + stream(bot | {"two": [1, 2]}),
        stream({"bot": [71], "two": [3]} | {f"u{u}": [9] for u in range(30)}, 99),
    ]
    both = make_days(tmp_path, days, PLAIN, first)
    assert both[0].manifest["counts"]["dropped_tasks"] == {
        "fewer rows than min_task_rows": 1,
        "more rows than max_task_rows": 1,
    }
    found = tasks(both[1])
    scale = both[1].schema.numeric[0]
    prices = {key: [round(row["dense"][0] * scale.std + scale.mean) for row in found[key][1]] for key in ("bot", "two")}
    assert prices == {"bot": [*range(20, 70), 71], "two": [1, 2, 3]}
    split = dict(zip(*pq.read_table(both[0].path / "increment/left_out.parquet").to_pydict().values(), strict=True))
    assert {key: splits(both[1])[key] for key in split} == split


def test_a_first_pack_carries_pending_values_alone(tmp_path: Path) -> None:
    plain, counted = (
        make_days(tmp_path / name, [FIRST], {**PLAIN, "categorical": [{"name": "item", "min_count": least}]})[0]
        for name, least in (("plain", 1), ("counted", 2))
    )
    assert not (plain.path / "increment").exists()
    assert [e["file"] for e in counted.manifest["others"]] == ["increment/pending/item.parquet"]


def test_the_summary_tells_of_the_day(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_days(tmp_path, [FIRST], PLAIN)
    words: Row = {"input": [write_csv(tmp_path / "b.csv", stream({f"u{u}": [7, 8, 9] for u in range(9)}, 9))]}
    print_summary(prepare(PrepareConfig(out=str(tmp_path / "b"), base=str(tmp_path / "pack0"), **words), quiet))
    told = " ".join(capsys.readouterr().out.split())
    for text in ("day 1, new ids: item 3", "price +3.", "the base has no id for: item 100.0%", "mean training label"):
        assert text in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"seed": 3}, "seed is 3, and 0 in base"),
        ({"query_size": 4}, "query_size is 4, and 3 in base"),
        ({"label_threshold": 2.0}, "label_threshold is 2.0, and None in base"),
        ({"dataset": "ml-1m"}, "dataset has no effect with base"),
        ({"input": []}, "name the day's files with --input"),
        ({"base": "nowhere"}, "nowhere is no task pack"),
        ({"schema": "other.yaml"}, "feature 'city' has nulls 'error', the base's has 'oov'"),
        ({"schema": "other.yaml"}, "feature 'shop' is new"),
        ({"schema": "other.yaml"}, "task is 'item', the base's is 'user'"),
    ],
)
def test_other_settings_are_refused(packs: list[TaskPack], tmp_path: Path, words: Row, told: str) -> None:
    other = {**SCHEMA, "task": "item", "categorical": [{"name": "item", "min_count": 3}, "city", "shop"]}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    if "schema" in words:
        words = {"schema": str(tmp_path / words["schema"])}
    given: Row = {"base": str(packs[0].path), "input": [str(packs[0].path.parent / "day1.csv")], **words}
    with pytest.raises(ValueError, match=told):
        prepare(PrepareConfig(out=str(tmp_path / "out"), **given), quiet)
    assert not (tmp_path / "out").exists()


def test_own_settings_may_be_said_again(packs: list[TaskPack], tmp_path: Path) -> None:
    words: Row = {"schema": str(packs[0].path.parent / "schema.yaml"), "query_size": QUERY, "min_task_rows": MIN_ROWS}
    words |= {"input": [str(packs[0].path.parent / "day1.csv")], "history_rows": HISTORY, "evict_after_days": EVICT}
    prepare(PrepareConfig(out=str(tmp_path / "out"), base=str(packs[0].path), **words), quiet)
    assert files(open_pack(tmp_path / "out")) == files(packs[1])


def test_days_that_cannot_go_on_are_refused(packs: list[TaskPack], tmp_path: Path) -> None:
    place = packs[0].path.parent

    def refused(told: str, rows: list[Row] | str, base: TaskPack = packs[2], **words: Any) -> None:
        file = rows if isinstance(rows, str) else write_csv(tmp_path / "day.csv", rows)
        with pytest.raises(ValueError, match=told):
            prepare(PrepareConfig(out=str(tmp_path / "out"), base=str(base.path), input=[file], **words), quiet)
        assert not (tmp_path / "out").exists()

    shutil.copy(place / "day1.csv", tmp_path / "again.csv")
    refused("again.csv was delivered already, with day 1 of base", str(tmp_path / "again.csv"))
    shutil.copy(place / "day0.csv", tmp_path / "first.csv")
    for base in (packs[0], packs[2]):
        refused("first.csv was delivered already, with day 0 of base", str(tmp_path / "first.csv"), base)
    (tmp_path / "none.csv").write_text("user,item,city,tags,price,click,at\n")
    refused("no row that can be used", str(tmp_path / "none.csv"))
    refused("has no column 'city'", [{k: v for k, v in row.items() if k != "city"} for row in DAYS[3]])
    refused("values other than 0 and 1", [dict(row, click=row["click"] * 3) for row in DAYS[3]])
    refused("counts seconds .* but no dates", [dict(row, at=1_700_000_000 + row["at"]) for row in DAYS[3]])
    held_out = next(key for key, split in splits(packs[2]).items() if split == "test")
    refused("no task to train on.*: leave it out", [dict(row, user=held_out) for row in DAYS[3][:8]])
    refused("no task to use .*fewer rows than min_task_rows", [dict(DAYS[3][0], user="somebody")])


def test_times_are_told_in_microseconds(tmp_path: Path) -> None:
    second = 1_700_000_000
    days = [stream({f"u{u}": [1, 2, 3] for u in range(9)}, second + n * 86400) for n in range(2)]
    day = make_days(tmp_path, days, PLAIN)[1].manifest["day"]
    start = (second + 86400) * 10**6
    assert (day["first_time"], day["last_time"]) == (start, start + 2 * 10**6)


def test_a_partition_column_deals_the_days(tmp_path: Path) -> None:
    """The column says where a row lies, and a user drawn as valid stays so. Tasks bring no older rows."""
    schema = {**PLAIN, "partition": "part"}
    days = [
        [
            dict(row, part="test" if int(row["user"][1:]) % 5 == 0 else "train")
            for row in stream({f"u{u}": [1, 2, 3] for u in range(40)}, n)
        ]
        for n in (0, 10)
    ]
    packs = make_days(tmp_path, days, schema, first={"valid_fraction": 0.2})
    assert splits(packs[0]) == splits(packs[1])
    assert set(splits(packs[0]).values()) == {"train", "valid", "test"}
    assert {len(rows) for _, rows in tasks(packs[1]).values()} == {3}


def test_roles_go_on(tmp_path: Path) -> None:
    schema = {**PLAIN, "role": "side"}
    days = [
        [
            dict(row, side="query" if row["item"] == "i3" else "support")
            for row in stream({f"u{u}": [1, 2, 3] for u in range(20)} | {"v": [1, 2, 3 + (n == 0)]}, n)
        ]
        for n in (0, 10)
    ]
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(schema))
    first, pack = make_days(tmp_path, days, schema, first={"query_size": None})
    assert "v" not in tasks(first)  # no row was query
    assert {(support, len(rows)) for support, rows in tasks(pack).values()} == {(5, 6)}
    assert "v" in tasks(pack)


def test_every_kind_of_feature_goes_on(tmp_path: Path) -> None:
    """A table that features share, a hashed one, no time, and more tables than one query takes."""
    columns = [f"c{i}" for i in range(33)]
    schema = {
        "task": "user",
        "label": "y",
        "item": "item",
        "categorical": [{"name": "item", "table": "it", "min_count": 15}, {"name": "dev", "hash_buckets": 5}, *columns],
        "sequence": [{"name": "seen", "separator": " ", "table": "it", "min_count": 15}],
    }
    rng = np.random.default_rng(0)
    days = [
        [
            {
                "user": f"u{user}",
                "item": rng.integers(5 * n, 30 + 5 * n),
                "seen": " ".join(str(i) for i in rng.integers(9 * n, 40 + 9 * n, 3)),
                "dev": f"d{rng.integers(9)}",
                "y": 1000 * n + 10 * user + k,  # names the row
            }
            | {name: f"v{rng.integers(3 + n)}" for name in columns}
            for user in range(5 * n, 30 + 5 * n)
            for k in range(6)
        ]
        for n in range(3)
    ]
    packs = make_days(tmp_path, days, schema, first={"query_size": 2}, evict_after_days=1)
    known = {table: vocabulary(packs[-1], table)["value"] for table in ("it", *columns)}
    assert None in known["it"]
    raw = {row["y"]: row for row in days[-1]}
    encoded = [row for _, rows in tasks(packs[-1]).values() for row in rows if row["label"] >= 2000]
    assert len(encoded) == len(raw)
    unknown = 0
    for row in encoded:
        given = raw[row["label"]]
        pairs = [(known[name], row["ids"][2 + at], given[name]) for at, name in enumerate(columns)]
        pairs += [(known["it"], i, value) for i, value in zip(row["seen"], given["seen"].split(), strict=True)]
        pairs.append((known["it"], row["ids"][0], str(given["item"])))
        for values, i, value in pairs:
            assert values[i - 1] == value if i else value not in values
            unknown += not i
    assert unknown > 0
