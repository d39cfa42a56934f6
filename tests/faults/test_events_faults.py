"""What is wrong with events is told in one sentence with its cure, and no pack is left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from commands import fails, gmeta
from event_packs import event_config, quiet, sequence

from gmeta.config.data import PrepareConfig
from gmeta.data.prepare.prepare import prepare

EVENTS = [*sequence("u", "a b c d", "Films"), *sequence("v", "b a x", "Films"), *sequence("v", "r s t", "Toys")]


def refused(folder: Path, events: list[dict[str, Any]], *parts: str, **settings: Any) -> None:
    """prepare raises a ValueError that says all of `parts`, and leaves nothing behind."""
    config = event_config(folder, events, **settings)
    refused_config(config, *parts)


def refused_config(config: PrepareConfig, *parts: str) -> None:
    with pytest.raises(ValueError) as caught:
        prepare(config, quiet)
    for part in parts:
        assert part in str(caught.value)
    assert not list(Path(config.out).parent.glob(Path(config.out).name + "*"))


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"user": "user"}, ["events.item is None: must be a column name"]),
        ({"user": "user", "item": "item", "titel": "text"}, ["unknown key 'titel': did you mean"]),
        ({"user": "user", "item": "user"}, ["events.item and events.user are both 'user': name two columns"]),
        ({"user": "user", "item": 7}, ["events.item is 7: must be a column name (a number in quotes)"]),
        (["user", "item"], ["holds no mapping", "gmeta prepare --help"]),
        ({"user": "usr", "item": "item"}, ["has no column 'usr': did you mean 'user'?"]),
    ],
)
def test_columns_that_are_none(tmp_path: Path, content: Any, parts: list[str]) -> None:
    config = event_config(tmp_path, EVENTS)
    (tmp_path / "events.yaml").write_text(yaml.safe_dump(content))
    refused_config(config, *parts)


def test_a_missing_file_of_columns(tmp_path: Path) -> None:
    config = event_config(tmp_path, EVENTS)
    (tmp_path / "events.yaml").unlink()
    refused_config(config, "events.yaml does not exist: it maps user and item")


def test_an_unknown_domain(tmp_path: Path) -> None:
    refused(tmp_path, EVENTS, "domains names 'Filmes', which no event has: did you mean 'Films'?", domains=["Filmes"])


def test_an_unknown_domain_of_a_named_data_set(tmp_path: Path) -> None:
    for domain in ("Beauty", "Sports", "Toys"):
        for kind in ("user_sequence", "item_text"):
            (tmp_path / f"{domain}.{kind}.txt").write_text("a b\n")
    config = PrepareConfig(out=str(tmp_path / "pack"), dataset="amazon-3domain", root=str(tmp_path), domains=["Beuaty"])
    refused_config(config, "domains names 'Beuaty', which no event has: did you mean 'Beauty'?")


def test_domains_without_a_column(tmp_path: Path) -> None:
    refused(tmp_path, sequence("u", "a b c"), "domains has no effect", "names no domain column", domains="Films")
    refused(tmp_path, sequence("u", "a b c"), "gaps is true, but", "names no time column: name it", gaps=True)


@pytest.mark.parametrize("time", ["2024-11-03", "999", "yesterday"])
def test_a_time_that_is_text(tmp_path: Path, time: str) -> None:
    events = [{**event, "time": time} for event in EVENTS]
    refused(tmp_path, events, "the time column 'time' holds texts: write it as whole numbers or as timestamps")


def test_a_time_in_csv_that_is_none(tmp_path: Path) -> None:
    config = event_config(tmp_path, [{**event, "time": 1} for event in EVENTS], input=[str(tmp_path / "events.csv")])
    (tmp_path / "events.csv").write_text("user,item,domain,time\nu,a,Films,1\nu,b,Films,noon\nu,c,Films,3\n")
    refused_config(config, "1 rows cannot be used", "noon")


def test_bad_rows(tmp_path: Path) -> None:
    refused(tmp_path, [*EVENTS, {"user": "u", "item": None, "domain": "Films"}], "1 rows cannot be used", "is missing")


def test_files_without_rows(tmp_path: Path) -> None:
    config = event_config(tmp_path, EVENTS)
    pq.write_table(pa.table({"user": pa.array([], pa.string()), "item": [], "domain": []}), tmp_path / "events.parquet")
    refused_config(config, "no row that can be used")


def test_users_of_one_event(tmp_path: Path) -> None:
    events = [event for i in range(5) for event in sequence(f"u{i}", "a")]
    refused(tmp_path, events, "every user has one event, which nothing follows")


def test_a_core_that_is_too_high(tmp_path: Path) -> None:
    refused(tmp_path, EVENTS, "core is 9: no user and item of 10 events has so many; lower it", core=9)
    with pytest.raises(ValueError, match="core is -1: must be 0, which leaves nothing out, or more"):
        event_config(tmp_path, EVENTS, core=-1)


@pytest.mark.parametrize(
    ("items", "part"),
    [
        ([{"item": "a"}], "has no column 'domain': there is: 'item'"),
        ([{"item": None, "domain": "Films"}], "column 'item' is missing in 1 rows: mend them or leave them out"),
        ([{"item": "a", "domain": None}], "column 'domain' is missing in 1 rows"),
        ([{"item": 1.5, "domain": "Films"}], "column 'item' is a fraction"),
        ([{"item": ["a"], "domain": "Films"}], "unfit for items: it needs one text or whole number a row"),
    ],
)
def test_items_that_are_none(tmp_path: Path, items: list[dict[str, Any]], part: str) -> None:
    refused(tmp_path, EVENTS, part, items=items)


def test_broken_lines_of_items(tmp_path: Path) -> None:
    config = event_config(tmp_path, EVENTS)
    (tmp_path / "items.csv").write_text('item,domain\na,Films\nb,Films,"more"\n')
    config = replace(config, items=str(tmp_path / "items.csv"))
    refused_config(config, "line 3 is no valid CSV line")


@pytest.mark.parametrize(
    ("domains", "told"), [(["aX"], "'b' has no domain"), (["aX", "aY"], "'a' has several domains")]
)
def test_domains_of_items_that_are_missing_or_several(tmp_path: Path, domains: list[str], told: str) -> None:
    items = [{"item": item, "domain": domain} for item, domain in domains]
    events = sequence("u", "a b" if len(items) == 1 else "a a")
    refused(tmp_path, events, f"item {told}", "of the items: give it one", items=items)


def test_an_id_that_is_taken(tmp_path: Path) -> None:
    events = [*sequence("u", "1 2", "A"), *sequence("u", "1 A|1", "B")]
    refused(tmp_path, events, "item 'A|1' is named like another one with its domain before it: rename it")


SETTINGS: dict[str, Any] = {
    "schema": "s.yaml",
    "label_threshold": 4.0,
    "split_query": "last",
    "roles": {"a": "support"},
    "support_size": 3,
    "query_size": 3,
    "query_ratio": 0.5,
    "min_task_rows": 2,
    "task_split": "user",
    "partitions": {"a": "train"},
    "valid_fraction": 0.2,
    "test_fraction": 0.2,
}


@pytest.mark.parametrize("key", SETTINGS)
def test_settings_without_effect_on_events(tmp_path: Path, key: str) -> None:
    refused(tmp_path, EVENTS, f"{key} has no effect on events", **{key: SETTINGS[key]})


def test_other_settings_that_do_not_go_together(tmp_path: Path) -> None:
    refused(tmp_path, EVENTS, "keeps its last ones", max_task_rows=5, max_task_rows_keep="random")
    refused(tmp_path, EVENTS, "root has no effect without dataset", root="x")
    refused(tmp_path, EVENTS, "name the files of events with --input", input=[])
    refused(tmp_path, EVENTS, "dataset ml-100k comes with its files and schema: leave events out", dataset="ml-100k")
    refused(tmp_path, EVENTS, "dataset amazon-office comes with its files and columns", dataset="amazon-office")


@pytest.mark.parametrize(
    ("key", "value"), [("items", "i.parquet"), ("core", 5), ("holdout", "leave_one_out"), ("domains", ["A"])]
)
def test_settings_of_events_alone(tmp_path: Path, key: str, value: Any) -> None:
    config = PrepareConfig(out=str(tmp_path / "pack"), input=["x"], schema="s.yaml", **{key: value})
    refused_config(config, f"{key} has no effect without events: name the columns of events with --events")


@pytest.mark.parametrize(("key", "value"), [("core", 5), ("holdout", "leave_one_out"), ("domains", ["A"])])
def test_settings_without_effect_on_given_targets(tmp_path: Path, key: str, value: Any) -> None:
    config = PrepareConfig(out=str(tmp_path / "pack"), dataset="amazon-office", root=".", **{key: value})
    refused_config(config, f"{key} has no effect with dataset amazon-office, whose targets are given: leave it out")


def test_events_without_times_are_no_base(tmp_path: Path) -> None:
    config = event_config(tmp_path, EVENTS)
    prepare(config, quiet)
    later = PrepareConfig(out=str(tmp_path / "later"), base=config.out, input=config.input)
    refused_config(later, "was made of events without times, or by an older gmeta")


def test_a_base_takes_no_events(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,click,item\n" + "u,1,a\nv,0,b\n" * 3)
    (tmp_path / "schema.yaml").write_text("{task: user, label: click, categorical: [item]}")
    logs: dict[str, Any] = {"input": [str(tmp_path / "log.csv")]}
    prepare(PrepareConfig(out=str(tmp_path / "pack"), schema=str(tmp_path / "schema.yaml"), **logs), quiet)
    later = PrepareConfig(out=str(tmp_path / "later"), base=str(tmp_path / "pack"), core=5, **logs)
    refused_config(later, "core has no effect with base: only a first pack of events asks for it")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = event_config(tmp_path, EVENTS)
    words = ["prepare", "--input", *config.inputs, "--events", config.events, "--out", config.out]
    fails([*words, "--domains", "[Flims]"], capsys, "did you mean 'Films'?")
    gmeta(*words, "--domains", "Films")
    told = " ".join(capsys.readouterr().out.split())
    assert "targets of test (cold: no training event has their item): Films 2" in told


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ("{name: a, vocabulary: all, min_count: 2}", "min_count has no effect with `vocabulary: all`"),
        ("{name: a, vocabulary: all, hash_buckets: 9}", "hash_buckets has no effect with `vocabulary: all`"),
        ("{name: a, vocabulary: every}", r"schema\.categorical\[0\]\.vocabulary is 'every': must be train or all"),
        ("{name: a, vocabulary: all}, {name: b, table: a}", "'a' and 'b' share table 'a' but differ in vocabulary"),
    ],
)
def test_a_vocabulary_that_is_none(tmp_path: Path, feature: str, message: str) -> None:
    (tmp_path / "log.csv").write_text("user,click,a,b\nu,1,x,y\n")
    (tmp_path / "schema.yaml").write_text(f"{{task: user, label: click, categorical: [{feature}]}}")
    config = PrepareConfig(
        out=str(tmp_path / "pack"), input=[str(tmp_path / "log.csv")], schema=str(tmp_path / "schema.yaml")
    )
    with pytest.raises(ValueError, match=message):
        prepare(config, quiet)
