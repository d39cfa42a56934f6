"""Training: wires all rooms together. Read `train_step` first; it is the whole algorithm, top to bottom.

Every rank runs this same file and makes the same collectives every step, also with no task of its own.
"""

from __future__ import annotations

import json
import math
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from gmeta import checkpoint
from gmeta.batch import RowGradients, TaskBatch
from gmeta.config import TrainConfig
from gmeta.data.loader import TaskLoader
from gmeta.data.pack import TaskPack, open_pack
from gmeta.embedding.exchange import Routes, expected_traffic
from gmeta.optim.dense import clip_scale, dense_optimizer, dense_step, global_norm, lr_scale
from gmeta.optim.sparse import SparseOptimizer
from gmeta.parallel.collectives import GradientBuckets, all_reduce_sum, broadcast_from_rank_0, gather_to_rank_0
from gmeta.parallel.mesh import Mesh, close_mesh, open_mesh
from gmeta.rundir import prepare_run_dir, run_lock
from gmeta.scoring import score, validation_metrics
from gmeta.stepping import OnItsWay, Started, Stopwatch, still_finite
from gmeta.system import WIRE, Loaded, System, Work, build_system
from gmeta.tracking import RunLog

EXIT_STOPPED = 75
"""Exit code after a requested stop (SIGTERM, Ctrl-C): saved, continue with --resume. EX_TEMPFAIL."""

SUMS = ("loss", "support_loss", "samples", "cells", "stop")
"""What ranks add up every step: losses, examples, padded cells, and how many of them were asked to stop."""

CONTROL_BYTES = (8 * len(SUMS), 8)
"""The step's small AllReduces: `SUMS`, and the squared norm of the row gradients."""

LOWER_IS_BETTER = ("loss", "logloss", "mae", "rmse")


@dataclass
class Progress:
    """What advances besides weights, optimizers and loader; saved in every checkpoint."""

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    bad_validations: int = 0
    seconds: float = 0.0


@dataclass
class Run:
    """Everything one rank holds while training."""

    config: TrainConfig
    system: System
    dense: torch.optim.AdamW
    sparse: SparseOptimizer
    buckets: GradientBuckets
    loader: TaskLoader[Work]
    pack: TaskPack
    log: RunLog
    total_steps: int
    stop: threading.Event
    ok: Tensor  # bool []: every step so far was finite; once False no step changes anything
    read_late: bool  # a step's statistics are read after the next one has started
    progress: Progress = field(default_factory=Progress)

    @property
    def mesh(self) -> Mesh:
        """This rank's mesh."""
        return self.system.mesh

    @property
    def checkpoints(self) -> Path:
        """Directory of the run's checkpoints."""
        return Path(self.config.run_dir) / "checkpoints"


def train_step(run: Run, work: Work, watch: Stopwatch) -> Started:
    """Start one optimizer step on one global batch; `finish_step` reads its global statistics.

    rows (AlltoAll) -> inner and outer loop -> gradients home (AlltoAll, AllReduce) -> one update a row. Which rows, and
    from whom, was exchanged ahead in the loader's thread.
    """
    system, mesh = run.system, run.mesh
    prepared = system.complete(work)
    batch, routes = prepared.batch, prepared.routes
    rows = system.fetch(routes)
    watch.lap("exchange")

    with system.precision():
        loss, output = system.learner(rows, batch, prepared.index)
    loss.backward()
    watch.lap("compute")

    run.buckets.flush()
    row_gradients = system.return_gradients(routes, rows)
    run.buckets.finish(routes.traffic.dense)
    sums = _batch_sums(loss, output.support_loss, batch, run.stop.is_set())
    sums = all_reduce_sum(sums, mesh, routes.traffic.control)
    norm = global_norm(_dense_gradients(run), row_gradients, mesh, routes.traffic.control)
    watch.lap("exchange")

    stats = OnItsWay(dict(zip(SUMS, sums, strict=True)) | {"grad_norm": norm})
    lr = lr_scale(run.progress.step, run.config.dense.warmup_steps, run.total_steps, run.config.dense.decay)
    started = Started(run.progress.step, batch, output.query_loss, run.config.dense.lr * lr, stats, routes, watch)
    run.ok = still_finite(run.ok, sums[0], norm)
    if not run.read_late:
        _require_finite(run, started)
    _update(run, row_gradients, norm, lr)
    run.progress.step += 1
    watch.lap("compute")
    return started


def finish_step(run: Run, started: Started) -> dict[str, float]:
    """Wait for a step's global statistics; ValueError, on every rank, when its loss or gradient was not finite."""
    return {**_require_finite(run, started), "lr": started.lr}


def _dense_gradients(run: Run) -> list[Tensor]:
    return [p.grad for p in run.system.learner.parameters() if p.grad is not None]


def _batch_sums(loss: Tensor, support_loss: Tensor, batch: TaskBatch, stop: bool) -> Tensor:
    """`SUMS` of this rank; the losses are already per global task."""
    examples = batch.support.mask.sum() + batch.query.mask.sum()
    cells = batch.support.mask.numel() + batch.query.mask.numel()
    support = support_loss.sum() / batch.num_tasks_global
    numbers = (loss.detach(), support, examples, examples.new_full((), cells), examples.new_full((), int(stop)))
    return torch.stack([v.double() for v in numbers])


def _update(run: Run, row_gradients: dict[str, RowGradients], norm: Tensor, lr: float) -> None:
    """Exactly one update of every dense parameter and of every row that took part, if all is finite."""
    clip_norm = run.config.dense.clip_norm
    clip = clip_scale(norm, clip_norm) if clip_norm else None
    ok = run.ok if run.read_late else None
    dense_step(run.dense, lr_scale=lr, grad_scale=clip, ok=ok)
    run.sparse.step(run.system.tables, row_gradients, lr_scale=lr, grad_scale=clip, ok=ok)


def _require_finite(run: Run, started: Started) -> dict[str, float]:
    """The step's statistics. Where loss or gradient is not finite, saves the batch's tasks and raises."""
    stats, batch, step = started.stats.read(), started.batch, started.step
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


def build_run(config: TrainConfig, mesh: Mesh, stop: threading.Event) -> Run:
    """Build everything a rank needs; raises ValueError for what does not fit, before anything is written."""
    pack = open_pack(config.pack)
    split = pack.split("train")
    system = build_system(config, pack.schema, mesh)
    ahead: dict[str, Callable[[TaskBatch], Work]] = {"none": Loaded, "index": system.index, "ids": system.prepare}
    loader: TaskLoader[Work] = TaskLoader(
        split,
        tasks_per_batch=config.loader.tasks_per_batch,
        seed=config.seed,
        rank=mesh.rank,
        world_size=mesh.world_size,
        window_batches=config.loader.window_batches,
        sequential=config.loader.sequential,
        size_buckets=config.loader.size_buckets,
        prefetch=config.loader.prefetch,
        resample=config.loader.resample,
        transform=ahead[config.loader.ahead],
    )
    total = config.schedule.epochs * loader.batches_per_epoch
    if config.schedule.max_steps:
        total = min(total, config.schedule.max_steps)
    return Run(
        config=config,
        system=system,
        dense=dense_optimizer(
            system.learner,
            lr=config.dense.lr,
            inner_lr_lr=config.dense.inner_lr_lr,
            weight_decay=config.dense.weight_decay,
        ),
        sparse=SparseOptimizer(
            config.embedding.optimizer, lr=config.embedding.lr, weight_decay=config.embedding.weight_decay
        ),
        buckets=GradientBuckets(
            list(system.learner.parameters()), mesh, how=config.comm.dense, overlap=config.comm.overlap
        ),
        loader=loader,
        pack=pack,
        log=RunLog(Path(config.run_dir), rank=mesh.rank, total_steps=total),
        total_steps=total,
        stop=stop,
        ok=torch.ones((), dtype=torch.bool, device=mesh.device),
        read_late=mesh.device.type == "cuda",
    )


def _checkpoint_tensors(run: Run) -> dict[str, Tensor]:
    """Weights, tables and the dense optimizer's moments, by name; 0-dim tensors go as [1]."""
    tensors = run.system.tensors()
    for name, parameter in run.system.learner.named_parameters():
        state = run.dense.state.get(parameter) or _fresh_state(run.dense, parameter)
        for key, value in state.items():
            tensors[f"optimizer.{name}.{key}"] = value if value.dim() else value.view(1)
    return tensors


def _fresh_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state before its first step, so that a checkpoint has a place to load it into."""
    state = {
        "step": torch.zeros((), device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
    }
    optimizer.state[parameter] = state
    return state


def save_checkpoint(run: Run) -> None:
    """Save and prune; collective."""
    state = {
        "progress": asdict(run.progress),
        "best_step": run.progress.best_step,
        "loader": run.loader.state_dict(),
        "torch_rng": torch.get_rng_state().numpy().tobytes().hex(),
        "config": asdict(run.config),
        "schema": run.pack.schema.to_json(),
    }
    checkpoint.save(run.checkpoints, run.progress.step, _checkpoint_tensors(run), state, run.mesh)
    if run.mesh.rank == 0:
        checkpoint.prune(run.checkpoints, run.config.schedule.keep_last, run.progress.best_step)


def load_checkpoint(run: Run, path: Path) -> None:
    """Restore everything from `path`; collective."""
    state = checkpoint.read_state(path)
    checkpoint.load_tensors(path, _checkpoint_tensors(run), run.mesh)
    run.progress = Progress(**state["progress"])
    run.loader.load_state_dict(state["loader"])
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch_rng"]), dtype=torch.uint8))
    run.log.cut_back(run.progress.step)


def validate(run: Run) -> bool:
    """Measure the valid split, log it, update the best; True when patience has run out. Collective."""
    schedule = run.config.schedule
    if "valid" not in run.pack.splits:
        return False
    run.loader.settle()  # the ids of two loaders must not cross
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


def training_loop(run: Run) -> bool:
    """Train until the steps are done, patience runs out or a stop is requested; True when stopped on request."""
    schedule = run.config.schedule
    eval_every = schedule.eval_every or run.loader.batches_per_epoch
    save_every = schedule.checkpoint_every or eval_every
    batches = iter(run.loader)
    ahead: deque[Started] = deque()
    while run.progress.step < run.total_steps and not out_of_patience(run):
        watch = Stopwatch(run.mesh.device)
        upcoming = next(batches)
        watch.lap("input")
        work = upcoming  # frees the last batch: 1 to 3 ms that are no wait for input
        ahead.append(train_step(run, work, watch))

        step = run.progress.step
        last = step == run.total_steps
        pause = last or step % eval_every == 0 or step % save_every == 0
        stop = _log_steps(run, ahead, leave=1 if run.read_late and not pause else 0)
        ended = (step % eval_every == 0 or last) and validate(run)
        is_best = run.progress.best_step == step
        if step % save_every == 0 or last or is_best or stop or ended:
            save_checkpoint(run)
        if stop:
            return not last and not ended
    return False


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
    seconds = started.watch.seconds
    total = sum(seconds.values())
    run.progress.seconds += total
    run.log.train(
        {
            "step": started.step + 1,
            "epoch": started.batch.epoch,
            "loss": stats["loss"],
            "support_loss": stats["support_loss"],
            "lr": stats["lr"],
            "grad_norm": stats["grad_norm"],
            "tasks_per_s": started.batch.num_tasks_global / total,
            "samples_per_s": stats["samples"] / total,
            "padding": 1 - stats["samples"] / max(1.0, stats["cells"]),
            **{f"{phase}_share": value / total for phase, value in seconds.items()},
            "time_s": run.progress.seconds,
            **({"comm": traffic_record(run, started.routes)} if run.mesh.is_main and run.mesh.world_size > 1 else {}),
        }
    )


def traffic_record(run: Run, routes: Routes) -> dict[str, Any]:
    """What this rank sent in a step, and what the formulas say it had to."""
    expected = expected_traffic(
        run.system.tables,
        routes,
        run.mesh,
        WIRE[run.config.comm.wire],
        dense_bytes=run.buckets.bucket_bytes,
        dense=run.config.comm.dense,
        control_bytes=CONTROL_BYTES,
    )
    return {"measured": routes.traffic.record(), "predicted": expected.record()}


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


def train(config: TrainConfig) -> int:
    """Run `gmeta train` on this rank; returns the exit code (0, or 75 when stopped on request and saved)."""
    open_pack(config.pack)  # before anything is created
    with stop_on_signals() as stop:
        mesh = open_mesh(config.device, config.timeout_s, config.comm.node_size)
        try:
            with run_lock(Path(config.run_dir), mesh):
                return _train(config, mesh, stop)
        finally:
            close_mesh(mesh)


def _train(config: TrainConfig, mesh: Mesh, stop: threading.Event) -> int:
    resume_from = prepare_run_dir(config, mesh)
    run = build_run(config, mesh, stop)
    try:
        run.log.say(_banner(run))  # before the tables are allocated
        if resume_from is not None:
            load_checkpoint(run, resume_from)
            run.log.say(f"resumed from {resume_from}")
        run.log.start()
        stopped = training_loop(run)
        run.log.say(_farewell(run, stopped))
    finally:
        run.loader.close()
        run.log.close()
    return EXIT_STOPPED if stopped else 0


def _farewell(run: Run, stopped: bool) -> str:
    """Where the run stands, and what to do next."""
    step, best = run.progress.step, run.progress
    if stopped:
        return f"stopped after step {step} and saved; continue with the same command and --resume true"
    found = f"done after step {step} of {run.total_steps}"
    if out_of_patience(run):
        found += f", {best.bad_validations} validations without a better {run.config.schedule.metric}"
    if best.best is not None:
        found += f"; best {run.config.schedule.metric} on valid {best.best:.4f} at step {best.best_step}"
    return f"{found}\nnext: gmeta evaluate --run_dir {run.config.run_dir}"


def _banner(run: Run) -> str:
    """What a user wants to know before the first step."""
    train_split = run.pack.split("train")
    parameters = sum(p.numel() for p in run.system.learner.parameters())
    lines = [
        f"{train_split.num_tasks:,} tasks, {train_split.num_rows:,} rows; {run.total_steps:,} steps of "
        f"{run.config.loader.tasks_per_batch} tasks on {run.mesh.world_size} process(es), {run.mesh.device}",
        f"{parameters:,} dense parameters; engine: {run.system.learner.engine_reason}",
        run.system.tables.memory_report(),
    ]
    return "\n".join(lines)
