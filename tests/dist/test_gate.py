"""`gmeta gate` on real small runs: the same raw rows for both versions, whatever their vocabularies and the ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import fails, gmeta, train_words
from harness import run_ranks
from packs import ITEMS, make_pack, values_of

from gmeta.cli import run
from gmeta.config.delivery import GateConfig
from gmeta.data.pack import manifest_checksum, open_pack
from gmeta.delivery.gate import judge_on
from gmeta.evaluation.score import score_split
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.build import load_system
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
    """Settings of a pack whose item ids are in another order; two of its items are new."""

    def changed(arrays: Arrays) -> None:
        liked(arrays)
        change(arrays)
        arrays["ids"][:, 1] = ORDER[arrays["ids"][:, 1]]

    def values(table: str, num_ids: int) -> list[str]:
        old = values_of(table, num_ids)
        if table != "item":
            return old
        named = {ORDER[i]: f"new{i}" if i in NEW else old[i - 1] for i in range(1, num_ids)}
        return [named[i] for i in range(1, num_ids)]

    return {"change": changed, "values": values, "seed": 2}


def flipped(arrays: Arrays) -> None:
    arrays["label"][:] = 1 - arrays["label"]


@dataclass
class World:
    path: Path

    def gate(self, candidate: str, current: str, pack: str, out: str, *more: object) -> tuple[int, dict[str, Any]]:
        words = ["--candidate", candidate, "--current", current, "--pack", pack, "--out", out, "--resamples", 200]
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


def test_a_better_candidate_passes(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = world.gate("run-pack1", "v0", "pack1", "better", "--previous_pack", world.path / "pack0")
    print(capsys.readouterr().out)
    assert (code, document["passed"]) == (0, True)
    assert False
