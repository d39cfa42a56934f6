"""`gmeta gate` on real small runs: the same raw rows for both versions, whatever their vocabularies and the ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import fails, gmeta, train_words
from harness import run_ranks
from packs import ITEMS, SCHEMA, TAGS, make_pack, values_of

from gmeta.cli import run
from gmeta.config.delivery import GateConfig
from gmeta.data.loader import TaskLoader
from gmeta.data.pack import manifest_checksum, open_pack
from gmeta.delivery.gate import judge_on
from gmeta.evaluation.score import score_split
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.build import load_system
from gmeta.runs.bundle import open_bundle
from gmeta.runs.translation import translation_of

pytestmark = pytest.mark.dist

Arrays = dict[str, np.ndarray]
ORDER = np.concatenate([[0], 1 + np.random.default_rng(5).permutation(ITEMS - 1)])
"""Id of day 1 of each id of day 0."""
NEW = (7, 11)
"""Items of day 1 that day 0 has under other names, that is, not."""


def liked(arrays: Arrays) -> None:
    """Clicks follow the items' quality and the tasks' mood, so that a support helps and some items are better."""
    rng = np.random.default_rng(int(arrays["task_id"][0]) + len(arrays["label"]))
    quality = np.random.default_rng(3).normal(size=ITEMS)
    size = np.diff(arrays["row_start"], append=len(arrays["label"]))
    mood = np.repeat(rng.normal(size=len(size)), size)
    logit = 1.3 * quality[arrays["ids"][:, 1]] + mood - 1.0
    arrays["label"][:] = rng.random(len(logit)) < 1 / (1 + np.exp(-logit))


def day1(change: Callable[[Arrays], object] = lambda arrays: None) -> dict[str, Any]:
    """Settings of a pack whose items and tags have their ids in another order; two of its items are new."""

    def changed(arrays: Arrays) -> None:
        liked(arrays)
        change(arrays)
        arrays["ids"][:, 1] = ORDER[arrays["ids"][:, 1]]
        tags = arrays["tags.values"]
        tags[:] = np.where(tags > 0, TAGS - tags, 0)

    def values(table: str, num_ids: int) -> list[str]:
        old = values_of(table, num_ids)
        if table != "item":
            return old[::-1] if table == "tags" else old
        named = {ORDER[i]: f"new{i}" if i in NEW else old[i - 1] for i in range(1, num_ids)}
        return [named[i] for i in range(1, num_ids)]

    return {"change": changed, "values": values, "seed": 2}


def flipped(arrays: Arrays, share: float = 1.0) -> None:
    chosen = np.random.default_rng(9).random(len(arrays["label"])) < share
    arrays["label"][:] = np.where(chosen, 1 - arrays["label"], arrays["label"])


@dataclass
class World:
    path: Path

    def gate(self, candidate: str, current: str, pack: str, out: str, *more: object) -> tuple[int, dict[str, Any]]:
        words = ["--candidate", candidate, "--current", current, "--pack", pack, "--out", out, "--resamples", 60]
        words = [self.path / word if i % 2 and i < 8 else word for i, word in enumerate(words)]
        code = run([str(word) for word in ["gate", *words, *more]])
        return code, json.loads((self.path / out / "verdict.json").read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Day 0, whose version serves; day 1, sound and with turned labels, each with a version that was trained on it."""
    path = tmp_path_factory.mktemp("gate")
    sizes = {"train": 200, "valid": 10, "test": 250}
    make_pack(path / "pack0", **sizes, change=liked)
    make_pack(path / "pack1", **sizes, **day1())
    make_pack(path / "turned", **sizes, **day1(flipped))
    more = ("--precision", "float64", "--meta.inner_lr", 0.1, "--dense.lr", 0.01, "--embedding.lr", 0.05)
    gmeta(*train_words(path / "pack0", path / "run0", *more, epochs=4))
    gmeta("bundle", "--run_dir", path / "run0", "--out", path / "v0")
    for name in ("pack1", "turned"):
        run_dir = path / f"run-{name}"
        warm = ("--warm_start", path / "v0", "--loader.tasks_per_batch", 20, "--schedule.epochs", 4)
        gmeta("train", "--pack", path / name, "--run_dir", run_dir, *warm)
    return World(path)


def rule(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [found for found in document["rules"] if found["rule"] == name]


def differences(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [d for d in document["evaluation"]["differences"] if d["against"] == "current"]


def test_a_better_candidate_passes(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = world.gate("run-pack1", "v0", "pack1", "better", "--previous_pack", world.path / "pack0")
    said = capsys.readouterr().out
    assert (code, document["passed"]) == (0, True), said
    assert "passed: the candidate may serve" in said
    assert document["candidate"].startswith("run-pack1-")
    assert document["current"] == open_bundle(world.path / "v0").id
    pack = open_pack(world.path / "pack1")
    assert document["pack"]["xxh3"] == pack.manifest["xxh3"]
    assert document["pack"]["rows"] == int(pack.split("test").columns().is_query.sum())
    unknown = document["data"]["unknown"]["item"]
    assert unknown["current"] > unknown["candidate"] > 0  # id 0 of the pack, and two new items
    assert {"candidate", "current", "candidate-before", "item-mean+task-bias"} <= {*document["evaluation"]["variants"]}
    assert document["metrics"]["all"]["auc"] > document["data"]["current_now"]["all"]["auc"]
    assert document["metrics"]["all"]["rows"] == document["pack"]["rows"]
    page = (world.path / "better" / "verdict.html").read_text()
    assert "Passed." in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")


@pytest.mark.parametrize("candidate", ["v0", "run0"])
def test_the_current_version_itself_passes_with_no_difference(world: World, candidate: str) -> None:
    code, document = world.gate(candidate, "v0", "pack1", f"same-{candidate}")
    assert (code, document["passed"]) == (0, True), [r["reason"] for r in document["rules"] if not r["passed"]]
    found = {value for d in differences(document) for value in (d["value"], d["low"], d["high"])}
    assert found <= {0.0, None}
    assert document["candidate"] == document["current"]


def test_both_versions_score_the_same_raw_rows(world: World) -> None:
    """The current version scores rows in the candidate's ids as the same rows in its own: bit for bit."""

    def own_ids(arrays: Arrays) -> None:
        liked(arrays)
        arrays["ids"][np.isin(arrays["ids"][:, 1], NEW), 1] = 0

    sizes = {"train": 200, "valid": 10, "test": 250}
    own = open_pack(make_pack(world.path / "own", **sizes, seed=2, change=own_ids))
    system, _, _ = load_system(world.path / "v0", "best", Mesh())
    found = []
    for pack in (own, open_pack(world.path / "pack1")):
        translate = translation_of(world.path / "v0", pack)
        found.append(score_split(system, pack.split("test"), tasks_per_batch=64, translate=translate))
    one, two = found
    assert one is not None
    assert two is not None
    assert not translation_of(world.path / "v0", own).tables
    for name in ("row", "task", "label", "before", "after"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def record_metrics(bundle: Path, metrics: dict[str, Any]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text()) | {"metrics": metrics}
    manifest["xxh3"] = manifest_checksum(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_a_day_with_turned_labels_is_refused(world: World) -> None:
    """A candidate that learned them is better on them than the current version, whose own fall gives them away."""
    code, document = world.gate("run-turned", "v0", "turned", "turned")
    assert (code, document["passed"]) == (3, False)
    gain = next(d for d in differences(document) if (d["case"], d["metric"]) == ("all", "auc"))
    assert gain["low"] > 0
    assert gain["value"] > 0.3
    assert [found["passed"] for found in rule(document, "difference")].count(False) == 0
    assert not all(found["passed"] for found in rule(document, "current_chance"))
    assert "--previous_pack" in rule(document, "current_drop")[0]["reason"]
    assert "Refused." in (world.path / "turned" / "verdict.html").read_text()

    _, told = world.gate("run-turned", "v0", "turned", "told", "--previous_pack", world.path / "pack0")
    assert not any(found["passed"] for name in ("current_drop", "label_mean") for found in rule(told, name))
    shutil.copytree(world.path / "v0", world.path / "recorded")
    record_metrics(world.path / "recorded", told["data"]["current_before"])
    _, recorded = world.gate("run-turned", "recorded", "turned", "recorded-out")
    (one, two), (three, four) = rule(told, "current_drop"), rule(recorded, "current_drop")
    assert (one["value"], two["value"]) == (three["value"], four["value"])


def test_a_day_with_some_labels_turned_is_refused(world: World) -> None:
    """A quarter of them leaves the order right, on the whole: only what the current version scored before shows it."""
    make_pack(world.path / "partly", train=200, valid=10, test=250, **day1(partial(flipped, share=0.25)))
    _, document = world.gate("v0", "v0", "partly", "partly-out", "--previous_pack", world.path / "pack0")
    assert all(found["passed"] for found in rule(document, "current_chance"))
    assert not all(found["passed"] for found in rule(document, "current_drop"))


@pytest.mark.parametrize("adapt", ["[embeddings, decision]", "[]"])
def test_ratings_have_rules_of_their_own(tmp_path: Path, adapt: str) -> None:
    def rated(arrays: Arrays) -> None:
        liked(arrays)
        arrays["label"][:] = 3 + arrays["label"] + np.random.default_rng(1).normal(size=len(arrays["label"]))

    schema = replace(SCHEMA, binary_label=False, label_mean=3.3)
    make_pack(tmp_path / "pack", 100, 10, 250, schema=schema, change=rated)
    gmeta(*train_words(tmp_path / "pack", tmp_path / "run", "--loss", "mse", "--meta.adapt", adapt, epochs=1))
    code, document = World(tmp_path).gate("run", "run", "pack", "out")
    assert (code, {r["metric"] for r in document["rules"]}) == (0, {None, "mae", "rmse", "calibration"})
    assert {d["value"] for d in differences(document)} <= {0.0, None}
    assert ("current-before" in document["evaluation"]["variants"]) == (adapt != "[]")
    assert rule(document, "label_mean")[0]["judged"]


def verdicts(mesh: Mesh, config: GateConfig) -> tuple[bool, dict[str, Any]]:
    verdict = judge_on(mesh, config)
    return verdict.passed, verdict.document


def test_ranks_give_one_verdict(world: World) -> None:
    found = []
    for nproc in (1, 2):
        config = GateConfig(
            candidate=str(world.path / "run-pack1"),
            current=str(world.path / "v0"),
            pack=str(world.path / "pack1"),
            out=str(world.path / f"ranks{nproc}"),
            previous_pack=str(world.path / "pack0"),
            resamples=20,
        )
        (passed, document), *others = run_ranks(nproc, verdicts, config)
        assert others == [(passed, {})] * (nproc - 1)
        found.append(document)
    one, two = found
    assert one["passed"] == two["passed"]
    assert [r["passed"] for r in one["rules"]] == [r["passed"] for r in two["rules"]]
    for kind in ("records", "differences"):
        values = [[r["value"] for r in document["evaluation"][kind]] for document in found]
        np.testing.assert_allclose(*(np.array(v, np.float64) for v in values), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_a_launched_gate_ends_with_the_code_of_its_verdict(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    code, document = world.gate("run-turned", "v0", "turned", "launched", "--nproc", 2)
    assert (code, document["passed"]) == (3, False)
    said = capfd.readouterr().err
    assert (said.count("the candidate is refused"), said.count("failed")) == (1, 0), said


def test_numbers_of_other_means_are_counted_anew(world: World, tmp_path: Path) -> None:
    aged = replace(SCHEMA, numeric=(replace(SCHEMA.numeric[0], mean=3.0, std=2.0), *SCHEMA.numeric[1:]))
    pack = open_pack(make_pack(tmp_path / "aged", 20, 4, 4, schema=aged))
    split = pack.split("test")
    batch = next(iter(TaskLoader(split, tasks_per_batch=4, seed=0, shuffle=False)))
    read = translation_of(world.path / "v0", pack)(batch)
    for ours, theirs in ((read.support, batch.support), (read.query, batch.query)):
        torch.testing.assert_close(ours.dense[..., 0], theirs.dense[..., 0] * 2 + 3)
        torch.testing.assert_close(ours.dense[..., 1], theirs.dense[..., 1])


def test_what_cannot_be_judged_is_named(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["gate", "--candidate", world.path / "run0", "--current", world.path / "v0", "--out", tmp_path / "out"]
    logged = replace(SCHEMA, numeric=(replace(SCHEMA.numeric[0], log=True), *SCHEMA.numeric[1:]))
    other = make_pack(tmp_path / "other", 20, 4, 4, schema=logged)
    fails([*words, "--pack", other], capsys, "numeric column 'age': log is True, expected False", "gmeta prepare")
    nothing = make_pack(tmp_path / "nothing", 20, 0, 0)
    fails([*words, "--pack", nothing], capsys, "has no test and no valid tasks")
    (tmp_path / "rules.yaml").write_text("rules: [{rule: difference, metric: auc, margin: 1, slices: [item_colt]}]")
    given = ["--pack", world.path / "pack1", "--rules", tmp_path / "rules.yaml"]
    fails([*words, *given], capsys, "rule 1 (difference)", "'item_colt', which is unknown: did you mean 'item_cold'?")
    fails([*words, "--pack", world.path / "pack1", "--previous_pack", tmp_path], capsys, "is no task pack")
    assert not (tmp_path / "out" / "verdict.json").exists()
