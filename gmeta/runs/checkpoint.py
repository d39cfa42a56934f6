"""Checkpoints hold tensors as safetensors, through torch.distributed.checkpoint, and all else as JSON.

    checkpoints/step-00001000/
        shard-00001-model-00001-of-00001.safetensors …   one a rank: dense tensors once, each rank's table rows
        state.json       step, progress, loader position, torch's generator, config, schema, ledger of an elastic group
        checksums.json   size and xxh3 of every other file

A checkpoint is whole or absent: it is written beside its place, synced and renamed. It loads on any world
size, because tables are `DTensor`s and everything else is replicated. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from gmeta.core.files import read_mapping, sync
from gmeta.data.layout import checksum_file
from gmeta.parallel.collectives import naming_lost_peers, raise_together
from gmeta.parallel.mesh import Mesh, barrier
from gmeta.sharding.checkpoint import PartitionWriter, StreamReader, metadata_differences

FORMAT_VERSION = 3
"""2 drew the short batch of an epoch from its last window, 3 draws it from all tasks: positions mean other batches."""
_STATE = "state.json"
_CHECKSUMS = "checksums.json"


def step_dir(root: Path, step: int) -> Path:
    """Return the directory of the checkpoint after `step` steps."""
    return root / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's directory was saved after."""
    return int(path.name.removeprefix("step-"))


def steps_saved(root: Path) -> list[int]:
    """Return the steps that have a whole checkpoint under `root`, ascending. Other names than `step_dir`'s are passed
    over.
    """
    names = {path.name for path in root.glob("step-*")}
    steps = {int(name[5:]) for name in names if name[5:].isdecimal()}
    return sorted(step for step in steps if step_dir(root, step).name in names)


def save(root: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], mesh: Mesh) -> Path:
    """Save a checkpoint; collective. Returns its directory once it is whole on disk.

    Raises ValueError where the disk refuses (full, read-only); the half-written directory is removed.
    """
    final = step_dir(root, step)
    partial = root / f".partial-{final.name}"
    if mesh.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier(mesh)
    error: Exception | None = None
    try:
        _dcp_save(partial, tensors, mesh)
    except OSError as problem:
        error = problem
    except CheckpointException as problem:  # it is a BaseException, and raised on all ranks alike
        error = _first_failure(problem)
    if mesh.rank == 0 and error is None:
        error = _seal(partial, final, {"format_version": FORMAT_VERSION, "step": step, **state})
    if mesh.rank == 0 and error is not None:
        shutil.rmtree(partial, ignore_errors=True)
    if error is not None:
        error = ValueError(
            f"cannot save {final}: {error}; free space there, then go on from the last checkpoint with --resume true"
        )
    raise_together(error, mesh)
    return final


def _dcp_save(path: Path, tensors: dict[str, Tensor], mesh: Mesh) -> None:
    writer = PartitionWriter(str(path))
    with _single_process_is_fine(), naming_lost_peers(mesh):
        dcp_save(
            {name: t.contiguous() for name, t in sorted(tensors.items())},
            storage_writer=writer,
            process_group=mesh.control_group,
            no_dist=mesh.control_group is None,
        )


def _seal(partial: Path, final: Path, state: dict[str, Any]) -> OSError | None:
    """Write state and checksums, sync, rename; returns the error if the disk refuses."""
    try:
        (partial / _STATE).write_text(json.dumps(state, indent=1))
        files = sorted(path for path in partial.iterdir() if path.is_file())
        sums = {path.name: {"bytes": path.stat().st_size, "xxh3": checksum_file(path)} for path in files}
        (partial / _CHECKSUMS).write_text(json.dumps(sums, indent=1))
        for path in [*files, partial / _CHECKSUMS, partial]:
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        sync(final.parent)
    except OSError as error:
        return error
    return None


def _first_failure(error: CheckpointException) -> Exception:
    """Return what the lowest failing rank raised, if that is the disk's fault; anything else is our bug and goes up."""
    cause = error.failures[min(error.failures)][0]
    if isinstance(cause, OSError | SafetensorError) or "I/O error" in str(cause):
        return ValueError(str(cause))
    raise error


CURE = "delete this checkpoint and resume from an older one"


def verify(path: Path) -> None:
    """Check that a checkpoint has the files that it was saved with, and size and checksum of each; ValueError names the
    one that is damaged, missing or new.
    """
    listed = _checksums(path)
    for name in listed:
        _verify_file(path, name, listed)
    # a loader would take tensors from any file that is there
    if strays := {file.name for file in path.iterdir()} - listed.keys() - {_CHECKSUMS}:
        raise ValueError(f"checkpoint {path} was not saved with {min(strays)}: remove that file")


def _checksums(path: Path) -> dict[str, Any]:
    listed = read_mapping(path / _CHECKSUMS, CURE)
    if _STATE not in listed:
        raise ValueError(f"{path / _CHECKSUMS} is damaged (it does not list {_STATE}): {CURE}")
    return listed


def _verify_file(path: Path, name: str, listed: dict[str, Any]) -> None:
    file, expected = path / name, listed[name]
    if not isinstance(expected, dict) or not file.is_file():
        raise ValueError(f"checkpoint {path} is not whole ({name} is missing): {CURE}")
    if file.stat().st_size != expected.get("bytes"):
        raise ValueError(f"{file} has {file.stat().st_size} bytes, expected {expected.get('bytes')}: {CURE}")
    if checksum_file(file) != expected.get("xxh3"):
        raise ValueError(f"{file} is damaged (its checksum differs): {CURE}")


def read_state(path: Path) -> dict[str, Any]:
    """Return the JSON part of a checkpoint, which was verified first.

    Raises ValueError where it is damaged or edited, of another step than the directory, or of a newer format.
    """
    _verify_file(path, _STATE, _checksums(path))
    state = read_mapping(path / _STATE, CURE)
    version = state.get("format_version")
    if not isinstance(version, int):
        raise ValueError(f"{path / _STATE} is damaged (it names no format): {CURE}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"checkpoint {path} has format {version}; this gmeta reads up to {FORMAT_VERSION}: upgrade gmeta"
        )
    if state.get("step") != step_of(path):
        raise ValueError(f"checkpoint {path} is of step {state.get('step')}: give the directory its own name again")
    return state


def load_tensors(path: Path, tensors: dict[str, Tensor], mesh: Mesh) -> None:
    """Fill `tensors` in place from a checkpoint; collective. Only what they need is read, straight into them.

    Raises ValueError naming the tensors that are missing or have another shape (a checkpoint of another model).
    """
    reader = StreamReader(str(path))
    stored = reader.read_metadata().state_dict_metadata
    # Checkpoints of earlier releases hold no buffers: they stay as the model made them.
    tensors = {name: t for name, t in tensors.items() if name in stored or not name.startswith("buffers.")}
    if shown := metadata_differences(stored, tensors):
        raise ValueError(f"checkpoint {path} is of another model: {shown}")
    with _single_process_is_fine(), naming_lost_peers(mesh):
        dcp_load(tensors, storage_reader=reader, process_group=mesh.control_group, no_dist=mesh.control_group is None)


def stored_tensors(path: Path) -> dict[str, Tensor]:
    """Return an empty tensor for each that a checkpoint holds, but for table rows, by name: for `load_tensors`."""
    stored = StreamReader(str(path)).read_metadata().state_dict_metadata
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("tables.")
    }


@contextmanager
def _single_process_is_fine() -> Iterator[None]:
    """Silence the warning of DCP that there is no process group: world size 1 is an ordinary case here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        yield


def prune(root: Path, keep_last: int, best: int | None) -> None:
    """Delete all but the last `keep_last` checkpoints and the best one."""
    steps = steps_saved(root)
    for step in steps[: max(0, len(steps) - keep_last)]:
        if step != best:
            leaving = (
                root / f".partial-{step_dir(root, step).name}"
            )  # so that no checkpoint is ever seen without some of its files
            os.rename(step_dir(root, step), leaving)
            shutil.rmtree(leaving)


def find_checkpoint(root: Path, which: str) -> Path:
    """Return the directory of checkpoint `which`: best, last, or a step number.

    The newest checkpoint knows which is the best. Where it is damaged, a warning says so, and the newest one that is
    whole is asked. Raises ValueError that lists what exists.
    """
    steps = steps_saved(root)
    if not steps:
        raise ValueError(f"{root} holds no checkpoint: train the run first, or name another run_dir")
    if which == "last":
        return step_dir(root, steps[-1])
    if which == "best":
        best = _best_step(root, steps)
        if best is not None and best not in steps:
            warnings.warn(f"{step_dir(root, best)}, the best checkpoint, is not there: taking the last", stacklevel=2)
        return step_dir(root, best if best in steps else steps[-1])
    if which.isdigit() and int(which) in steps:
        return step_dir(root, int(which))
    raise ValueError(f"checkpoint is {which!r}: must be best, last or one of {steps}")


def _best_step(root: Path, steps: list[int]) -> int | None:
    """Return the best step by the newest checkpoint that can be read; a damaged last one hides no healthy best."""
    for step in reversed(steps):
        path = step_dir(root, step)
        try:
            best = read_state(path).get("best_step")
        except ValueError as error:
            if path.exists():  # else a run that is training has removed it
                warnings.warn(f"an older checkpoint has to say which is the best: {error}", stacklevel=3)
            continue
        return best if isinstance(best, int) else None
    return None
