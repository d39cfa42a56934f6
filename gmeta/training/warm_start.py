"""Where a warm start begins: with the weights, rows and moments of a bundle, aligned by the raw values of ids."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gmeta.config.train import TrainConfig
from gmeta.core.files import read_mapping
from gmeta.data.pack import TaskPack
from gmeta.data.schema import OOV
from gmeta.parallel.collectives import on_rank_0
from gmeta.runs import checkpoint
from gmeta.runs.bundle import CURE, TRAINING, Bundle, open_bundle, read_manifest
from gmeta.runs.directory import read_config, read_tasks_checksum
from gmeta.runs.translation import GONE, NEW, known_ids, meaning_difference
from gmeta.training.first_rows import set_generated_rows
from gmeta.training.run import Run
from gmeta.training.state import Progress


def start_from_bundle(run: Run, path: Path) -> str:
    """Overwrite dense layers, rows and their moments by those of a bundle; collective. Returns what to tell.

    An id's row and moments are those of the same raw value. An id that is new starts as `embedding.new_rows` says,
    without moments; a tombstone is 0. With `schedule.position: continue` the position in the training goes on too.
    Raises ValueError for a bundle that is damaged, or whose model or data are others, with what differs.
    """
    state, config, bundle = run.state, run.config, Bundle(path, read_manifest(path))
    goes_on, moments = config.schedule.position == "continue", bool(bundle.manifest["training"])
    on_rank_0(lambda: _check(path, run.pack, config, moments=moments, goes_on=goes_on), state.mesh)
    tensors = {**state.system.buffer_tensors(), **state.dense.tensors()}
    of_optimizer = {name: tensor for name, tensor in tensors.items() if name.startswith("optimizer.")}
    weights = {name: tensor for name, tensor in tensors.items() if name not in of_optimizer}
    checkpoint.load_tensors(path, weights, state.mesh)
    if moments:
        checkpoint.load_tensors(path / TRAINING, of_optimizer, state.mesh)
    state.dense.loaded()
    told = [f"warm start from {path}, version {bundle.id}" + ("" if moments else ", which holds no moments")]
    new: dict[str, Tensor] = {}
    for fused in state.system.tables.fused.values():
        sources = {spec.name: known_ids(path, run.pack, spec.name) for spec in fused.specs}
        bundle.fill_rows(fused, sources, moments=moments)
        for table, source in sources.items():
            new[table], gone = ((source == what).nonzero()[:, 0] for what in (NEW, GONE))
            fused.set_ids(table, gone, torch.zeros(len(gone), fused.dim))
            if config.embedding.new_rows != "random":
                fused.set_ids(table, new[table], bundle.rows(table, torch.tensor([OOV])).expand(len(new[table]), -1))
            known = len(source) - len(new[table]) - len(gone)
            told.append(f"  {table}: {known:,} ids go on, {len(new[table]):,} are new, {len(gone):,} are gone")
    if config.embedding.new_rows == "generated":
        for name in state.system.generated:
            set_generated_rows(run, name, new[run.pack.schema.feature(name).table])
    if goes_on:
        _restore_position(run, path)
    return "\n".join(told)


def _check(path: Path, pack: TaskPack, config: TrainConfig, *, moments: bool, goes_on: bool) -> None:
    open_bundle(path, training=moments)  # verifies it
    base = read_config(path)
    lines = [
        f"{key} is {ours!r}, the bundle has {theirs!r}"
        for key, ours, theirs in (
            ("model.name", config.model.name, base.model.name),
            ("model.args", config.model.args, base.model.args),
            ("model.embedding_dim", config.model.embedding_dim, base.model.embedding_dim),
            ("model.features", config.model.features, base.model.features),
            ("loss", config.loss, base.loss),
            ("embedding.generator", config.embedding.generator, base.embedding.generator),
        )
        if ours != theirs
    ]
    lines += meaning_difference(path, pack)
    if lines:
        raise ValueError(
            f"{path} cannot be gone on with on {pack.path}: {'; '.join(lines)}. Leave settings of "
            "the model out; where the data differ, train anew on this pack"
        )
    if not goes_on:
        return
    if not moments:
        raise ValueError(
            f"schedule.position is 'continue', and {path} has no {TRAINING} part: bundle with --training true"
        )
    if read_tasks_checksum(path) != pack.tasks_checksum():
        raise ValueError(
            f"schedule.position is 'continue', and {pack.path} has other tasks than {path} was trained on: a position "
            "means nothing among them; leave it out"
        )


def _restore_position(run: Run, path: Path) -> None:
    values = read_mapping(path / TRAINING / "state.json", CURE)
    run.state.progress = Progress(**values["progress"])
    run.loader.load_state_dict(values["loader"])
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(values["torch_rng"]), dtype=torch.uint8))
