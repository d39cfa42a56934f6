"""AntM2C's files become a pack: ten rows in the original layout, a clone, and files that are wrong."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from antm2c_rows import Row, row, write_log
from commands import fails, gmeta
from event_packs import quiet

from gmeta.config.data import PrepareConfig
from gmeta.data.antm2c.published import COLUMNS
from gmeta.data.antm2c.read import LISTS
from gmeta.data.antm2c.rows import HISTORY, log_schema, make_log_rows
from gmeta.data.antm2c.tasks import QUERY
from gmeta.data.antm2c.told import log_lines
from gmeta.data.pack import open_pack
from gmeta.data.prepare.read import take_rows
from gmeta.data.prepare.scratch import connect
from gmeta.data.prepare.settings import resolve_settings

TEN = [
    row("u1", "a", "01 10:00:00", 1, deep_features_0=1),
    row("u1", "b", "01 11:00:00", 0, deep_features_1="c2"),
    row("u1", "a", "02 00:00:00", 1, deep_features_2=0.25),
    row("u1", "c", "03 00:00:00", 1, 2),  # the last second of train
    row("u1", "b", "03 00:00:01", 1),  # the first of valid
    row("u1", "d", "05 00:00:00", 0, 4),
    row("u1", "d", "05 00:00:01", 1, 4, deep_features_1="c9"),  # the first of test
    row("u2", "a", "01 09:00:00", 1, item_entity_names="jug"),
    row("u2", "b", "02 09:00:00", 0),
    row("u2", "c", "06 09:00:00", 1, 2),
]


@dataclass(frozen=True)
class Made:
    """What the rows of a log become, before they are a pack."""

    counts: dict[str, Any]
    rows: list[Row]  # with the features by their names, of each task in order


def made(folder: Path, rows: list[Row] = TEN, **settings: Any) -> Made:
    root = str(write_log(folder / "files", rows))
    return made_of(
        PrepareConfig(**{"dataset": "antm2c", "root": root, "out": str(folder / "pack"), **settings}), folder
    )


def made_of(config: PrepareConfig, folder: Path) -> Made:
    _, resolved = resolve_settings(config, log_schema(config))
    with connect(folder, config) as con:
        log = make_log_rows(con, config, resolved, folder, quiet)
        take_rows(con, config, log.rows, ["the log"], folder, log.refused)
        columns = ["task AS user", "partition", "is_query"]
        columns += [f"n{i} AS {column.name}" for i, column in enumerate(log.schema.numeric)]
        for i, feature in enumerate(log.schema.features):
            values = f"""(SELECT coalesce(list(value ORDER BY place), []) FROM values_{i}
                          WHERE place BETWEEN f{i}.start AND f{i}.start + f{i}.length - 1)"""
            columns.append(f"{f'f{i}' if feature.kind == 'categorical' else values} AS {feature.name}")
        found = con.sql(f"SELECT {', '.join(columns)} FROM raw_rows ORDER BY row").to_arrow_table().to_pylist()
    return Made(log.counts, found)


def tasks(log: Made) -> dict[str, list[str]]:
    """Task -> side, item and history of its rows, in order."""
    found: dict[str, list[str]] = {}
    for line in log.rows:
        words = f"{'sq'[line['is_query']]} {line['item_id']} {''.join(line['history'])}".strip()
        found.setdefault(f"{line['user']} {line['partition']}", []).append(words)
    return found


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(tmp_path_factory.mktemp("ten"))


def test_ten_rows_are_split_at_the_published_seconds(ten: Made) -> None:
    found = ten.counts["antm2c"]
    assert {split: found[split]["rows"] for split in ("train", "valid", "test")} == {"train": 6, "valid": 2, "test": 2}
    assert [found[split]["positives"] for split in ("train", "valid", "test")] == [4, 1, 2]
    assert (found["users"], found["items"], found["train"]["users"], found["test"]["items"]) == (2, 4, 2, 2)
    assert found["train"]["scenes"] == {"1": 5, "2": 1}


def test_histories_hold_earlier_positive_events_alone(ten: Made) -> None:
    """A repeated item stays two events, a row never knows its own label, and supports are copies of earlier rows."""
    before = ["s a", "s b a", "s a a", "s c aa"]
    assert tasks(ten) == {
        "u1 train": ["q a", "q b a", "q a a", "q c aa"],
        "u1 valid": [*before, "q b aac", "q d aacb"],
        "u1 test": [*before, "s b aac", "s d aacb", "q d aacb"],
        "u2 train": ["q a", "q b a"],
        "u2 test": ["s a", "s b a", "q c a"],
    }


def test_events_of_one_second_go_by_their_file_and_row(tmp_path: Path) -> None:
    rows = [row("u", item, "01 10:00:00", 1) for item in "abcd"]  # a and d are in the first file
    assert tasks(made(tmp_path, rows)) == {"u train": ["q a", "q d a", "q b ad", "q c adb"]}


def test_a_train_task_has_its_last_rows_as_query(tmp_path: Path) -> None:
    rows = [row("u", f"i{hour}", f"01 {hour:02}:00:00", 0) for hour in range(24)]
    sides = [words[0] for words in tasks(made(tmp_path, rows))["u train"]]
    assert sides == ["s"] * (24 - QUERY) + ["q"] * QUERY


def test_a_history_has_the_last_positive_events(tmp_path: Path) -> None:
    rows = [row("u", chr(97 + hour), f"01 {hour:02}:00:00", 1) for hour in range(HISTORY + 3)]
    *_, last = tasks(made(tmp_path, rows))["u train"]
    assert last.split()[2] == "cdefghijkl"[-HISTORY:]


def test_a_task_may_be_a_user_in_a_scene_or_an_item_of_one(tmp_path: Path) -> None:
    assert tasks(made(tmp_path / "users", tasks="user_scene")) == {
        "u1/1 train": ["q a", "q b a", "q a a"],
        "u1/1 valid": ["s a", "s b a", "s a a", "q b aac"],
        "u1/2 train": ["q c aa"],
        "u1/4 valid": ["q d aacb"],
        "u1/4 test": ["s d aacb", "q d aacb"],
        "u2/1 train": ["q a", "q b a"],
        "u2/2 test": ["q c a"],
    }
    assert tasks(made(tmp_path / "items", tasks="scene_item"))["1/b train"] == ["q b a", "q b a"]


def test_a_scene_that_is_left_out_knows_its_last_rows_before_test(tmp_path: Path) -> None:
    rows = [*TEN, row("u2", "a", "07 09:00:00", 0)]
    found = tasks(made(tmp_path, rows, tasks="scene_item", new_scene=1, new_scene_rows=[0, 3, 6]))
    assert found == {
        "2/c train": ["q c aa"],
        "4/d valid": ["q d aacb"],
        "1/a@0 test": ["q a ac"],
        "1/a@3 test": ["s a a", "q a ac"],  # the others of the last three are of b, which test has not
        "1/a@6 test": ["s a", "s a", "s a a", "q a ac"],
    }


def test_rows_that_are_held_out_are_in_no_other_task(tmp_path: Path) -> None:
    """Users meet a new scene among others, and items new users: neither is trained on, nor a support of valid."""
    found = tasks(made(tmp_path / "users", tasks="user", new_scene=1, new_scene_rows=[2]))
    assert found == {
        "u1 train": ["q c aa"],
        "u1 valid": ["s c aa", "q d aacb"],
    }
    rows = [row(f"u{user}", "a", f"0{day} 10:00:00", 0) for user in range(40) for day in (1, 4, 6)]
    log = made(tmp_path / "items", rows, tasks="scene_item", new_users=0.25)
    lines = log.rows
    of = {split: {line["user_id"] for line in lines if line["partition"] == split} for split in ("train", "test")}
    asked = {line["user_id"] for line in lines if line["partition"] == "test" and line["is_query"]}
    assert not of["train"] & asked
    assert len(of["train"]) + len(asked) == 40


def test_new_users_are_in_no_training_task(tmp_path: Path) -> None:
    rows = [row(f"u{user}", "a", f"0{day} 10:00:00", 0) for user in range(40) for day in (1, 4, 6)]
    found = tasks(made(tmp_path, rows, new_users=0.25))
    trained, new = ({name.split()[0] for name in found if name.endswith(end)} for end in ("train", "test"))
    assert not trained & new
    assert len(trained) + len(new) == 40
    assert 4 <= len(new) <= 16
    assert new == {name.split()[0] for name in found if name.endswith("valid")}
    assert all(found[f"{user} test"] == ["s a", "s a", "q a"] for user in new)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"tasks": "users"}, "user"),
        ({"new_scene": 5}, "scenes are 0 to 4"),
        ({"new_scene_rows": [1]}, "has no effect without new_scene"),
        ({"new_scene": 1, "new_scene_rows": [-1]}, "must be numbers of rows"),
        ({"new_scene": 1, "new_scene_rows": 7}, "names 7 rows, and scene 1 has 6 before test"),
        ({"new_users": 1.0}, "must be at least 0 and below 1"),
        ({"new_scene": 1, "new_users": 0.1}, "leave one out"),
    ],
)
def test_tasks_that_cannot_be_are_named(tmp_path: Path, settings: Row, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        made(tmp_path, **settings)


def test_columns_without_a_meaning_are_told_by_rows_of_train(ten: Made, tmp_path: Path) -> None:
    found = ten.counts["antm2c"]
    # whole numbers of few values and texts are codes; one value in train is none, whatever test has
    assert found["codes"] == ("deep_features_0", "deep_features_1")
    assert found["numeric"] == ("deep_features_2",)
    assert len(found["left_out"]) == 24
    assert found["separator"] == ";"
    rows = [row("u", "a", "01 10:00:00", 1, deep_features_2=place / 7) for place in range(3)]
    late = row("u", "a", "06 10:00:00", 1, deep_features_2="broken")
    table = made(tmp_path, [*rows, late]).rows
    assert [line["deep_features_2"] for line in table] == [0, 1 / 7, 2 / 7, None, 0, 1 / 7, 2 / 7]


def test_entities_are_lists_and_names_stay_with_their_row(ten: Made) -> None:
    table = ten.rows
    assert table[0]["bill_entity_seq"] == ["tea", "milk"]
    assert table[0]["query_entity_seq"] == []
    names = {(line["user"], tuple(line["item_entity_names"])) for line in table if line["item_id"] == "a"}
    assert names == {("u1", ("cup", "pot")), ("u2", ("jug",))}


@pytest.mark.parametrize(("mark", "expected"), [("|", ["x y", "z"]), ("\x01", ["x y", "z"]), (",", ["x y", "z"])])
def test_what_separates_entities_is_found(tmp_path: Path, mark: str, expected: list[str]) -> None:
    lists = dict.fromkeys(LISTS, f"x y{mark} z{mark}")
    log = made(tmp_path, [row("u", "a", "01 10:00:00", 1, **lists)])
    assert log.counts["antm2c"]["separator"] == mark
    assert [line["bill_entity_seq"] for line in log.rows] == [expected]


def test_a_separator_may_be_given(tmp_path: Path) -> None:
    log = made(tmp_path, separator="&")
    assert log.counts["antm2c"]["separated"] == 0
    assert log.rows[0]["bill_entity_seq"] == ["tea;milk"]
    told = " ".join(log_lines(log.counts["antm2c"]))
    assert "'&', which 0% of the lists have" in told
    assert "CAREFUL: more lists have ';'" in told


def test_a_file_with_another_separator_is_named(tmp_path: Path) -> None:
    others = dict.fromkeys(LISTS, "tea|milk")
    rows = [row("u", "a", f"01 10:00:{n:02}", 1, **(others if n % 3 == 2 else {})) for n in range(9)]
    log = made(tmp_path, rows)
    (said,) = [line for line in log_lines(log.counts["antm2c"]) if "CAREFUL" in line]
    assert "antm2c_10m_part2.csv seldom have ';'" in said


def test_without_a_separator_a_list_is_one_entry(tmp_path: Path) -> None:
    lists = dict.fromkeys(LISTS, "word")
    log = made(tmp_path, [row("u", "a", "01 10:00:00", 1, **lists)])
    told = list(log_lines(log.counts["antm2c"]))
    assert "name it with --separator" in " ".join(told)
    assert told[1:3] == ["valid: no rows", "test: no rows"]
    assert [line["bill_entity_seq"] for line in log.rows] == [["word"]]


def test_times_that_cannot_be_parsed_are_refused_or_filled(tmp_path: Path) -> None:
    rows = [*TEN, row("u3", "a", "x", 1)]
    with pytest.raises(
        ValueError, match=r"(?s)1 × log_time is no time such.*part1.csv, row 4, column 'log_time': '2023-08-x' is"
    ):
        made(tmp_path / "strict", rows)
    log = made(tmp_path / "legacy", rows, dataset="antm2c-legacy")
    assert log.counts["antm2c"]["train"]["rows"] == 7
    assert "rows whose time cannot be parsed, which public code takes for train: 1" in log_lines(log.counts["antm2c"])
    assert tasks(log)["u3 train"] == ["q a"]


def test_the_columns_may_have_another_order(tmp_path: Path, ten: Made) -> None:
    root = write_log(tmp_path / "files", TEN, tuple(reversed(COLUMNS)))
    config = PrepareConfig(dataset="antm2c", root=str(root), out=str(tmp_path / "pack"))
    assert tasks(made_of(config, tmp_path)) == tasks(ten)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"scene": 7}, "column 'scene': '7' is no scene: these are '0', '1', '2', '3', '4'"),
        ({"label": 2}, "column 'label': '2.0' is neither 0 nor 1"),
        ({"log_time": "2031-08-01 10:00:00"}, "is not of August 2023"),
        ({"label": "yes"}, "column 'label': 'yes' is no number"),
        ({"user_id": ""}, "column 'user_id': is missing"),
        ({"item_id": ""}, "column 'item_id': is missing"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path: Path, change: Row, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)) as refused:
        made(tmp_path, [*TEN, row("u", "a", "01 10:00:00", 1) | change])
    assert "antm2c_10m_part1.csv, row 4" in str(refused.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"bill_entity_seq": "tea;nan"}, "column 'bill_entity_seq': '[tea, nan]' has a missing element"),
        (
            {"item_entity_names": "1;99999999999999999999"},
            "'item_entity_names': '[1, 99999999999999999999]' is a whole number beyond int64",
        ),
        ({"deep_features_2": "1e39"}, "column 'deep_features_2': '1e+39' is infinite or beyond float32"),
    ],
)
def test_values_that_are_told_by_all_rows_are_named_too(tmp_path: Path, change: Row, expected: str) -> None:
    late = row("u", "a", "06 10:00:00", 0)
    with pytest.raises(ValueError, match=re.escape(expected)):
        made(tmp_path / "refused", [*TEN, late | change])
    log = made(tmp_path / "without", [*TEN, late, late | change], on_bad_rows="quarantine")
    assert tasks(log) == tasks(made(tmp_path / "never", [*TEN, late]))


def test_entries_have_the_one_form_of_ids(tmp_path: Path) -> None:
    names = ";".join(f"e{number}" for number in range(20)) + ";7.0;True"
    (line,) = made(tmp_path, [row("u", "a", "01 10:00:00", 1, item_entity_names=names)], separator=";").rows
    assert line["item_entity_names"] == [*(f"e{number}" for number in range(12, 20)), "7", "true"]


def test_rows_that_cannot_be_used_are_set_aside_where_that_is_asked_for(tmp_path: Path, ten: Made) -> None:
    bad: list[Row] = [{"scene": 7, "label": 2}, {"log_time": "x"}, {"label": 2}, {"user_id": ""}]
    rows = [*TEN, *(row("u", "a", "01 10:00:00", 1) | change for change in bad)]
    log = made(tmp_path, rows, on_bad_rows="quarantine")
    assert tasks(log) == tasks(ten)
    rejects = pq.read_table(tmp_path / "rejects.parquet").to_pylist()
    assert sorted((one["column"], one["value"], one["reason"].partition(":")[0]) for one in rejects) == [
        ("label", "2.0", "is neither 0 nor 1"),
        ("log_time", "x", "is no time such as 2023-08-01"),
        ("scene", "7", "is no scene"),
        ("user_id", None, "is missing"),
    ]
    assert sum(log.counts["bad_rows"].values()) == len(bad)


def test_files_that_are_wrong_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_log(tmp_path / "files", TEN)
    words = ["prepare", "--dataset", "antm2c", "--root", root, "--out", tmp_path / "pack"]
    second = root / "antm2c_10m_part1.csv"
    text = second.read_text()
    second.write_text(text.replace("item_title", "title", 1))
    fails(words, capsys, "part1.csv has no column item_title")
    second.write_text(text + "u9,a,2023")
    fails(words, capsys, "part1.csv", "is no valid CSV line")
    second.unlink()
    fails(words, capsys, "lacks antm2c_10m_part1", "given out on request", "gmeta synth --kind antm2c")
    with gzip.open(root / "antm2c_10m_part1.csv.gz", "wt") as file:
        file.write(text)
    gmeta(*words)
    fails([*words, "--query_size", 3], capsys, "query_size has no effect on dataset antm2c")
    fails(["prepare", "--dataset", "antm2c", "--out", tmp_path / "no"], capsys, "needs root")
    others = ["prepare", "--dataset", "ml-100k", "--root", root, "--out", tmp_path / "no"]
    fails([*others, "--separator", ";"], capsys, "separator is ';'", "for --dataset antm2c")


def test_what_the_released_files_have_is_told_beside(ten: Made) -> None:
    told = list(log_lines(ten.counts["antm2c"]))
    assert told[0].startswith("train: 6 rows (published 8,536,558), 4 positives (published 2,765,092), 2 users")
    assert "scenes 1 / 2: 83 / 17 %" in told[0]
    assert "2 users (published 67,624) and 4 items (published 84,900) in all" in told


def test_items_of_several_titles_are_counted(tmp_path: Path) -> None:
    log = made(tmp_path, [*TEN, row("u", "a", "01 10:00:00", 1, item_title="7.0"), row("u", "b", "01 11:00:00", 1)])
    assert log.counts["antm2c"]["items_of_several_titles"] == 1
    titles = {line["item_title"] for line in log.rows if line["item_id"] == "a"}
    assert titles == {"about a", "7"}  # a text that is a number has the one form of ids


def test_a_clone_is_trained_on(tmp_path: Path) -> None:
    """From CSV to a report: every room reads such a pack."""
    gmeta("synth", "--kind", "antm2c", "--rows", 3000, "--out", tmp_path / "clone")
    for name in ("pack", "again"):
        words = ["--dataset", "antm2c", "--root", tmp_path / "clone", "--out", tmp_path / name]
        gmeta("prepare", *words, "--threads", 1 if name == "pack" else 2)
    pack = open_pack(tmp_path / "pack")
    summary = json.loads((tmp_path / "clone" / "summary.json").read_text())
    found = pack.manifest["counts"]["antm2c"]
    for split in pack.splits:
        assert found[split]["rows"] == sum(summary["rows"][split])
        assert found[split]["positives"] == summary["positives"][split]
        assert found[split]["items"] == summary["items"][split]
    assert found["separator"] == ","
    assert pack.schema.scenario == "scene"
    for file in sorted((tmp_path / "pack").rglob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(tmp_path / "pack")).read_bytes()
    run = tmp_path / "run"
    words = ["--pack", tmp_path / "pack", "--run_dir", run, "--model.name", "dlrm", "--meta.adapt", "[]"]
    gmeta("train", *words, "--schedule.max_steps", 3, "--loader.tasks_per_batch", 4)
    gmeta("evaluate", "--run_dir", run, "--resamples", 10, "--baselines", "false")
    cases = {record["case"] for record in json.loads((run / "evaluation.json").read_text())["records"]}
    assert "scene=2" in cases or any(case.startswith("scenario=") for case in cases)
