"""From a pack's split to this rank's part of each global batch, in an order that resumes anywhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Generic, TypeVar, cast

import numpy as np
import torch

from gmeta.batch import TaskBatch
from gmeta.data.order import num_batches, split_slots, stored_batch, window_of_batches
from gmeta.data.shards import PackSplit, TaskRows

_T = TypeVar("_T")
_Position = tuple[int, int]  # epoch, index of the batch in it


def loader_thread() -> ThreadPoolExecutor:
    """A thread for batches ahead, whose torch operations use it alone.

    OpenMP would give it a second team of threads, which spin on the cores that the step needs: measured on 2 cores, the
    index of 2,560 rows of 20 features took 18 ms of CPU instead of 12. Calling threads keep their number.
    """
    torch.get_num_threads()  # this thread's number is settled by now, before the new thread sets another for itself
    return ThreadPoolExecutor(1, "gmeta-loader", initializer=torch.set_num_threads, initargs=(1,))


class TaskLoader(Generic[_T]):
    """Iterator over this rank's share of every global batch of `tasks_per_batch` tasks.

    With `shuffle` it never ends: epoch after epoch, each in its own order. Without, it makes one pass in stored order
    and is then back at its start. `for batch in loader` goes on where the last loop stopped. `resample` draws the
    support of every task anew each epoch. The loader hands out `transform(batch)`, or the TaskBatch without one.

    `sequential=False` draws every window from the whole split, not from blocks of consecutive tasks, and
    `size_buckets=False` fills batches without regard to sizes: other orders, there to measure what the two buy.

    With `prefetch` > 0 that many batches are made ahead, transform included, in one background thread; an error there
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
        transform: Callable[[TaskBatch], _T] | None = None,
    ) -> None:
        if tasks_per_batch < world_size:
            raise ValueError(
                f"loader.tasks_per_batch is {tasks_per_batch}, world size is {world_size}: a batch needs a task for "
                f"each worker; raise tasks_per_batch to {world_size} or more, or start fewer workers"
            )
        self.batches_per_epoch = num_batches(split.num_tasks, tasks_per_batch)
        self._split = split
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
        self._transform = transform
        self._position: _Position = (0, 0)  # of the batch that `next` hands out
        self._window: tuple[_Position, TaskRows] | None = None  # the last window made, with its (epoch, window)
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[Future[_T]] = deque()
        self._next_ahead: _Position = (0, 0)
        self._error: BaseException | None = None  # of the thread

    def __iter__(self) -> TaskLoader[_T]:
        return self

    def __next__(self) -> _T:
        if self._ended(self._position):
            self.close()
            self._position = (0, 0)
            raise StopIteration
        item = self._make(self._position) if self._prefetch == 0 else self._take_ahead()
        self._position = self._after(self._position)
        return item

    def state_dict(self) -> dict[str, int]:
        """{"epoch", "index"} of the batch that `next` hands out, whatever has been prefetched."""
        epoch, index = self._position
        return {"epoch": epoch, "index": index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position, before or amid iteration; ValueError where an epoch has no such batch."""
        epoch, index = int(state["epoch"]), int(state["index"])
        if epoch < 0 or not 0 <= index < self.batches_per_epoch:
            raise ValueError(
                f"loader state is epoch {epoch}, index {index}: an epoch has {self.batches_per_epoch} batches; it was "
                "saved with another pack, split or tasks_per_batch"
            )
        self.close()
        self._position = (epoch, index)

    def close(self) -> None:
        """Drop prefetched batches and end the thread; the loader may still be iterated, from its position on."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        self._pool = None
        self._ahead.clear()
        self._error = None

    def settle(self) -> None:
        """Wait until the batches asked for ahead are made: no transform runs from here to the next `next`."""
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
        epoch, index = position
        return (epoch, index + 1) if index + 1 < self.batches_per_epoch else (epoch + 1, 0)

    def _take_ahead(self) -> _T:
        """The batch at the position, from the thread, which is kept `prefetch` batches ahead."""
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
            self._ahead.append(self._pool.submit(self._make_ahead, self._next_ahead))
            self._next_ahead = self._after(self._next_ahead)

    def _make_ahead(self, position: _Position) -> _T:
        if self._error is not None:  # other ranks wait for the batch that failed, not for this one
            raise self._error
        try:
            return self._make(position)
        except BaseException as error:
            self._error = error
            raise

    def _make(self, position: _Position) -> _T:
        epoch, index = position
        tasks = self._tasks(epoch, index)
        mine = tasks[split_slots(tasks.num_rows, self._world_size)[self._rank]]
        redraw = (self._seed, epoch) if self._resample else None
        support, query, task_id = self._split.gather(mine, redraw)
        batch = TaskBatch(support, query, task_id, num_tasks_global=len(tasks), epoch=epoch, index=index)
        return cast(_T, batch) if self._transform is None else self._transform(batch)

    def _tasks(self, epoch: int, index: int) -> TaskRows:
        """The tasks of the global batch. They are located once a window: it costs an index look-up in every shard."""
        if not self._shuffle:
            return self._split.locate(stored_batch(self._split.num_tasks, self._tasks_per_batch, index))
        window, offset = divmod(index, self._window_batches)
        if self._window is None or self._window[0] != (epoch, window):
            batches = window_of_batches(
                self._split.num_tasks,
                self._split.sizes,
                tasks_per_batch=self._tasks_per_batch,
                window_batches=self._window_batches,
                seed=self._seed,
                epoch=epoch,
                window=window,
                sequential=self._sequential,
                size_buckets=self._size_buckets,
            )
            self._window = ((epoch, window), self._split.locate(np.concatenate(batches)))
        first = offset * self._tasks_per_batch  # only an epoch's last batch may be short
        return self._window[1][first : first + self._tasks_per_batch]


def padding_share(batch: TaskBatch) -> float:
    """Share of the batch's cells, support and query, that is padding; 0 for an empty batch."""
    cells = batch.support.mask.numel() + batch.query.mask.numel()
    filled = int(batch.support.mask.sum()) + int(batch.query.mask.sum())
    return 1 - filled / cells if cells else 0.0
