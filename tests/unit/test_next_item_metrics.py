"""Metrics of ranks by hand, their slices and intervals over users, and baselines against slow plain versions."""

from __future__ import annotations

import io
import json
import math
from collections import Counter

import numpy as np
import pytest
from test_target_ranks import make_targets

from gmeta.evaluation.next_item import (
    Places,
    RankedRows,
    measure_places,
    next_item_records,
    popularity_classes,
    print_next_item,
)
from gmeta.evaluation.next_item_baselines import fit_neighbours, fit_next_item_baselines
from gmeta.evaluation.ranking import PLACE_METRICS
from gmeta.evaluation.slices import Scenarios
from gmeta.evaluation.target_ranks import Candidates, ranks_of


def places(rank: list[int], sampled: list[int] | None = None) -> Places:
    return Places(np.array(rank), np.array(sampled or rank))


def make_rows(num: int, **columns: object) -> RankedRows:
    ones = np.ones(num, np.int64)
    given = {"user": np.arange(num), "popularity": ones, "history": 5 * ones, "domains": ones, "candidates": 99 * ones}
    return RankedRows(**{**given, "domain": None, **columns})  # type: ignore[arg-type]


def test_metrics_by_hand() -> None:
    found = places([1, 2, 3, 11], [1, 1, 10, 60])
    expected = {
        "recall@1": [1, 0, 0, 0],
        "recall@5": [1, 1, 1, 0],
        "recall@50": [1, 1, 1, 1],
        "ndcg@10": [1, 1 / math.log2(3), 0.5, 0],
        "ndcg@50": [1, 1 / math.log2(3), 0.5, 1 / math.log2(12)],
        "mrr@5": [1, 1 / 2, 1 / 3, 0],
        "mrr": [1, 1 / 2, 1 / 3, 1 / 11],
        "sampled_recall@10": [1, 1, 1, 0],
        "sampled_ndcg@10": [1, 1, 1 / math.log2(11), 0],
    }
    assert set(expected) <= set(PLACE_METRICS)
    for name, values in expected.items():
        np.testing.assert_allclose(found.values(name), values, err_msg=name)
    for name in PLACE_METRICS:
        assert found.values(name).shape == (4,)


def test_users_are_resampled_and_not_their_targets() -> None:
    """Ten users whose three targets each have one rank: three times the rows say no more than the users do."""
    rng = np.random.default_rng(0)
    rank = rng.integers(1, 30, 10)
    user = np.repeat(np.arange(10), 3)
    whole = measure_places(
        {"model": Places(rank[user], rank[user])}, user, np.ones(30, np.bool_), resamples=200, seed=1
    )
    alone = measure_places({"model": Places(rank, rank)}, np.arange(10), np.ones(10, np.bool_), resamples=200, seed=1)
    for metric in PLACE_METRICS:
        one, two = whole.estimate(("model", metric)), alone.estimate(("model", metric))
        np.testing.assert_allclose([one.value, one.low, one.high], [two.value, two.low, two.high])
        assert one.n == two.n == 10
        assert one.value == pytest.approx(Places(rank, rank).values(metric).mean())


def test_slices_and_paired_differences() -> None:
    rng = np.random.default_rng(0)
    num = 120
    better = rng.integers(1, 20, num)
    rows = make_rows(
        num,
        user=np.arange(num) // 2,
        popularity=rng.integers(0, 4, num),
        history=rng.integers(0, 30, num),
        domains=rng.integers(1, 4, num),
        domain=Scenarios(("Books", "Toys"), np.arange(num) % 2),
    )
    found = {"model": places(better.tolist()), "popularity": places((better + 7).tolist())}
    document = next_item_records(found, rows, baselines=["popularity"], resamples=50, seed=0)
    json.dumps(document, allow_nan=False)
    cases = {case["case"]: case for case in document["cases"]}
    assert (cases["all"]["rows"], cases["all"]["tasks"]) == (120, 60)
    for part in (
        ["scenario=Books", "scenario=Toys", "scenario=other"],
        ["one_domain", "several_domains"],
        ["target_unseen", "target_tail", "target_middle", "target_head"],
        ["history_0", "history_1-4", "history_5-9", "history_10-19", "history_20+"],
    ):
        assert sum(cases[name]["rows"] for name in part) == 120, part
    assert cases["scenario=other"]["rows"] == 0
    values = {(r["case"], r["variant"], r["metric"]): r for r in document["records"]}
    short = (rows.history >= 1) & (rows.history <= 4)
    assert values["history_1-4", "model", "mrr"]["value"] == pytest.approx((1 / better[short]).mean())
    gain = next(d for d in document["differences"] if (d["case"], d["metric"]) == ("all", "ndcg@10"))
    assert (gain["variant"], gain["against"], gain["n"]) == ("model", "popularity", 60)
    assert 0 < gain["low"] < gain["value"] < gain["high"]
    assert document["notes"] == ["Intervals resample 60 users, whose 120 targets stay together"]
    text = io.StringIO()
    print_next_item(document, text)
    for word in ("Books", "popularity", "R@50", f"{values['all', 'model', 'recall@10']['value']:.4f}", "better"):
        assert word in text.getvalue(), word


def test_a_catalogue_smaller_than_k_is_told() -> None:
    found = {"model": places([3, 40])}
    document = next_item_records(found, make_rows(2, candidates=np.array([3, 99])), baselines=[], resamples=2, seed=0)
    assert document["notes"] == [
        "1 of 2 targets have at most 50 candidates: recall@50 of those is 1 whatever ranks them"
    ]
    with pytest.raises(ValueError, match="no targets"):
        next_item_records({"model": places([])}, make_rows(0), baselines=[], resamples=2, seed=0)


def test_popularity_classes_part_events_and_not_items() -> None:
    """8 events of one item, 4 of another, and 4 items of one event: quartiles at 1 and 8 events."""
    assert popularity_classes(np.array([0, 8, 0, 4, 1, 1, 1, 1])).tolist() == [0, 3, 0, 2, 1, 1, 1, 1]
    assert popularity_classes(np.array([0, 2, 2, 2])).tolist() == [0, 2, 2, 2]
    assert popularity_classes(np.array([0, 0])).tolist() == [0, 0]


def plain_cosine(user: np.ndarray, item: np.ndarray, num_ids: int) -> np.ndarray:
    """Cosines of the items' columns in a dense matrix of users and items, 0 on the diagonal."""
    seen = np.zeros((user.max() + 1, num_ids))
    seen[user, item] = 1
    seen[:, 0] = 0
    norm = np.sqrt(seen.sum(0))
    cosine = (seen.T @ seen) / np.maximum(np.outer(norm, norm), 1e-9)
    np.fill_diagonal(cosine, 0)
    return cosine


def test_neighbours_are_those_of_a_dense_matrix() -> None:
    rng = np.random.default_rng(0)
    num_ids, user, item = 23, rng.integers(0, 30, 200), rng.integers(0, 22, 200)
    cosine = plain_cosine(user, item, num_ids)
    targets = make_targets(3, num_ids, longest=30)
    scores = fit_neighbours(user, item, num_ids)
    for last in (1, 4, 20):
        expected = np.zeros((len(targets), num_ids))
        for i in range(len(targets)):
            history = targets.items[targets.first[i] : targets.first[i] + targets.length[i]]
            expected[i] = cosine[history[::-1][:last]].sum(0)
        np.testing.assert_allclose(scores.score(targets, last).numpy(), expected, rtol=1e-6, atol=1e-7)


def test_baselines_rank_as_their_definition_says() -> None:
    rng = np.random.default_rng(0)
    num_ids, user, item = 23, rng.integers(0, 30, 200), rng.integers(1, 23, 200)
    targets, count = make_targets(3, num_ids), Counter(item.tolist())
    fitted = fit_next_item_baselines(user, item.astype(np.int32), num_ids)
    assert list(fitted) == ["popularity", "item-knn", "last-item-knn"]
    everyone = Candidates(np.array([0, *[1] * 22]), exclude_history=False)
    found = {
        name: ranks_of(lambda part, score=score: score(targets.where(part)), targets, everyone)  # type: ignore[misc]
        for name, score in fitted.items()
    }
    for target, rank in zip(targets.target.tolist(), found["popularity"].rank.tolist(), strict=True):
        assert rank == sum(count[other] >= count[target] for other in range(1, num_ids))
    empty = targets.length == 0
    assert empty.any()
    assert set(found["item-knn"].rank[empty]) == {22}, "a constant score is the worst"
    assert (found["item-knn"].rank != found["last-item-knn"].rank).any()
