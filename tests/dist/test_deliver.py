"""`gmeta deliver`: days of a stream become versions, a stopped delivery goes on, a damaged day is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from commands import fails, gmeta
from stopped_deliveries import stopped_after

from gmeta.cli import run
from gmeta.config.delivery import GateConfig
from gmeta.delivery import deliver as stages
from gmeta.recommender.recommender import load
from gmeta.runs.registry import open_registry

TRAIN = {
    "model": {"name": "neural_linear", "args": {"hidden": [8]}},
    "meta": {"adapt": ["last_layer"]},
    "schedule": {"epochs": 2, "eval_every": 5},
    "loader": {"tasks_per_batch": 64},
}
RULES = """rules:
  - {rule: evidence, min_tasks: 10, min_rows: 100}
  - {rule: finite}
  - {rule: current_chance, min: 0.5}
  - {rule: difference, metric: auc, slices: [all], margin: 0.2}
"""
Deliver = Callable[..., int]


@pytest.fixture(scope="module", autouse=True)
def few_resamples() -> Iterator[None]:
    """The gate's thousand take longer than all that a delivery does besides."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "GateConfig", partial(GateConfig, resamples=100))
        yield


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four days, and rules that a version of two epochs passes."""
    place = tmp_path_factory.mktemp("deliver")
    gmeta("synth", "--out", place / "log", "--days", 4, "--users", 1200, "--items", 60, "--rows_per_user", 16)
    (place / "rules.yaml").write_text(RULES)
    return place


def deliver(stream: Path, registry: Path, *days: int, **more: Any) -> int:
    words: list[object] = ["deliver", "--registry", registry, "--work", registry.parent / f"work-{registry.name}"]
    inputs = [str(more.pop("log", stream / "log") / f"day={day:02d}") for day in days]
    words += ["--input", json.dumps(inputs), "--rules", more.pop("rules", stream / "rules.yaml")]
    for key, value in more.items():
        words += [f"--{key}", json.dumps(value) if isinstance(value, dict) else value]
    return run([str(word) for word in words])


@pytest.fixture(scope="module")
def first(stream: Path) -> Path:
    """A registry whose first version was made of two days."""
    registry = stream / "first"
    assert deliver(stream, registry, 0, 1, schema=stream / "log" / "schema.yaml", train_with=TRAIN) == 0
    return registry


@pytest.fixture
def registry(first: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(first, tmp_path / "registry"))


def test_a_day_becomes_the_version_that_serves(stream: Path, registry: Path) -> None:
    assert deliver(stream, registry, 2) == 0
    found = open_registry(str(registry))
    one, two = found.versions()
    pointer = found.current()
    assert pointer is not None
    assert (pointer.version, pointer.id) == (2, two.id)
    assert (one.manifest["parent"], two.manifest["parent"]) == (None, one.id)
    assert (one.manifest["day"], two.manifest["day"]) == (0, 1)
    assert two.manifest["gate"]["passed"]
    assert one.manifest["metrics"]["all"]["auc"] > 0.5
    assert two.manifest["metrics"]["all"]["rows"] > 100
    assert not list((registry.parent / "work-registry").glob("*/pack"))  # what was made on the way is gone
    table = duckdb.sql(
        f"FROM read_parquet('{stream}/log/day=03/*.parquet') ORDER BY timestamp LIMIT 200"
    ).to_arrow_table()
    served = load(f"{registry}/current").adapt(table).predict(table)
    assert np.isfinite(served).all()


_OTHERS = ("fetch", "prepare", "bundle", "gate", "publish")


@pytest.mark.parametrize("stage", [*(pytest.param(name, marks=pytest.mark.slow) for name in _OTHERS), "train"])
def test_a_delivery_that_was_stopped_goes_on(
    stream: Path, registry: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stopped_after(stage, monkeypatch):
        assert deliver(stream, registry, 2) == 130
    made: list[str] = []
    for name, stage_ in list(stages.STAGES.items()):
        monkeypatch.setitem(stages.STAGES, name, lambda d, n=name, s=stage_: (made.append(n), s(d))[1])
    assert deliver(stream, registry, 2) == 0
    assert made == list(stages.STAGES)[list(stages.STAGES).index(stage) :]
    found = open_registry(str(registry))
    assert [one.number for one in found.versions()] == [1, 2]
    assert found.current().version == 2  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_first_delivery_that_was_stopped_goes_on(
    stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: dict[str, Any] = {"schema": stream / "log" / "schema.yaml", "train_with": TRAIN}
    with stopped_after("publish", monkeypatch):
        assert deliver(stream, tmp_path / "registry", 0, 1, **words) == 130
    assert deliver(stream, tmp_path / "registry", 0, 1, **words) == 0
    assert [one.number for one in open_registry(str(tmp_path / "registry")).versions()] == [1]


def test_a_damaged_day_is_refused_and_the_next_one_goes_on_without_it(
    stream: Path, registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stream / "log" / "day=02", tmp_path / "bad" / "day=02")
    (file,) = (tmp_path / "bad" / "day=02").glob("*.parquet")
    duckdb.sql(f"COPY (SELECT * REPLACE (1 - label AS label) FROM '{file}') TO '{file}.new' (FORMAT parquet)")
    Path(f"{file}.new").replace(file)
    assert deliver(stream, registry, 2, log=tmp_path / "bad") == 3
    assert "version 1 stays current" in capsys.readouterr().out
    found = open_registry(str(registry))
    assert [one.refused for one in found.versions()] == [False, True]
    assert found.current().version == 1  # type: ignore[union-attr]
    assert deliver(stream, registry, 3) == 0
    assert found.current().version == 3  # type: ignore[union-attr]
    assert found.versions()[2].manifest["parent"] == found.versions()[0].id
    before = found.versions()[2].manifest["gate"]["data"]["before_from"]
    assert before == "as its manifest says"  # what it scored on the damaged day is no measure


@pytest.mark.slow
def test_after_a_sound_day_that_was_refused_the_next_is_compared_with_it(
    stream: Path, registry: Path, tmp_path: Path
) -> None:
    drop = "{rule: current_drop, max_drop: 0.3, min_rows: 50}"
    strict, usual = tmp_path / "strict.yaml", tmp_path / "usual.yaml"
    strict.write_text(f"rules: [{drop}, {{rule: evidence, min_rows: 1000000}}]")
    usual.write_text(f"rules: [{drop}, {{rule: finite}}]")
    assert deliver(stream, registry, 2, rules=strict) == 3
    assert deliver(stream, registry, 3, rules=usual) == 0
    refused, passed = (record.manifest["gate"]["data"] for record in open_registry(str(registry)).versions()[1:])
    assert refused["before_from"] == "as its manifest says"
    assert passed["before_from"] == "as the verdict on version 2 says"
    assert passed["current_before"] == refused["current_now"]
    assert passed["usual_label_mean"] == refused["label_mean"]


@pytest.mark.slow
def test_a_full_version_is_trained_anew_and_judged(stream: Path, registry: Path) -> None:
    assert deliver(stream, registry, 0, 1, 2, full="true", schema=stream / "log" / "schema.yaml", train_with=TRAIN) == 0
    found = open_registry(str(registry)).versions()[1]
    assert (found.manifest["parent"], found.manifest["day"]) == (None, 0)


def test_mistakes_are_told(stream: Path, registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["deliver", "--registry", registry, "--work", tmp_path / "work", "--input"]
    day = stream / "log" / "day=02"
    fails([*words, day, "--schema", stream / "log" / "schema.yaml"], capsys, "leave it out")
    fails(
        [*words, day, "--prepare_with", '{"base": "x"}'],
        capsys,
        "prepare_with.base is 'x': deliver sets it; leave it out",
    )
    fails(["deliver", "--registry", tmp_path / "none", "--input", day], capsys, "is empty: name the schema of the rows")
    fails([*words, tmp_path / "nothing"], capsys, "nothing")
    first = stream / "log" / "day=00"
    fails([*words, first], capsys, "was delivered already, with version 1 of")  # by the first version
    fails([*words, day, "--train_with", '{"schedul": 1}'], capsys, "unknown key schedul")
    fails([*words, day, "--rules", tmp_path / "none.yaml"], capsys, "none.yaml cannot be read")
    (tmp_path / "rules.yaml").write_text("rules: [{rule: evidense}]")
    fails([*words, day, "--rules", tmp_path / "rules.yaml"], capsys, "did you mean 'evidence'?")
    assert not list((tmp_path / "work").iterdir())  # nothing is left of what failed
    empty = tmp_path / "empty.csv"
    columns = duckdb.sql(f"FROM read_parquet('{day}/*.parquet')").columns
    empty.write_text(",".join(columns) + "\n")
    fails([*words, empty], capsys, "no row")


@pytest.mark.slow
def test_rows_are_delivered_once_and_a_pin_stays(
    stream: Path, registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    day = stream / "log" / "day=02"
    words = ["deliver", "--registry", registry, "--work", tmp_path / "work", "--input"]
    assert deliver(stream, registry, 2, keep="true") == 0
    capsys.readouterr()
    fails([*words, day], capsys, "was delivered already")
    kept = registry.parent / f"work-{registry.name}"
    assert deliver(stream, registry, 3) == 0
    again = ["deliver", "--registry", registry, "--work", kept, "--rules", stream / "rules.yaml", "--keep", "true"]
    fails([*again, "--input", json.dumps([str(day)])], capsys, "these rows were delivered already, as version 2")
    assert list(kept.glob("*/pack"))
    gmeta("registry", "pin", 1, "--registry", registry)
    assert deliver(stream, registry, 2, checkpoint="best") == 0
    assert "version 4 is stored" in (said := capsys.readouterr().out)
    assert "version 1 stays pinned" in said


def test_one_delivery_at_a_time(
    stream: Path, registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["deliver", "--registry", registry, "--input", stream / "log" / "day=02", "--work", tmp_path / "work"]
    with stages.hold_lease(open_registry(str(registry)).store, stages.LEASE, "a delivery"):
        fails(words, capsys, "is running (process", "wait for it")
    assert not (registry / stages.LEASE).exists()


@pytest.mark.slow
def test_two_workers_deliver_what_one_does(stream: Path, first: Path, tmp_path: Path) -> None:
    scores = []
    for nproc in (1, 2):
        registry = Path(shutil.copytree(first, tmp_path / f"registry-{nproc}"))
        assert deliver(stream, registry, 2, nproc=nproc, train_with={"precision": "float64"}) == 0
        rows = duckdb.sql(f"FROM read_parquet('{stream}/log/day=03/*.parquet') ORDER BY timestamp LIMIT 500")
        table = rows.to_arrow_table()
        scores.append(load(f"{registry}/current").adapt(table).predict(table))
    np.testing.assert_allclose(*scores, atol=1e-9)
