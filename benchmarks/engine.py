"""The engines side by side: what meta-learning costs over a plain training step, and over the usual ways to write it.

    python benchmarks/engine.py [--quick] [--json FILE]

Timed is the whole training step, raw ids -> loss -> gradients of every row and dense parameter -> optimizers, in one
process, variants in turn. Every variant has a model and tables of its own that start from the same numbers; all
variants of one kind must agree on loss and gradients before anything is timed. Row-wise Adagrad for gmeta's rows,
torch.optim.Adagrad for the others', AdamW for dense parameters. Where a step has index work that needs no weights
(gmeta's uniques and pairs), the thread that a loader would use does it for the next batch meanwhile, on the same cores.

    plain              gmeta, `adapt: []`, on support and query together
    plain-torch        the obvious loop: nn.Embedding(sparse=True) per feature, the same network, autograd
    plain-torch-fused  the careful loop: one nn.Embedding for all features, one look-up, fused AdamW
    loop-*             one task at a time, torch.func.functional_call and autograd.grad: what is usually written
    higher-second      one task at a time through `higher`, where it is installed
    torchopt-second    one task at a time through TorchOpt's differentiable SGD, where it is installed
    vmap-second        torch.func.vmap over tasks, torch.func.grad inside
    factored-*         gmeta
    last-layer-*       model neural_linear on the second case, its last layer in closed form
                       (beside neural-linear-plain), and one task alone: last_layer.py

The limit printed beside the measured ratio counts the multiplications of dense layers alone. Two more tables
have where a step's time goes, and what it does, counted, with the share of what the machine can do, measured by a large
product and a large copy (docs/performance.md).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import last_layer
import torch
import torch.nn.functional as F
from common import Record, alternate, arguments, median, publish, table
from counting import count, peaks
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from training_step import CASES, CPU, INNER_LR, LR, VOCABULARY, Case, Gmeta, build, make_batches, phases

from gmeta.core.batch import TaskBatch, to_device

torch.sparse.check_sparse_tensor_invariants.disable()  # as by default; where nobody says so Adagrad warns

AGREEMENT = 1e-4  # norm of a difference over that of the gradient, float32; first and second order differ by more
META = ("factored-first", "factored-second", "loop-first", "loop-second", "vmap-second")
COUNTED = ("plain", "factored-first", "factored-second")
TIMES = {
    "samples_per_s": "{:,.0f}",
    "step_ms": "{:.1f}",
    "ratio_to_plain": "{:.2f}",
    "limit_of_ratio": "{:.2f}",
    "speedup_over_loop": "{:.1f}",
}
PHASES = {f"{name}_ms": "{:.1f}" for name in ("index", "fetch", "forward", "backward", "updates")}
WORK = {"gflop": "{:.2f}", "flop_share": "{:.0%}", "megabytes": "{:.0f}", "bandwidth_share": "{:.0%}"}


StepLoss = Callable[[nn.Module, Tensor, TaskBatch, Tensor], Tensor]
"""(model, table [features * ids, d], batch, its ids [T, S + Q, features] in that table) -> loss; leaves gradients."""


@dataclass
class Torch:
    """A step written with PyTorch alone: one table for all features, `run` leaves gradients, stock optimizers."""

    case: Case
    batches: list[TaskBatch]
    rows: Tensor
    run: StepLoss
    device: torch.device = CPU
    steps: int = 0

    def __post_init__(self) -> None:
        self.model = build(self.case).to(self.device)
        self.table = nn.Parameter(self.rows.clone())
        self.dense = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.0, fused=True)
        self.sparse = torch.optim.Adagrad([self.table], lr=LR)
        self.ids = [_stacked(self.case, batch).to(self.device) for batch in self.batches]
        self.batches = [to_device(batch, self.device) for batch in self.batches]

    def __call__(self) -> Tensor:
        """Make one step, and return the loss."""
        i = self.steps % len(self.batches)
        self.steps += 1
        loss = self.run(self.model, self.table, self.batches[i], self.ids[i])
        for optimizer in (self.dense, self.sparse):
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def gradients(self) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return what `Gmeta.gradients` returns."""
        loss = self.run(self.model, self.table, self.batches[0], self.ids[0])
        dense = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        assert self.table.grad is not None
        rows = self.table.grad.to_dense()
        for optimizer in (self.dense, self.sparse):
            optimizer.zero_grad()
        return loss, dense, rows


def _stacked(case: Case, batch: TaskBatch) -> Tensor:
    """Return the ids in one table for all features, int64 [T, S + Q, features]."""
    sides = [torch.stack([side.ids[name] for name in case.names], -1) for side in (batch.support, batch.query)]
    return torch.cat(sides, 1) + VOCABULARY * torch.arange(case.features)


class PlainTorch:
    """The obvious loop."""

    def __init__(self, case: Case, batches: list[TaskBatch], rows: Tensor, device: torch.device = CPU) -> None:
        self.case, self.batches, self.steps = case, [to_device(batch, device) for batch in batches], 0
        self.model = build(case).to(device)
        parts = rows.split(VOCABULARY)
        self.tables = nn.ModuleDict(
            {
                name: nn.Embedding.from_pretrained(part.clone(), freeze=False, sparse=True)
                for name, part in zip(case.names, parts, strict=True)
            }
        )
        self.dense = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.0)
        self.sparse = torch.optim.Adagrad(self.tables.parameters(), lr=LR)

    def run(self, batch: TaskBatch) -> Tensor:
        """Return the loss, and leave gradients."""
        ids = {name: torch.cat([batch.support.ids[name], batch.query.ids[name]], 1) for name in self.case.names}
        embedded = {name: self.tables[name](ids[name]) for name in self.case.names}
        label = torch.cat([batch.support.label, batch.query.label], 1)
        loss = F.binary_cross_entropy_with_logits(self.model(label.new_zeros(*label.shape, 0), embedded), label)
        loss.backward()
        return loss.detach()

    def __call__(self) -> Tensor:
        """Make one step, and return the loss."""
        loss = self.run(self.batches[self.steps % len(self.batches)])
        self.steps += 1
        for optimizer in (self.dense, self.sparse):
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def gradients(self) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return what `Gmeta.gradients` returns."""
        loss = self.run(self.batches[0])
        dense = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        rows = torch.cat([table.weight.grad.to_dense() for table in self.tables.values()])
        for optimizer in (self.dense, self.sparse):
            optimizer.zero_grad()
        return loss, dense, rows


def plain_fused(model: nn.Module, weight: Tensor, batch: TaskBatch, ids: Tensor) -> Tensor:
    label = torch.cat([batch.support.label, batch.query.label], 1)
    embedded = F.embedding(ids, weight, sparse=True).unbind(-2)
    logits = model(label.new_zeros(*label.shape, 0), {f"f{i}": rows for i, rows in enumerate(embedded)})
    loss = F.binary_cross_entropy_with_logits(logits, label)
    loss.backward()
    return loss.detach()


def _embed(rows: Tensor, index: Tensor) -> dict[str, Tensor]:
    return {f"f{i}": part for i, part in enumerate(rows[index].unbind(-2))}


def _logits(model: nn.Module, parameters: dict[str, Tensor], rows: Tensor, index: Tensor) -> Tensor:
    inputs = (rows.new_zeros(*index.shape[:-1], 0), _embed(rows, index))
    return functional_call(model, parameters, inputs)  # type: ignore[no-any-return]


def _inner_loss(fast: dict[str, Tensor], model: nn.Module, index: Tensor, label: Tensor) -> Tensor:
    parameters = {name: value for name, value in fast.items() if name != "rows"}
    return F.binary_cross_entropy_with_logits(_logits(model, parameters, fast["rows"], index), label)


def loop(model: nn.Module, weight: Tensor, batch: TaskBatch, ids: Tensor, second: bool) -> Tensor:
    """Compute one task after the other, with a backward pass for each, so that only one graph is alive."""
    total = torch.zeros((), device=ids.device)
    num_support = batch.support.label.shape[1]
    for t in range(batch.num_tasks):
        unique, index = ids[t].unique(return_inverse=True)
        fast = {**dict(model.named_parameters()), "rows": F.embedding(unique, weight, sparse=True)}
        loss = _inner_loss(fast, model, index[:num_support], batch.support.label[t])
        steps = torch.autograd.grad(loss, list(fast.values()), create_graph=second)
        fast = {name: value - INNER_LR * step for (name, value), step in zip(fast.items(), steps, strict=True)}
        loss = _inner_loss(fast, model, index[num_support:], batch.query.label[t]) / batch.num_tasks_global
        loss.backward()
        total += loss.detach()
    return total


class _WithRows(nn.Module):
    """A model and one task's rows as its parameter, for libraries that adapt a module's parameters."""

    def __init__(self, model: nn.Module, rows: Tensor) -> None:
        super().__init__()
        self.model, self.rows = model, nn.Parameter(rows)

    def forward(self, index: Tensor) -> Tensor:
        """Return logits."""
        return self.model(self.rows.new_zeros(*index.shape[:-1], 0), _embed(self.rows, index))  # type: ignore[no-any-return]


def _library_loop(
    model: nn.Module, weight: Tensor, batch: TaskBatch, ids: Tensor, adapt: Callable[..., Tensor]
) -> Tensor:
    """Compute one task at a time. `adapt(module, support, query)` gives the query loss and leaves gradients on the
    module.
    """
    total, rows = torch.zeros(()), []
    num_support = batch.support.label.shape[1]
    for t in range(batch.num_tasks):
        unique, index = ids[t].unique(return_inverse=True)
        module = _WithRows(model, weight.detach()[unique])
        support = (index[:num_support], batch.support.label[t])
        query = (index[num_support:], batch.query.label[t])
        total += adapt(module, support, query, batch.num_tasks_global)
        assert module.rows.grad is not None
        rows.append((unique, module.rows.grad))
    index = torch.cat([unique for unique, _ in rows])[None]
    weight.grad = torch.sparse_coo_tensor(index, torch.cat([g for _, g in rows]), weight.shape, check_invariants=False)
    return total


def _adapt_with_higher(module: nn.Module, support: Any, query: Any, num_tasks: int) -> Tensor:
    import higher

    optimizer = torch.optim.SGD(module.parameters(), lr=INNER_LR)
    with higher.innerloop_ctx(module, optimizer, copy_initial_weights=False) as (fast, inner):
        inner.step(F.binary_cross_entropy_with_logits(fast(support[0]), support[1]))
        loss = F.binary_cross_entropy_with_logits(fast(query[0]), query[1]) / num_tasks
        loss.backward()
    return loss.detach()


def _adapt_with_torchopt(module: nn.Module, support: Any, query: Any, num_tasks: int) -> Tensor:
    import torchopt

    inner = torchopt.MetaSGD(module, lr=INNER_LR)
    start = torchopt.extract_state_dict(module, by="reference")
    inner.step(F.binary_cross_entropy_with_logits(module(support[0]), support[1]))
    loss = F.binary_cross_entropy_with_logits(module(query[0]), query[1]) / num_tasks
    loss.backward()
    torchopt.recover_state_dict(module, start)
    return loss.detach()


def vmapped(model: nn.Module, weight: Tensor, batch: TaskBatch, ids: Tensor) -> Tensor:
    parameters = dict(model.named_parameters())
    num_support = batch.support.label.shape[1]
    own = [part.unique(return_inverse=True) for part in ids]
    unique = nn.utils.rnn.pad_sequence([rows for rows, _ in own], batch_first=True)
    index = torch.stack([where for _, where in own])

    def task_loss(rows: Tensor, support: Tensor, query: Tensor, label: Tensor, query_label: Tensor) -> Tensor:
        fast = {**parameters, "rows": rows}
        steps = grad(_inner_loss)(fast, model, support, label)
        fast = {name: value - INNER_LR * steps[name] for name, value in fast.items()}
        return _inner_loss(fast, model, query, query_label)

    rows = F.embedding(unique, weight, sparse=True)
    sides = (index[:, :num_support], index[:, num_support:])
    labels = (batch.support.label, batch.query.label)
    loss = vmap(task_loss)(rows, *sides, *labels).sum() / batch.num_tasks_global
    loss.backward()
    return loss.detach()


Variant = Gmeta | Torch | PlainTorch


def variants(case: Case, batches: list[TaskBatch], device: torch.device) -> dict[str, Variant]:
    """Return name -> step. The libraries run on the CPU only."""
    meta = {"adapt": ["embeddings", "dense"]}
    ours = {
        "plain": Gmeta(case, batches, {"adapt": []}, device),
        "factored-first": Gmeta(case, batches, {**meta, "order": "first"}, device),
        "factored-second": Gmeta(case, batches, {**meta, "order": "second"}, device),
    }
    rows = ours["plain"].initial_rows()
    losses: dict[str, StepLoss] = {
        "plain-torch-fused": plain_fused,
        "loop-first": partial(loop, second=False),
        "loop-second": partial(loop, second=True),
        "vmap-second": vmapped,
    }
    libraries = {"higher": _adapt_with_higher, "torchopt": _adapt_with_torchopt}
    for name, adapt in libraries.items():
        if importlib.util.find_spec(name) is not None and device.type == "cpu":
            losses[f"{name}-second"] = partial(_library_loop, adapt=adapt)
    rivals = {name: Torch(case, batches, rows, run, device) for name, run in losses.items()}
    return {"plain": ours["plain"], "plain-torch": PlainTorch(case, batches, rows, device), **rivals, **ours}


def kind(name: str) -> str:
    """Return the kind of a variant: plain, first or second order. Variants of one kind compute the same numbers."""
    return "plain" if name.startswith("plain") else name.rpartition("-")[2]


def check_agreement(steps: Mapping[str, Variant]) -> None:
    """Check that variants of one kind compute the same loss and gradients. Otherwise timing them means nothing."""
    references: dict[str, list[Tensor]] = {}
    for name, step in steps.items():
        loss, dense, rows = step.gradients()
        found = [loss, *dense, rows]
        for ours, theirs in zip(found, references.setdefault(kind(name), found), strict=True):
            error, size = float((ours - theirs).norm()), float(theirs.norm())
            if not error <= AGREEMENT * size:
                raise AssertionError(f"{name}: loss or a gradient is off by {error:.2g} of {size:.2g}")


def measure(case: Case, repetitions: int, device: torch.device, peak: Mapping[str, float]) -> list[Record]:
    """Return records of one case."""
    steps = variants(case, make_batches(case), device)
    check_agreement(steps)
    for step in steps.values():
        step()
    seconds = {name: median(times) for name, times in alternate(steps, repetitions).items()}
    records = []
    for name, value in seconds.items():
        order = kind(name)
        records += [
            Record(case.name, name, "samples_per_s", case.samples / value, "1/s"),
            Record(case.name, name, "step_ms", value * 1e3, "ms"),
            Record(case.name, name, "ratio_to_plain", value / seconds["plain"], "x"),
        ]
        if name.startswith("factored"):
            records.append(Record(case.name, name, "limit_of_ratio", case.limit(order), "x"))
        if name in META:
            records.append(Record(case.name, name, "speedup_over_loop", seconds[f"loop-{order}"] / value, "x"))
    for name in COUNTED:
        step = steps[name]
        assert isinstance(step, Gmeta)
        found = phases(step, 3 * repetitions)
        records += [Record(case.name, name, f"{phase}_ms", value * 1e3, "ms") for phase, value in found.items()]
        work = count(step, device)
        records += [
            Record(case.name, name, "gflop", work.operations / 1e9, "GFLOP"),
            Record(case.name, name, "flop_share", work.operations / seconds[name] / peak["float32"], ""),
            Record(case.name, name, "megabytes", work.bytes / 1e6, "MB"),
            Record(case.name, name, "bandwidth_share", work.bytes / seconds[name] / peak["bytes"], ""),
        ]
    return records


def render(records: list[Record], forms: Mapping[str, str]) -> str:
    """Return a table of some metrics."""
    values = {(r.case, r.variant, r.metric): r.value for r in records if r.metric in forms}
    rows = []
    for case, variant in dict.fromkeys((case, variant) for case, variant, _ in values):
        numbers = [values.get((case, variant, metric)) for metric in forms]
        cells = ("" if n is None else form.format(n) for n, form in zip(numbers, forms.values(), strict=True))
        rows.append([case, variant, *cells])
    return table(["case", "variant", *forms], rows)


def main() -> None:
    args = arguments("Meta-learning engines against plain training, loops of tasks, and vmap.")
    repetitions = 2 if args.quick else 9
    cases = CASES[:2] if args.quick else CASES
    peak = peaks(CPU, 2048 if args.quick else 4096, 3, ["float32"])
    records = [record for case in cases for record in measure(case, repetitions, CPU, peak)]
    solved = last_layer.training(last_layer.CASE, repetitions)
    alone = last_layer.one_task(last_layer.CASE, repetitions)
    config = {
        "repetitions": f"{repetitions}, median",
        "threads": torch.get_num_threads(),
        "inner steps": 1,
        "adapted": "embeddings and all dense layers; in closed form the last layer alone, its labels clicks",
        "precision": "float32",
        "timed": "ids -> loss -> gradients of all rows and dense parameters -> row-wise Adagrad and AdamW",
    }
    limits = f"A large product: {peak['float32'] / 1e9:,.0f} GFLOP/s; a large copy: {peak['bytes'] / 1e9:.1f} GB/s."
    times = f"Phases of a step, nothing beside it:\n\n{render(records, PHASES)}"
    work = f"What a step does, its index left out. {limits}\n\n{render(records, WORK)}"
    closed = "\n\n".join(
        (
            "Model neural_linear, its last layer in closed form:",
            render(solved, {name: TIMES[name] for name in ("samples_per_s", "step_ms", "ratio_to_plain")}),
            render(solved, PHASES),
            "One task alone, which adapts to 20 or 100 rows and scores as many:",
            render(alone, last_layer.ONE_TASK),
        )
    )
    body = f"{render(records, TIMES)}\n\n{times}\n\n{work}\n\n{closed}"
    publish("engine", body, [*records, *solved, *alone], config, args)


if __name__ == "__main__":
    main()
