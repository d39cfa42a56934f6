"""`gmeta predict`: adapt to the tasks of a support file and score the rows of a query file; both hold raw values."""

from __future__ import annotations

import sys
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from gmeta.config.evaluation import PredictConfig
from gmeta.core.files import replacing
from gmeta.data.coverage import unknown_columns, unknown_warning
from gmeta.data.prepare.encoder import encode_tables
from gmeta.data.shards import split_in_memory
from gmeta.data.sources import Connection, find_files, literal, open_file, reading, require_free
from gmeta.evaluation.score import Floats, score_split, to_predictions
from gmeta.parallel.mesh import Mesh, close_mesh, open_mesh
from gmeta.recommender.build import load_system
from gmeta.runs.data import require_clicks, require_own_vocabularies
from gmeta.runs.directory import read_config, read_schema

SCORES = ("score", "score_before")
"""Columns that `predict` adds to the query's own, which hold the task's key and all else that names a row."""


def predict(config: PredictConfig) -> int:
    """Run `gmeta predict`; writes the query file's columns with `score` (after adaptation) and `score_before`.

    Raises:
        ValueError: a file does not fit the run's schema (with file, row and column); a column of the query file has the
            name of a score; `out` is one of the inputs; the run's vocabularies are not those that it was trained with;
            or there are several processes.
    """
    _check_files(config)
    mesh = open_mesh(config.device)
    try:
        if mesh.world_size > 1:
            raise ValueError(f"predict runs in one process, found {mesh.world_size}: start it without torchrun")
        _predict(config, mesh)
    finally:
        close_mesh(mesh)
    return 0


def _check_files(config: PredictConfig) -> None:
    """Refuse, before any work, an output that cannot be written beside its inputs."""
    out = Path(config.out)
    for key, given in (("support", config.support), ("query", config.query)):
        for file in find_files([given]):
            if out.exists() and out.samefile(file):
                raise ValueError(f"out {out} would overwrite {key} {file}: name another file")
    with duckdb.connect() as con:
        for file in find_files([config.query]):
            require_free(open_file(con, file).columns, SCORES, file)


def _predict(config: PredictConfig, mesh: Mesh) -> None:
    run_dir = Path(config.run_dir)
    trained = read_config(run_dir)
    schema, data_schema = read_schema(run_dir)
    require_own_vocabularies(run_dir)
    # first, because it finds out whether the schemas, by which rows are read, are what the checkpoint was saved with
    system, _, step = load_system(run_dir, config.checkpoint, mesh, trust_model=config.trust_model)
    found = encode_tables(config.support, config.query, data_schema, run_dir / "vocab", schema)
    require_clicks(found.arrays["label"], trained.loss, config.support)
    split = split_in_memory(found.arrays, schema)
    unknown = unknown_columns({f.name: split.feature_ids(f.name) for f in schema.features}, schema.task)
    if (warning := unknown_warning(unknown, f"{config.support} and {config.query}")) is not None:
        print(f"predict: {warning}", file=sys.stderr)
    scores = score_split(
        system, split, tasks_per_batch=config.tasks_per_batch, max_support_rows=trained.loader.max_support_rows
    )
    assert scores is not None  # one process
    columns = {
        "score": to_predictions(scores.after, trained.loss),
        "score_before": to_predictions(scores.before, trained.loss),
    }
    num_rows = _write(config, found.query_row[scores.row], columns, step)
    with_support = int((found.arrays["num_support"] > 0).sum())
    print(
        f"{num_rows:,} rows of {len(found.keys):,} tasks ({with_support:,} with support) scored by step {step}: "
        f"{config.out}"
    )


def _copy(con: Connection, statement: str) -> None:
    """Run a COPY of rows that were read before. OSError where DuckDB cannot write."""
    try:
        con.execute(statement)
    except duckdb.IOException as error:
        raise OSError(str(error)) from error


def _write(config: PredictConfig, query_row: np.ndarray, columns: dict[str, Floats], step: int) -> int:
    """Write the query file's columns, in its order of rows, beside the scores; the file is whole or absent.

    A Parquet file tells in its metadata which checkpoint scored it.
    """
    order = np.argsort(query_row)
    out = Path(config.out)
    with duckdb.connect() as con:
        (file,) = find_files([config.query])
        part = open_file(con, file)
        con.register("scores", pa.table({"__row": query_row[order] + 1, **{k: v[order] for k, v in columns.items()}}))
        query = f"""SELECT q.* EXCLUDE (__row), {", ".join(f"s.{name}" for name in SCORES)}
                    FROM ({part.query}) q JOIN scores s USING (__row) ORDER BY __row"""
        kind = f"PARQUET, KV_METADATA {{step: '{step}'}}" if out.suffix == ".parquet" else "CSV, HEADER"
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with replacing(out) as partial, reading(part.file):
                # DuckDB's own temporary file would have a name that nobody removes after a kill.
                _copy(con, f"COPY ({query}) TO {literal(str(partial))} (FORMAT {kind}, USE_TMP_FILE false)")
        except OSError as error:
            raise ValueError(f"cannot write {out}: {error}; free space there or name another file") from error
    return len(query_row)
