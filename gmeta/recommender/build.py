"""From a config and a schema to a system: the only file of this room that reads config sections."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from gmeta.config.train import MetaConfig, ModelConfig, TrainConfig
from gmeta.core.files import is_url
from gmeta.data.candidates import CandidateDraw
from gmeta.data.catalogue import Catalogue
from gmeta.data.schema import LabelColumn, PackSchema
from gmeta.data.shards import PackSplit
from gmeta.data.text_tables import open_text_tables
from gmeta.embedding.exchange import Exchange, RowExchange
from gmeta.embedding.table import FusedTable, ShardedTables, TableSpec
from gmeta.meta.inner_loop import InnerLoop
from gmeta.meta.learner import MetaLearner
from gmeta.meta.modulation import build_modulator
from gmeta.meta.next_item import NextItemLearner, Objective
from gmeta.models.generator import add_generators
from gmeta.models.inputs import InputSpec, TextInput, input_spec
from gmeta.models.registry import (
    ModelFactory,
    build_model,
    features_of,
    find_model,
    is_foreign,
    name_of,
    resolved_args,
)
from gmeta.models.sasrec import PROMPT
from gmeta.parallel.collectives import fill_from_rank_0
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.mapped import MappedRows
from gmeta.recommender.system import System
from gmeta.runs import checkpoint
from gmeta.runs.bundle import assets_of, is_bundle, open_bundle, read_manifest
from gmeta.runs.directory import open_checkpoint, read_config, read_run_id, read_schema
from gmeta.runs.fetched import fetch_folder
from gmeta.runs.registry import CACHE

WIRE: dict[str, torch.dtype | None] = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of rows and row gradients on the way; None: as the tables hold them."""

MakeExchange = Callable[[Mapping[str, FusedTable], Mesh, torch.dtype | None], Exchange]


TextTables: TypeAlias = Mapping[str, Sequence[str]]
"""The texts of each table of texts, by id."""


def inputs_of(config: ModelConfig, schema: PackSchema, text_tables: TextTables | None = None) -> InputSpec:
    """Return what the configured model reads of a pack."""
    return input_spec(
        schema,
        features=config.features,
        numeric=config.numeric,
        embedding_dim=config.embedding_dim,
        text_tables=text_tables,
    )


def make_model(
    config: ModelConfig,
    schema: PackSchema,
    *,
    seed: int = 0,
    factory: ModelFactory | None = None,
    text_tables: TextTables | None = None,
) -> nn.Module:
    """Return the configured model for a pack; errors as `find_model`, `resolved_args` and `build_model`."""
    name = config.name if factory is None else name_of(factory)
    factory = factory or find_model(name)
    _require_kind(factory, schema, name)
    args = _fetched(factory, resolved_args(factory, config.args, name))
    return build_model(factory, inputs_of(config, schema, text_tables), args, name=name, seed=seed)


def _require_kind(factory: ModelFactory, schema: PackSchema, name: str) -> None:
    """Raise ValueError where a class finds next items, and the pack has rows with labels, or the other way round."""
    if not inspect.isclass(factory):
        return
    finds, scores = hasattr(factory, "states"), getattr(factory, "forward", None) is not nn.Module.forward
    if schema.next_item and scores and not finds:
        raise ValueError(
            f"{name} scores rows, and the pack is one of next items: name a model that finds them by states and items, "
            "such as --model.name sasrec or llmrec, or prepare rows with a label (--schema)"
        )
    if not schema.next_item and finds and not scores:
        raise ValueError(
            f"{name} finds next items, and the pack has rows with labels: name a model that scores them, such as "
            "--model.name dlrm, or prepare events (--events)"
        )


def _fetched(factory: ModelFactory, args: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with a copy in the cache for each folder that lies in an object store."""
    check = getattr(factory, "check_folder", lambda _: None)
    found = {}
    for key in getattr(factory, "paths", ()):
        if is_url(args.get(key) or ""):
            found[key] = str(fetch_folder(args[key], Path(CACHE).expanduser(), check))
    return {**args, **found}


def resolve_model(config: TrainConfig, factory: ModelFactory | None = None) -> TrainConfig:
    """Return the config with the model's own defaults among `model.args`, so that a saved run tells all of them, and
    with absolute paths where the model's `paths` say which arguments are some. URLs of object stores stay.

    Raises ValueError where the model does not exist or does not take the arguments.
    """
    factory = factory or find_model(config.model.name)
    args = resolved_args(factory, config.model.args, config.model.name)
    given = [key for key in getattr(factory, "paths", ()) if args.get(key) and not is_url(args[key])]
    args |= {key: str(Path(args[key]).absolute()) for key in given}
    return replace(config, model=replace(config.model, args=args))


def build_system(
    config: TrainConfig,
    schema: PackSchema,
    mesh: Mesh,
    *,
    factory: ModelFactory | None = None,
    exchange: MakeExchange = RowExchange,
    training: bool = True,
    text_tables: TextTables | None = None,
) -> System:
    """Build model, learner and tables with the config's seed.

    Without `training`, tables have no optimizer state, and their rows hold no numbers until a checkpoint is loaded.
    `factory` makes the model, where it is not the one that `model.name` names, and `exchange` the way that rows travel.
    `text_tables` are the texts that a pack's ids stand for, for a model that reads texts.
    Collective: ranks get rank 0's buffers of the model.

    Raises ValueError when the loss does not fit the labels, or the model names what the pack does not have.
    """
    objective = new_objective(config, schema, mesh, factory=factory, text_tables=text_tables)
    dtype, generated = row_dtype(config), tuple(config.embedding.generator)
    tables = ShardedTables(
        table_specs(schema, objective.features),
        mesh=mesh,
        seed=config.seed,
        init_std=config.embedding.init_std if training else None,
        dtype=dtype,
        optimizer=config.embedding.optimizer if training else None,
    )
    return System(
        objective=objective,
        tables=tables,
        exchange=exchange(tables.fused, mesh, WIRE[config.comm.wire]),
        mesh=mesh,
        dtype=dtype,
        autocast=config.precision == "bf16",
        num_numeric=inputs_of(config.model, schema).num_numeric + len(generated),
        generated=generated,
    )


def new_objective(
    config: TrainConfig,
    schema: PackSchema,
    mesh: Mesh,
    *,
    factory: ModelFactory | None = None,
    text_tables: TextTables | None = None,
) -> Objective:
    """Build the model and what it is trained for, without tables; arguments, errors as `build_system`; collective."""
    if schema.labels and config.loss != schema.labels[0].loss:
        first = schema.labels[0]
        raise ValueError(
            f"loss is {config.loss!r}: with several labels it must be that of the first, {first.name!r}, which is "
            f"{first.loss} in the schema; set loss to {first.loss}, or prepare with other labels"
        )
    if config.loss == "bce" and not schema.binary_label:
        raise ValueError(
            f"loss is 'bce' but label {schema.label!r} has values other than 0 and 1: "
            "prepare with --label_threshold, or train with --loss mse, l1 or huber"
        )
    dtype = row_dtype(config)
    if mesh.device.type == "cuda":
        torch.backends.cuda.matmul.fp32_precision = "tf32" if config.precision == "tf32" else "ieee"
    inputs, generated = inputs_of(config.model, schema, text_tables), tuple(config.embedding.generator)
    model = make_model(config.model, schema, seed=config.seed, factory=factory, text_tables=text_tables)
    read = inputs.reading(features_of(model, inputs))
    texts = inputs.texts_of(model)
    if generated:
        _require_one_valued(generated, schema)
        add_generators(model, read, config.embedding.generator, seed=config.seed)
    num_numeric = inputs.num_numeric + len(generated)
    model = model.to(mesh.device, dtype)
    fill_from_rank_0(model.buffers(), mesh)  # a model may draw them without the seed, and ranks must compute the same
    features = {name: width for name, width in read.widths.items() if name in inputs.tables}
    objective: Objective
    if schema.next_item:
        objective = _next_item(model, config, schema, features, texts)
    else:
        labels = schema.labels
        routes = inputs.routes_of(model)
        objective = build_learner(
            model, config, config.meta, features, num_numeric, read.sequences, read.vectors, labels, texts, routes
        )
    return objective.to(mesh.device, dtype)


def _next_item(
    model: nn.Module,
    config: TrainConfig,
    schema: PackSchema,
    features: Mapping[str, int],
    texts: Mapping[str, TextInput],
) -> NextItemLearner:
    """Return the learner of next items. ValueError for settings that such a run has no use for."""
    meta = config.meta
    if meta.adapt not in ([], [PROMPT]):
        raise ValueError(
            f"meta.adapt is {meta.adapt}, and the pack is one of next items, where a task adapts a prompt or nothing: "
            f"set meta.adapt to [] or [{PROMPT}]"
        )
    if config.loader.resample:
        raise ValueError(
            "loader.resample is true, and the pack is one of next items, whose histories are in the order of what came "
            "next: leave it out"
        )
    assert schema.item is not None
    return NextItemLearner(
        model,
        features,
        item=schema.item,
        domain=domain_of(schema),
        texts=texts,
        every_event=config.next_item.targets == "every",
        own_items=config.next_item.own_items == "compared",
        each=config.next_item.each,
        inner_loop=_inner_loop(meta) if meta.adapt else None,
        seed=config.seed,
    )


def _inner_loop(meta: MetaConfig) -> InnerLoop:
    return InnerLoop(
        adapt=meta.adapt,
        order=meta.order,
        steps=meta.inner_steps,
        lr=meta.inner_lr,
        learn_lr=meta.learn_inner_lr,
        loss=meta.inner_loss,
        prior=meta.inner_prior,
        recompute=meta.recompute,
    )


def candidate_draw(
    config: TrainConfig, catalogue: Catalogue, schema: PackSchema, split: PackSplit | None = None
) -> CandidateDraw:
    """Return what draws the items that targets of next items are compared with; in training `split` has their rows."""
    settings = config.next_item
    return CandidateDraw(
        catalogue,
        schema,
        domain=domain_of(schema),
        count=settings.candidates,
        draw=settings.draw,
        seed=config.seed,
        in_batch=settings.in_batch,
        split=split,
    )


def domain_of(schema: PackSchema) -> str | None:
    """Return the feature that parts the catalogue: the scenario, where items own it."""
    return schema.scenario if schema.scenario in schema.catalogue else None


def row_dtype(config: TrainConfig) -> torch.dtype:
    """Return the type of table rows and dense layers."""
    return torch.float64 if config.precision == "float64" else torch.float32


def _require_one_valued(generated: Iterable[str], schema: PackSchema) -> None:
    for feature in schema.features:
        if feature.name in generated and feature.kind != "categorical":
            raise ValueError(
                f"embedding.generator names {feature.name!r}, which has many values a row: name a feature of one value"
            )


def table_specs(schema: PackSchema, features: Mapping[str, int]) -> list[TableSpec]:
    """Return one table per vocabulary that the features (name -> width) read; those of one vocabulary share it."""
    specs: dict[str, TableSpec] = {}
    for name, dim in features.items():
        feature = schema.feature(name)
        pooling = None if feature.kind == "categorical" else feature.pooling
        spec = specs.setdefault(feature.table, TableSpec(feature.table, feature.num_ids, dim, {}))
        specs[feature.table] = replace(spec, features={**spec.features, name: pooling})
    return list(specs.values())


def build_learner(
    model: nn.Module,
    config: TrainConfig,
    meta: MetaConfig,
    features: Mapping[str, int],
    num_numeric: int,
    sequences: Mapping[str, int],
    vectors: Mapping[str, int],
    labels: Sequence[LabelColumn] = (),
    texts: Mapping[str, TextInput] | None = None,
    routes: Mapping[str, int] | None = None,
) -> MetaLearner:
    """Return the learner of a model, with the run's losses and the inner loop of `meta`.

    `features`, `num_numeric`, `sequences`, `vectors`, `texts` and `routes` say what the model reads, as in
    `MetaLearner`; `labels` are several.
    """
    modulator = None
    if meta.modulation != "none" and texts:
        raise ValueError(
            f"meta.modulation is {meta.modulation!r}, and the model reads the texts of {min(texts)!r}: a modulator "
            "sees embedding rows and numbers alone, not the texts of a support; leave it out"
        )
    if meta.modulation != "none" and routes:
        raise ValueError(
            f"meta.modulation is {meta.modulation!r}, and the model routes examples by {min(routes)!r}: a modulator "
            "reads no ids; leave it out"
        )
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
        features,
        num_numeric,
        _inner_loop(meta),
        sequences=sequences,
        vectors=vectors,
        texts=texts,
        routes=routes,
        loss=config.loss,
        labels=labels,
        modulator=modulator,
        engine=meta.engine,
        seed=config.seed,
    )


def load_system(
    source: Path,
    which: str,
    mesh: Mesh,
    *,
    factory: ModelFactory | None = None,
    trust_model: bool = False,
    mapped: bool = False,
    text_tables: TextTables | None = None,
) -> tuple[System, TrainConfig, int]:
    """Build the system of a run's checkpoint `which`, or of a bundle, and load it without optimizer state; collective.
    Return them with the step.

    Which packs it can read, `runs.data` says. A run that names a model of somebody's own is opened with `factory`, or
    with `trust_model`, which imports what the run names. With `mapped` a bundle's rows stay in its files.
    `text_tables` are those of a pack that is to be read; without them, texts are those that the source knows. Raises
    ValueError otherwise.
    """
    config = read_config(source)
    schema, _ = read_schema(source)
    if text_tables is None:
        text_tables = open_text_tables(source / "vocab", schema)
    if factory is None:
        require_trusted(config.model.name, f"{source} has", trust_model=trust_model)
    else:
        _compare_names(config.model.name, name_of(factory))
    if is_bundle(source):
        bundle = open_bundle(source)
        args = {**config.model.args, **assets_of(source)}
        config = replace(config, model=replace(config.model, args=args))
        exchange: MakeExchange = partial(MappedRows, bundle) if mapped else RowExchange
        system = build_system(
            config, schema, mesh, factory=factory, exchange=exchange, training=False, text_tables=text_tables
        )
        if not mapped:
            bundle.fill_tables(system.tables)
        dense = system.dense_tensors()
        checkpoint.load_tensors(source, dense, mesh)
        system.check_loaded()
        return system, config, bundle.step
    path = open_checkpoint(source, which, mesh)
    system = build_system(config, schema, mesh, factory=factory, training=False, text_tables=text_tables)
    checkpoint.load_tensors(path, system.tensors(), mesh)
    system.check_loaded()
    return system, config, checkpoint.step_of(path)


def version_of(source: Path, step: int | str) -> str:
    """Return the id of a bundle, or of the checkpoint of a run after `step`: the run's id and the step."""
    return str(read_manifest(source)["id"]) if is_bundle(source) else f"{read_run_id(source)}/{step}"


def require_trusted(model: str, owner: str, *, trust_model: bool) -> None:
    """Raise ValueError for a model that is not gmeta's own, unless it is trusted: to open it runs its code."""
    if is_foreign(model) and not trust_model:
        raise ValueError(
            f"{owner} a model of its own, {model}: loading it runs that code. Where you trust it, "
            "say --trust_model true (from Python: gmeta.load(…, model=YourClass), or trust_model=True)"
        )


def _compare_names(recorded: str, given: str) -> None:
    """Warn where another class is given than the run was trained with: weights of one shape would fit both."""
    if recorded.rpartition(":")[2] != given.rpartition(":")[2]:
        warnings.warn(f"the run was trained with the model {recorded}, and is opened with {given}", stacklevel=4)
