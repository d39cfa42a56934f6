"""A model with its learner and its sharded tables on this rank, and batches that are prepared for it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gmeta.core.batch import (
    EmbeddedRows,
    Examples,
    Lookup,
    TaskBatch,
    id_of,
    lookups_of_parts,
    mask_of,
    text_ids_of,
    to_device,
)
from gmeta.core.modules import persistent_buffers
from gmeta.data.candidates import LOG_CHANCE
from gmeta.data.schema import OOV
from gmeta.embedding.exchange import Exchange, RoutedRequest
from gmeta.embedding.lookup import RowRequest
from gmeta.embedding.table import ShardedTables
from gmeta.meta.gather_plan import GatherPlan
from gmeta.meta.learner import MetaLearner
from gmeta.meta.next_item import NextItemLearner, Objective
from gmeta.parallel.mesh import Mesh


@dataclass(frozen=True)
class MicroBatch:
    """Tasks that are computed together: all of a rank's batch, or a part of it."""

    tasks: TaskBatch
    index: tuple[GatherPlan, ...]  # which of the fetched rows each feature of each task reads
    lookups: tuple[dict[str, Lookup], dict[str, Lookup]] | None  # support, query; None: those of the batch
    number: int  # counts the micro-batches of a batch from 0
    work: float  # in tasks of the rank's part of the batch, weighted by their examples

    def rows(self, fetched: EmbeddedRows) -> EmbeddedRows:
        """Return the batch's fetched rows, as these tasks look them up."""
        return fetched if self.lookups is None else EmbeddedRows(fetched.weights, *self.lookups, fetched.shared)


@dataclass(frozen=True)
class PreparedBatch:
    """A batch whose index work is done and whose ids were exchanged: its step moves rows and gradients only."""

    batch: TaskBatch
    routed: RoutedRequest  # which rows to fetch, from whom, and what others fetch here
    parts: tuple[MicroBatch, ...]


@dataclass(frozen=True)
class System:
    """A model, what it is trained for, and its tables on this rank."""

    objective: Objective
    tables: ShardedTables
    exchange: Exchange
    mesh: Mesh
    dtype: torch.dtype
    autocast: bool
    num_numeric: int  # numeric columns that the model reads: the first ones, all or none, and those of `generated`
    generated: tuple[str, ...] = ()  # features with a vector for unknown ids; each adds a column that says where

    @property
    def learner(self) -> MetaLearner:
        """Return the learner of a system that scores examples. ValueError for one of next items."""
        if isinstance(self.objective, NextItemLearner):
            raise ValueError(
                "the run finds next items (its pack was made of events), and this is for runs that score examples: use "
                "gmeta recommend, or gmeta evaluate to measure it"
            )
        return self.objective

    def prepare(self, batch: TaskBatch, learner: MetaLearner | None = None) -> PreparedBatch:
        """Do everything that can be done before the step, for this learner or another on the same tables.

        That is the index work and the exchange of ids. The latter is collective: all ranks prepare the same batches in
        the same order, in the loader's thread, and one loader at a time.
        """
        batch = self._readable(batch)
        request = self.exchange.request(batch.support, batch.query, batch.shared)
        parts = self._micro_batches(batch, request, learner or self.objective)
        return PreparedBatch(
            parts[0].tasks if len(parts) == 1 else to_device(replace(batch, parts=()), self.mesh.device, self.dtype),
            self.exchange.exchange_ids(request),
            parts,
        )

    def _readable(self, batch: TaskBatch) -> TaskBatch:
        shared = None if batch.shared is None else self.examples(batch.shared)
        parts = tuple(replace(self._readable(part), shared=shared) for part in batch.parts)
        support, query = self.examples(batch.support), self.examples(batch.query)
        return replace(batch, support=support, query=query, shared=shared, parts=parts)

    def examples(self, side: Examples) -> Examples:
        """Return examples with what the model reads of their numeric columns, and of what they carry for it."""
        dense = side.dense[..., : self.num_numeric - len(self.generated)]
        if self.generated:
            unknown = torch.stack([(side.ids[name] == OOV) & side.mask for name in self.generated], -1)
            dense = torch.cat([dense, unknown.to(dense.dtype)], -1)
        given = {name: value for name, value in side.given.items() if name in self._given}
        given |= {id_of(name): side.ids[name].unsqueeze(-1) for name in self.objective.routes}
        return replace(side, dense=dense, given=given)

    @property
    def _given(self) -> set[str]:
        learner = self.objective
        sequences = learner.sequences.keys() - learner.features.keys()
        return {*learner.vectors, *sequences, *map(mask_of, sequences), *map(text_ids_of, learner.texts), LOG_CHANCE}

    def _micro_batches(self, batch: TaskBatch, request: RowRequest, learner: Objective) -> tuple[MicroBatch, ...]:
        device, work = self.mesh.device, _work(batch)
        if not batch.parts:
            index = learner.index(request.support, request.query, request.num_rows)
            return (MicroBatch(to_device(batch, device, self.dtype), to_device(index, device), None, 0, work[0]),)
        supports = lookups_of_parts(request.support, [part.support for part in batch.parts])
        queries = lookups_of_parts(request.query, [part.query for part in batch.parts])
        parts = []
        for number, (tasks, support, query) in enumerate(zip(batch.parts, supports, queries, strict=True)):
            index = learner.index(support, query, request.num_rows)
            index, lookups = to_device((index, (support, query)), device)
            parts.append(MicroBatch(to_device(tasks, device, self.dtype), index, lookups, number, work[number]))
        return tuple(parts)

    def precision(self) -> AbstractContextManager[object]:
        """Return the context of forward passes: autocast, where configured."""
        if self.autocast:
            return torch.autocast(self.mesh.device.type, torch.bfloat16)
        return nullcontext()

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor of model, learned rates and tables, by name, for checkpoints."""
        return {**self.dense_tensors(), **self.table_tensors()}

    def dense_tensors(self) -> dict[str, Tensor]:
        """Return every tensor of model and learned rates, by name."""
        dense = {f"dense.{name}": p.detach().view(p.shape or (1,)) for name, p in self.objective.named_parameters()}
        return {**dense, **self.buffer_tensors()}

    def check_loaded(self) -> None:
        """Let a model that was made with files say, by ValueError, that these are not those of the loaded weights."""
        check = getattr(self.objective.model, "check_loaded", None)
        if check is not None:
            check()

    def before_step(self, step: int) -> None:
        """Tell a model that has a function of this name that a training step begins after `step` others."""
        tell = getattr(self.objective.model, "before_step", None)
        if tell is not None:
            tell(step)

    def buffer_tensors(self) -> dict[str, Tensor]:
        """Return the model's persistent buffers, by name. No forward pass changes them (`gmeta.meta.trial`), but a
        model may have drawn or read them when it was made, and another time gets others.
        """
        return {f"buffers.{name}": b.view(b.shape or (1,)) for name, b in persistent_buffers(self.objective)}

    def table_tensors(self) -> dict[str, Tensor]:
        """Return this rank's rows of tables and of their optimizer's state, by name."""
        return {f"tables.{name}": t for name, t in self.tables.state_dict().items()}


def _work(batch: TaskBatch) -> list[float]:
    """Return the work of each micro-batch, by its examples."""
    tasks = batch.num_tasks if batch.batch_split is None else batch.batch_split.work
    examples = [float(part.support.mask.sum() + part.query.mask.sum()) for part in batch.parts or (batch,)]
    total = sum(examples)
    return [tasks * count / total if total else 0.0 for count in examples]
