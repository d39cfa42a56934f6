"""`gmeta predict`: adapt to the tasks of a support file and score the rows of a query file; both hold raw values.

Files may have any number of rows. They are dealt to parts of whole tasks on disk, which are scored one by one, and the
scores are then joined to the query file's rows in its order.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gmeta.config.evaluation import PredictConfig
from gmeta.config.train import TrainConfig
from gmeta.core.files import replacing
from gmeta.data.coverage import nearly_unknown, unknown_counts, unknown_warning
from gmeta.data.prepare.encoder import Encoder
from gmeta.data.prepare.parts import DealtParts, deal_tasks, joined_with_results, open_parts
from gmeta.data.schema import PackSchema
from gmeta.data.shards import split_in_memory
from gmeta.data.sources import Connection, database, find_files, literal, open_file, reading, require_free
from gmeta.evaluation.score import score_split, to_predictions
from gmeta.parallel.collectives import on_rank_0
from gmeta.parallel.mesh import Mesh, close_mesh, open_mesh
from gmeta.recommender.build import load_system
from gmeta.recommender.model_texts import ModelTexts
from gmeta.recommender.system import System
from gmeta.runs.data import require_clicks, require_own_vocabularies, require_scores
from gmeta.runs.directory import read_config, read_schema
from gmeta.serving.files import PATIENCE_S, same_checkpoint, scratch_folder, sum_over_parts

SCORES = ("score", "score_before")
"""Columns that `predict` adds to the query's own, which hold the task's key and all else that names a row."""
_RESULTS = "scores"


def score_columns(schema: PackSchema) -> tuple[str, ...]:
    """Return `SCORES`; of several labels each of them with the label's name, as `score_click`."""
    if not schema.labels:
        return SCORES
    return tuple(f"{name}_{label.name}" for name in SCORES for label in schema.labels)


def predict(config: PredictConfig) -> int:
    """Run `gmeta predict`; writes the query file's columns with `score` (after adaptation) and `score_before`, of
    several labels `score_<label>` and so on.

    Raises:
        ValueError: a file does not fit the run's schema (with file, row and column); a column of the query file has the
            name of a score; `out` is one of the inputs; the run's vocabularies are not those that it was trained with;
            or a disk is full.
    """
    _check_files(config)
    mesh = open_mesh(config.device, PATIENCE_S)
    predict_on(config, mesh)
    close_mesh(mesh)
    return 0


def _check_files(config: PredictConfig) -> None:
    """Refuse, before any work, an output that cannot be written beside its inputs."""
    out = Path(config.out)
    for key, given in (("support", config.support), ("query", config.query)):
        for file in find_files([given]):
            if out.exists() and out.samefile(file):
                raise ValueError(f"out {out} would overwrite {key} {file}: name another file")
    taken: tuple[str, ...] = SCORES
    with suppress(ValueError):  # a run that cannot be read is told of when it is opened
        taken = score_columns(read_schema(Path(config.run_dir))[0])
    with database() as con:
        for file in find_files([config.query]):
            require_free(open_file(con, file).columns, taken, file)


@dataclass(frozen=True)
class _Scorer:
    """Scores parts with the whole model, on this rank alone."""

    config: PredictConfig
    trained: TrainConfig
    schema: PackSchema
    system: System
    encoder: Encoder
    texts: ModelTexts
    parts: DealtParts

    @property
    def num_counts(self) -> int:
        """Return how many numbers `score` returns."""
        return 3 + 2 * len(self.schema.features)

    def score(self, number: int) -> NDArray[np.int64]:
        """Score a part and write its scores; return the numbers of rows, of tasks, of those with support, and
        `unknown_counts`.
        """
        found = self.encoder.dealt(self.parts.files(number), query=True)
        require_clicks(found.arrays["label"], self.trained.loss, self.config.support)
        with self.texts.known(found) as arrays:
            split = split_in_memory(arrays, self.schema)
            scores = score_split(
                self.system,
                split,
                tasks_per_batch=self.config.tasks_per_batch,
                max_support_rows=self.trained.loader.max_support_rows,
                before=self.config.before,
            )
        assert scores is not None  # the system knows no other rank
        row = found.query_row[scores.row]
        order = np.argsort(row)
        columns = (scores.after, scores.before) if self.config.before else (scores.after,)
        losses = self.schema.losses(self.trained.loss)
        of_labels = (logits.reshape(len(order), -1)[order, k] for logits in columns for k in range(len(losses)))
        names = zip(score_columns(self.schema), of_labels, losses * 2, strict=False)
        predictions = {name: to_predictions(logits, loss) for name, logits, loss in names}
        folder = self.parts.folder / _RESULTS
        pq.write_table(pa.table({"__row": row[order] + 1, **predictions}), folder / f"{number}.parquet")
        unknown = unknown_counts({f.name: split.feature_ids(f.name) for f in self.schema.features})
        tasks = [len(found.keys), int((found.arrays["num_support"] > 0).sum())]
        sizes = [len(row), *(tasks if number < self.parts.first_continued else (0, 0))]
        return np.concatenate([sizes, unknown.reshape(-1)])


def predict_on(config: PredictConfig, mesh: Mesh) -> None:
    """Do what `predict` does, on the ranks of a mesh; collective."""
    run_dir = Path(config.run_dir)
    trained = read_config(run_dir)
    schema, data_schema = read_schema(run_dir)
    require_scores(run_dir)
    require_own_vocabularies(run_dir)
    # first, because it finds out whether the schemas, by which rows are read, are what the checkpoint was saved with
    which = same_checkpoint(run_dir, config.checkpoint, mesh)
    system, _, step = load_system(run_dir, which, Mesh(device=mesh.device), trust_model=config.trust_model)
    with scratch_folder(Path(config.out), mesh) as folder:
        deal = partial(deal_tasks, config.support, config.query, data_schema, schema, folder)
        on_rank_0(partial(deal, memory_limit=config.memory_limit), mesh)
        on_rank_0((folder / _RESULTS).mkdir, mesh)
        parts = open_parts(folder)
        encoder = Encoder(data_schema, run_dir / "vocab", schema, parts.all_files())
        texts = ModelTexts(system.learner, schema)
        scorer = _Scorer(config, trained, schema, system, encoder, texts, parts)
        counts = sum_over_parts(parts, mesh, scorer.num_counts, scorer.score)
        on_rank_0(partial(_finish, config, schema, folder, counts, step), mesh)


def _finish(config: PredictConfig, schema: PackSchema, folder: Path, counts: NDArray[np.int64], step: int) -> None:
    """Write the output, and say what was scored."""
    unknown = nearly_unknown([f.name for f in schema.features], counts[3:].reshape(-1, 2), schema.task)
    if (warning := unknown_warning(unknown, f"{config.support} and {config.query}")) is not None:
        print(f"predict: {warning}", file=sys.stderr)
    _write(config, folder, step)
    print(f"{counts[0]:,} rows of {counts[1]:,} tasks ({counts[2]:,} with support) scored by step {step}: {config.out}")


def _copy(con: Connection, statement: str) -> None:
    """Run a COPY of rows that were read before. OSError where DuckDB cannot write."""
    try:
        con.execute(statement)
    except duckdb.IOException as error:
        raise OSError(str(error)) from error


def _write(config: PredictConfig, folder: Path, step: int) -> None:
    """Write the query file's columns, in its order of rows, beside the scores; the file is whole or absent.

    A Parquet file tells in its metadata which checkpoint scored it.
    """
    out = Path(config.out)
    with joined_with_results(folder, folder / _RESULTS, memory_limit=config.memory_limit) as con:
        (file,) = find_files([config.query])
        part = open_file(con, file)
        query = f"""SELECT q.* EXCLUDE (__row), r.* EXCLUDE (__row)
                    FROM ({part.query}) q JOIN results r USING (__row) ORDER BY __row"""
        kind = f"PARQUET, KV_METADATA {{step: '{step}'}}" if out.suffix == ".parquet" else "CSV, HEADER"
        try:
            with replacing(out) as partial_file, reading(part.file):
                # DuckDB's own temporary file would have a name that nobody removes after a kill.
                _copy(con, f"COPY ({query}) TO {literal(str(partial_file))} (FORMAT {kind}, USE_TMP_FILE false)")
        except OSError as error:
            raise ValueError(f"cannot write {out}: {error}; free space there or name another file") from error
