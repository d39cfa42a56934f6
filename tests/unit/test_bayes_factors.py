"""Bayesian factor analysis against loops over single rows, and on labels whose factors are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gmeta.training.bayes_factors import fit_items


def drawn(tasks: int, items: int, share: float, binary: bool, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Rows of tasks and items that meet with probability `share`, with two factors: task, item, label; and eta."""
    rng = np.random.default_rng(seed)
    latent, loading = rng.standard_normal((tasks, 2)), rng.standard_normal((items, 2))
    eta = 0.5 + latent @ loading.T + 0.5 * rng.standard_normal(items)
    task, item = np.nonzero(rng.random(eta.shape) < share)
    eta = eta[task, item]
    label = rng.random(len(eta)) < 1 / (1 + np.exp(-eta)) if binary else eta + 0.3 * rng.standard_normal(len(eta))
    return task, item, label.astype(np.float32), eta


def reference(task: np.ndarray, item: np.ndarray, label: np.ndarray, *, k: int, binary: bool, passes: int) -> Tensor:
    """What `fit_items` does, row by row."""
    y, tasks, items = label.astype(np.float64), int(task.max()) + 1, int(item.max()) + 1
    level, spread = y.mean(), y.var()
    unit = 2 if binary else spread**0.5
    normal = torch.randn(items, k + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    w = 0.1 * unit * normal
    for i in range(items):
        of_item = y[item == i]
        rate = (of_item.sum() + 5 * level) / (len(of_item) + 5)
        w[i, -1] = np.log(rate / (1 - rate)) if binary else rate
    v, mu, s = np.zeros((items, k + 1, k + 1)), w.mean(0), 0.1 * unit**2 * np.eye(k + 1)
    xi = np.abs(w[item, -1])
    weight = np.tanh(xi / 2) / (2 * xi) if binary else np.full(len(y), 1 / spread)
    for _ in range(passes):
        target = y - 0.5 if binary else y * weight
        precision, total = np.stack([np.eye(k)] * tasks), np.zeros((tasks, k))
        for r, (t, i) in enumerate(zip(task, item, strict=True)):
            moment = weight[r] * (v[i] + np.outer(w[i], w[i]))
            precision[t] += moment[:k, :k]
            total[t] += target[r] * w[i, :k] - moment[:k, k]
        c = np.linalg.inv(precision)
        z = np.stack([c[t] @ total[t] for t in range(tasks)])
        stretch = np.linalg.cholesky((c + z[:, :, None] * z[:, None, :]).mean(0))
        back = np.linalg.inv(stretch)
        z, c = np.c_[z @ back.T, np.ones(tasks)], np.pad(back @ c @ back.T, ((0, 0), (0, 1), (0, 1)))
        whole = np.eye(k + 1)
        whole[:k, :k] = stretch
        pull = np.linalg.inv(whole.T @ s @ whole)
        precision, total = np.stack([pull] * items), np.stack([pull @ whole.T @ mu] * items)
        for r, (t, i) in enumerate(zip(task, item, strict=True)):
            precision[i] += weight[r] * (c[t] + np.outer(z[t], z[t]))
            total[i] += target[r] * z[t]
        v = np.linalg.inv(precision)
        w = np.stack([v[i] @ total[i] for i in range(items)])
        mu = w.mean(0)
        s = v.mean(0) + np.cov(w.T, bias=True)
        both = [
            np.sum((v[i] + np.outer(w[i], w[i])) * (c[t] + np.outer(z[t], z[t])))
            for t, i in zip(task, item, strict=True)
        ]
        if binary:
            xi = np.sqrt(both)
            weight = np.tanh(xi / 2) / (2 * xi)
        else:
            eta = (z[task] * w[item]).sum(1)
            weight = np.full(len(y), 1 / np.mean(both - 2 * y * eta + y * y))
    return torch.from_numpy(np.vstack([w, mu]))


@pytest.mark.parametrize("binary", [True, False])
def test_it_is_what_loops_over_rows_find(binary: bool) -> None:
    task, item, label, _ = drawn(20, 12, 0.6, binary)
    found = fit_items(task, item, label, seed=0, num_factors=3, binary=binary, num_iterations=5)
    torch.testing.assert_close(
        found.mean, reference(task, item, label, k=3, binary=binary, passes=5), atol=1e-8, rtol=0
    )


@pytest.mark.parametrize("binary", [True, False])
def test_factors_that_the_labels_do_not_show_vanish(binary: bool) -> None:
    """Of six factors, two are in the data; the covariance of items' loadings shows no more."""
    task, item, label, _ = drawn(400, 60, 0.5, binary)
    found = fit_items(task, item, label, seed=0, num_factors=6, binary=binary)
    loadings = found.mean[:-1, :-1]
    values = torch.linalg.eigvalsh(loadings.T @ loadings / len(loadings)).flip(0)
    assert values[1] > 0.2
    assert values[2] < 0.03 * values[0]
    assert found.variance == (1.0 if binary else pytest.approx(0.09, rel=0.15))


@pytest.mark.parametrize("level", [-5.0, -3.0, 4.0])
def test_rare_clicks_have_rare_logits(level: float) -> None:
    """A start at one half, where the bound touches balanced labels alone, went to logits of -50 for 1 % clicks."""
    rng = np.random.default_rng(0)
    task, item = np.repeat(np.arange(1500), 50), rng.integers(0, 200, 75_000)
    eta = level + 0.5 * rng.standard_normal(200)[item] + 0.6 * rng.standard_normal(1500)[task]
    label = (rng.random(len(eta)) < 1 / (1 + np.exp(-eta))).astype(np.float32)
    found = fit_items(task, item, label, seed=0, num_factors=4, binary=True)
    assert float(found.mean[-1, -1]) == pytest.approx(level, abs=0.4)
    predicted = torch.sigmoid(found.mean[:-1, -1])[torch.from_numpy(np.unique(item, return_inverse=True)[1])]
    assert float(predicted.mean()) == pytest.approx(label.mean(), rel=0.3)


def test_the_last_row_is_the_average_item() -> None:
    task, item, label, _ = drawn(30, 10, 0.7, binary=True)
    found = fit_items(task, item, label, seed=0, num_factors=2, binary=True, num_iterations=3)
    torch.testing.assert_close(found.mean[-1], found.mean[:-1].mean(0))
