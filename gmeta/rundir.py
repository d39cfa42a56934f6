"""A run directory: one run, one writer, self-contained.

config.yaml  environment.json  schema.json  vocab/  metrics.jsonl  tensorboard/  checkpoints/  report.html
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from gmeta import checkpoint
from gmeta.config import (
    DenseConfig,
    EmbeddingConfig,
    LoaderConfig,
    MetaConfig,
    ModelConfig,
    ScheduleConfig,
    TrainConfig,
)
from gmeta.data.pack import open_pack
from gmeta.data.schema import PackSchema, pack_schema_from_json, schema_difference
from gmeta.parallel.collectives import raise_together
from gmeta.parallel.mesh import Mesh
from gmeta.tracking import METRICS_FILE, write_environment

FIXED_ON_RESUME = (
    "loss",
    "model",
    "meta",
    "seed",
    "precision",
    "embedding.optimizer",
    "loader.tasks_per_batch",
    "loader.window_batches",
    "loader.resample",
)
"""Settings that a checkpoint's tensors and position depend on; all others may change on resume."""


@contextmanager
def run_lock(run_dir: Path, mesh: Mesh) -> Iterator[None]:
    """Hold the run directory for this run; the lock dies with the process. Collective."""
    if mesh.rank != 0:
        raise_together(None, mesh)
        yield
        return
    error: Exception | None = None
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip()
            error = ValueError(f"{run_dir} is being written by another run (process {owner}): name another run_dir")
        raise_together(error, mesh)
        yield


def prepare_run_dir(config: TrainConfig, mesh: Mesh) -> Path | None:
    """Create the run directory, or find the checkpoint to resume from (None: start at step 0). Collective."""
    run_dir = Path(config.run_dir)
    error: Exception | None = None
    if mesh.rank == 0:
        try:
            _prepare(config, run_dir)
        except (ValueError, OSError) as problem:
            error = problem
    raise_together(error, mesh)
    if config.resume and checkpoint.steps_saved(run_dir / "checkpoints"):
        return checkpoint.resolve(run_dir / "checkpoints", "last")
    return None


def _prepare(config: TrainConfig, run_dir: Path) -> None:
    file = run_dir / "config.yaml"
    pack = open_pack(config.pack)
    has_run = file.exists() and (run_dir / METRICS_FILE).exists()
    if has_run and not config.resume:
        raise ValueError(f"{run_dir} already holds a run: continue it with --resume true, or name another run_dir")
    if has_run:
        _require_same(read_config(run_dir), config)
        if lines := schema_difference(read_schema(run_dir)[0], pack.schema):
            raise ValueError(f"{config.pack} does not fit the run to resume: " + "; ".join(lines))
    for leftover in (run_dir / "checkpoints").glob(".partial-*"):  # of a process that was killed in a save
        shutil.rmtree(leftover)
    file.write_text(yaml.safe_dump(asdict(config), sort_keys=False))
    (run_dir / "schema.json").write_text(
        json.dumps({"pack": pack.schema.to_json(), "data": pack.manifest["data_schema"]}, indent=1)
    )
    shutil.copytree(pack.path / "vocab", run_dir / "vocab", dirs_exist_ok=True)
    write_environment(run_dir / "environment.json")


def _require_same(before: TrainConfig, now: TrainConfig) -> None:
    def value(config: TrainConfig, key: str) -> Any:
        out: Any = asdict(config)
        for part in key.split("."):
            out = out[part]
        return out

    for key in FIXED_ON_RESUME:
        old, new = value(before, key), value(now, key)
        if old != new:
            raise ValueError(f"{key} is {new!r}, but the run to resume has {old!r}: start a new run_dir to change it")


def read_config(run_dir: Path) -> TrainConfig:
    """The resolved config of a run. ValueError when the directory holds no run."""
    file = run_dir / "config.yaml"
    if not file.exists():
        raise ValueError(f"{run_dir} holds no run (no config.yaml): name a directory made by `gmeta train`")
    values: dict[str, Any] = yaml.safe_load(file.read_text())
    sections = {
        "model": ModelConfig,
        "meta": MetaConfig,
        "embedding": EmbeddingConfig,
        "dense": DenseConfig,
        "loader": LoaderConfig,
        "schedule": ScheduleConfig,
    }
    return TrainConfig(**{k: sections[k](**v) if k in sections else v for k, v in values.items()})


def read_schema(run_dir: Path) -> tuple[PackSchema, dict[str, Any]]:
    """The pack schema and the raw data schema that a run was trained with."""
    values = json.loads((run_dir / "schema.json").read_text())
    return pack_schema_from_json(values["pack"]), values["data"]
