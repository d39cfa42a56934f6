"""What an inner step costs in memory: exact MAML with 1, 3 and 5 inner steps, kept graphs against recomputed ones.

    python benchmarks/memory.py [--quick] [--json FILE]

The unit is the *layer inputs*: bytes of what the model's linear layers read for the support of the whole batch, once.
Measured is one training step's loss and gradients, each in a process of its own, on two models: layers alone, and
layers with layer norm and dropout, whose graph holds more than the layers' inputs.

    kept   tensors that autograd holds when the loss is there, each storage once
    peak   the most bytes that tensors held at one time, until all gradients were there
    floor  for each inner step, the inputs and the output gradients of every layer, which later steps read

and the slope: what one more inner step adds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from common import Record, arguments, publish, table
from torch.profiler import ProfilerActivity, profile
from training_step import Case, make_batches

from gmeta.embedding.exchange import RowExchange
from gmeta.embedding.table import ShardedTables, TableSpec
from gmeta.meta.inner_loop import InnerLoop
from gmeta.meta.learner import MetaLearner
from gmeta.models.inputs import InputSpec
from gmeta.models.melu import MeLU
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.system import System

CASE = Case(512, 10, 10, 20, 16, (256, 128))
SMALL = Case(128, 10, 10, 20, 16, (256, 128))
STEPS = (1, 3, 5)
MODELS: dict[str, dict[str, Any]] = {"layers": {}, "layer norm, dropout": {"layer_norm": True, "dropout": 0.1}}


class Held:
    """What a graph holds instead of a tensor, for as long as it does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def units(case: Case) -> tuple[int, float]:
    """Return (bytes of the support's layer inputs, floor of an inner step in that unit)."""
    widths = [case.features * case.dim, *case.hidden, 1]
    inputs, outputs = sum(widths[:-1]), sum(widths[1:])
    return case.tasks * case.support * inputs * 4, (inputs + outputs) / inputs


def take_step(case: Case, model: str, steps: int, recompute: bool) -> dict[str, float]:
    """Make one step. Return its kept and peak memory in bytes, its loss and the norm of its gradients."""
    torch.manual_seed(0)
    network = MeLU(InputSpec(dict.fromkeys(case.names, case.dim), (), 0.0), hidden=case.hidden, **MODELS[model])
    features = dict.fromkeys(case.names, case.dim)
    learner = MetaLearner(
        network,
        features,
        0,
        InnerLoop(adapt=["embeddings", "dense"], steps=steps, recompute=recompute),
        engine="factored",
    )
    mesh = Mesh(device=torch.device("cpu"))
    specs = [TableSpec(name, 20_000, case.dim, {name: None}) for name in case.names]
    tables = ShardedTables(specs, mesh=mesh, seed=0, init_std=0.1, dtype=torch.float32, optimizer="rowwise_adagrad")
    system = System(
        objective=learner,
        tables=tables,
        mesh=mesh,
        dtype=torch.float32,
        autocast=False,
        num_numeric=0,
        exchange=RowExchange(tables.fused, mesh),
    )
    prepared = system.prepare(make_batches(case, 1)[0])
    rows = system.exchange.fetch(prepared.routed)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss, _ = learner(rows, prepared.batch, prepared.parts[0].index)
        loss.backward()
    peak = peak_of(profiled)
    gradients = [p.grad for p in learner.parameters() if p.grad is not None]
    gradients += [weight.grad for weight in rows.weights.values() if weight.grad is not None]
    norm = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()
    held: WeakSet[Held] = WeakSet()

    def hold(tensor: torch.Tensor) -> Held:
        kept = Held(tensor)
        held.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda kept: kept.tensor):
        loss, _ = learner(rows, prepared.batch, prepared.parts[0].index)
    storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage().nbytes() for kept in held}
    kept = sum(storages.values())
    return {"kept": kept, "peak": peak, "loss": loss.item(), "norm": norm.item()}


def peak_of(profiled: profile) -> int:
    """Return the most bytes that tensors held at one time, above what they held at first."""
    with tempfile.TemporaryDirectory() as folder:
        profiled.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    totals = [event["args"]["Total Allocated"] for event in events]
    return max(totals) - (totals[0] - events[0]["args"]["Bytes"])


def in_a_process(size: str, model: str, steps: int, recompute: bool) -> dict[str, float]:
    """Run `take_step` in a fresh process."""
    words = [sys.executable, __file__, "step", size, model, str(steps), str(int(recompute))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"`{' '.join(words)}` failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure(size: str, case: Case, models: Sequence[str], counts: Sequence[int]) -> list[Record]:
    """Return records of some models, with and without recomputing."""
    unit, floor = units(case)
    records = []
    for model in models:
        reference: dict[int, dict[str, float]] = {}
        for recompute in (False, True):
            variant = f"{model}{', recomputed' if recompute else ''}"
            points = {steps: in_a_process(size, model, steps, recompute) for steps in counts}
            for steps, point in points.items():
                expected = reference.setdefault(steps, point)
                if any(abs(point[x] - expected[x]) > 1e-4 * abs(expected[x]) for x in ("loss", "norm")):
                    raise AssertionError(f"{variant}, {steps} steps: {point} is not {expected}")
                records += [
                    Record(case.name, variant, f"{what}_at_{steps}", point[what] / unit, "x layer inputs")
                    for what in ("kept", "peak")
                ]
            for what in ("kept", "peak"):
                for first, second in pairwise(counts):
                    slope = (points[second][what] - points[first][what]) / (second - first) / unit
                    records.append(
                        Record(case.name, variant, f"{what}_slope_{first}_to_{second}", slope, "x layer inputs")
                    )
            records.append(Record(case.name, variant, "floor_of_slope", floor, "x layer inputs"))
    return records


def render(records: list[Record]) -> str:
    """Return the table."""
    metrics = list(dict.fromkeys(record.metric for record in records))
    rows = []
    for variant in dict.fromkeys(record.variant for record in records):
        values = {record.metric: record.value for record in records if record.variant == variant}
        rows.append([variant, *(f"{values[metric]:.2f}" for metric in metrics)])
    return table(["model", *(metric.replace("_", " ") for metric in metrics)], rows)


def main() -> None:
    if sys.argv[1:2] == ["step"]:
        size, model, steps, recompute = sys.argv[2:]
        print(json.dumps(take_step({"full": CASE, "quick": SMALL}[size], model, int(steps), recompute == "1")))
        return
    args = arguments("Memory of exact MAML by inner steps, with and without recomputing them.")
    models = list(MODELS)
    size, case, models, counts = (
        ("quick", SMALL, models[1:], STEPS[:2]) if args.quick else ("full", CASE, models, STEPS)
    )
    records = measure(size, case, models, counts)
    config = {
        "case": case.name,
        "unit": f"{units(case)[0] / 2**20:.1f} MiB, the support's layer inputs",
        "adapted": "embeddings and all dense layers, second order",
        "threads": torch.get_num_threads(),
        "precision": "float32",
    }
    publish("memory", render(records), records, config, args)


if __name__ == "__main__":
    main()
