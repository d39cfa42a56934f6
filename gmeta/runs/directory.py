"""The run directory, which holds one run, has one writer, and needs nothing outside.

config.yaml  environment.json  run_id  schema.json  vocab/  metrics.jsonl  tensorboard/  checkpoints/  report.html

`schema.json` holds the pack schema with the identity of its data (`pack`), the raw data schema (`data`), and checksums
of the pack's tasks and splits (`tasks`), of the rows of each split (`rows`) and of its manifest (`manifest`). Where an
older pack is replayed, `replay` is the checksum of its manifest.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

import yaml

from gmeta.config.deprecated import upgrade
from gmeta.config.parse import parse_mapping
from gmeta.config.train import TrainConfig
from gmeta.core.files import read_mapping, replacing, write_text
from gmeta.core.nested import flat
from gmeta.data.identity import identity_difference, identity_of
from gmeta.data.pack import TaskPack, open_pack
from gmeta.data.schema import PackSchema, data_schema_from_json, pack_schema_from_json
from gmeta.data.schema_difference import schema_difference
from gmeta.models.registry import with_younger_args
from gmeta.parallel.collectives import broadcast_from_rank_0, on_rank_0, raise_together
from gmeta.parallel.mesh import Mesh
from gmeta.runs import checkpoint
from gmeta.runs.log import METRICS_FILE, write_environment

FIXED_ON_RESUME = (
    "loss",
    "model.",
    "meta.",
    "seed",
    "precision",
    "embedding.optimizer",
    "embedding.generator.",
    "loader.tasks_per_batch",
    "loader.window_batches",
    "loader.resample",
    "loader.max_support_rows",
    "loader.episode_rows",
    "replay.fraction",
    "next_item.",
)
"""Settings that a checkpoint's tensors and position depend on; all others may change on resume."""

FREE_ON_RESUME = ("meta.engine", "meta.recompute")
"""Settings among FIXED_ON_RESUME that only say how the same numbers are computed."""

_RUN_ID = "run_id"


@contextmanager
def run_lock(run_dir: Path, mesh: Mesh) -> Iterator[None]:
    """Hold the run directory for this run; the lock dies with the process. Collective."""
    if mesh.rank != 0:
        raise_together(None, mesh)
        yield
        return
    with ExitStack() as stack:
        error: Exception | None = None
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            _lock(stack.enter_context((run_dir / ".lock").open("a+")), run_dir)
        except ValueError as problem:
            error = problem
        except OSError as problem:
            error = ValueError(f"cannot write {run_dir}: {problem.strerror or problem}; name another run_dir")
        raise_together(error, mesh)
        yield


def _lock(file: TextIO, run_dir: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ValueError(
            f"{run_dir} is being written by another run (process {file.read().strip()}): "
            "wait for it, end it, or name another run_dir"
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()


def prepare_run_dir(config: TrainConfig, mesh: Mesh, notes: Sequence[str] = ()) -> Path | None:
    """Create the run directory, or find the checkpoint to resume from (None: start at step 0). Collective.

    `notes` are lines for people at the top of config.yaml.

    Rank 0 decides for all: its launcher may have started it more often, or later, than those of the others. An elastic
    run always goes on from what its directory holds, because whoever schedules its job again knows nothing of it.
    """
    run_dir = Path(config.run_dir)
    saved = on_rank_0(lambda: _prepare(config, run_dir, notes), mesh)
    step = int(broadcast_from_rank_0(saved if saved is not None else -1, mesh))
    return None if step < 0 else checkpoint.step_dir(run_dir / "checkpoints", step)


def recorded_settings(run_dir: Path, *, goes_on: bool) -> dict[str, Any] | None:
    """Return the settings, as they were saved, of the run that is gone on with; None where one begins."""
    checkpoints = run_dir / "checkpoints"
    saved = checkpoint.steps_saved(checkpoints) if goes_on else []
    if not saved:
        return None
    settings: dict[str, Any] = checkpoint.read_state(checkpoint.step_dir(checkpoints, saved[-1]))["config"]
    return settings


def _prepare(config: TrainConfig, run_dir: Path, notes: Sequence[str]) -> int | None:
    """Check what is there, then write what a run directory holds from its start. Return the last step that was
    saved.
    """
    pack, older = open_pack(config.pack), open_pack(config.replay.pack) if config.replay.pack else None
    checkpoints = run_dir / "checkpoints"
    saved = checkpoint.steps_saved(checkpoints)
    goes_on = config.resume or config.elastic.enabled
    if (saved or (run_dir / METRICS_FILE).exists()) and not goes_on:
        raise ValueError(f"{run_dir} already holds a run: continue it with --resume true, or name another run_dir")
    if saved:
        last = checkpoint.step_dir(checkpoints, saved[-1])
        checkpoint.verify(last)
        state = checkpoint.read_state(last)
        _require_same(state, config)
        if (run_dir / "schema.json").exists():
            _require_own_schema(run_dir, state, last)
        _require_same_data(state, run_dir, pack)
        if (run_dir / "schema.json").exists() and read_replay_checksum(run_dir) != _manifest_checksum(older):
            raise ValueError(
                f"replay.pack is {config.replay.pack!r}, which is not what run {run_dir} replays: give that pack, or a "
                "copy of it; to replay another, name a new run_dir"
            )
    for leftover in checkpoints.glob(".partial-*"):  # of a process that was killed in a save
        shutil.rmtree(leftover)
    # Paths are absolute, so that the run can be evaluated from anywhere.
    replay = config.replay if older is None else replace(config.replay, pack=str(older.path.resolve()))
    resolved = replace(config, pack=str(pack.path.resolve()), replay=replay)
    head = "".join(f"# {line}\n" for line in notes)
    write_text(run_dir / "config.yaml", head + yaml.safe_dump(asdict(resolved), sort_keys=False))
    _write_data(run_dir, pack, older, keep=bool(saved))
    write_environment(run_dir / "environment.json")
    if not (run_dir / _RUN_ID).exists():
        write_text(run_dir / _RUN_ID, f"{run_dir.name}-{uuid.uuid4().hex[:12]}\n")
    return saved[-1] if saved else None


def _write_data(run_dir: Path, pack: TaskPack, older: TaskPack | None, keep: bool) -> None:
    """Write schema.json and the vocabularies; with `keep` only what is missing, for checkpoints rely on it."""
    if not (keep and (run_dir / "schema.json").exists()):
        schemas = {
            "pack": pack.identity().schema.to_json(),
            "data": pack.manifest["data_schema"],
            "tasks": pack.tasks_checksum(),
            "rows": pack.rows_checksums(),
            "manifest": pack.manifest["xxh3"],
        }
        if older is not None:
            schemas["replay"] = _manifest_checksum(older)
        write_text(run_dir / "schema.json", json.dumps(schemas, indent=1))
    (run_dir / "vocab").mkdir(exist_ok=True)
    for file in pack.vocabulary_files():
        target = run_dir / "vocab" / file.name
        if not (keep and target.exists()):
            with replacing(target) as partial:
                shutil.copyfile(file, partial)


def _manifest_checksum(pack: TaskPack | None) -> str | None:
    return None if pack is None else str(pack.manifest["xxh3"])


def _require_same(state: dict[str, Any], now: TrainConfig) -> None:
    """Raise ValueError naming the first setting that a checkpoint cannot go on with."""
    for key in ("sequential", "size_buckets"):
        if state["config"].get("loader", {}).get(key, True) is False:
            raise ValueError(
                f"the run to resume was trained with loader.{key} off, an order of batches that only "
                "benchmarks/study still has: start a new run_dir"
            )
    for key, before, wanted in _changed_settings(state, now):
        raise ValueError(f"{key} is {wanted!r}, but the run to resume has {before!r}: start a new run_dir to change it")


def _changed_settings(state: dict[str, Any], now: TrainConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yield the settings that a checkpoint's numbers depend on and that are others now: key, value then, value now."""
    # A setting younger than the checkpoint did then what its default does now.
    defaults = asdict(TrainConfig(pack="", run_dir=""))
    saved, _ = upgrade(state["config"], saved=True)
    younger = _younger_args(saved.get("model", {}))
    before, wanted = flat(defaults) | younger | flat(saved), younger | flat(asdict(now))
    for settings in (before, wanted):  # a run that lists no feature reads all of its pack
        settings["model.features"] = settings["model.features"] or [f["name"] for f in state["schema"]["features"]]
    if not (before.get("replay.pack") and wanted["replay.pack"]):  # the pack is compared by itself
        before["replay.fraction"] = wanted["replay.fraction"]
    for key in dict.fromkeys([*wanted, *before]):
        fixed = key.startswith(FIXED_ON_RESUME) and key not in FREE_ON_RESUME
        if fixed and before.get(key) != wanted.get(key):
            yield key, before.get(key), wanted.get(key)


def _younger_args(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that a model got after a checkpoint was saved, with their defaults, by key. An argument that
    the checkpoint has is none: a config without it says something else.
    """
    if not model.get("name"):
        return {}
    had = model.get("args", {})
    found = {key: value for key, value in with_younger_args(model["name"], had).items() if key not in had}
    return flat({"model": {"args": found}})


def open_checkpoint(run_dir: Path, which: str, mesh: Mesh) -> Path:
    """Return a run's checkpoint `which`, once it is verified and the run's own files say what it says; collective.

    Raises ValueError where a file of the checkpoint is damaged, or config.yaml or schema.json are not those that it was
    saved with: weights of one shape would load all the same, and give other predictions.
    """

    def find() -> int:
        path = checkpoint.find_checkpoint(run_dir / "checkpoints", which)
        checkpoint.verify(path)
        state = checkpoint.read_state(path)
        for key, before, now in _changed_settings(state, read_config(run_dir)):
            raise ValueError(
                f"{run_dir / 'config.yaml'} has {key} {now!r}, but {path} was trained with {before!r}: {_CURE}"
            )
        _require_own_schema(run_dir, state, path)
        return checkpoint.step_of(path)

    step = broadcast_from_rank_0(on_rank_0(find, mesh) or 0, mesh)
    return checkpoint.step_dir(run_dir / "checkpoints", int(step))


def _require_own_schema(run_dir: Path, state: dict[str, Any], path: Path) -> None:
    """Raise ValueError with what differs, unless schema.json says what the checkpoint at `path` says. What an earlier
    release did not record is not compared.
    """
    schema, data_schema = read_schema(run_dir)
    saved = pack_schema_from_json(state["schema"])
    lines = schema_difference(saved, schema)
    if not lines and state.get("data_schema") not in (None, data_schema):
        lines = ["its raw data schema is another"]
    if not lines and saved.identity is not None:
        identity = identity_of(schema, data_schema, run_dir / "vocab").schema.identity or {}
        tables = dict.fromkeys([*saved.identity, *identity])
        lines = [f"what an id of {t!r} means is another" for t in tables if saved.identity.get(t) != identity.get(t)]
    if lines:
        raise ValueError(f"{run_dir / 'schema.json'} is not what {path} was saved with: {'; '.join(lines)}: {_CURE}")


def _require_same_data(state: dict[str, Any], run_dir: Path, pack: TaskPack) -> None:
    """Raise ValueError with what differs, where the pack is not what the checkpoint was trained on.

    The schema is the checkpoint's own copy: schema.json may be lost.
    """
    data_schema, tasks, rows = pack.manifest["data_schema"], None, None
    if (run_dir / "schema.json").exists():
        _, data_schema = read_schema(run_dir)
        tasks, rows = read_tasks_checksum(run_dir), read_rows_checksums(run_dir)
    ours = identity_of(pack_schema_from_json(state["schema"]), data_schema, run_dir / "vocab")
    lines = identity_difference(ours, pack.identity())
    lines = lines or tasks_difference(tasks, pack.tasks_checksum()) or rows_difference(rows, pack.rows_checksums())
    if lines:
        raise ValueError(
            f"{pack.path} is not the data that run {run_dir} was trained on: {'; '.join(lines)}. "
            "Resume with the run's own pack, or a copy of it; to train on other data, name a new run_dir"
        )


def read_run_id(run_dir: Path) -> str:
    """Return a name that no other run has, nor this one when it is repeated in a new directory."""
    return (run_dir / _RUN_ID).read_text().strip()


_CURE = "restore it, or take the one that a checkpoint's state.json holds"


def read_settings(run_dir: Path) -> dict[str, Any]:
    """Return what a run's config.yaml holds. Raises ValueError when there is no run, or the file is damaged."""
    file = run_dir / "config.yaml"
    if not file.exists():
        raise ValueError(f"{run_dir} holds no run (no config.yaml): name a directory made by `gmeta train`")
    return read_mapping(file, _CURE)


_KEPT_CONFIGS = 32
_configs: dict[str, TrainConfig] = {}
"""What a config.yaml holds -> its config: a command asks for that of a run up to ten times, and parsing takes 0.1 s."""


def read_config(run_dir: Path) -> TrainConfig:
    """Return the resolved config of a run. Raises ValueError when there is no run, or the file is damaged."""
    values, _ = upgrade(read_settings(run_dir), saved=True)
    told = repr(values)
    if told not in _configs:
        try:
            config = parse_mapping(TrainConfig, values, "config.yaml")
        except ValueError as error:
            raise ValueError(f"{run_dir / 'config.yaml'} is no config of a run ({error}): {_CURE}") from None
        if len(_configs) >= _KEPT_CONFIGS:
            _configs.clear()
        _configs[told] = config
    return deepcopy(_configs[told])


def read_schema(run_dir: Path) -> tuple[PackSchema, dict[str, Any]]:
    """Return the pack schema and the raw data schema that a run was trained with."""
    values = read_mapping(run_dir / "schema.json", _CURE)
    try:
        if values["data"] != {}:  # of a pack that was not made of raw rows
            data_schema_from_json(values["data"])
        return pack_schema_from_json(values["pack"]), values["data"]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{run_dir / 'schema.json'} is no schema of a run ({error}): {_CURE}") from None


def read_tasks_checksum(run_dir: Path) -> str | None:
    """Return the checksum of the tasks and splits that a run was trained with; None where it recorded none."""
    tasks = read_mapping(run_dir / "schema.json", _CURE).get("tasks")
    if tasks is not None and not isinstance(tasks, str):
        raise ValueError(f"{run_dir / 'schema.json'} is no schema of a run (tasks is {tasks!r}): {_CURE}")
    return tasks


def read_rows_checksums(run_dir: Path) -> dict[str, str] | None:
    """Return split -> checksum of the rows that a run was trained with; None where it recorded none."""
    rows = read_mapping(run_dir / "schema.json", _CURE).get("rows")
    if rows is not None and not isinstance(rows, dict):
        raise ValueError(f"{run_dir / 'schema.json'} is no schema of a run (rows is {rows!r}): {_CURE}")
    return rows


def read_replay_checksum(run_dir: Path) -> str | None:
    """Return the checksum of the manifest of the pack that a run replays; None where it replays none."""
    found = read_mapping(run_dir / "schema.json", _CURE).get("replay")
    return None if found is None else str(found)


def tasks_difference(ours: str | None, theirs: str | None) -> list[str]:
    """Say that two checksums of tasks differ; nothing where they are equal, or one is not known."""
    if ours is None or theirs is None or ours == theirs:
        return []
    return ["its tasks, or the splits they lie in, are others"]


def rows_difference(ours: dict[str, str] | None, theirs: dict[str, str] | None) -> list[str]:
    """Say in which splits the rows of the same tasks differ; nothing where they are equal, or one is not known."""
    if ours is None or theirs is None or ours == theirs:
        return []
    splits = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    return [f"its rows are others: the same tasks have other labels, features or support in {', '.join(splits)}"]
