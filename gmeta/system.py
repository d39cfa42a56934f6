"""Builds what a config describes: model, learner and tables, on this rank. Shared by train, evaluate and predict."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from gmeta import checkpoint
from gmeta.batch import EmbeddedRows, TaskBatch, to_device
from gmeta.config import MetaConfig, TrainConfig
from gmeta.data.schema import PackSchema, schema_difference
from gmeta.embedding.exchange import LookupPlan, fetch, plan_lookup
from gmeta.embedding.table import ShardedTables, TableSpec
from gmeta.meta.learner import MetaLearner
from gmeta.meta.modulation import build_modulator
from gmeta.meta.rows import Plan
from gmeta.models import build_model
from gmeta.parallel.mesh import Mesh
from gmeta.rundir import read_config, read_schema


@dataclass(frozen=True)
class Prepared:
    """A batch on this rank's device, and the index work done ahead of its step."""

    batch: TaskBatch
    lookup: LookupPlan  # which rows to fetch, from whom
    index: Plan  # which of them each feature of each task reads


@dataclass(frozen=True)
class System:
    """A model, its learner and its tables on this rank."""

    learner: MetaLearner
    tables: ShardedTables
    mesh: Mesh
    dtype: torch.dtype
    autocast: bool

    def prepare(self, batch: TaskBatch, learner: MetaLearner | None = None) -> Prepared:
        """All index work of a batch, for its own learner or another; needs no rows, so the loader's thread does it."""
        lookup = plan_lookup(self.tables, batch)
        num_rows = {name: max(1, group.rows.numel()) for name, group in lookup.groups.items()}
        index = (learner or self.learner).plan(lookup.support, lookup.query, num_rows, batch)
        device = self.mesh.device
        return Prepared(to_device(batch, device, self.dtype), to_device(lookup, device), to_device(index, device))

    def fetch(self, plan: LookupPlan, stop: bool = False) -> tuple[EmbeddedRows, bool]:
        """Fetch the plan's rows; collective. Also whether any rank asked to stop."""
        rows, stops = fetch(self.tables, plan, self.mesh, stop)
        return rows, stops

    def precision(self) -> AbstractContextManager[object]:
        """Autocast for forward passes, where configured."""
        if self.autocast:
            return torch.autocast(self.mesh.device.type, torch.bfloat16)
        return nullcontext()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of model, learned rates and tables, by name, for checkpoints."""
        dense = {f"dense.{name}": p.detach() for name, p in self.learner.named_parameters()}
        return {**dense, **{f"tables.{name}": t for name, t in self.tables.state_dict().items()}}


def table_specs(schema: PackSchema, features: tuple[str, ...], dim: int) -> list[TableSpec]:
    """One table per vocabulary that the model's features read; features of one vocabulary share it."""
    specs: dict[str, TableSpec] = {}
    for name in features:
        feature = schema.feature(name)
        pooling = None if feature.kind == "categorical" else feature.pooling
        spec = specs.setdefault(feature.table, TableSpec(feature.table, feature.num_ids, dim, {}))
        specs[feature.table] = replace(spec, features={**spec.features, name: pooling})
    return list(specs.values())


def build_system(config: TrainConfig, schema: PackSchema, mesh: Mesh) -> System:
    """Build model, learner and tables with the config's seed.

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
    model = build_model(config.model, schema, seed=config.seed).to(mesh.device, dtype)
    num_numeric = len(schema.numeric) if config.model.numeric else 0
    learner = build_learner(model, config, config.meta, num_numeric).to(mesh.device, dtype)
    features = learner.embedding_features
    learner.choose_engine(dict.fromkeys(features, config.model.embedding_dim), len(schema.numeric))
    tables = ShardedTables(
        table_specs(schema, features, config.model.embedding_dim),
        mesh=mesh,
        seed=config.seed,
        init_std=config.embedding.init_std,
        dtype=dtype,
        optimizer=config.embedding.optimizer,
    )
    return System(learner=learner, tables=tables, mesh=mesh, dtype=dtype, autocast=config.precision == "bf16")


def build_learner(model: nn.Module, config: TrainConfig, meta: MetaConfig, num_numeric: int) -> MetaLearner:
    """The learner of a model that gmeta built, with the run's losses and the inner loop of `meta`.

    `num_numeric` is the number of numeric columns that the model reads.
    """
    features = cast(tuple[str, ...], model.features)
    modulator = None
    if meta.modulation != "none":
        modulator = build_modulator(
            meta.modulation,
            model,
            dims=dict.fromkeys(features, config.model.embedding_dim),
            num_numeric=num_numeric,
            width=meta.modulation_dim,
            clusters=meta.clusters,
            seed=config.seed,
        )
    return MetaLearner(
        model,
        embedding_features=features,
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


def load_system(
    run_dir: Path, which: str, mesh: Mesh, *, pack_schema: PackSchema | None = None
) -> tuple[System, TrainConfig]:
    """Build a run's system and load checkpoint `which`; collective.

    Raises ValueError with the difference when `pack_schema` does not fit the run's.
    """
    config = read_config(run_dir)
    schema, _ = read_schema(run_dir)
    if pack_schema is not None and (lines := schema_difference(schema, pack_schema)):
        raise ValueError(f"the data does not fit the run {run_dir}: " + "; ".join(lines))
    path = checkpoint.resolve(run_dir / "checkpoints", which)
    checkpoint.verify_together(path, mesh)
    system = build_system(config, schema, mesh)
    checkpoint.load_tensors(path, system.tensors(), mesh)
    return system, config
