"""Bayesian factor analysis of items: how wide its priors are is learned, so that nothing is set for a data set.

    eta(task, item) = v_item · z_task + m_item,    z_task ~ N(0, I),    (v_item, m_item) ~ N(mu, S)

A label is eta with noise of one variance, or for clicks, Bernoulli(sigmoid(eta)). Variational Bayes takes normal
posteriors of every task's z and every item's (v, m), in turn, and sets mu, S and the variance to what explains the
labels best (empirical Bayes; Bishop, Variational principal components, 1999; Raiko, Ilin and Karhunen, Principal
component analysis for large scale problems with lots of missing values, 2007). The logistic likelihood is bounded by
a normal one of row weights tanh(xi / 2) / (2 xi), xi^2 = E[eta^2] (Jaakkola and Jordan 2000).

Factor analysis by EM (`gmeta.evaluation.baselines`) takes each item's (v, m) as known, and needs ridges and k chosen
for the data. Here factors that the labels do not show vanish: on MovieLens-100K 4 and 12 factors are equally good.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

ITERATIONS = 20
"""On valid users of MovieLens-100K (clicks, 12 factors, 6 seeds) 20 passes rank better than 40: AUC
.0014 higher."""
_LOGIT = 2.0  # by how much logits differ, at first
_LEVEL_ROWS = 5  # pseudo-rows of the first means of items
_CHUNK = 1 << 10
"""Rows whose second moments are made at a time, which then stay in the cache: ten iterations on 69,000 rows take
1.2 s; in chunks of 32,768 they take 3.7 s."""


@dataclass(frozen=True)
class ItemPosterior:
    """What is known of items; the last entry is the average item, which is what is expected of a new one."""

    mean: Tensor  # float64 [items + 1, k + 1], of (v, m)
    variance: float  # of labels about eta; 1 for clicks


def fit_items(
    task: NDArray[Any],
    item: NDArray[Any],
    label: NDArray[Any],
    *,
    seed: int,
    num_factors: int,
    binary: bool,
    num_iterations: int = ITERATIONS,
) -> ItemPosterior:
    """Return the posterior of every item's loadings and mean.

    Args:
        task: int [rows], dense indices of tasks.
        item: int [rows], dense indices of items.
        label: [rows], of both classes where `binary`.
        seed: seed of the first loadings.
        num_factors: k, the most factors that are found.
        binary: labels are 0 and 1, and eta is a logit.
        num_iterations: passes over tasks and items.
    """
    y = torch.from_numpy(label.astype(np.float64))
    by_task, by_item = _Sums(task, item), _Sums(item, task)
    spread = float(y.var(correction=0))
    unit = _LOGIT if binary else spread**0.5
    mean = _first_mean(by_item, y, num_factors, seed, binary, unit)
    covariance = torch.zeros(*mean.shape, mean.shape[1], dtype=torch.float64)
    prior = 0.1 * unit**2 * torch.eye(mean.shape[1], dtype=torch.float64)
    prior_mean = mean.mean(0)
    weight = _bound(mean[by_item.segment, -1].abs()) if binary else torch.full_like(y, 1 / spread)
    for _ in range(num_iterations):
        target = y - 0.5 if binary else y * weight
        moment, total = by_task.moments(mean, covariance, weight), by_task.sums(mean, target)
        precision = moment[:, :-1, :-1] + torch.eye(num_factors, dtype=torch.float64)
        latent, uncertain, stretch = _standardised(*_normal(precision, total[:, :-1] - moment[:, :-1, -1]))
        pull = torch.linalg.inv(stretch.T @ prior @ stretch)
        mean, covariance = _normal(
            by_item.moments(latent, uncertain, weight) + pull,
            by_item.sums(latent, target) + pull @ stretch.T @ prior_mean,
        )
        prior_mean = mean.mean(0)
        centred = mean - prior_mean
        prior = covariance.mean(0) + centred.T @ centred / len(mean)
        square = by_task.second(latent, uncertain, mean, covariance)
        if binary:
            weight = _bound(square.sqrt())
        else:
            eta = (latent[by_task.segment] * mean[by_task.index]).sum(1)
            spread = float((square - 2 * y * eta + y * y).mean()) + 1e-9 * unit**2  # keeps exact fits invertible
            weight = torch.full_like(y, 1 / spread)
    return ItemPosterior(torch.cat([mean, prior_mean[None]]), 1.0 if binary else spread)


def _bound(xi: Tensor) -> Tensor:
    """Return the row weights of the bound on the logistic likelihood that touches it at logits of size xi."""
    return torch.where(xi > 1e-6, torch.tanh(xi / 2) / (2 * xi).clamp(min=1e-12), 0.25)


def _first_mean(by_item: _Sums, y: Tensor, num_factors: int, seed: int, binary: bool, unit: float) -> Tensor:
    """Return small random loadings and items' shrunk mean labels, as eta: [items, k + 1]."""
    level = float(y.mean())
    generator = torch.Generator().manual_seed(seed)
    mean: Tensor = 0.1 * unit * torch.randn(by_item.size, num_factors + 1, generator=generator, dtype=torch.float64)
    item = by_item.segment
    rate = level + torch.bincount(item, y - level) / (torch.bincount(item) + _LEVEL_ROWS)
    mean[:, -1] = rate.logit() if binary else rate
    return mean


def _standardised(latent: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return tasks' vectors and a 1, [T, k + 1], whose second moment over tasks is 1; their covariances [T, k + 1,
    k + 1]; and the matrix by which items' vectors stretch instead. EM gets there slowly.
    """
    factor = torch.linalg.cholesky(covariance.mean(0) + latent.T @ latent / len(latent))
    inverse = torch.linalg.inv(factor)
    stretch = F.pad(factor, (0, 1, 0, 1))
    stretch[-1, -1] = 1
    return F.pad(latent @ inverse.T, (0, 1), value=1.0), F.pad(inverse @ covariance @ inverse.T, (0, 1, 0, 1)), stretch


def _normal(precision: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means [N, D] and covariances [N, D, D] of normal distributions."""
    covariance = torch.cholesky_inverse(torch.linalg.cholesky(precision))
    return (covariance @ target[:, :, None])[:, :, 0], covariance


class _Sums:
    """Rows grouped by segment; each row points at an entry of a table, and entries are summed over a segment's rows."""

    def __init__(self, segment: NDArray[Any], index: NDArray[Any]) -> None:
        self.segment, self.index = (torch.from_numpy(x.astype(np.int64)) for x in (segment, index))
        self.size = int(self.segment.max()) + 1
        self.order = torch.argsort(self.segment, stable=True)
        count = torch.bincount(self.segment, minlength=self.size)
        self.offsets = torch.cat([count.new_zeros(1), count.cumsum(0)])

    def sums(self, table: Tensor, weight: Tensor) -> Tensor:
        """Return the weighted sums of entries: [entries, D], [rows] -> [segments, D]."""
        return F.embedding_bag(
            self.index[self.order],
            table,
            self.offsets,
            mode="sum",
            per_sample_weights=weight[self.order],
            include_last_offset=True,
        )

    def moments(self, mean: Tensor, covariance: Tensor, weight: Tensor) -> Tensor:
        """Return the weighted sums of entries' second moments, [segments, D, D], through their upper triangles."""
        row, column = torch.triu_indices(mean.shape[1], mean.shape[1])
        upper = self.sums(_second(mean, covariance)[:, row, column], weight)
        full = upper.new_empty(len(upper), *covariance.shape[1:])
        full[:, row, column] = upper
        full[:, column, row] = upper
        return full

    def second(self, own: Tensor, own_covariance: Tensor, other: Tensor, other_covariance: Tensor) -> Tensor:
        """Return E[(a · b)^2] of every row's segment and entry, both normal: [rows]."""
        row, column = torch.triu_indices(own.shape[1], own.shape[1])
        twice = torch.where(row == column, 1.0, 2.0).to(own.dtype)
        left = _second(own, own_covariance)[:, row, column] * twice
        right = _second(other, other_covariance)[:, row, column]
        parts = zip(torch.split(self.segment, _CHUNK), torch.split(self.index, _CHUNK), strict=True)
        return torch.cat([(left[segment] * right[index]).sum(1) for segment, index in parts])


def _second(mean: Tensor, covariance: Tensor) -> Tensor:
    return covariance + mean[:, :, None] * mean[:, None, :]
