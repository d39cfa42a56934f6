"""First rows from Parquet files: `embedding.pretrained`, a raw id and a vector a row.

Files are read a batch of rows at a time, by every worker, each of which keeps the rows that it owns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from gmeta.core.errors import nearest
from gmeta.data.identity import ids_of_values, vocabulary_values
from gmeta.data.pack import TaskPack
from gmeta.data.schema import OOV
from gmeta.embedding.table import FusedTable
from gmeta.parallel.collectives import raise_together
from gmeta.training.run import Run

_BATCH_ROWS = 1 << 16
VALUE, VECTOR = "value", "vector"


def set_pretrained_rows(run: Run, new: Mapping[str, Tensor]) -> None:
    """Set the rows of the tables that `embedding.pretrained` names; collective.

    Of a table in `new`, which a bundle has filled, only those ids, int64 [n]; of others all that the file has. Raises
    ValueError for a table that is not there or hashed, and for a file without the columns, with vectors of another
    width or without a number, or with an id twice.
    """
    for table, file in run.config.embedding.pretrained.items():
        error: Exception | None = None
        try:
            taken, unknown, asked = _fill(run, table, Path(file), new.get(table))
        except ValueError as problem:
            error = problem
        raise_together(error, run.state.mesh)
        run.log.say(
            f"embedding.pretrained: {taken:,} of {asked:,} ids of {table} begin with vectors of {file}; "
            f"{unknown:,} of its rows are of other ids"
        )


def _fill(run: Run, table: str, file: Path, new: Tensor | None) -> tuple[int, int, int]:
    """Return how many ids were set, how many rows of the file are of no id of the table, and how many ids may be."""
    key = f"embedding.pretrained.{table}"
    tables = {name: fused for fused in run.state.system.tables.fused.values() for name in fused.offsets}
    if table not in tables:
        raise ValueError(f"{key} is {str(file)!r}: the model reads no table {table!r}; {nearest(table, tables)}")
    if table not in run.pack.manifest["vocab"]:
        raise ValueError(
            f"{key} is {str(file)!r}: table {table!r} is hashed, its rows are of several ids; leave it out"
        )
    fused, known = tables[table], _vocabulary(run.pack, table)
    may = np.ones(len(known) + 1, bool) if new is None else np.zeros(len(known) + 1, bool)
    if new is not None:
        may[new.numpy()] = True
    seen, taken, unknown = np.zeros(len(known) + 1, bool), 0, 0
    for values, vectors in _vectors(key, file, fused.dim):
        found = ids_of_values(values, known, OOV)[1:]
        here = found != OOV
        ids = found[here]
        unknown += int((~here).sum())
        _require_once(file, ids, seen, known)
        seen[ids] = True
        chosen = may[ids]
        taken += int(chosen.sum())
        _set(fused, table, ids[chosen], vectors[here][chosen])
    return taken, unknown, int(may[1:].sum()) - (known.null_count if new is None else 0)


def _set(fused: FusedTable, table: str, ids: np.ndarray, vectors: np.ndarray) -> None:
    if len(ids):
        fused.set_ids(table, torch.from_numpy(ids), torch.from_numpy(vectors))


def _vocabulary(pack: TaskPack, table: str) -> pa.Array:
    return vocabulary_values(pack.vocab_file(table), "copy the pack again").cast(pa.string())


def _require_once(file: Path, ids: np.ndarray, seen: np.ndarray, known: pa.Array) -> None:
    each, count = np.unique(ids, return_counts=True)
    twice = each[(count > 1) | seen[each]]
    if len(twice):
        raise ValueError(f"{file} has {known[int(twice[0]) - 1].as_py()!r} twice: keep one of its vectors")


def _vectors(key: str, file: Path, dim: int) -> Iterator[tuple[pa.Array, np.ndarray]]:
    """Yield raw ids, as text [n], and their vectors [n, dim]."""
    cure = f"give a Parquet file with the columns {VALUE} (raw id) and {VECTOR} ({dim} numbers)"
    row = 0
    try:
        with pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            if missing := [name for name in (VALUE, VECTOR) if name not in schema.names]:
                raise ValueError(f"{key}: {file} has no column {missing[0]!r}: {cure}")
            kinds = {name: schema.field(name).type for name in (VALUE, VECTOR)}
            if not (pa.types.is_integer(kinds[VALUE]) or _is_text(kinds[VALUE])):
                raise ValueError(f"{key}: {VALUE} of {file} is {kinds[VALUE]}: write raw ids as text or whole numbers")
            if not (_is_list(kinds[VECTOR]) and pa.types.is_floating(kinds[VECTOR].value_type)):
                raise ValueError(f"{key}: {VECTOR} of {file} is {kinds[VECTOR]}: {cure}")
            for batch in parquet.iter_batches(_BATCH_ROWS, columns=[VALUE, VECTOR]):
                values, vectors = batch.column(VALUE), batch.column(VECTOR)
                sizes = pc.fill_null(pc.list_value_length(vectors), 0).to_numpy(zero_copy_only=False)
                if (sizes != dim).any():
                    at = int(np.flatnonzero(sizes != dim)[0])
                    raise ValueError(
                        f"{key}: row {row + at} of {file} has {sizes[at]} numbers, rows have {dim}: {cure}"
                    )
                numbers = pc.fill_null(vectors.flatten().cast(pa.float64()), np.nan)
                found = numbers.to_numpy(zero_copy_only=False).reshape(-1, dim)
                if not np.isfinite(found).all():
                    at = int(np.flatnonzero(~np.isfinite(found).all(1))[0])
                    raise ValueError(
                        f"{key}: the vector of {values[at].as_py()!r} in {file} has a number that is missing or not "
                        "finite: leave the id out, it then starts as usual"
                    )
                yield values.cast(pa.string()), found
                row += len(values)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{key}: {file} cannot be read ({error}): {cure}") from None


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))
