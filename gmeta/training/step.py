"""The training step. Read `train_step` first, then `end_step`: they are the whole algorithm, top to bottom.

Every rank runs this code and makes the same collectives in every step, also without tasks of its own.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gmeta.core.batch import EmbeddedRows, RowGradients, TaskBatch
from gmeta.meta.learner import LearnerOutput
from gmeta.optim.dense import clip_scale, global_norm
from gmeta.parallel.collectives import all_reduce_sum, gather_to_rank_0
from gmeta.recommender.system import MicroBatch, PreparedBatch
from gmeta.training.late_tasks import finished_names, rescale, too_late, used_rows
from gmeta.training.state import TrainState
from gmeta.training.statistics import AsyncScalars, InFlightStep, Stopwatch, still_finite

SUMS = ("loss", "support_loss", "samples", "cells", "tasks", "stop")
"""What ranks add up every step: losses, examples, padded cells, finished tasks, and how many were asked to stop."""


class NotFinite(ValueError):
    """A step's loss or gradient is not finite. It is raised on every rank, and no weight was changed."""


@dataclass
class OpenStep:
    """A step whose gradients are being computed, micro-batch by micro-batch."""

    prepared: PreparedBatch
    rows: EmbeddedRows
    sums: Tensor  # float64, `sum_names` of this rank
    watch: Stopwatch
    computing: ExitStack  # closed when all gradients are computed
    begun_s: float
    query_loss: list[Tensor] = field(default_factory=list)  # [T] of each finished micro-batch


def train_step(state: TrainState, prepared: PreparedBatch, watch: Stopwatch) -> InFlightStep:
    """Start one optimizer step on one global batch. `finish_step` reads its global statistics.

    The step fetches the rows (AlltoAll), runs the inner and the outer loop, and sends the gradients home (AlltoAll,
    AllReduce). It updates every row and parameter once. The loader's thread has exchanged beforehand which rows to
    fetch, and from whom.
    """
    step = begin_step(state, prepared, watch)
    while (part := next_part(step)) is not None:
        loss, output = forward(state, step, part)
        backward(state, step, part, loss, output)
    return end_step(state, step)


def begin_step(state: TrainState, prepared: PreparedBatch, watch: Stopwatch) -> OpenStep:
    """Fetch the batch's rows; collective."""
    rows = state.system.exchange.fetch(prepared.routed)
    watch.lap("exchange")
    split, computing = prepared.batch.batch_split, ExitStack()
    computing.enter_context(state.dense.computing(several=split is not None and split.in_parts))
    state.system.before_step(state.progress.step)
    sums = torch.zeros(len(sum_names(prepared.batch)), dtype=torch.float64, device=state.mesh.device)
    return OpenStep(prepared, rows, sums, watch, computing, time.perf_counter())


def next_part(step: OpenStep) -> MicroBatch | None:
    """Return the micro-batch to compute now. It is None where all are done, or where the rest is left for later."""
    done = len(step.query_loss)
    if done == len(step.prepared.parts):
        return None
    if done and too_late(step.prepared.batch, step.begun_s, step.sums.device):
        return None
    return step.prepared.parts[done]


def forward(state: TrainState, step: OpenStep, part: MicroBatch) -> tuple[Tensor, LearnerOutput]:
    """Return this rank's part of the loss, and what the learner found; local.

    The loss is the sum over the tasks of the micro-batch, divided by the number of tasks of the full batch on all
    ranks.
    """
    with state.system.precision():
        loss, output = state.system.objective(part.rows(step.rows), part.tasks, part.index)
    return loss, output


def backward(state: TrainState, step: OpenStep, part: MicroBatch, loss: Tensor, output: LearnerOutput) -> None:
    """Compute the gradients of `loss`, and add up the micro-batch's statistics."""
    state.dense.backward(loss if state.loss_scale == 1 else loss * state.loss_scale)
    tasks = part.tasks
    examples = tasks.support.mask.sum() + tasks.query.mask.sum()
    cells = tasks.support.mask.numel() + tasks.query.mask.numel()
    # the mean over no tasks is not a number, and has no gradient
    value = loss.detach() if tasks.num_tasks else torch.zeros_like(loss.detach())
    support = output.support_loss.sum() / tasks.num_tasks_global
    numbers = (value, support, examples, cells, tasks.num_tasks, 0)
    found = [v.double() if isinstance(v, Tensor) else examples.new_full((), v).double() for v in numbers]
    step.sums[: len(SUMS)].add_(torch.stack(found))
    if tasks.drop_after_s is not None:
        step.sums[len(SUMS) + state.mesh.rank].add_(1)
    step.query_loss.append(output.query_loss)


def end_step(state: TrainState, step: OpenStep) -> InFlightStep:
    """Send the gradients home, clip them by the norm of all of them, and update the model; collective."""
    system, mesh, prepared, watch = state.system, state.mesh, step.prepared, step.watch
    batch, traffic = prepared.batch, prepared.routed.traffic
    step.computing.close()
    watch.lap("compute")

    used = used_rows(prepared, step.rows, len(step.query_loss))
    row_gradients = system.exchange.return_gradients(prepared.routed, step.rows, used)
    square_sum = state.dense.reduce(traffic.dense)
    step.sums[SUMS.index("stop")].fill_(int(state.stop.is_set()))
    sums = all_reduce_sum(step.sums, mesh, traffic.control)
    norm = global_norm(square_sum, row_gradients, mesh, traffic.control)
    scale = rescale(batch, sums[SUMS.index("tasks")])
    norm = norm if scale is None else norm * scale
    watch.lap("exchange")

    stats = AsyncScalars(dict(zip(sum_names(batch), sums, strict=True)) | {"grad_norm": norm})
    lr = state.rates.scale(batch.epoch, batch.index)
    query_loss = torch.cat(step.query_loss)
    started = InFlightStep(state.progress.step, batch, query_loss, state.rates.peak * lr, stats, prepared.routed, watch)
    state.ok = still_finite(state.ok, sums[0], norm)
    if not state.read_late:
        _checked_stats(state, started)
    _update(state, row_gradients, norm, lr, scale)
    if state.negotiation is not None and state.negotiation.ends(state.progress.step, batch.index):
        state.negotiation.end_round(state.ok)
    state.progress.step += 1
    watch.lap("compute")
    return started


def finish_step(state: TrainState, started: InFlightStep) -> dict[str, float]:
    """Wait for a step's global statistics, and return them. Raises `NotFinite` on every rank when loss or gradient was
    not finite.
    """
    return {**_checked_stats(state, started), "lr": started.lr}


def sum_names(batch: TaskBatch) -> tuple[str, ...]:
    """Return the names of what ranks add up in a step on this batch."""
    return (*SUMS, *finished_names(batch))


def _update(
    state: TrainState, row_gradients: dict[str, RowGradients], norm: Tensor, lr: float, scale: Tensor | None
) -> None:
    """Update every dense parameter, and every row that took part, exactly once, if all numbers are finite."""
    clip = clip_scale(norm, state.clip_norm) if state.clip_norm else None
    if scale is not None:
        clip = scale if clip is None else clip * scale
    ok = state.ok if state.read_late else None
    state.dense.step(lr_scale=lr, grad_scale=clip, ok=ok)
    state.sparse.step(state.system.tables.fused, row_gradients, lr_scale=lr, grad_scale=clip, ok=ok)


def _checked_stats(state: TrainState, started: InFlightStep) -> dict[str, float]:
    """Return the step's statistics. Where loss or gradient is not finite, save the batch's tasks and raise."""
    stats, batch, step = started.stats.read(), started.batch, started.step
    if batch.drop_after_s is None and stats["tasks"] != batch.num_tasks_global:
        raise RuntimeError(
            f"step {step}: the ranks computed {stats['tasks']:.0f} tasks of {batch.num_tasks_global}: they split the "
            "batch differently"
        )
    stats["loss"] *= batch.num_tasks_global / stats["tasks"]
    stats["support_loss"] *= batch.num_tasks_global / stats["tasks"]
    if math.isfinite(stats["loss"]) and math.isfinite(stats["grad_norm"]):
        return stats
    tasks = gather_to_rank_0(batch.task_id.cpu().numpy(), state.mesh)
    losses = gather_to_rank_0(started.query_loss.double().cpu().numpy(), state.mesh)
    file = state.run_dir / f"not-finite-step-{step:08d}.json"
    if state.mesh.rank == 0:
        found = {"step": step, "epoch": batch.epoch, "index": batch.index, "task_id": tasks.tolist()}
        found["query_loss"] = [v if math.isfinite(v) else str(v) for v in losses.tolist()]
        file.write_text(json.dumps(found, indent=1))
    raise NotFinite(
        f"step {step}: loss is {stats['loss']}, gradient norm is {stats['grad_norm']}. "
        f"{_named(tasks.tolist(), losses.tolist())}"
        f"The batch's task ids are in {file}, their keys in tasks.parquet of the pack; no weights were changed. "
        "Lower meta.inner_lr, dense.lr or embedding.lr, or set dense.clip_norm, "
        "and continue from the last checkpoint or start again"
    )


def _named(tasks: list[int], losses: list[float]) -> str:
    """Return a sentence that names the first task whose loss is not finite; nothing where all are, or none is."""
    if len(tasks) != len(losses):  # some tasks came late, and have no loss
        return ""
    bad = [task for task, loss in zip(tasks, losses, strict=True) if not math.isfinite(loss)]
    if not 0 < len(bad) < len(tasks):
        return ""
    return f"{len(bad)} of {len(tasks)} tasks have such a loss, the first is task_id {bad[0]}: look at its rows. "
