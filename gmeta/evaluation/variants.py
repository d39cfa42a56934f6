"""Who predicts in an evaluation: networks, and baselines and bounds without one. Each may see less of the support."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gmeta.config.evaluation import EvaluateConfig, FactorConfig, FinetuneConfig
from gmeta.config.train import MetaConfig, TrainConfig
from gmeta.data.pack import TaskPack
from gmeta.data.schema import OOV
from gmeta.data.shards import PackSplit
from gmeta.data.synthetic import LogRows, is_stream, reference_scores
from gmeta.evaluation.baselines import BaselineRows, Baselines, fit_baselines, last_support
from gmeta.evaluation.predictions import Variants, task_keys
from gmeta.evaluation.score import Floats, Scores, mean_loss, score_split
from gmeta.meta.learner import MetaLearner
from gmeta.parallel.collectives import broadcast_from_rank_0
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.build import build_learner, load_system
from gmeta.recommender.system import System

FINETUNE_STEPS = (1, 3, 10)
FINETUNE_LR = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""The grid on which fine-tuning of the plainly trained model is tuned, on the valid split."""


@dataclass(frozen=True)
class Network:
    """A trained model, and how it adapts to the tasks of the measured split."""

    before: str  # name of the variant before adaptation
    after: str | None  # and after it; None where the model adapts nothing
    system: System
    loss: str
    learner: MetaLearner | None = None  # in place of the system's own
    steps: int | None = None
    inner_lr: float | None = None

    def score(self, split: PackSplit, tasks_per_batch: int, max_support_rows: int) -> Scores | None:
        """Score the split's query rows; collective, as `score_split`. At most `max_support_rows` are seen, 0: all."""
        return score_split(
            self.system,
            split,
            tasks_per_batch=tasks_per_batch,
            max_support_rows=max_support_rows,
            learner=self.learner,
            steps=self.steps,
            inner_lr=self.inner_lr,
        )

    def variants(self, before: Floats, after: Floats) -> Variants:
        """Name the logits [N] before and after adaptation."""
        logits = {self.before: before} if self.after is None else {self.before: before, self.after: after}
        return Variants.of(logits, self.loss)


def plain_network(
    config: EvaluateConfig, trained: TrainConfig, pack: TaskPack, mesh: Mesh, given: FinetuneConfig | None
) -> tuple[Network, dict[str, Any]]:
    """Load the plainly trained model, fine-tuned on the support; collective.

    It adapts what `given` names, or as the run does; steps and rate are then tuned here. Returns it with what
    evaluation.json tells of it.
    """
    assert config.plain_run is not None
    plain, plain_config, step = load_system(
        Path(config.plain_run),
        config.checkpoint,
        mesh,
        trust_model=config.trust_model,
        text_tables=pack.text_tables(),
    )
    if plain_config.meta.adapt:
        raise ValueError(f"plain_run {config.plain_run} was trained with meta.adapt {plain_config.meta.adapt}: need []")
    meta = trained.meta
    if given is not None:
        meta = replace(meta, adapt=given.adapt, inner_prior=given.inner_prior)
    learner = finetuning_learner(plain, plain_config, meta)
    if given is None:
        steps, rate = _tune(config, plain, learner, plain_config, pack, mesh, trained.loader.max_support_rows)
    else:
        steps, rate = given.steps, given.inner_lr
    told = {"adapt": meta.adapt, "steps": steps, "inner_lr": rate, "inner_prior": meta.inner_prior}
    network = Network("plain", "plain-finetuned", plain, plain_config.loss, learner, steps, rate)
    return network, {"plain_step": step, "plain-finetuned": told}


def finetuning_learner(plain: System, trained: TrainConfig, meta: MetaConfig) -> MetaLearner:
    """Return a learner that fine-tunes a plainly trained model, what `meta` adapts, with its prior and inner loss.

    Raises ValueError where the model has no such part.
    """
    meta = replace(meta, learn_inner_lr=False, order="first", recompute=False, modulation="none")
    own = plain.learner
    read = (own.features, plain.num_numeric, own.sequences, own.vectors, own.labels, own.texts, own.routes)
    learner = build_learner(own.model, trained, meta, *read)
    return learner.to(plain.mesh.device, plain.dtype)


def _tune(
    config: EvaluateConfig,
    plain: System,
    learner: MetaLearner,
    trained: TrainConfig,
    pack: TaskPack,
    mesh: Mesh,
    max_support_rows: int,
) -> tuple[int, float]:
    """Find the inner steps and the rate that minimise the loss on the valid split; collective.

    The rate is 0 where fine-tuning diverges with all of them.
    """
    if "valid" not in pack.splits:
        raise ValueError(f"plain-finetuned is tuned on the valid split, and {pack.path} has none: prepare with one")
    best = (float("inf"), FINETUNE_STEPS[0], 0.0)
    for steps, rate in product(FINETUNE_STEPS, FINETUNE_LR):
        scores = score_split(
            plain,
            pack.split("valid"),
            tasks_per_batch=config.tasks_per_batch,
            max_support_rows=max_support_rows,
            learner=learner,
            steps=steps,
            inner_lr=rate,
        )
        loss = math.nan
        if scores is not None:
            loss = mean_loss(scores, scores.after, trained.loss, pack.schema.labels)
        loss = broadcast_from_rank_0(loss, mesh)
        if math.isfinite(loss):  # large rates diverge
            best = min(best, (loss, steps, rate))
    return best[1], best[2]


@dataclass(frozen=True)
class NetworkFree:
    """Baselines fitted on the train split, and bounds of a synthetic log, which score one split's query rows."""

    baselines: Baselines | None
    rows: BaselineRows | None
    pack: TaskPack
    split: PackSplit
    truth: Path | None

    @staticmethod
    def build(
        config: EvaluateConfig, pack: TaskPack, split: PackSplit, factors: FactorConfig | None = None, label: int = 0
    ) -> NetworkFree:
        """Fit the baselines that `config` asks for, once, of one of several labels; `factors` are the settings of the
        factor analysis.
        """
        truth = None if config.truth is None else Path(config.truth)
        if not config.baselines:
            return NetworkFree(None, None, pack, split, truth)
        fitted = fit_baselines(training_rows(pack, label), seed=config.seed, factors=factors)
        return NetworkFree(fitted, baseline_rows(pack, split, label), pack, split, truth)

    def variants(self, max_support_rows: int | None = None) -> Variants:
        """Predict with the last so many support rows of each task; None: all."""
        found = Variants({}, {})
        if self.baselines is not None and self.rows is not None:
            rows = self.rows if max_support_rows is None else self.rows.last_support(max_support_rows)
            scores = self.baselines.score(rows)
            found = Variants(self.baselines.clip(scores), scores)
        if self.truth is not None:
            found = found.joined(Variants(truth_scores(self.pack, self.split, self.truth, max_support_rows), {}))
        return found


def training_rows(pack: TaskPack, label: int = 0) -> BaselineRows:
    """Return what baselines are fitted on: the training rows that have the label."""
    rows = baseline_rows(pack, pack.split("train"), label)
    return rows.where(~np.isnan(rows.label))


def baseline_rows(pack: TaskPack, split: PackSplit, label: int = 0) -> BaselineRows:
    """Return what baselines see of a split; without items where these are no ids. Support rows without the label, one
    of several, are left out.
    """
    item = pack.schema.item
    features = (item,) if item is not None and any(f.name == item for f in pack.schema.features) else ()
    columns = split.columns(features, label)
    ids = columns.ids[item] if features and item is not None else None
    rows = BaselineRows(columns.task, columns.label, columns.is_query, ids, columns.weight)
    return rows.where(columns.is_query | ~np.isnan(columns.label)) if pack.schema.labels else rows


def truth_scores(pack: TaskPack, split: PackSplit, log: Path, max_support_rows: int | None = None) -> dict[str, Floats]:
    """Score the split's query rows by the prior, the posterior and the oracle of a synthetic log.

    The posterior sees the last so many support rows of each task; None: all.

    Raises ValueError where the pack's rows are not of that log, or its vocabulary left items out; where the log is a
    stream of days, these may be left out, but the pack needs its time.
    """
    columns = split.columns()
    user = np.array([int(key) for key in task_keys(pack, split.task_id).to_pylist()])[columns.task]
    label = columns.label.astype(np.int64)
    query = columns.is_query
    seen: NDArray[np.bool_] = ~query
    if max_support_rows is not None:
        seen &= last_support(columns.task, query, max_support_rows)
    # A stream's items change from day to day, and a pack may know no id of them: time tells which row it was.
    by_time = is_stream(log)
    item = np.full(len(label), -1) if by_time else _item_numbers(pack, split)
    time = split.times() if by_time else None
    if by_time and time is None:
        raise ValueError(f"{pack.path} keeps no time, by which a stream's truth is looked up: its schema must name it")
    support, asked = (
        LogRows(user[part], item[part], label[part], None if time is None else time[part]) for part in (seen, query)
    )
    return reference_scores(log, support, asked)


def _item_numbers(pack: TaskPack, split: PackSplit) -> NDArray[np.int64]:
    """Return the raw item of every row [R] of a synthetic log."""
    ids = split.feature_ids("item_id")
    values = pq.read_table(pack.vocab_file("item_id")).sort_by("id")["value"].to_numpy().astype(np.int64)
    if (ids == OOV).any():
        raise ValueError(f"{pack.path} has items out of vocabulary: the truth of those rows cannot be looked up")
    item: NDArray[np.int64] = values[ids - 1]
    return item
