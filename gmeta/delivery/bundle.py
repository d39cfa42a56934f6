"""`gmeta bundle`: a checkpoint of a run as a bundle, one version that can be served, delivered and grown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from gmeta.config.data import HISTORY_ROWS
from gmeta.config.delivery import BundleConfig
from gmeta.config.train import TrainConfig
from gmeta.core.modules import persistent_buffers
from gmeta.data.layout import verified_file
from gmeta.data.pack import TaskPack, open_pack
from gmeta.data.prepare.base import IN_BUNDLE
from gmeta.data.prepare.history import INCREMENT, LEFT_OUT_PARTS, TASKS, history_of_pack
from gmeta.data.schema import PackSchema
from gmeta.data.text_tables import open_text_tables
from gmeta.delivery.smoke import add_smoke
from gmeta.embedding.table import FusedTable, ShardedTables
from gmeta.meta.next_item import Objective
from gmeta.models.registry import is_foreign, source_hash
from gmeta.parallel.mesh import Mesh, local_mesh
from gmeta.recommender.build import new_objective, require_trusted, row_dtype, table_specs
from gmeta.runs import checkpoint
from gmeta.runs.bundle import ASSETS, DENSE, ROWS, TRAINING, Bundle, BundleWriter, is_bundle, read_manifest
from gmeta.runs.data import is_own_pack, require_own_vocabularies
from gmeta.runs.directory import open_checkpoint, read_config, read_run_id, read_schema

_STATE = ("progress", "loader", "torch_rng")
"""What of a checkpoint's state a warm start goes on with."""


def make_bundle(config: BundleConfig) -> Bundle:
    """Make the bundle `config.out` of a run's checkpoint. Memory: the rows of one width at a time.

    Raises ValueError for a run or checkpoint that is missing or damaged, a model that is not trusted, and a disk that
    refuses.
    """
    run_dir, mesh = Path(config.run_dir), local_mesh("cpu")
    trained = read_config(run_dir)
    require_trusted(trained.model.name, f"{run_dir} has", trust_model=config.trust_model)
    require_own_vocabularies(run_dir)
    schema, _ = read_schema(run_dir)
    with BundleWriter(Path(config.out), config.rows) as writer:
        path = open_checkpoint(run_dir, config.checkpoint, mesh)
        step = checkpoint.step_of(path)
        for name in ("config.yaml", "schema.json"):
            writer.add_file(run_dir / name, name)
        for file in sorted((run_dir / "vocab").iterdir()):
            writer.add_file(file, f"vocab/{file.name}")
        dense = _add_dense(writer, path, training=config.training, mesh=mesh)
        objective = new_objective(trained, schema, mesh, text_tables=open_text_tables(run_dir / "vocab", schema))
        _check_files(objective, dense)
        assets = _add_assets(writer, objective.model)
        for fused in _tables(trained, schema, mesh, objective, training=config.training).values():
            _add_rows(writer, path, fused, mesh)
        pack, reason = _own_pack(run_dir, trained)
        if config.training and pack is not None:
            _add_increment(writer, pack)
        elif config.training:
            print(f"bundle {config.out} cannot be continued by `gmeta prepare --base`: {reason}", file=sys.stderr)
        if config.training:
            state = checkpoint.read_state(path)
            writer.add_json(f"{TRAINING}state.json", {key: state[key] for key in _STATE})
        model = trained.model.name
        manifest = {
            # Rounded rows are another version: states that one adapted are of no use to the other.
            "id": f"{read_run_id(run_dir)}/{step}" + ("" if config.rows == "exact" else f".{config.rows}"),
            "parent": _parent(trained),
            "step": step,
            "model": {"name": model, "source": source_hash(model) if is_foreign(model) else None},
            **({ASSETS: assets} if assets else {}),
            **_day(pack),
        }
        if pack is not None:
            add_smoke(writer, pack, manifest)
        return writer.finish(manifest)


def _own_pack(run_dir: Path, trained: TrainConfig) -> tuple[TaskPack | None, str]:
    """Return the pack that a run was trained on, where it still is; else None, and why."""
    path = Path(trained.pack)
    if not (path / "manifest.json").exists():
        return None, f"the run's pack {path} is no longer there"
    try:
        pack = open_pack(path)
        if is_own_pack(run_dir, pack):
            return pack, ""
    except ValueError as error:
        return None, str(error)
    return None, f"{path} is no longer the pack that the run was trained on"


def _parent(trained: TrainConfig) -> str | None:
    """Return the id of the version that a run was warm-started from; None where there is none, or it is gone."""
    path = Path(trained.warm_start)
    return str(read_manifest(path)["id"]) if trained.warm_start and is_bundle(path) else None


def _day(pack: TaskPack | None) -> dict[str, Any]:
    """Return number and interval of the day of a pack, as far as they are known."""
    if pack is None:
        return {}
    day = pack.manifest.get("day", {"number": 0})
    found: dict[str, Any] = {"day": day["number"]}
    if day.get("first_time") is not None:
        found["interval"] = [day["first_time"], day["last_time"]]
    return found


def _add_increment(writer: BundleWriter, pack: TaskPack) -> None:
    """Add what a later day needs of the pack. A first pack has no history, so that it is made here."""
    others = [entry for entry in pack.manifest["others"] if entry["file"].startswith(f"{INCREMENT}/")]
    carried = [entry for entry in others if not entry["file"].startswith(f"{INCREMENT}/{LEFT_OUT_PARTS}")]
    for entry in carried:
        writer.add_file(verified_file(pack.path, entry), f"{TRAINING}{entry['file']}")
    made_here = pack.manifest["data_schema"] and not pack.schema.next_item
    if made_here and f"{INCREMENT}/{TASKS}" not in {entry["file"] for entry in carried}:
        rows = 0 if pack.manifest["settings"].get("task_split") == "column" else HISTORY_ROWS
        writer.add_made(IN_BUNDLE, partial(history_of_pack, pack, rows=rows))
    writer.add_file(pack.path / "manifest.json", f"{IN_BUNDLE}/manifest.json")


def _add_assets(writer: BundleWriter, model: Any) -> dict[str, str]:
    """Add what a model is made with besides its weights. Return its arguments that name a file or folder of it, by its
    path in the bundle, or nothing (the empty text).

    A model that needs something has `save_assets(folder)`, which writes it there and returns these paths in `folder`.
    """
    found: dict[str, str] = {}

    def save(folder: Path) -> None:
        folder.mkdir()
        found.update(model.save_assets(folder))

    if hasattr(model, "save_assets"):
        writer.add_made(ASSETS, save)
    return {key: f"{ASSETS}/{file}" if file else "" for key, file in found.items()}


def _check_files(objective: Objective, dense: Mapping[str, Tensor]) -> None:
    """Let a model that was made with files say, by ValueError, that these are not those of its checkpoint."""
    model: Any = objective.model
    if hasattr(model, "check_loaded"):
        for name, buffer in persistent_buffers(objective):
            buffer.copy_(dense[f"buffers.{name}"].view_as(buffer))
        model.check_loaded()


def _add_dense(writer: BundleWriter, path: Path, *, training: bool, mesh: Mesh) -> Mapping[str, Tensor]:
    """Add layers and buffers, and return them by name."""
    stored = checkpoint.stored_tensors(path)
    dense = {name: value for name, value in stored.items() if name.startswith(("dense.", "buffers."))}
    moments = {name: value for name, value in stored.items() if name.startswith("optimizer.")} if training else {}
    checkpoint.load_tensors(path, {**dense, **moments}, mesh)
    writer.add_tensors(DENSE, dense)
    if training:
        writer.add_tensors(f"{TRAINING}dense.safetensors", moments)
    return dense


def _tables(
    config: TrainConfig, schema: PackSchema, mesh: Mesh, objective: Objective, *, training: bool
) -> dict[str, FusedTable]:
    tables = ShardedTables(
        table_specs(schema, objective.features),
        mesh=mesh,
        seed=config.seed,
        init_std=None,
        dtype=row_dtype(config),
        optimizer=config.embedding.optimizer if training else None,
    )
    return tables.fused


def _add_rows(writer: BundleWriter, path: Path, fused: FusedTable, mesh: Mesh) -> None:
    """Add the tables of one width. The rows that are read here are freed with this copy of `fused`."""
    fused = replace(fused)
    held = {ROWS: fused.weight, **fused.state}
    named = {f"tables.{fused.name}.{'weight' if name == ROWS else name}": value for name, value in held.items()}
    checkpoint.load_tensors(path, named, mesh)
    for spec in fused.specs:
        offset = fused.offsets[spec.name]

        def read(values: Tensor, ids: Tensor, offset: int = offset) -> Tensor:
            return values[fused.permutation.forward(ids + offset)]

        rows: Mapping[str, Callable[[Tensor], Tensor]] = {name: partial(read, values) for name, values in held.items()}
        writer.add_table(spec.name, spec.num_ids, spec.dim, rows)


def bundle(config: BundleConfig) -> int:
    """Run `gmeta bundle`."""
    found = make_bundle(config)
    size = sum(entry["bytes"] for entry in found.manifest["files"])
    print(f"bundle {found.path}: version {found.id}, {size:,} bytes")
    if read_schema(found.path)[0].next_item:
        uses = f"gmeta recommend --run_dir {found.path} --events … --out …, or NextItems.open({str(found.path)!r})"
    else:
        uses = f"gmeta predict --run_dir {found.path} --support … --query … --out …, or gmeta.load({str(found.path)!r})"
    print(f"next: {uses}")
    return 0
