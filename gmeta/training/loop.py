"""Training: wires all rooms together. Read `train_step` first; it is the whole algorithm, top to bottom.

Every rank runs this same file and makes the same collectives every step, also with no task of its own.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from gmeta.config.train import TrainConfig
from gmeta.core.batch import EmbeddedRows, RowGradients, TaskBatch
from gmeta.data.pack import open_pack
from gmeta.elastic.agent import RestartRequested
from gmeta.evaluation.score import score, validation_metrics
from gmeta.optim.dense import clip_scale, global_norm, lr_scale
from gmeta.parallel.collectives import all_reduce_sum, broadcast_from_rank_0, gather_to_rank_0
from gmeta.parallel.launch import EXIT_RESTART, EXIT_STOPPED, was_restarted
from gmeta.parallel.mesh import Mesh, close_mesh, open_mesh
from gmeta.recommender.system import Prepared, Work, resolve_model, used_rows
from gmeta.runs.directory import prepare_run_dir, run_lock
from gmeta.training.membership import dropped_tasks, join
from gmeta.training.statistics import OnItsWay, Started, Stopwatch, still_finite
from gmeta.training.trainer import Emulate, Run, build_run, load_checkpoint, save_checkpoint

SUMS = ("loss", "support_loss", "samples", "cells", "tasks", "stop")
"""What ranks add up every step: losses, examples, padded cells, finished tasks, and how many were asked to stop."""

LOWER_IS_BETTER = ("loss", "logloss", "mae", "rmse")


def train_step(run: Run, work: Work, watch: Stopwatch) -> Started:
    """Start one optimizer step on one global batch; `finish_step` reads its global statistics.

    rows (AlltoAll) -> inner and outer loop -> gradients home (AlltoAll, AllReduce) -> one update a row. Which rows, and
    from whom, was exchanged ahead in the loader's thread.
    """
    system, mesh = run.system, run.mesh
    prepared = system.complete(work)
    batch, routed = prepared.batch, prepared.routed
    rows = system.exchange.fetch(routed)
    watch.lap("exchange")

    with run.dense.computing(several=batch.batch_split is not None and batch.batch_split.in_parts):
        sums, query_loss, finished = _forward_backward(run, prepared, rows)
    watch.lap("compute")

    used = used_rows(prepared, rows, finished) if batch.drop_after_s is not None else None
    row_gradients = system.exchange.return_gradients(routed, rows, used)
    square_sum = run.dense.reduce(routed.traffic.dense)
    sums = all_reduce_sum(sums, mesh, routed.traffic.control)
    norm = global_norm(square_sum, row_gradients, mesh, routed.traffic.control)
    scale = None
    if batch.drop_after_s is not None:  # what was computed is a sum over fewer tasks than it was divided by
        scale = batch.num_tasks_global / sums[SUMS.index("tasks")]
        norm = norm * scale
    watch.lap("exchange")

    stats = OnItsWay(dict(zip(_sum_names(batch), sums, strict=True)) | {"grad_norm": norm})
    place = batch.epoch * run.loader.batches_per_epoch + min(batch.index, run.loader.batches_per_epoch - 1)
    lr = lr_scale(place, run.config.dense.warmup_steps, run.total_steps, run.config.dense.decay)
    started = Started(run.progress.step, batch, query_loss, run.config.dense.lr * lr, stats, routed, watch)
    run.ok = still_finite(run.ok, sums[0], norm)
    if not run.read_late:
        _checked_stats(run, started)
    _update(run, row_gradients, norm, lr, scale)
    run.progress.step += 1
    watch.lap("compute")
    return started


def finish_step(run: Run, started: Started) -> dict[str, float]:
    """Wait for a step's global statistics; ValueError, on every rank, when its loss or gradient was not finite."""
    stats = _checked_stats(run, started)
    run.loader.put_back(dropped_tasks(started.batch, stats))
    return {**stats, "lr": started.lr}


def _forward_backward(run: Run, prepared: Prepared, rows: EmbeddedRows) -> tuple[Tensor, Tensor, int]:
    """Gradients of this rank's tasks, micro-batch by micro-batch.

    Returns this rank's sums, the losses [T], and how many micro-batches were finished.
    Sums are `_sum_names`. Gradients are of the sum over finished tasks, divided by the tasks of the whole batch.
    """
    system, batch = run.system, prepared.batch
    sums = torch.zeros(len(_sum_names(batch)), dtype=torch.float64, device=run.mesh.device)
    losses, begun = [], time.perf_counter()
    for number, part in enumerate(prepared.parts):
        if number and _too_late(batch, begun, run.mesh.device):
            break
        part_begun = time.perf_counter()
        with system.precision():
            loss, output = system.learner(part.rows(rows), part.batch, part.index)
        run.dense.backward(loss)
        losses.append(output.query_loss)
        sums[: len(SUMS)].add_(_part_sums(loss, output.support_loss, part.batch))
        if batch.drop_after_s is not None:
            sums[len(SUMS) + run.mesh.rank].add_(1)
        if run.emulate is not None:
            run.emulate(run.progress.step, _work(batch, part.batch), number == 0, time.perf_counter() - part_begun)
    sums[SUMS.index("stop")].fill_(int(run.stop.is_set()))
    return sums, torch.cat(losses), len(losses)


def _part_sums(loss: Tensor, support_loss: Tensor, batch: TaskBatch) -> Tensor:
    """`SUMS` of a micro-batch; the losses are already per global task."""
    examples = batch.support.mask.sum() + batch.query.mask.sum()
    cells = batch.support.mask.numel() + batch.query.mask.numel()
    support = support_loss.sum() / batch.num_tasks_global
    numbers = (loss.detach(), support, examples, cells, batch.num_tasks, 0)
    return torch.stack([v.double() if isinstance(v, Tensor) else examples.new_full((), v).double() for v in numbers])


def _sum_names(batch: TaskBatch) -> tuple[str, ...]:
    """`SUMS`, and how many micro-batches each rank finished, where it may have left some."""
    if batch.batch_split is None or batch.drop_after_s is None:
        return SUMS
    return (*SUMS, *(f"finished_{rank}" for rank in range(len(batch.batch_split.micro_batches))))


def _too_late(batch: TaskBatch, begun: float, device: torch.device) -> bool:
    """Whether to leave the rest of the batch to the epoch's tail. The first micro-batch is always done."""
    if batch.drop_after_s is None:
        return False
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun > batch.drop_after_s


def _work(batch: TaskBatch, part: TaskBatch) -> float:
    """Slots of work in a micro-batch, by its rows."""
    rows, of = (float(b.support.mask.sum() + b.query.mask.sum()) for b in (part, batch))
    whole = batch.num_tasks if batch.batch_split is None else batch.batch_split.work
    return whole * rows / of if of else 0.0


def _update(
    run: Run, row_gradients: dict[str, RowGradients], norm: Tensor, lr: float, scale: Tensor | None = None
) -> None:
    """Exactly one update of every dense parameter and of every row that took part, if all is finite."""
    clip_norm = run.config.dense.clip_norm
    clip = clip_scale(norm, clip_norm) if clip_norm else None
    if scale is not None:
        clip = scale if clip is None else clip * scale
    ok = run.ok if run.read_late else None
    run.dense.step(lr_scale=lr, grad_scale=clip, ok=ok)
    run.sparse.step(run.system.tables.fused, row_gradients, lr_scale=lr, grad_scale=clip, ok=ok)


def _checked_stats(run: Run, started: Started) -> dict[str, float]:
    """The step's statistics. Where loss or gradient is not finite, saves the batch's tasks and raises."""
    stats, batch, step = started.stats.read(), started.batch, started.step
    if batch.drop_after_s is None and stats["tasks"] != batch.num_tasks_global:
        raise RuntimeError(
            f"step {step}: the ranks computed {stats['tasks']:.0f} tasks of {batch.num_tasks_global}: they divided the "
            "batch differently"
        )
    stats["loss"] *= batch.num_tasks_global / stats["tasks"]
    stats["support_loss"] *= batch.num_tasks_global / stats["tasks"]
    if math.isfinite(stats["loss"]) and math.isfinite(stats["grad_norm"]):
        return stats
    tasks = gather_to_rank_0(batch.task_id.cpu().numpy(), run.mesh)
    losses = gather_to_rank_0(started.query_loss.double().cpu().numpy(), run.mesh)
    file = Path(run.config.run_dir) / f"not-finite-step-{step:08d}.json"
    if run.mesh.rank == 0:
        found = {"step": step, "epoch": batch.epoch, "index": batch.index, "task_id": tasks.tolist()}
        found["query_loss"] = [v if math.isfinite(v) else str(v) for v in losses.tolist()]
        file.write_text(json.dumps(found, indent=1))
    raise ValueError(
        f"step {step}: loss is {stats['loss']}, gradient norm is {stats['grad_norm']}. "
        f"The batch's task ids are in {file}; no weights were changed. "
        "Lower meta.inner_lr, dense.lr or embedding.lr, or set dense.clip_norm, "
        "and continue from the last checkpoint or start again"
    )


def validate(run: Run) -> bool:
    """Measure the valid split, log it, update the best; True when patience has run out. Collective."""
    schedule = run.config.schedule
    if "valid" not in run.pack.splits:
        return False
    run.loader.settle()  # the ids of two loaders must not cross
    with run.dense.unsharded():
        scores = score(run.system, run.pack.split("valid"), tasks_per_batch=max(256, run.config.loader.tasks_per_batch))
    metrics = validation_metrics(scores, run.config.loss) if scores is not None else {}
    value = broadcast_from_rank_0(metrics.get(f"{schedule.metric}_after", math.nan), run.mesh)
    if run.mesh.rank == 0:
        run.log.valid({"step": run.progress.step, **metrics})
    if not math.isfinite(value):
        run.log.say(f"{schedule.metric} is not defined on the valid split (one class?): set schedule.metric to loss")
        return False
    better_sign = 1 if schedule.metric in LOWER_IS_BETTER else -1
    best = run.progress.best
    if best is None or better_sign * value < better_sign * best:
        run.progress.best, run.progress.best_step, run.progress.bad_validations = value, run.progress.step, 0
        return False
    run.progress.bad_validations += 1
    return out_of_patience(run)


def out_of_patience(run: Run) -> bool:
    """Whether validations without a better metric have used up the patience; also true of a run resumed after it."""
    patience = run.config.schedule.patience
    return bool(patience) and run.progress.bad_validations >= patience


def training_loop(run: Run) -> int:
    """Train until the epochs are done, patience runs out, a stop is requested or a worker is to be replaced.

    Returns 0, EXIT_STOPPED or EXIT_RESTART; all is saved.
    """
    schedule = run.config.schedule
    batches = iter(run.loader)
    ahead: deque[Started] = deque()
    while not _ended(run) and not out_of_patience(run):
        watch = Stopwatch(run.mesh.device)
        try:
            upcoming = next(batches)
        except RestartRequested as request:
            _log_steps(run, ahead, leave=0)
            save_checkpoint(run)
            run.log.say(f"step {run.progress.step}: {request}")
            return EXIT_RESTART
        watch.lap("input")
        work = upcoming  # frees the last batch: 1 to 3 ms that are no wait for input
        ahead.append(train_step(run, work, watch))

        step = run.progress.step
        every = [n for n in (schedule.eval_every, schedule.checkpoint_every, schedule.max_steps) if n]
        pause = run.loader.between_epochs or any(step % n == 0 for n in every)
        stop = _log_steps(run, ahead, leave=1 if run.read_late and not pause else 0)
        last = _ended(run)
        evaluate = step % schedule.eval_every == 0 if schedule.eval_every else run.loader.epoch_finished
        save = step % schedule.checkpoint_every == 0 if schedule.checkpoint_every else evaluate
        ended = (evaluate or last) and validate(run)
        if save or last or run.progress.best_step == step or stop or ended:
            save_checkpoint(run)
        if stop:
            return 0 if last or ended else EXIT_STOPPED
    return 0


def _ended(run: Run) -> bool:
    """Whether every step was made."""
    schedule = run.config.schedule
    return run.loader.epochs_done >= schedule.epochs or 0 < schedule.max_steps <= run.progress.step


def _log_steps(run: Run, ahead: deque[Started], leave: int) -> bool:
    """Finish and log the oldest steps until `leave` are left, none when a rank asked to stop, which is returned."""
    stop = False
    while len(ahead) > (0 if stop else leave):
        started = ahead.popleft()
        stats = finish_step(run, started)
        _log_step(run, started, stats)
        stop = stop or stats["stop"] > 0
    return stop


def _log_step(run: Run, started: Started, stats: dict[str, float]) -> None:
    batch, seconds = started.batch, started.watch.seconds
    total = sum(seconds.values())
    run.progress.seconds += total
    if run.membership is not None:
        window = batch.index // run.config.loader.window_batches
        in_order = batch.index < run.loader.batches_per_epoch  # the tail is counted when it is empty
        run.membership.finished(batch, started.step, seconds, int(stats["tasks"]) if in_order else 0, window)
        if run.loader.epochs_done > batch.epoch:
            run.membership.agent.finish_epoch(batch.epoch)
    run.log.train(
        {
            "step": started.step + 1,
            "epoch": batch.epoch,
            "loss": stats["loss"],
            "support_loss": stats["support_loss"],
            "lr": stats["lr"],
            "grad_norm": stats["grad_norm"],
            "tasks_per_s": stats["tasks"] / total,
            "samples_per_s": stats["samples"] / total,
            "padding": 1 - stats["samples"] / max(1.0, stats["cells"]),
            **{f"{phase}_share": value / total for phase, value in seconds.items()},
            "time_s": run.progress.seconds,
            **({"comm": traffic_record(run, started)} if run.mesh.is_main and run.mesh.world_size > 1 else {}),
            **(_split_record(run, started, stats)),
        }
    )


def _split_record(run: Run, started: Started, stats: dict[str, float]) -> dict[str, Any]:
    """How an elastic group divided the batch, and the tasks (positions in the split) that were put back."""
    split = started.batch.batch_split
    if split is None or run.membership is None:
        return {}
    slots = [stop - start for start, stop in zip(split.cuts, split.cuts[1:], strict=False)]
    record: dict[str, Any] = {"generation": run.membership.generation, "index": started.batch.index, "slots": slots}
    record["agent_cpu_s"] = run.membership.agent.cpu_s  # since the generation began
    return record | {"put_back": dropped_tasks(started.batch, stats).tolist()}


def traffic_record(run: Run, started: Started) -> dict[str, Any]:
    """What this rank sent in a step, and what the formulas say it had to."""
    routed = started.routed
    expected = run.system.exchange.expected_traffic(
        routed,
        control_bytes=(8 * len(_sum_names(started.batch)), 8),  # the sums, the squared norm of the row gradients
        marked=started.batch.drop_after_s is not None,
    )
    run.dense.add_expected(expected.dense)
    return {"measured": routed.traffic.record(), "predicted": expected.record()}


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set; a second Ctrl-C interrupts at once."""
    event = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(config: TrainConfig, emulate: Emulate | None = None, **parts: Any) -> int:
    """Run `gmeta train` on this rank; returns the exit code: 0, 75 when stopped on request and saved, or 77 when saved
    to be started again with another worker. `emulate` is the laboratory's; for `parts` see `build_run`."""
    open_pack(config.pack)  # before anything is created
    config = resolve_model(config)
    if config.elastic.enabled and was_restarted():
        config = replace(config, resume=True)
    with stop_on_signals() as stop:
        mesh = open_mesh(config.device, config.timeout_s, config.comm.node_size)
        try:
            with run_lock(Path(config.run_dir), mesh):
                return _train(config, mesh, stop, emulate, parts)
        finally:
            close_mesh(mesh)


def _train(
    config: TrainConfig, mesh: Mesh, stop: threading.Event, emulate: Emulate | None, parts: dict[str, Any]
) -> int:
    resume_from = prepare_run_dir(config, mesh)
    run = build_run(config, mesh, stop, **parts)
    run.emulate = emulate
    try:
        run.log.say(_banner(run))  # before the tables are allocated
        ledger = None
        if resume_from is not None:
            ledger = load_checkpoint(run, resume_from)
            run.log.say(f"resumed from {resume_from}")
        if _ended(run):  # or longer than this schedule
            asked = f"schedule.epochs is {config.schedule.epochs}, schedule.max_steps {config.schedule.max_steps}"
            run.log.say(f"nothing left to train after step {run.progress.step}: {asked}; raise them to go on")
        else:
            run.membership = join(config, run.pack, mesh, run.loader, run.progress.step, ledger)
        run.log.start()
        code = training_loop(run)
        if code != EXIT_RESTART:
            run.log.say(_farewell(run, code == EXIT_STOPPED))
    finally:
        if run.membership is not None:
            run.membership.agent.close()
        run.loader.close()
        run.log.close()
    return code


def _farewell(run: Run, stopped: bool) -> str:
    """Where the run stands, and what to do next."""
    step, best = run.progress.step, run.progress
    if stopped:
        return f"stopped after step {step} and saved; continue with the same command and --resume true"
    found = f"done after step {step}" + (f" of {run.total_steps}" if step <= run.total_steps else "")
    if out_of_patience(run):
        found += f", {best.bad_validations} validations without a better {run.config.schedule.metric}"
    if best.best is not None:
        found += f"; best {run.config.schedule.metric} on valid {best.best:.4f} at step {best.best_step}"
    return f"{found}\nnext: gmeta evaluate --run_dir {run.config.run_dir}"


def _banner(run: Run) -> str:
    """What a user wants to know before the first step."""
    train_split = run.pack.split("train")
    lines = [
        f"{train_split.num_tasks:,} tasks, {train_split.num_rows:,} rows; {run.total_steps:,} steps of "
        f"{run.config.loader.tasks_per_batch} tasks on {run.mesh.world_size} process(es), {run.mesh.device}",
        f"{run.dense.num_parameters:,} dense parameters; engine: {run.system.learner.engine_reason}",
        run.system.tables.memory_report(),
    ]
    return "\n".join(lines)
