"""`gmeta export-states`: what the tasks of a support file have learned, as rows of a Parquet file for a feature store.

A row is a task: its key in the run's task column, `num_support`, `version`, and a column of lists for each tensor of
its fast weights. `states` have the names and layouts of `FastWeights.state_dict`, in rows of the file's own metadata:

    {"format": "gmeta-states", "format_version": 1, "version": the model's, "task": the task column,
     "tensors": {column: {"key": name in state_dict, "shape": of an element}}}

A list holds elements of `shape` one after the other. There is one of a fixed-size tensor, one a support row of a
low-rank update (padding is left out), and one a row of an embedding table that the task has of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmeta.config.export import ExportStatesConfig
from gmeta.core.files import replacing
from gmeta.data.prepare.encoder import EncodedTables, Encoder
from gmeta.data.prepare.parts import DealtParts, deal_tasks, open_parts
from gmeta.data.sources import find_files
from gmeta.meta.fast_weights import FastWeights
from gmeta.parallel.collectives import on_rank_0
from gmeta.parallel.mesh import Mesh, close_mesh, open_mesh
from gmeta.recommender.recommender import Recommender, _chunks, require_finite
from gmeta.runs.data import require_clicks
from gmeta.runs.directory import read_schema
from gmeta.serving.files import PATIENCE_S, same_checkpoint, scratch_folder, sum_over_parts

FORMAT, FORMAT_VERSION = "gmeta-states", 1
_METADATA = b"gmeta"
_RESULTS = "states"
_OURS = ("num_support", "version")
_OF_ROWS = ("inputs", "gradients")
_OF_PAIRS = ("pairs", "deltas")


def export_states(config: ExportStatesConfig) -> int:
    """Run `gmeta export-states`.

    Raises:
        ValueError: what `Recommender.adapt` refuses, with file, row and column; `out` is the input; vectors of a model
            that solves for no last layer; or a disk is full.
    """
    out = Path(config.out)
    for file in find_files([config.support]):
        if out.exists() and out.samefile(file):
            raise ValueError(f"out {out} would overwrite support {file}: name another file")
    mesh = open_mesh(config.device, PATIENCE_S)
    export_states_on(config, mesh)
    close_mesh(mesh)
    return 0


def export_states_on(config: ExportStatesConfig, mesh: Mesh) -> None:
    """Do what `export_states` does, on the ranks of a mesh; collective."""
    source = Path(config.run_dir)
    which = same_checkpoint(source, config.checkpoint, mesh)
    rec = Recommender(source, which, factory=None, trust_model=config.trust_model, mesh=Mesh(device=mesh.device))
    if config.format == "vectors" and not rec.system.learner.adapted.last_layer:
        raise ValueError(
            f"format is 'vectors', but {source} solves for no last layer (meta.adapt {rec.config.meta.adapt}): its "
            "tasks have no posterior; export --format states"
        )
    schema, data_schema = read_schema(source)
    if schema.task in _OURS:
        raise ValueError(f"the task column is called {schema.task!r}, a name that gmeta uses itself: rename the column")
    with scratch_folder(Path(config.out), mesh) as folder:
        deal = partial(deal_tasks, config.support, None, data_schema, schema, folder)
        on_rank_0(partial(deal, memory_limit=config.memory_limit), mesh)
        on_rank_0((folder / _RESULTS).mkdir, mesh)
        parts = open_parts(folder)
        encoder = Encoder(data_schema, source / "vocab", schema, parts.all_files())

        def adapt(number: int) -> NDArray[np.int64]:
            encoded = encoder.dealt(parts.files(number), query=False)
            require_clicks(encoded.arrays["label"], rec.config.loss, config.support)
            _write_part(rec, encoded, config.format, _part_file(folder, number))
            return np.array([len(encoded.keys)])

        counts = sum_over_parts(parts, mesh, 1, adapt)
        on_rank_0(partial(_join, config, parts, rec.version, counts), mesh)


def read_states(file: str | Path, tasks: Collection[str] | None = None) -> dict[str, Any]:
    """Return the states in a file of `gmeta export-states`, of all tasks or of some, for `gmeta.load(…).restore`.

    Raises ValueError for another file, and for one of vectors, which are not all that scores need.
    """
    try:
        stored = pq.ParquetFile(file)
        known = json.loads((stored.schema_arrow.metadata or {}).get(_METADATA, b"{}"))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}): give a file of `gmeta export-states`") from None
    if known.get("format") != FORMAT or known.get("format_version", 0) > FORMAT_VERSION:
        raise ValueError(
            f"{file} is of format {known.get('format')} {known.get('format_version')}, expected {FORMAT} up to "
            f"{FORMAT_VERSION}: export the states again"
        )
    tensors, column = known["tensors"], known["task"]
    if "mean" in tensors:
        raise ValueError(f"{file} holds vectors, without their spread: export --format states to restore tasks")
    keys, num_support, parts = [], [], []
    for number in range(stored.num_row_groups):
        table = stored.read_row_group(number)
        if tasks is not None:
            table = table.filter(pc.is_in(table[column], pa.array(list(tasks), pa.string())))
        if table.num_rows:
            keys += table[column].to_pylist()
            num_support += table["num_support"].to_pylist()
            parts.append(_state(table, tensors))
    counts = torch.tensor(num_support, dtype=torch.int64)
    return {"version": known["version"], "keys": keys, "num_support": counts, "fast_weights": parts, "seed": None}


def _part_file(folder: Path, number: int) -> Path:
    return folder / _RESULTS / f"{number}.parquet"


def _write_part(rec: Recommender, encoded: EncodedTables, kind: str, file: Path) -> None:
    """Adapt to a part's tasks and write their states; those that are adapted together are a row group."""
    writer: pq.ParquetWriter | None = None
    for keys, num_support, fast in _adapted(rec, encoded):
        columns, tensors = _vectors(fast) if kind == "vectors" else _columns(fast, num_support)
        known = {"format": FORMAT, "format_version": FORMAT_VERSION, "version": rec.version}
        known |= {"task": rec.schema.task, "tensors": tensors}
        table = pa.table(
            {
                rec.schema.task: pa.array(keys, pa.string()),
                "num_support": num_support,
                "version": pa.array([rec.version] * len(keys), pa.string()),
                **columns,
            }
        ).replace_schema_metadata({_METADATA: json.dumps(known)})
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _adapted(rec: Recommender, encoded: EncodedTables) -> Iterator[tuple[list[str], NDArray[np.int64], FastWeights]]:
    with rec._rows(encoded) as (at, split):
        for tasks in _chunks(at.num_support, at.num_query, split.cells_per_row(at)):
            support, _, _ = split.gather(at[tasks])
            fast, keys = rec._adapt(support), encoded.keys[tasks]
            require_finite(fast, keys)
            yield keys, at.num_support[tasks], fast


def _vectors(fast: FastWeights) -> tuple[dict[str, pa.Array], dict[str, Any]]:
    assert fast.posterior is not None  # else the command was refused
    mean = fast.posterior.mean
    return {"mean": _fixed(mean)}, {"mean": {"key": None, "shape": list(mean.shape[1:])}}


def _columns(fast: FastWeights, num_support: NDArray[np.int64]) -> tuple[dict[str, pa.Array], dict[str, Any]]:
    """Return a column of lists for each tensor of fast weights, and what the metadata says of it."""
    columns, tensors = {}, {}
    for key, tensor in fast.state_dict().items():
        if key == "num_tasks":
            continue
        kind, *name = json.loads(key)
        if kind in _OF_ROWS:
            columns[key], shape = _of_rows(tensor, num_support), tensor.shape[2:]
        elif kind in _OF_PAIRS:
            task = fast.pairs[name[0]][:, 0].cpu()
            values = tensor.cpu()[task.argsort(stable=True)]
            values = values[:, 1] if kind == "pairs" else values
            counts = torch.bincount(task, minlength=fast.num_tasks).numpy()
            columns[key], shape = _lists(values, counts), values.shape[1:]
        else:
            columns[key], shape = _fixed(tensor), tensor.shape[1:]
        tensors[key] = {"key": key, "shape": list(shape)}
    return columns, tensors


def _fixed(tensor: Tensor) -> pa.Array:
    """Return a list of one size for each task of a tensor [T, …]."""
    return pa.FixedSizeListArray.from_arrays(
        pa.array(tensor.detach().cpu().numpy().reshape(-1)), max(1, tensor[0].numel())
    )


def _of_rows(tensor: Tensor, num_support: NDArray[np.int64]) -> pa.Array:
    """Return lists of the rows of a tensor [T, R, n] that are no padding. R is the longest support, or a multiple."""
    rows, longest = tensor.shape[1], int(num_support.max(initial=0))
    counts = num_support * (rows // longest) if longest and rows % longest == 0 else np.full(len(num_support), rows)
    kept = torch.arange(rows) < torch.from_numpy(counts)[:, None]
    return _lists(tensor.detach().cpu()[kept], counts)


def _lists(values: Tensor, counts: NDArray[np.int64]) -> pa.Array:
    """Return a list for each task of its next `counts` elements of values [N, …]."""
    size = math.prod(values.shape[1:])
    ends = np.cumsum(np.concatenate([[0], counts * size]))
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values.numpy().reshape(-1)))


def _state(table: pa.Table, tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Return the `FastWeights.state_dict` of a table's tasks."""
    state = {"num_tasks": torch.tensor([table.num_rows])}
    for column, about in tensors.items():
        kind, *_ = json.loads(about["key"])
        lists, shape = table[column].combine_chunks(), about["shape"]
        values = torch.from_numpy(pc.list_flatten(lists).to_numpy(zero_copy_only=False).copy()).reshape(-1, *shape)
        counts = torch.from_numpy(pc.list_value_length(lists).to_numpy().astype(np.int64)) // max(1, math.prod(shape))
        if kind in _OF_ROWS:
            padded = values.new_zeros(len(counts), int(counts.max()), *shape)
            padded[torch.arange(padded.shape[1]) < counts[:, None]] = values
            values = padded
        elif kind == "pairs":
            values = torch.stack([torch.repeat_interleave(counts), values], 1)
        state[about["key"]] = values
    return state


def _join(config: ExportStatesConfig, parts: DealtParts, version: str, counts: NDArray[np.int64]) -> None:
    """Write the parts' tasks as one file, which is whole or absent."""
    out = Path(config.out)
    with replacing(out) as partial_file:
        writer: pq.ParquetWriter | None = None
        for number in parts.numbers:
            part = pq.ParquetFile(_part_file(parts.folder, number))
            writer = writer or pq.ParquetWriter(partial_file, part.schema_arrow)
            for group in range(part.num_row_groups):
                writer.write_table(part.read_row_group(group))
        if writer is not None:
            writer.close()
    print(f"{counts[0]:,} tasks adapted by version {version}: {out}")
