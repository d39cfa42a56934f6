"""Exact metrics of scored query rows, and paired bootstrap confidence intervals over tasks.

Every metric takes flat arrays over rows: `score` and `label` [N], and `task` [N], any integers. All arithmetic is
float64. A metric that the rows do not define (the AUC of one class) is nan; rows that nothing can be said of (none at
all, values that are not finite, arrays of unequal length) are a ValueError. Each metric but `auc` is a function of
sums over tasks, which makes the bootstrap a matrix product. docs/evaluation.md defines each.

To add a metric: give `task_sums` its sums, and name it in BINARY_METRICS or RATING_METRICS, and in HIGHER_IS_BETTER
where it is one of those.

Ranking metrics (auc, gauc and those at k) read the order of the scores alone. A probability loses that order where the
sigmoid saturates: from a logit of 37 on, every float64 probability is 1. They therefore sort by logits where there are
some.

Rows may have weights: then a sum over rows is a weighted sum, a pair of rows counts the product of their weights, and
`gauc` weights a task by its rows' sum. Ranking metrics at k count every row once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gmeta.evaluation.ranking import PLACE_METRICS, TOP_K, FloatArray, TaskOrder, TopPlaces, dcg, group_starts

NDCG_METRICS = ("ndcg@5", "ndcg@10")
RELEVANCE_METRICS = tuple(f"{name}@{k}" for name in TOP_K for k in (5, 10))
"""Metrics of rows that are relevant or not: those labelled 1 or, for ratings, at least a label that the user names."""
BINARY_METRICS = ("auc", "gauc", "logloss", "rmse", "calibration", "ece", *NDCG_METRICS, *RELEVANCE_METRICS)
"""Metrics of 0/1 labels, whose scores are probabilities."""
RATING_METRICS = ("mae", "task_mae", "rmse", "calibration", *NDCG_METRICS)
"""Metrics of other labels; `RELEVANCE_METRICS` too where it is known which of them are relevant."""
HIGHER_IS_BETTER = frozenset({"auc", "gauc", *NDCG_METRICS, *RELEVANCE_METRICS, *PLACE_METRICS})
"""Lower is better for all others but `calibration`, whose best value is 1."""

LABEL_MARK = "/"
"""Stands between a metric and its label, where there are several: auc/click."""

LOGLOSS_CLIP = 1e-7
"""Probabilities are clipped to [c, 1 - c]: a float32 sigmoid saturates at 1 - 6e-8, by rounding and not by claim."""
MAX_NDCG_LABEL = 30.0
"""nDCG's gain 2^label - 1 is meant for grades; labels outside [0, 30] have no nDCG."""
CALIBRATION_BINS = 20
NO_INTERVAL = frozenset({"ece"})
"""Metrics that a resample overstates: it adds noise to every bin, and the sum of sizes counts noise as miscalibration.
Their resampled values lie above the value itself, so that quantiles are no interval of it."""
_MIN_TASKS = 2  # one task says nothing about the spread over tasks
_BLOCK_VALUES = 1 << 23  # bootstrap weights formed at a time (64 MiB)


@dataclass(frozen=True)
class Rows:
    """The rows that a metric is taken over."""

    score: FloatArray  # [N]
    label: FloatArray  # [N]
    task: NDArray[np.int64]  # [N], in [0, num_tasks)
    num_tasks: int
    ranking: FloatArray  # [N], what ranking metrics sort by: the logits, or the score
    relevant_label: float | None = None  # rows of at least this label are relevant; None: labels are 0/1, and 1 is
    weight: FloatArray | None = None  # [N], how much each row counts; None: once

    @property
    def counts(self) -> FloatArray:
        """Return how much each row counts, [N]."""
        return np.ones(len(self.score)) if self.weight is None else self.weight

    @cached_property
    def best_first(self) -> TaskOrder:
        """Return each task's rows by falling score; sorted once for all metrics at k."""
        return TaskOrder.build(self.task, -self.ranking, self.num_tasks)

    def sum_by_task(self, value: NDArray[Any]) -> FloatArray:
        """Sum a column [N] over each task's rows, [num_tasks]."""
        return np.bincount(self.task, value, minlength=self.num_tasks).astype(np.float64)


@dataclass(frozen=True)
class TaskSums:
    """A metric as a function of sums over tasks: value = combine(sum over tasks of `columns`)."""

    columns: FloatArray  # [num_tasks, c]
    combine: Callable[[FloatArray], FloatArray]  # [..., c] -> [...]
    counted: NDArray[np.bool_]  # [num_tasks], tasks that take part


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; `low` and `high` are nan with fewer than two tasks, and for `NO_INTERVAL`."""

    value: float
    low: float
    high: float
    n: int  # tasks that took part


def metric(
    name: str,
    score: ArrayLike,
    label: ArrayLike,
    task: ArrayLike,
    *,
    logit: ArrayLike | None = None,
    relevant_label: float | None = None,
    weight: ArrayLike | None = None,
) -> float:
    """Return the value of one metric.

    Args:
        name: one of BINARY_METRICS, RATING_METRICS and RELEVANCE_METRICS.
        score: [N], probabilities for binary metrics.
        label: [N].
        task: [N], any integers.
        logit: [N], what ranking metrics sort by in place of `score`.
        relevant_label: rows of at least this label are relevant to RELEVANCE_METRICS; without it labels must be 0/1.
        weight: [N], how much each row counts, at least 0; metrics at k leave it alone.

    Raises:
        ValueError: unknown name; no rows, arrays of unequal length, values that are not finite; or labels that the
            metric does not take.
    """
    return metric_of(name, make_rows(score, label, task, logit=logit, relevant_label=relevant_label, weight=weight))


def without_label(name: str) -> str:
    """Return a metric's name without the label that it is of."""
    return name.partition(LABEL_MARK)[0]


def is_metric(name: str, known: Collection[str]) -> bool:
    """Say whether a metric, of whichever label, is one of some."""
    return without_label(name) in known


def metric_of(name: str, rows: Rows) -> float:
    """Return the value of one metric of checked rows; errors as `task_sums`."""
    if name == "auc":
        return _auc(rows)
    sums = task_sums(name, rows)
    return float(sums.combine(sums.columns.sum(axis=0)))


def make_rows(
    score: ArrayLike,
    label: ArrayLike,
    task: ArrayLike,
    *,
    logit: ArrayLike | None = None,
    relevant_label: float | None = None,
    weight: ArrayLike | None = None,
) -> Rows:
    """Check the columns of some rows and number their tasks densely, in the order of their keys.

    Raises:
        ValueError: there are no rows, the columns differ in length, one holds a value that is not finite, or a weight
            is negative.
    """
    columns = {"score": np.asarray(score), "label": np.asarray(label), "task": np.asarray(task)}
    if logit is not None:
        columns["logit"] = np.asarray(logit)
    if weight is not None:
        columns["weight"] = np.asarray(weight)
    for name, column in columns.items():
        if column.ndim != 1:
            raise ValueError(f"{name} has shape {column.shape}: it must be a flat array with one entry a row")
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{name} has {len(column)}" for name, column in columns.items())
        raise ValueError(f"the columns of rows differ in length: {lengths} rows; they must be equal")
    if len(columns["score"]) == 0:
        raise ValueError("score is empty: there are no rows to measure")
    for name, column in columns.items():
        if len(bad := np.flatnonzero(~np.isfinite(column))):
            raise ValueError(f"{name} is not finite in row {bad[0]} ({column[bad[0]]}): cannot measure it")
    if weight is not None and len(bad := np.flatnonzero(columns["weight"] < 0)):
        raise ValueError(f"weight is {columns['weight'][bad[0]]} in row {bad[0]}: must not be negative")
    keys, index = np.unique(columns["task"], return_inverse=True)
    values = columns["score"].astype(np.float64)
    return Rows(
        score=values,
        label=columns["label"].astype(np.float64),
        task=index.astype(np.int64),
        num_tasks=len(keys),
        ranking=columns["logit"].astype(np.float64) if logit is not None else values,
        relevant_label=relevant_label,
        weight=columns["weight"].astype(np.float64) if weight is not None else None,
    )


def task_sums(name: str, rows: Rows) -> TaskSums:
    """Return a metric as sums over tasks; every metric but `auc`, which is not a function of such sums."""
    error = rows.score - rows.label
    if name == "gauc":
        return _gauc(rows)
    if name.startswith("ndcg@"):
        return _ndcg(rows, int(name.removeprefix("ndcg@")))
    kind, _, k = name.partition("@")
    if kind in TOP_K and k.isdecimal() and int(k) > 0:
        return _top_k(rows, kind, int(k))
    if name == "ece":
        return _ece(rows)
    if name == "calibration":
        return _by_rows(rows, rows.score, rows.label, combine=_ratio)
    if name == "logloss":
        _require_binary(name, rows.label)
        return _by_rows(rows, _row_logloss(rows), combine=_ratio)
    if name == "mae":
        return _by_rows(rows, np.abs(error), combine=_ratio)
    if name == "rmse":
        return _by_rows(rows, error**2, combine=lambda sums: np.sqrt(_ratio(sums)))
    if name == "task_mae":
        count = rows.sum_by_task(rows.counts)
        mean = rows.sum_by_task(rows.counts * np.abs(error)) / np.where(count > 0, count, 1)
        return _by_tasks(mean, count > 0, np.ones(rows.num_tasks))
    known = ", ".join(dict.fromkeys(BINARY_METRICS + RATING_METRICS + RELEVANCE_METRICS))
    raise ValueError(f"metric {name!r} is unknown: must be one of {known}")


def row_mean(value: FloatArray, task: NDArray[np.int64], num_tasks: int) -> TaskSums:
    """Return the mean over rows of `value` [N] as sums over tasks; `task` [N] is in [0, num_tasks)."""
    total, count = (np.bincount(task, weight, minlength=num_tasks) for weight in (value, None))
    return TaskSums(np.stack([total, count], axis=1).astype(np.float64), _ratio, count > 0)


def auc(score: ArrayLike, label: ArrayLike) -> float:
    """Return the area under the ROC curve: the chance that a positive scores above a negative; a tie is ½."""
    return _auc(make_rows(score, label, _one_task(label)))


def gauc(score: ArrayLike, label: ArrayLike, task: ArrayLike) -> float:
    """Return the mean of the tasks' AUCs, weighted by their rows; tasks with one class are left out."""
    return metric("gauc", score, label, task)


def logloss(score: ArrayLike, label: ArrayLike) -> float:
    """Return the mean binary cross-entropy of probabilities clipped to [LOGLOSS_CLIP, 1 - LOGLOSS_CLIP]."""
    return metric("logloss", score, label, _one_task(label))


def mae(score: ArrayLike, label: ArrayLike) -> float:
    """Return the mean absolute error over rows."""
    return metric("mae", score, label, _one_task(label))


def rmse(score: ArrayLike, label: ArrayLike) -> float:
    """Return the root of the mean squared error over rows."""
    return metric("rmse", score, label, _one_task(label))


def calibration_curve(
    score: ArrayLike, label: ArrayLike, num_bins: int = 10, weight: ArrayLike | None = None
) -> list[dict[str, float | int]]:
    """Return the (weighted) mean prediction and label of (nearly) equally many rows a bin, by rising prediction.

    Equal scores never part: a bin ends at the last row of its score, so there may be fewer bins. Rows of weight 0 are
    left out.

    Raises:
        ValueError: as `make_rows`.
    """
    rows = make_rows(score, label, _one_task(label), weight=weight)
    order = np.argsort(rows.score, kind="stable")
    order = order[rows.counts[order] > 0]
    predicted, observed, counts = rows.score[order], rows.label[order], rows.counts[order]
    if not len(order):
        return []
    cuts = np.arange(1, num_bins) * len(predicted) // num_bins
    ends = np.unique(np.append(np.searchsorted(predicted, predicted[cuts - 1], side="right"), len(predicted)))
    ends = ends[ends > 0]
    bins = zip(np.append(0, ends[:-1]), ends, strict=True)
    return [
        {
            "predicted": _mean(predicted[a:b], counts[a:b]),
            "observed": _mean(observed[a:b], counts[a:b]),
            "n": int(b - a),
        }
        for a, b in bins
    ]


def _mean(values: FloatArray, counts: FloatArray) -> float:
    return float(values.mean() if (counts == 1).all() else np.average(values, weights=counts))


def _one_task(label: ArrayLike) -> NDArray[np.int64]:
    """Return task keys [N] that make all rows one task."""
    return np.zeros(np.shape(label)[:1], dtype=np.int64)


def _auc(rows: Rows) -> float:
    _require_binary("auc", rows.label)
    ranking = _Ranking.build(rows.ranking, rows.label, np.zeros(len(rows.label), dtype=np.int64), rows.weight)
    return float(ranking.weighted_auc(np.ones((1, 1)))[0])


def _ratio(sums: FloatArray) -> FloatArray:
    """Return sums[..., 0] / sums[..., 1]; nan where the denominator is 0."""
    bottom = sums[..., 1]
    return np.where(bottom != 0, sums[..., 0] / np.where(bottom != 0, bottom, 1.0), np.nan)


def _by_rows(
    rows: Rows, top: FloatArray, bottom: FloatArray | float = 1.0, *, combine: Callable[[FloatArray], FloatArray]
) -> TaskSums:
    counts = rows.counts
    columns = np.stack([rows.sum_by_task(counts * top), rows.sum_by_task(counts * bottom)], axis=1)
    return TaskSums(columns, combine, rows.sum_by_task(counts) > 0)


def _by_tasks(value: FloatArray, counted: NDArray[np.bool_], weight: FloatArray) -> TaskSums:
    """Make the weighted mean of one value a task, over the tasks that count."""
    weight = np.where(counted, weight, 0.0)
    return TaskSums(np.stack([np.where(counted, value, 0.0) * weight, weight], axis=1), _ratio, counted)


def _require_binary(name: str, label: NDArray[Any], cure: str = "use mae or rmse, or binarise the label") -> None:
    wrong = label[(label != 0) & (label != 1)]
    if len(wrong):
        raise ValueError(f"{name} needs labels 0 or 1, found {wrong[0]:g}: {cure}")


def _row_logloss(rows: Rows) -> FloatArray:
    score = np.clip(rows.score, LOGLOSS_CLIP, 1 - LOGLOSS_CLIP)
    return np.asarray(-np.log(np.where(rows.label == 1, score, 1 - score)), dtype=np.float64)


def _ece(rows: Rows) -> TaskSums:
    """Make the expected calibration error over equally wide bins of the prediction in [0, 1]."""
    bins = np.clip((rows.score * CALIBRATION_BINS).astype(np.int64), 0, CALIBRATION_BINS - 1)
    cell = rows.task * CALIBRATION_BINS + bins
    gap = np.bincount(cell, rows.counts * (rows.score - rows.label), minlength=rows.num_tasks * CALIBRATION_BINS)
    count = rows.sum_by_task(rows.counts)

    def combine(sums: FloatArray) -> FloatArray:
        return _ratio(np.stack([np.abs(sums[..., :-1]).sum(axis=-1), sums[..., -1]], axis=-1))

    return TaskSums(np.column_stack([gap.reshape(rows.num_tasks, -1), count]), combine, count > 0)


def _gauc(rows: Rows) -> TaskSums:
    """Make the tasks' AUCs (by midranks), weighted by their rows; tasks with one class are left out."""
    _require_binary("gauc", rows.label)
    if rows.weight is not None:
        return _weighted_gauc(rows, rows.weight)
    order = np.lexsort((rows.ranking, rows.task))
    task, ranking, label = rows.task[order], rows.ranking[order], rows.label[order]
    start = group_starts(task, ranking)
    group = np.cumsum(start) - 1
    first = np.flatnonzero(start)
    size = np.diff(np.append(first, len(task)))
    # Ranks count over all rows; the line of `rank_sum` takes away the rows of the tasks before.
    midrank = (first + (size - 1) / 2 + 1)[group]
    count, positive = rows.sum_by_task(np.ones(len(task))), rows.sum_by_task(rows.label)
    offset = np.cumsum(count) - count
    rank_sum = np.bincount(task, label * (midrank - offset[task]), minlength=rows.num_tasks)
    pairs = positive * (count - positive)
    value = (rank_sum - positive * (positive + 1) / 2) / np.maximum(pairs, 1)
    return _by_tasks(value, pairs > 0, count)


def _weighted_gauc(rows: Rows, weight: FloatArray) -> TaskSums:
    """Make the tasks' weighted AUCs. A positive counts the weight of the negatives of its task that it beats, and half
    of that of those that it ties with.
    """
    order = np.lexsort((rows.ranking, rows.task))
    task, ranking, positive = rows.task[order], rows.ranking[order], rows.label[order] == 1
    weight = weight[order]
    negatives = np.append(0.0, np.cumsum(np.where(positive, 0, weight)))  # before each row, and behind the last
    first = np.flatnonzero(group_starts(task, ranking))
    end = np.append(first[1:], len(task))
    group = np.repeat(np.arange(len(first)), end - first)
    tasks = np.flatnonzero(np.diff(task, prepend=-1))
    before = negatives[tasks[np.searchsorted(tasks, np.arange(len(task)), side="right") - 1]]
    beaten = 0.5 * (negatives[first] + negatives[end])[group] - before
    wins = np.bincount(task, np.where(positive, weight * beaten, 0), minlength=rows.num_tasks)
    of_positive, of_negative = (
        np.bincount(task, part, minlength=rows.num_tasks) for part in (weight * positive, weight * ~positive)
    )
    pairs = of_positive * of_negative
    return _by_tasks(wins / np.where(pairs > 0, pairs, 1), pairs > 0, rows.sum_by_task(rows.counts))


def _ndcg(rows: Rows, k: int) -> TaskSums:
    """Make the mean over tasks of nDCG@k, with gain 2^label - 1 and discount 1 / log2(rank + 1).

    Tasks whose ideal DCG is 0 (no label above 0) are left out.
    """
    bad = rows.label[(rows.label < 0) | (rows.label > MAX_NDCG_LABEL)]
    if len(bad):
        raise ValueError(f"ndcg needs labels in [0, {MAX_NDCG_LABEL:g}], found {bad[0]:g}")
    gain = np.exp2(rows.label) - 1
    found = dcg(rows.best_first, gain, k)
    ideal = dcg(TaskOrder.build(rows.task, -gain, rows.num_tasks), gain, k)
    return _by_tasks(found / np.where(ideal > 0, ideal, 1.0), ideal > 0, np.ones(rows.num_tasks))


def _top_k(rows: Rows, name: str, k: int) -> TaskSums:
    """Make the mean over tasks of a metric of `TOP_K`; tasks without a relevant row are left out."""
    if rows.relevant_label is None:
        _require_binary(f"{name}@{k}", rows.label, "name the label from which on rows are relevant (relevant_label)")
    relevant = rows.label >= (1 if rows.relevant_label is None else rows.relevant_label)
    top = TopPlaces.build(rows.best_first, relevant, k)
    return _by_tasks(TOP_K[name](top), top.num_relevant > 0, np.ones(rows.num_tasks))


@dataclass(frozen=True)
class _Ranking:
    """Rows sorted once, so that AUC under any task weights costs one pass."""

    positive: NDArray[np.int64]  # task of each positive row, by rising score
    negative: NDArray[np.int64]  # task of each negative row, by rising score
    below: NDArray[np.int64]  # for each positive, negatives that score lower
    upto: NDArray[np.int64]  # for each positive, negatives that score lower or equal
    own: tuple[FloatArray, FloatArray] | None  # the weights of positives and negatives; None: all are 1

    @staticmethod
    def build(score: NDArray[Any], label: NDArray[Any], task: NDArray[np.int64], weight: FloatArray | None) -> _Ranking:
        order = np.argsort(score, kind="stable")
        score, task, is_positive = score[order], task[order], label[order] == 1
        low, high = score[~is_positive], score[is_positive]
        below, upto = np.searchsorted(low, high, side="left"), np.searchsorted(low, high, side="right")
        own = None if weight is None else (weight[order][is_positive], weight[order][~is_positive])
        return _Ranking(task[is_positive], task[~is_positive], below, upto, own)

    def weighted_auc(self, weights: FloatArray) -> FloatArray:
        """Return AUC with each row weighted by its task, and by its own weight, for each row of `weights` [R, tasks];
        nan without pairs.
        """
        out = np.full(len(weights), np.nan)
        below = np.zeros(len(self.negative) + 1)
        for i, weight in enumerate(weights):
            positive, negative = weight[self.positive], weight[self.negative]
            if self.own is not None:
                positive, negative = positive * self.own[0], negative * self.own[1]
            np.cumsum(negative, out=below[1:])
            pairs = positive.sum() * below[-1]
            if pairs > 0:
                out[i] = 0.5 * (positive @ below[self.below] + positive @ below[self.upto]) / pairs
        return out


@dataclass(frozen=True)
class Resampled:
    """A metric of the rows themselves and of every resample, [1 + resamples].

    Two of them are paired, and may be subtracted, where their bootstraps had the same tasks, resamples and seed.
    """

    values: FloatArray
    n: int  # tasks that took part
    has_interval: bool

    def estimate(self, against: Resampled | None = None) -> Estimate:
        """Return the metric, or its difference to another, with its interval."""
        values = self.values if against is None else self.values - against.values
        found = values[1:][np.isfinite(values[1:])]
        if self.n < _MIN_TASKS or not self.has_interval or not math.isfinite(values[0]) or len(found) == 0:
            return Estimate(float(values[0]), math.nan, math.nan, self.n)
        low, high = np.quantile(found, [0.025, 0.975])
        return Estimate(float(values[0]), float(low), float(high), self.n)


class Bootstrap:
    """Resamples of one set of tasks, drawn with replacement; the same draws for every metric and variant.

    Metrics are registered by `add`, then `run` draws each block of resamples once for all of them. Intervals are the
    2.5 % and 97.5 % quantiles of the resampled values; the difference of two entries is taken within each resample,
    which pairs the two variants on tasks.
    """

    def __init__(self, num_tasks: int, *, resamples: int, seed: int) -> None:
        self.num_tasks = num_tasks
        self.resamples = resamples
        self.seed = seed
        self._sums: dict[Any, TaskSums] = {}
        self._rankings: dict[Any, tuple[_Ranking, Rows]] = {}
        self._without_interval: set[Any] = set()
        self._values: dict[Any, FloatArray] = {}  # first the value itself, then the resamples

    def add(self, key: Any, name: str, rows: Rows) -> None:
        """Register metric `name` of `rows` under `key`."""
        if rows.num_tasks != self.num_tasks:
            raise ValueError(f"rows have {rows.num_tasks} tasks, the bootstrap {self.num_tasks}: must be equal")
        if name in NO_INTERVAL:
            self._without_interval.add(key)
        if name == "auc":
            _require_binary(name, rows.label)
            self._rankings[key] = (_Ranking.build(rows.ranking, rows.label, rows.task, rows.weight), rows)
        else:
            self._sums[key] = task_sums(name, rows)

    def add_sums(self, key: Any, sums: TaskSums) -> None:
        """Register a metric that is given as sums over the tasks."""
        self._sums[key] = sums

    def run(self) -> None:
        """Compute the value and the resampled values of everything registered."""
        values: dict[Any, list[FloatArray]] = {key: [] for key in (*self._sums, *self._rankings)}
        columns = [sums.columns for sums in self._sums.values()]
        table = np.concatenate(columns, axis=1) if columns else np.zeros((self.num_tasks, 0))
        ends = np.cumsum([column.shape[1] for column in columns])
        for weights in self._weights():
            parts = np.split(weights @ table, ends[:-1], axis=1) if columns else []
            for (key, sums), part in zip(self._sums.items(), parts, strict=True):
                values[key].append(sums.combine(part))
            for key, (ranking, _) in self._rankings.items():
                values[key].append(ranking.weighted_auc(weights))
        self._values = {key: np.concatenate(parts) for key, parts in values.items()}

    def estimate(self, key: Any, against: Any = None) -> Estimate:
        """Return the metric registered under `key`, or its difference to the one under `against`."""
        return self.resampled(key).estimate(None if against is None else self.resampled(against))

    def resampled(self, key: Any) -> Resampled:
        """Return all values of the metric registered under `key`."""
        return Resampled(self._values[key], self._num_counted(key), key not in self._without_interval)

    def _num_counted(self, key: Any) -> int:
        if key in self._sums:
            return int(self._sums[key].counted.sum())
        rows = self._rankings[key][1]
        return len(np.unique(rows.task[rows.counts > 0]))

    def _weights(self) -> Iterator[FloatArray]:
        """Yield blocks [R, tasks] of how often each task was drawn. The first row is all ones, the sample itself."""
        rng = np.random.default_rng(self.seed)
        block = max(1, _BLOCK_VALUES // max(self.num_tasks, 1))
        yield np.ones((1, self.num_tasks))
        for begin in range(0, self.resamples, block):
            count = min(block, self.resamples - begin)
            weights = np.empty((count, self.num_tasks))
            for row in weights:
                row[:] = np.bincount(rng.integers(self.num_tasks, size=self.num_tasks), minlength=self.num_tasks)
            yield weights
