"""Opening and closing a training run: signals, the mesh, the run directory, resume, the elastic group."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import Tensor

from gmeta.config.train import TrainConfig
from gmeta.core.numbers import shown
from gmeta.data.id_dropout import DEFAULT_SHARE, default_share
from gmeta.data.loader import long_task_warning
from gmeta.data.pack import open_pack
from gmeta.models.inputs import usual_features
from gmeta.models.layers import SAMPLE
from gmeta.models.registry import ModelFactory, is_foreign
from gmeta.parallel.collectives import broadcast_from_rank_0, fill_from_rank_0, on_rank_0
from gmeta.parallel.launch import EXIT_STOPPED
from gmeta.parallel.mesh import Mesh, close_mesh, open_mesh
from gmeta.recommender.build import inputs_of
from gmeta.runs.directory import prepare_run_dir, read_schema, recorded_settings, run_lock
from gmeta.training.build import Parts, build_run
from gmeta.training.defaults import chosen_for
from gmeta.training.factors import start_from_factors
from gmeta.training.init_from import start_from_parts
from gmeta.training.membership import join
from gmeta.training.pretrained import set_pretrained_rows
from gmeta.training.run import Run
from gmeta.training.saving import load_checkpoint
from gmeta.training.warm_start import start_from_bundle


@contextmanager
def open_run(config: TrainConfig, factory: ModelFactory | None, parts: Parts | None) -> Iterator[Run]:
    """Give the run of `config` on this rank, resumed where the config asks for it; collective."""
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        mesh = open_mesh(config.device, config.timeout_s, config.comm.node_size)
        stack.callback(close_mesh, mesh)
        stack.enter_context(run_lock(Path(config.run_dir), mesh))
        _require_given_roles(config)
        config = _settled(config, mesh)
        chosen = on_rank_0(lambda: chosen_for(config), mesh) or []
        resume_from = prepare_run_dir(config, mesh, chosen)
        run = build_run(config, mesh, stop, factory=factory, parts=parts)
        _, run.data_schema = read_schema(Path(config.run_dir))
        stack.callback(run.log.close)
        stack.callback(run.loader.close)
        if chosen:
            run.log.say("\n".join(chosen))
        run.log.say(_banner(run))  # before the tables are allocated
        ledger = None
        if resume_from is not None:
            ledger = load_checkpoint(run, resume_from)
            run.log.say(f"resumed from {resume_from}")
        else:
            _begin(run)
        if run.ended:  # or longer than this schedule
            asked = f"schedule.epochs is {config.schedule.epochs}, schedule.max_steps {config.schedule.max_steps}"
            run.log.say(f"nothing left to train after step {run.state.progress.step}: {asked}; raise them to go on")
        else:
            run.membership = join(config, run.pack, mesh, run.loader, run.state.progress.step, ledger)
            if run.membership is not None:
                stack.callback(run.membership.agent.close)
        run.log.start()
        yield run


def _begin(run: Run) -> None:
    """Give a run that does not go on the weights that it begins with; collective."""
    config, new = run.config, dict[str, Tensor]()
    _show_vectors(run)
    if config.warm_start:
        new = start_from_bundle(run, Path(config.warm_start))
    elif config.init_from:
        new = start_from_parts(run, Path(config.init_from))
    elif config.embedding.start == "factors":
        start_from_factors(run)
    set_pretrained_rows(run, new)
    if run.state.negotiation is not None:
        run.state.negotiation.begin()


def _show_vectors(run: Run) -> None:
    """Show a model that has a function `see_vectors` those that it reads, of training rows; collective."""
    objective = run.state.system.objective
    see = getattr(objective.model, "see_vectors", None)
    if see is not None:
        some = run.pack.split("train").first_shard()  # a shard is verified, and so read, when it is first used
        see({name: torch.from_numpy(some.vectors(name, SAMPLE).astype(np.float32)) for name in objective.vectors})
        fill_from_rank_0(objective.model.buffers(), run.state.mesh)


def _require_given_roles(config: TrainConfig) -> None:
    """Raise ValueError where training would cut episodes out of rows whose roles the user has given. Plain training
    reads support and query alike.
    """
    if not config.loader.episode_rows:
        return
    pack = open_pack(config.pack)
    if pack.roles_are_given and (config.meta.adapt or pack.schema.next_item):
        raise ValueError(
            f"loader.episode_rows is {config.loader.episode_rows}, and a column gives each row of the pack its role "
            "(split_query column): an episode would make support and query of rows of either; leave episode_rows out "
            "and bound long tasks with loader.max_support_rows, or prepare with --split_query last or random"
        )


def _settled(config: TrainConfig, mesh: Mesh) -> TrainConfig:
    """Return the config with the features that the model reads and the shares of ids that are masked and of tasks that
    are replayed; collective.

    A run that goes on keeps its own: one of a release before read all features, and masked nothing.
    """
    recorded = on_rank_0(
        lambda: recorded_settings(Path(config.run_dir), goes_on=config.resume or config.elastic.enabled), mesh
    )
    schema = open_pack(config.pack).schema
    if not config.model.features:
        read_all = recorded is not None and not recorded.get("model", {}).get("features")
        if not broadcast_from_rank_0(float(read_all), mesh):
            config = replace(config, model=replace(config.model, features=usual_features(schema)))
    if config.embedding.id_dropout is None:

        def share() -> float:
            if recorded is not None:
                return float(recorded.get("embedding", {}).get("id_dropout") or 0.0)
            if config.embedding.generator:
                return DEFAULT_SHARE
            if schema.next_item:
                return 0.0  # each item of the catalogue has a row of its own
            return default_share(open_pack(config.pack), inputs_of(config.model, schema).tables)

        found = broadcast_from_rank_0(on_rank_0(share, mesh) or 0.0, mesh)
        config = replace(config, embedding=replace(config.embedding, id_dropout=found))
    if config.replay.pack:
        config = replace(config, replay=replace(config.replay, fraction=config.replay.share))
    return config


def _banner(run: Run) -> str:
    """Return what a user wants to know before the first step."""
    split, state = run.pack.split("train"), run.state
    replay, new = run.loader.replay, run.loader.num_tasks
    new = new if replay is None else replay.num_new
    episodes = f" in {new:,} episodes an epoch" if new > split.num_tasks else ""
    engine = state.system.objective.engine_reason
    lines = [
        f"{split.num_tasks:,} tasks{episodes}, {split.num_rows:,} rows; {state.rates.total_steps:,} steps of "
        f"{run.config.loader.tasks_per_batch} tasks on {state.mesh.world_size} process(es), {state.mesh.device}",
        f"{state.dense.num_parameters:,} dense parameters; engine: {engine}",
        state.system.tables.memory_report(),
    ]
    lines += getattr(state.system.objective.model, "told", list)()
    if replay is not None:
        what = "episodes" if run.config.loader.episode_rows else "tasks"
        lines.append(
            f"replay: an epoch has {replay.num_drawn:,} of the {replay.num_old:,} {what} of {run.config.replay.pack}"
        )
    only = run.pack.manifest["counts"].get("only_label")
    if only is not None and not run.pack.schema.next_item:
        lines.append(f"every training label is {only:g}: there is nothing to rank by; the log needs rows of both kinds")
    lines += _negotiated(run)
    key = run.pack.schema.task
    if key in (f.name for f in run.pack.schema.features) and key not in state.system.objective.features:
        lines.append(f"the model does not read {key!r}, the task's own key: name it in model.features if it should")
    if run.config.embedding.id_dropout:
        lines.append(f"embedding.id_dropout {run.config.embedding.id_dropout:g}: so many ids are masked, for cold ids")
    if run.config.loader.resample and run.pack.roles_are_given:
        lines.append(
            "loader.resample draws the support anew from all rows of a task, and not by the column that gives "
            "each row its role (split_query column): leave it out to train on the roles as they are"
        )
    if run.config.loader.resample and run.config.model.args.get("drift_std"):
        lines.append(
            "model.args.drift_std is learned from supports in the order of time, and loader.resample draws them at "
            "random: leave one of the two out"
        )
    for name in ("train", "valid") if state.mesh.is_main else ():
        settings = run.config.loader
        warning = name in run.pack.splits and long_task_warning(
            run.pack,
            name,
            tasks_per_batch=settings.tasks_per_batch,
            max_support_rows=settings.max_support_rows,
            episode_rows=settings.episode_rows if name == "train" else 0,
        )
        if warning:
            lines.append(warning)
    return "\n".join(lines)


def _negotiated(run: Run) -> list[str]:
    """Return what rounds over scenarios are, where there are some."""
    share, window = run.config.meta.negotiation, min(run.config.loader.window_batches, run.loader.batches_per_epoch)
    told = (
        f"negotiation: rounds of {window:,} batches, scenario by scenario, of which weights keep {share:g} of the way"
    )
    return [f"{told}; a second copy of them is held"] if share else []


def farewell(run: Run) -> str:
    """Return where the run stands, and what to do next."""
    progress, total, metric = run.state.progress, run.state.rates.total_steps, run.config.schedule.metric
    if run.exit_code == EXIT_STOPPED:
        return f"stopped after step {progress.step} and saved; continue with the same command and --resume true"
    if not run.ended and not run.out_of_patience:
        return f"left after step {progress.step} of {total} and saved; continue with resume: true"
    found = f"done after step {progress.step}" + (f" of {total}" if progress.step <= total else "")
    if run.out_of_patience:
        found += f", {progress.bad_validations} validations without a better {metric}"
    if progress.best is not None:
        found += f"; best {metric} on valid {shown(progress.best)} at step {progress.best_step}"
    trust = " --trust_model true" if is_foreign(run.config.model.name) else ""
    return f"{found}\nnext: gmeta evaluate --run_dir {shlex.quote(run.config.run_dir)}{trust}"


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Give an event that SIGTERM and Ctrl-C set; a second Ctrl-C interrupts at once.

    Outside the main thread, where Python takes no signals, nothing sets it.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

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
