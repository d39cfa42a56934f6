"""The cases of engine.py and their neighbours, and gmeta's whole training step on one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from common import median
from torch import Tensor, nn

from gmeta.core.batch import Examples, TaskBatch
from gmeta.data.loader import loader_thread
from gmeta.embedding.exchange import RowExchange
from gmeta.embedding.table import ShardedTables, TableSpec
from gmeta.meta.inner_loop import InnerLoop
from gmeta.meta.learner import MetaLearner
from gmeta.models.inputs import InputSpec
from gmeta.models.melu import MeLU
from gmeta.optim.dense import dense_optimizer, dense_step
from gmeta.optim.sparse import SparseOptimizer
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.system import PreparedBatch, System
from gmeta.training.statistics import Stopwatch

CPU = torch.device("cpu")
INNER_LR = 0.1
LR = 1e-3
VOCABULARY = 20_000  # ids of each feature
BATCHES = 4  # different ones, in turn


@dataclass(frozen=True)
class Case:
    """Tasks of `support` + `query` examples; the first half of the features is constant in a task, as a user's are."""

    tasks: int
    support: int
    query: int
    features: int
    dim: int
    hidden: tuple[int, ...]

    @property
    def name(self) -> str:
        """Return the name of the case in result files."""
        layers = "-".join(str(width) for width in self.hidden)
        return f"{self.tasks}x{self.support}+{self.query} {self.features}x{self.dim} {layers}"

    @property
    def samples(self) -> int:
        """Return the number of examples in a batch."""
        return self.tasks * (self.support + self.query)

    @property
    def names(self) -> list[str]:
        """Return the names of the features."""
        return [f"f{i}" for i in range(self.features)]

    def limit(self, order: str) -> float:
        """Return the multiplications of a step with one inner step, over those of a plain step, of dense layers only.

        Plain: 3 products a layer and row. Support rows: forward, output gradients, and for second order twice two
        more; query rows: 3, and the low-rank change and its two derivatives, each S * (in + out) a row.
        """
        layers = list(pairwise([self.features * self.dim, *self.hidden, 1]))
        change = sum(a + b for a, b in layers) / sum(a * b for a, b in layers)
        support, query = self.support, self.query
        own = 6 if order == "second" else 2
        return (own * support + 3 * query + 3 * query * support * change) / (3 * (support + query))


CASES = (
    Case(32, 40, 10, 8, 32, (64, 64)),
    Case(128, 10, 10, 20, 16, (256, 128)),
    Case(256, 10, 10, 26, 16, (512, 256)),
)


def make_batches(case: Case, count: int = BATCHES) -> list[TaskBatch]:
    """Draw ids by a power law, so that tasks share rows and both sides overlap, and labels at random."""
    generator = torch.Generator().manual_seed(0)
    length = case.support + case.query
    batches = []
    for index in range(count):
        uniform = torch.rand(case.features, case.tasks, length, generator=generator)
        ids = (VOCABULARY * uniform**3).long()
        fixed = case.features // 2
        ids[:fixed] = ids[:fixed, :, :1]
        label = (torch.rand(case.tasks, length, generator=generator) < 0.5).float()
        sides = (
            _examples(case, ids, label, slice(0, case.support)),
            _examples(case, ids, label, slice(case.support, None)),
        )
        batches.append(TaskBatch(*sides, torch.arange(case.tasks), case.tasks, epoch=0, index=index))
    return batches


def _examples(case: Case, ids: Tensor, label: Tensor, rows: slice) -> Examples:
    label = label[:, rows].contiguous()
    mask = torch.ones_like(label, dtype=torch.bool)
    own = dict(zip(case.names, ids[:, :, rows].contiguous(), strict=True))
    return Examples(
        own, {}, label.new_zeros(*label.shape, 0), label, mask, torch.zeros_like(mask, dtype=torch.int64), ~mask
    )


def build(case: Case) -> MeLU:
    torch.manual_seed(0)
    return MeLU(InputSpec(dict.fromkeys(case.names, case.dim), (), 0.0), hidden=case.hidden)


@dataclass
class Gmeta:
    """gmeta's training step on one worker."""

    case: Case
    batches: list[TaskBatch]
    settings: Mapping[str, Any]
    device: torch.device = CPU
    autocast: bool = False
    make: Callable[[Case], nn.Module] = build
    steps: int = 0
    ahead: Future[PreparedBatch] | None = None

    def __post_init__(self) -> None:
        mesh = Mesh(device=self.device)
        model = self.make(self.case).to(self.device)
        features = dict.fromkeys(self.case.names, self.case.dim)
        loop = InnerLoop(lr=INNER_LR, **self.settings)
        learner = MetaLearner(model, features, 0, loop).to(self.device)
        assert not learner.adapted.steps or learner.engine == "factored", learner.engine_reason
        specs = [TableSpec(name, VOCABULARY, self.case.dim, {name: None}) for name in self.case.names]
        tables = ShardedTables(specs, mesh=mesh, seed=0, init_std=0.1, dtype=torch.float32, optimizer="rowwise_adagrad")
        self.system = System(
            objective=learner,
            tables=tables,
            mesh=mesh,
            dtype=torch.float32,
            autocast=self.autocast,
            num_numeric=0,
            exchange=RowExchange(tables.fused, mesh),
        )
        self.dense = dense_optimizer(learner, lr=LR, inner_lr_lr=LR)
        self.sparse = SparseOptimizer("rowwise_adagrad", lr=LR)
        self.loader = loader_thread()

    def _next(self) -> PreparedBatch:
        """Return this step's batch. The thread goes on with the next one."""
        batch = self.batches[(self.steps + 1) % len(self.batches)]
        ahead = self.ahead or self.loader.submit(self.system.prepare, self.batches[self.steps % len(self.batches)])
        self.ahead = self.loader.submit(self.system.prepare, batch)
        self.steps += 1
        return ahead.result()

    def __call__(self) -> Tensor:
        """Make one step, and return the loss."""
        return self.take(self._next(), lambda phase: None)

    def take(self, prepared: PreparedBatch, lap: Callable[[str], object]) -> Tensor:
        """Make a step on a prepared batch, with `lap` called at the end of each phase, and return the loss."""
        rows = self.system.exchange.fetch(prepared.routed)
        lap("fetch")
        with self.system.precision():
            loss, _ = self.system.learner(rows, prepared.batch, prepared.parts[0].index)
        lap("forward")
        loss.backward()
        lap("backward")
        gradients = self.system.exchange.return_gradients(prepared.routed, rows)
        dense_step(self.dense)
        self.sparse.step(self.system.tables.fused, gradients)
        lap("updates")
        return loss.detach()

    def gradients(self) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return loss and gradients on the first batch, without an update. Those of rows are dense, [features * ids,
        d].
        """
        prepared = self.system.prepare(self.batches[0])
        rows = self.system.exchange.fetch(prepared.routed)
        loss, _ = self.system.learner(rows, prepared.batch, prepared.parts[0].index)
        loss.backward()
        found = self.system.exchange.return_gradients(prepared.routed, rows)
        ((name, of_rows),) = found.items()
        table = self.system.tables.fused[name]
        whole = of_rows.grad.new_zeros(table.num_rows, table.dim)
        whole[table.permutation.inverse(of_rows.rows.cpu()).to(whole.device)] = of_rows.grad
        dense = [p.grad.clone() for p in self.system.learner.parameters() if p.grad is not None]
        self.dense.zero_grad(set_to_none=False)
        return loss.detach(), dense, whole

    def initial_rows(self) -> Tensor:
        """Return all tables' rows, [features * ids, d]."""
        (table,) = self.system.tables.fused.values()
        return table.weight[table.permutation.forward(torch.arange(table.num_rows)).to(self.device)]


def phases(step: Gmeta, repetitions: int) -> dict[str, float]:
    """Return the median seconds of a step's phases, one after the other: first the index, which a loader's thread would
    make.
    """
    seconds: dict[str, list[float]] = {}
    for repetition in range(repetitions + 2):
        watch = Stopwatch(CPU)
        prepared = step.system.prepare(step.batches[repetition % len(step.batches)])
        watch.lap("index")
        step.take(prepared, watch.lap)
        for name, value in watch.seconds.items():
            seconds.setdefault(name, []).append(value)
    return {name: median(values[2:]) for name, values in seconds.items()}
