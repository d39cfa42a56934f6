"""Where a warm start begins: with the weights, rows and moments of a bundle, aligned by the raw values of ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmeta.config.train import USERS_KEYS, TrainConfig
from gmeta.core.files import read_mapping
from gmeta.core.nested import flat
from gmeta.meta.inner_loop import resolve_adapted
from gmeta.meta.next_item import NextItemLearner
from gmeta.models.registry import with_younger_args
from gmeta.parallel.collectives import on_rank_0
from gmeta.runs import checkpoint
from gmeta.runs.bundle import CURE, TRAINING, Bundle, assets_of, open_bundle, read_manifest
from gmeta.runs.directory import (
    FIXED_ON_RESUME,
    FREE_ON_RESUME,
    read_config,
    read_replay_checksum,
    read_tasks_checksum,
)
from gmeta.runs.translation import meaning_difference
from gmeta.sharding.checkpoint import fill
from gmeta.training.aligned_rows import align_rows
from gmeta.training.run import Run
from gmeta.training.state import Progress

_RATES = "inner_lr"


def start_from_bundle(run: Run, path: Path) -> dict[str, Tensor]:
    """Overwrite dense layers, rows and their moments by those of a bundle; collective. Returns the new ids by table.

    An id's row and moments are those of the same raw value; see `align_rows`. Learned inner rates go on by step and
    name. With `schedule.position: continue` the position in the training goes on too. Raises ValueError for a bundle
    that is damaged, or whose model or data are others, with what differs.
    """
    state, config, bundle = run.state, run.config, Bundle(path, read_manifest(path))
    goes_on, moments = config.schedule.position == "continue", bool(bundle.manifest["training"])
    on_rank_0(lambda: _check(path, run, moments=moments, goes_on=goes_on), state.mesh)
    run.log.say(f"warm start from {path}, version {bundle.id}" + ("" if moments else ", which holds no moments"))
    tensors = {**state.system.buffer_tensors(), **state.dense.tensors()}
    if (rates := _rates(run, bundle)) is not None:
        fill(tensors[f"dense.{_RATES}"], rates)
        tensors = {name: tensor for name, tensor in tensors.items() if name.split(".")[1] != _RATES}
    of_optimizer = {name: tensor for name, tensor in tensors.items() if name.startswith("optimizer.")}
    weights = {name: tensor for name, tensor in tensors.items() if name not in of_optimizer}
    checkpoint.load_tensors(path, weights, state.mesh)
    if moments:
        checkpoint.load_tensors(path / TRAINING, of_optimizer, state.mesh)
    state.dense.loaded()
    state.system.check_loaded()
    tables = {spec.name: spec.name for fused in state.system.tables.fused.values() for spec in fused.specs}
    new = align_rows(run, bundle, tables, moments=moments)
    if goes_on:
        _restore_position(run, path)
    return new


def _rates(run: Run, bundle: Bundle) -> Tensor | None:
    """Return learned inner rates [steps, groups] where they are no plain copy of the bundle's.

    A group that the bundle learned no rates of begins with `meta.inner_lr`. Steps beyond the bundle's repeat its last.
    """
    objective, theirs = run.state.system.objective, bundle.dense.get(f"dense.{_RATES}")
    if objective.inner_lr is None:
        if theirs is not None:
            run.log.say(f"  the inner rates that {bundle.id} learned are left out: meta.learn_inner_lr is false")
        return None
    if isinstance(objective, NextItemLearner):
        loop = objective.inner_loop
        same = theirs is not None and theirs.shape == objective.inner_lr.shape
        return None if same or loop is None else torch.full_like(objective.inner_lr, loop.lr)
    learner = run.state.system.learner
    assert learner.inner_lr is not None
    names: tuple[str, ...] = ()
    if theirs is not None:
        adapted = read_config(bundle.path).meta.adapt
        names = resolve_adapted(adapted, learner.model, tuple(learner.features)).rates
    if theirs is not None and names == learner.rate_names and theirs.shape == learner.inner_lr.shape:
        return None
    loop = learner.inner_loop
    rates = torch.full((loop.steps, len(learner.rate_names)), loop.lr, dtype=learner.inner_lr.dtype)
    fresh = [name for name in learner.rate_names if name not in names]
    for column, name in enumerate(learner.rate_names):
        if theirs is not None and name in names:
            steps = torch.arange(loop.steps).clamp(max=len(theirs) - 1)
            rates[:, column] = theirs[steps, names.index(name)].to(rates)
    told = f", those of {', '.join(fresh)} at {loop.lr:g}" if fresh else ""
    run.log.say(f"  inner rates of {loop.steps} steps begin without moments{told}")
    return rates


def _check(path: Path, run: Run, *, moments: bool, goes_on: bool) -> None:
    open_bundle(path, training=moments)  # verifies it
    pack = run.pack
    ours, base = (_without_files(config, path) for config in (run.config, read_config(path)))
    lines = [f"{key} is {mine!r}, the bundle has {theirs!r}" for key, mine, theirs in _others(ours, base, moments)]
    lines += meaning_difference(path, pack)
    if lines:
        raise ValueError(
            f"{path} cannot be gone on with on {pack.path}: {'; '.join(lines)}. Leave settings of "
            "the model out; where the data differ, train anew on this pack"
        )
    if goes_on:
        _check_position(path, run, ours, base, moments)


def _without_files(config: TrainConfig, path: Path) -> TrainConfig:
    """Return a config with all arguments of its model, but for those that name what the bundle holds for it: its files
    lie elsewhere now.
    """
    args = with_younger_args(config.model.name, config.model.args)
    return replace(config, model=replace(config.model, args={**args, **dict.fromkeys(assets_of(path))}))


def _others(config: TrainConfig, base: TrainConfig, moments: bool) -> Iterator[tuple[str, Any, Any]]:
    """Yield the settings without which the bundle's numbers mean nothing and that are others: key, ours, the bundle's.

    How a task adapts is free: steps, rates, loss and order of the inner loop, and what adapts.
    """
    keys = ["loss", "model.name", "model.embedding_dim", "model.features", "embedding.generator"]
    keys += ["meta.modulation"]
    if base.meta.modulation != "none":
        keys.append("meta.modulation_dim")
    if base.meta.modulation == "cluster":
        keys.append("meta.clusters")
    if config.meta.learn_inner_lr and base.meta.learn_inner_lr and config.meta.adapt == base.meta.adapt:
        keys.append("meta.inner_lr")  # only where learned rates begin
    if moments:
        keys.append("embedding.optimizer")
    ours, theirs = (flat(asdict(c), whole=USERS_KEYS) for c in (config, base))
    for key in keys:
        if ours[key] != theirs[key]:
            yield key, ours[key], theirs[key]
    mine, other = config.model.args, base.model.args
    for name in dict.fromkeys([*mine, *other] if config.model.name == base.model.name else []):
        if mine.get(name) != other.get(name):
            yield f"model.args.{name}", mine.get(name), other.get(name)


def _check_position(path: Path, run: Run, config: TrainConfig, base: TrainConfig, moments: bool) -> None:
    """Raise ValueError where a position of the bundle's training means nothing in this one, of `config`."""
    said = "schedule.position is 'continue', and"
    if not moments:
        raise ValueError(f"{said} {path} has no {TRAINING} part: bundle with --training true")
    if read_tasks_checksum(path) != run.pack.tasks_checksum():
        raise ValueError(
            f"{said} {run.pack.path} has other tasks than {path} was trained on: a position "
            "means nothing among them; leave it out"
        )
    if read_replay_checksum(path) != (None if run.older is None else run.older.manifest["xxh3"]):
        raise ValueError(f"{said} {path} was trained with another replay.pack, or with none: leave the position out")
    ours, theirs = (flat(asdict(c), whole=USERS_KEYS) for c in (config, base))
    for key in ours:
        fixed = key.startswith(FIXED_ON_RESUME) and key not in FREE_ON_RESUME
        if fixed and ours[key] != theirs.get(key):
            raise ValueError(
                f"{said} {key} is {ours[key]!r}, {path} has {theirs.get(key)!r}: a position goes on with the bundle's "
                "own; leave one of the two out"
            )


def _restore_position(run: Run, path: Path) -> None:
    values = read_mapping(path / TRAINING / "state.json", CURE)
    run.state.progress = Progress(**values["progress"])
    run.loader.load_state_dict(values["loader"])
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(values["torch_rng"]), dtype=torch.uint8))
