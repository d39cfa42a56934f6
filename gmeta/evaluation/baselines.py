"""Baselines without a network: they show what means and a linear factor model reach alone.

Every baseline is fitted on the rows (support and query) of the training tasks, sees the support of each test task,
and scores its query rows. Predictions are clipped to the range of the training labels, which makes them
probabilities when labels are 0 or 1; ranking metrics read what they were before, because clipping makes ties. Exact
definitions: docs/evaluation.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gmeta.config.evaluation import FactorConfig
from gmeta.core.numbers import label_unit

BASELINES = ("global-mean", "task-mean", "item-mean", "item-mean+task-bias", "factor-analysis")
"""Names of the baselines, in the order they are reported; the last three need an item column."""

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class BaselineRows:
    """The rows of a pack split, in any order; each array has one entry a row."""

    task: NDArray[Any]  # integer key of the row's task
    label: NDArray[Any]
    is_query: NDArray[np.bool_]
    item: NDArray[Any] | None = None  # integer key of the row's item; None where the pack has no item column
    weight: NDArray[Any] | None = None  # how much the row counts in means; None: once

    def __post_init__(self) -> None:
        sizes = {"task": len(self.task), "label": len(self.label), "is_query": len(self.is_query)}
        if self.item is not None:
            sizes["item"] = len(self.item)
        if self.weight is not None:
            sizes["weight"] = len(self.weight)
        if len(set(sizes.values())) != 1:
            raise ValueError(f"columns of baseline rows have different lengths: {sizes}")

    def last_support(self, num_rows: int) -> BaselineRows:
        """Keep what `last_support` keeps."""
        keep = last_support(self.task, self.is_query, num_rows)
        item, weight = (None if column is None else column[keep] for column in (self.item, self.weight))
        return BaselineRows(self.task[keep], self.label[keep], self.is_query[keep], item, weight)

    @property
    def counts(self) -> FloatArray:
        """Return how much each row counts."""
        return np.ones(len(self.label)) if self.weight is None else self.weight.astype(np.float64)


def last_support(task: NDArray[Any], is_query: NDArray[np.bool_], num_rows: int) -> NDArray[np.bool_]:
    """Mark all query rows [N], and the last `num_rows` support rows of every task, in the order of the rows."""
    support = np.flatnonzero(~is_query)
    _, index = np.unique(task[support], return_inverse=True)
    order = np.argsort(index, kind="stable")
    from_end = np.cumsum(np.bincount(index))[index[order]] - 1 - np.arange(len(order))
    keep: NDArray[np.bool_] = is_query.copy()
    keep[support[order[from_end < num_rows]]] = True
    return keep


@dataclass(frozen=True)
class Baselines:
    """What was learned from training rows; `fit_baselines` makes it."""

    mean: float  # of all labels
    low: float  # range of the labels
    high: float
    items: NDArray[Any]  # distinct items, rising; none without an item column
    item_mean: FloatArray  # [items + 1], the last is the global mean
    factors: FactorModel | None  # None without an item column

    def score(self, test: BaselineRows) -> dict[str, FloatArray]:
        """Score every query row of `test`, in its order, by each baseline, not clipped: what ranking metrics sort by.

        Without an item column the three item baselines are left out: compare the keys with `BASELINES`.
        """
        _, task = np.unique(test.task, return_inverse=True)
        query, mean, label = test.is_query, self.mean, test.label.astype(np.float64)
        residual = _support_mean(task, label - mean, test.counts, ~query)
        scores = {"global-mean": np.full(int(query.sum()), mean), "task-mean": mean + residual[task[query]]}
        if self.factors is not None and test.item is not None:
            # Items that no training row holds get position -1, which stands for the global mean or the average item.
            position = np.minimum(np.searchsorted(self.items, test.item), len(self.items) - 1)
            position = np.where(self.items[position] == test.item, position, -1)
            item_mean = self.item_mean[position]
            bias = _support_mean(task, label - item_mean, test.counts, ~query)
            scores["item-mean"] = item_mean[query]
            scores["item-mean+task-bias"] = item_mean[query] + bias[task[query]]
            known = ~query & (position >= 0)
            centred = label[known] - mean
            latent = fold_in(self.factors, task[known], position[known], centred, num_tasks=len(residual))
            scores["factor-analysis"] = mean + self.factors.score(latent[task[query]], position[query])
        return scores

    def clip(self, scores: dict[str, FloatArray]) -> dict[str, FloatArray]:
        """Turn scores into predictions, which lie in the range of the training labels."""
        return {name: np.clip(score, self.low, self.high) for name, score in scores.items()}


def fit_baselines(train: BaselineRows, *, seed: int, factors: FactorConfig | None = None) -> Baselines:
    """Fit the baselines. `seed` draws the initial loadings of the factor analysis, whose settings are `factors` (None:
    the defaults). Means are weighted where rows have weights; the factor analysis counts every row once.

    Raises:
        ValueError: there is no training row.
    """
    if len(train.label) == 0:
        raise ValueError("baselines need training rows, but the train split has none: prepare a pack with train tasks")
    label, counts = train.label.astype(np.float64), train.counts
    weighted = train.weight is not None and counts.sum() > 0
    mean = float(np.average(label, weights=counts) if weighted else label.mean())
    items, item_mean, model = np.zeros(0, dtype=np.int64), np.full(1, mean), None
    if train.item is not None:
        items, item = np.unique(train.item, return_inverse=True)
        total = np.bincount(item, counts)
        seen = np.bincount(item, counts * label) / np.where(total > 0, total, 1)
        item_mean = np.append(np.where(total > 0, seen, mean), mean)
        _, train_task = np.unique(train.task, return_inverse=True)
        settings = asdict(factors or FactorConfig())
        unit = 1.0 if np.isin(label, (0, 1)).all() else label_unit(float(label.std()))
        model = fit_factors(train_task, item, (label - mean) / unit, seed=seed, **settings).in_units_of(unit)
    return Baselines(mean, float(label.min()), float(label.max()), items, item_mean, model)


def _support_mean(
    task: NDArray[Any], value: NDArray[Any], counts: FloatArray, support: NDArray[np.bool_]
) -> FloatArray:
    """Take the mean of `value` over each task's support, [tasks]; it is 0 for a task without support."""
    num_tasks = int(task.max()) + 1 if len(task) else 0
    count = np.bincount(task[support], counts[support], minlength=num_tasks)
    total = np.bincount(task[support], (counts * value)[support], minlength=num_tasks)
    return np.asarray(total / np.where(count > 0, count, 1), dtype=np.float64)


@dataclass(frozen=True)
class FactorModel:
    """The model label(task, item) = mean[item] + loadings[item] · z(task) + noise, z ~ N(0, I), noise ~ N(0, variance).

    The last entry, which index -1 finds, is the average item: what is expected of an item never seen.
    """

    loadings: Tensor  # float64 [items + 1, k]
    mean: Tensor  # float64 [items + 1]
    variance: float

    def in_units_of(self, unit: float) -> FactorModel:
        """Return the model of labels that are `unit` times as large."""
        return FactorModel(self.loadings * unit, self.mean * unit, self.variance * unit**2)

    def score(self, latent: FloatArray, item: NDArray[Any]) -> FloatArray:
        """Return the expected label [rows] given each row's task vector [rows, k]; item -1 is an unknown one."""
        score = self.mean.numpy()[item] + np.einsum("rk,rk->r", self.loadings.numpy()[item], latent)
        return np.asarray(score, dtype=np.float64)


def fit_factors(
    task: NDArray[Any],
    item: NDArray[Any],
    label: FloatArray,
    *,
    seed: int,
    num_factors: int = FactorConfig.num_factors,
    num_iterations: int = FactorConfig.num_iterations,
    loading_ridge: float = FactorConfig.loading_ridge,
    mean_ridge: float = FactorConfig.mean_ridge,
) -> FactorModel:
    """Fit probabilistic PCA with missing entries by EM (Tipping & Bishop 1999).

    Loadings and means have a Gaussian prior.

    The prior is centred on the average item, so that an item with few rows still shows a task's general level. Its
    default widths were chosen on held-out *training* users of ML-1M.

    Args:
        task: int [rows], dense indices of tasks.
        item: int [rows], dense indices of items.
        label: [rows], centred on the global mean.
        seed: seed of the initial loadings.
        num_factors: k.
        num_iterations: EM iterations.
        loading_ridge: pseudo-rows that pull an item's loadings to the average item's.
        mean_ridge: pseudo-rows that pull its mean.
    """
    num_tasks, num_items = int(task.max()) + 1, int(item.max()) + 1
    by_task = _Segments.build(task, item, label, num_tasks)
    by_item = _Segments.build(item, task, label, num_items)
    generator = torch.Generator().manual_seed(seed)
    weights = 0.1 * torch.randn(num_items, num_factors + 1, generator=generator, dtype=torch.float64)
    mean = np.bincount(item, label, minlength=num_items) / (np.bincount(item, minlength=num_items) + mean_ridge)
    weights[:, -1] = torch.from_numpy(mean)  # the constant's loading is the item's mean
    model = _model(weights, float(label.var()))
    ridge = torch.tensor([loading_ridge] * num_factors + [mean_ridge], dtype=torch.float64)
    for _ in range(num_iterations):
        latent, covariance = _posterior(model, by_task)
        latent = torch.cat([latent, torch.ones(num_tasks, 1, dtype=torch.float64)], dim=1)
        moment = latent[:, :, None] * latent[:, None, :]
        moment[:, :num_factors, :num_factors] += covariance
        moment = by_item.sum_symmetric(moment)
        target = by_item.sum_weighted(latent)
        pulled = target + ridge * weights.mean(dim=0)
        weights = torch.cholesky_solve(pulled[:, :, None], torch.linalg.cholesky(moment + ridge.diag()))[:, :, 0]
        error = float(label @ label) - 2 * float((weights * target).sum())
        error += float(torch.einsum("ia,iab,ib->", weights, moment, weights))
        model = _model(weights, error / len(label))
    return model


def _model(weights: Tensor, variance: float) -> FactorModel:
    """Make a model of every item's loadings and mean, [items, k + 1].

    A floor under the variance keeps exact fits invertible.
    """
    weights = torch.cat([weights, weights.mean(dim=0, keepdim=True)])
    return FactorModel(weights[:, :-1].contiguous(), weights[:, -1].contiguous(), variance + 1e-9)


def fold_in(
    model: FactorModel, task: NDArray[Any], item: NDArray[Any], label: FloatArray, *, num_tasks: int
) -> FloatArray:
    """Return the exact posterior mean of each task's vector given its rows, [num_tasks, k]; zero without rows."""
    latent, _ = _posterior(model, _Segments.build(task, item, label, num_tasks))
    return latent.numpy()


def _posterior(model: FactorModel, rows: _Segments) -> tuple[Tensor, Tensor]:
    """Return the posterior mean [T, k] and covariance [T, k, k] of the task vectors."""
    loadings, mean = model.loadings, model.mean
    identity = torch.eye(loadings.shape[1], dtype=torch.float64)
    precision = rows.sum_symmetric(loadings[:, :, None] * loadings[:, None, :]) + model.variance * identity
    target = rows.sum_weighted(loadings) - rows.sum(loadings * mean[:, None])
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(precision))
    return (inverse @ target[:, :, None])[:, :, 0], model.variance * inverse


@dataclass(frozen=True)
class _Segments:
    """Rows sorted by segment. Each row points at an entry of a table; the entries are summed over a segment's rows.

    `embedding_bag` is exactly that sum and never forms a [rows, width] array.
    """

    index: Tensor  # int64 [rows], entry of the table
    weight: Tensor  # float64 [rows]
    offsets: Tensor  # int64 [segments + 1]

    @staticmethod
    def build(segment: NDArray[Any], index: NDArray[Any], weight: FloatArray, num_segments: int) -> _Segments:
        order = np.argsort(segment, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(segment, minlength=num_segments))])
        return _Segments(
            torch.from_numpy(index[order].astype(np.int64)),
            torch.from_numpy(weight[order].astype(np.float64)),
            torch.from_numpy(offsets.astype(np.int64)),
        )

    def sum(self, table: Tensor, weight: Tensor | None = None) -> Tensor:
        return F.embedding_bag(
            self.index, table, self.offsets, mode="sum", per_sample_weights=weight, include_last_offset=True
        )

    def sum_weighted(self, table: Tensor) -> Tensor:
        return self.sum(table, self.weight)

    def sum_symmetric(self, table: Tensor) -> Tensor:
        """Sum symmetric matrices [entries, k, k] -> [segments, k, k], through their upper triangles."""
        k = table.shape[1]
        row, column = torch.triu_indices(k, k)
        upper = self.sum(table[:, row, column])
        full = torch.empty(len(upper), k, k, dtype=table.dtype)
        full[:, row, column] = upper
        full[:, column, row] = upper
        return full
