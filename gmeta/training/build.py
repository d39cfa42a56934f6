"""From a config to what a rank trains with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from gmeta.config.train import NEXT_ITEM_METRICS, ScheduleConfig, TrainConfig
from gmeta.core.batch import TaskBatch
from gmeta.core.errors import require
from gmeta.data.id_dropout import build_id_dropout
from gmeta.data.loader import MAX_CELLS, TaskLoader
from gmeta.data.pack import TaskPack, open_pack
from gmeta.data.replay import evicted_ids, replayed_texts, require_older
from gmeta.embedding.exchange import RowExchange
from gmeta.models.registry import ModelFactory
from gmeta.optim.dense import OuterReduce
from gmeta.optim.sharded import open_dense
from gmeta.optim.sparse import SparseOptimizer
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.build import WIRE, MakeExchange, build_system, candidate_draw
from gmeta.recommender.system import PreparedBatch, System
from gmeta.runs.log import RunLog
from gmeta.sharding.auto import AUTO
from gmeta.training.negotiation import Negotiation
from gmeta.training.run import Run
from gmeta.training.state import LearningRates, TrainState
from gmeta.training.statistics import Stopwatch


@dataclass(frozen=True)
class Parts:
    """Parts of a trainer that a study or a tuning replaces; the defaults are the product's."""

    exchange: MakeExchange = RowExchange
    outer_reduce: Callable[[Iterable[nn.Parameter], Mesh], OuterReduce] | None = None
    loader_arguments: Mapping[str, Any] = field(default_factory=dict)
    console: Console | None = None  # where the log speaks; None: standard error


def bytes_of_rows(loader: TaskLoader[PreparedBatch], system: System, wire: torch.dtype) -> float:
    """Return the bytes of table rows that this rank asks for in a batch, the mean of the first four; collective.

    `wire` is the type of rows on their way. The loader is at its beginning afterwards.
    """
    batches = min(4, loader.batches_per_epoch)
    routes = [route for _ in range(batches) for route in next(loader).routed.routes.items()]
    loader.load_state_dict({"epoch": 0, "index": 0})
    values = sum(route.num_rows * system.tables.fused[name].dim for name, route in routes)
    return values * wire.itemsize / max(1, batches)


def _preparing(
    config: TrainConfig, pack: TaskPack, system: System, *, replays: bool
) -> Callable[[TaskBatch], PreparedBatch]:
    """Return what the loader's thread does with a batch: mask ids, where the run does, draw what next items are
    compared with, and prepare it.
    """
    share = config.embedding.id_dropout or 0.0  # unset only where no run directory was opened
    masks = build_id_dropout(pack, share, features=system.objective.features, seed=config.seed)
    for name in system.generated:
        if masks is not None and name not in masks.tables:
            raise ValueError(
                f"embedding.generator names {name!r}, which is hashed and has no unknown ids: leave it out"
            )
    changes: list[Callable[[TaskBatch], TaskBatch] | None] = [evicted_ids(pack) if replays else None, masks]
    if pack.schema.next_item:
        changes.append(candidate_draw(config, pack.catalogue(), pack.schema, pack.split("train")))
    made = [change for change in changes if change is not None]
    return lambda batch: system.prepare(reduce(lambda given, change: change(given), made, batch))


def _require_metric(schedule: ScheduleConfig) -> None:
    """Raise ValueError for a metric that next items do not have; without patience the default says nothing."""
    fits = schedule.metric in NEXT_ITEM_METRICS or (schedule.metric == "loss" and not schedule.patience)
    known = ", ".join(NEXT_ITEM_METRICS)
    require(fits, "schedule.metric", schedule.metric, f"of next items must be one of {known}")


def _loss_scale(config: TrainConfig) -> float:
    """Return what makes the loss of labels in units of `model.args.label_scale` of the loss of labels as they are.

    Adam's eps and a clipped norm are absolute: gradients of labels of a thousandth would be lost in the first, and
    those of thousands cut by the second.
    """
    unit = float(config.model.args.get("label_scale", 1.0))
    return unit**-2 if config.loss == "mse" else 1 / unit if config.loss in ("l1", "huber") else 1.0


def _open_loader(
    config: TrainConfig, pack: TaskPack, older: TaskPack | None, system: System, others: Mapping[str, Any]
) -> TaskLoader[PreparedBatch]:
    """Return the loader of the training tasks, with tasks of an older pack where they are replayed."""
    arguments: dict[str, Any] = {
        "tasks_per_batch": config.loader.tasks_per_batch,
        "seed": config.seed,
        "rank": system.mesh.rank,
        "world_size": system.mesh.world_size,
        "window_batches": config.loader.window_batches,
        "prefetch": config.loader.prefetch,
        "resample": config.loader.resample,
        "max_support_rows": config.loader.max_support_rows,
        "episode_rows": config.loader.episode_rows,
        "by_scenario": config.meta.negotiation > 0,
        "replay": None if older is None else (older.split("train"), config.replay.share),
        "max_cells": MAX_CELLS,
        "transform": _preparing(config, pack, system, replays=older is not None),
    }
    return TaskLoader(pack.split("train"), **{**arguments, **others})


def _negotiation(config: TrainConfig, system: System, rates: LearningRates) -> Negotiation | None:
    """Return the rounds over scenarios of a run that negotiates. ValueError for settings that do not go with them."""
    share = config.meta.negotiation
    if not share:
        return None
    rule = "meta.negotiation keeps a copy of every layer on every rank; set it to 0, or use NNN"
    require(config.dense.sharding == "NNN", "dense.sharding", config.dense.sharding, rule)
    rule = "within a round of meta.negotiation weights are on their way; leave it out: an epoch ends with a round"
    require(not config.schedule.eval_every, "schedule.eval_every", config.schedule.eval_every, rule)
    return Negotiation(
        system,
        share,
        window_batches=config.loader.window_batches,
        batches_per_epoch=rates.batches_per_epoch,
        total_steps=rates.total_steps,
    )


def build_run(
    config: TrainConfig,
    mesh: Mesh,
    stop: threading.Event,
    *,
    factory: ModelFactory | None = None,
    parts: Parts | None = None,
) -> Run:
    """Build everything that a rank needs. Raises ValueError for what does not fit, before anything is written."""
    parts = parts or Parts()
    pack, older = open_pack(config.pack), open_pack(config.replay.pack) if config.replay.pack else None
    if older is not None:
        require_older(pack, older)
    if pack.schema.next_item:
        _require_metric(config.schedule)
    texts = pack.text_tables() if older is None else replayed_texts(pack, older)
    system = build_system(config, pack.schema, mesh, factory=factory, exchange=parts.exchange, text_tables=texts)
    loader = _open_loader(config, pack, older, system, parts.loader_arguments)
    total = config.schedule.epochs * loader.batches_per_epoch
    total = min(total, config.schedule.max_steps or total)
    planned = config.dense.sharding == AUTO and mesh.world_size > 1
    row_bytes = bytes_of_rows(loader, system, WIRE[config.comm.wire] or system.dtype) if planned else 0.0
    dense = open_dense(
        system.objective,
        mesh,
        lr=config.dense.lr,
        inner_lr_lr=config.dense.inner_lr_lr,
        weight_decay=config.dense.weight_decay,
        sharding=config.dense.sharding,
        node_size=config.dense.node_size,
        memory_bytes=None if config.dense.memory_gb is None else 1e9 * config.dense.memory_gb,
        alltoall_bytes=row_bytes,
        outer_reduce=parts.outer_reduce,
    )
    rates = LearningRates(
        config.dense.lr, config.dense.warmup_steps, config.dense.decay, total, loader.batches_per_epoch
    )
    state = TrainState(
        system=system,
        dense=dense,
        sparse=SparseOptimizer(
            config.embedding.optimizer, lr=config.embedding.lr, weight_decay=config.embedding.weight_decay
        ),
        rates=rates,
        loss_scale=_loss_scale(config),
        clip_norm=config.dense.clip_norm,
        run_dir=Path(config.run_dir),
        stop=stop,
        ok=torch.ones((), dtype=torch.bool, device=mesh.device),
        read_late=mesh.device.type == "cuda",
        negotiation=_negotiation(config, system, rates),
    )
    log = RunLog(Path(config.run_dir), rank=mesh.rank, total_steps=total, console=parts.console)
    return Run(config, state, loader, pack, older, log, Stopwatch(mesh.device))
