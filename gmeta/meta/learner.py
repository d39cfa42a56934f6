"""MetaLearner: adapt to each task's support, judge on its query, differentiate through it. Knows no collective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmeta.core.batch import EmbeddedRows, Examples, Lookup, TaskBatch, to_device
from gmeta.data.schema import LabelColumn
from gmeta.meta import closed_form, factored, gather_plan, reference
from gmeta.meta.dropout import QUERY_PASS, BatchKey, SeededDropout, example_keys
from gmeta.meta.fast_weights import FastWeights
from gmeta.meta.gather_plan import GatherPlan, shared_rows
from gmeta.meta.inner_loop import Adapted, InnerLoop, InnerPass, resolve_adapted
from gmeta.meta.interception import Intercept
from gmeta.meta.losses import counts_of, example_loss, over_labels, several_losses, task_mean, widen
from gmeta.meta.modulation import Modulator
from gmeta.meta.trial import choose_engine, require_last_layer, try_examples
from gmeta.meta.views import Embedded
from gmeta.models.inputs import TextInput
from gmeta.models.last_layer import BayesianLinear

_SUPPORT_PASS = QUERY_PASS - 1  # inner steps are passes from QUERY_PASS + 1 on


@dataclass(frozen=True, slots=True)
class LearnerOutput:
    """What a step is judged by. The logits hold the graph, for terms that a loop of your own adds to the loss."""

    query_logits: Tensor  # [T, Q], or [T, Q, K] of several labels
    query_loss: Tensor  # [T], (weighted) mean over the task's query rows, after adaptation; detached
    support_loss: Tensor  # [T], before adaptation; detached


class MetaLearner(nn.Module):
    """A model and its inner loop.

    `features` has the embedding dimension of each feature that the model reads, `num_numeric` is the number of numeric
    columns that it is given. Of the features in `sequences` it reads all values, [..., L, d]; those that are not among
    `features`, and `vectors`, are what examples carry for it (`Examples.given`), by their width, and so are the
    ids of `texts`, and of `routes`, by the number of these. `loss` is the query's
    and, unless the inner loop has its own, the support's. With several `labels` the model returns a logit for each,
    [..., K], a task's loss is the sum of its mean losses of each label, in both loops, and `loss` is the first one's.
    A `modulator` (`gmeta.meta.modulation.build_modulator`) decides from the support where a task's linear layers start.

    `engine` is factored, reference, or auto: factored where it can adapt the model. The model is tried out here, on
    random numbers; `engine_reason` then says what was taken and why. A last layer in closed form needs neither: the
    model then runs on all examples at once, as in plain training. ValueError for a model that mixes examples, draws
    random numbers that no seed reaches, returns another shape than one logit an example, or fails
    (`gmeta.meta.trial`). The trial leaves the model, its buffers and the global random state as they were.

    With learned rates `inner_lr` is a parameter [steps, groups]; `rate_names` names the groups.
    """

    def __init__(
        self,
        model: nn.Module,
        features: Mapping[str, int],
        num_numeric: int,
        inner_loop: InnerLoop,
        *,
        sequences: Mapping[str, int] | None = None,
        vectors: Mapping[str, int] | None = None,
        texts: Mapping[str, TextInput] | None = None,
        routes: Mapping[str, int] | None = None,
        loss: str = "bce",
        labels: Sequence[LabelColumn] = (),
        modulator: Modulator | None = None,
        engine: Literal["auto", "factored", "reference"] = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.features = dict(features)
        self.sequences, self.vectors, self.texts = dict(sequences or {}), dict(vectors or {}), dict(texts or {})
        self.routes = dict(routes or {})
        self.inner_loop = inner_loop
        self.adapted = resolve_adapted(inner_loop.adapt, model, tuple(features))
        self.loss_name = loss
        self.inner_loss_name = inner_loop.loss or loss
        self.labels = tuple(labels)
        if labels:
            _refuse_one_label(labels, inner_loop, modulator, self.adapted)
            self.loss = several_losses([label.loss for label in labels], [label.weight for label in labels])
            self.inner_loss = self.loss
        else:
            self.loss, self.inner_loss = example_loss(loss), example_loss(self.inner_loss_name)
        if modulator is not None and not self.adapted.steps:
            raise ValueError(
                f"a modulator decides where SGD steps start, but adapt {list(inner_loop.adapt)} takes none: name what "
                "they adapt"
            )
        self.modulator = modulator
        self.seed = seed
        stepping = replace(self.adapted, last_layer="")
        carried = (self.sequences, self.vectors, self.texts, self.routes)
        examples = try_examples(model, self.features, num_numeric, *carried)
        examples = replace(examples, labels=tuple(label.name for label in labels))
        sizes = {} if modulator is None else modulator.sizes
        self.engine, self.engine_reason = choose_engine(model, stepping, examples, sizes, engine)
        if self.last_layer is not None:
            closed_form.require_solver(self.inner_loss_name)
            require_last_layer(model, self.last_layer, examples)
            if not self.adapted.steps:
                self.engine_reason = "closed form"
        learned = None
        if inner_loop.learn_lr and self.adapted.rates:
            learned = nn.Parameter(torch.full((inner_loop.steps, len(self.adapted.rates)), inner_loop.lr))
        self.inner_lr = learned

    @property
    def last_layer(self) -> BayesianLinear | None:
        """Return the layer that is solved for in closed form, if there is one."""
        name = self.adapted.last_layer
        return self.model.get_submodule(name) if name else None  # type: ignore[return-value]

    @property
    def rate_names(self) -> tuple[str, ...]:
        """Return the names of the columns of `inner_lr`."""
        return self.adapted.rates

    def index(
        self, support: Mapping[str, Lookup], query: Mapping[str, Lookup], num_rows: Mapping[str, int]
    ) -> tuple[GatherPlan, ...]:
        """Return the index work of a batch, which needs no rows, so that a loader's thread can do it ahead; on the CPU.

        `num_rows[table]` is the number of rows U that will be fetched. Two plans, of support and query, or with plain
        training one for both together.
        """
        if not self.adapted:
            return (gather_plan.plan_together(support, query, num_rows, tuple(self.features)),)
        if self._by_reference:
            plan = self.index_support(support, num_rows)
            return plan, plan
        return gather_plan.plan_batch(support, query, num_rows, tuple(self.features), self.adapted.features)

    def index_support(self, support: Mapping[str, Lookup], num_rows: Mapping[str, int]) -> GatherPlan:
        """Return the index work of a support alone, for `adapt`; on the CPU.

        Its `pairs[table]` int64 [P, 2] are the (position of the task, position of the row among the U fetched ones)
        whose rows a task adapts, numbered as in `index`. The fast weights carry them on: `FastWeights.with_row_ids`
        turns positions into ids that are found again among rows fetched later.
        """
        if self._by_reference:
            return GatherPlan({}, {}, {}, reference.pairs_of(support, self.adapted.features))
        return gather_plan.plan_support(support, num_rows, tuple(self.features), self.adapted.features)

    def index_query(
        self,
        query: Mapping[str, Lookup],
        num_rows: Mapping[str, int],
        pairs: Mapping[str, Tensor],
        row_ids: Mapping[str, Tensor] | None = None,
    ) -> GatherPlan:
        """Return the index work of examples of tasks that were adapted before, for `score`; on the CPU.

        `pairs` is that of their fast weights. Its rows are positions among the U rows fetched here or, with
        `row_ids[table]` int64 [U], the distinct ids of the rows fetched here, ids: some may not be among them.
        """
        pairs = {table: keys.cpu() for table, keys in pairs.items()}
        if row_ids is not None:
            pairs = {table: gather_plan.rows_among(keys, row_ids[table].cpu()) for table, keys in pairs.items()}
        if self._by_reference:
            return GatherPlan({}, {}, {}, pairs)
        return gather_plan.plan_query(query, num_rows, tuple(self.features), self.adapted.features, pairs)

    def adapt(
        self,
        rows: EmbeddedRows,
        support: Examples,
        index: GatherPlan | None = None,
        *,
        steps: int | None = None,
        inner_lr: float | None = None,
    ) -> FastWeights:
        """Return the fast weights of every task of a support, without dropout; they hold no graph.

        Reads `rows.weights` and `rows.support`. Without `index`, that of `index_support` is made here. `steps` and
        `inner_lr` override what was trained; learned rates repeat their last step beyond `inner_loop.steps`. With no
        steps nothing of the support is seen: a modulator then sees an empty one. Plain training adapts nothing.
        """
        if not self.adapted:
            return FastWeights(len(support.mask))
        if index is None:
            index = to_device(self.index_support(rows.support, _num_rows(rows)), support.mask.device)
        inner = self._pass(rows, None, steps, inner_lr)
        inner = replace(inner, second_order=False, rates=inner.rates.detach())
        with torch.set_grad_enabled(self.adapted.steps):
            fast, _ = self._adapt(inner, rows, support, index, with_loss=False)
        return fast.detach()

    def score(
        self, fast: FastWeights, rows: EmbeddedRows, examples: Examples, index: GatherPlan | None = None
    ) -> Tensor:
        """Return the logits [T, Q] of examples of the tasks whose fast weights are given, without dropout.

        Reads `rows.weights` and `rows.query`. Without `index`, that of `index_query` is made here, for pairs that are
        positions among these rows. Differentiable where gradients are enabled. ValueError for fast weights of another
        number of tasks, or that this learner's engine cannot apply.
        """
        index = self._index_for(fast, rows, examples, index)
        if not self.adapted:
            return self._flat_logits(rows, (examples,), index, None)[0]
        return self._score(self._pass(rows, None), fast, rows, examples, index, expected=True)

    def deviation(
        self, fast: FastWeights, rows: EmbeddedRows, examples: Examples, index: GatherPlan | None = None
    ) -> Tensor:
        """Return the posterior standard deviation [T, Q] of the logits that `score` gives: what more support would
        teach. ValueError where no last layer was solved for.
        """
        posterior = closed_form.require_posterior(fast)
        index = self._index_for(fast, rows, examples, index)
        bases, _ = self._bases(self._pass(rows, None), fast, rows, examples, index, QUERY_PASS)
        return closed_form.deviation(posterior, bases)

    def _index_for(
        self, fast: FastWeights, rows: EmbeddedRows, examples: Examples, index: GatherPlan | None
    ) -> GatherPlan:
        if fast.num_tasks != len(examples.mask):
            raise ValueError(
                f"fast weights of {fast.num_tasks} tasks cannot score examples of {len(examples.mask)} tasks: choose "
                "them with of_tasks, in the order of the examples"
            )
        if index is not None:
            return index
        return to_device(self.index_query(rows.query, _num_rows(rows), fast.pairs), examples.mask.device)

    def forward(
        self, rows: EmbeddedRows, batch: TaskBatch, index: tuple[GatherPlan, ...] | None = None
    ) -> tuple[Tensor, LearnerOutput]:
        """Return (loss, output). The loss is the sum over this rank's tasks of a task's mean loss / num_tasks_global.

        A task without support adapts nothing; a task without query rows contributes 0. With no task at all the loss
        is 0 and backward gives zero or no gradients.
        """
        index = index or self._index(rows, batch)
        key = (self.seed, batch.epoch, batch.index) if self.training else None
        if not self.adapted:
            return self._plain(rows, batch, index[0], key)
        inner = self._pass(rows, None if key is None else (key, batch.task_id))
        fast, support_loss = self._adapt(inner, rows, batch.support, index[0])
        assert support_loss is not None
        logits = self._score(inner, fast, rows, batch.query, index[1], expected=not self.training)
        query_loss = over_labels(task_mean(self.loss(logits, batch.query.label), counts_of(batch.query)))
        loss = query_loss.sum() / batch.num_tasks_global
        return loss, LearnerOutput(logits, query_loss.detach(), support_loss)

    def predict(
        self,
        rows: EmbeddedRows,
        batch: TaskBatch,
        index: tuple[GatherPlan, ...] | None = None,
        *,
        steps: int | None = None,
        inner_lr: float | None = None,
        before: bool = True,
    ) -> tuple[Tensor | None, Tensor]:
        """Return the query logits [T, Q] before and after adaptation, without dropout; no graph is left behind.

        `steps` and `inner_lr` are those of `adapt`; before adaptation means no steps. Without `before` that pass is
        left out, and None comes in its place.
        """
        index = index or self._index(rows, batch)
        with torch.no_grad():
            if not self.adapted:
                _, logits = self._flat_logits(rows, (batch.support, batch.query), index[0], None)
                return (logits if before else None), logits
            *first, after = (
                self.score(
                    self.adapt(rows, batch.support, index[0], steps=number, inner_lr=inner_lr),
                    rows,
                    batch.query,
                    index[1],
                )
                for number in ((0, steps) if before else (steps,))
            )
        return (first[0] if before else None), after

    def _index(self, rows: EmbeddedRows, batch: TaskBatch) -> tuple[GatherPlan, ...]:
        return to_device(self.index(rows.support, rows.query, _num_rows(rows)), batch.task_id.device)

    def _pass(
        self,
        rows: EmbeddedRows,
        dropout: tuple[BatchKey, Tensor] | None,
        steps: int | None = None,
        inner_lr: float | None = None,
    ) -> InnerPass:
        """Return the inner loop for these tasks. `dropout` is the batch's key and the ids of its tasks."""
        loop, rate = self.inner_loop, None
        steps = loop.steps if steps is None else steps
        if self.inner_lr is None or inner_lr is not None:
            like = next(iter((*rows.weights.values(), *self.model.parameters())))
            rate = loop.lr if inner_lr is None else inner_lr
            rates = like.new_full((steps, len(self.adapted.rates)), rate)
        elif steps <= loop.steps:
            rates = self.inner_lr[:steps]
        else:
            rates = torch.cat([self.inner_lr, self.inner_lr[-1:].expand(steps - loop.steps, -1)])
        return InnerPass(
            self.model,
            self.adapted,
            self.inner_loss,
            loop.order == "second",
            rates,
            rate,
            loop.prior,
            loop.recompute,
            self.modulator,
            None if dropout is None else partial(example_keys, *dropout),
        )

    def _adapt(
        self, inner: InnerPass, rows: EmbeddedRows, support: Examples, plan: GatherPlan, *, with_loss: bool = True
    ) -> tuple[FastWeights, Tensor | None]:
        """Return the fast weights and, `with_loss` or where it is at hand, the support's loss [T] before adaptation."""
        fast, loss = FastWeights(len(support.mask)), None
        if self.adapted.steps:
            fast, loss = (reference.adapt if self._by_reference else factored.adapt)(inner, rows, support, plan)
        layer = self.last_layer
        if layer is None or not (with_loss or len(inner.rates)):
            return fast, loss
        again = EmbeddedRows(rows.weights, rows.support, rows.support)
        bases, logits = self._bases(inner, fast, again, support, plan, _SUPPORT_PASS)
        if loss is None and with_loss:
            before = inner.loss(closed_form.finished(self.model, logits), support.label)
            loss = task_mean(before, counts_of(support)).detach()
        if len(inner.rates):
            posterior = closed_form.solve(
                layer,
                bases,
                logits,
                support.label,
                support.mask,
                weight=support.weight,
                loss=self.inner_loss_name,
                second_order=inner.second_order,
            )
            fast = replace(fast, posterior=posterior)
        return fast, loss

    def _score(
        self,
        inner: InnerPass,
        fast: FastWeights,
        rows: EmbeddedRows,
        query: Examples,
        plan: GatherPlan,
        *,
        expected: bool,
    ) -> Tensor:
        """Return the logits [T, Q]. Clicks with a last layer's posterior have those of the expected probability, where
        `expected`, and those at the mode else: training needs no derivative of the spread.
        """
        layer = self.last_layer
        if layer is None:
            return (reference.score if self._by_reference else factored.score)(inner, fast, rows, query, plan)
        bases, logits = self._bases(inner, fast, rows, query, plan, QUERY_PASS)
        if fast.posterior is not None:
            logits = closed_form.shifted(layer, fast.posterior, bases, logits)
        if expected and self.loss_name == "bce":
            posterior = fast.posterior or closed_form.prior_of(layer, fast.num_tasks)
            logits = closed_form.averaged(logits, closed_form.deviation(posterior, bases))
        return closed_form.finished(self.model, logits)

    def _bases(
        self,
        inner: InnerPass,
        fast: FastWeights,
        rows: EmbeddedRows,
        examples: Examples,
        plan: GatherPlan,
        pass_number: int,
    ) -> tuple[Tensor, Tensor]:
        """Return the bases [T, S, d] of the last layer, and its outputs at the prior's mean [T, S], after the steps of
        what takes some. Reads `rows.query`.
        """
        layer, of_pass = self.last_layer, inner.keys
        assert layer is not None
        keys = None if of_pass is None else lambda _, positions: of_pass(pass_number, positions)
        with closed_form.recording(layer) as calls:
            if self.adapted.steps:
                engine = reference.score if self._by_reference else factored.score
                logits = engine(replace(inner, keys=keys), fast, rows, examples, plan)
            else:
                logits = self._flat_logits(rows, (examples,), plan, keys)[0]
        if not self._by_reference:
            return calls.bases[0].view(*examples.mask.shape, layer.width), calls.outputs[0].view(examples.mask.shape)
        padded, outputs = logits.new_zeros(*logits.shape, layer.width), torch.zeros_like(logits)
        where = [(torch.full_like(p, t), p) for t, p in enumerate(mask.nonzero().squeeze(-1) for mask in examples.mask)]
        for position, bases, output in zip(where, calls.bases, calls.outputs, strict=True):
            padded = padded.index_put(position, bases.to(padded.dtype))
            outputs = outputs.index_put(position, output.to(outputs.dtype))
        return padded, outputs

    @property
    def _by_reference(self) -> bool:
        return self.engine == "reference" and self.adapted.steps

    def embedded(self, rows: EmbeddedRows, index: GatherPlan, examples: Examples) -> dict[str, Tensor]:
        """Return the unadapted embedding of each of n examples, feature -> [n, d], and what the examples carry; `index`
        is their `index_query`.
        """
        given = _given_together((examples,))
        return Embedded(shared_rows(rows, index), index, (examples.mask.numel(),), given).features

    def _plain(
        self, rows: EmbeddedRows, batch: TaskBatch, plan: GatherPlan, key: BatchKey | None
    ) -> tuple[Tensor, LearnerOutput]:
        sides = (batch.support, batch.query)
        keys = None if key is None else partial(example_keys, key, batch.task_id)
        logits = self._flat_logits(rows, sides, plan, keys)
        losses = [self.loss(part, side.label) for part, side in zip(logits, sides, strict=True)]
        counts = [counts_of(side) for side in sides]
        together = over_labels(task_mean(torch.cat(losses, 1), torch.cat(counts, 1)))
        support_loss, query_loss = (
            over_labels(task_mean(part.detach(), of)) for part, of in zip(losses, counts, strict=True)
        )
        return together.sum() / batch.num_tasks_global, LearnerOutput(logits[1], query_loss, support_loss)

    def _flat_logits(
        self,
        rows: EmbeddedRows,
        sides: tuple[Examples, ...],
        plan: GatherPlan,
        keys: Callable[[int, Tensor], Tensor] | None,
    ) -> list[Tensor]:
        """Return the logits of each side [T, S] from one call of the unadapted model; the last side is the query."""

        def flat_keys() -> Tensor:
            assert keys is not None
            found = []
            for number, side in zip((QUERY_PASS + 1, QUERY_PASS)[-len(sides) :], sides, strict=True):
                found.append(keys(number, torch.arange(side.mask.shape[1], device=side.mask.device)).flatten())
            return torch.cat(found)

        dense = torch.cat([side.dense.flatten(0, 1) for side in sides])
        embedded = Embedded(shared_rows(rows, plan), plan, dense.shape[:1], _given_together(sides))
        with Intercept(embedded, SeededDropout(None if keys is None else flat_keys)):
            logits = self.model(dense, embedded.features)
        parts = torch.split(widen(logits), [side.mask.numel() for side in sides])
        return [part.view(*side.mask.shape, *part.shape[1:]) for part, side in zip(parts, sides, strict=True)]


def _refuse_one_label(
    labels: Sequence[LabelColumn], inner_loop: InnerLoop, modulator: Modulator | None, adapted: Adapted
) -> None:
    """Raise ValueError for what knows one label alone."""
    names = ", ".join(label.name for label in labels)
    for what, key, cure in (
        (modulator is not None, "meta.modulation", "leave it out"),
        (bool(adapted.last_layer), "meta.adapt last_layer", "adapt layers by steps, such as head or decision"),
        (inner_loop.loss is not None, "meta.inner_loss", "leave it out: the inner loop has the losses of the schema"),
    ):
        if what:
            raise ValueError(f"{key} is for one label, and the pack has {names}: {cure}")


def _given_together(sides: Sequence[Examples]) -> dict[str, Tensor]:
    """Return what examples carry for the model, of all sides behind each other, sequences padded to one length."""
    found = {}
    for name in sides[0].given:
        parts = [side.given[name].flatten(0, 1) for side in sides]
        longest = max(part.shape[1] for part in parts)
        if any(part.shape[1] != longest for part in parts):  # of vectors all are alike
            parts = [F.pad(part, (0, 0) * (part.dim() - 2) + (0, longest - part.shape[1])) for part in parts]
        found[name] = torch.cat(parts)
    return found


def _num_rows(rows: EmbeddedRows) -> dict[str, int]:
    return {table: weight.shape[0] for table, weight in rows.weights.items()}
