"""A column that says which rows are support and which are query, in place of a cut."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from commands import fails, gmeta, train_words
from pyarrow import csv
from safetensors.numpy import load_file

from gmeta.data.pack import open_pack
from gmeta.data.schema import data_schema_from_json, parse_data_schema

SCHEMA: dict[str, Any] = {"task": "user", "label": "click", "item": "item", "categorical": ["item"], "role": "side"}
SIZES = [(3, 2), (1, 1), (0, 2), (5, 1), (2, 0), (1, 6), (8, 3), (0, 1)] * 3
"""Support and query rows of each user."""


def log(sizes: list[tuple[int, int]] = SIZES, names: tuple[Any, Any] = ("support", "query")) -> dict[str, list[Any]]:
    """Rows in a mixed order; `n` numbers them."""
    rng = np.random.default_rng(1)
    user = [u for u, (s, q) in enumerate(sizes) for _ in range(s + q)]
    side = [names[i >= s] for s, q in sizes for i in range(s + q)]
    order = rng.permutation(len(user)).tolist()
    return {
        "user": [f"u{user[i]}" for i in order],
        "side": [side[i] for i in order],
        "item": rng.integers(0, 9, len(user)).tolist(),
        "click": rng.integers(0, 2, len(user)).tolist(),
        "n": list(range(len(user))),
    }


def write(folder: Path, rows: dict[str, list[Any]], schema: dict[str, Any] = SCHEMA, kind: str = "parquet") -> None:
    """Two files of a kind, and the schema, which has the row's number as time unless it says otherwise."""
    (folder / "log").mkdir(parents=True)
    table = pa.table(rows)
    for name, part in (("a", table.slice(0, 30)), ("b", table.slice(30))):
        if kind == "parquet":
            pq.write_table(part, folder / "log" / f"{name}.parquet")
        else:
            csv.write_csv(part, folder / "log" / f"{name}.csv")
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema))


def words(folder: Path, *more: object) -> list[object]:
    return ["prepare", "--input", folder / "log", "--schema", folder / "schema.yaml", "--out", folder / "pack", *more]


def sides(folder: Path) -> dict[str, tuple[list[int], list[int]]]:
    """Task -> the numbers of its support and of its query rows, in stored order; a user has no row's number twice."""
    pack = open_pack(folder / "pack")
    keys = pq.read_table(pack.tasks_file()).to_pydict()
    key = dict(zip(keys["task_id"], keys["key"], strict=True))
    found = {}
    for entry in (shard for split in pack.manifest["splits"].values() for shard in split["shards"]):
        arrays = load_file(pack.path / entry["file"])
        ends = [*arrays["row_start"][1:], len(arrays["label"])]
        for task, a, b, n in zip(arrays["task_id"], arrays["row_start"], ends, arrays["num_support"], strict=True):
            number = arrays["time"][a:b].tolist()
            found[key[int(task)]] = (number[:n], number[n:])
    return found


def expected(rows: dict[str, list[Any]], support: Any = "support", query: Any = "query") -> dict[str, Any]:
    found: dict[str, tuple[list[int], list[int]]] = {}
    for user, side, n in zip(rows["user"], rows["side"], rows["n"], strict=True):
        found.setdefault(user, ([], []))[(support, query).index(side)].append(n)
    return {user: both for user, both in found.items() if both[1]}


TIMED = {**SCHEMA, "time": "n"}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_column_says_what_is_support_and_query(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, rows := log(), TIMED, kind)
    gmeta(*words(tmp_path))
    assert sides(tmp_path) == expected(rows)
    counts = open_pack(tmp_path / "pack").manifest["counts"]
    assert counts["dropped_tasks"] == {"no row is query": 3}
    assert counts["dropped_rows"] == {"no row is query": 6}
    assert sum(tasks for split in counts["left_out"].values() for tasks, _ in split.values()) == 3
    assert counts["small_tasks"] == {"all rows are query: they have no support": 6}
    assert "rows_on_both_sides" not in counts
    assert "left out: 3 tasks (6 rows): no row is query" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        (("history", "target"), "{history: support, target: query}"),
        ((False, True), "{false: support, true: query}"),
        ((0, 1), "{0: support, 1: query}"),
        ((0.0, 1.0), '{"0": support, "1": query}'),
    ],
)
def test_its_values_may_have_other_names(tmp_path: Path, names: tuple[Any, Any], roles: str) -> None:
    write(tmp_path, rows := log(names=names), TIMED)
    gmeta(*words(tmp_path, "--roles", roles))
    assert sides(tmp_path) == expected(rows, *names)


def test_files_of_two_kinds_and_no_time(tmp_path: Path) -> None:
    write(tmp_path, rows := log())
    gmeta(*words(tmp_path, "--query_size", "2", "--split_query", "random"))  # the column is not asked for
    pack = open_pack(tmp_path / "pack")
    assert pack.manifest["settings"]["split_query"] == "random"
    assert "roles" not in pack.manifest["settings"]
    csv.write_csv(pa.table(rows).slice(30), tmp_path / "log" / "b.csv")
    (tmp_path / "log" / "b.parquet").unlink()
    gmeta(*(tmp_path / "mixed" if word == tmp_path / "pack" else word for word in words(tmp_path)))
    sizes = sorted((len(s), len(q)) for s, q in expected(rows).values())
    found = open_pack(tmp_path / "mixed")
    assert sorted(zip(*([int(n) for n in c] for c in both(found)), strict=True)) == sizes


def both(pack: Any) -> tuple[np.ndarray, np.ndarray]:
    """Support and query rows of all tasks."""
    found = [pack.split(name).unverified_sizes() for name in pack.splits]
    return np.concatenate([s for s, _ in found]), np.concatenate([q for _, q in found])


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_unknown_and_missing_roles_are_bad_rows(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = log()
    rows["side"][3] = rows["side"][40] = "valid"
    rows["side"][7] = None
    write(tmp_path, rows, TIMED, kind)
    told = (
        "2 × side is no role",
        "1 × side is missing",
        "row 4, column 'side': 'valid' is no role: roles names 'support'",
    )
    fails(words(tmp_path), capsys, "3 rows cannot be used", *told, "row 8, column 'side'")
    gmeta(*words(tmp_path, "--on_bad_rows", "quarantine"))
    counts = open_pack(tmp_path / "pack").manifest["counts"]
    assert counts["bad_rows"] == {"side is no role": 2, "side is missing": 1}
    kept = [i for i, side in enumerate(rows["side"]) if side in ("support", "query")]
    assert sides(tmp_path) == expected({name: [column[i] for i in kept] for name, column in rows.items()})


@pytest.mark.parametrize("keep", ["last", "random"])
def test_a_long_task_gives_up_support_rows_first(tmp_path: Path, keep: str) -> None:
    write(tmp_path, rows := log(), TIMED)
    gmeta(*words(tmp_path, "--max_task_rows", 4, "--max_task_rows_keep", keep))
    for user, (support, query) in expected(rows).items():
        s = min(len(support), max(1, 4 - len(query))) if support and len(support) + len(query) > 4 else len(support)
        q = min(len(query), 4 - s)
        found = sides(tmp_path)[user]
        assert [len(side) for side in found] == [s, q]
        if keep == "last":
            assert found == (support[len(support) - s :], query[len(query) - q :])
        assert set(found[0]) <= set(support)
        assert set(found[1]) <= set(query)


def test_a_row_on_both_sides_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = log()
    for name in rows:  # a file that holds the whole log as support, beside its query
        rows[name] += [{"side": "support"}.get(name, rows[name][i]) for i in range(len(rows[name])) if i % 9 == 0]
    twice = [i for i in range(0, len(rows["n"]) - len(range(0, rows["n"][-1], 9)), 9) if rows["side"][i] == "query"]
    write(tmp_path, rows, TIMED)
    gmeta(*words(tmp_path))
    printed = " ".join(capsys.readouterr().out.split())
    users = {rows["user"][i] for i in twice}
    counted = open_pack(tmp_path / "pack").manifest["counts"]["rows_on_both_sides"]
    assert counted == {"tasks": len(users), "rows": len(twice), "example": min(users)}
    assert (
        f"warning: {len(twice)} query rows of {len(users)} tasks (such as '{min(users)}') are in the support" in printed
    )


def test_a_run_of_such_a_pack_is_evaluated_and_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = log(SIZES * 2)
    for name in rows:
        rows[name] += [{"side": "support"}.get(name, value) for value in rows[name]]
    write(tmp_path, rows, TIMED)
    gmeta(*words(tmp_path))
    gmeta(*train_words(tmp_path / "pack", tmp_path / "run", epochs=1))
    capsys.readouterr()
    gmeta("evaluate", "--run_dir", tmp_path / "run", "--resamples", 5, "--baselines", "false")
    notes = json.loads((tmp_path / "run" / "evaluation.json").read_text())["notes"]
    (sentence,) = [note for note in notes if note.startswith(f"{2 * sum(q for _, q in SIZES)} query rows of ")]
    assert sentence in " ".join(capsys.readouterr().out.split())
    plain = pa.table({name: rows[name] for name in ("user", "item", "click")})  # predict needs no role
    csv.write_csv(plain.slice(0, 20), tmp_path / "support.csv")
    csv.write_csv(plain.slice(20, 9).drop(["click"]), tmp_path / "query.csv")
    given = ["--support", tmp_path / "support.csv", "--query", tmp_path / "query.csv", "--out", tmp_path / "out.csv"]
    gmeta("predict", "--run_dir", tmp_path / "run", *given)
    assert csv.read_csv(tmp_path / "out.csv").num_rows == 9


def test_training_mixes_roles_only_where_it_is_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Drawing anew is what `resample` means, and is told of; episodes would mix roles by the way, and are refused."""
    write(tmp_path, log())
    gmeta(*words(tmp_path))
    train = train_words(tmp_path / "pack", tmp_path / "run", epochs=1)
    fails(
        [*train, "--loader.episode_rows", 4], capsys, "loader.episode_rows is 4, and a column gives", "max_support_rows"
    )
    gmeta(*train, "--loader.resample", "true")
    assert "loader.resample draws the support anew from all rows of a task" in capsys.readouterr().err
    gmeta(*train_words(tmp_path / "pack", tmp_path / "other", epochs=1))
    assert "resample" not in capsys.readouterr().err


def test_a_folder_may_be_the_role(tmp_path: Path) -> None:
    rows = log()
    write(tmp_path, rows, TIMED)
    shutil.rmtree(tmp_path / "log")
    for side in ("support", "query"):
        (tmp_path / "log" / f"side={side}").mkdir(parents=True)
        part = pa.table(rows).filter(pc.equal(pa.table(rows)["side"], side)).drop(["side"])
        pq.write_table(part, tmp_path / "log" / f"side={side}" / "part-0.parquet")
    gmeta(*words(tmp_path))
    assert sides(tmp_path) == expected(rows)


def test_a_role_lives_beside_a_partition(tmp_path: Path) -> None:
    rows = log()
    rows["part"] = [("train", "test")[n % 2] for n in rows["n"]]
    write(tmp_path, rows, {**TIMED, "partition": "part"})
    gmeta(*words(tmp_path))
    pack = open_pack(tmp_path / "pack")
    wanted = []
    for part in ("train", "test"):
        of = [i for i, name in enumerate(rows["part"]) if name == part]
        wanted += [*expected({name: [column[i] for i in of] for name, column in rows.items()}).values()]
    assert sorted(zip(*(n.tolist() for n in both(pack)), strict=True)) == sorted((len(s), len(q)) for s, q in wanted)


@pytest.mark.parametrize(
    ("schema", "more", "says"),
    [
        ({}, ["--query_size", "3"], "query_size has no effect with split_query column"),
        ({}, ["--support_size", "3"], "support_size has no effect"),
        ({}, ["--roles", "{a: support, b: quarry}"], "roles are support and query"),
        ({"role": None}, ["--roles", "{a: support}"], "roles has no effect with split_query random"),
        ({"role": None}, ["--split_query", "column"], "add the key role to it"),
        ({"role": "sidd"}, [], "has no column 'sidd': did you mean 'side'?"),
        ({"role": 3}, [], "role is 3: must be a column name"),
        ({}, ["--roles", "{support: query, query: query}"], "the role column calls all of them query"),
        ({}, ["--roles", "{support: support, query: support}"], "no row is query"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, schema: dict[str, Any], more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, log(), {**SCHEMA, **schema})
    fails(words(tmp_path, *more), capsys, says)
    assert not (tmp_path / "pack").exists()


def test_the_schema_survives_json_and_is_as_before_without_a_role() -> None:
    schema = parse_data_schema(SCHEMA)
    assert data_schema_from_json(json.loads(json.dumps(schema.to_json()))) == schema
    assert "role" not in parse_data_schema({k: v for k, v in SCHEMA.items() if k != "role"}).to_json()
