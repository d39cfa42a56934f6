"""`gmeta evaluate`: measure a run before and after adaptation, beside a plain twin and baselines without a network."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gmeta.config.evaluation import EvaluateConfig, FactorConfig
from gmeta.config.train import LossName, MetaConfig, TrainConfig
from gmeta.core.files import replacing
from gmeta.data.coverage import unknown_columns, unknown_warning
from gmeta.data.pack import TaskPack, open_pack
from gmeta.data.schema import OOV
from gmeta.data.shards import PackSplit
from gmeta.data.synthetic import LogRows, reference_scores
from gmeta.evaluation.baseline_settings import BaselineSettings, read_baseline_settings
from gmeta.evaluation.baselines import BaselineRows, baseline_scores
from gmeta.evaluation.score import Floats, Scores, score_split, task_mean_loss, to_predictions
from gmeta.evaluation.slices import evaluation_records, print_headline, write_evaluation
from gmeta.meta.learner import MetaLearner
from gmeta.parallel.collectives import broadcast_from_rank_0
from gmeta.parallel.mesh import Mesh, close_mesh, open_mesh
from gmeta.recommender.build import build_learner, load_system
from gmeta.recommender.system import System
from gmeta.runs.data import is_own_pack, require_fitting_pack, require_same_training_data
from gmeta.runs.directory import read_config

FINETUNE_STEPS = (1, 3, 10)
FINETUNE_LR = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""The grid on which fine-tuning of the plainly trained model is tuned, on the valid split."""


@dataclass(frozen=True)
class Variants:
    """What was scored: one entry a query row, by name of the variant."""

    predictions: dict[str, Floats]  # [N], probabilities under bce, values otherwise
    logits: dict[str, Floats]  # [N], of the variants that a network scored

    @staticmethod
    def of(logits: dict[str, Floats], loss: LossName) -> Variants:
        """Make the variants that a network trained with `loss` scored."""
        return Variants({name: to_predictions(values, loss) for name, values in logits.items()}, logits)


def evaluate(config: EvaluateConfig) -> int:
    """Run `gmeta evaluate` on this rank; rank 0 prints a table and writes the evaluation and the predictions.

    Those of the run's own pack are `evaluation.json` and `predictions.parquet`. Those of another pack get its name too.

    Raises:
        ValueError: the pack was not encoded as the run's own, or `plain_run` was trained on other data; both with what
            differs.
    """
    mesh = open_mesh(config.device, config.timeout_s)
    try:
        _evaluate(config, mesh)
    finally:
        close_mesh(mesh)
    return 0


def _evaluate(config: EvaluateConfig, mesh: Mesh) -> None:
    run_dir = Path(config.run_dir)
    pack = open_pack(config.pack or read_config(run_dir).pack)
    require_fitting_pack(run_dir, pack)
    split = pack.split(config.split)
    if config.plain_run is not None:
        require_same_training_data(run_dir, Path(config.plain_run))
    settings = BaselineSettings()
    if config.baseline_settings is not None:
        settings = read_baseline_settings(Path(config.baseline_settings), run_dir, config.plain_run)
    if mesh.rank == 0:
        _warn_of_unknown_columns(pack, split)
    system, trained, step = load_system(run_dir, config.checkpoint, mesh, trust_model=config.trust_model)
    scores = score_split(
        system,
        split,
        tasks_per_batch=config.tasks_per_batch,
        max_support_rows=trained.loader.max_support_rows,
        steps=config.steps,
        inner_lr=config.inner_lr,
    )
    notes: dict[str, Any] = {
        "checkpoint": config.checkpoint,
        "step": step,
        "split": config.split,
        "pack": str(pack.path),
    }
    plain = None if config.plain_run is None else _plain_variants(config, trained, pack, mesh, notes, settings)
    if scores is None:
        return
    logits = {"before": scores.before, "after": scores.after}
    if not trained.meta.adapt:
        logits.pop("after")
    found = Variants.of(logits, trained.loss)
    if plain is not None:
        found = Variants(found.predictions | plain.predictions, found.logits | plain.logits)
    if config.baselines:
        found = replace(found, predictions=found.predictions | network_free(pack, split, config.seed, settings.factors))
        if settings.factors is not None:
            notes["factor-analysis"] = asdict(settings.factors)
    if config.truth is not None:
        found = replace(found, predictions=found.predictions | truth_scores(pack, split, Path(config.truth)))
    _write(config, trained, pack, scores, found, notes)


def _warn_of_unknown_columns(pack: TaskPack, split: PackSplit) -> None:
    fractions: dict[str, float] = {}
    for feature in pack.schema.features:  # one at a time: a copy of all columns may not fit in memory
        fractions |= unknown_columns({feature.name: split.feature_ids(feature.name)}, pack.schema.task)
    if (warning := unknown_warning(fractions, f"{pack.path}, split {split.name},")) is not None:
        print(f"evaluate: {warning}", file=sys.stderr)


def _plain_variants(
    config: EvaluateConfig,
    trained: TrainConfig,
    pack: TaskPack,
    mesh: Mesh,
    notes: dict[str, Any],
    settings: BaselineSettings,
) -> Variants | None:
    """Score by the plainly trained model, and by the same fine-tuned on the support; collective.

    It adapts what `settings` name, or as the run does; steps and rate are then tuned here.

    Returns None on other ranks than 0.
    """
    assert config.plain_run is not None
    plain, plain_config, step = load_system(
        Path(config.plain_run), config.checkpoint, mesh, trust_model=config.trust_model
    )
    notes["plain_step"] = step
    if plain_config.meta.adapt:
        raise ValueError(f"plain_run {config.plain_run} was trained with meta.adapt {plain_config.meta.adapt}: need []")
    given, meta, most = settings.finetuned, trained.meta, trained.loader.max_support_rows
    if given is not None:
        meta = replace(meta, adapt=given.adapt, inner_prior=given.inner_prior)
    learner = finetuning_learner(plain, plain_config, meta)
    if given is None:
        steps, rate = _tune(config, plain, learner, plain_config, pack, mesh, most)
    else:
        steps, rate = given.steps, given.inner_lr
    notes["plain-finetuned"] = {"adapt": meta.adapt, "steps": steps, "inner_lr": rate, "inner_prior": meta.inner_prior}
    scores = score_split(
        plain,
        pack.split(config.split),
        tasks_per_batch=config.tasks_per_batch,
        max_support_rows=most,
        learner=learner,
        steps=steps,
        inner_lr=rate,
    )
    if scores is None:
        return None
    logits = {"plain": scores.before, "plain-finetuned": scores.after}
    if not np.isfinite(scores.after).all():  # a rate may be right for the valid split, and too large for a task of this
        logits.pop("plain-finetuned")
        notes["plain-finetuned"]["left_out"] = "it diverges on a task of this split"
        print("evaluate: plain-finetuned is left out: it diverges on a task of this split", file=sys.stderr)
    return Variants.of(logits, plain_config.loss)


def finetuning_learner(plain: System, trained: TrainConfig, meta: MetaConfig) -> MetaLearner:
    """Return a learner that fine-tunes a plainly trained model, what `meta` adapts, with its prior and inner loss.

    Raises ValueError where the model has no such part.
    """
    meta = replace(meta, learn_inner_lr=False, order="first", recompute=False, modulation="none")
    learner = build_learner(plain.learner.model, trained, meta, plain.learner.features, plain.num_numeric)
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
            loss = task_mean_loss(scores.after, scores.label, scores.task, trained.loss)
        loss = broadcast_from_rank_0(loss, mesh)
        if math.isfinite(loss):  # large rates diverge
            best = min(best, (loss, steps, rate))
    return best[1], best[2]


def network_free(pack: TaskPack, split: PackSplit, seed: int, factors: FactorConfig | None = None) -> dict[str, Floats]:
    """Predict the split's query rows by the baselines, fitted on the train split; `factors` as `baseline_scores`."""
    return baseline_scores(*baseline_rows(pack, split), seed=seed, factors=factors)


def baseline_rows(pack: TaskPack, split: PackSplit) -> tuple[BaselineRows, BaselineRows]:
    """Return the rows that baselines are fitted on, and those of the split; without items where these are no ids."""
    item = pack.schema.item
    features = (item,) if item is not None and any(f.name == item for f in pack.schema.features) else ()
    sides = []
    for part in (pack.split("train"), split):
        columns = part.columns(features)
        ids = columns.ids[item] if features and item is not None else None
        sides.append(BaselineRows(task=columns.task, item=ids, label=columns.label, is_query=columns.is_query))
    return sides[0], sides[1]


def truth_scores(pack: TaskPack, split: PackSplit, log: Path) -> dict[str, Floats]:
    """Score the split's query rows by the prior, the posterior and the oracle of a synthetic log.

    Raises ValueError where the pack's rows are not of that log, or its vocabulary left items out.
    """
    columns = split.columns(("item_id",))
    values = pq.read_table(pack.vocab_file("item_id")).sort_by("id")["value"].to_numpy().astype(np.int64)
    if (columns.ids["item_id"] == OOV).any():
        raise ValueError(f"{pack.path} has items out of vocabulary: the truth of those rows cannot be looked up")
    item = values[columns.ids["item_id"] - 1]
    keys = _task_keys(pack)
    user = np.array([int(keys[task]) for task in split.task_id.tolist()])[columns.task]
    label = columns.label.astype(np.int64)
    query = columns.is_query
    support, asked = (LogRows(user[part], item[part], label[part]) for part in (~query, query))
    return reference_scores(log, support, asked)


def _task_keys(pack: TaskPack) -> dict[int, str]:
    """Return the raw key of every task of the pack, by task id."""
    tasks = pq.read_table(pack.tasks_file(), columns=["task_id", "key"])
    return dict(zip(tasks["task_id"].to_pylist(), tasks["key"].to_pylist(), strict=True))


def _write(
    config: EvaluateConfig,
    trained: TrainConfig,
    pack: TaskPack,
    scores: Scores,
    found: Variants,
    notes: dict[str, Any],
) -> None:
    run_dir, split, keys = Path(config.run_dir), pack.split(config.split), _task_keys(pack)
    evaluation = evaluation_records(
        found.predictions,
        label=scores.label,
        task=scores.task,
        support_size=_support_used(split, trained)[scores.task],
        item_cold=split.columns(()).item_cold[scores.row],
        task_cold=_cold_tasks(keys, pack, split)[scores.task],
        binary=trained.loss == "bce",
        resamples=config.resamples,
        seed=config.seed,
        logits=found.logits,
    )
    own = is_own_pack(run_dir, pack)
    # Packs of one name in two folders must not replace each other's evaluation, so the manifest's checksum is added.
    name = "" if own else f"-{pack.path.resolve().name}-{pack.manifest['xxh3'][:8]}"
    write_evaluation(run_dir / f"evaluation{name}.json", evaluation, notes)
    with replacing(run_dir / f"predictions{name}.parquet") as partial:
        columns = pa.table(_prediction_columns(keys, pack, split, scores, found))
        pq.write_table(columns.replace_schema_metadata({"step": str(notes["step"])}), partial)
    print_headline(evaluation)
    if not own:
        print(f"{pack.path} is not the run's own pack: written to {run_dir / f'evaluation{name}.json'}")


def _prediction_columns(
    keys: Mapping[int, str], pack: TaskPack, split: PackSplit, scores: Scores, found: Variants
) -> dict[str, pa.Array]:
    """Make the columns of predictions.parquet, with one entry a query row.

    `task` is the raw key of the row's task, `item` the raw value of its item (null where the vocabulary does not know
    it; no column where the items have no vocabulary).
    """
    task_id = split.task_id[scores.task]
    columns = {"task_id": pa.array(task_id), "task": pa.array([keys[task] for task in task_id.tolist()])}
    if (values := _item_values(pack)) is not None:
        ids = split.columns((str(pack.schema.item),)).ids[str(pack.schema.item)][scores.row]
        columns["item"] = values.take(pa.array(ids))
    columns |= {"row": pa.array(scores.row), "label": pa.array(scores.label)}
    return columns | {name: pa.array(values) for name, values in found.predictions.items()}


def _item_values(pack: TaskPack) -> pa.Array | None:
    """Return the raw value of each item id, null for id 0; None where the items are no feature with a vocabulary."""
    features = [f for f in pack.schema.features if f.name == pack.schema.item and f.kind == "categorical"]
    if not features or features[0].table not in pack.manifest["vocab"]:
        return None
    values = pq.read_table(pack.vocab_file(features[0].table), columns=["value"])["value"].combine_chunks()
    return pa.concat_arrays([pa.nulls(1, values.type), values])


def _support_used(split: PackSplit, trained: TrainConfig) -> NDArray[np.int64]:
    """Return the support rows that each task adapts to, [num_tasks]."""
    most = trained.loader.max_support_rows
    return np.minimum(split.num_support, most) if most else np.asarray(split.num_support)


def _cold_tasks(keys: Mapping[int, str], pack: TaskPack, split: PackSplit) -> NDArray[np.bool_]:
    """Say of each task whether its key names no training task, [num_tasks]: a partition may repeat a user."""
    in_train = {keys[task] for task in pack.split("train").task_id.tolist()}
    return np.array([keys[task] not in in_train for task in split.task_id.tolist()])
