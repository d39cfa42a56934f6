"""The second objective: from a user's history to the item that comes next. Knows no collective.

A task is a user: its support is the history, its query what came next. A model that learns this has two functions,
`states(events, sequences) -> [N, d]` and `items(owned) -> [n, d]` (`gmeta.models.sasrec` shows them), and an item's
score is the product of the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gmeta.core.batch import EmbeddedRows, Examples, Lookup, TaskBatch, text_ids_of
from gmeta.core.sequences import Sequences, sequences_of
from gmeta.data.candidates import LOG_CHANCE
from gmeta.meta.dropout import QUERY_PASS, SeededDropout, example_keys
from gmeta.meta.gather_plan import GatherPlan
from gmeta.meta.interception import Intercept
from gmeta.meta.learner import LearnerOutput, MetaLearner
from gmeta.models.inputs import TextInput


class NextItemLearner(nn.Module):
    """A model of next items and its loss: a softmax over the target and the candidates of the batch.

        loss = log(exp(s_target) + sum_c exp(s_c)) - s_target,   c over candidates other than the target

    The candidates (`TaskBatch.shared`) are the same for all tasks and on every rank. Where they are not drawn alike,
    the logarithm of an item's chance is subtracted from its score, the target's too (sampled softmax; Jean et al.,
    arXiv 1412.2007). Of a `domain`, the sum is over the candidates in that of the target: else the task is to tell
    domains apart.

    With `every_event` all events but the first are targets, else those of the query alone. The loss of a batch is the
    mean over its targets.
    """

    engine_reason = "next item"
    inner_lr: Tensor | None = None
    rate_names: tuple[str, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        features: Mapping[str, int],
        *,
        item: str,
        domain: str | None = None,
        texts: Mapping[str, TextInput] | None = None,
        every_event: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name in ("states", "items"):
            if not callable(getattr(model, name, None)):
                raise ValueError(
                    f"{type(model).__name__} has no function {name!r}: the pack is one of next items, which a model "
                    "finds by states(events, sequences) and items(owned), such as --model.name sasrec"
                )
        self.model: Any = model
        self.features = dict(features)
        self.sequences: dict[str, int] = {}
        self.vectors: dict[str, int] = {}
        self.texts = dict(texts or {})
        self.item, self.domain = item, domain
        self.every_event = every_event
        self.seed = seed

    def index(
        self, support: Mapping[str, Lookup], query: Mapping[str, Lookup], num_rows: Mapping[str, int]
    ) -> tuple[GatherPlan, ...]:
        """Return no plan: events look rows up by themselves."""
        return ()

    def forward(
        self, rows: EmbeddedRows, batch: TaskBatch, index: tuple[GatherPlan, ...] | None = None
    ) -> tuple[Tensor, LearnerOutput]:
        """Return (this rank's part of the batch's mean loss, output). Tasks without a target count nothing."""
        sides = (batch.support, batch.query)
        sequences, cells = sequences_of(*(side.mask for side in sides))
        states = self._states(rows, batch, sequences, cells, train=self.training)
        target = self._targets(batch, sequences, cells)
        item_ids = _column([side.ids[self.item] for side in sides], cells)
        losses = self._losses(rows, batch, states[target - 1], target, cells, item_ids)
        sums = losses.new_zeros(batch.num_tasks).index_add(0, sequences.task[target], losses)
        counts = torch.bincount(sequences.task[target], minlength=batch.num_tasks)
        whole = batch.num_rows_global - batch.num_tasks_global if self.every_event else batch.num_tasks_global
        means = sums.detach() / counts.clamp(min=1)
        return sums.sum() / max(1, whole), LearnerOutput(sums.detach(), means, torch.zeros_like(means))

    def users(self, rows: EmbeddedRows, batch: TaskBatch) -> Tensor:
        """Return the state [T, d] after the last event of each task's support; zeros where it has none."""
        sequences, cells = sequences_of(batch.support.mask)
        states = self._states(rows, batch, sequences, cells, train=False)
        there = sequences.lengths > 0
        found = states.new_zeros(batch.num_tasks, states.shape[1])
        return found.index_put((there.nonzero()[:, 0],), states[sequences.last[there]])

    def items(self, rows: EmbeddedRows, shared: Examples) -> Tensor:
        """Return the vectors [C, d] of shared items."""
        found: Tensor = self.model.items(self._embedded(rows.weights, [rows.shared], [shared], None))
        return found

    def _states(
        self, rows: EmbeddedRows, batch: TaskBatch, sequences: Sequences, cells: Tensor, *, train: bool
    ) -> Tensor:
        sides, lookups = [batch.support, batch.query], [rows.support, rows.query]
        events = self._embedded(rows.weights, lookups, sides, cells)
        key = (self.seed, batch.epoch, batch.index)
        longest = torch.arange(sequences.longest, device=cells.device)

        def keys() -> Tensor:
            return sequences.flat(example_keys(key, batch.task_id, QUERY_PASS, longest))

        with Intercept(SeededDropout(keys if train else None)):
            found: Tensor = self.model.states(events, sequences)
        return found

    def _targets(self, batch: TaskBatch, sequences: Sequences, cells: Tensor) -> Tensor:
        """Return which events are targets, int64 [P]: none is the first of its task."""
        mask = sequences.place > 0
        if not self.every_event:
            mask &= cells >= batch.support.mask.numel()
        return mask.nonzero()[:, 0]

    def _losses(
        self, rows: EmbeddedRows, batch: TaskBatch, states: Tensor, target: Tensor, cells: Tensor, item_ids: Tensor
    ) -> Tensor:
        """Return the loss [P] of each target, whose event before has the state."""
        sides, lookups, shared = [batch.support, batch.query], [rows.support, rows.query], batch.shared
        assert shared is not None, "a training batch of next items has candidates"
        of_target = self._embedded(rows.weights, lookups, sides, cells[target])
        found = _exactly((states * self.model.items(of_target)).sum(-1, keepdim=True))
        scores = _exactly(states @ self.items(rows, shared).mT)
        if LOG_CHANCE in shared.given:
            scores = scores - shared.given[LOG_CHANCE].view(1, -1)
            found = found - _column([side.given[LOG_CHANCE] for side in sides], cells[target]).unsqueeze(-1)
        mine = item_ids[target].unsqueeze(-1)
        out = mine == shared.ids[self.item].view(1, -1)
        if self.domain is not None:
            domain = _column([side.ids[self.domain] for side in sides], cells[target])
            out |= domain.unsqueeze(-1) != shared.ids[self.domain].view(1, -1)
        scores = scores.masked_fill(out, -torch.inf)
        losses: Tensor = torch.logsumexp(torch.cat([found, scores], 1), 1) - found.squeeze(1)
        return losses

    def _embedded(
        self,
        weights: Mapping[str, Tensor],
        lookups: list[dict[str, Lookup]],
        sides: list[Examples],
        cells: Tensor | None,
    ) -> dict[str, Tensor]:
        """Return the embeddings [n, d] of each feature that the sides have, and the ids of their texts, at `cells`."""
        found = {}
        for name in self.features:
            if all(name in lookup for lookup in lookups):
                index = _column([lookup[name].index for lookup in lookups], cells)
                found[name] = weights[lookups[0][name].table].index_select(0, index)
        for name in self.texts:
            key = text_ids_of(name)
            if all(key in side.given for side in sides):
                found[key] = _column([side.given[key] for side in sides], cells)
        return found


Objective: TypeAlias = MetaLearner | NextItemLearner
"""What a run trains: scores of examples, or next items."""


def _exactly(scores: Tensor) -> Tensor:
    """Return scores in float32 at least: a softmax over many is none in bf16."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _column(parts: list[Tensor], cells: Tensor | None) -> Tensor:
    """Return what flattened blocks [T, S, ...] hold at some cells, all cells where None: [n]."""
    flat = torch.cat([part.reshape(-1) for part in parts])
    return flat if cells is None else flat.index_select(0, cells)
