"""What a last layer in closed form costs: a training step beside a plain one of the same model, and one task.

engine.py runs it. The model is neural_linear with the sizes of a case, the last feature its item, without dropout,
which costs both alike. One task adapts as a server would have it: alone, on one core.

    learner   rows that are there -> posterior, or scores of as many query rows
    tables    ids -> index work, rows, posterior, or scores
    public    a dict of raw values -> `rec.adapt(support)`, `tasks.predict(candidates)`
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Record, alternate, gmeta, median
from synthetic import write_tasks
from training_step import CASES, VOCABULARY, Case, Gmeta, make_batches, phases

from gmeta.models.inputs import InputSpec
from gmeta.models.neural_linear import NeuralLinear
from gmeta.recommender.recommender import load

CASE = CASES[1]
SUPPORTS = (20, 100)
ONE_TASK = {"adapt_ms": "{:.2f}", "score_ms": "{:.2f}"}
_PLAIN = "neural-linear-plain"
_TRAINING_TASKS = 200


def neural_linear(case: Case) -> NeuralLinear:
    torch.manual_seed(0)
    inputs = InputSpec(dict.fromkeys(case.names, case.dim), (), 0.0, item=case.names[-1])
    return NeuralLinear(inputs, hidden=case.hidden, dropout=0.0)


def training(case: Case, repetitions: int) -> list[Record]:
    """Return records of whole steps and of their phases."""
    batches, settings = make_batches(case), {_PLAIN: {"adapt": []}}
    settings |= {f"last-layer-{order}": {"adapt": ["last_layer"], "order": order} for order in ("first", "second")}
    steps = {name: Gmeta(case, batches, chosen, make=neural_linear) for name, chosen in settings.items()}
    for step in steps.values():
        step()
    seconds = {name: median(times) for name, times in alternate(steps, repetitions).items()}
    records = []
    for name, value in seconds.items():
        records += [
            Record(case.name, name, "samples_per_s", case.samples / value, "1/s"),
            Record(case.name, name, "step_ms", value * 1e3, "ms"),
            Record(case.name, name, "ratio_to_plain", value / seconds[_PLAIN], "x"),
        ]
        found = phases(steps[name], 3 * repetitions)
        records += [Record(case.name, name, f"{phase}_ms", value * 1e3, "ms") for phase, value in found.items()]
    return records


def one_task(case: Case, repetitions: int) -> list[Record]:
    """Return records of one task's adaptation, and of scoring as many rows, on one core."""
    records, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = _trained(case, Path(folder))
        for size in SUPPORTS:
            alone = replace(case, tasks=1, support=size, query=size)
            calls = {**_in_process(alone), **_public(alone, run)}
            for call in calls.values():
                call()
            for name, times in alternate(calls, 10 * repetitions).items():
                variant, _, what = name.partition(" ")
                records.append(Record(alone.name, variant, f"{what}_ms", median(times) * 1e3, "ms"))
    torch.set_num_threads(threads)
    return records


def _in_process(case: Case) -> dict[str, Callable[[], Any]]:
    (batch,) = make_batches(case, 1)
    step = Gmeta(case, [batch], {"adapt": ["last_layer"]}, make=neural_linear)
    exchange, learner = step.system.exchange, step.system.learner.eval()
    request = exchange.request(batch.support, batch.query)
    rows = exchange.fetch(exchange.exchange_ids(request))
    index = learner.index(request.support, request.query, request.num_rows)
    fast = learner.adapt(rows, batch.support, index[0])

    def adapt() -> object:
        request = exchange.request(support=batch.support)
        rows = exchange.fetch(exchange.exchange_ids(request))
        return learner.adapt(rows, batch.support, learner.index_support(request.support, request.num_rows))

    @torch.no_grad()
    def score() -> object:
        request = exchange.request(query=batch.query)
        rows = exchange.fetch(exchange.exchange_ids(request))
        index = learner.index_query(request.query, request.num_rows, fast.pairs, request.rows)
        return learner.score(fast, rows, batch.query, index)

    return {
        "learner adapt": lambda: learner.adapt(rows, batch.support, index[0]),
        "learner score": torch.no_grad()(lambda: learner.score(fast, rows, batch.query, index[1])),
        "tables adapt": adapt,
        "tables score": score,
    }


def _trained(case: Case, folder: Path) -> Path:
    """Return a run of one step."""
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (_TRAINING_TASKS, 20, case.features))
    label = np.arange(ids[..., 0].size) % 2
    write_tasks(folder / "pack", ids, label, VOCABULARY, 10)
    model = ("--model.name", "neural_linear", "--model.args.hidden", list(case.hidden), "--meta.adapt", "[last_layer]")
    sizes = ("--model.embedding_dim", case.dim, "--schedule.max_steps", 1)
    gmeta("train", "--pack", folder / "pack", "--run_dir", folder / "run", *model, *sizes)
    return folder / "run"


def _public(case: Case, run: Path) -> dict[str, Callable[[], Any]]:
    rec, draws = load(run, device="cpu"), np.random.default_rng(1)
    rows = {name: draws.integers(1, VOCABULARY, case.support) for name in case.names}
    rows |= {"user": np.ones(case.support, np.int64), "click": np.arange(case.support) % 2}
    tasks = rec.adapt(rows)
    return {"public adapt": lambda: rec.adapt(rows), "public score": lambda: tasks.predict(rows)}
