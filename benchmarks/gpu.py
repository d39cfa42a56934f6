"""What meta-learning costs on one CUDA device: whole steps, and how much of the device they use.

    python benchmarks/gpu.py [--quick] [--json FILE]

Timed is the whole step as in engine.py, ids -> loss -> gradients -> updates, the device waited for at the end. Peaks
are measured here: a large copy, a large matrix product. Without CUDA it says so and ends.

    plain            gmeta, `adapt: []`, on support and query together
    plain-torch*     the obvious and the careful loop of engine.py
    factored-*       gmeta, all dense layers and embeddings adapted, one inner step
    loop-second      one task at a time, torch.func.functional_call and autograd.grad, on a few of the tasks
    *-tf32, *-bf16   the same with matrix products of lower precision; other numbers are float32
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from common import Record, alternate, arguments, median, publish, table
from engine import CASES, Case, Gmeta, PlainTorch, Torch, check_agreement, loop, make_batches, plain_fused
from engine import variants as engine_variants
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

LARGE = Case(4096, 10, 10, 26, 64, (1024, 512, 256))
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


def in_precision(step: Gmeta, name: str) -> Callable[[], Tensor]:
    def run() -> Tensor:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
        return step()

    return run


def variants(case: Case, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Name -> whole step; loop-second has `LOOP_TASKS` tasks only."""
    batches = make_batches(case)
    first = Gmeta(case, batches, {"adapt": []}, device)
    few = replace(case, tasks=min(LOOP_TASKS, case.tasks))
    table_of_all = first.initial_rows()
    steps: dict[str, Callable[[], Tensor]] = {
        "loop-second": Torch(few, make_batches(few), table_of_all, partial(loop, second=True), device),
        "plain-torch": PlainTorch(case, batches, table_of_all, device),
        "plain-torch-fused": Torch(case, batches, table_of_all, plain_fused, device),
    }
    meta = {"adapt": ["embeddings", "dense"], "engine": "factored"}
    kinds = {
        "plain": {"adapt": []},
        "factored-first": {**meta, "order": "first"},
        "factored-second": {**meta, "order": "second"},
    }
    for name in PRECISIONS:
        suffix = "" if name == "float32" else f"-{name}"
        for kind, settings in kinds.items():
            steps[kind + suffix] = in_precision(Gmeta(case, batches, settings, device, autocast=name == "bf16"), name)
    return steps


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
            torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
            with torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16"):
                return a @ b

        steps[name] = product
    times = alternate({name: waited(step, device) for name, step in steps.items()}, repetitions)
    work = dict.fromkeys(PRECISIONS, 2.0 * size**3) | {"bytes": 2.0 * a.numel() * a.element_size()}
    return {name: work[name] / min(seconds) for name, seconds in times.items()}


def measure(case: Case, device: torch.device, peak: dict[str, float], repetitions: int) -> list[Record]:
    few = replace(case, tasks=min(LOOP_TASKS, case.tasks))
    check_agreement(engine_variants(few, make_batches(few), device))
    steps = variants(case, device)
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
        "timed": "ids -> loss -> gradients -> updates; index work by a thread, one batch ahead",
    }
    publish("gpu", render([r for r in records if r.case != "peak"], peak), records, config, args)


if __name__ == "__main__":
    main()
