"""Score a split before and after adaptation: each rank scores a part, rank 0 gathers all in the split's row order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from gmeta.config.train import CLICK_METRICS
from gmeta.core.batch import TaskBatch
from gmeta.data.loader import MAX_CELLS, TaskLoader
from gmeta.data.schema import LabelColumn
from gmeta.data.shards import PackSplit
from gmeta.evaluation.metrics import HIGHER_IS_BETTER, make_rows, metric_of
from gmeta.meta.learner import MetaLearner
from gmeta.meta.losses import example_loss, prediction
from gmeta.parallel.collectives import gather_to_rank_0
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.system import PreparedBatch, System

RANKING_DECIMALS = 4
"""Validation sorts by logits of so many decimals: float32 logits of one row differ by about 1e-6 between batches."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Scores:
    """One entry a query row, ordered by `row`. Of several labels, labels and logits are [N, K] until `of_label`."""

    row: Ints  # [N], row of the split
    task: Ints  # [N], position of its task in the split
    label: Floats  # [N], NaN where the row lacks one of several
    before: Floats  # [N], unrounded logits before adaptation
    after: Floats  # [N], and after
    weight: Floats | None = None  # [N], how much the row counts; None: once

    def of_label(self, number: int) -> Scores:
        """Return the scores of one of several labels, of all rows; of the one label that there is, these."""
        if self.label.ndim == 1:
            return self
        return replace(self, **{name: getattr(self, name)[:, number] for name in ("label", "before", "after")})

    def labelled(self) -> Scores:
        """Return the rows that have the label."""
        known = ~np.isnan(self.label)
        return self if known.all() else self.where(known)

    def where(self, mask: NDArray[np.bool_]) -> Scores:
        """Return some rows."""
        weight = None if self.weight is None else self.weight[mask]
        return Scores(self.row[mask], self.task[mask], self.label[mask], self.before[mask], self.after[mask], weight)


def score_split(
    system: System,
    split: PackSplit,
    *,
    tasks_per_batch: int,
    max_support_rows: int = 0,
    max_cells: int = MAX_CELLS,
    learner: MetaLearner | None = None,
    steps: int | None = None,
    inner_lr: float | None = None,
    translate: Callable[[TaskBatch], TaskBatch] = lambda batch: batch,
    before: bool = True,
) -> Scores | None:
    """Return the logits of every query row before and after adapting to its task's support; None on other ranks than 0.
    Without `before` those before are not computed, and are NaN.

    Tasks adapt to their last `max_support_rows` support rows (0: to all), which is a setting of the run's loader.
    `learner`, `steps` and `inner_lr` replace what the system was trained with, and `translate` turns the ids of the
    split into the system's, where these are others. The call is collective, and no other loader may exchange ids
    meanwhile.
    """
    mesh = system.mesh
    learner = learner or system.learner
    loader = loader_of_pass(
        split,
        mesh,
        lambda batch: system.prepare(translate(batch), learner=learner),
        tasks_per_batch=tasks_per_batch,
        max_support_rows=max_support_rows,
        max_cells=max_cells,
    )
    parts: list[tuple[torch.Tensor, ...]] = []
    learner.eval()
    with loader:
        for prepared in loader:
            rows = system.exchange.fetch(prepared.routed)
            for part in prepared.parts:
                query = part.tasks.query
                with system.precision():
                    first, after = learner.predict(
                        part.rows(rows), part.tasks, part.index, steps=steps, inner_lr=inner_lr, before=before
                    )
                first = torch.full_like(after, math.nan) if first is None else first
                values = (query.row, query.label, first, after, *([] if query.weight is None else [query.weight]))
                parts.append(tuple(v[query.mask].cpu() for v in values))
    learner.train()
    schema = split.schema
    shapes = [(0, len(schema.labels)) if schema.labels else (0,)] * 3 + [(0,)] * (schema.weight is not None)
    empty = (torch.zeros(0, dtype=torch.int64), *(torch.zeros(shape, dtype=system.dtype) for shape in shapes))
    columns = [torch.cat(column).numpy() for column in zip(*(parts or [empty]), strict=True)]
    row, *values_of_rows = (gather_to_rank_0(column, mesh) for column in columns)
    if mesh.rank != 0:
        return None
    order = np.argsort(row, kind="stable")
    starts = np.concatenate([[0], np.cumsum(split.num_task_rows)])
    row = row[order]
    task = np.searchsorted(starts, row, side="right") - 1
    return Scores(row, task, *(v[order].astype(np.float64) for v in values_of_rows))


def loader_of_pass(
    split: PackSplit,
    mesh: Mesh,
    transform: Callable[[TaskBatch], PreparedBatch],
    *,
    tasks_per_batch: int,
    max_support_rows: int = 0,
    max_cells: int = MAX_CELLS,
) -> TaskLoader[PreparedBatch]:
    """Return the loader of one pass over a split, in stored order, of which each rank gets a part."""
    return TaskLoader(
        split,
        tasks_per_batch=max(tasks_per_batch, mesh.world_size),
        seed=0,
        rank=mesh.rank,
        world_size=mesh.world_size,
        shuffle=False,
        max_support_rows=max_support_rows,
        max_cells=max_cells,
        transform=transform,
    )


def to_predictions(logits: Floats, loss: str) -> Floats:
    """Turn logits into what is reported: probabilities under bce, values otherwise."""
    return prediction(loss)(torch.from_numpy(logits)).numpy().astype(np.float64)


def task_mean_loss(logits: Floats, label: Floats, task: Ints, loss: str, weight: Floats | None = None) -> float:
    """Return the mean over tasks of the (weighted) mean loss of their query rows, which is what training minimises."""
    values = example_loss(loss)(torch.from_numpy(logits), torch.from_numpy(label)).numpy()
    _, index = np.unique(task, return_inverse=True)
    if weight is None:
        return float((np.bincount(index, values) / np.bincount(index)).mean())
    total = np.bincount(index, weight)
    return float((np.bincount(index, weight * values) / np.where(total > 0, total, 1)).mean())


def mean_loss(scores: Scores, logits: Floats, loss: str, labels: Sequence[LabelColumn]) -> float:
    """Return `task_mean_loss`, of several labels the sum over them: a task without rows of a label counts 0 for it."""
    if not labels:
        return task_mean_loss(logits, scores.label, scores.task, loss, scores.weight)
    num_tasks, total = len(np.unique(scores.task)), 0.0
    for number, label in enumerate(labels):
        one = replace(scores, after=logits).of_label(number).labelled()
        if len(one.row):
            mean = task_mean_loss(one.after, one.label, one.task, label.loss, one.weight)
            total += label.weight * mean * len(np.unique(one.task)) / num_tasks
    return total


def validation_metrics(scores: Scores, loss: str, labels: Sequence[LabelColumn] = ()) -> dict[str, float]:
    """Return what `metrics_of_label` does; with several `labels` that of each, called `<metric>/<label>_before` and so
    on, and the loss of all together.
    """
    if not labels or len(scores.row) == 0:
        return metrics_of_label(scores, loss)
    out: dict[str, float] = {}
    for when, logits in (("before", scores.before), ("after", scores.after)):
        finite = np.isfinite(logits).all()
        out[f"loss_{when}"] = mean_loss(scores, logits, loss, labels) if finite else math.inf
    for number, label in enumerate(labels):
        for name, value in metrics_of_label(scores.of_label(number).labelled(), label.loss).items():
            metric, _, when = name.rpartition("_")
            out[f"{metric}/{label.name}_{when}"] = value
    return out


def watched_metric(metrics: Mapping[str, float], name: str, labels: Sequence[LabelColumn]) -> float:
    """Return the metric called `name` after adaptation, of several labels the first one's; NaN where there is none."""
    first = f"{name}/{labels[0].name}_after" if labels else ""
    return metrics.get(f"{name}_after", metrics.get(first, math.nan))


def metrics_of_label(scores: Scores, loss: str) -> dict[str, float]:
    """Return `<metric>_before` and `<metric>_after` of every metric that fits the loss; nothing without query rows.

    Logits that are not all finite have the worst value of every metric, ±inf. Ranking metrics sort by logits rounded to
    `RANKING_DECIMALS`, so that rows that the model ties are tied whatever batch, and number of ranks, computed them.
    """
    if len(scores.row) == 0:
        return {}
    out: dict[str, float] = {}
    names = (*CLICK_METRICS, "mae", "rmse") if loss == "bce" else ("mae", "rmse")
    for when, logits in (("before", scores.before), ("after", scores.after)):
        if not np.isfinite(logits).all():
            worst = {name: -math.inf if name in HIGHER_IS_BETTER else math.inf for name in ("loss", *names)}
            out |= {f"{name}_{when}": value for name, value in worst.items()}
            continue
        out[f"loss_{when}"] = task_mean_loss(logits, scores.label, scores.task, loss, scores.weight)
        ranking = logits.round(RANKING_DECIMALS)
        score = to_predictions(logits, loss)
        rows = make_rows(score, scores.label, scores.task, logit=ranking, weight=scores.weight)
        out |= {f"{name}_{when}": metric_of(name, rows) for name in names}
    return out
