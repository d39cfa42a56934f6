"""The engines side by side: what meta-learning costs over a plain training step, and over the usual ways to write it.

    python benchmarks/engine.py [--quick] [--json FILE]

Timed is fetched rows -> loss -> gradients of every row and dense parameter, in one process, variants in turn.
Every variant starts from the same numbers, and all meta-learning variants of one order must agree on loss and
gradients before anything is timed.

    plain            gmeta, `adapt: []`, on support and query together
    plain-torch      the obvious loop: nn.Embedding per feature (sparse gradients), the same network, autograd
    loop-*           one task at a time, torch.func.functional_call and autograd.grad: what is usually written
    vmap-second      torch.func.vmap over tasks, torch.func.grad inside
    factored-*       gmeta
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from common import Record, alternate, arguments, median, publish, table
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from gmeta.batch import EmbeddedRows, Examples, Lookup, TaskBatch
from gmeta.meta.learner import MetaLearner
from gmeta.models.melu import MeLU

INNER_LR = 0.1
VOCABULARY = 20_000  # ids of each feature
META_VARIANTS = ("loop-first", "loop-second", "vmap-second", "factored-first", "factored-second")


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
        """As in result files."""
        layers = "-".join(str(width) for width in self.hidden)
        return f"{self.tasks}x{self.support}+{self.query} {self.features}x{self.dim} {layers}"

    @property
    def samples(self) -> int:
        """Examples in a batch."""
        return self.tasks * (self.support + self.query)


CASES = (
    Case(32, 40, 10, 8, 32, (64, 64)),
    Case(128, 10, 10, 20, 16, (256, 128)),
    Case(256, 10, 10, 26, 16, (512, 256)),
)


@dataclass(frozen=True)
class Inputs:
    """One batch, as each kind of variant wants it. Everything here is made before the clock starts."""

    rows: EmbeddedRows
    batch: TaskBatch
    ids: Tensor  # int64 [features, samples]: raw ids, for plain-torch
    label: Tensor  # [samples]
    own_rows: Tensor  # int64 [T, P]: the rows of each task, padded with row 0
    own_support: Tensor  # int64 [features, T, S]: where lookups are among the task's rows
    own_query: Tensor  # int64 [features, T, Q]


def make_inputs(case: Case) -> Inputs:
    """Ids drawn by a power law, so that tasks share rows and sides overlap; labels at random."""
    generator = torch.Generator().manual_seed(0)
    length = case.support + case.query
    uniform = torch.rand(case.features, case.tasks, length, generator=generator)
    ids = (VOCABULARY * uniform**3).long()
    fixed = case.features // 2
    ids[:fixed] = ids[:fixed, :, :1]
    keys = ids + VOCABULARY * torch.arange(case.features).view(-1, 1, 1)
    unique, index = keys.unique(return_inverse=True)
    weight = 0.1 * torch.randn(len(unique), case.dim, generator=generator)
    label = (torch.rand(case.tasks, length, generator=generator) < 0.5).float()
    names = [f"f{i}" for i in range(case.features)]
    cut = [case.support, case.query]
    lookups = [
        {name: Lookup("rows", part[i].contiguous()) for i, name in enumerate(names)} for part in index.split(cut, 2)
    ]
    sides = [_examples(part) for part in label.split(cut, 1)]
    batch = TaskBatch(*sides, task_id=torch.arange(case.tasks), num_tasks_global=case.tasks, epoch=0, index=0)
    own = [index[:, t].unique(return_inverse=True) for t in range(case.tasks)]
    own_rows = nn.utils.rnn.pad_sequence([rows for rows, _ in own], batch_first=True)
    own_index = torch.stack([where for _, where in own], 1)
    flat = [part.reshape(*part.shape[:-2], -1) for part in (*ids.split(cut, 2), *label.split(cut, 1))]
    return Inputs(
        EmbeddedRows({"rows": weight.requires_grad_()}, *lookups),
        batch,
        torch.cat(flat[:2], 1),
        torch.cat(flat[2:]),
        own_rows,
        *own_index.split(cut, 2),
    )


def _examples(label: Tensor) -> Examples:
    mask = torch.ones_like(label, dtype=torch.bool)
    zeros = torch.zeros_like(label, dtype=torch.int64)
    return Examples({}, {}, label.new_zeros(*label.shape, 0), label, mask, zeros, ~mask)


def build(case: Case) -> MeLU:
    torch.manual_seed(0)
    names = [f"f{i}" for i in range(case.features)]
    return MeLU(names, embedding_dim=case.dim, num_numeric=0, hidden=case.hidden)


def learner_step(learner: MetaLearner, inputs: Inputs) -> Tensor:
    loss, _ = learner(inputs.rows, inputs.batch)
    loss.backward()
    return loss.detach()


def embed(table: Tensor, index: Tensor) -> dict[str, Tensor]:
    return {f"f{i}": table[index[i]] for i in range(index.shape[0])}


def inner_loss(fast: dict[str, Tensor], model: nn.Module, index: Tensor, label: Tensor) -> Tensor:
    parameters = {name: value for name, value in fast.items() if name != "rows"}
    logits = functional_call(model, parameters, (label.new_zeros(*label.shape, 0), embed(fast["rows"], index)))
    return F.binary_cross_entropy_with_logits(logits, label)


def loop_step(model: nn.Module, inputs: Inputs, second: bool) -> Tensor:
    """One task after the other; a backward for each, so that only one task's graph is alive."""
    weight, batch = inputs.rows.weights["rows"], inputs.batch
    total = torch.zeros(())
    for t in range(batch.num_tasks):
        fast = {**dict(model.named_parameters()), "rows": weight[inputs.own_rows[t]]}
        loss = inner_loss(fast, model, inputs.own_support[:, t], batch.support.label[t])
        steps = torch.autograd.grad(loss, list(fast.values()), create_graph=second)
        fast = {name: value - INNER_LR * step for (name, value), step in zip(fast.items(), steps, strict=True)}
        loss = inner_loss(fast, model, inputs.own_query[:, t], batch.query.label[t]) / batch.num_tasks_global
        loss.backward()
        total += loss.detach()
    return total


def vmap_step(model: nn.Module, inputs: Inputs) -> Tensor:
    weight, batch = inputs.rows.weights["rows"], inputs.batch
    parameters = dict(model.named_parameters())

    def task_loss(rows: Tensor, support: Tensor, query: Tensor, label: Tensor, query_label: Tensor) -> Tensor:
        fast = {**parameters, "rows": rows}
        steps = grad(inner_loss)(fast, model, support, label)
        fast = {name: value - INNER_LR * steps[name] for name, value in fast.items()}
        return inner_loss(fast, model, query, query_label)

    losses = vmap(task_loss, in_dims=(0, 1, 1, 0, 0))(
        weight[inputs.own_rows], inputs.own_support, inputs.own_query, batch.support.label, batch.query.label
    )
    loss = losses.sum() / batch.num_tasks_global
    loss.backward()
    return loss.detach()


def plain_torch_step(model: nn.Module, tables: nn.ModuleList, inputs: Inputs) -> Tensor:
    embedded = {f"f{i}": table(inputs.ids[i]) for i, table in enumerate(tables)}
    logits = model(inputs.label.new_zeros(len(inputs.label), 0), embedded)
    loss = F.binary_cross_entropy_with_logits(logits, inputs.label)
    loss.backward()
    return loss.detach()


def variants(case: Case, inputs: Inputs) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """Name -> (step, tensors that receive gradients)."""
    model = build(case)
    settings = {"embedding_features": model.features, "inner_lr": INNER_LR, "engine": "factored"}
    plain = MetaLearner(model, adapt=[], **settings)
    first, second = (
        MetaLearner(model, adapt=["embeddings", "dense"], order=order, **settings) for order in ("first", "second")
    )
    tables = nn.ModuleList(nn.Embedding(VOCABULARY, case.dim, sparse=True) for _ in range(case.features))
    steps: dict[str, Callable[[], Tensor]] = {
        "plain": partial(learner_step, plain, inputs),
        "plain-torch": partial(plain_torch_step, model, tables, inputs),
        "loop-first": partial(loop_step, model, inputs, False),
        "loop-second": partial(loop_step, model, inputs, True),
        "vmap-second": partial(vmap_step, model, inputs),
        "factored-first": partial(learner_step, first, inputs),
        "factored-second": partial(learner_step, second, inputs),
    }
    leaves = [*model.parameters(), inputs.rows.weights["rows"]]
    return {name: (partial(_fresh, step, [*leaves, *tables.parameters()]), leaves) for name, step in steps.items()}


def _fresh(step: Callable[[], Tensor], leaves: list[Tensor]) -> Tensor:
    for leaf in leaves:
        leaf.grad = None
    return step()


def check_agreement(steps: dict[str, tuple[Callable[[], Tensor], list[Tensor]]]) -> None:
    """Run everything once (the warm-up): variants of one order must compute the same, or timing them means nothing."""
    results = {}
    for name, (step, leaves) in steps.items():
        loss = step()
        results[name] = [loss, *(leaf.grad for leaf in leaves)]
    for name in META_VARIANTS:
        ours = results[name]
        theirs = results["loop-second" if name.endswith("second") else "loop-first"]
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def measure(case: Case, repetitions: int) -> list[Record]:
    steps = variants(case, make_inputs(case))
    check_agreement(steps)
    seconds = {
        name: median(times)
        for name, times in alternate({name: step for name, (step, _) in steps.items()}, repetitions).items()
    }
    records = []
    for name, value in seconds.items():
        records += [
            Record(case.name, name, "samples_per_s", case.samples / value, "1/s"),
            Record(case.name, name, "step_ms", value * 1e3, "ms"),
            Record(case.name, name, "ratio_to_plain", value / seconds["plain"], "x"),
        ]
        if name in META_VARIANTS:
            loop = seconds["loop-first" if name.endswith("first") else "loop-second"]
            records.append(Record(case.name, name, "speedup_over_loop", loop / value, "x"))
    return records


def render(records: list[Record]) -> str:
    metrics = ("samples_per_s", "step_ms", "ratio_to_plain", "speedup_over_loop")
    values = {(r.case, r.variant, r.metric): r.value for r in records}
    rows = []
    for case, variant in dict.fromkeys((r.case, r.variant) for r in records):
        numbers = [values.get((case, variant, metric)) for metric in metrics]
        forms = ("{:,.0f}", "{:.1f}", "{:.2f}", "{:.1f}")
        rows.append([case, variant, *("" if n is None else f.format(n) for n, f in zip(numbers, forms, strict=True))])
    return table(["case", "variant", *metrics], rows)


def main() -> None:
    args = arguments("Meta-learning engines against plain training, a loop of tasks, and vmap.")
    repetitions = 2 if args.quick else 15
    records = [record for case in CASES for record in measure(case, repetitions)]
    config = {
        "repetitions": f"{repetitions}, median",
        "threads": torch.get_num_threads(),
        "inner steps": 1,
        "adapted": "embeddings and all dense layers",
        "precision": "float32",
        "timed": "fetched rows -> loss -> gradients of all rows and dense parameters",
    }
    publish("engine", render(records), records, config, args)


if __name__ == "__main__":
    main()
