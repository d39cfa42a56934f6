"""Validation: the valid split before and after adaptation, and whether the run got better."""

from __future__ import annotations

import math

from gmeta.config.train import NEXT_ITEM_METRICS
from gmeta.evaluation.metrics import HIGHER_IS_BETTER
from gmeta.evaluation.next_item import Places
from gmeta.evaluation.rank_split import candidates_of, rank_split
from gmeta.evaluation.score import score_split, validation_metrics, watched_metric
from gmeta.parallel.collectives import broadcast_from_rank_0
from gmeta.recommender.build import candidate_draw, domain_of
from gmeta.recommender.catalogue_vectors import next_item_learner
from gmeta.training.run import Run

_LOGGED = (*NEXT_ITEM_METRICS, "recall@50", "ndcg@50", "mrr@50")


def validate(run: Run) -> bool:
    """Measure the valid split, log the result, and update the best one. Return True when patience has run out.
    Collective.
    """
    schedule, state, progress = run.config.schedule, run.state, run.state.progress
    if "valid" not in run.pack.splits:
        return False
    run.loader.settle()  # the ids of two loaders must not cross
    with state.dense.unsharded():
        metrics = (_next_item_metrics if run.pack.schema.next_item else _metrics)(run)
    labels = run.pack.schema.labels
    value = broadcast_from_rank_0(watched_metric(metrics, schedule.metric, labels), state.mesh)
    if state.mesh.rank == 0:
        run.log.valid({"step": progress.step, **metrics})
    if math.isinf(value):
        run.log.say("the scores of the valid split are not finite: this validation counts as one that is not better")
    if math.isnan(value):
        usual = f": set it to {', '.join(NEXT_ITEM_METRICS)}"
        cure = usual if run.pack.schema.next_item else " (one class?): set it to loss"
        run.log.say(f"schedule.metric {schedule.metric} is not defined on the valid split{cure}")
        return False
    sign = -1 if schedule.metric in HIGHER_IS_BETTER else 1
    if math.isfinite(value) and (progress.best is None or sign * value < sign * progress.best):
        progress.best, progress.best_step, progress.bad_validations = value, progress.step, 0
        return False
    progress.bad_validations += 1
    return run.out_of_patience


def _metrics(run: Run) -> dict[str, float]:
    """Return the metrics of scores on rank 0, nothing on others; collective."""
    tasks, most = max(256, run.config.loader.tasks_per_batch), run.config.loader.max_support_rows
    scores = score_split(run.state.system, run.pack.split("valid"), tasks_per_batch=tasks, max_support_rows=most)
    return {} if scores is None else validation_metrics(scores, run.config.loss, run.pack.schema.labels)


def _next_item_metrics(run: Run) -> dict[str, float]:
    """Return the metrics of next items on rank 0, nothing on others; where tasks adapt, those before it too.
    Collective.
    """
    system, pack = run.state.system, run.pack
    draw = candidate_draw(run.config, pack.catalogue(), pack.schema)
    found: dict[str, float] = {}
    for when, steps in (("before", 0), ("after", None)):
        if when == "before" and next_item_learner(system).inner_loop is None:
            continue
        ranks = rank_split(
            system,
            pack.split("valid"),
            draw.catalogue,
            candidates_of(draw.catalogue, domain_of(pack.schema), sampled=False),
            max_support_rows=run.config.loader.max_support_rows,
            draw=draw,
            steps=steps,
        )
        if ranks is not None:
            places = Places(ranks.rank, ranks.rank)
            found |= {f"{name}_{when}": float(places.values(name).mean()) for name in _LOGGED}
    return found
