"""MetaLearner: adapt to each task's support, judge on its query, differentiate through it. Knows no collective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from gmeta.core.batch import EmbeddedRows, Lookup, TaskBatch
from gmeta.meta import factored, reference
from gmeta.meta.dropout import QUERY_PASS, BatchKey, SeededDropout, row_keys
from gmeta.meta.gather_plan import Plan, plan_rows, shared_rows
from gmeta.meta.inner_loop import InnerLoop, refuse_batch_norm, resolve
from gmeta.meta.interception import Intercept
from gmeta.meta.losses import row_loss, task_mean, widen
from gmeta.meta.modulation import Modulator
from gmeta.meta.views import Embedded


@dataclass(frozen=True, slots=True)
class LearnerOutput:
    """What a step is judged by; nothing here holds a graph."""

    query_logits: Tensor  # [T, Q]
    query_loss: Tensor  # [T], mean over the task's query rows, after adaptation
    support_loss: Tensor  # [T], before adaptation


class MetaLearner(nn.Module):
    """A model and its inner loop.

    `adapt` names what a task adapts (see `resolve` in inner_loop.py); empty is plain training, whose task loss is the
    mean over support and query rows. `inner_lr` is one number, or with `learn_inner_lr` the start of a parameter
    [inner_steps, groups], one group for each module with adapted parameters and one for all embeddings
    (`rate_names`). `engine` is factored, reference, or auto: factored where it can adapt the model, which the first
    batch decides; `engine_reason` then says what was taken and why. With `inner_prior` pseudo-rows, the inner loss is
    the sum of a task's support losses / (its rows + inner_prior), so that a small support moves less. A `modulator`
    (`gmeta.meta.modulation.build_modulator`) decides from the support where a task's linear layers start. With
    `recompute` the factored engine keeps of each inner step its state alone (`gmeta.meta.recompute`).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        embedding_features: Sequence[str],
        adapt: Sequence[str],
        order: Literal["first", "second"] = "second",
        inner_steps: int = 1,
        inner_lr: float = 0.1,
        learn_inner_lr: bool = False,
        loss: str = "bce",
        inner_loss: str | None = None,
        inner_prior: float = 0.0,
        recompute: bool = False,
        modulator: Modulator | None = None,
        engine: Literal["auto", "factored", "reference"] = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        refuse_batch_norm(model)
        self.model = model
        self.embedding_features = tuple(embedding_features)
        self.adapted = resolve(adapt, model, embedding_features)
        self.second_order = order == "second"
        self.inner_steps = inner_steps
        self.initial_inner_lr = inner_lr
        self.loss = row_loss(loss)
        self.inner_loss = row_loss(inner_loss or loss)
        self.inner_prior = inner_prior
        self.recompute = recompute
        if modulator is not None and not self.adapted:
            raise ValueError("a modulator decides where the inner loop starts, but adapt is empty: name what it adapts")
        self.modulator = modulator
        self.seed = seed
        self.engine: str = engine
        self.engine_reason = "auto: not chosen yet" if engine == "auto" else f"{engine}, as configured"
        if not self.adapted:
            self.engine_reason = "none: plain training"
        learned = None
        if learn_inner_lr and self.adapted:
            learned = nn.Parameter(torch.full((inner_steps, len(self.adapted.rates)), inner_lr))
        self.inner_lr = learned

    @property
    def rate_names(self) -> tuple[str, ...]:
        """Names of the columns of `inner_lr`."""
        return self.adapted.rates

    def choose_engine(self, dims: Mapping[str, int], num_numeric: int) -> None:
        """Decide what `engine: auto` means for this model; called by the first batch if nobody did before.

        `dims` is the embedding dimension of each feature, `num_numeric` the number of numeric columns.
        """
        if self.engine != "auto":
            return
        try:
            modulated = {} if self.modulator is None else self.modulator.sizes
            factored.check(self.model, self.adapted, dims, num_numeric, modulated)
        except factored.Unsupported as reason:
            self.engine, self.engine_reason = "reference", f"reference, because {reason}"
        else:
            self.engine, self.engine_reason = "factored", "factored"

    def plan(
        self,
        support: Mapping[str, Lookup],
        query: Mapping[str, Lookup],
        num_rows: Mapping[str, int],
        batch: TaskBatch,
    ) -> Plan:
        """Index work of a batch: what `forward` otherwise does itself. Needs no rows, so a loader's thread can do it.

        `num_rows[group]` is the number of rows U that will be fetched.
        """
        shapes = ((batch.num_tasks, batch.support.mask.shape[1]), (batch.num_tasks, batch.query.mask.shape[1]))
        features, adapted = self.embedding_features, self.adapted.features
        return plan_rows(support, query, num_rows, shapes, features, adapted, split=bool(self.adapted))

    def _plan(self, rows: EmbeddedRows, batch: TaskBatch) -> Plan:
        return self.plan(rows.support, rows.query, {g: weight.shape[0] for g, weight in rows.weights.items()}, batch)

    def forward(self, rows: EmbeddedRows, batch: TaskBatch, plan: Plan | None = None) -> tuple[Tensor, LearnerOutput]:
        """(loss, output). The loss is the sum over this rank's tasks of a task's mean loss / num_tasks_global.

        A task without support adapts nothing; a task without query rows contributes 0. With no task at all the loss
        is 0 and backward gives zero or no gradients.
        """
        plan = plan or self._plan(rows, batch)
        key = (self.seed, batch.epoch, batch.index) if self.training else None
        if not self.adapted:
            return self._plain(rows, batch, plan, key)
        loop = self._loop(self.inner_steps, None, key, rows)
        logits, support_loss = self._run(loop, rows, batch, plan)
        query_loss = task_mean(self.loss(logits, batch.query.label), batch.query.mask)
        loss = query_loss.sum() / batch.num_tasks_global
        return loss, LearnerOutput(logits.detach(), query_loss.detach(), support_loss)

    def predict(
        self,
        rows: EmbeddedRows,
        batch: TaskBatch,
        steps: int | None = None,
        inner_lr: float | None = None,
        plan: Plan | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Query logits [T, Q] before and after adaptation, without dropout; no graph is left behind.

        Before adaptation nothing of the support is seen: a modulator then sees an empty one.
        `steps` and `inner_lr` override what was trained; learned rates repeat their last step beyond `inner_steps`.
        """
        plan = plan or self._plan(rows, batch)
        if not self.adapted:
            with torch.no_grad():
                _, logits = self._flat_logits(rows, batch, plan, None)
            return logits, logits
        loop = replace(
            self._loop(self.inner_steps if steps is None else steps, inner_lr, None, rows), second_order=False
        )
        loop = replace(loop, rates=loop.rates.detach())
        with torch.no_grad():
            before, _ = self._run(replace(loop, rates=loop.rates[:0]), rows, batch, plan)
        with torch.enable_grad():
            after, _ = self._run(loop, rows, batch, plan)
        return before, after.detach()

    def _loop(self, steps: int, inner_lr: float | None, key: BatchKey | None, rows: EmbeddedRows) -> InnerLoop:
        rate = None
        if self.inner_lr is None or inner_lr is not None:
            like = next(iter(rows.weights.values()))
            rate = self.initial_inner_lr if inner_lr is None else inner_lr
            rates = like.new_full((steps, len(self.adapted.rates)), rate)
        elif steps <= self.inner_steps:
            rates = self.inner_lr[:steps]
        else:
            rates = torch.cat([self.inner_lr, self.inner_lr[-1:].expand(steps - self.inner_steps, -1)])
        return InnerLoop(
            self.adapted,
            self.inner_loss,
            self.second_order,
            rates,
            key,
            rate=rate,
            recompute=self.recompute,
            prior=self.inner_prior,
            modulator=self.modulator,
        )

    def _run(self, loop: InnerLoop, rows: EmbeddedRows, batch: TaskBatch, plan: Plan) -> tuple[Tensor, Tensor]:
        dims = {name: rows.weights[lookup.group].shape[1] for name, lookup in rows.support.items()}
        self.choose_engine(dims, batch.support.dense.shape[-1])
        if self.engine == "reference":
            return reference.run(self.model, loop, rows, batch)
        return factored.run(self.model, loop, rows, batch, plan)

    def _plain(
        self, rows: EmbeddedRows, batch: TaskBatch, plan: Plan, key: BatchKey | None
    ) -> tuple[Tensor, LearnerOutput]:
        sides = (batch.support, batch.query)
        logits = self._flat_logits(rows, batch, plan, key)
        losses = [self.loss(part, side.label) for part, side in zip(logits, sides, strict=True)]
        together = task_mean(torch.cat(losses, 1), torch.cat([side.mask for side in sides], 1))
        support_loss, query_loss = (
            task_mean(part.detach(), side.mask) for part, side in zip(losses, sides, strict=True)
        )
        return together.sum() / batch.num_tasks_global, LearnerOutput(logits[1].detach(), query_loss, support_loss)

    def _flat_logits(
        self, rows: EmbeddedRows, batch: TaskBatch, plan: Plan, key: BatchKey | None
    ) -> tuple[Tensor, Tensor]:
        """Logits of support [T, S] and query [T, Q] from one call of the unadapted model."""
        sides = (batch.support, batch.query)
        dense = torch.cat([side.dense.flatten(0, 1) for side in sides])
        embedded = Embedded(shared_rows(rows, plan), plan, dense.shape[:1])
        dropout = SeededDropout(None if key is None else partial(_flat_keys, key, batch))
        with Intercept(embedded, dropout):
            logits = self.model(dense, embedded.features)
        support, query = torch.split(widen(logits), [side.mask.numel() for side in sides])
        return support.view(batch.support.mask.shape), query.view(batch.query.mask.shape)


def _flat_keys(key: BatchKey, batch: TaskBatch) -> Tensor:
    """Dropout keys of all support rows, then all query rows: int64 [T*S + T*Q]."""
    keys = []
    for side, pass_number in ((batch.support, QUERY_PASS + 1), (batch.query, QUERY_PASS)):
        positions = torch.arange(side.mask.shape[1], device=batch.task_id.device)
        keys.append(row_keys(key, batch.task_id, pass_number, positions).flatten())
    return torch.cat(keys)
