"""Weighted rows, on one process and on two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from harness import run_ranks
from packs import DATA_SCHEMA, SCHEMA, make_pack
from test_train import config, run_steps

from gmeta.data.pack import open_pack
from gmeta.evaluation.score import Scores, score_split, validation_metrics
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.build import build_system

pytestmark = pytest.mark.dist


def _weights(arrays: dict[str, np.ndarray]) -> None:
    arrays["weight"] = (np.arange(len(arrays["label"])) % 4).astype(np.float32) / 2


def pack_of(folder: Path) -> Path:
    schema, raw = replace(SCHEMA, weight="w"), replace(DATA_SCHEMA, weight="w")
    return make_pack(folder / "pack", schema=schema, data_schema=raw, change=_weights)


def scored(mesh: Mesh, pack: Path) -> Scores | None:
    system = build_system(config(pack), open_pack(pack).schema, mesh)
    return score_split(system, open_pack(pack).split("test"), tasks_per_batch=7)


def test_weighted_training_is_the_same_on_two_processes(tmp_path: Path) -> None:
    pack = pack_of(tmp_path)
    plain = make_pack(tmp_path / "plain")
    found = [run_ranks(n, run_steps, config(pack), 4)[0] for n in (1, 2)]
    for name, values in found[0].items():
        np.testing.assert_allclose(found[1][name], values, rtol=1e-9, atol=1e-11, err_msg=name)
    unweighted = run_ranks(1, run_steps, config(plain), 4)[0]
    assert np.abs(unweighted["trace"][:, 0] - found[0]["trace"][:, 0]).max() > 1e-3


def test_validation_counts_weights_on_any_number_of_processes(tmp_path: Path) -> None:
    pack = pack_of(tmp_path)
    one, two = (run_ranks(n, scored, pack)[0] for n in (1, 2))
    weight = open_pack(pack).split("test").columns().weight
    assert weight is not None
    assert np.array_equal(one.weight, weight[one.row])
    assert np.array_equal(one.weight, two.weight)
    metrics = [validation_metrics(found, "bce") for found in (one, two, replace(one, weight=None))]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-9)
    assert abs(metrics[0]["loss_after"] - metrics[2]["loss_after"]) > 1e-4
