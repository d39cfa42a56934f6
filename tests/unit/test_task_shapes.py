"""Tasks of any size and shape through the commands: prepare, train, evaluate, report."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from commands import TELL_PEAK, gmeta, train_words
from pyarrow import csv
from safetensors.numpy import load_file

from gmeta.data.pack import open_pack

SCHEMA = {"task": "film", "label": "click", "time": "at", "item": "user", "categorical": ["user", "tag"]}


def write_log(folder: Path, sizes: Sequence[int], **columns: object) -> Path:
    """A Parquet log with one task of each size, and its schema beside it."""
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(len(sizes)), sizes)
    table = {"film": [f"f{t}" for t in task], "click": rng.integers(0, 2, len(task)), "at": np.arange(len(task))}
    table |= {"user": rng.integers(0, 20, len(task)), "tag": rng.integers(0, 3, len(task)), **columns}
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(table), folder / "log.parquet")
    (folder / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    return folder / "log.parquet"


def prepare(folder: Path, *words: object) -> Path:
    schema = folder / "schema.yaml"
    gmeta("prepare", "--input", folder / "log.parquet", "--schema", schema, "--out", folder / "pack", *words)
    return folder / "pack"


def test_tasks_without_support_are_trained_on_and_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of a long tail: half of the tasks have one row, and the smallest that a limit leaves out are told of."""
    write_log(tmp_path, [1] * 30 + [2] * 10 + [3, 8, 20] * 10)
    pack = prepare(tmp_path, "--max_task_rows", 15, "--test_fraction", 0.3)
    printed = " ".join(capsys.readouterr().out.split())
    assert "left out: 10 tasks (200 rows): more rows than max_task_rows" in printed
    assert "small: 30 tasks: one row, which is their query" in printed
    assert "small: 30 tasks: too few rows for query_size" in printed
    gmeta(*train_words(pack, tmp_path / "run", epochs=1))
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([loss for loss in losses if loss is not None]).all()
    capsys.readouterr()
    gmeta("evaluate", "--run_dir", tmp_path / "run", "--resamples", 20)
    (sentence,) = open_pack(pack).left_out("test")
    tasks = open_pack(pack).manifest["counts"]["left_out"]["test"]["more rows than max_task_rows"][0]
    assert 0 < tasks < 10
    assert (
        sentence == f"the pack left {tasks} tasks ({20 * tasks} rows) of split test out: more rows than max_task_rows"
    )
    assert sentence in " ".join(capsys.readouterr().out.split())
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["left_out"] == [sentence]
    cases = {case["case"]: case for case in evaluation["cases"]}
    assert cases["support_0"]["tasks"] == cases["support_0"]["rows"] > 0
    gmeta("report", "--run_dir", tmp_path / "run")
    assert sentence in (tmp_path / "run" / "report.html").read_text()


def test_a_split_that_was_left_out_whole_is_explained(tmp_path: Path) -> None:
    write_log(tmp_path, [4] * 12 + [9] * 2, part=["train"] * 48 + ["test"] * 18)
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump({**SCHEMA, "partition": "part"}))
    pack = open_pack(prepare(tmp_path, "--max_task_rows", 8, "--query_size", 2))
    with pytest.raises(
        ValueError, match=r"no tasks in split 'test'; .*left 2 tasks \(18 rows\) of split test out: more"
    ):
        pack.split("test")


def test_an_older_pack_tells_of_all_splits_together(tmp_path: Path) -> None:
    write_log(tmp_path, [4] * 12 + [9] * 2)
    pack = open_pack(prepare(tmp_path, "--max_task_rows", 8, "--query_size", 2))
    del pack.manifest["counts"]["left_out"]
    expected = "the pack left 2 tasks (18 rows) of all splits together out: more rows than max_task_rows"
    assert pack.left_out("test") == [expected]


def tasks_of(pack: Path) -> dict[str, tuple[str, list[int], list[int]]]:
    """Task -> its split, and the times of its support and of its query, in stored order."""
    opened = open_pack(pack)
    keys = pq.read_table(opened.tasks_file()).to_pydict()
    key = dict(zip(keys["task_id"], keys["key"], strict=True))
    found = {}
    for split, entry in opened.manifest["splits"].items():
        for shard in entry["shards"]:
            arrays = load_file(pack / shard["file"])
            ends = [*arrays["row_start"][1:], len(arrays["label"])]
            for task, a, b, n in zip(arrays["task_id"], arrays["row_start"], ends, arrays["num_support"], strict=True):
                time = arrays["time"][a:b].tolist()
                found[key[int(task)]] = (split, time[:n], time[n:])
    return found


SIZES = [1, 2, 3, 4, 5, 6, 9, 14, 30] * 2


def times(task: str) -> list[int]:
    first = sum(SIZES[: int(task[1:])])
    return list(range(first, first + SIZES[int(task[1:])]))


@pytest.mark.parametrize("most", [None, 3])
def test_the_first_rows_are_support_and_the_next_ones_query(tmp_path: Path, most: int | None) -> None:
    write_log(tmp_path, SIZES)
    words = [] if most is None else ["--query_size", most]
    pack = prepare(tmp_path, "--support_size", 5, *words)
    beyond = 0
    for task, (_, support, query) in tasks_of(pack).items():
        rows = times(task)
        n = min(5, len(rows) - 1)
        last = None if most is None else n + most
        assert (support, query) == (rows[:n], rows[n:last])
        beyond += len(rows[n:][most:]) if most is not None else 0
    counts = open_pack(pack).manifest["counts"]
    found = counts.get("shortened_tasks", {})
    assert sum(rows for split in found.values() for _, rows in split.values()) == beyond
    reasons = {why for split in found.values() for why in split}
    assert reasons == ({"rows beyond support_size and query_size"} if beyond else set())
    assert sorted(counts["small_tasks"].values()) == [2, 8]
    vocabulary = pq.read_table(pack / "vocab" / "user.parquet")["count"].to_pylist()
    trained = [s + q for split, s, q in tasks_of(pack).values() if split == "train"]
    assert sum(vocabulary) == sum(map(len, trained))


def test_random_support_of_a_size(tmp_path: Path) -> None:
    write_log(tmp_path, SIZES)
    words = ("--support_size", 5, "--query_size", 3, "--split_query", "random")
    found = tasks_of(prepare(tmp_path, *words))
    drawn = set()
    for task, (_, support, query) in found.items():
        rows = times(task)
        assert (len(support), len(query)) == ((n := min(5, len(rows) - 1)), min(3, len(rows) - n))
        assert (support, query) == (sorted(set(support)), sorted(set(query)))
        assert not set(support) & set(query)
        assert {*support, *query} <= set(rows)
        drawn |= {time - rows[0] for time in support}
    assert max(drawn) > 10


@pytest.mark.parametrize("keep", ["last", "random"])
@pytest.mark.parametrize("train_only", [False, True])
def test_a_long_task_keeps_so_many_rows(tmp_path: Path, keep: str, train_only: bool) -> None:
    write_log(tmp_path, SIZES)
    name = "max_train_task_rows" if train_only else "max_task_rows"
    words = (f"--{name}", 8, "--max_task_rows_keep", keep, "--query_size", 2, "--test_fraction", 0.5)
    pack = prepare(tmp_path, *words)
    left_out = Counter[str]()
    for task, (split, support, query) in tasks_of(pack).items():
        rows, kept = times(task), support + query
        whole = train_only and split != "train"
        assert kept == sorted(kept)
        assert set(kept) <= set(rows)
        assert len(kept) == (len(rows) if whole else min(8, len(rows)))
        assert len(query) == max(1, min(2, len(rows) - 1))
        if keep == "last":
            assert kept == rows[-len(kept) :]
        left_out[split] += len(rows) - len(kept)
    found = open_pack(pack).manifest["counts"]["shortened_tasks"]
    counted = {split: why[f"rows beyond {name}"][1] for split, why in found.items()}
    assert counted == {split: rows for split, rows in left_out.items() if rows}
    assert open_pack(pack).manifest["counts"]["dropped_tasks"] == {}
    told = open_pack(pack).left_out("test")
    assert len(told) == (0 if train_only else 1)
    assert all("rows of " in sentence and sentence.endswith("out: rows beyond max_task_rows") for sentence in told)


def test_a_long_task_is_shortened_before_it_is_cut(tmp_path: Path) -> None:
    write_log(tmp_path, SIZES)
    words = ("--max_task_rows", 8, "--max_task_rows_keep", "last", "--support_size", 4, "--query_size", 2)
    for task, (_, support, query) in tasks_of(prepare(tmp_path, *words)).items():
        rows = times(task)[-8:]
        n = min(4, len(rows) - 1)
        assert (support, query) == (rows[:n], rows[n : n + 2])


def test_csv_files_and_one_parquet_file_are_shortened_alike(tmp_path: Path) -> None:
    log = write_log(tmp_path, SIZES)
    words = ("--max_task_rows", 8, "--max_task_rows_keep", "last", "--support_size", 4, "--query_size", 2)
    whole = prepare(tmp_path, *words)
    table = pq.read_table(log)
    (tmp_path / "csv").mkdir()
    for name, part in (("a", table.slice(0, 50)), ("b", table.slice(50))):
        csv.write_csv(part, tmp_path / "csv" / f"{name}.csv")
    gmeta(
        "prepare",
        "--input",
        tmp_path / "csv",
        "--schema",
        tmp_path / "schema.yaml",
        "--out",
        tmp_path / "two",
        *words,
        "--threads",
        2,
    )
    assert tasks_of(whole) == tasks_of(tmp_path / "two")
    for file in sorted(whole.glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["last", "random"])
def test_a_task_of_a_million_rows_is_shortened_within_the_memory_limit(tmp_path: Path, keep: str) -> None:
    write_log(tmp_path, [1_200_000, *[20] * 50])
    words = ("--memory_limit", "200MB", "--threads", 2, "--split_query", keep, "--query_size", 10)
    found = tasks_of(prepare(tmp_path, *words, "--support_size", 1_000_000))
    assert [len(rows) for rows in found["f0"][1:]] == [1_000_000, 10]
    shorter = ("--max_task_rows", 500_000, "--max_task_rows_keep", keep)
    shutil.rmtree(tmp_path / "pack")
    found = tasks_of(prepare(tmp_path, *words, *shorter))
    assert [len(rows) for rows in found["f0"][1:]] == [499_990, 10]


@pytest.mark.slow
def test_a_very_long_task_pads_no_other_in_any_command(tmp_path: Path) -> None:
    """Padded to it, the 256 tasks of its batch would have 26 million rows."""
    sizes = [12] * 400 + [100_000] * 3
    parts = [("train", "train", "valid", "test")[t % 4] for t in range(400)] + ["train", "valid", "test"]
    write_log(tmp_path, sizes, part=np.repeat(parts, sizes))
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump({**SCHEMA, "partition": "part"}))
    pack, run_dir, log = prepare(tmp_path), tmp_path / "run", tmp_path / "log.parquet"
    table = pq.read_table(log).filter(pc.equal(pq.read_table(log)["part"], "test"))
    pq.write_table(table, tmp_path / "support.parquet")
    pq.write_table(table.drop(["click"]), tmp_path / "query.parquet")
    batch = ("--loader.tasks_per_batch", 256, "--model.args.hidden", "[8]", "--schedule.epochs", 1)
    files = ("--support", tmp_path / "support.parquet", "--query", tmp_path / "query.parquet")
    for words in (
        ("train", "--pack", pack, "--run_dir", run_dir, *batch),  # validates too
        ("evaluate", "--run_dir", run_dir, "--tasks_per_batch", 256, "--resamples", 2, "--baselines", "false"),
        ("predict", "--run_dir", run_dir, *files, "--tasks_per_batch", 256, "--out", tmp_path / "out.parquet"),
    ):
        command = [sys.executable, "-c", PEAK, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.split()[-1]) < 1500, words[0]


PEAK = f"""
import sys
from gmeta.cli import run
code = run(sys.argv[1:])
{TELL_PEAK}
sys.exit(code)
"""
