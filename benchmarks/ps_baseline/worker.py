"""A worker: pulls, computes one task after the other, pushes, and goes on when the servers have updated."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, tee
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from gmeta.config.train import TrainConfig
from gmeta.data.order import num_batches, tasks_per_rank, window_of_batches
from ps_baseline import wire
from ps_baseline.plan import Features, Task, describe, only_table, plan_task
from ps_baseline.server import require_finite
from ps_baseline.session import ANSWER, STATS, Flat, Session, flatten
from ps_baseline.step import Step, choose
from ps_baseline.taskfiles import TaskFiles
from ps_baseline.wire import Links

_READ_AHEAD = 4  # tasks whose files are read and planned in the background
_In, _Out = TypeVar("_In"), TypeVar("_Out")


@dataclass(frozen=True)
class Slots:
    """A worker's part of one global batch."""

    epoch: int
    index: int
    tasks: NDArray[Any]  # int64, this worker's tasks in slot order
    num_tasks_global: int


@dataclass(frozen=True)
class StepRecord:
    """What a step did, the same on every worker but for the times."""

    step: int
    epoch: int
    loss: float
    support_loss: float
    samples: float
    grad_norm: float
    lr: float
    tasks: int
    seconds: dict[str, float]  # input, exchange (pulls, pushes and the servers' work), compute
    sent_bytes: int
    received_bytes: int


def slots(config: TrainConfig, files: TaskFiles, worker: int, workers: int) -> Iterator[Slots]:
    """Yield this worker's part of every batch, for ever: gmeta's batches and gmeta's division among workers."""
    size, window_batches = config.loader.tasks_per_batch, config.loader.window_batches
    epoch = 0
    while True:
        for window in range(-(-num_batches(files.num_tasks, size) // window_batches)):
            batches = window_of_batches(
                files.num_tasks,
                files.sizes,
                tasks_per_batch=size,
                window_batches=window_batches,
                seed=config.seed,
                epoch=epoch,
                window=window,
            )
            for number, tasks in enumerate(batches):
                num_support, num_query = files.sizes(tasks)
                mine = tasks[tasks_per_rank(num_support + num_query, workers)[worker]]
                yield Slots(epoch, window * window_batches + number, mine, len(tasks))
        epoch += 1


def read_ahead(items: Iterator[_In], function: Callable[[_In], _Out], depth: int) -> Iterator[_Out]:
    """Yield `function` of every item, `depth` of them ahead in one background thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        waiting = deque(pool.submit(function, item) for item in islice(items, depth))
        try:
            while waiting:
                done = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in islice(items, 1))
                yield done
        finally:
            pool.shutdown(cancel_futures=True)


class Client:
    """Talks to all servers; a message a server, whatever it carries."""

    def __init__(self, session: Session, links: Links) -> None:
        self.servers = links.servers
        self.flat: list[Flat] = [
            flatten(session.parameters(server), session.system.dtype) for server in range(len(self.servers))
        ]
        table = only_table(session.system.tables)
        self.dim, self.dtype = table.dim, session.system.dtype
        self.bounds = torch.tensor([table.local_range(server).stop for server in range(len(self.servers))])

    def pull_dense(self) -> None:
        """Pull the dense weights into the model's parameters."""
        for server in self.servers:
            server.send(wire.DENSE)
        for server, flat in zip(self.servers, self.flat, strict=True):
            server.fill(flat.values)

    def ask_rows(self, task: Task) -> None:
        """Ask for rows in two pulls, one for the support and one for what the query needs besides, without waiting
        for them.
        """
        first = 0
        for counts in (task.support_counts, task.query_counts):
            for server, count in zip(self.servers, counts, strict=True):
                if count:
                    server.send(wire.ROWS, count, task.rows[first : first + count])
                first += count

    def take_rows(self, task: Task) -> Tensor:
        """Return the rows asked for, [U, d], as a leaf that requires grad."""
        rows = torch.empty(len(task.rows), self.dim, dtype=self.dtype)
        first = 0
        for counts in (task.support_counts, task.query_counts):
            for server, count in zip(self.servers, counts, strict=True):
                server.fill(rows[first : first + count])
                first += count
        return rows.requires_grad_()

    def push(self, stats: Tensor, tasks: list[tuple[Tensor, Tensor]]) -> list[float]:
        """Push the batch's gradients, rows merged over tasks; the servers' numbers once they have updated.

        On return the new dense weights are in the model's parameters and its gradients are 0.
        """
        rows, grads = _merged(tasks, self.dim, self.dtype)
        cuts = [0, *torch.searchsorted(rows, self.bounds).tolist()]
        for number, server in enumerate(self.servers):
            part = slice(cuts[number], cuts[number + 1])
            server.send(wire.PUSH, part.stop - part.start, stats, self.flat[number].grads, rows[part], grads[part])
        answer = torch.empty(ANSWER, dtype=torch.float64)
        for server, flat in zip(self.servers, self.flat, strict=True):
            server.fill(answer, flat.values)
            flat.grads.zero_()
        return answer.tolist()

    def pull_state(self, like: list[list[Tensor]]) -> None:
        """Pull all rows and their optimizer state into `like[server]`, in the order of `session.tables_state`."""
        for server, tensors in zip(self.servers, like, strict=True):
            server.send(wire.STATE)
            server.fill(*tensors)

    def end(self) -> None:
        """Let the servers go."""
        for server in self.servers:
            server.send(wire.END)

    def traffic(self) -> tuple[int, int]:
        """Return the bytes (sent, received) so far."""
        return sum(s.sent_bytes for s in self.servers), sum(s.received_bytes for s in self.servers)


def _merged(tasks: list[tuple[Tensor, Tensor]], dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return unique rows, ascending, of (rows [U], gradients [U, d]) of each task, and the sums of their gradients."""
    if not tasks:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dim, dtype=dtype)
    rows, inverse = torch.unique(torch.cat([rows for rows, _ in tasks]), return_inverse=True)
    return rows, torch.zeros(len(rows), dim, dtype=dtype).index_add_(0, inverse, torch.cat([g for _, g in tasks]))


class Stopwatch:
    """Seconds by phase of a step."""

    def __init__(self) -> None:
        self.seconds = {"input": 0.0, "exchange": 0.0, "compute": 0.0}
        self.last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Book the time since the last lap on `phase`."""
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now


@dataclass
class Worker:
    """What a worker holds while it trains."""

    session: Session
    client: Client
    features: Features
    say: Callable[[str], None]
    step: Step | None = None  # chosen on the first task


def work(session: Session, files: TaskFiles, client: Client, say: Callable[[str], None]) -> Iterator[StepRecord]:
    """Train, and yield after every step. ValueError when loss or gradients are not finite, PeerLost as in `wire`."""
    config, place, system = session.config, session.place, session.system
    features = describe(system.learner, system.tables, files)
    worker = Worker(session, client, features, say)
    batches, planned = tee(islice(slots(config, files, place.rank, place.workers), session.total_steps))

    def plan(job: tuple[int, int]) -> Task:
        epoch, task = job
        stored = files.read(task, (config.seed, epoch) if config.loader.resample else None)
        return plan_task(stored, features, system.dtype)

    jobs = ((batch.epoch, int(task)) for batch in planned for task in batch.tasks)
    tasks = read_ahead(jobs, plan, _READ_AHEAD)
    client.pull_dense()
    for step, batch in enumerate(batches, start=1):
        watch, before = Stopwatch(), client.traffic()
        stats, gradients = _compute(worker, batch, tasks, watch)
        loss, support_loss, samples, norm, lr = client.push(stats, gradients)
        watch.lap("exchange")
        require_finite(step - 1, loss, norm)
        sent, received = (now - then for now, then in zip(client.traffic(), before, strict=True))
        yield StepRecord(
            step,
            batch.epoch,
            loss,
            support_loss,
            samples,
            norm,
            lr,
            batch.num_tasks_global,
            watch.seconds,
            sent,
            received,
        )


def _compute(
    worker: Worker, batch: Slots, tasks: Iterator[Task], watch: Stopwatch
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return (stats [STATS], row gradients of each task) of this worker's part; dense gradients add up in the
    parameters.
    """
    client = worker.client
    stats = torch.zeros(STATS, dtype=torch.float64)
    gradients = []
    key = (batch.epoch, batch.index, batch.num_tasks_global)
    left = len(batch.tasks)
    following = _next(tasks, client, watch) if left else None
    while following is not None:
        task, rows = following, client.take_rows(following)
        watch.lap("exchange")
        left -= 1
        following = _next(tasks, client, watch) if left else None  # its rows travel while this task is computed
        if worker.step is None:
            learner = worker.session.system.learner
            worker.step, reason = choose(learner, worker.features, task, rows, key)
            worker.say(f"task step: {reason}")
        loss, support_loss = worker.step(task, rows, key)
        loss.backward()
        assert rows.grad is not None
        gradients.append((task.rows, rows.grad))
        stats += stats.new_tensor([loss.item(), support_loss.item() / key[2], task.num_samples])
        watch.lap("compute")
    return stats, gradients


def _next(tasks: Iterator[Task], client: Client, watch: Stopwatch) -> Task:
    """Return the next task from its file, after asking for its rows."""
    task = next(tasks)
    watch.lap("input")
    client.ask_rows(task)
    watch.lap("exchange")
    return task
