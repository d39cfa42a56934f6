"""The comparison of two trees: its ratios and its interval."""

from __future__ import annotations

import sys
from math import comb
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, no package

from compare import interval, paired


def test_a_pair_is_the_geometric_mean_of_its_metrics() -> None:
    assert paired({"a": 2.0, "b": 1.0}, {"a": 1.0, "b": 2.0}) == pytest.approx(1.0)
    assert paired({"a": 4.0, "b": 1.0}, {"a": 1.0, "b": 1.0}) == pytest.approx(2.0)
    with pytest.raises(ValueError, match=r"time different things"):
        paired({"a": 1.0}, {"b": 1.0})


@pytest.mark.parametrize(("pairs", "outer"), [(7, 0), (9, 1), (20, 5)])
def test_the_interval_holds_the_median_as_often_as_it_says(pairs: int, outer: int) -> None:
    """Of n draws, the `outer`-th from each end: the largest that leaves at least 95 %."""
    assert interval(range(pairs)) == (outer, pairs - 1 - outer)
    missed = 2 * sum(comb(pairs, k) for k in range(outer + 1)) / 2**pairs
    draws = np.random.default_rng(0).normal(size=(4000, pairs))
    low, high = np.array([interval(row.tolist()) for row in draws]).T
    assert np.mean((low <= 0) & (high >= 0)) == pytest.approx(1 - missed, abs=0.015)
    assert 1 - missed >= 0.95
