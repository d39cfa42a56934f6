"""Runs whose lower layers are trained: resumed, gone on with from a bundle, and served as they were evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import gmeta, logged
from days import tensors
from encoders import WHY, tiny
from serving import Client, tasks_of, with_client
from test_bahe_delivered import judged, settings_of
from text_models import in_words, text_pack, text_rows

import gmeta as package

pytest.importorskip("transformers", reason=WHY)
pytestmark = [pytest.mark.dist, pytest.mark.slow]

STEPS, SCHEDULE = 6, {"epochs": 9, "eval_every": 3, "patience": 0}


def train(folder: Path, run: str, steps: int = STEPS, **more: object) -> Path:
    """A run whose kept vectors are made anew before steps 0 and 4, and that validates in between."""
    settings = settings_of(folder)
    settings["model"]["args"] |= {"refresh": 4, "hidden": [16]}
    settings |= {"dense": {"lr": 0.003}, "meta": {"adapt": ["head"], "inner_lr": 0.01}}
    settings["schedule"] = {**SCHEDULE, "max_steps": steps}
    settings |= {"pack": str(folder / "pack"), "run_dir": str(folder / run), **more}
    return package.train(settings).path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refreshed")
    tiny(folder / "bert", "bert")
    text_pack(folder, **in_words(text_rows()))
    train(folder, "run")
    return folder


def test_a_run_that_stops_goes_on_with_the_same_bits(folder: Path) -> None:
    train(folder, "half", STEPS // 2)
    gmeta("bundle", "--run_dir", folder / "half", "--checkpoint", "last", "--out", folder / "version")
    train(folder, "half", resume=True)
    schedule = {**SCHEDULE, "max_steps": STEPS, "position": "continue"}
    train(folder, "warm", warm_start=str(folder / "version"), schedule=schedule)
    expected = tensors(folder / "run")
    assert "buffers.model.low.refreshed" in expected
    for run in ("half", "warm"):
        found = tensors(folder / run)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), run
        assert after_half(folder / run) == after_half(folder / "run")


def after_half(run: Path) -> list[dict[str, Any]]:
    return [record for record in logged(run) if record["step"] > STEPS // 2]


def others(folder: Path) -> package.Recommender:
    """The run with the layers of its last refresh."""
    rec = package.load(folder / "run")
    rec.system.learner.model.low.stack.load_state_dict(rec.system.learner.model.low.as_refreshed(), strict=False)
    return rec


def test_what_is_served_is_what_was_evaluated(folder: Path, tmp_path: Path) -> None:
    """By the layers of the weights, not those of the last refresh, nor those of the encoder's folder."""
    support, query, expected = judged(folder)
    assert others(folder).adapt(support).predict(query) != pytest.approx(expected, abs=1e-3)
    gmeta("bundle", "--run_dir", folder / "run", "--out", tmp_path / "bundle")
    assert not (tmp_path / "bundle" / "assets" / "texts").exists()
    away = (folder / "bert").rename(folder / "away")
    try:
        for values in ({}, {"mapped": True}):
            found = package.load(tmp_path / "bundle", **values).adapt(support).predict(query)
            np.testing.assert_allclose(found, expected, atol=1e-4)

        async def work(client: Client) -> None:
            tasks = tasks_of(support.drop_columns(["time"]), query.drop_columns(["time"]))
            answered = await client.score(*tasks)
            assert answered.status_code == 200, answered.text
            scores = [score for task in answered.json()["tasks"] for score in task["scores"]]
            np.testing.assert_allclose(scores, expected, atol=1e-4)

        with_client(tmp_path / "bundle", work)
    finally:
        away.rename(folder / "bert")
