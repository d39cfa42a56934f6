"""The same synthetic tasks as a task pack and as what users have instead, and an endless iterator of batches over each.

`write_*` make the files and `open_*` read them, in one process and thread unless said otherwise. All batches have the
content that gmeta's loader would give the same tasks (`differences` says where not), but for `Examples.row`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from gmeta.core.batch import Examples, TaskBatch
from gmeta.data.loader import TaskLoader
from gmeta.data.order import permutation
from gmeta.data.pack import PackWriter, open_pack
from gmeta.data.schema import Feature, PackSchema
from gmeta.data.shards import PackSplit, split_in_memory

FEATURES = 20
NUM_IDS = 20_000  # of each feature
TASKS_PER_BATCH = 128
TASKS_PER_CHUNK = 65_536  # 1.3 million rows, 117 MB: one shard, one Parquet file
TASKS_PER_ROW_GROUP = 1024  # 20 thousand rows
ROW_GROUPS_AT_ONCE = 8  # a window of gmeta's loader: 8192 tasks

NAMES = tuple(f"f{i}" for i in range(FEATURES))
SCHEMA = PackSchema(
    features=tuple(Feature(name=name, kind="categorical", num_ids=NUM_IDS, table=name) for name in NAMES),
    numeric=(),
    label="click",
    binary_label=True,
    task="user",
)

Arrays = dict[str, NDArray[np.generic]]
Batches = Iterator[TaskBatch]
Item = tuple[Tensor, Tensor, int]  # ids [n, features] int32, label [n], rows that are support


def support_of(num_rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return which rows are support, by the rule that every format knows: the first half of a task's rows, rounded
    up.
    """
    return num_rows - num_rows // 2


def chunks(num_tasks: int) -> Iterator[Arrays]:
    """Yield the data as the arrays of one shard after the other: tasks of 10 to 30 rows, 20 on average."""
    for first in range(0, num_tasks, TASKS_PER_CHUNK):
        rng = np.random.default_rng(first)
        sizes = rng.integers(10, 31, min(TASKS_PER_CHUNK, num_tasks - first))
        rows = int(sizes.sum())
        yield {
            "ids": rng.integers(0, NUM_IDS, (rows, FEATURES), dtype=np.int32),
            "label": rng.integers(0, 2, rows).astype(np.float32),
            **_task_arrays(first + np.arange(len(sizes)), sizes),
        }


def _task_arrays(task_id: NDArray[np.int64], sizes: NDArray[np.int64]) -> Arrays:
    rows = int(sizes.sum())
    return {
        "dense": np.empty((rows, 0), np.float32),
        "item_cold": np.zeros(rows, np.uint8),
        "task_id": task_id,
        "row_start": np.cumsum(sizes) - sizes,
        "num_support": support_of(sizes).astype(np.int32),
    }


def grouped(task: NDArray[np.int64], ids: NDArray[np.int32], label: NDArray[np.float32]) -> Arrays:
    """Return a shard's arrays from columns whose rows are sorted by task."""
    start = np.flatnonzero(np.diff(task, prepend=-1))
    return {"ids": ids, "label": label, **_task_arrays(task[start], np.diff(start, append=len(task)))}


def columns(arrays: Arrays) -> dict[str, NDArray[np.generic]]:
    """Return a flat table: task, position in it, label, one column a feature."""
    sizes = np.diff(arrays["row_start"], append=len(arrays["label"]))
    position = np.arange(len(arrays["label"])) - np.repeat(arrays["row_start"], sizes)
    ids = {name: np.ascontiguousarray(arrays["ids"][:, i]) for i, name in enumerate(NAMES)}
    return {"task": np.repeat(arrays["task_id"], sizes), "position": position, "label": arrays["label"], **ids}


# ------------------------------------------------------------------------------------------ task pack


def write_pack(root: Path, num_tasks: int) -> None:
    with PackWriter(root / "pack", SCHEMA) as writer:
        for arrays in chunks(num_tasks):
            writer.add_shard("train", arrays)
            task_id = arrays["task_id"]
            writer.write_tasks(task_id, pa.array(task_id), pa.array(["train"] * len(task_id)))
        writer.finish()


def open_taskpack(root: Path, **switches: bool) -> Batches:
    """Open gmeta's loader alone, without its thread."""
    return loader(open_pack(root / "pack").split("train"), **switches)


def loader(split: PackSplit, **switches: bool) -> TaskLoader[TaskBatch]:
    return TaskLoader(split, tasks_per_batch=TASKS_PER_BATCH, seed=0, prefetch=0, **switches)


# ------------------------------------------------------------------------------------------ shuffled CSV


def write_csv(root: Path, num_tasks: int) -> None:
    """Write one file, with rows in random order, as logs are."""
    parts = [columns(arrays) for arrays in chunks(num_tasks)]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    shuffled = np.random.default_rng(0).permutation(len(whole["task"]))
    pa.csv.write_csv(pa.table({name: column[shuffled] for name, column in whole.items()}), root / "log.csv")


def open_csv(root: Path) -> Batches:
    """Read the file (pyarrow, all cores), sort rows by task in memory; then gmeta's own gather, from memory."""
    types = pa.csv.ConvertOptions(column_types={"label": pa.float32(), **{name: pa.int32() for name in NAMES}})
    read = pa.csv.read_csv(root / "log.csv", convert_options=types)
    order = np.lexsort((read["position"].to_numpy(), read["task"].to_numpy()))
    ids = np.stack([read[name].to_numpy()[order] for name in NAMES], axis=1)
    arrays = grouped(read["task"].to_numpy()[order], ids, read["label"].to_numpy()[order])
    del read
    return loader(split_in_memory(arrays, SCHEMA))


# ------------------------------------------------------------------------------------------ Parquet


def write_parquet(root: Path, num_tasks: int) -> None:
    """Write rows sorted by task. Row groups hold whole tasks, and are large enough that their overhead does not
    count.
    """
    (root / "parquet").mkdir()
    for number, arrays in enumerate(chunks(num_tasks)):
        table = pa.table(columns(arrays)).drop_columns("position")
        bounds = [*arrays["row_start"][::TASKS_PER_ROW_GROUP].tolist(), len(arrays["label"])]
        with pq.ParquetWriter(root / "parquet" / f"{number:05d}.parquet", table.schema) as writer:
            for first, last in pairwise(bounds):
                writer.write_table(table.slice(first, last - first), row_group_size=last - first)


def open_parquet(root: Path) -> Batches:
    """Read row groups in random order, 8 at a time, with gmeta's order and gather within them."""
    files = [pq.ParquetFile(path) for path in sorted((root / "parquet").iterdir())]
    groups = [(file, group) for file in files for group in range(file.num_row_groups)]
    epoch = 0
    while True:
        order = permutation(len(groups), epoch).tolist()
        for first in range(0, len(order), ROW_GROUPS_AT_ONCE):
            chosen = [groups[i] for i in order[first : first + ROW_GROUPS_AT_ONCE]]
            read = pa.concat_tables([file.read_row_group(group, use_threads=False) for file, group in chosen])
            ids = np.stack([read[name].to_numpy() for name in NAMES], axis=1)
            window = split_in_memory(grouped(read["task"].to_numpy(), ids, read["label"].to_numpy()), SCHEMA)
            batches = loader(window)
            for _ in range(batches.batches_per_epoch):
                yield next(batches)
        epoch += 1


# ------------------------------------------------------------------------------------------ tasks as items


def collate(items: list[tuple[int, Item]]) -> TaskBatch:
    """Return a batch from (task id, item) pairs, as users write it: `pad_sequence` on each side."""
    sides = []
    for cut in (lambda n: slice(0, n), lambda n: slice(n, None)):
        ids = pad_sequence([item[0][cut(item[2])] for _, item in items], batch_first=True).long()
        label = pad_sequence([item[1][cut(item[2])] for _, item in items], batch_first=True)
        length = torch.tensor([len(item[1][cut(item[2])]) for _, item in items])
        mask = torch.arange(label.shape[1]) < length[:, None]
        sides.append(
            Examples(
                ids=dict(zip(NAMES, ids.permute(2, 0, 1).contiguous(), strict=True)),
                bags={},
                dense=torch.empty(*label.shape, 0),
                label=label,
                mask=mask,
                row=torch.full(label.shape, -1),
                item_cold=torch.zeros(label.shape, dtype=torch.bool),
            )
        )
    task_id = torch.tensor([task for task, _ in items])
    return TaskBatch(*sides, task_id=task_id, num_tasks_global=len(items), epoch=0, index=0)


def task_file(root: Path, task: int) -> Path:
    return root / "tasks" / f"{task // 1000:05d}" / f"{task:08d}.pt"


def write_files(root: Path, num_tasks: int) -> None:
    """Write one file a task by torch.save, with a thousand files in a directory."""
    for arrays in chunks(num_tasks):
        for task, item in _items(arrays):
            path = task_file(root, task)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(item, path)


def _items(arrays: Arrays) -> Iterator[tuple[int, Item]]:
    bounds = [*arrays["row_start"].tolist(), len(arrays["label"])]
    ids, label = torch.from_numpy(arrays["ids"]), torch.from_numpy(arrays["label"])
    for i, task in enumerate(arrays["task_id"].tolist()):
        first, last = bounds[i], bounds[i + 1]  # clone: torch.save writes the storage that a view sees
        yield task, (ids[first:last].clone(), label[first:last].clone(), int(arrays["num_support"][i]))


def open_files(root: Path) -> Batches:
    """Load each task of a batch by torch.load, with tasks in random order. MeLU's own code has four such files a
    task.
    """
    tasks = np.array(sorted(int(path.stem) for path in (root / "tasks").rglob("*.pt")))
    epoch = 0
    while True:
        order = tasks[permutation(len(tasks), epoch)].tolist()
        for first in range(0, len(order), TASKS_PER_BATCH):
            chosen = order[first : first + TASKS_PER_BATCH]
            yield collate([(task, torch.load(task_file(root, task), weights_only=True)) for task in chosen])
        epoch += 1


class InMemory(Dataset[tuple[int, Item]]):
    """The pack's arrays copied into memory; an item is a task."""

    def __init__(self, root: Path) -> None:
        split = open_pack(root / "pack").split("train")
        shards = split._shards
        self.ids, self.label = (torch.from_numpy(np.concatenate([s.read(n) for s in shards])) for n in ("ids", "label"))
        self.task_id, self.num_support = split.task_id.tolist(), split.num_support.tolist()
        self.start = [0, *np.cumsum(split.num_task_rows).tolist()]

    def __len__(self) -> int:
        return len(self.task_id)

    def __getitem__(self, i: int) -> tuple[int, Item]:
        rows = slice(self.start[i], self.start[i + 1])
        return self.task_id[i], (self.ids[rows], self.label[rows], self.num_support[i])


def open_dataloader(root: Path, workers: int) -> Batches:
    """Open a torch.utils.data.DataLoader over tasks in memory, with more processes where there are workers."""
    batches = DataLoader(
        InMemory(root),
        batch_size=TASKS_PER_BATCH,
        shuffle=True,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers else None,
    )
    while True:
        yield from batches


# ------------------------------------------------------------------------------------------ all of them

OPEN: Mapping[str, Callable[[Path], Batches]] = {
    "pack": open_taskpack,
    "pack, not sequential": partial(open_taskpack, sequential=False),
    "pack, no size buckets": partial(open_taskpack, size_buckets=False),
    "shuffled CSV, grouped in memory": open_csv,
    "one file a task (torch.save)": open_files,
    "Parquet by row groups": open_parquet,
    "DataLoader over memory, 0 workers": partial(open_dataloader, workers=0),
    "DataLoader over memory, 2 workers": partial(open_dataloader, workers=2),
}


def differences(batch: TaskBatch, split: PackSplit) -> list[str]:
    """Return the names of the fields in which `batch` is not what `split` gives for the same tasks; [] for a sound
    rival.
    """
    position = np.argsort(split.task_id)[np.searchsorted(np.sort(split.task_id), batch.task_id.numpy())]
    support, query, task_id = split.examples(position)
    found = [] if torch.equal(task_id, batch.task_id) else ["task_id"]
    for side, ours, theirs in (("support", support, batch.support), ("query", query, batch.query)):
        pairs = {name: (getattr(ours, name), getattr(theirs, name)) for name in ("dense", "label", "mask", "item_cold")}
        pairs |= {name: (ours.ids[name], theirs.ids[name]) for name in NAMES}
        same = {name: a.dtype == b.dtype and torch.equal(a, b) for name, (a, b) in pairs.items()}
        found += [f"{side}.{name}" for name, equal in same.items() if not equal]
    return found
