"""Validation: the valid split before and after adaptation, and whether the run got better."""

from __future__ import annotations

import math

from gmeta.evaluation.metrics import HIGHER_IS_BETTER
from gmeta.evaluation.score import score_split, validation_metrics, watched_metric
from gmeta.parallel.collectives import broadcast_from_rank_0
from gmeta.training.run import Run


def validate(run: Run) -> bool:
    """Measure the valid split, log the result, and update the best one. Return True when patience has run out.
    Collective.
    """
    schedule, state, progress = run.config.schedule, run.state, run.state.progress
    if "valid" not in run.pack.splits:
        return False
    run.loader.settle()  # the ids of two loaders must not cross
    with state.dense.unsharded():
        tasks = max(256, run.config.loader.tasks_per_batch)
        most = run.config.loader.max_support_rows
        scores = score_split(state.system, run.pack.split("valid"), tasks_per_batch=tasks, max_support_rows=most)
    labels = run.pack.schema.labels
    metrics = validation_metrics(scores, run.config.loss, labels) if scores is not None else {}
    value = broadcast_from_rank_0(watched_metric(metrics, schedule.metric, labels), state.mesh)
    if state.mesh.rank == 0:
        run.log.valid({"step": progress.step, **metrics})
    if math.isinf(value):
        run.log.say("the scores of the valid split are not finite: this validation counts as one that is not better")
    if math.isnan(value):
        run.log.say(f"{schedule.metric} is not defined on the valid split (one class?): set schedule.metric to loss")
        return False
    sign = -1 if schedule.metric in HIGHER_IS_BETTER else 1
    if math.isfinite(value) and (progress.best is None or sign * value < sign * progress.best):
        progress.best, progress.best_step, progress.bad_validations = value, progress.step, 0
        return False
    progress.bad_validations += 1
    return run.out_of_patience
