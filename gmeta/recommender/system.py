"""Builds what a config describes: model, learner and tables, on this rank. Shared by train, evaluate and predict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gmeta.config.train import MetaConfig, ModelConfig, TrainConfig
from gmeta.core.batch import EmbeddedRows, Lookup, TaskBatch, lookup_of, tasks_of, to_device
from gmeta.data.schema import PackSchema
from gmeta.embedding.exchange import Exchange, RoutedRequest, RowExchange
from gmeta.embedding.lookup import RowRequest
from gmeta.embedding.table import FusedTable, ShardedTables, TableSpec
from gmeta.meta.gather_plan import Plan
from gmeta.meta.learner import MetaLearner
from gmeta.meta.modulation import build_modulator
from gmeta.models.inputs import InputSpec, input_spec
from gmeta.models.registry import ModelFactory, build_model, features_of, find_model, resolved_args
from gmeta.parallel.mesh import Mesh
from gmeta.runs import checkpoint
from gmeta.runs.directory import read_config, read_schema

WIRE: dict[str, torch.dtype | None] = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of rows and row gradients on the way; None: as the tables hold them."""


@dataclass(frozen=True)
class Loaded:
    """A batch of which nothing was prepared."""

    batch: TaskBatch


@dataclass(frozen=True)
class MicroBatch:
    """Tasks that are computed together: all of a rank's batch, or a part of it."""

    batch: TaskBatch
    index: Plan  # which of the fetched rows each feature of each task reads
    lookups: tuple[dict[str, Lookup], dict[str, Lookup]] | None = None  # support, query; None: those of the whole batch

    def rows(self, fetched: EmbeddedRows) -> EmbeddedRows:
        """The batch's fetched rows, as these tasks look them up."""
        return fetched if self.lookups is None else EmbeddedRows(fetched.weights, *self.lookups)


@dataclass(frozen=True)
class Indexed:
    """A batch on this rank's device, and its index work: what needs no other rank."""

    batch: TaskBatch
    request: RowRequest  # which rows to fetch
    parts: tuple[MicroBatch, ...]


@dataclass(frozen=True)
class Prepared:
    """A batch whose ids were exchanged too: its step moves rows and gradients only."""

    batch: TaskBatch
    routed: RoutedRequest  # which rows to fetch, from whom, and what others fetch here
    parts: tuple[MicroBatch, ...]

    @property
    def index(self) -> Plan:
        """Of a batch that is computed as one."""
        (whole,) = self.parts
        return whole.index


Work = Loaded | Indexed | Prepared
"""What a loader hands out, by how much is done ahead of the step."""


@dataclass(frozen=True)
class System:
    """A model, its learner and its tables on this rank."""

    learner: MetaLearner
    tables: ShardedTables
    mesh: Mesh
    dtype: torch.dtype
    autocast: bool
    features: Mapping[str, int]  # embedded features that the model reads, name -> width
    exchange: Exchange

    def index(self, batch: TaskBatch, learner: MetaLearner | None = None) -> Indexed:
        """All index work of a batch, for its own learner or another; local, so the loader's thread does it."""
        request = self.exchange.request(batch.support, batch.query)
        learner = learner or self.learner
        device = self.mesh.device
        moved = to_device(batch, device, self.dtype)
        ends = (batch.num_tasks,) if batch.batch_split is None else batch.batch_split.ends(self.mesh.rank)
        if len(ends) == 1:
            index = learner.plan(request.support, request.query, request.num_rows, batch)
            return Indexed(moved, request, (MicroBatch(moved, to_device(index, device)),))
        parts, start = [], 0
        for stop in ends:
            support = {name: lookup_of(found, start, stop) for name, found in request.support.items()}
            query = {name: lookup_of(found, start, stop) for name, found in request.query.items()}
            index = learner.plan(support, query, request.num_rows, tasks_of(batch, start, stop))
            index, lookups = to_device((index, (support, query)), device)
            parts.append(MicroBatch(tasks_of(moved, start, stop), index, lookups))
            start = stop
        return Indexed(moved, request, tuple(parts))

    def prepare(self, batch: TaskBatch, learner: MetaLearner | None = None) -> Prepared:
        """Everything that can be done before the step: index work, then the exchange of ids, which is collective.

        The loader's thread does it: all ranks for the same batches in the same order, and one loader at a time.
        """
        return self.complete(self.index(batch, learner))

    def complete(self, work: Work) -> Prepared:
        """What was not done ahead; collective unless `work` is prepared."""
        if isinstance(work, Prepared):
            return work
        indexed = self.index(work.batch) if isinstance(work, Loaded) else work
        return Prepared(indexed.batch, self.exchange.exchange_ids(indexed.request), indexed.parts)

    def precision(self) -> AbstractContextManager[object]:
        """Autocast for forward passes, where configured."""
        if self.autocast:
            return torch.autocast(self.mesh.device.type, torch.bfloat16)
        return nullcontext()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of model, learned rates and tables, by name, for checkpoints."""
        dense = {f"dense.{name}": p.detach().view(p.shape or (1,)) for name, p in self.learner.named_parameters()}
        return {**dense, **self.table_tensors()}

    def table_tensors(self) -> dict[str, Tensor]:
        """This rank's rows of tables and of their optimizer's state, by name."""
        return {f"tables.{name}": t for name, t in self.tables.state_dict().items()}


def used_rows(prepared: Prepared, rows: EmbeddedRows, finished: int) -> dict[str, Tensor]:
    """Group -> bool [U], which fetched rows the first `finished` micro-batches read."""
    used = {
        g: w.new_full(w.shape[:1], finished == len(prepared.parts), dtype=torch.bool) for g, w in rows.weights.items()
    }
    for part in prepared.parts[:finished]:
        if part.lookups is None:  # the batch is one
            continue
        for side, lookups in zip((part.batch.support, part.batch.query), part.lookups, strict=True):
            for found in lookups.values():
                index = found.index if found.lengths is not None else found.index[side.mask]
                used[found.group][index] = True
    return used


def table_specs(schema: PackSchema, features: Mapping[str, int]) -> list[TableSpec]:
    """Return one table per vocabulary that the features (name -> width) read; those of one vocabulary share it."""
    specs: dict[str, TableSpec] = {}
    for name, dim in features.items():
        feature = schema.feature(name)
        pooling = None if feature.kind == "categorical" else feature.pooling
        spec = specs.setdefault(feature.table, TableSpec(feature.table, feature.num_ids, dim, {}))
        specs[feature.table] = replace(spec, features={**spec.features, name: pooling})
    return list(specs.values())


def inputs_of(config: ModelConfig, schema: PackSchema) -> InputSpec:
    """Return what the configured model reads of a pack."""
    return input_spec(schema, features=config.features, numeric=config.numeric, embedding_dim=config.embedding_dim)


def make_model(
    config: ModelConfig, schema: PackSchema, *, seed: int = 0, factory: ModelFactory | None = None
) -> nn.Module:
    """Return the configured model for a pack; errors as `find_model`, `resolved_args` and `build_model`."""
    factory = factory or find_model(config.name)
    args = resolved_args(factory, config.args, config.name)
    return build_model(factory, inputs_of(config, schema), args, name=config.name, seed=seed)


def resolve_model(config: TrainConfig, factory: ModelFactory | None = None) -> TrainConfig:
    """Return the config with the model's own defaults among `model.args`, so that a saved run tells all of them.

    Raises ValueError where the model does not exist or does not take the arguments.
    """
    factory = factory or find_model(config.model.name)
    args = resolved_args(factory, config.model.args, config.model.name)
    return replace(config, model=replace(config.model, args=args))


def build_system(
    config: TrainConfig,
    schema: PackSchema,
    mesh: Mesh,
    *,
    factory: ModelFactory | None = None,
    training: bool = True,
    exchange: Callable[[Mapping[str, FusedTable], Mesh, torch.dtype | None], Exchange] = RowExchange,
) -> System:
    """Build model, learner and tables with the config's seed; without `training`, no optimizer state.

    `factory` makes the model, where it is not the one that `model.name` names. `exchange` makes the way that rows
    travel.

    Raises ValueError when the loss does not fit the labels, or the model names what the pack does not have.
    """
    if config.loss == "bce" and not schema.binary_label:
        raise ValueError(
            f"loss is 'bce' but label {schema.label!r} has values other than 0 and 1: "
            "prepare with --label_threshold, or train with --loss mse, l1 or huber"
        )
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    if mesh.device.type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "tf32" if config.precision == "tf32" else "ieee"
    inputs = inputs_of(config.model, schema)
    model = make_model(config.model, schema, seed=config.seed, factory=factory).to(mesh.device, dtype)
    features = {name: inputs.features[name] for name in features_of(model, inputs)}
    learner = build_learner(model, config, config.meta, features, inputs.num_numeric).to(mesh.device, dtype)
    learner.choose_engine(features, len(schema.numeric))
    tables = ShardedTables(
        table_specs(schema, features),
        mesh=mesh,
        seed=config.seed,
        init_std=config.embedding.init_std,
        dtype=dtype,
        optimizer=config.embedding.optimizer if training else None,
    )
    return System(
        learner=learner,
        tables=tables,
        mesh=mesh,
        dtype=dtype,
        autocast=config.precision == "bf16",
        features=features,
        exchange=exchange(tables.fused, mesh, WIRE[config.comm.wire]),
    )


def build_learner(
    model: nn.Module, config: TrainConfig, meta: MetaConfig, features: Mapping[str, int], num_numeric: int
) -> MetaLearner:
    """Return the learner of a model, with the run's losses and the inner loop of `meta`.

    `features` are the embedded features that the model reads, name -> width, and `num_numeric` the numeric columns.
    """
    modulator = None
    if meta.modulation != "none":
        modulator = build_modulator(
            meta.modulation,
            model,
            dims=features,
            num_numeric=num_numeric,
            width=meta.modulation_dim,
            clusters=meta.clusters,
            seed=config.seed,
        )
    return MetaLearner(
        model,
        embedding_features=tuple(features),
        adapt=meta.adapt,
        order=meta.order,
        inner_steps=meta.inner_steps,
        inner_lr=meta.inner_lr,
        learn_inner_lr=meta.learn_inner_lr,
        loss=config.loss,
        inner_loss=meta.inner_loss,
        inner_prior=meta.inner_prior,
        recompute=meta.recompute,
        modulator=modulator,
        engine=meta.engine,
        seed=config.seed,
    )


def load_system(run_dir: Path, which: str, mesh: Mesh) -> tuple[System, TrainConfig]:
    """Build a run's system and load checkpoint `which`; collective.

    Which packs it can read, `runs.data` says.
    """
    config = read_config(run_dir)
    schema, _ = read_schema(run_dir)
    path = checkpoint.resolve(run_dir / "checkpoints", which)
    checkpoint.verify_together(path, mesh)
    system = build_system(config, schema, mesh, training=False)
    checkpoint.load_tensors(path, system.tensors(), mesh)
    return system, config
