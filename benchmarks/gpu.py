"""What meta-learning costs on one CUDA device: whole steps, and how much of the device they use.

    python benchmarks/gpu.py [--quick] [--json FILE]

Timed is rows read from the table -> loss -> gradients -> one update of every dense parameter and of every row that
took part, the device waited for at the end. Peaks are measured here: a large copy, a large matrix product. Without
CUDA it says so and ends.

    plain            gmeta, `adapt: []`, on support and query together
    plain-torch      the obvious loop: nn.Embedding per feature, torch.optim.Adagrad (sparse) and AdamW
    factored-*       gmeta, all dense layers and embeddings adapted, one inner step
    loop-second      one task at a time, torch.func.functional_call and autograd.grad, on a few of the tasks; no updates
    *-tf32, *-bf16   the same with matrix products of lower precision; other numbers are float32
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from common import Record, alternate, arguments, median, publish, table
from engine import CASES, VOCABULARY, Case, build, make_inputs
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gmeta.batch import EmbeddedRows, RowGradients, TaskBatch, map_tensors
from gmeta.embedding.table import ShardedTables, TableSpec
from gmeta.meta.learner import MetaLearner
from gmeta.meta.rows import Plan
from gmeta.optim.dense import dense_optimizer, dense_step, global_norm
from gmeta.optim.sparse import SparseOptimizer
from gmeta.parallel.mesh import Mesh
from gmeta.stepping import still_finite

LARGE = Case(4096, 10, 10, 26, 64, (1024, 512, 256))
INNER_LR = 0.1
PRECISIONS = ("float32", "tf32", "bf16")
LOOP_TASKS = 32
METRICS = (
    "samples_per_s",
    "step_ms",
    "ratio_to_plain",
    "speedup_over_loop",
    "bandwidth_share",
    "flop_share",
    "peak_gib",
)


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
    with torch.autocast(device.type, torch.bfloat16) if name == "bf16" else nullcontext():
        yield
    torch.backends.cuda.matmul.fp32_precision = "ieee"


@dataclass(frozen=True)
class Problem:
    """A batch on the device and the rows of the table that it reads."""

    case: Case
    batch: TaskBatch
    lookups: EmbeddedRows
    rows: Tensor  # int64 [U] positions in the table, ascending
    tables: ShardedTables
    mesh: Mesh


def make_problem(case: Case, device: torch.device) -> Problem:
    inputs, mesh = make_inputs(case), Mesh(device=device)
    found = inputs.rows.weights["rows"]
    specs = [TableSpec(f"f{i}", VOCABULARY, case.dim, {f"f{i}": None}) for i in range(case.features)]
    tables = ShardedTables(specs, mesh=mesh, seed=0, init_std=0.1, dtype=torch.float32, optimizer="rowwise_adagrad")
    generator = torch.Generator().manual_seed(1)
    rows = torch.randperm(VOCABULARY * case.features, generator=generator)[: len(found)].sort().values
    batch, lookups = map_tensors((inputs.batch, inputs.rows), lambda t: t.detach().to(device))
    return Problem(case, batch, lookups, rows.to(device), tables, mesh)


class MetaStep:
    """A whole step of gmeta, as in `gmeta.train.train_step` for one process."""

    def __init__(self, problem: Problem, adapt: list[str], order: str, precision: str) -> None:
        self.problem, self.precision = problem, precision
        model = build(problem.case)
        self.learner = MetaLearner(
            model,
            embedding_features=model.features,
            adapt=adapt,
            order=order,  # type: ignore[arg-type]
            inner_lr=INNER_LR,
            engine="factored",
        ).to(problem.mesh.device)
        self.dense = dense_optimizer(self.learner, lr=1e-4, inner_lr_lr=1e-4)
        self.sparse = SparseOptimizer("rowwise_adagrad", lr=1e-3)
        self.group = f"d{problem.case.dim}"
        self.ok = torch.ones((), dtype=torch.bool, device=problem.mesh.device)
        host, lookups = map_tensors((problem.batch, problem.lookups), lambda t: t.cpu())
        plan: Plan = self.learner.plan(lookups.support, lookups.query, {"rows": len(problem.rows)}, host)
        self.plan = map_tensors(plan, lambda t: t.to(problem.mesh.device))

    def __call__(self) -> Tensor:
        """Query losses [T]."""
        problem, stored = self.problem, self.problem.tables.groups[self.group].weight
        weight = stored.index_select(0, problem.rows).requires_grad_()
        rows = EmbeddedRows({"rows": weight}, problem.lookups.support, problem.lookups.query)
        with precision(self.precision, problem.mesh.device):
            loss, output = self.learner(rows, problem.batch, self.plan)
            loss.backward()
        assert weight.grad is not None
        found = {self.group: RowGradients(problem.rows, weight.grad)}
        gradients = [p.grad for p in self.learner.parameters() if p.grad is not None]
        self.ok = still_finite(self.ok, loss.detach(), global_norm(gradients, found, problem.mesh))
        dense_step(self.dense, ok=self.ok)
        self.sparse.step(problem.tables, found, ok=self.ok)
        return output.query_loss


def plain_torch(problem: Problem) -> Callable[[], Tensor]:
    case, device = problem.case, problem.mesh.device
    model = build(case).to(device)
    embeddings = nn.ModuleList(nn.Embedding(VOCABULARY, case.dim, sparse=True) for _ in range(case.features)).to(device)
    ids = make_inputs(case).ids.to(device)
    label = torch.cat([problem.batch.support.label.reshape(-1), problem.batch.query.label.reshape(-1)])
    numeric = label.new_zeros(len(label), 0)
    sparse, dense = torch.optim.Adagrad(embeddings.parameters(), 1e-3), torch.optim.AdamW(model.parameters(), 1e-4)

    def step() -> Tensor:
        embedded = {f"f{i}": embedding(ids[i]) for i, embedding in enumerate(embeddings)}
        loss = F.binary_cross_entropy_with_logits(model(numeric, embedded), label)
        loss.backward()
        for optimizer in (sparse, dense):
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step


def loop_second(problem: Problem) -> Callable[[], Tensor]:
    """Query losses of the first tasks, each with its own inner step and backward."""
    case, batch, device = problem.case, problem.batch, problem.mesh.device
    model = build(case).to(device)
    weight = problem.tables.groups[f"d{case.dim}"].weight.index_select(0, problem.rows).requires_grad_()
    index = [
        torch.stack([lookup.index for lookup in side.values()])
        for side in (problem.lookups.support, problem.lookups.query)
    ]
    tasks = []
    for t in range(min(LOOP_TASKS, case.tasks)):
        own, where = torch.cat([side[:, t] for side in index], 1).unique(return_inverse=True)
        tasks.append((own, *where.split([case.support, case.query], 1)))

    def loss_of(fast: dict[str, Tensor], where: Tensor, label: Tensor) -> Tensor:
        embedded = {f"f{i}": fast["rows"][where[i]] for i in range(case.features)}
        parameters = {name: value for name, value in fast.items() if name != "rows"}
        logits = functional_call(model, parameters, (label.new_zeros(len(label), 0), embedded))
        return F.binary_cross_entropy_with_logits(logits, label)

    def step() -> Tensor:
        weight.grad = None
        model.zero_grad()
        losses = []
        for t, (own, support, query) in enumerate(tasks):
            fast = {**dict(model.named_parameters()), "rows": weight[own]}
            inner = loss_of(fast, support, batch.support.label[t])
            gradients = torch.autograd.grad(inner, list(fast.values()), create_graph=True)
            fast = {name: v - INNER_LR * g for (name, v), g in zip(fast.items(), gradients, strict=True)}
            losses.append(loss_of(fast, query, batch.query.label[t]))
            losses[-1].backward()
        return torch.stack(losses).detach()

    return step


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write, each a kernel of its own; of a table only the rows that are touched."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        written, read = _bytes(out), _bytes((args, kwargs))
        if func.is_view or name in ("detach", "empty", "empty_like", "empty_strided"):
            return out
        if name in ("index_select", "index", "embedding"):
            read = written
        elif name.startswith("_embedding_bag"):
            read = args[1].numel() * args[0].shape[1] * args[0].element_size()
        elif name in ("index_copy_", "index_put_"):
            read, written = _bytes(args[1:]), _bytes(args[-1])
        elif out is None:  # _foreach_ and _fused_, in place
            written = _bytes(args[0])
        self.bytes += read + written
        return out


def _bytes(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(value) if isinstance(t, Tensor))


def waited(step: Callable[[], Tensor], device: torch.device) -> Callable[[], None]:
    def run() -> None:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def peaks(device: torch.device, size: int, repetitions: int) -> dict[str, float]:
    """Bytes/s of a copy of size^2 float32, and operations/s of products of two such matrices in each precision."""
    a, b = torch.randn(2, size, size, device=device)
    steps: dict[str, Callable[[], Tensor]] = {"bytes": lambda: b.copy_(a)}
    for name in PRECISIONS:

        def product(name: str = name) -> Tensor:
            with precision(name, device):
                return a @ b

        steps[name] = product
    times = alternate({name: waited(step, device) for name, step in steps.items()}, repetitions)
    work = dict.fromkeys(PRECISIONS, 2.0 * size**3) | {"bytes": 2.0 * a.numel() * a.element_size()}
    return {name: work[name] / min(seconds) for name, seconds in times.items()}


def check_agreement(steps: dict[str, Callable[[], Tensor]]) -> None:
    """The fast engine's losses of its first step are those of the loop, or timing them means nothing."""
    ours, theirs = steps["factored-second"](), steps["loop-second"]()
    torch.testing.assert_close(ours[: len(theirs)], theirs, rtol=1e-3, atol=1e-5)


def measure(case: Case, device: torch.device, peak: dict[str, float], repetitions: int) -> list[Record]:
    problem = make_problem(case, device)
    steps: dict[str, Callable[[], Tensor]] = {"loop-second": loop_second(problem), "plain-torch": plain_torch(problem)}
    for name in PRECISIONS:
        suffix = "" if name == "float32" else f"-{name}"
        steps[f"factored-second{suffix}"] = MetaStep(problem, ["embeddings", "dense"], "second", name)
        steps[f"factored-first{suffix}"] = MetaStep(problem, ["embeddings", "dense"], "first", name)
        steps[f"plain{suffix}"] = MetaStep(problem, [], "second", name)
    check_agreement(steps)
    work = {name: count(step, device) for name, step in steps.items()}
    times = alternate({name: waited(step, device) for name, step in steps.items()}, repetitions)
    seconds = {name: median(values) for name, values in times.items()}
    seconds["loop-second"] *= case.tasks / min(LOOP_TASKS, case.tasks)
    records = []
    for name, (flops, traffic, peak_bytes) in work.items():
        used = next((p for p in PRECISIONS if name.endswith(p)), "float32")
        plain = seconds["plain" if used == "float32" else f"plain-{used}"]
        values = {
            "samples_per_s": (case.samples / seconds[name], "1/s"),
            "step_ms": (seconds[name] * 1e3, "ms"),
            "ratio_to_plain": (seconds[name] / plain, "x"),
            "speedup_over_loop": (seconds["loop-second"] / seconds[name], "x"),
        }
        if name != "loop-second":
            values["bandwidth_share"] = (traffic / seconds[name] / peak["bytes"], "")
            values["flop_share"] = (flops / seconds[name] / peak[used], "")
            values["peak_gib"] = (peak_bytes / 2**30, "GiB")
        records += [Record(case.name, name, metric, value, unit) for metric, (value, unit) in values.items()]
    return records


def count(step: Callable[[], Tensor], device: torch.device) -> tuple[int, int, int]:
    """Operations of matrix products, bytes read and written, and peak bytes of memory, of one step."""
    waited(step, device)()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    waited(step, device)()
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    with FlopCounterMode(display=False) as flops:
        step()
    with Traffic() as traffic:
        step()
    return flops.get_total_flops(), traffic.bytes, memory


def render(records: list[Record], peak: dict[str, float]) -> str:
    values = {(r.case, r.variant, r.metric): r.value for r in records}
    rows = []
    for case, variant in dict.fromkeys((r.case, r.variant) for r in records):
        numbers = [values.get((case, variant, metric)) for metric in METRICS]
        forms = ("{:,.0f}", "{:.2f}", "{:.2f}", "{:.1f}", "{:.0%}", "{:.0%}", "{:.2f}")
        rows.append([case, variant, *("" if n is None else f.format(n) for n, f in zip(numbers, forms, strict=True))])
    found = ", ".join(f"{name} {peak[name] / 1e12:.1f} T/s" for name in PRECISIONS)
    return f"{table(['case', 'variant', *METRICS], rows)}\n\nPeaks: copy {peak['bytes'] / 1e9:,.0f} GB/s, {found}"


def main() -> None:
    args = arguments("Whole meta-learning steps on one CUDA device.")
    if not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device here, and this benchmark is about one")
        return
    device, repetitions = torch.device("cuda", 0), 2 if args.quick else 15
    torch.cuda.set_device(device)
    peak = peaks(device, 8192, 3 if args.quick else 20)
    records = [record for case in (LARGE, *CASES) for record in measure(case, device, peak, repetitions)]
    records += [
        Record("peak", name, "per_s", value, "B/s" if name == "bytes" else "1/s") for name, value in peak.items()
    ]
    config = {
        "repetitions": f"{repetitions}, median",
        "inner steps": 1,
        "adapted": "embeddings and all dense layers",
        "loop-second": f"{LOOP_TASKS} tasks timed, scaled to the batch",
        "bandwidth_share": "bytes read and written by each operator, as if it were one kernel, over the copy's rate",
        "flop_share": "operations of matrix products over the rate of a large product in that precision",
        "timed": "rows -> loss -> gradients -> updates, index work done ahead",
    }
    publish("gpu", render([r for r in records if r.case != "peak"], peak), records, config, args)


if __name__ == "__main__":
    main()
