"""The learning curve: paired points, what cannot be measured, the tables that show it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gmeta.config.evaluation import EvaluateConfig
from gmeta.evaluation.metrics import metric
from gmeta.evaluation.predictions import Variants
from gmeta.evaluation.slices import evaluation_records, write_evaluation
from gmeta.evaluation.support_curve import SupportCurve, print_curve

SIZES = (0, 2, 5)


def evaluation(variants: tuple[str, ...] = ("before", "after", "task-mean"), num_tasks: int = 40) -> dict[str, Any]:
    """An evaluation with a curve on which `after` improves with its support; at size 2 `task-mean` diverges."""
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(num_tasks), 8)
    truth = rng.normal(size=len(task))
    columns = {"label": (truth > 0).astype(float), "task": task, "binary": True, "resamples": 30, "seed": 0}
    noise = rng.normal(size=len(task))

    def at(size: int) -> Variants:
        logits = dict.fromkeys(variants, 0.3 * truth + noise)
        if "after" in variants:
            logits["after"] = (0.3 + 0.2 * size) * truth + noise
        if size == 2:
            logits[variants[-1]] = np.where(task == 3, np.nan, logits[variants[-1]])
        return Variants({name: 1 / (1 + np.exp(-values)) for name, values in logits.items()}, logits)

    whole = at(5)
    support = rng.integers(0, 7, size=num_tasks)
    zeros = np.zeros(len(task))
    document = evaluation_records(
        whole.predictions,
        ranking=whole.ranking,
        support_size=support[task],
        item_cold=zeros,
        task_cold=False,
        **columns,
    )
    curve = SupportCurve(document["variants"], document["reference"], **columns)
    for size in SIZES:
        curve.add(size, at(size))
    document["support_curve"] = curve.document(support)
    document["notes"] += curve.notes
    point = at(2)
    expected = metric("auc", point.predictions["before"], columns["label"], task, logit=point.ranking["before"])
    document["expected"] = {"before": expected, "short": [int((support < size).sum()) for size in SIZES]}
    return document


def of(document: dict[str, Any], kind: str, **keys: Any) -> dict[str, Any]:
    found = [r for r in document["support_curve"][kind] if all(r[key] == value for key, value in keys.items())]
    assert len(found) == 1
    return dict(found[0])


def test_points_are_paired_on_the_same_tasks() -> None:
    document = evaluation()
    after = {size: of(document, "records", size=size, variant="after", metric="auc") for size in SIZES}
    before = of(document, "records", size=2, variant="before", metric="auc")
    assert before["value"] == document["expected"]["before"]
    assert after[0]["value"] < after[2]["value"] < after[5]["value"]
    gain = of(document, "gains", size=5, variant="after", metric="auc")
    assert gain["from_size"] == 2
    assert gain["value"] == after[5]["value"] - after[2]["value"]
    assert 0 < gain["low"] < gain["high"]
    assert gain["high"] - gain["low"] < after[5]["high"] - after[5]["low"], "paired intervals are narrower"
    difference = of(document, "differences", size=5, against="before", metric="auc")
    assert difference["value"] == after[5]["value"] - before["value"]
    assert not [r for r in document["support_curve"]["gains"] if r["variant"] == "before"]
    sizes = document["support_curve"]["sizes"]
    assert [point["short_tasks"] for point in sizes] == document["expected"]["short"]


def test_a_point_that_diverges_is_null_and_said() -> None:
    document = evaluation()
    found = of(document, "records", size=2, variant="task-mean", metric="auc")
    assert (found["value"], found["low"], found["n"]) == (None, None, 0)
    assert of(document, "records", size=5, variant="task-mean", metric="auc")["value"] is not None
    assert of(document, "differences", size=2, against="task-mean", metric="auc")["value"] is None
    assert [note for note in document["notes"] if "task-mean diverges with 2 support rows" in note]
    assert "NaN" not in json.dumps(document, allow_nan=False)


def test_print_curve_shows_every_variant_and_size() -> None:
    document = evaluation()
    out = io.StringIO()
    print_curve(document, out)
    text = out.getvalue()
    last = of(document, "records", size=5, variant="after", metric="auc")
    assert f"{last['value']:.4f} │ {last['low']:.4f} … {last['high']:.4f}" in text
    for word in (
        "before",
        "task-mean",
        "undefined",
        "better",
        "tasks with fewer",
        str(document["expected"]["short"][-1]),
    ):
        assert word in text


def test_a_plain_run_has_a_curve_too() -> None:
    document = evaluation(("before", "task-mean"))
    out = io.StringIO()
    print_curve(document, out)
    assert "after" not in out.getvalue()
    assert of(document, "differences", size=5, against="task-mean", metric="auc")["variant"] == "before"


@pytest.mark.parametrize(
    ("given", "sizes"),
    [(None, ()), ("5,0,1", (0, 1, 5)), ([10, 2, 2], (2, 10)), (7, (7,)), ("3", (3,)), (" 1, 2", (1, 2))],
)
def test_support_sizes_are_numbers(given: Any, sizes: tuple[int, ...]) -> None:
    assert EvaluateConfig(run_dir="run", support_sizes=given).sizes == sizes


@pytest.mark.parametrize("given", ["", "1,,2", "-1", "1.5", "many", [], [1, -2], -3])
def test_other_support_sizes_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"support_sizes is .*: must be numbers of rows, such as 0,1,2,5,10,20"):
        EvaluateConfig(run_dir="run", support_sizes=given)


def test_an_evaluation_with_a_curve_is_written(tmp_path: Path) -> None:
    document = evaluation()
    write_evaluation(tmp_path / "evaluation.json", document, {})
    assert json.loads((tmp_path / "evaluation.json").read_text())["support_curve"] == document["support_curve"]
