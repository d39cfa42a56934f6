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

import torch
from common import Record, alternate, arguments, median, publish, table
from counting import PRECISIONS, count, peaks, waited
from engine import PlainTorch, Torch, check_agreement, loop, plain_fused
from engine import variants as engine_variants
from torch import Tensor
from training_step import CASES, Case, Gmeta, make_batches

LARGE = Case(4096, 10, 10, 26, 64, (1024, 512, 256))
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
    """Return name -> step. loop-second has `LOOP_TASKS` tasks only."""
    batches = make_batches(case)
    first = Gmeta(case, batches, {"adapt": []}, device)
    few = replace(case, tasks=min(LOOP_TASKS, case.tasks))
    table_of_all = first.initial_rows()
    steps: dict[str, Callable[[], Tensor]] = {
        "loop-second": Torch(few, make_batches(few), table_of_all, partial(loop, second=True), device),
        "plain-torch": PlainTorch(case, batches, table_of_all, device),
        "plain-torch-fused": Torch(case, batches, table_of_all, plain_fused, device),
    }
    meta = {"adapt": ["embeddings", "dense"]}
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


def measure(case: Case, device: torch.device, peak: dict[str, float], repetitions: int) -> list[Record]:
    few = replace(case, tasks=min(LOOP_TASKS, case.tasks))
    check_agreement(engine_variants(few, make_batches(few), device))
    steps = variants(case, device)
    work = {name: count(waited(step, device), device) for name, step in steps.items()}
    times = alternate({name: waited(step, device) for name, step in steps.items()}, repetitions)
    seconds = {name: median(values) for name, values in times.items()}
    seconds["loop-second"] *= case.tasks / min(LOOP_TASKS, case.tasks)
    records = []
    for name, done in work.items():
        used = next((p for p in PRECISIONS if name.endswith(p)), "float32")
        plain = seconds["plain" if used == "float32" else f"plain-{used}"]
        values = {
            "samples_per_s": (case.samples / seconds[name], "1/s"),
            "step_ms": (seconds[name] * 1e3, "ms"),
            "ratio_to_plain": (seconds[name] / plain, "x"),
            "speedup_over_loop": (seconds["loop-second"] / seconds[name], "x"),
        }
        if name != "loop-second":
            values["bandwidth_share"] = (done.bytes / seconds[name] / peak["bytes"], "")
            values["flop_share"] = (done.operations / seconds[name] / peak[used], "")
            values["peak_gib"] = (done.peak_memory / 2**30, "GiB")
        records += [Record(case.name, name, metric, value, unit) for metric, (value, unit) in values.items()]
    return records


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
