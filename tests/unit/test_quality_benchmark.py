"""The quality benchmark sorts by logits, and pairs variants over seeds."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gmeta.evaluation.metrics import metric

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, no package
import quality


def test_auc_is_that_of_the_logits_over_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "RESAMPLES", 5)
    case = next(replace(case, models={"taste": ""}) for case in quality.CASES if "auc" in case.metrics)
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(12), 6)
    user = np.array([f"u{i}" for i in task])
    label = rng.integers(2, size=72).astype(np.float64)
    variants = ("taste-before", "taste-after", "item-mean")
    outcomes = []
    for seed in range(2):
        noise = np.random.default_rng(seed).normal(size=(3, 72))
        logits = {name: 50 + i * label + noise[i] for i, name in enumerate(variants)}
        outcomes.append(quality.Outcome(user, label, {name: np.ones(72) for name in variants}, logits))
    records, differences = quality.measure(case, outcomes)
    found = {record.variant: record.value for record in records if record.metric == "auc"}
    for name in variants:
        expected = [metric("auc", outcome.ranking[name], label, task) for outcome in outcomes]
        assert found[name] == pytest.approx(np.mean(expected))
    difference = next(d for d in differences if (d.against, d.metric) == ("taste-before", "auc"))
    assert difference.value == pytest.approx(found["taste-after"] - found["taste-before"])
