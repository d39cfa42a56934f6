"""gmeta prepare against a slow reference in plain Python, and by what it promises of order, ids and splits."""

import csv
import gzip
import hashlib
import json
import math
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from gmeta.config.data import PrepareConfig
from gmeta.data.pack import open_pack, verify_pack
from gmeta.data.prepare import encode
from gmeta.data.prepare.encoder import encode_tables
from gmeta.data.prepare.prepare import prepare, print_summary
from gmeta.data.schema import data_schema_from_json, load_data_schema, parse_data_schema

SCHEMA = {
    "task": "user",
    "label": "rating",
    "time": "at",
    "item": "item",
    "categorical": ["item", {"name": "city", "nulls": "oov"}, {"name": "shop", "hash_buckets": 7}],
    "multi": [{"name": "tags", "separator": "|", "table": "tag"}],
    "sequence": [{"name": "history", "separator": " ", "max_length": 3, "table": "item"}],
    "numeric": [{"name": "price", "log": True}, {"name": "age", "nulls": "mean"}],
}


def quiet(*_: object) -> None:
    """A report that says nothing."""


def make_rows(num_users: int = 40, seed: int = 0) -> list[dict[str, object]]:
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(num_users):
        for _ in range(int(rng.integers(3, 12))):
            rows.append(
                {
                    "user": f"u{user}",
                    "item": int(rng.integers(0, 30)),
                    "city": ["Rome", "Oslo", ""][int(rng.integers(0, 3))],
                    "shop": f"shop {rng.integers(0, 20)}",
                    "tags": "|".join(f"t{t}" for t in rng.integers(0, 9, int(rng.integers(0, 4)))),
                    "history": " ".join(str(i) for i in rng.integers(0, 40, int(rng.integers(0, 6)))),
                    "price": round(float(rng.lognormal()), 3),
                    "age": "" if rng.random() < 0.1 else int(rng.integers(18, 80)),
                    "at": int(rng.integers(0, 50)),
                    "rating": int(rng.integers(1, 6)),
                }
            )
    order = rng.permutation(len(rows))
    return [rows[i] for i in order]


def write_csv(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_schema(path: Path, schema: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump(schema, sort_keys=False))
    return path


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    rows = make_rows()
    (tmp_path / "raw").mkdir()
    write_csv(tmp_path / "raw" / "a.csv", rows[:150])
    write_csv(tmp_path / "raw" / "b.csv", rows[150:])
    schema = write_schema(tmp_path / "schema.yaml", SCHEMA)
    return PrepareConfig(
        out=str(tmp_path / "pack"),
        input=[str(tmp_path / "raw")],
        schema=str(schema),
        query_size=2,
        min_task_rows=4,
        valid_fraction=0.1,
        test_fraction=0.2,
        threads=1,
        memory_limit="300MB",
    )


def read_shards(out: str) -> dict[str, list[dict[str, np.ndarray]]]:
    pack = open_pack(out)
    shards: dict[str, list[dict[str, np.ndarray]]] = defaultdict(list)
    for split, entry in pack.manifest["splits"].items():
        from safetensors.numpy import load_file

        shards[split] += [load_file(pack.path / shard["file"]) for shard in entry["shards"]]
    return shards


def tree_bytes(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def md5_64(*parts: object) -> int:
    return int.from_bytes(hashlib.md5("|".join(map(str, parts)).encode()).digest()[8:], "little")


class Reference:
    """The pack that `config` must give, in plain Python, a task at a time."""

    def __init__(self, rows: list[dict[str, object]], splits: dict[str, str], query_size: int) -> None:
        self.rows, self.query_size = rows, query_size
        self.by_user: dict[str, list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            self.by_user[str(row["user"])].append(i)
        self.train = [r for r in rows if splits.get(str(r["user"])) == "train"]
        items = [str(r["item"]) for r in self.train] + [h for r in self.train for h in self.history(r)]
        self.vocab = {
            "item": self.ids(items),
            "city": self.ids([str(r["city"]) for r in self.train if r["city"] != ""]),
            "tag": self.ids([t for r in self.train for t in self.tags(r)]),
        }
        self.seen = {r["item"] for r in self.train}
        self.moments = [self.moment([math.log(1 + float(str(r["price"]))) for r in self.train])]
        self.moments.append(self.moment([float(str(r["age"])) for r in self.train if r["age"] != ""]))

    @staticmethod
    def history(row: dict[str, object]) -> list[str]:
        return str(row["history"]).split()[-3:]

    @staticmethod
    def tags(row: dict[str, object]) -> list[str]:
        return [t for t in str(row["tags"]).split("|") if t]

    @staticmethod
    def ids(values: list[str]) -> dict[str, int]:
        ranked = sorted(Counter(values).items(), key=lambda kv: (-kv[1], kv[0]))
        return {value: i for i, (value, _) in enumerate(ranked, 1)}

    @staticmethod
    def moment(values: list[float]) -> tuple[float, float]:
        return float(np.mean(values)), float(np.std(values))

    def task(self, user: str) -> list[dict[str, object]]:
        return [self.rows[i] for i in sorted(self.by_user[user], key=lambda i: (int(str(self.rows[i]["at"])), i))]

    def encoded(self, row: dict[str, object]) -> dict[str, object]:
        (price, price_std), (age, age_std) = self.moments
        return {
            "ids": [
                self.vocab["item"].get(str(row["item"]), 0),
                self.vocab["city"].get(str(row["city"]), 0),
                1 + md5_64(0, "shop", row["shop"]) % 7,
            ],
            "tags": [self.vocab["tag"].get(t, 0) for t in self.tags(row)],
            "history": [self.vocab["item"].get(h, 0) for h in self.history(row)],
            "dense": [
                (math.log(1 + float(str(row["price"]))) - price) / price_std,
                0.0 if row["age"] == "" else (float(str(row["age"])) - age) / age_std,
            ],
            "cold": row["item"] not in self.seen,
        }


def test_pack_equals_the_reference(config: PrepareConfig):
    summary = prepare(config, quiet)
    verify_pack(config.out)
    pack = open_pack(config.out)
    tasks = pq.read_table(pack.tasks_file()).to_pydict()
    key = dict(zip(tasks["task_id"], tasks["key"], strict=True))
    reference = Reference(make_rows(), dict(zip(tasks["key"], tasks["split"], strict=True)), 2)
    sizes = {u: len(i) for u, i in reference.by_user.items()}
    assert sorted(key.values()) == sorted(u for u, n in sizes.items() if n >= 4)
    assert summary["dropped_tasks"] == {"fewer rows than min_task_rows": sum(n < 4 for n in sizes.values())}
    assert list(key) == list(range(len(key)))
    for table, ids in reference.vocab.items():
        found = pq.read_table(pack.vocab_file(table)).to_pydict()
        assert dict(zip(found["value"], found["id"], strict=True)) == ids
    for shards in read_shards(config.out).values():
        for shard in shards:
            check_shard(shard, key, reference)
    cold = summary["splits"]["test"]["cold_item_rows"]
    assert set(summary["splits"]) == {"train", "valid", "test"}
    assert summary["splits"]["train"]["cold_item_rows"] == 0
    assert 0 <= cold < 1


def check_shard(shard: dict[str, np.ndarray], key: dict[int, str], reference: Reference) -> None:
    row = 0
    for task_id, start, support in zip(shard["task_id"], shard["row_start"], shard["num_support"], strict=True):
        rows = reference.task(key[int(task_id)])
        assert (start, support) == (row, len(rows) - reference.query_size)
        for raw in rows:
            want = reference.encoded(raw)
            assert shard["ids"][row].tolist() == want["ids"]
            for name in ("tags", "history"):
                a, b = shard[f"{name}.offsets"][row : row + 2]
                assert shard[f"{name}.values"][a:b].tolist() == want[name]
            np.testing.assert_allclose(shard["dense"][row], want["dense"], rtol=1e-5, atol=1e-6)
            assert shard["label"][row] == raw["rating"]
            assert shard["time"][row] == raw["at"]
            assert shard["item_cold"][row] == want["cold"]
            row += 1
    assert row == len(shard["label"])


def test_bytes_depend_on_neither_threads_nor_memory(config: PrepareConfig, tmp_path: Path):
    prepare(config, quiet)
    again = replace(config, out=str(tmp_path / "again"), threads=2, memory_limit="1GB")
    prepare(again, quiet)
    first, second = tree_bytes(Path(config.out)), tree_bytes(Path(again.out))
    assert first == second
    assert any(name.endswith(".safetensors") for name in first)
    other = replace(config, out=str(tmp_path / "other"), seed=1)
    prepare(other, quiet)
    assert tree_bytes(Path(other.out)) != first
    assert not [p for p in tmp_path.iterdir() if p.name.endswith((".scratch", ".partial"))]


@pytest.mark.parametrize("split_query", ["last", "random"])
def test_ids_looked_up_in_memory_are_those_of_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split_query: str):
    rows = make_rows(30)
    columns: dict[str, pa.Array] = {
        name: pa.array([r[name] for r in rows]) for name in ("user", "item", "at", "rating")
    }
    rng = np.random.default_rng(1)
    for i in range(12):  # whole numbers of three widths, and text; some missing, some rare
        drawn = rng.integers(0, 40, len(rows))
        values = [None if v == 0 else f"v{v}" if i % 4 == 3 else int(v) for v in drawn]
        columns[f"c{i}"] = pa.array(values, [pa.int32(), pa.int64(), pa.float64(), pa.string()][i % 4])
    columns["none"] = pa.nulls(len(rows), pa.string())
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    shared = [{"name": f"c{i}", "nulls": "oov", "min_count": 2, "table": "shared"} for i in (0, 8)]
    features = [{"name": f"c{i}", "nulls": "oov", "min_count": 1 + i % 3} for i in range(1, 12) if i != 8]
    none = {"name": "none", "nulls": "oov"}
    schema = {"task": "user", "label": "rating", "time": "at", "item": "item", "item_statistics": True}
    schema |= {"categorical": ["item", none, *shared, *features]}
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(schema))
    found = []
    for cells in (0, 1 << 20):
        monkeypatch.setattr(encode, "_CELLS_IN_MEMORY", cells)
        config = PrepareConfig(
            input=[str(tmp_path / "log.parquet")],
            schema=str(tmp_path / "schema.yaml"),
            out=str(tmp_path / f"pack{cells}"),
            split_query=split_query,
            query_size=2,
        )
        prepare(config, quiet)
        found.append(tree_bytes(Path(config.out)))
    assert found[0] == found[1]


def test_csv_and_parquet_give_the_same_shards(config: PrepareConfig, tmp_path: Path):
    rows = make_rows()
    table = pa.table(
        {
            **{k: pa.array([r[k] for r in rows]) for k in ("user", "item", "shop", "price", "at", "rating")},
            "city": pa.array([r["city"] or None for r in rows]),
            "tags": pa.array([Reference.tags(r) for r in rows]),
            "history": pa.array([[int(h) for h in str(r["history"]).split()] for r in rows]),
            "age": pa.array([None if r["age"] == "" else r["age"] for r in rows], pa.float64()),
        }
    )
    (tmp_path / "parquet").mkdir()
    pq.write_table(table.slice(0, 150), tmp_path / "parquet" / "a.parquet", row_group_size=40)
    pq.write_table(table.slice(150), tmp_path / "parquet" / "b.parquet", row_group_size=40)
    prepare(config, quiet)
    other = replace(config, input=[str(tmp_path / "parquet" / "*.parquet")], out=str(tmp_path / "other"))
    prepare(other, quiet)
    ours, theirs = tree_bytes(Path(config.out)), tree_bytes(Path(other.out))
    assert {k: v for k, v in ours.items() if k != "manifest.json"} == {
        k: v for k, v in theirs.items() if k != "manifest.json"
    }


@pytest.mark.parametrize("second", [pa.int64(), pa.uint32(), pa.float64(), pa.string()])
def test_whole_numbers_of_any_width_and_text_are_one_id(tmp_path: Path, second: pa.DataType):
    """Whole numbers stay numbers where all files hold such, and become text where one does not."""
    rows = large_rows(12, 4)
    config = simple(tmp_path, rows, SIMPLE)
    prepare(config, quiet)
    (tmp_path / "parquet").mkdir()
    for name, part, kind in (("a", rows[:20], pa.int32()), ("b", rows[20:], second)):
        columns = {k: pa.array([r[k] for r in part]) for k in ("at", "rating")}
        ids = {k: pa.array([str(r[k]) if pa.types.is_string(kind) else r[k] for r in part]) for k in ("user", "item")}
        ids = {k: array.cast(kind) for k, array in ids.items()}
        pq.write_table(pa.table(columns | ids), tmp_path / "parquet" / f"{name}.parquet")
    other = replace(config, input=[str(tmp_path / "parquet")], out=str(tmp_path / "other"))
    prepare(other, quiet)
    ours, theirs = tree_bytes(Path(config.out)), tree_bytes(Path(other.out))
    assert {k for k in ours if ours[k] != theirs[k]} == {"manifest.json"}


def large_rows(num_users: int, rows: int) -> list[dict[str, object]]:
    return [
        {"user": u, "item": (u * 7 + r) % 50, "at": 100 * u + r, "rating": (u + r) % 2, "part": "ab"[u % 2]}
        for u in range(num_users)
        for r in range(rows)
    ]


SIMPLE = {"task": "user", "label": "rating", "time": "at", "item": "item", "categorical": ["item"]}


def simple(
    tmp_path: Path, rows: list[dict[str, object]], schema: dict[str, object], **settings: object
) -> PrepareConfig:
    file = write_csv(tmp_path / "rows.csv", rows)
    values: dict[str, object] = {"query_size": 2, "threads": 1, "memory_limit": "300MB", **settings}
    path = write_schema(tmp_path / "schema.yaml", schema)
    return PrepareConfig(out=str(tmp_path / "pack"), input=[str(file)], schema=str(path), **values)  # type: ignore[arg-type]


def test_shards_are_cut_evenly_and_tasks_stay_whole(tmp_path: Path):
    config = simple(tmp_path, large_rows(3000, 40), SIMPLE, shard_mb=1)
    prepare(config, quiet)
    shards = read_shards(config.out)
    sizes = [len(s["label"]) for s in shards["train"]]
    assert len(sizes) == 2
    assert max(sizes) - min(sizes) <= 80
    ids = np.concatenate([s["task_id"] for split in ("train", "valid", "test") for s in shards[split]])
    assert ids.tolist() == list(range(3000))
    assert all(
        (np.diff(s["row_start"], append=len(s["label"])) == 40).all() for split in shards.values() for s in split
    )


def splits_of(out: str) -> dict[str, str]:
    tasks = pq.read_table(Path(out) / "tasks.parquet").to_pydict()
    return dict(zip(tasks["key"], tasks["split"], strict=True))


def test_time_split_tests_on_those_who_came_last(tmp_path: Path):
    prepare(
        config := simple(
            tmp_path, large_rows(20, 5), SIMPLE, task_split="time", valid_fraction=0.1, test_fraction=0.25
        ),
        quiet,
    )
    splits = splits_of(config.out)
    assert {u for u, s in splits.items() if s == "test"} == {str(u) for u in range(15, 20)}
    assert {u for u, s in splits.items() if s == "valid"} == {"13", "14"}


def test_user_split_holds_out_exact_shares(tmp_path: Path):
    prepare(config := simple(tmp_path, large_rows(50, 5), SIMPLE, valid_fraction=0.1, test_fraction=0.2), quiet)
    assert Counter(splits_of(config.out).values()) == {"train": 35, "valid": 5, "test": 10}


def test_partition_column_makes_a_task_of_each_user_and_partition(tmp_path: Path):
    rows = large_rows(30, 4)
    rows += [{**row, "part": "c", "at": 10_000 + i} for i, row in enumerate(rows)]
    schema = {**SIMPLE, "partition": "part"}
    config = simple(tmp_path, rows, schema, partitions={"a": "train", "c": "test"}, valid_fraction=0.2)
    summary = prepare(config, quiet)
    tasks = pq.read_table(Path(config.out) / "tasks.parquet").to_pydict()
    by_split = {
        s: [k for k, v in zip(tasks["key"], tasks["split"], strict=True) if v == s] for s in ("train", "valid", "test")
    }
    assert {s: len(v) for s, v in by_split.items()} == {"train": 12, "valid": 3, "test": 30}
    assert summary["dropped_tasks"] == {"partition b is not in partitions": 15}
    assert summary["splits"]["test"]["cold_tasks"] == pytest.approx(1 - 12 / 30)
    assert not set(by_split["train"]) & set(by_split["valid"])


def test_of_a_wrong_partition_column_a_few_values_are_named(tmp_path: Path):
    rows = [{**row, "part": f"value {i}" * 20} for i, row in enumerate(large_rows(30, 4))]
    with pytest.raises(ValueError, match=r"115 left out: partition .one of 115 others. is not in partitions") as caught:
        prepare(simple(tmp_path, rows, {**SIMPLE, "partition": "part"}), quiet)
    assert "partitions names 'train', 'valid', 'test'" in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_partitions_called_like_the_splits_need_no_mapping(tmp_path: Path):
    rows = [{**r, "part": ("train", "train", "valid", "test")[int(str(r["user"])) % 4]} for r in large_rows(20, 4)]
    prepare(config := simple(tmp_path, rows, {**SIMPLE, "partition": "part"}), quiet)
    assert Counter(splits_of(config.out).values()) == {"train": 10, "valid": 5, "test": 5}


def test_partitions_may_be_numbers(tmp_path: Path):
    rows: list[dict[str, object]] = [{**r, "part": int(str(r["user"])) % 3 % 2} for r in large_rows(21, 4)]
    config = simple(tmp_path, rows, {**SIMPLE, "partition": "part"}, partitions={0: "train", 1: "test"})
    prepare(config, quiet)
    assert Counter(splits_of(config.out).values()) == {"train": 13, "valid": 1, "test": 7}


@pytest.mark.parametrize("kind", ["crlf", "bom", "gz", "tsv", "quoted"])
def test_dialects_of_csv_give_the_same_rows(tmp_path: Path, kind: str):
    config = simple(tmp_path, large_rows(12, 4), SIMPLE)
    text = (tmp_path / "rows.csv").read_text().replace("\r\n", "\n")
    (tmp_path / "rows.csv").write_text(text)
    prepare(config, quiet)
    other = tmp_path / {"gz": "b.csv.gz", "tsv": "b.tsv"}.get(kind, "b.csv")
    lines = [",".join(f'"{v}"' for v in line.split(",")) for line in text.splitlines()]
    data = {
        "crlf": text.replace("\n", "\r\n").encode(),
        "bom": text.encode("utf-8-sig"),
        "gz": gzip.compress(text.encode()),
        "tsv": text.replace(",", "\t").encode(),
        "quoted": "\n".join(lines).encode(),
    }
    other.write_bytes(data[kind])
    again = replace(config, input=[str(other)], out=str(tmp_path / "again"))
    prepare(again, quiet)
    ours, theirs = tree_bytes(Path(config.out)), tree_bytes(Path(again.out))
    assert {k for k in ours if ours[k] != theirs[k]} == {"manifest.json"}


def test_random_query_is_a_seeded_draw_with_rows_in_time_order(tmp_path: Path):
    config = simple(tmp_path, large_rows(40, 10), SIMPLE, split_query="random", query_size=3)
    prepare(config, quiet)
    chosen = Counter()
    for shard in read_shards(config.out)["train"]:
        for start, support in zip(shard["row_start"], shard["num_support"], strict=True):
            times = shard["time"][start : start + 10]
            assert support == 7
            assert (np.diff(times[:7]) > 0).all()
            assert (np.diff(times[7:]) > 0).all()
            chosen.update((times[7:] % 10).tolist())
    assert len(chosen) == 10
    assert max(chosen.values()) < 25


def test_ratio_and_limits_count_what_is_left_out(tmp_path: Path):
    rows = [r for u in range(12) for r in large_rows(12, u + 1) if r["user"] == u]
    config = simple(tmp_path, rows, SIMPLE, query_size=None, query_ratio=0.2, max_task_rows=10)
    summary = prepare(config, quiet)
    assert summary["dropped_tasks"] == {"more rows than max_task_rows": 2}
    assert summary["dropped_rows"] == {"more rows than max_task_rows": 23}
    assert sum(s["tasks"] for s in summary["splits"].values()) == 10
    assert sides_of(config.out) == {
        u + 1: (u + 1 - max(1, round(0.2 * (u + 1))), max(1, round(0.2 * (u + 1)))) for u in range(10)
    }


def sides_of(out: str) -> dict[int, tuple[int, int]]:
    """Rows of a task -> its support and query rows."""
    sides = {}
    for shards in read_shards(out).values():
        for shard in shards:
            sizes = np.diff(shard["row_start"], append=len(shard["label"]))
            sides |= {int(n): (int(s), int(n - s)) for n, s in zip(sizes, shard["num_support"], strict=True)}
    return sides


def growing_rows(most: int) -> list[dict[str, object]]:
    """Users of 1, 2, … rows."""
    return [row for u in range(most) for row in large_rows(most, u + 1) if row["user"] == u]


@pytest.mark.parametrize("split_query", ["last", "random"])
def test_a_task_too_small_for_the_usual_cut_keeps_a_row_of_each_side(tmp_path: Path, split_query: str):
    config = simple(tmp_path, growing_rows(14), SIMPLE, query_size=None, split_query=split_query)
    summary = prepare(config, quiet)
    assert summary["dropped_tasks"] == {}
    small = {n: (0, 1) if n == 1 else (1, n - 1) for n in range(1, 11)}
    assert sides_of(config.out) == {**small, **{n: (n - 10, 10) for n in range(11, 15)}}
    assert list(summary["small_tasks"].values()) == [9, 1]
    assert "left_out" not in summary


def test_a_ratio_near_one_keeps_a_support_row(tmp_path: Path):
    prepare(config := simple(tmp_path, growing_rows(6), SIMPLE, query_size=None, query_ratio=0.99), quiet)
    assert sides_of(config.out) == {1: (0, 1), 2: (1, 1), 3: (1, 2), 4: (1, 3), 5: (1, 4), 6: (1, 5)}


@pytest.mark.parametrize("task_split", ["user", "time", "column"])
def test_what_is_left_out_is_counted_by_the_split_it_would_lie_in(tmp_path: Path, task_split: str):
    rows = [
        {**r, "at": 100 * (i := int(str(r["user"]))) + int(str(r["at"])) % 100, "part": "train" if i % 2 else "test"}
        for r in growing_rows(40)
    ]
    settings = {"min_task_rows": 6, "max_task_rows": 35, "task_split": task_split}
    summary = prepare(simple(tmp_path, rows, {**SIMPLE, "partition": "part"}, **settings), quiet)
    sums = Counter[str]()
    for of_split in summary["left_out"].values():
        sums.update({reason: tasks for reason, (tasks, _) in of_split.items()})
    assert sums == summary["dropped_tasks"] == {"fewer rows than min_task_rows": 5, "more rows than max_task_rows": 5}
    short, long = summary["dropped_tasks"]
    if task_split == "time":  # the longest came last: all of them after the first test task that is kept
        assert summary["left_out"]["test"] == {long: [5, 36 + 37 + 38 + 39 + 40]}
        assert summary["left_out"]["train"] == {short: [5, 15]}
    if task_split == "column":
        assert summary["left_out"]["test"] == {short: [3, 1 + 3 + 5], long: [2, 37 + 39]}


def test_threshold_and_min_count(tmp_path: Path):
    rows = large_rows(20, 5)
    rows[0]["item"] = "rare"
    schema = {**SIMPLE, "categorical": [{"name": "item", "min_count": 2}], "item": None}
    config = simple(tmp_path, rows, schema, label_threshold=1.0, valid_fraction=0.0, test_fraction=0.0)
    prepare(config, quiet)
    pack = open_pack(config.out)
    assert pack.schema.binary_label
    assert pack.manifest["data_schema"]["label_threshold"] == 1.0
    vocabulary = pq.read_table(pack.vocab_file("item")).to_pydict()
    assert "rare" not in vocabulary["value"]
    assert min(vocabulary["count"]) >= 2
    assert sum((s["ids"] == 0).sum() for s in read_shards(config.out)["train"]) >= 1


def test_item_statistics_leave_a_training_rows_own_fold_out(tmp_path: Path):
    rng = np.random.default_rng(0)
    rows = [
        {"user": u, "item": int(rng.integers(5)), "at": r, "rating": int(rng.integers(1, 6))}
        for u in range(60)
        for r in range(6)
    ]
    config = simple(tmp_path, rows, {**SIMPLE, "item_statistics": True})
    prepare(config, quiet)
    pack = open_pack(config.out)
    tasks = pq.read_table(pack.tasks_file()).to_pydict()
    key = dict(zip(tasks["task_id"], tasks["key"], strict=True))
    split = dict(zip(tasks["key"], tasks["split"], strict=True))
    fold = {u: md5_64("fold", 0, u) % 10 for u in key.values()}
    train = [(r["item"], r["rating"], fold[str(r["user"])]) for r in rows if split[str(r["user"])] == "train"]
    mean = np.mean([y for _, y, _ in train])
    vocab = pq.read_table(pack.vocab_file("item")).to_pydict()
    item_of = dict(zip(vocab["id"], vocab["value"], strict=True))
    stats = pack.schema.numeric
    assert [c.name for c in stats] == ["item_mean", "item_log_count"]
    for name, shards in read_shards(config.out).items():
        for shard in shards:
            sizes = np.diff(shard["row_start"], append=len(shard["label"]))
            for row, task in enumerate(np.repeat(shard["task_id"], sizes)):
                item, left_out = (
                    int(item_of[int(shard["ids"][row, 0])]),
                    fold[key[int(task)]] if name == "train" else None,
                )
                labels = [y for i, y, f in train if i == item and f != left_out]
                want = [
                    (sum(labels) + 10 * mean) / (len(labels) + 10),
                    math.log(1 + len(labels) * (10 / 9 if name == "train" else 1)),
                ]
                raw = shard["dense"][row] * [c.std for c in stats] + [c.mean for c in stats]
                np.testing.assert_allclose(raw, want, rtol=1e-5)


def test_predict_encodes_as_prepare_did(config: PrepareConfig, tmp_path: Path):
    prepare(config, quiet)
    pack = open_pack(config.out)
    tasks = pq.read_table(pack.tasks_file()).to_pydict()
    reference = Reference(make_rows(), dict(zip(tasks["key"], tasks["split"], strict=True)), 2)
    users = [k for k, s in zip(tasks["key"], tasks["split"], strict=True) if s == "test"]
    support = [r for u in users for r in reference.task(u)[:-2]]
    query = [{k: v for k, v in r.items() if k not in ("rating", "at")} for u in users for r in reference.task(u)[-2:]]
    query = [*query[::-1], {**query[0], "user": "stranger"}]
    encoded = encode_tables(
        str(write_csv(tmp_path / "support.csv", support)),
        str(write_csv(tmp_path / "query.csv", query)),
        pack.manifest["data_schema"],
        pack.path / "vocab",
        pack.schema,
    )
    assert encoded.keys == [*users[::-1], "stranger"]
    arrays = encoded.arrays
    assert arrays["num_support"].tolist()[-1] == 0
    ends = [*arrays["row_start"][1:], len(arrays["label"])]
    for user, start, end, num in zip(encoded.keys[:-1], arrays["row_start"], ends, arrays["num_support"], strict=False):
        rows = reference.task(user)
        assert num == len(rows) - 2
        at = encoded.query_row[start:end]
        assert (at[:num] == -1).all()
        raw = [*rows[:-2], *(query[i] for i in at[num:])]
        for row, r in zip(range(start, end), raw, strict=True):
            want = reference.encoded(r)
            assert arrays["ids"][row].tolist() == want["ids"]
            np.testing.assert_allclose(arrays["dense"][row], want["dense"], rtol=1e-5, atol=1e-6)
            a, b = arrays["history.offsets"][row : row + 2]
            assert arrays["history.values"][a:b].tolist() == want["history"]
        assert arrays["label"][start : start + num].tolist() == [r["rating"] for r in rows[:-2]]


def test_a_number_far_outside_the_training_rows_is_the_largest_there_is(tmp_path: Path):
    rows: list[dict[str, object]] = [{**row, "x": 0.001 * (i % 3 - 1)} for i, row in enumerate(large_rows(30, 6))]
    config = simple(tmp_path, rows, {**SIMPLE, "numeric": ["x"]}, task_split="time")
    last = max(rows, key=lambda row: int(str(row["at"])))
    last["x"] = -3e38
    write_csv(Path(config.inputs[0]), rows)
    prepare(config, quiet)
    largest = float(np.finfo(np.float32).max)
    assert min(float(shard["dense"].min()) for shard in read_shards(config.out)["test"]) == -largest
    pack = open_pack(config.out)
    file = str(write_csv(tmp_path / "rows.csv", [{**rows[0], "x": x} for x in (3e38, -3e38, 0)]))
    encoded = encode_tables(file, file, pack.manifest["data_schema"], pack.path / "vocab", pack.schema)
    assert encoded.arrays["dense"][:2, 0].tolist() == [largest, -largest]


def test_a_table_may_be_called_like_a_role(tmp_path: Path):
    rows: list[dict[str, object]] = [{**row, "city": f"city {i % 3}"} for i, row in enumerate(large_rows(30, 6))]
    schema = {**SIMPLE, "categorical": [{"name": "city", "table": "role task"}]}
    config = simple(tmp_path, rows, schema)
    kinds = [pa.int64() if name in ("user", "at") else None for name in rows[0]]
    columns = [pa.array([row[name] for row in rows], kind) for name, kind in zip(rows[0], kinds, strict=True)]
    pq.write_table(pa.table(columns, list(rows[0])), tmp_path / "rows.parquet")
    assert prepare(replace(config, input=str(tmp_path / "rows.parquet")), quiet)["vocab"] == {"role task": 4}


def test_names_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows: list[dict[str, object]] = [{**row, "rate[/s]": 1, ":bug: [bold]": 1} for row in large_rows(30, 6)]
    schema = {**SIMPLE, "categorical": ["rate[/s]", ":bug: [bold]"]}
    print_summary(prepare(simple(tmp_path, rows, schema), quiet))
    printed = capsys.readouterr().out
    assert "small:" not in printed
    assert "rate[/s] 2, :bug: [bold] 2" in printed


def test_predict_knows_the_item_statistics(tmp_path: Path):
    rows = large_rows(30, 6)
    config = simple(tmp_path, rows, {**SIMPLE, "item_statistics": True})
    prepare(config, quiet)
    pack = open_pack(config.out)
    (shard,) = read_shards(config.out)["test"]
    tasks = pq.read_table(pack.tasks_file()).to_pydict()
    users = [k for k, s in zip(tasks["key"], tasks["split"], strict=True) if s == "test"]
    of_user = {u: [r for r in rows if str(r["user"]) == u] for u in users}
    support = write_csv(tmp_path / "support.csv", [r for u in users for r in of_user[u][:4]])
    query = write_csv(tmp_path / "query.csv", [r for u in users for r in of_user[u][4:]])
    schema = pack.manifest["data_schema"]
    encoded = encode_tables(str(support), str(query), schema, pack.path / "vocab", pack.schema)
    assert encoded.keys == users
    for name in ("ids", "dense", "row_start", "num_support"):
        np.testing.assert_array_equal(encoded.arrays[name], shard[name])
    with pytest.raises(ValueError, match="stands for 2 files"):
        encode_tables(str(support), str(tmp_path / "[qs]*.csv"), schema, pack.path / "vocab", pack.schema)


def test_rows_of_a_large_csv_keep_their_number_and_order(tmp_path: Path):
    rows = [{"user": i % 2, "item": i % 3, "at": 5, "rating": i} for i in range(40_000)]
    config = simple(tmp_path, rows, SIMPLE, valid_fraction=0.0, test_fraction=0.0, threads=2)
    prepare(config, quiet)
    (shard,) = read_shards(config.out)["train"]
    assert sorted(shard["label"].tolist()) == list(range(40_000))
    assert all((np.diff(shard["label"][a : a + 20_000]) == 2).all() for a in shard["row_start"])


def test_dates_are_times(tmp_path: Path):
    rows = [{**r, "at": f"2024-01-{1 + int(str(r['at'])) % 100:02d} 10:00:00"} for r in large_rows(6, 4)]
    prepare(config := simple(tmp_path, rows, SIMPLE), quiet)
    (shard,) = read_shards(config.out)["train"]
    assert shard["time"][:2].tolist() == [1_704_103_200_000_000, 1_704_189_600_000_000]


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("name", ["schema-ads", "schema-clicks", "schema-ratings"])
def test_example_schemas_are_valid_and_survive_json(name: str):
    schema = load_data_schema(EXAMPLES / f"{name}.yaml")
    assert data_schema_from_json(json.loads(json.dumps(schema.to_json()))) == schema


def test_documented_schema_is_valid():
    text = (EXAMPLES.parent / "docs" / "data.md").read_text()
    schema = parse_data_schema(yaml.safe_load(text.split("```yaml")[1].split("```")[0]))
    names = ["gender", "item_id", "device", "shop", "title", "genres", "last_items", "last_shops"]
    assert [f.name for f in schema.features] == names
