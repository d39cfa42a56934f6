"""The loop around the steps: what is logged, validated and saved between them, and when training ends."""

from __future__ import annotations

from collections.abc import Iterator

from gmeta.elastic.agent import RestartRequested
from gmeta.parallel.launch import EXIT_RESTART, EXIT_STOPPED
from gmeta.recommender.system import PreparedBatch
from gmeta.training.late_tasks import dropped_tasks
from gmeta.training.records import step_record
from gmeta.training.run import Run
from gmeta.training.saving import save_checkpoint
from gmeta.training.statistics import InFlightStep, Stopwatch
from gmeta.training.step import finish_step, train_step
from gmeta.training.validation import validate


def training_loop(run: Run, until: int | None = None) -> None:
    """Train until the epochs are done, patience runs out, a stop is requested or a worker is to be replaced.

    With `until`, training pauses after that many steps. Rates and validations are those of the whole schedule, so that
    a run that is resumed later learns the same bits as one that did not pause.
    """
    if until is not None and run.state.progress.step >= until:
        return
    for prepared in batches(run):
        run.ahead.append(train_step(run.state, prepared, run.watch))
        if run.state.progress.step == until:
            between_steps(run)
            return


def batches(run: Run) -> Iterator[PreparedBatch]:
    """Yield batch after batch. The caller turns each into a step, and appends that step to `run.ahead`."""
    loader = iter(run.loader)
    if run.state.progress.step == 0 and run.config.embedding.start == "factors":
        validate(run)
        save_checkpoint(run)
    while not run.ended and not run.out_of_patience:
        run.watch = Stopwatch(run.state.mesh.device)
        run.position = run.loader.state_dict()
        try:
            upcoming = next(loader)
        except RestartRequested as request:
            run.position = None
            finish_steps(run, leave=0)
            save_checkpoint(run)
            run.log.say(f"step {run.state.progress.step}: {request}")
            run.exit_code = EXIT_RESTART
            return
        run.watch.lap("input")
        prepared = upcoming  # frees the last batch: 1 to 3 ms that are no wait for input
        yield prepared
        if between_steps(run):
            return


def between_steps(run: Run) -> bool:
    """Log, validate and save what is due after a step. Return True when a stop was asked for."""
    run.position = None
    schedule, progress = run.config.schedule, run.state.progress
    every = [n for n in (schedule.eval_every, schedule.checkpoint_every, schedule.max_steps) if n]
    pause = run.loader.between_epochs or any(progress.step % n == 0 for n in every)
    stop = finish_steps(run, leave=1 if run.state.read_late and not pause else 0)
    last = run.ended
    evaluate = progress.step % schedule.eval_every == 0 if schedule.eval_every else run.loader.epoch_finished
    save = progress.step % schedule.checkpoint_every == 0 if schedule.checkpoint_every else evaluate
    out_of_patience = (evaluate or last) and validate(run)
    if save or last or progress.best_step == progress.step or stop or out_of_patience:
        save_checkpoint(run)
    if stop and not (last or out_of_patience):
        run.exit_code = EXIT_STOPPED
    return stop


def finish_steps(run: Run, leave: int) -> bool:
    """Finish and log the oldest steps until `leave` are left. When a rank asked to stop, finish all of them and return
    True.
    """
    stop = False
    while len(run.ahead) > (0 if stop else leave):
        started = run.ahead.popleft()
        stats = finish_step(run.state, started)
        run.loader.put_back(dropped_tasks(started.batch, stats))
        _log(run, started, stats)
        stop = stop or stats["stop"] > 0
    return stop


def _log(run: Run, started: InFlightStep, stats: dict[str, float]) -> None:
    batch, seconds, loader = started.batch, started.watch.seconds, run.loader
    run.state.progress.seconds += sum(seconds.values())
    if run.membership is not None:
        window = batch.index // run.config.loader.window_batches
        in_order = batch.index < loader.batches_per_epoch  # the tail is counted when it is empty
        run.membership.finished(batch, started.step, seconds, int(stats["tasks"]) if in_order else 0, window)
        if loader.epochs_done > batch.epoch:
            run.membership.agent.finish_epoch(batch.epoch)
    run.log.train(step_record(run.state, started, stats, run.membership))
