"""`gmeta evaluate`: before and after adaptation, beside the same model trained plainly and network-free baselines."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gmeta.config.evaluation import EvaluateConfig
from gmeta.config.train import TrainConfig
from gmeta.core.files import replacing
from gmeta.data.pack import TaskPack, open_pack
from gmeta.data.schema import OOV
from gmeta.data.shards import PackSplit
from gmeta.data.synthetic import Rows, reference_scores
from gmeta.evaluation.baselines import BaselineRows, baseline_scores
from gmeta.evaluation.score import Floats, Scores, score, to_predictions, validation_metrics
from gmeta.evaluation.slices import evaluation_records, print_headline, write_evaluation
from gmeta.meta.learner import MetaLearner
from gmeta.parallel.collectives import broadcast_from_rank_0
from gmeta.parallel.mesh import Mesh, close_mesh, open_mesh
from gmeta.recommender.system import System, build_learner, load_system
from gmeta.runs.directory import read_config

FINETUNE_STEPS = (1, 3, 10)
FINETUNE_LR = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""The grid on which fine-tuning of the plainly trained model is tuned, on the valid split."""


def evaluate(config: EvaluateConfig) -> int:
    """Run `gmeta evaluate` on this rank; rank 0 prints a table and writes evaluation.json and predictions.parquet."""
    mesh = open_mesh(config.device, config.timeout_s)
    try:
        _evaluate(config, mesh)
    finally:
        close_mesh(mesh)
    return 0


def _evaluate(config: EvaluateConfig, mesh: Mesh) -> None:
    run_dir = Path(config.run_dir)
    pack = open_pack(config.pack or read_config(run_dir).pack)
    split = pack.split(config.split)
    system, trained = load_system(run_dir, config.checkpoint, mesh, pack_schema=pack.schema)
    scores = score(system, split, tasks_per_batch=config.tasks_per_batch, steps=config.steps, inner_lr=config.inner_lr)
    variants: dict[str, Floats] = {}
    if scores is not None:
        variants = {"before": scores.before, "after": scores.after}
        if not trained.meta.adapt:
            variants.pop("after")
    notes: dict[str, Any] = {"checkpoint": config.checkpoint, "split": config.split, "pack": str(pack.path)}
    if config.plain_run is not None:
        variants |= _plain_variants(config, trained, pack, mesh, notes)
    if scores is None:
        return
    predictions = {name: to_predictions(logits, trained.loss) for name, logits in variants.items()}
    if config.baselines:
        predictions |= network_free(pack, split, config.seed)
    if config.truth is not None:
        predictions |= truth_scores(pack, split, Path(config.truth))
    _write(config, trained, pack, scores, predictions, notes)


def _plain_variants(
    config: EvaluateConfig, trained: TrainConfig, pack: TaskPack, mesh: Mesh, notes: dict[str, Any]
) -> dict[str, Floats]:
    """Logits of the plainly trained model, and of the same fine-tuned on the support as the run adapts."""
    assert config.plain_run is not None
    plain, plain_config = load_system(Path(config.plain_run), config.checkpoint, mesh, pack_schema=pack.schema)
    if plain_config.meta.adapt:
        raise ValueError(f"plain_run {config.plain_run} was trained with meta.adapt {plain_config.meta.adapt}: need []")
    tuned = replace(trained.meta, learn_inner_lr=False, order="first", recompute=False, modulation="none")
    learner = build_learner(plain.learner.model, plain_config, tuned, plain.features, len(pack.schema.numeric)).to(
        mesh.device, plain.dtype
    )
    steps, rate = _tune(config, plain, learner, plain_config, pack, mesh)
    notes["plain-finetuned"] = {"adapt": tuned.adapt, "steps": steps, "inner_lr": rate}
    scores = score(
        plain,
        pack.split(config.split),
        tasks_per_batch=config.tasks_per_batch,
        learner=learner,
        steps=steps,
        inner_lr=rate,
    )
    return {} if scores is None else {"plain": scores.before, "plain-finetuned": scores.after}


def _tune(
    config: EvaluateConfig, plain: System, learner: MetaLearner, trained: TrainConfig, pack: TaskPack, mesh: Mesh
) -> tuple[int, float]:
    """Inner steps and rate that minimise the loss on the valid split; collective."""
    if "valid" not in pack.splits:
        raise ValueError(f"plain-finetuned is tuned on the valid split, and {pack.path} has none: prepare with one")
    best = (float("inf"), FINETUNE_STEPS[0], 0.0)
    for steps, rate in product(FINETUNE_STEPS, FINETUNE_LR):
        scores = score(
            plain,
            pack.split("valid"),
            tasks_per_batch=config.tasks_per_batch,
            learner=learner,
            steps=steps,
            inner_lr=rate,
        )
        loss = float("nan") if scores is None else validation_metrics(scores, trained.loss)["loss_after"]
        best = min(best, (broadcast_from_rank_0(loss, mesh), steps, rate))
    return best[1], best[2]


def network_free(pack: TaskPack, split: PackSplit, seed: int) -> dict[str, Floats]:
    """Predictions of the baselines for the split's query rows, fitted on the train split."""
    item = pack.schema.item
    features = (item,) if item is not None and any(f.name == item for f in pack.schema.features) else ()
    sides = []
    for part in (pack.split("train"), split):
        columns = part.columns(features)
        ids = columns.ids[item] if features and item is not None else None
        sides.append(BaselineRows(task=columns.task, item=ids, label=columns.label, is_query=columns.is_query))
    return baseline_scores(sides[0], sides[1], seed=seed)


def truth_scores(pack: TaskPack, split: PackSplit, log: Path) -> dict[str, Floats]:
    """What the prior, the posterior and the oracle of a synthetic log score on the split's query rows.

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
    support, asked = (Rows(user[part], item[part], label[part]) for part in (~query, query))
    return reference_scores(log, support, asked)


def _task_keys(pack: TaskPack) -> dict[int, str]:
    tasks = pq.read_table(pack.tasks_file())
    return dict(zip(tasks["task_id"].to_pylist(), tasks["key"].to_pylist(), strict=True))


def _write(
    config: EvaluateConfig,
    trained: TrainConfig,
    pack: TaskPack,
    scores: Scores,
    predictions: dict[str, Floats],
    notes: dict[str, Any],
) -> None:
    run_dir, split = Path(config.run_dir), pack.split(config.split)
    evaluation = evaluation_records(
        predictions,
        label=scores.label,
        task=scores.task,
        support_size=np.asarray(split.num_support)[scores.task],
        item_cold=split.columns(()).item_cold[scores.row],
        task_cold=_cold_tasks(pack, split)[scores.task],
        binary=trained.loss == "bce",
        resamples=config.resamples,
        seed=config.seed,
    )
    write_evaluation(run_dir / "evaluation.json", evaluation, notes)
    table = {"task_id": split.task_id[scores.task], "row": scores.row, "label": scores.label, **predictions}
    with replacing(run_dir / "predictions.parquet") as partial:
        pq.write_table(pa.table({name: pa.array(values) for name, values in table.items()}), partial)
    print_headline(evaluation)


def _cold_tasks(pack: TaskPack, split: PackSplit) -> NDArray[np.bool_]:
    """Whether each task's key names no training task, [num_tasks]: a partition may repeat a user."""
    keys = _task_keys(pack)
    in_train = {keys[task] for task in pack.split("train").task_id.tolist()}
    return np.array([keys[task] not in in_train for task in split.task_id.tolist()])
