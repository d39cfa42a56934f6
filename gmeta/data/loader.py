"""Batches of tasks: this rank's part of each global batch of a pack's split, in an order that resumes anywhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

import numpy as np
import pyarrow.parquet as pq
import torch

from gmeta.core.batch import BatchSplit, TaskBatch, joined
from gmeta.data.episodes import Episodes
from gmeta.data.order import Tasks, batches_of_pass, ends_within, num_batches, tasks_per_rank, window_of_batches
from gmeta.data.pack import TaskPack
from gmeta.data.replay import Replay
from gmeta.data.scenarios import scenario_of_tasks
from gmeta.data.shards import PackSplit, TaskRows

_T = TypeVar("_T")
_Position = tuple[int, int, int]  # epoch, index of the batch in it (from `batches_per_epoch` on: in its tail), step


MAX_CELLS = 1 << 20
"""Padded rows, support and query together, that a rank computes at once in training and evaluation.

Only batches with a very long task have more: 64 tasks reach it where one has 16,000 rows. A step holds some kilobytes
a row, and of each value of a sequence that is not pooled, which counts as a row.
"""


@dataclass(frozen=True)
class SplitSpec:
    """How to split a batch over the ranks, and each rank's tasks into micro-batches: one entry a rank."""

    fractions: Sequence[float] | None = None  # of the batch's rows, in proportion to these; None: equal
    micro_batches: tuple[int, ...] | None = None  # of about equally many tasks; None: one
    drop_after_s: float | None = None  # see `BatchSplit`


def loader_thread() -> ThreadPoolExecutor:
    """Start a thread for batches ahead, whose torch operations use no other thread.

    OpenMP would give it a second team of threads, which spin on the cores that the step needs: measured on 2 cores, the
    index of 2,560 rows of 20 features took 18 ms of CPU instead of 12. Calling threads keep their number.
    """
    torch.get_num_threads()  # this thread's number is settled by now, before the new thread sets another for itself
    return ThreadPoolExecutor(1, "gmeta-loader", initializer=torch.set_num_threads, initargs=(1,))


class TaskLoader(Generic[_T]):
    """Iterates over this rank's tasks of every global batch of `tasks_per_batch` tasks.

    With `shuffle` it never ends: epoch after epoch, each in its own order. Without, it makes one pass, in stored
    order, and is then back at its start. `for batch in loader` goes on where the last loop stopped. `resample` draws
    the support of every task anew each epoch. The loader hands out `transform(batch)`, or the TaskBatch without one.

    `max_support_rows` keeps only the last so many support rows of every task, in stored order; 0 keeps all.

    With `episode_rows`, a longer task counts as several (see `Episodes`), and positions in the split are those of
    episodes; 0 is off.

    `replay` has tasks of an older pack, and which share of each epoch they are (see `Replay`); needs `shuffle`.

    `by_scenario` cuts windows into batches scenario by scenario (see `window_of_batches`). ValueError where the pack
    has no scenarios, or a task rows of several.

    `max_cells` bounds what a rank computes at once: tasks times the longest support and query among them, and times
    what the longest row counts where sequences are not pooled (`PackSplit.cells_per_row`). Without
    `shuffle` the pass is then in an order that pads little, and batches may have fewer tasks: `batches_of_pass`. With
    `shuffle` the tasks of a batch are given, and a rank that would exceed the bound gets them as several micro-batches
    (`TaskBatch.parts`); `ends_within` says where the cuts are. One task alone may still exceed the bound.

    `sequential=False` draws every window from the whole split, not from blocks of consecutive tasks, and
    `size_buckets=False` fills batches without regard to sizes: other orders, there to measure what the two buy.

    With `prefetch` > 0 that many batches are made ahead, transform included, in one background thread. An error there
    is raised by the `next` that asks for its batch, and no batch is made after it. `close`, or leaving the loader's
    `with` block, ends the thread. Batches that were asked for are made to their end, because a collective `transform`
    must run equally often on every rank.

    Raises ValueError where `tasks_per_batch` is below `world_size`: some rank would never have work.
    """

    def __init__(
        self,
        split: PackSplit,
        *,
        tasks_per_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        window_batches: int = 64,
        sequential: bool = True,
        size_buckets: bool = True,
        prefetch: int = 2,
        resample: bool = False,
        max_support_rows: int = 0,
        episode_rows: int = 0,
        replay: tuple[PackSplit, float] | None = None,
        by_scenario: bool = False,
        max_cells: int | None = None,
        transform: Callable[[TaskBatch], _T] | None = None,
    ) -> None:
        if tasks_per_batch < world_size:
            raise ValueError(
                f"loader.tasks_per_batch is {tasks_per_batch}, world size is {world_size}: a batch needs a task for "
                f"each worker; raise tasks_per_batch to {world_size} or more, or start fewer workers"
            )
        self._split = split if replay is None else split.followed_by(replay[0])
        self._tasks_per_batch = tasks_per_batch
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._shuffle = shuffle
        self._window_batches = window_batches
        self._sequential = sequential
        self._size_buckets = size_buckets
        self._prefetch = prefetch
        self._resample = resample
        self._max_support_rows = max_support_rows
        self._episodes = Episodes(self._split, episode_rows) if episode_rows else None
        self._scenario_of = scenario_of_tasks(split, None if replay is None else replay[0]) if by_scenario else None
        self.num_tasks = self._count(split)
        self.replay: Replay | None = None
        if replay is not None:
            self.replay = Replay(seed, self.num_tasks, self._count(self._split) - self.num_tasks, replay[1])
            self.num_tasks = self.replay.num_tasks
        self._max_cells = max_cells
        self._transform = transform
        self._split_by: Callable[[int], SplitSpec] | None = None
        self._pass = [] if shuffle else self._batches_of_pass()
        self.batches_per_epoch = num_batches(self.num_tasks, tasks_per_batch) if shuffle else len(self._pass)
        self.has_short_batch = shuffle and self.num_tasks % tasks_per_batch > 0
        self._position: _Position = (0, 0, 0)  # of the batch that `next` hands out
        self._tail: list[int] = []  # tasks of this epoch that were put back: positions in the split
        self._window: tuple[int, int, Tasks, TaskRows] | None = None  # epoch, window and tasks of the last one made
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[Future[_T]] = deque()
        self._next_ahead: _Position = (0, 0, 0)
        self._error: BaseException | None = None  # of the thread

    def __iter__(self) -> TaskLoader[_T]:
        return self

    def __next__(self) -> _T:
        if self._position[1] >= self.batches_per_epoch and not self._tail:
            self._position = self._next_ahead = (self._position[0] + 1, 0, self._position[2])
        if self._ended(self._position):
            self.close()
            self._position = (0, 0, 0)
            raise StopIteration
        tail = self._position[1] >= self.batches_per_epoch
        item = self._make(self._position) if self._prefetch == 0 or tail else self._take_ahead()
        if tail:
            del self._tail[: self._tasks_per_batch]
        self._position = self._after(self._position)
        return item

    @property
    def epochs_done(self) -> int:
        """Return the number of epochs whose batches were all handed out, with no task put back since."""
        epoch, index, _ = self._position
        return epoch + (index >= self.batches_per_epoch and not self._tail)

    @property
    def epoch_finished(self) -> bool:
        """Whether the next batch is the first of an epoch."""
        _, index, _ = self._position
        return index == 0 or (index >= self.batches_per_epoch and not self._tail)

    @property
    def between_epochs(self) -> bool:
        """Whether the next batch is the first of an epoch, or of its tail: all before it must be finished by then."""
        return self._position[1] == 0 or self._position[1] >= self.batches_per_epoch

    def split_by(self, spec: Callable[[int], SplitSpec]) -> None:
        """Split batches as `spec(step)` says from now on (the first batch ever is of step 0).

        It is asked in the thread that makes the batch, and may wait there. The loader then no longer reads ahead beyond
        the end of an epoch: `put_back` may still give it tasks that nobody finished, for the epoch's tail.
        """
        self.close()
        self._split_by = spec

    def put_back(self, tasks: Tasks) -> None:
        """Have tasks of this epoch (positions in the split) come again in it: they were handed out and not finished."""
        self._tail += tasks.tolist()

    def state_dict(self) -> dict[str, Any]:
        """Return {"epoch", "index"} of the batch that `next` hands out, whatever has been prefetched.

        Where tasks were put back, it also has "step", the number of batches before it, and "tail", the tasks that are
        to come again.
        """
        epoch, index, step = self._position
        if index >= self.batches_per_epoch and not self._tail:
            epoch, index = epoch + 1, 0
        state: dict[str, Any] = {"epoch": epoch, "index": index}
        if self._tail:
            state["tail"] = list(self._tail)
        if step != epoch * self.batches_per_epoch + index:
            state["step"] = step
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position, before or amid iteration. Raises ValueError where an epoch has no such batch."""
        epoch, index, tail = int(state["epoch"]), int(state["index"]), list(state.get("tail", ()))
        if epoch < 0 or index < 0 or (index >= self.batches_per_epoch and not tail):
            raise ValueError(
                f"loader state is epoch {epoch}, index {index}: an epoch has {self.batches_per_epoch} batches; it was "
                "saved with another pack, split or tasks_per_batch"
            )
        self.close()
        self._position = (epoch, index, int(state.get("step", epoch * self.batches_per_epoch + index)))
        self._tail = tail

    def close(self) -> None:
        """Drop prefetched batches and end the thread. The loader may still be iterated, from its position on."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        self._pool = None
        self._ahead.clear()
        self._error = None

    def settle(self) -> None:
        """Wait until the batches asked for ahead are made. No transform runs from here to the next `next`."""
        wait(self._ahead)

    def __enter__(self) -> TaskLoader[_T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ended(self, position: _Position) -> bool:
        return not self._shuffle and position[0] > 0

    def _after(self, position: _Position) -> _Position:
        epoch, index, step = position
        if index + 1 < self.batches_per_epoch or self._split_by is not None or self._tail:
            return epoch, index + 1, step + 1
        return epoch + 1, 0, step + 1

    def _take_ahead(self) -> _T:
        """Take the batch at the position from the thread, which is kept `prefetch` batches ahead."""
        if self._pool is None:
            self._pool = loader_thread()
            self._next_ahead = self._position
        try:
            self._submit(self._prefetch)
            item = self._ahead.popleft().result()
        except BaseException:
            self.close()  # the position stays, so that the next call tries this batch again
            raise
        self._submit(self._prefetch)
        return item

    def _submit(self, count: int) -> None:
        assert self._pool is not None
        while len(self._ahead) < count and not self._ended(self._next_ahead):
            if self._next_ahead[1] >= self.batches_per_epoch:
                return  # what comes next is known when the epoch's batches are finished
            self._ahead.append(self._pool.submit(self._make_ahead, self._next_ahead))
            self._next_ahead = self._after(self._next_ahead)

    def _make_ahead(self, position: _Position) -> _T:
        if self._error is not None:  # the other ranks wait for the batch that failed, not for this one
            raise self._error
        try:
            return self._make(position)
        except BaseException as error:
            self._error = error
            raise

    def _make(self, position: _Position) -> _T:
        epoch, index, step = position
        tasks, at = self._tasks(epoch, index)
        spec = SplitSpec() if self._split_by is None else self._split_by(step)
        ranks = tasks_per_rank(at.num_rows, self._world_size, spec.fractions)
        ends = tuple(
            self._micro_batches(at[part], 1 if spec.micro_batches is None else spec.micro_batches[rank])
            for rank, part in enumerate(ranks)
        )
        mine, batch_split = at[ranks[self._rank]], None
        if self._split_by is not None or any(len(of_rank) > 1 for of_rank in ends):
            work = len(tasks) * float(mine.num_rows.sum()) / float(at.num_rows.sum())
            batch_split = BatchSplit(tasks, ends, spec.drop_after_s, work)
        redraw, num_rows = (self._seed, epoch) if self._resample else None, int(at.num_rows.sum())
        stretches = np.stack([at.start, at.num_rows])

        def gathered(some: TaskRows) -> TaskBatch:
            sides = self._split.gather(some, redraw)
            return TaskBatch(
                *sides, len(tasks), epoch, index, batch_split, num_rows_global=num_rows, stretches=stretches
            )

        parts = [gathered(mine[a:b]) for a, b in pairwise((0, *ends[self._rank]))]
        batch = parts[0] if len(parts) == 1 else joined(parts)
        return cast(_T, batch) if self._transform is None else self._transform(batch)

    def _micro_batches(self, at: TaskRows, count: int) -> tuple[int, ...]:
        """Return where a rank's micro-batches end: `count` of them, none empty, and more where one is too large."""
        size = len(at)
        count = min(count, max(1, size))
        ends = [size * (i + 1) // count for i in range(count)]
        if not self._shuffle:
            return tuple(ends)
        parts = ((a, at[a:b]) for a, b in pairwise((0, *ends)))
        cells = self._max_cells
        return tuple(
            a + end
            for a, part in parts
            for end in ends_within(part.num_support, part.num_query, self._split.cells_per_row(part), cells)
        )

    def _count(self, split: PackSplit) -> int:
        """Count the tasks of the first so many of the loader's split, or their episodes."""
        return split.num_tasks if self._episodes is None else self._episodes.of_first(split.num_tasks)

    def _positions(self, tasks: Tasks, epoch: int) -> Tasks:
        """Return the positions in the split of tasks, or of episodes, of an epoch."""
        return tasks if self.replay is None else self.replay.positions(tasks, epoch)

    def _scenarios(self, tasks: Tasks, epoch: int) -> Tasks:
        assert self._scenario_of is not None
        tasks = self._positions(tasks, epoch)
        return self._scenario_of[tasks if self._episodes is None else self._episodes.task_of(tasks)]

    def _locate(self, tasks: Tasks, epoch: int) -> TaskRows:
        tasks = self._positions(tasks, epoch)
        at = self._split.locate(tasks) if self._episodes is None else self._episodes.locate(tasks)
        return at.last_support(self._max_support_rows)

    def _sizes(self, tasks: Tasks, epoch: int) -> tuple[Tasks, Tasks]:
        at = self._locate(tasks, epoch)
        return at.num_support, at.num_query

    def _batches_of_pass(self) -> list[Tasks]:
        """Return the batches of a pass; looks at sizes only where `max_cells` needs them."""
        tasks, size = np.arange(self.num_tasks), self._tasks_per_batch
        if self._max_cells is None:
            return np.split(tasks, range(size, self.num_tasks, size)) if self.num_tasks else []
        at = self._locate(tasks, 0)
        sizes = at.num_support, at.num_query, self._split.cells_per_row(at)
        return batches_of_pass(*sizes, size, self._max_cells, self._window_batches)

    def _tasks(self, epoch: int, index: int) -> tuple[Tasks, TaskRows]:
        """Return the tasks of the global batch. They are located once a window: it costs a look-up in every shard."""
        size = self._tasks_per_batch
        if index >= self.batches_per_epoch:
            tasks = np.asarray(self._tail[:size], np.int64)
            return tasks, self._locate(tasks, epoch)
        if not self._shuffle:
            tasks = self._pass[index]
            return tasks, self._locate(tasks, epoch)
        window, offset = divmod(index, self._window_batches)
        if self._window is None or self._window[:2] != (epoch, window):
            batches = window_of_batches(
                self.num_tasks,
                partial(self._sizes, epoch=epoch),
                tasks_per_batch=size,
                window_batches=self._window_batches,
                seed=self._seed,
                epoch=epoch,
                window=window,
                sequential=self._sequential,
                size_buckets=self._size_buckets,
                scenarios=None if self._scenario_of is None else partial(self._scenarios, epoch=epoch),
            )
            tasks = np.concatenate(batches)
            self._window = (epoch, window, tasks, self._locate(tasks, epoch))
        mine = slice(offset * size, (offset + 1) * size)  # only an epoch's last batch may be short
        return self._window[2][mine], self._window[3][mine]


def long_task_warning(
    pack: TaskPack, name: str, *, tasks_per_batch: int, max_support_rows: int, episode_rows: int = 0
) -> str | None:
    """Name the longest task of split `name`, and the cure, where it would pad a batch beyond `MAX_CELLS`.

    None where no task does, and where tasks are long in general: more than a tenth of the longest is no exception.
    """
    split = pack.split(name)
    support, query = split.unverified_sizes()
    rows = (np.minimum(support, max_support_rows) if max_support_rows else support) + query
    rows = np.minimum(rows, episode_rows) if episode_rows else rows
    longest, median = int(rows.argmax()), float(np.median(rows))
    if rows[longest] * tasks_per_batch <= MAX_CELLS or rows[longest] <= 10 * median:
        return None
    task_id = int(split.locate(np.array([longest])).task_id[0])
    keys = pq.read_table(pack.tasks_file(), filters=[("task_id", "=", task_id)])["key"].to_pylist()
    return (
        f"warning: task {keys[0]!r} of split {name} has {rows[longest]:,} rows, the median task {median:,.0f}. It is "
        "computed apart from its batch, which takes long and much memory: set loader.max_support_rows to keep the last "
        "support rows of every task, loader.episode_rows to train on it in parts, or prepare with --max_task_rows to "
        "leave such tasks out, and --max_task_rows_keep last to keep their last rows"
    )
