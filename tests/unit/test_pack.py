"""The task pack: what is written is what is read, by a slow per-task reading of the same rows."""

from __future__ import annotations

import gc
import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_packs import Row, Task, arrays_of, random_tasks, schema, write_pack

from gmeta.core.batch import Examples
from gmeta.data.layout import checksum_file
from gmeta.data.pack import PackWriter, open_pack, save_file, verify_pack
from gmeta.data.schema import PackSchema


def assert_side(side: Examples, of: PackSchema, expected: list[list[tuple[int, Row]]]) -> None:
    """`side` holds exactly these (row number, row) lists, one a task, padded to the longest."""
    T, S = len(expected), max((len(rows) for rows in expected), default=0)
    one = [f.name for f in of.features if f.kind == "categorical"]
    many = [f.name for f in of.features if f.kind != "categorical"]
    assert side.mask.shape == (T, S)
    assert side.dense.shape == (T, S, len(of.numeric))
    assert set(side.ids) == set(one)
    assert set(side.bags) == set(many)
    dtypes = {side.mask.dtype, side.item_cold.dtype}, {side.label.dtype, side.dense.dtype}, {side.row.dtype}
    assert dtypes == ({torch.bool}, {torch.float32}, {torch.int64})
    for t, rows in enumerate(expected):
        for s in range(S):
            number, row = (
                rows[s] if s < len(rows) else (-1, Row([0] * len(one), [[]] * len(many), [0.0] * 9, 0.0, False))
            )
            assert bool(side.mask[t, s]) == (s < len(rows))
            assert int(side.row[t, s]) == number
            assert [int(side.ids[name][t, s]) for name in one] == row.ids
            assert side.dense[t, s].tolist() == row.dense[: len(of.numeric)]
            assert float(side.label[t, s]) == row.label
            assert bool(side.item_cold[t, s]) == row.item_cold
    for j, name in enumerate(many):
        bag = side.bags[name]
        assert bag.values.dtype == bag.lengths.dtype == torch.int64
        assert bag.values.tolist() == [v for rows in expected for _, row in rows for v in row.bags[j]]
        lengths = [[len(rows[s][1].bags[j]) if s < len(rows) else 0 for s in range(S)] for rows in expected]
        assert bag.lengths.tolist() == lengths or T * S == 0


def test_a_shard_is_the_file_that_safetensors_writes(tmp_path: Path) -> None:
    of = schema(2, 1, 3, True)
    arrays = arrays_of(of, random_tasks(np.random.default_rng(0), of, 50))
    arrays |= {'naïve " \\ \n name.values': np.zeros(0, np.int32), "large": np.arange(700_000, dtype=np.int32).T}
    arrays["dense"] = np.asfortranarray(arrays["dense"])
    checksum = save_file(arrays, tmp_path / "ours")
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert checksum == checksum_file(tmp_path / "theirs")


def numbered(tasks: list[Task]) -> list[list[tuple[int, Row]]]:
    number = iter(range(10**9))
    return [[(next(number), row) for row in task.rows] for task in tasks]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    one=st.integers(0, 2),
    many=st.integers(0, 2),
    numeric=st.integers(0, 2),
    time=st.booleans(),
    shards=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    asked=st.integers(0, 9),
)
def test_examples_are_the_rows_written(seed, one, many, numeric, time, shards, asked) -> None:
    rng = np.random.default_rng(seed)
    of = schema(one, many, numeric, time)
    tasks = random_tasks(rng, of, sum(shards), first_id=7)
    cuts = np.cumsum([0, *shards])
    with TemporaryDirectory() as directory:
        parts = [("valid", tasks[a:b]) for a, b in pairwise(cuts)]
        split = open_pack(write_pack(Path(directory) / "pack", of, parts)).split("valid")
        wanted = rng.integers(0, len(tasks), asked)
        support, query, task_id = split.examples(wanted)
    rows = numbered(tasks)
    assert task_id.tolist() == [tasks[i].task_id for i in wanted]
    assert_side(support, of, [rows[i][: tasks[i].num_support] for i in wanted])
    assert_side(query, of, [rows[i][tasks[i].num_support :] for i in wanted])


@pytest.fixture
def tasks() -> list[Task]:
    return random_tasks(np.random.default_rng(3), schema(), 30, max_rows=9)


@pytest.fixture
def pack(tmp_path: Path, tasks: list[Task]) -> Path:
    return write_pack(
        tmp_path / "pack", schema(), [("train", tasks[:12]), ("test", tasks[20:]), ("train", tasks[12:20])]
    )


def test_splits_and_counts(pack: Path, tasks: list[Task]) -> None:
    opened = open_pack(pack)
    assert opened.splits == ("train", "test")
    assert replace(opened.schema, identity=None) == schema()
    assert opened.manifest["counts"] == {"dropped": 3}
    assert opened.manifest["settings"] == {"a": 2, "b": 1}
    train = opened.split("train")
    assert (train.name, train.num_tasks, train.num_rows) == ("train", 20, sum(len(t.rows) for t in tasks[:20]))
    assert opened.manifest["splits"]["train"]["rows"] == train.num_rows
    assert train.task_id.tolist() == [t.task_id for t in tasks[:20]]
    assert train.num_support.tolist() == [t.num_support for t in tasks[:20]]
    assert train.num_task_rows.tolist() == [len(t.rows) for t in tasks[:20]]
    num_support, num_query = train.sizes(np.array([19, 0, 12]))
    assert num_support.tolist() == [tasks[i].num_support for i in (19, 0, 12)]
    assert (num_support + num_query).tolist() == [len(tasks[i].rows) for i in (19, 0, 12)]
    with pytest.raises(ValueError, match="no tasks in split 'valid'; it has: train, test"):
        opened.split("valid")
    with pytest.raises(IndexError, match="20"):
        train.examples(np.array([20]))


def test_columns_agree_with_the_rows(pack: Path, tasks: list[Task]) -> None:
    columns = open_pack(pack).split("train").columns(["f1"])
    rows = [(t, i >= task.num_support, row) for t, task in enumerate(tasks[:20]) for i, row in enumerate(task.rows)]
    assert columns.task.tolist() == [t for t, _, _ in rows]
    assert columns.is_query.tolist() == [q for _, q, _ in rows]
    assert columns.label.tolist() == [row.label for _, _, row in rows]
    assert columns.item_cold.tolist() == [row.item_cold for _, _, row in rows]
    assert columns.ids["f1"].tolist() == [row.ids[1] for _, _, row in rows]
    with pytest.raises(ValueError, match="'f2' is no one-valued feature of the pack; those are: f0, f1"):
        open_pack(pack).split("train").columns(["f2"])


def test_vocab_and_tasks_files(pack: Path) -> None:
    opened = open_pack(pack)
    vocab = pq.read_table(opened.vocab_file("f0")).to_pydict()
    assert vocab["value"][:2] == ["v1", "v2"]
    assert vocab["id"] == list(range(1, 50))
    assert vocab["count"] == list(range(49))
    listed = pq.read_table(opened.tasks_file()).to_pydict()
    assert (listed["task_id"][-1], listed["key"][-1], listed["split"][-1]) == (19, "u19", "train")
    with pytest.raises(ValueError, match="no vocabulary 'nope'"):
        opened.vocab_file("nope")


def test_redraw_keeps_sizes_and_rows_and_is_a_function(pack: Path, tasks: list[Task]) -> None:
    split = open_pack(pack).split("train")
    rows = numbered(tasks[:20])
    everything = np.arange(20)
    draws = []
    for epoch in (0, 1, 0):
        support, query, _ = split.examples(everything, redraw=(5, epoch))
        for side in (support, query):
            chosen = [[int(r) for r in line if r >= 0] for line in side.row]
            of_task = [dict(task_rows) for task_rows in rows]
            assert_side(side, schema(), [[(r, of_task[t][r]) for r in line] for t, line in enumerate(chosen)])
        sides = [
            sorted([*s[s >= 0].tolist(), *q[q >= 0].tolist()]) for s, q in zip(support.row, query.row, strict=True)
        ]
        assert sides == [[n for n, _ in task_rows] for task_rows in rows]
        assert support.mask.sum(1).tolist() == [t.num_support for t in tasks[:20]]
        draws.append(support.row)
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
    # A task's draw depends on neither the other tasks asked for, nor their order.
    alone, _, _ = split.examples(np.array([13]), redraw=(5, 0))
    assert alone.row[0].tolist() == [r for r in draws[0][13].tolist() if r >= 0]


def test_redraw_gives_every_row_its_share(tmp_path: Path) -> None:
    task = Task(0, 3, random_tasks(np.random.default_rng(0), schema(), 1)[0].rows * 12)
    task.rows = task.rows[:6]
    split = open_pack(write_pack(tmp_path / "pack", schema(), [("train", [task])])).split("train")
    counts = np.zeros(6)
    for epoch in range(400):
        counts[split.examples(np.array([0]), redraw=(1, epoch))[0].row[0].numpy()] += 1
    assert np.abs(counts / 400 - 0.5).max() < 0.1  # standard deviation 0.025


def test_same_inputs_same_bytes(tmp_path: Path, pack: Path, tasks: list[Task]) -> None:
    again = write_pack(tmp_path / "b", schema(), [("train", tasks[:12]), ("test", tasks[20:]), ("train", tasks[12:20])])
    files = sorted(p.relative_to(pack) for p in pack.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert all((pack / f).read_bytes() == (again / f).read_bytes() for f in files)
    assert len(files) == 8  # manifest, 3 shards, tasks, 3 vocabularies


def test_verify_accepts_a_sound_pack(pack: Path) -> None:
    verify_pack(pack)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ids", lambda a: a + 49, r"f0 is \d+ at position \d+: must be in \[0, 50\)"),
        ("ids", lambda a: a.astype(np.int64), r"array 'ids' is int64 .*, expected int32"),
        ("ids", lambda a: a[:, :1], r"array 'ids' is int32 .* expected int32"),
        ("f2.values", lambda a: a - 50, "f2 is -"),
        ("f2.offsets", lambda a: a + 1, "f2.offsets must rise from 0"),
        ("label", lambda a: np.where(np.arange(len(a)) == 4, np.nan, a).astype(np.float32), "label is nan in row 4"),
        ("dense", lambda a: np.full_like(a, np.inf), "dense is inf in row 0"),
        ("item_cold", lambda a: a + np.uint8(2), "item_cold is [23]"),
        ("row_start", lambda a: a + 1, "row_start must rise strictly from 0"),
        ("num_support", lambda a: a + np.int32(100), "num_support of task 0 is 10"),
    ],
)
def test_bad_arrays_are_refused(tmp_path: Path, tasks: list[Task], name, change, message) -> None:
    arrays = arrays_of(schema(), tasks)
    with PackWriter(tmp_path / "p", schema()) as writer:
        with pytest.raises(ValueError, match=rf"shard 0 \(train\): {message}"):
            writer.add_shard("train", {**arrays, name: change(arrays[name])})
        with pytest.raises(ValueError, match=rf"array '{name}' is missing"):
            writer.add_shard("train", {k: v for k, v in arrays.items() if k != name})
        with pytest.raises(ValueError, match="array 'odd' is not in the schema"):
            writer.add_shard("train", {**arrays, "odd": arrays["label"]})
        with pytest.raises(ValueError, match="split is 'dev': must be one of train, valid, test"):
            writer.add_shard("dev", arrays)
    assert list(tmp_path.iterdir()) == []


def test_binary_labels_are_checked(tmp_path: Path, tasks: list[Task]) -> None:
    binary = PackSchema(**{**schema().__dict__, "binary_label": True})
    with PackWriter(tmp_path / "p", binary) as writer, pytest.raises(ValueError, match="row 0: must be 0 or 1"):
        writer.add_shard("train", arrays_of(binary, tasks))


def test_finish_wants_tasks_and_their_keys(tmp_path: Path, tasks: list[Task]) -> None:
    with PackWriter(tmp_path / "p", schema()) as writer:
        with pytest.raises(ValueError, match="would hold no task"):
            writer.finish()
        writer.add_shard("train", arrays_of(schema(), tasks))
        writer.write_tasks(np.arange(2), pa.array(["a", "b"]), ["train"] * 2)
        with pytest.raises(ValueError, match=r"shards hold 30 tasks, tasks.parquet lists 2"):
            writer.finish()
    assert list(tmp_path.iterdir()) == []


def test_many_shards_hold_no_descriptors(tmp_path: Path) -> None:
    tasks = random_tasks(np.random.default_rng(0), schema(), 60)
    path = write_pack(tmp_path / "p", schema(), [("train", [task]) for task in tasks])
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    split = open_pack(path).split("train")
    split.examples(np.arange(60))
    assert len(os.listdir("/proc/self/fd")) == before


def anonymous_memory() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    pytest.skip("this kernel does not report RssAnon")


def test_reading_does_not_copy_the_pack_into_memory(tmp_path: Path) -> None:
    rows, of = 400_000, schema(one=20, many=0, numeric=4)
    arrays = {
        "ids": np.ones((rows, 20), np.int32),
        "dense": np.ones((rows, 4), np.float32),
        "label": np.ones(rows, np.float32),
        "item_cold": np.zeros(rows, np.uint8),
        "task_id": np.arange(rows // 100),
        "row_start": np.arange(0, rows, 100),
        "num_support": np.full(rows // 100, 50, np.int32),
    }
    with PackWriter(tmp_path / "p", of) as writer:
        writer.add_shard("train", arrays)
        writer.write_tasks(np.arange(4000), pa.array(np.arange(4000)), ["train"] * 4000)
        writer.finish()
    del arrays
    split = open_pack(tmp_path / "p").split("train")
    split.examples(np.arange(50))
    before = anonymous_memory()
    for first in range(0, 4000, 50):
        split.examples(np.arange(first, first + 50))
    assert anonymous_memory() - before < 8e6  # the shard has 40 MB


def test_manifest_is_sorted_json(pack: Path) -> None:
    text = (pack / "manifest.json").read_text()
    manifest = json.loads(text)
    assert text == json.dumps(manifest, sort_keys=True, indent=1) + "\n"
    assert (manifest["format"], manifest["version"]) == ("gmeta-task-pack", 2)
