"""`gmeta predict`: adapt to a support file's tasks, score a query file's rows. Raw ids in, scores out."""

from __future__ import annotations

import os
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
from rich.console import Console

from gmeta.config.evaluation import PredictConfig
from gmeta.data.prepare.encode import encode_tables
from gmeta.data.shards import split_in_memory
from gmeta.data.sources import find_files, literal, open_file, require_free
from gmeta.evaluation.score import Floats, score, to_predictions
from gmeta.parallel.mesh import Mesh, close_mesh, open_mesh
from gmeta.recommender.system import load_system
from gmeta.runs.directory import read_config, read_schema

SCORES = ("score", "score_before")


def predict(config: PredictConfig) -> int:
    """Run `gmeta predict`; writes the query's rows with `score` (after adaptation) and `score_before`.

    Raises ValueError for files that do not fit the run's schema, with file, row and column; for a query file whose
    columns clash with the scores'; for an `out` that is one of the inputs; and in one of several processes.
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
    """ValueError for an output that cannot be written beside its inputs, before any work."""
    out = Path(config.out)
    for key, given in (("support", config.support), ("query", config.query)):
        for file in find_files([given]):
            for written in (out, _partial(out)):
                if written.exists() and written.samefile(file):
                    raise ValueError(f"out {out} would overwrite {key} {file}: name another file")
    with duckdb.connect() as con:
        for file in find_files([config.query]):
            require_free(open_file(con, file).columns, SCORES, file)


def _partial(out: Path) -> Path:
    """Where `out` is written before it gets its name."""
    return out.with_name(f".partial-{out.name}")


def _predict(config: PredictConfig, mesh: Mesh) -> None:
    run_dir = Path(config.run_dir)
    trained = read_config(run_dir)
    schema, data_schema = read_schema(run_dir)
    found = encode_tables(config.support, config.query, data_schema, run_dir / "vocab", schema)
    label = found.arrays["label"]
    if trained.loss == "bce" and not np.isin(label, (0, 1)).all():
        wrong = label[~np.isin(label, (0, 1))][0]
        raise ValueError(f"{config.support} has label {wrong:g}: the run was trained on clicks, which are 0 or 1")
    system, _ = load_system(run_dir, config.checkpoint, mesh)
    split = split_in_memory(found.arrays, schema)
    scores = score(system, split, tasks_per_batch=config.tasks_per_batch)
    assert scores is not None  # one process
    columns = {
        "score": to_predictions(scores.after, trained.loss),
        "score_before": to_predictions(scores.before, trained.loss),
    }
    num_rows = _write(config, found.query_row[scores.row], columns)
    with_support = int((found.arrays["num_support"] > 0).sum())
    Console().print(
        f"{num_rows:,} rows of {len(found.keys):,} tasks ({with_support:,} with support) scored: {config.out}"
    )


def _write(config: PredictConfig, query_row: np.ndarray, columns: dict[str, Floats]) -> int:
    """The query file's columns, in its order, beside the scores; whole or absent."""
    order = np.argsort(query_row)
    out = Path(config.out)
    partial = _partial(out)
    with duckdb.connect() as con:
        (file,) = find_files([config.query])
        part = open_file(con, file)
        con.register("scores", pa.table({"__row": query_row[order] + 1, **{k: v[order] for k, v in columns.items()}}))
        query = f"""SELECT q.* EXCLUDE (__row), {", ".join(f"s.{name}" for name in SCORES)}
                    FROM ({part.query}) q JOIN scores s USING (__row) ORDER BY __row"""
        kind = "PARQUET" if out.suffix == ".parquet" else "CSV, HEADER"
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            try:
                # Beside what a killed process left, DuckDB would write to a third name, which nobody removes.
                con.execute(f"COPY ({query}) TO {literal(str(partial))} (FORMAT {kind}, USE_TMP_FILE false)")
                os.replace(partial, out)
            finally:
                partial.unlink(missing_ok=True)
        except (OSError, duckdb.IOException) as error:
            raise ValueError(f"cannot write {out}: {error}; free space there or name another file") from error
    return len(query_row)
