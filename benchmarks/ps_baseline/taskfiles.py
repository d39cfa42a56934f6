"""One file a task, as MeLU stores its data: written once from a pack, read one at a time.

    index.safetensors            per task: id, first row in the split, support rows, query rows
    000/000042.safetensors …     a task's rows, support first: ids, dense, label, and values and offsets of each bag

The format is the fastest of those tried (safetensors, read into memory in one piece), not MeLU's pickles.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from gmeta.core.batch import Examples
from gmeta.data.layout import many_valued, one_valued
from gmeta.data.order import keyed_hash
from gmeta.data.pack import open_pack
from gmeta.data.schema import PackSchema

Array = NDArray[Any]
_PER_FOLDER = 1000


@dataclass(frozen=True)
class StoredTask:
    """One task's file, and which of its rows are support and which query."""

    task_id: int
    arrays: dict[str, Array]
    support: Array  # int64 [S], rows within the file
    query: Array  # int64 [Q]


@dataclass(frozen=True)
class TaskFiles:
    """The training tasks of a pack, one file each."""

    folder: Path
    schema: PackSchema
    task_id: Array  # int64 [num_tasks]
    first_row: Array  # int64 [num_tasks], in the pack's split
    num_support: Array  # int64 [num_tasks]
    num_query: Array  # int64 [num_tasks]

    @property
    def num_tasks(self) -> int:
        """Return the number of tasks, each of which is a file."""
        return len(self.task_id)

    def sizes(self, tasks: Array) -> tuple[Array, Array]:
        """Return (support rows, query rows) of tasks, as gmeta's order wants them."""
        return self.num_support[tasks], self.num_query[tasks]

    def read(self, task: int, redraw: tuple[int, int] | None = None) -> StoredTask:
        """Read one task. `redraw=(seed, epoch)` draws its support anew, as `PackSplit.examples` does."""
        arrays = load_file(_task_file(self.folder, task))
        support, rows = int(self.num_support[task]), len(arrays["label"])
        chosen = np.arange(rows)
        if redraw is not None:
            chosen = np.argsort(keyed_hash(chosen + self.first_row[task], *redraw), kind="stable")
        return StoredTask(int(self.task_id[task]), arrays, np.sort(chosen[:support]), np.sort(chosen[support:]))


def open_task_files(pack_path: str | Path, folder: Path) -> TaskFiles:
    """Open the task files of a pack's training split in `folder`. They are written first where they are absent or of
    another pack.
    """
    pack = open_pack(pack_path)
    stamp = json.dumps(pack.manifest, sort_keys=True, default=str)
    if not (folder / "pack.json").exists() or (folder / "pack.json").read_text() != stamp:
        if folder.exists() and not (folder / "index.safetensors").exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds something else than task files: name another folder with --task_files")
        partial = folder.with_name(f".partial-{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        _write(pack_path, partial)
        (partial / "pack.json").write_text(stamp)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    index = load_file(folder / "index.safetensors")
    return TaskFiles(folder, pack.schema, **index)


def _write(pack_path: str | Path, folder: Path) -> None:
    pack = open_pack(pack_path)
    split = pack.split("train")
    folder.mkdir(parents=True)
    first_row = np.empty(split.num_tasks, np.int64)
    for task in range(split.num_tasks):
        support, query, _ = split.examples(np.array([task]))
        first_row[task] = int((support if support.row.numel() else query).row[0, 0])
        file = _task_file(folder, task)
        file.parent.mkdir(exist_ok=True)
        save_file(_arrays(support, query, pack.schema), file)
    everything = np.arange(split.num_tasks)
    num_support, num_query = split.sizes(everything)
    sizes = {"num_support": num_support, "num_query": num_query}
    index = {"task_id": split.task_id, "first_row": first_row, **sizes}
    save_file(
        {name: np.ascontiguousarray(value, np.int64) for name, value in index.items()}, folder / "index.safetensors"
    )


def _task_file(folder: Path, task: int) -> Path:
    return folder / f"{task // _PER_FOLDER:03d}" / f"{task:06d}.safetensors"


def _arrays(support: Examples, query: Examples, schema: PackSchema) -> dict[str, Array]:
    """Return one task's rows, support before query; `examples` of one task has no padding."""
    sides = (support, query)
    rows = support.label.shape[1] + query.label.shape[1]
    columns = [np.concatenate([side.ids[name][0].numpy() for side in sides]) for name in one_valued(schema)]
    arrays: dict[str, Array] = {
        "ids": np.stack(columns).astype(np.int32) if columns else np.empty((0, rows), np.int32),  # feature-major
        "dense": np.concatenate([side.dense[0].numpy() for side in sides]),
        "label": np.concatenate([side.label[0].numpy() for side in sides]),
    }
    for name in many_valued(schema):
        lengths = np.concatenate([side.bags[name].lengths[0].numpy() for side in sides])
        arrays[f"{name}.values"] = np.concatenate([side.bags[name].values.numpy() for side in sides]).astype(np.int32)
        arrays[f"{name}.offsets"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return arrays
