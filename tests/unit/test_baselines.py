"""Baselines against hand-computed means and dense-Gaussian references."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from gmeta.evaluation.baselines import BASELINES, BaselineRows, fit_baselines, fit_factors, fold_in
from gmeta.evaluation.metrics import auc

torch.set_num_threads(1)


def rows(task, item, label, is_query):
    return BaselineRows(
        np.array(task), np.array(label, float), np.array(is_query, bool), None if item is None else np.array(item)
    )


def baseline_scores(train, test, seed):
    fitted = fit_baselines(train, seed=seed)
    return fitted.clip(fitted.score(test))


TRAIN = rows([7, 7, 9, 9], [3, 5, 3, 5], [1, 2, 3, 5], [0, 1, 0, 1])


def test_means_match_hand_computation_in_row_order():
    # Item means 2 and 3.5, global mean 2.75; item 99 is unknown, task 40 has no support.
    test = rows([20, 40, 20, 20, 20], [3, 3, 99, 5, 5], [4.0, 0, 3.0, 0, 0], [0, 1, 0, 1, 1])
    scores = baseline_scores(TRAIN, test, seed=0)
    assert tuple(scores) == BASELINES
    bias = ((4 - 2) + (3 - 2.75)) / 2
    np.testing.assert_allclose(scores["global-mean"], [2.75] * 3)
    np.testing.assert_allclose(scores["task-mean"], [2.75, 3.5, 3.5])
    np.testing.assert_allclose(scores["item-mean"], [2, 3.5, 3.5])
    np.testing.assert_allclose(scores["item-mean+task-bias"], [2, 3.5 + bias, 3.5 + bias])


def test_predictions_stay_in_the_range_of_training_labels():
    test = rows([1, 1], [3, 5], [50.0, 0], [0, 1])
    scores = baseline_scores(TRAIN, test, seed=0)
    assert scores["task-mean"] == [5.0]
    assert all(1 <= score[0] <= 5 for score in scores.values())


def test_scores_beyond_the_range_keep_their_order():
    """Clipped, they are ties, and a ranking metric would not see which of them is higher."""
    clicks = rows([7, 7, 9, 9], [3, 5, 3, 5], [0, 1, 1, 1], [0, 1, 0, 1])
    fitted = fit_baselines(clicks, seed=0)
    scores = fitted.score(rows([20, 20, 20, 20], [3, 3, 5, 3], [1.0, 1, 0, 1], [0, 0, 1, 1]))["item-mean+task-bias"]
    np.testing.assert_allclose(scores, [1.5, 1.0])
    assert auc(scores, [1, 0]) == 1
    assert auc(fitted.clip({"x": scores})["x"], [1, 0]) == 0.5


def test_the_last_support_rows_are_those_of_a_shorter_log():
    """In the order of the rows; tasks with fewer keep what they have, and the query stays."""
    test = rows([20, 40, 20, 20, 20, 40], [3, 3, 99, 5, 5, 5], [4.0, 1, 3, 2, 0, 0], [0, 0, 0, 0, 1, 1])
    fitted = fit_baselines(TRAIN, seed=0)
    for size, kept in ((0, []), (1, [1, 3]), (2, [1, 2, 3]), (9, [0, 1, 2, 3])):
        short = test.last_support(size)
        expected = [*kept, 4, 5]
        np.testing.assert_array_equal(short.label, test.label[expected])
        np.testing.assert_array_equal(short.task, test.task[expected])
        alone = rows(*(getattr(test, name)[expected] for name in ("task", "item", "label", "is_query")))
        for name, score in fitted.score(short).items():
            np.testing.assert_array_equal(score, fitted.score(alone)[name])
    np.testing.assert_array_equal(fitted.score(test.last_support(0))["task-mean"], fitted.score(test)["global-mean"])


def test_unknown_items_get_the_global_mean_or_the_average_item():
    test = rows([1, 1], [3, 99], [4.0, 0], [0, 1])
    assert baseline_scores(TRAIN, test, seed=0)["item-mean"] == [2.75]
    model = fit_factors(*low_rank(), seed=0)
    latent = np.ones((1, 12))
    expected = model.mean[:-1].mean() + (model.loadings[:-1].mean(0) * torch.ones(12)).sum()
    assert model.score(latent, np.array([-1]))[0] == pytest.approx(float(expected))


def test_item_baselines_are_left_out_without_items():
    test = rows([1, 1], None, [4.0, 0], [0, 1])
    assert tuple(baseline_scores(TRAIN, test, seed=0)) == ("global-mean", "task-mean")


def test_no_training_rows_is_an_error():
    with pytest.raises(ValueError, match="need training rows"):
        baseline_scores(rows([], [], [], []), TRAIN, seed=0)


def test_columns_of_different_length_are_an_error():
    with pytest.raises(ValueError, match="different lengths"):
        rows([1, 2], [1], [1.0, 2.0], [0, 1])


def low_rank(num_tasks=60, num_items=25, rank=2, seed=0):
    """Ratings of a rank-2 model with noise .1, about 60 % observed, in shuffled row order."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(num_tasks, rank)) @ rng.normal(size=(rank, num_items)) + rng.normal(size=num_items)
    table += 0.1 * rng.normal(size=table.shape)
    task, item = np.nonzero(rng.random(table.shape) < 0.6)
    order = rng.permutation(len(task))
    task, item = task[order], item[order]
    label = table[task, item]
    return task, item, label - label.mean()


def log_likelihood(model, task, item, label):
    """Slow reference: each task's rows are jointly Gaussian with covariance W Wᵀ + s² I."""
    total = 0.0
    for t in np.unique(task):
        mine = task == t
        loadings = model.loadings[item[mine]].numpy()
        covariance = loadings @ loadings.T + model.variance * np.eye(mine.sum())
        residual = label[mine] - model.mean[item[mine]].numpy()
        total -= 0.5 * (np.linalg.slogdet(2 * np.pi * covariance)[1] + residual @ np.linalg.solve(covariance, residual))
    return total


def test_em_never_lowers_the_likelihood():
    data = low_rank()
    fits = [
        fit_factors(*data, seed=1, num_factors=3, num_iterations=n, loading_ridge=1e-9, mean_ridge=1e-9)
        for n in range(0, 12, 2)
    ]
    values = [log_likelihood(model, *data) for model in fits]
    assert all(later > earlier for earlier, later in itertools.pairwise(values))


def test_one_em_step_matches_loops_over_tasks_and_items():
    task, item, label = low_rank(num_tasks=12, num_items=6)
    k, ridge = 2, np.array([0.7, 0.7, 0.2])
    settings = {"seed": 3, "num_factors": k, "loading_ridge": 0.7, "mean_ridge": 0.2}
    start = fit_factors(task, item, label, num_iterations=0, **settings)
    step = fit_factors(task, item, label, num_iterations=1, **settings)
    average = np.append(start.loadings[:-1].numpy().mean(0), start.mean[:-1].numpy().mean())
    first, second = np.zeros((12, k + 1)), np.zeros((12, k + 1, k + 1))
    for t in range(12):
        mine = item[task == t]
        loadings, residual = start.loadings[mine].numpy(), label[task == t] - start.mean[mine].numpy()
        inverse = np.linalg.inv(loadings.T @ loadings + start.variance * np.eye(k))
        first[t] = [*(inverse @ loadings.T @ residual), 1.0]
        second[t] = np.outer(first[t], first[t])
        second[t, :k, :k] += start.variance * inverse
    error = 0.0
    for i in range(6):
        users, value = task[item == i], label[item == i]
        moment, target = second[users].sum(0), value @ first[users]
        weights = np.linalg.solve(moment + np.diag(ridge), target + ridge * average)
        np.testing.assert_allclose([*step.loadings[i], step.mean[i]], weights, atol=1e-12)
        error += value @ value - 2 * weights @ target + weights @ moment @ weights
    assert step.variance == pytest.approx(error / len(label))


def test_fold_in_is_the_gaussian_conditional():
    data = low_rank()
    model = fit_factors(*data, seed=0, num_factors=3, num_iterations=5)
    item, label = np.array([2, 7, 7, 11]), np.array([0.3, -1.0, 0.5, 2.0])
    latent = fold_in(model, np.array([1, 1, 1, 1]), item, label, num_tasks=3)
    assert not latent[[0, 2]].any()  # tasks without support keep the prior's mean
    seen, target = model.loadings[item].numpy(), model.loadings[4].numpy()
    covariance = seen @ seen.T + model.variance * np.eye(4)
    expected = model.mean[4] + target @ seen.T @ np.linalg.solve(covariance, label - model.mean[item].numpy())
    assert model.score(latent[1:2], np.array([4]))[0] == pytest.approx(float(expected))


def test_factor_analysis_beats_the_means_on_low_rank_data():
    task, item, label = low_rank(num_tasks=200)
    is_query = np.random.default_rng(0).random(len(task)) < 0.3
    held = task >= 150
    train = BaselineRows(task[~held], label[~held], is_query[~held], item[~held])
    test = BaselineRows(task[held], label[held], is_query[held], item[held])
    scores = baseline_scores(train, test, seed=0)
    mae = {name: np.abs(score - test.label[test.is_query]).mean() for name, score in scores.items()}
    assert mae["factor-analysis"] < 0.5 * mae["item-mean+task-bias"]
    again = baseline_scores(train, test, seed=0)
    np.testing.assert_array_equal(scores["factor-analysis"], again["factor-analysis"])


@pytest.mark.parametrize("unit", [1e-3, 100.0])
def test_labels_in_another_unit_are_scored_alike(unit):
    rng = np.random.default_rng(0)
    task, item = np.repeat(np.arange(60), 12), rng.integers(0, 30, 720)
    label = rng.normal(size=60)[task] * rng.normal(size=30)[item] + rng.normal(size=720)
    query = np.arange(720) % 12 >= 8
    # stars are counted as they are, and others in two digits of their deviation: these two are the same number
    label *= 1 / label.std()
    ours, theirs = (
        baseline_scores(rows, rows, seed=0)
        for rows in (BaselineRows(task, label * scale, query, item) for scale in (1.0, unit))
    )
    for name, scores in ours.items():
        np.testing.assert_allclose(theirs[name] / unit, scores, rtol=1e-6, atol=1e-9, err_msg=name)


def test_labels_far_from_zero_keep_their_digits():
    task, item = np.repeat(np.arange(4), 6), np.tile(np.arange(6), 4)
    label = (np.arange(24) % 5).astype(np.float32)
    query = np.arange(24) % 6 >= 4
    near, far = (
        baseline_scores(rows, rows, seed=0)
        for rows in (BaselineRows(task, label + shift, query, item) for shift in (np.float32(0), np.float32(1e6)))
    )
    np.testing.assert_allclose(far["task-mean"] - 1e6, near["task-mean"], atol=1e-6)


@pytest.mark.data
@pytest.mark.slow
def test_floors_of_ml_1m():
    path = Path(os.environ.get("GMETA_DATA", "../shared/data")) / "ml-1m-subset" / "ratings.csv"
    if not path.exists():
        pytest.skip(f"{path} is absent: set GMETA_DATA to the folder that holds ml-1m-subset")
    columns = np.genfromtxt(path, delimiter=",", skip_header=1, dtype=str)
    user, movie, rating = columns[:, 0].astype(int), columns[:, 1].astype(int), columns[:, 2].astype(float)
    is_train, is_test = columns[:, 3] == "item_cold", columns[:, 3] == "user_item_cold"
    count = np.bincount(user[is_test], minlength=user.max() + 1)[user]
    is_test &= (count >= 13) & (count <= 100)
    order = np.lexsort((np.random.default_rng(0).random(len(user)), user))
    order = order[is_test[order]]
    position = np.arange(len(order)) - np.searchsorted(user[order], user[order])
    train = BaselineRows(user[is_train], rating[is_train], np.zeros(is_train.sum(), bool), movie[is_train])
    test = BaselineRows(user[order], rating[order], position < 10, movie[order])
    scores = baseline_scores(train, test, seed=0)
    mae = {name: np.abs(score - test.label[test.is_query]).mean() for name, score in scores.items()}
    # The cut into support and query is random: another seed moves these by about .005.
    assert mae["task-mean"] == pytest.approx(0.888, abs=0.012)
    assert mae["item-mean"] == pytest.approx(0.838, abs=0.008)
    assert mae["item-mean+task-bias"] == pytest.approx(0.784, abs=0.008)
    assert mae["factor-analysis"] == pytest.approx(0.757, abs=0.008)
