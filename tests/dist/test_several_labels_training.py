"""Several labels, on one process and on two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from harness import run_ranks
from packs import DATA_SCHEMA, SCHEMA, make_pack
from test_train import config, run_steps

from gmeta.data.pack import open_pack
from gmeta.data.schema import LabelColumn
from gmeta.evaluation.score import Scores, score_split, validation_metrics
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.build import build_system

pytestmark = pytest.mark.dist

LABELS = (LabelColumn(name="click", loss="bce"), LabelColumn(name="stay", loss="mse", weight=0.2))


def _two(arrays: dict[str, np.ndarray]) -> None:
    """The second label is a number that half of the rows have; some rows have it alone."""
    rows = len(arrays["label"])
    stay = np.where(np.arange(rows) % 2 == 0, arrays["ids"][:, 1] / 10, np.nan)
    click = np.where(np.arange(rows) % 6 == 0, np.nan, arrays["label"])
    arrays["label"] = np.stack([click, stay], 1).astype(np.float32)


def pack_of(folder: Path) -> Path:
    schema = replace(SCHEMA, labels=LABELS)
    return make_pack(folder / "pack", schema=schema, data_schema=replace(DATA_SCHEMA, labels=LABELS), change=_two)


def scored(mesh: Mesh, pack: Path) -> Scores | None:
    system = build_system(config(pack), open_pack(pack).schema, mesh)
    return score_split(system, open_pack(pack).split("test"), tasks_per_batch=7)


def test_training_is_the_same_on_two_processes(tmp_path: Path) -> None:
    pack = pack_of(tmp_path)
    found = [run_ranks(n, run_steps, config(pack), 4)[0] for n in (1, 2)]
    for name, values in found[0].items():
        np.testing.assert_allclose(found[1][name], values, rtol=1e-9, atol=1e-11, err_msg=name)
    assert np.isfinite(found[0]["trace"]).all()


def test_scores_of_all_labels_are_gathered(tmp_path: Path) -> None:
    pack = pack_of(tmp_path)
    one, two = (run_ranks(n, scored, pack)[0] for n in (1, 2))
    assert one.after.shape == (len(one.row), 2)
    for number in range(2):
        expected = open_pack(pack).split("test").columns(label=number).label[one.row]
        assert np.array_equal(one.label[:, number], expected, equal_nan=True)
    metrics = [validation_metrics(found, "bce", LABELS) for found in (one, two)]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-9)
    assert {"loss_after", "auc/click_after", "mae/stay_before"} <= metrics[0].keys()
