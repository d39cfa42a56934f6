"""A new training that begins with parts of another model: `--init_from BUNDLE --init_map '{ours: theirs}'`.

A part is a tensor of the model or a modulator (`model.layers.0.weight`), or an embedding table (`tables.item`). Tables
align by the raw values of ids, as in a warm start. Moments, the schedule and learned inner rates begin anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gmeta.core.errors import nearest
from gmeta.data.schema import PackSchema
from gmeta.parallel.collectives import on_rank_0
from gmeta.runs.bundle import Bundle, open_bundle, read_manifest
from gmeta.runs.data import run_identity
from gmeta.runs.directory import read_schema
from gmeta.sharding.checkpoint import fill
from gmeta.training.aligned_rows import align_rows
from gmeta.training.run import Run

_TABLES = "tables."
_RATES = "inner_lr"


@dataclass(frozen=True)
class ModelPart:
    """What must be equal of two parts. The ids of two tables with vocabularies are found by value."""

    shape: tuple[int, ...]  # of a tensor; of a table the width of a row
    ids: tuple[str, int] | None = None  # of a hashed table: the hash, and the number of ids


def start_from_parts(run: Run, path: Path) -> dict[str, Tensor]:
    """Overwrite the parts that `init_map` names by those of a bundle; collective. Returns the new ids of its tables.

    Raises ValueError for a bundle that is damaged, a name that either side does not have, and parts of other sizes.
    """
    on_rank_0(lambda: open_bundle(path), run.state.mesh)  # verifies it
    bundle = Bundle(path, read_manifest(path))
    ours, theirs = _our_parts(run), _parts_of(bundle)
    given = run.config.init_map
    pairs = _named(given, ours, theirs, path) if given else _all_that_fit(ours, theirs)
    if not pairs:
        raise ValueError(f"{path} has no part of this model's names and sizes: name the parts with init_map")
    tensors = run.state.dense.tensors()
    targets = {**tensors, **run.state.system.buffer_tensors()}
    layers = {mine: other for mine, other in pairs.items() if not mine.startswith(_TABLES)}
    for mine, other in layers.items():
        fill(targets[_key(mine, targets)], bundle.dense[_key(other, bundle.dense)])
    run.state.dense.loaded()
    run.state.system.check_loaded()
    tables = {
        mine.removeprefix(_TABLES): other.removeprefix(_TABLES) for mine, other in pairs.items() if mine not in layers
    }
    run.log.say(
        f"begins with parts of {path}, version {bundle.id}: {len(layers)} tensors of "
        f"{sum(targets[_key(name, targets)].numel() for name in layers):,} numbers, {len(tables)} tables"
    )
    new = align_rows(run, bundle, tables, moments=False)
    if fresh := [name for name in ours if name not in pairs]:
        run.log.say(f"  begin anew: {', '.join(fresh)}")
    if not given and (unused := [name for name in theirs if name not in pairs.values()]):
        run.log.say(f"  not taken: {', '.join(unused)}")
    return new


def _key(name: str, tensors: Mapping[str, Any]) -> str:
    """Return the name of a part's tensor in a checkpoint: parameters and buffers lie apart."""
    return f"dense.{name}" if f"dense.{name}" in tensors else f"buffers.{name}"


def _layers(tensors: Mapping[str, Tensor]) -> dict[str, ModelPart]:
    parts = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind in ("dense", "buffers") and name != _RATES:
            parts[name] = ModelPart(tuple(tensor.shape))
    return parts


def _our_parts(run: Run) -> dict[str, ModelPart]:
    system = run.state.system
    specs = {spec.name: spec for fused in system.tables.fused.values() for spec in fused.specs}
    ids = _hashed(run.pack.schema, run.pack.identity().schema.identity or {})
    tables = {f"{_TABLES}{name}": ModelPart((spec.dim,), ids.get(name)) for name, spec in specs.items()}
    return {**_layers({**run.state.dense.tensors(), **system.buffer_tensors()}), **tables}


def _parts_of(bundle: Bundle) -> dict[str, ModelPart]:
    ids = _hashed(read_schema(bundle.path)[0], run_identity(bundle.path).schema.identity or {})
    entries = bundle.manifest["tables"].items()
    return {
        **_layers(bundle.dense),
        **{f"{_TABLES}{name}": ModelPart((e["dim"],), ids.get(name)) for name, e in entries},
    }


def _hashed(schema: PackSchema, identity: Mapping[str, str]) -> dict[str, tuple[str, int]]:
    sizes = {feature.table: feature.num_ids for feature in schema.features}
    return {name: (what, sizes[name]) for name, what in identity.items() if what.startswith("hash") and name in sizes}


def _all_that_fit(ours: Mapping[str, ModelPart], theirs: Mapping[str, ModelPart]) -> dict[str, str]:
    """Return the tables and the whole layers of one name and size: half a layer of another model is worth nothing."""
    unlike = {_owner(name) for name, part in ours.items() if theirs.get(name) != part}
    return {name: name for name in ours if _owner(name) not in unlike}


def _owner(name: str) -> str:
    return name if name.startswith(_TABLES) else name.rpartition(".")[0]


def _named(
    given: Mapping[str, str], ours: Mapping[str, ModelPart], theirs: Mapping[str, ModelPart], path: Path
) -> dict[str, str]:
    """Return the bundle's part of each part that `init_map` names; of two keys that name it the longer one counts."""
    keys: dict[str, str] = {}
    for key in sorted(given, key=len):
        found = [name for name in ours if name == key or name.startswith(f"{key}.")]
        if not found:
            raise ValueError(f"init_map names {key!r}, which is no part of this model: {nearest(key, _names(ours))}")
        keys |= dict.fromkeys(found, key)
    pairs = {name: given[key] + name[len(key) :] for name, key in keys.items()}
    for name, other in pairs.items():
        if other not in theirs:
            near = nearest(other, _names(theirs))
            raise ValueError(f"init_map takes {name} from {other!r}, which {path} does not have: {near}")
        if difference := _difference(ours[name], theirs[other]):
            raise ValueError(
                f"init_map takes {name} from {other} of {path}: {difference}; leave it out, or make this model alike"
            )
    return {name: pairs[name] for name in ours if name in pairs}


def _difference(ours: ModelPart, theirs: ModelPart) -> str:
    if ours.shape != theirs.shape:
        return f"its shape is {list(theirs.shape)}, here it is {list(ours.shape)}"
    if ours.ids != theirs.ids:
        told = ["by vocabulary" if ids is None else f"by {ids[0]} of {ids[1]} ids" for ids in (theirs.ids, ours.ids)]
        return f"its ids are numbered {told[0]}, here {told[1]}"
    return ""


def _names(parts: Mapping[str, ModelPart]) -> list[str]:
    """Return all names that a key of `init_map` may be: of parts, and what they begin with."""

    def prefixes() -> Iterator[str]:
        for name in parts:
            words = name.split(".")
            yield from (".".join(words[:count]) for count in range(len(words), 0, -1))

    return list(dict.fromkeys(prefixes()))
