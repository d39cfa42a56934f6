"""Metrics against scikit-learn and slow references; the bootstrap against repeated rows."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from gmeta.evaluation.metrics import (
    BINARY_METRICS,
    RATING_METRICS,
    RELEVANCE_METRICS,
    Bootstrap,
    auc,
    calibration_curve,
    gauc,
    logloss,
    mae,
    make_rows,
    metric,
    rmse,
)


def clicks(num_tasks=40, seed=0, levels=7):
    """Ragged tasks with many tied scores; some tasks hold one class only."""
    rng = np.random.default_rng(seed)
    task = np.sort(rng.integers(num_tasks, size=num_tasks * 6)) * 3 + 5
    label = (rng.random(len(task)) < rng.choice([0.0, 0.3, 0.6], num_tasks * 3 + 5)[task - 5]).astype(float)
    score = (rng.integers(levels, size=len(task)) + label) / (levels + 1)
    order = rng.permutation(len(task))
    return score[order], label[order], task[order]


def ratings(num_tasks=30, seed=0):
    rng = np.random.default_rng(seed)
    task = rng.integers(num_tasks, size=num_tasks * 8)
    label = rng.integers(0, 6, size=len(task)).astype(float)
    return np.round(label + rng.normal(size=len(task)) * 2), label, task


def test_row_metrics_match_scikit_learn():
    score, label, task = clicks()
    assert auc(score, label) == pytest.approx(sk.roc_auc_score(label, score), abs=1e-14)
    assert metric("auc", score, label, task) == auc(score, label)
    assert logloss(score, label) == pytest.approx(sk.log_loss(label, np.clip(score, 1e-7, 1 - 1e-7)), abs=1e-14)
    assert mae(score, label) == pytest.approx(sk.mean_absolute_error(label, score), abs=1e-14)
    assert rmse(score, label) == pytest.approx(sk.root_mean_squared_error(label, score), abs=1e-14)
    assert metric("calibration", score, label, task) == pytest.approx(score.sum() / label.sum())


def test_auc_of_float32_scores_is_exact():
    rng = np.random.default_rng(1)
    score, label = rng.random(5000).astype(np.float32), rng.integers(2, size=5000).astype(np.float32)
    assert auc(score, label) == pytest.approx(sk.roc_auc_score(label, score), abs=1e-14)


def test_gauc_weighs_tasks_by_rows_and_leaves_out_one_class():
    score, label, task = clicks()
    top = bottom = 0.0
    skipped = 0
    for key in np.unique(task):
        mine = task == key
        if len(np.unique(label[mine])) == 1:
            skipped += 1
            continue
        top += mine.sum() * sk.roc_auc_score(label[mine], score[mine])
        bottom += mine.sum()
    assert skipped > 0
    assert gauc(score, label, task) == pytest.approx(top / bottom, abs=1e-13)


def test_task_mae_is_the_mean_of_the_tasks():
    score, label, task = ratings()
    expected = np.mean([np.abs(score - label)[task == key].mean() for key in np.unique(task)])
    assert metric("task_mae", score, label, task) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("k", [5, 10])
def test_ndcg_matches_scikit_learn_with_ties(k):
    score, label, task = ratings()
    label[task == 3] = 0  # nothing to find: scikit-learn says 0, we leave the task out
    values = [
        sk.ndcg_score([2 ** label[task == key] - 1], [score[task == key]], k=k) for key in np.unique(task) if key != 3
    ]
    assert metric(f"ndcg@{k}", score, label, task) == pytest.approx(np.mean(values), abs=1e-13)


SLOW = {
    "precision": lambda relevant, k: sum(relevant[:k]) / k,
    "recall": lambda relevant, k: sum(relevant[:k]) / sum(relevant),
    "hit_rate": lambda relevant, k: float(any(relevant[:k])),
    "map": lambda relevant, k: (
        sum(sum(relevant[: i + 1]) / (i + 1) for i in range(min(k, len(relevant))) if relevant[i])
        / min(k, sum(relevant))
    ),
    "mrr": lambda relevant, k: next((1 / (i + 1) for i, found in enumerate(relevant[:k]) if found), 0.0),
}
"""Metrics of one task's rows in one order."""


def over_all_orders(name, score, relevant, k):
    """The mean over all orders in which falling scores stand, which are many where scores are tied."""
    groups = [
        [relevant[i] for i in np.flatnonzero(score == value)] for value in sorted(set(score.tolist()), reverse=True)
    ]
    orders = itertools.product(*(list(itertools.permutations(group)) for group in groups))
    return np.mean([SLOW[name](list(itertools.chain(*order)), k) for order in orders])


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("k", [1, 3, 5])
def test_metrics_at_k_are_means_over_all_orders_of_ties(name, k):
    rng = np.random.default_rng(k)
    task = np.repeat(np.arange(30), rng.integers(1, 6, size=30))
    label, score = rng.integers(2, size=len(task)), rng.integers(3, size=len(task))
    order = rng.permutation(len(task))
    with_relevant = [t for t in range(30) if label[task == t].any()]
    assert len(with_relevant) < 30, "the premise: tasks without a relevant row are left out"
    values = [over_all_orders(name, score[task == t], label[task == t], k) for t in with_relevant]
    found = metric(f"{name}@{k}", score[order], label[order], task[order])
    assert found == pytest.approx(np.mean(values), abs=1e-13)


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("precision@2", [1 / 2, 1 / 2]),
        ("precision@5", [2 / 5, 1 / 5]),
        ("recall@2", [1 / 2, 1]),
        ("hit_rate@1", [0, 1]),
        ("hit_rate@2", [1, 1]),
        ("map@2", [1 / 4, 1]),
        ("map@5", [(1 / 2 + 2 / 3) / 2, 1]),
        ("mrr@1", [0, 1]),
        ("mrr@5", [1 / 2, 1]),
    ],
)
def test_metrics_at_k_by_hand(name, by_hand):
    """The second task has fewer rows than k; the third has no relevant row and is left out."""
    label = [0, 1, 1, 0, 1, 0, 0, 0]
    score = [9, 8, 7, 6, 5, 4, 3, 2]
    task = [0, 0, 0, 0, 1, 1, 2, 2]
    assert metric(name, score, label, task) == pytest.approx(np.mean(by_hand), abs=1e-15)
    bootstrap = Bootstrap(3, resamples=2, seed=0)
    bootstrap.add("x", name, make_rows(score, label, task))
    bootstrap.run()
    assert bootstrap.estimate("x").n == 2


def test_a_constant_score_earns_what_chance_earns():
    label, task = [1, 0, 0, 1, 0, 0], np.zeros(6)
    for name, chance in (("precision@2", 1 / 3), ("recall@3", 1 / 2), ("hit_rate@2", 1 - 4 / 6 * 3 / 5)):
        assert metric(name, np.ones(6), label, task) == pytest.approx(chance, abs=1e-15)


def test_relevance_of_ratings_is_named():
    score, label, task = ratings()
    for name in RELEVANCE_METRICS:
        found = metric(name, score, label, task, relevant_label=4)
        assert found == metric(name, score, (label >= 4).astype(float), task)
        with pytest.raises(ValueError, match=f"{name} needs labels 0 or 1, .*name the label .*relevant_label"):
            metric(name, score, label, task)


def test_ece_matches_a_loop_over_bins():
    score, label, task = clicks(levels=50)
    bins = np.clip((score * 20).astype(int), 0, 19)
    expected = sum(abs((score - label)[bins == b].sum()) for b in range(20)) / len(score)
    assert metric("ece", score, label, task) == pytest.approx(expected, abs=1e-14)


def test_what_is_undefined_is_nan():
    ones, task = np.ones(4), np.arange(4)
    for name in ("auc", "gauc"):
        assert math.isnan(metric(name, ones, ones, task))
    assert math.isnan(metric("ndcg@5", ones, 0 * ones, task))
    assert math.isnan(metric("calibration", ones, 0 * ones, task))


@pytest.mark.parametrize("name", ["auc", "gauc", "logloss"])
def test_binary_metrics_refuse_other_labels(name):
    with pytest.raises(ValueError, match=f"{name} needs labels 0 or 1, found 3"):
        metric(name, np.array([0.1, 0.2]), np.array([1.0, 3.0]), np.array([0, 0]))


def test_bad_input_is_named():
    one = np.ones(2)
    with pytest.raises(ValueError, match="'mea' is unknown: must be one of auc, gauc"):
        metric("mea", one, one, one)
    for name in ("precision", "recall@", "map@0", "mrr@x"):
        with pytest.raises(ValueError, match=f"'{name}' is unknown"):
            metric(name, one, one, one)
    with pytest.raises(ValueError, match="ndcg needs labels in"):
        metric("ndcg@5", one, -one, one)


MEASURES = {name: partial(metric, name) for name in BINARY_METRICS + RATING_METRICS if "@10" not in name} | {
    "auc()": lambda score, label, task: auc(score, label),
    "gauc()": gauc,
    "logloss()": lambda score, label, task: logloss(score, label),
    "mae()": lambda score, label, task: mae(score, label),
    "rmse()": lambda score, label, task: rmse(score, label),
    "calibration_curve()": lambda score, label, task: calibration_curve(score, label),
    "make_rows()": make_rows,
}
GOOD = {"score": [0.1, 0.8, 0.7, 0.4], "label": [0.0, 1.0, 1.0, 0.0], "task": [0, 0, 1, 1]}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("column", ["score", "label"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda column: [*column[:2], math.nan, column[3]], "{} is not finite in row 2 .nan."),
        (lambda column: [*column[:2], math.inf, column[3]], "{} is not finite in row 2 .inf."),
        (lambda column: [*column[:2], -math.inf, column[3]], "{} is not finite in row 2 .-inf."),
        (lambda column: column[:3], "differ in length: .*{} has 3"),
        (lambda column: [column], r"{} has shape \(1, 4\)"),
    ],
    ids=["nan", "inf", "-inf", "short", "matrix"],
)
def test_what_cannot_be_measured_is_named(measure, column, spoil, message):
    values = {**GOOD, column: spoil(GOOD[column])}
    for kind in (np.array, torch.tensor, list):
        with pytest.raises(ValueError, match=message.format(column)):
            measure(*(kind(value) for value in values.values()))


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_no_rows_cannot_be_measured(measure):
    with pytest.raises(ValueError, match="score is empty: there are no rows"):
        measure(np.zeros(0), np.zeros(0), np.zeros(0))


def test_columns_of_any_kind_are_measured():
    expected = metric("auc", *(np.array(column) for column in GOOD.values()))
    assert auc(GOOD["score"], GOOD["label"]) == expected
    assert auc(np.array(GOOD["score"], np.float16), np.array(GOOD["label"], bool)) == expected
    assert auc(torch.tensor(GOOD["score"]), torch.tensor(GOOD["label"])) == expected
    with pytest.raises(ValueError, match="logit is not finite in row 0"):
        metric("auc", *GOOD.values(), logit=[math.nan, 0, 0, 0])
    with pytest.raises(ValueError, match="auc needs labels 0 or 1, found -1"):
        auc([0.1, 0.9], [-1, 1])


RANKING = ("auc", "gauc", "ndcg@5", "ndcg@10", *(f"{name}@3" for name in SLOW))


def spread_logits(scale):
    _, label, task = clicks()
    logit = np.random.default_rng(3).normal(size=len(label)) + label
    return (logit * scale).astype(np.float32).astype(np.float64), label, task


@pytest.mark.parametrize("name", RANKING)
def test_ranking_metrics_keep_the_order_of_saturated_logits(name):
    logit, label, task = spread_logits(1000.0)
    score = 1 / (1 + np.exp(-np.clip(logit, -700, 700)))
    assert len(np.unique(score)) < len(np.unique(logit)), "the premise: probabilities lost their order"
    expected = metric(name, logit, label, task)
    assert metric(name, score, label, task, logit=logit) == expected
    assert metric(name, score, label, task) != expected
    bootstrap = Bootstrap(len(np.unique(task)), resamples=3, seed=0)
    bootstrap.add("x", name, make_rows(score, label, task, logit=logit))
    bootstrap.add("y", name, make_rows(logit, label, task))
    bootstrap.run()
    np.testing.assert_array_equal(bootstrap.resampled("x").values, bootstrap.resampled("y").values)


@pytest.mark.parametrize("name", BINARY_METRICS)
def test_logits_change_no_bit_where_nothing_saturates(name):
    logit, label, task = spread_logits(1.0)
    score = 1 / (1 + np.exp(-logit))
    assert metric(name, score, label, task, logit=logit) == metric(name, score, label, task)


rows_strategy = st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 3)), min_size=1, max_size=40).map(
    lambda rows: tuple(np.array(column, float) for column in zip(*rows, strict=True))
)


@settings(max_examples=60, deadline=None)
@given(rows_strategy)
def test_ranking_metrics_do_not_depend_on_scale_or_order(columns):
    task, label, score = columns
    order = np.random.default_rng(0).permutation(len(task))
    for name in ("auc", "gauc", "ndcg@5", *(f"{name}@3" for name in SLOW)):
        value = metric(name, score, label, task)
        rescaled = metric(name, np.exp(score[order]) / 100, label[order], task[order])
        np.testing.assert_allclose(rescaled, value, atol=1e-12)
        if name in ("auc", "gauc"):
            np.testing.assert_allclose(metric(name, -score, label, task), 1 - value, atol=1e-12)
        assert math.isnan(value) or -1e-12 <= value <= 1 + 1e-12


@settings(max_examples=60, deadline=None)
@given(rows_strategy, st.integers(1, 12))
def test_calibration_curve_parts_the_rows(columns, num_bins):
    _, label, score = columns
    curve = calibration_curve(score, label, num_bins)
    assert sum(b["n"] for b in curve) == len(score)
    assert len(curve) <= num_bins
    predicted = [b["predicted"] for b in curve]
    assert predicted == sorted(set(predicted))
    assert sum(b["n"] * b["observed"] for b in curve) == pytest.approx(label.sum())


def repeated(task, weight):
    """Row indices of a resample that draws task t weight[t] times, and the drawn copies' task keys."""
    index, copy = [], []
    for t, count in enumerate(weight):
        for _ in range(int(count)):
            mine = np.flatnonzero(task == t)
            index.append(mine)
            copy.append(np.full(len(mine), len(copy)))
    return np.concatenate(index), np.concatenate(copy)


@pytest.mark.parametrize("name", BINARY_METRICS + RATING_METRICS)
def test_resampled_values_are_those_of_repeated_tasks(name):
    score, label, task = clicks(num_tasks=15) if name in BINARY_METRICS else ratings(num_tasks=15)
    rows = make_rows(score, label, task)
    bootstrap = Bootstrap(rows.num_tasks, resamples=5, seed=2)
    bootstrap.add("x", name, rows)
    bootstrap.run()
    weights = np.concatenate(list(bootstrap._weights()))
    assert (weights.sum(axis=1) == rows.num_tasks).all()
    for value, weight in zip(bootstrap._values["x"], weights, strict=True):
        index, copy = repeated(rows.task, weight)
        assert value == pytest.approx(metric(name, rows.score[index], rows.label[index], copy), abs=1e-12)


def test_intervals_cover_at_their_rate_and_pair_variants():
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        task = np.repeat(np.arange(60), 4)
        error = rng.normal(size=60)[task] + rng.normal(size=240)  # rows of a task share an error
        rows = make_rows(np.abs(error), np.zeros(240), task)
        bootstrap = Bootstrap(60, resamples=300, seed=seed)
        bootstrap.add("a", "mae", rows)
        bootstrap.add("b", "mae", make_rows(rows.score + 0.1, rows.label, task))
        bootstrap.run()
        estimate = bootstrap.estimate("a")
        covered += estimate.low <= math.sqrt(2 * 2 / math.pi) <= estimate.high
        paired = bootstrap.estimate("b", against="a")
        assert (paired.value, paired.low, paired.high) == pytest.approx((0.1, 0.1, 0.1))
    assert 180 <= covered <= 199


def test_a_biased_metric_has_no_interval():
    """The resampled values of `ece` lie above its own value: their quantiles would not even hold that."""
    score, label, task = clicks()
    bootstrap = Bootstrap(len(np.unique(task)), resamples=50, seed=0)
    for variant in ("a", "b"):
        bootstrap.add(variant, "ece", make_rows(score, label, task))
    bootstrap.run()
    for against in (None, "b"):
        estimate = bootstrap.estimate("a", against=against)
        assert math.isfinite(estimate.value)
        assert math.isnan(estimate.low)
        assert math.isnan(estimate.high)


def test_estimates_repeat_with_their_seed_and_count_their_tasks():
    score, label, task = clicks()
    rows = make_rows(score, label, task)
    both = {key for key in np.unique(task) if len(np.unique(label[task == key])) == 2}

    def estimate(seed, name):
        bootstrap = Bootstrap(rows.num_tasks, resamples=50, seed=seed)
        bootstrap.add("x", name, rows)
        bootstrap.run()
        return bootstrap.estimate("x")

    assert estimate(1, "gauc") == estimate(1, "gauc")
    assert estimate(1, "gauc").low != estimate(2, "gauc").low
    assert estimate(1, "gauc").n == len(both)
    assert estimate(1, "auc").n == rows.num_tasks


def test_one_task_has_no_interval():
    bootstrap = Bootstrap(1, resamples=10, seed=0)
    bootstrap.add("x", "mae", make_rows(np.ones(3), np.zeros(3), np.zeros(3)))
    bootstrap.run()
    estimate = bootstrap.estimate("x")
    assert (estimate.value, estimate.n) == (1.0, 1)
    assert math.isnan(estimate.low)


def test_values_are_what_estimates_come_from():
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(12), 3)
    label = rng.integers(1, 6, size=36).astype(float)
    bootstrap = Bootstrap(12, resamples=40, seed=3)
    for variant in ("one", "other"):
        bootstrap.add(variant, "mae", make_rows(label + rng.normal(size=36), label, task))
    bootstrap.run()
    difference = bootstrap.resampled("one").values - bootstrap.resampled("other").values
    estimate = bootstrap.estimate("one", against="other")
    assert difference.shape == (41,)
    assert difference[0] == estimate.value
    assert np.quantile(difference[1:], [0.025, 0.975]).tolist() == [estimate.low, estimate.high]


def test_bootstraps_of_equal_tasks_and_seed_are_paired():
    """So that points of a learning curve can be measured one after the other."""
    rng = np.random.default_rng(0)
    task = np.repeat(np.arange(12), 3)
    label = rng.integers(2, size=36).astype(float)
    scores = {name: label + rng.normal(size=36) for name in ("one", "other")}
    together = Bootstrap(12, resamples=40, seed=3)
    apart = {}
    for variant, score in scores.items():
        together.add(variant, "auc", make_rows(score, label, task))
        alone = Bootstrap(12, resamples=40, seed=3)
        alone.add("x", "auc", make_rows(score, label, task))
        alone.run()
        apart[variant] = alone.resampled("x")
    together.run()
    assert apart["one"].estimate(apart["other"]) == together.estimate("one", against="other")


WEIGHTED = ("auc", "gauc", "logloss", "mae", "task_mae", "rmse", "calibration", "ece")


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_whole_weight_is_so_many_rows(name):
    score, label, task = clicks()
    weight = np.random.default_rng(3).integers(0, 4, len(score))
    weight[task == task[0]] = 0
    found = metric(name, score, label, task, weight=weight)
    again = [np.repeat(column, weight) for column in (score, label, task)]
    assert found == pytest.approx(metric(name, *again), rel=1e-12)
    assert found != metric(name, score, label, task)


def slow_weighted(name, score, label, task, weight):
    """By definition, pair by pair and row by row."""
    if name in ("auc", "gauc"):
        values, totals = [], []
        for key in np.unique(task) if name == "gauc" else [None]:
            rows = np.flatnonzero(task == key) if name == "gauc" else np.arange(len(task))
            wins = pairs = 0.0
            for i, j in itertools.product(rows[label[rows] == 1], rows[label[rows] == 0]):
                pairs += weight[i] * weight[j]
                wins += weight[i] * weight[j] * (1.0 if score[i] > score[j] else 0.5 if score[i] == score[j] else 0.0)
            if pairs:
                values.append(wins / pairs)
                totals.append(weight[rows].sum())
        return sum(v * w for v, w in zip(values, totals, strict=True)) / sum(totals)
    clipped = np.clip(score, 1e-7, 1 - 1e-7)
    by_row = {
        "logloss": -np.log(np.where(label == 1, clipped, 1 - clipped)),
        "mae": abs(score - label),
        "rmse": (score - label) ** 2,
    }
    if name == "calibration":
        return (weight * score).sum() / (weight * label).sum()
    mean = (weight * by_row[name]).sum() / weight.sum()
    return math.sqrt(mean) if name == "rmse" else mean


@pytest.mark.parametrize("name", ["auc", "gauc", "logloss", "mae", "rmse", "calibration"])
def test_weighted_metrics_match_their_definition(name):
    score, label, task = clicks(num_tasks=12, seed=4)
    weight = np.random.default_rng(5).exponential(size=len(score)) * (np.random.default_rng(6).random(len(score)) > 0.2)
    expected = slow_weighted(name, score, label, task, weight)
    assert metric(name, score, label, task, weight=weight) == pytest.approx(expected, rel=1e-11)
    bootstrap = Bootstrap(len(np.unique(task)), resamples=3, seed=0)
    bootstrap.add("x", name, make_rows(score, label, task, weight=weight))
    bootstrap.run()
    assert bootstrap.estimate("x").value == pytest.approx(expected, rel=1e-11)


def test_weighted_auc_matches_scikit_learn():
    score, label, task = clicks()
    weight = np.random.default_rng(7).random(len(score))
    expected = sk.roc_auc_score(label, score, sample_weight=weight)
    assert metric("auc", score, label, task, weight=weight) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", [n for n in BINARY_METRICS if "@" in n])
def test_metrics_at_k_count_every_row_once(name):
    score, label, task = clicks()
    weight = np.random.default_rng(8).random(len(score))
    assert metric(name, score, label, task, weight=weight) == metric(name, score, label, task)


def test_weights_that_cannot_be():
    score, label, task = clicks()
    weight = np.ones(len(score))
    weight[3] = -0.5
    with pytest.raises(ValueError, match=r"weight is -0\.5 in row 3: must not be negative"):
        metric("auc", score, label, task, weight=weight)
    weight[3] = np.nan
    with pytest.raises(ValueError, match="weight is not finite in row 3"):
        metric("auc", score, label, task, weight=weight)
    assert math.isnan(metric("logloss", score, label, task, weight=np.zeros(len(score))))


def test_a_weighted_calibration_curve_is_that_of_repeated_rows():
    score, label, _ = clicks()
    weight = np.random.default_rng(9).integers(0, 3, len(score))
    found = calibration_curve(score, label, 1, weight=weight)
    (again,) = calibration_curve(np.repeat(score, weight), np.repeat(label, weight), 1)
    assert found[0]["predicted"] == pytest.approx(again["predicted"])
    assert found[0]["observed"] == pytest.approx(again["observed"])
    assert found[0]["n"] == (weight > 0).sum()
