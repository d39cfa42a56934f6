"""The second objective: from a user's history to the item that comes next. Knows no collective.

A task is a user: its support is the history, its query what came next. A model that learns this has two functions,
`states(events, sequences) -> [N, d]` and `items(owned) -> [n, d]` (`gmeta.models.sasrec` shows them), and an item's
score is the product of the two. A model of several views has their widths in `views`, and d is the sum of these: each
view learns by a loss of its own, and a score is the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from gmeta.core.batch import EmbeddedRows, Examples, Lookup, TaskBatch, text_ids_of
from gmeta.core.sequences import Sequences, sequences_of
from gmeta.data.candidates import AFTER_TRAINING, LOG_CHANCE
from gmeta.meta.comparison import all_but, had_by_tasks
from gmeta.meta.dropout import QUERY_PASS, SeededDropout, example_keys
from gmeta.meta.gather_plan import GatherPlan
from gmeta.meta.inner_loop import InnerLoop
from gmeta.meta.interception import Intercept
from gmeta.meta.learner import LearnerOutput, MetaLearner
from gmeta.meta.unfused import unfused_attention
from gmeta.models.inputs import TextInput
from gmeta.models.sasrec import PROMPT

_CHOICE = -1
"""Number of the choice of candidates among the passes that dropout knows."""


class _Read(NamedTuple):
    """What a pass over a batch needs of it, whatever its tasks adapt: N events, and C candidates."""

    sequences: Sequences
    events: dict[str, Tensor]  # what the model reads of each event, [N, ...]
    own: Tensor | None  # [N, d], the vector of each event's item; None where nothing is learned
    item: Tensor  # int64 [N]
    domain: Tensor | None  # int64 [N]
    log_chance: Tensor | None  # [N], of the event's item among the draws
    asked: Tensor  # bool [N], of the query
    keys: Tensor | None  # int64 [N], by which targets choose candidates; None where they are compared with all
    candidates: Tensor | None  # [C, d]
    shared: Examples | None  # the candidates


class NextItemLearner(nn.Module):
    """A model of next items and its loss: a softmax over the target and the candidates of the batch.

        loss = log(exp(s_target) + sum_c exp(s_c)) - s_target,   c over candidates other than the target

    The candidates (`TaskBatch.shared`) are the same for all tasks and on every rank. Where they are not drawn alike,
    the logarithm of an item's chance is subtracted from its score, the target's too (sampled softmax; Jean et al.,
    arXiv 1412.2007). Of a `domain`, the sum is over the candidates in that of the target: else the task is to tell
    domains apart. With `own_items` false it is over candidates that the task has not among its events, and with `each`
    over so many of these alone, other ones for every target: those that a hash of (seed, epoch, batch, task, place)
    says. Expected numbers then shrink alike for all candidates, so that chances need no change.

    With `every_event` all events but the first are targets, else those of the query alone. The loss of a batch is the
    mean over its targets.

    With an inner loop a task adapts a prompt, a vector that is added to each of its events: gradient steps on the loss
    of its support's own events, from a learned start. Targets are then those of the query, and the loss is the mean
    over tasks. Its derivative goes through the steps, unless the loop is of first order.
    """

    engine_reason = "next item"

    def __init__(
        self,
        model: nn.Module,
        features: Mapping[str, int],
        *,
        item: str,
        domain: str | None = None,
        texts: Mapping[str, TextInput] | None = None,
        every_event: bool = True,
        own_items: bool = True,
        each: int = 0,
        inner_loop: InnerLoop | None = None,
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
        self.texts, self.routes = dict(texts or {}), dict[str, int]()
        self.item, self.domain = item, domain
        self.every_event, self.own_items, self.each = every_event, own_items, each
        self.inner_loop = inner_loop
        self.seed = seed
        self.prompt = None if inner_loop is None else nn.Parameter(torch.zeros(_width_of(model)))
        learned = None
        if inner_loop is not None and inner_loop.learn_lr:
            learned = nn.Parameter(torch.full((inner_loop.steps, 1), inner_loop.lr))
        self.inner_lr = learned
        if inner_loop is not None:
            self.engine_reason = f"next item, after {inner_loop.steps} inner steps on a prompt"

    @property
    def rate_names(self) -> tuple[str, ...]:
        """Return the names of the columns of `inner_lr`."""
        return () if self.inner_loop is None else (PROMPT,)

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
        read = self._read(rows, batch, sides, [rows.support, rows.query], train=self.training)
        prompts, before = None, None
        if self.inner_loop is not None:
            prompts, before = self._adapt(read, batch, train=self.training)
        over_events = self.every_event and self.inner_loop is None
        later = read.sequences.place > 0
        targets = (later if over_events else later & read.asked).nonzero()[:, 0]
        read = _looking_at(read, targets - 1)
        states = self._states(read, batch, prompts, QUERY_PASS, train=self.training)
        left_out = self._left_out(read, targets, torch.ones_like(read.asked))
        sums, counts = self._task_losses(read, states, targets, left_out)
        means = sums / counts.clamp(min=1)
        if over_events:
            loss = sums.sum() / max(1, batch.num_rows_global - batch.num_tasks_global)
        else:
            loss = means.sum() / batch.num_tasks_global
        before = torch.zeros_like(means) if before is None else before
        return loss, LearnerOutput(means.detach(), means.detach(), before.detach())

    def users(self, rows: EmbeddedRows, batch: TaskBatch, *, steps: int | None = None) -> Tensor:
        """Return the state [T, d] after the last event of each task's support; zeros where it has none.

        A run with an inner loop adapts to the support first, in `steps` steps where given; 0 is before adaptation.
        """
        read = self._read(rows, batch, (batch.support,), [rows.support], train=False)
        prompts = None
        if self.inner_loop is not None:
            with torch.enable_grad():
                prompts, _ = self._adapt(read, batch, train=False, steps=steps)
            prompts = prompts.detach()
        there = read.sequences.lengths > 0
        last = read.sequences.last[there]
        states = self._states(_looking_at(read, last), batch, prompts, QUERY_PASS, train=False)
        found = states.new_zeros(batch.num_tasks, states.shape[1])
        return found.index_put((there.nonzero()[:, 0],), states[last])

    def items(self, rows: EmbeddedRows, shared: Examples) -> Tensor:
        """Return the vectors [C, d] of shared items: candidates, or the catalogue's.

        A model that makes these in another way than those of events has `shared_items(owned)` besides.
        """
        vectors = getattr(self.model, "shared_items", self.model.items)
        found: Tensor = vectors(self._embedded(rows.weights, [rows.shared], [shared], None))
        return found

    def _adapt(
        self, read: _Read, batch: TaskBatch, *, train: bool, steps: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the prompt of each task [T, d], and the loss [T] of its support before the first step."""
        loop, start = self.inner_loop, self.prompt
        assert loop is not None
        assert start is not None
        second = loop.order == "second" and torch.is_grad_enabled() and train
        prompts, first = start.expand(batch.num_tasks, -1), None
        if not prompts.requires_grad:
            prompts = prompts.detach().requires_grad_()
        target = ((read.sequences.place > 0) & ~read.asked).nonzero()[:, 0]
        left_out = self._left_out(read, target, ~read.asked)
        for number in range(loop.steps if steps is None else steps):
            rate = loop.lr if self.inner_lr is None else self.inner_lr[min(number, len(self.inner_lr) - 1), 0]
            with unfused_attention() if second else nullcontext():
                states = self._states(read, batch, prompts, QUERY_PASS + 1 + number, train=train)
                sums, counts = self._task_losses(read, states, target, left_out)
                losses = sums / (counts + loop.prior).clamp(min=1)
            first = losses if first is None else first
            (grad,) = torch.autograd.grad(losses.sum(), [prompts], create_graph=second, retain_graph=True)
            prompts = prompts - rate * grad
        return prompts, first

    def _read(
        self,
        rows: EmbeddedRows,
        batch: TaskBatch,
        sides: tuple[Examples, ...],
        lookups: list[dict[str, Lookup]],
        *,
        train: bool,
    ) -> _Read:
        sequences, cells = sequences_of(*(side.mask for side in sides))
        events = self._embedded(rows.weights, lookups, list(sides), cells)
        shared = batch.shared
        drawn_unlike = shared is not None and LOG_CHANCE in shared.given
        return _Read(
            sequences,
            events,
            None if shared is None else self.model.items(events),
            _column([side.ids[self.item] for side in sides], cells),
            None if self.domain is None else _column([side.ids[self.domain] for side in sides], cells),
            _column([side.given[LOG_CHANCE] for side in sides], cells) if drawn_unlike else None,
            cells >= sides[0].mask.numel(),
            self._keys(batch, sequences, train=train) if shared is not None and self.each else None,
            None if shared is None else self.items(rows, shared),
            shared,
        )

    def _keys(self, batch: TaskBatch, sequences: Sequences, *, train: bool) -> Tensor:
        """Return by which keys events choose candidates, int64 [N]; after training by their place alone, so that a user
        adapts alike whatever it is called and whoever is beside it.
        """
        epoch, index = (batch.epoch, batch.index) if train else (AFTER_TRAINING, 0)
        task = batch.task_id if train else torch.zeros_like(batch.task_id)
        places = torch.arange(sequences.longest, device=task.device)
        return sequences.flat(example_keys((self.seed, epoch, index), task, _CHOICE, places))

    def _states(self, read: _Read, batch: TaskBatch, prompts: Tensor | None, number: int, *, train: bool) -> Tensor:
        """Return the state of each event [N, d]; `number` is that of the pass, for dropout."""
        sequences, events = read.sequences, read.events
        key = (self.seed, batch.epoch, batch.index)
        longest = torch.arange(sequences.longest, device=read.item.device)

        def keys() -> Tensor:
            return sequences.flat(example_keys(key, batch.task_id, number, longest))

        if prompts is not None:
            events = {**events, PROMPT: prompts[sequences.task]}
        with Intercept(SeededDropout(keys if train else None)):
            found: Tensor = self.model.states(events, sequences)
        return found

    def _left_out(self, read: _Read, target: Tensor, known: Tensor) -> Tensor:
        """Return which candidates each target is not compared with, bool [P, C]. `target` int64 [P] says which events
        are targets, and `known` bool [N] which a task may be known to have.
        """
        shared, task = read.shared, read.sequences.task
        assert shared is not None, "a batch of next items to be learned has candidates"
        items = shared.ids[self.item].view(-1)
        out = read.item[target].unsqueeze(-1) == items
        if self.domain is not None and read.domain is not None:
            out |= read.domain[target].unsqueeze(-1) != shared.ids[self.domain].view(1, -1)
        if not self.own_items:
            had = had_by_tasks(task[known], read.item[known], items, len(read.sequences.lengths))
            out |= had[task[target]]
        return out if read.keys is None else all_but(self.each, out, read.keys[target])

    def _task_losses(self, read: _Read, states: Tensor, target: Tensor, left_out: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses of each task's targets, and their number, [T] each. `target` int64 [P] says
        which events are targets; the state of the event before has to find them. `left_out` is bool [P, C].
        """
        assert read.own is not None
        assert read.candidates is not None
        widths = list(getattr(self.model, "views", (states.shape[1],)))
        whole = (states[target - 1], read.own[target], read.candidates)
        views = zip(*(torch.split(part, widths, -1) for part in whole), strict=True)
        losses = torch.stack([_softmax_loss(read, target, left_out, *view) for view in views]).sum(0)
        task, num_tasks = read.sequences.task[target], len(read.sequences.lengths)
        sums = losses.new_zeros(num_tasks).index_add(0, task, losses)
        return sums, torch.bincount(task, minlength=num_tasks)

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


def _softmax_loss(
    read: _Read, target: Tensor, left_out: Tensor, before: Tensor, own: Tensor, candidates: Tensor
) -> Tensor:
    """Return the losses [P] of targets: of states before them and their own vectors, [P, d], and candidates [C, d]."""
    found = _exactly((before * own).sum(-1, keepdim=True))
    scores = _exactly(before @ candidates.mT)
    if read.log_chance is not None:
        assert read.shared is not None
        found = found - read.log_chance[target].unsqueeze(-1)
        scores = scores - read.shared.given[LOG_CHANCE].view(1, -1)
    scores = scores.masked_fill(left_out, -torch.inf)
    return torch.logsumexp(torch.cat([found, scores], 1), 1) - found.squeeze(1)


def _looking_at(read: _Read, events: Tensor) -> _Read:
    """Return the pass with states at some events alone, int64 [P]."""
    wanted = torch.zeros_like(read.sequences.place, dtype=torch.bool).index_fill(0, events, True)
    return read._replace(sequences=replace(read.sequences, wanted=wanted))


def _width_of(model: nn.Module) -> int:
    width = getattr(model, "width", None)
    if not isinstance(width, int):
        raise ValueError(
            f"meta.adapt names {PROMPT!r}, a vector beside each event, and {type(model).__name__} has no attribute "
            "`width` that says how wide: it reads no vectors of events, as llmrec with reader tokens; or give it one, "
            "and add events['prompt'] where it is there"
        )
    return width


Objective: TypeAlias = MetaLearner | NextItemLearner
"""What a run trains: scores of examples, or next items."""


def _exactly(scores: Tensor) -> Tensor:
    """Return scores in float32 at least: a softmax over many is none in bf16."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _column(parts: list[Tensor], cells: Tensor | None) -> Tensor:
    """Return what flattened blocks [T, S, ...] hold at some cells, all cells where None: [n]."""
    flat = torch.cat([part.reshape(-1) for part in parts])
    return flat if cells is None else flat.index_select(0, cells)
