"""`gmeta tune`: train the trials of a space rung by rung, and write the settings of the best one.

A trial is an ordinary run that pauses at the ends of rungs: what survives is trained as `gmeta train` would train it.
"""

from __future__ import annotations

import gc
import json
import shlex
import shutil
import statistics
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from gmeta.config.train import TrainConfig
from gmeta.config.tune import TuneConfig
from gmeta.core.errors import require
from gmeta.core.files import write_text
from gmeta.data.loader import TaskLoader
from gmeta.data.pack import TaskPack, open_pack
from gmeta.evaluation.metrics import HIGHER_IS_BETTER
from gmeta.models.registry import is_foreign
from gmeta.parallel.collectives import broadcast_from_rank_0, on_rank_0
from gmeta.parallel.launch import EXIT_STOPPED
from gmeta.parallel.mesh import Mesh, PeerLost, barrier, close_mesh, local_mesh, open_mesh
from gmeta.recommender.build import new_objective, resolve_model
from gmeta.runs import checkpoint
from gmeta.runs.directory import run_lock
from gmeta.training.build import Parts
from gmeta.training.defaults import chosen_for
from gmeta.training.loop import training_loop
from gmeta.training.step import NotFinite
from gmeta.training.trainer import Trainer
from gmeta.tuning.baselines import require_plain_run, tune_baselines
from gmeta.tuning.halving import (
    ETA,
    Ending,
    climb,
    deviation_over_seeds,
    latest,
    num_rungs,
    num_survivors,
    ranked,
    validations_of,
)
from gmeta.tuning.journal import FORMAT_VERSION, JOURNAL_FILE, Done, TrialJournal, cut_torn_line, require_same_question
from gmeta.tuning.show import print_trials, say
from gmeta.tuning.space import (
    Space,
    TrialSettings,
    as_json,
    built_in_space,
    draw_trials,
    in_one_line,
    read_space,
    settings_of,
    with_settings,
)

BEST_FILE, RUNS_FOLDER = "best.yaml", "runs"

_ANYTHING = ("pack", "run_dir", "device", "timeout_s", "comm.", "loader.prefetch", "dense.sharding", "dense.node_size")
_FREE = (*_ANYTHING, "dense.memory_gb", "meta.engine", "meta.recompute", "schedule.keep_last")
"""Settings that another start of the command may change: they say how and where the same numbers are computed."""


@dataclass(frozen=True)
class TuningPlan:
    """What a tuning tries, the same on every rank and at every start."""

    config: TuneConfig
    pack: TaskPack
    space: Space
    trials: list[TrialSettings]
    configs: list[TrainConfig]  # one a trial
    ends: list[list[int]]  # [trial][rung], the step after which the rung ends

    @property
    def rungs(self) -> int:
        """Return the number of rungs."""
        return len(self.ends[0])

    @property
    def metric(self) -> str:
        """Return the metric that ranks trials."""
        return self.config.train.schedule.metric

    @property
    def higher_is_better(self) -> bool:
        """Say which end of the metric is best."""
        return self.metric in HIGHER_IS_BETTER


def tune(config: TuneConfig) -> int:
    """Run `gmeta tune` on this rank, and return the exit code: 0, or 75 when stopped on request; collective.

    Raises ValueError for settings that do not fit, before anything is trained, and where every trial fails.
    """
    folder = Path(config.out)
    with ExitStack() as stack:
        mesh = open_mesh(config.train.device, config.train.timeout_s)
        try:
            plan = make_plan(config, mesh.world_size)
            stack.enter_context(run_lock(folder, mesh))
            on_rank_0(lambda: _open_folder(plan, folder), mesh)
            journal = TrialJournal(folder / JOURNAL_FILE)
            barrier(mesh)  # rank 0 appends from here on, and all must have read the same
        finally:
            close_mesh(mesh)
        code = _Tuning(plan, folder, journal, mesh).run()
        if config.baselines and code == 0:
            tune_baselines(config, plan.pack, folder)
        return code


def make_plan(config: TuneConfig, world_size: int) -> TuningPlan:
    """Draw the trials and check each of them; ValueError names what does not fit."""
    pack = open_pack(config.train.pack)
    if "valid" not in pack.splits:
        raise ValueError(f"trials are ranked on the valid split, and {pack.path} has none: prepare with one")
    require_plain_run(config, pack)
    base = resolve_model(replace(config.train, pack=str(pack.path.resolve())))
    if config.space is None:
        space = built_in_space(base)
        trials = draw_trials(space, config.trials, base.seed, [settings_of(base, space)])
    else:
        space = read_space(Path(config.space))
        trials = draw_trials(space, config.trials, base.seed)
    if "loss" in space:
        metric = base.schedule.metric
        require(metric != "loss", "schedule.metric", metric, "losses of several kinds do not compare; name another")
    # The space may choose another model, which takes other arguments than the defaults of this one.
    shared = replace(base, model=config.train.model)
    sources = [f"trial {number} ({in_one_line(settings)})" for number, settings in enumerate(trials, start=1)]
    tried: set[str] = set()
    configs = [
        _checked(with_settings(shared, settings, source), pack, source, tried)
        for settings, source in zip(trials, sources, strict=True)
    ]
    return TuningPlan(config, pack, space, trials, configs, _ends(configs, pack, world_size))


def _checked(config: TrainConfig, pack: TaskPack, source: str, tried: set[str]) -> TrainConfig:
    """Return a trial's config with its model's defaults, once its model could be built. `tried` are models that were
    built before, but for rates.
    """
    try:
        config = resolve_model(config)
        model = repr((config.loss, config.precision, config.model, replace(config.meta, inner_lr=0.0, inner_prior=0.0)))
        if model not in tried:
            new_objective(config, pack.schema, local_mesh("cpu"), text_tables=pack.text_tables())
            tried.add(model)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error.__cause__
    return config


def _ends(configs: list[TrainConfig], pack: TaskPack, world_size: int) -> list[list[int]]:
    """Return the steps at which rungs end, [trial][rung]: validations of the trial's own schedule, the last its end."""
    schedules = []
    for config in configs:
        tasks, schedule = config.loader.tasks_per_batch, config.schedule
        replay = config.replay
        older = (open_pack(replay.pack).split("train"), replay.share) if replay.pack else None
        loader: TaskLoader[Any] = TaskLoader(
            pack.split("train"), tasks_per_batch=tasks, seed=0, world_size=world_size, replay=older
        )
        steps = schedule.epochs * loader.batches_per_epoch
        steps = min(steps, schedule.max_steps) if schedule.max_steps else steps
        every = schedule.eval_every or loader.batches_per_epoch
        schedules.append((steps, every, -(-steps // every)))
    rungs = num_rungs(len(configs), min(count for _, _, count in schedules))
    return [
        [min(steps, every * validations_of(rung, rungs, count)) for rung in range(rungs)]
        for steps, every, count in schedules
    ]


def _open_folder(plan: TuningPlan, folder: Path) -> None:
    """Begin the journal, or check that it is of this tuning."""
    path = folder / JOURNAL_FILE
    cut_torn_line(path)
    train = _leaves(asdict(plan.config.train))
    wanted = {
        "format": FORMAT_VERSION,
        "pack": plan.pack.manifest["xxh3"],
        "trials": plan.config.trials,
        "seeds": plan.config.seeds,
        "space": as_json(plan.space),
        "train": {key: value for key, value in train.items() if not key.startswith(_FREE)},
    }
    wanted = json.loads(json.dumps(wanted))
    journal = TrialJournal(path)
    if journal.asked is None:
        journal.append("asked", wanted)
    else:
        require_same_question(journal.asked, wanted, folder)


class _Tuning:
    """A tuning on this rank, as far as the journal says."""

    def __init__(self, plan: TuningPlan, folder: Path, journal: TrialJournal, mesh: Mesh) -> None:
        self._plan, self._folder, self._journal = plan, folder, journal
        self._main, self._alone = mesh.is_main, mesh.world_size == 1

    def run(self) -> int:
        """Train what the budget allows, and say what came out."""
        plan, journal = self._plan, self._journal
        self._say("\n".join([*chosen_for(plan.config.train), _announcement(plan, len(journal.done))]))
        ending = climb(
            journal,
            len(plan.trials),
            plan.rungs,
            budget_s=60 * plan.config.budget_minutes,
            higher_is_better=plan.higher_is_better,
            train=self._trial,
            finished=self._finished,
            dropped=self._dropped,
        )
        self._tell(ending)
        return EXIT_STOPPED if ending.stopped else 0

    def _trial(self, trial: int, rung: int) -> Done | None:
        """Train a trial to the end of a rung with every seed. None: a stop was requested, and all is saved."""
        plan, values, seconds = self._plan, list[float](), 0.0
        end = plan.ends[trial][rung]
        for number in range(plan.config.seeds):
            seed = plan.config.train.seed + number
            self._say(f"rung {rung + 1}/{plan.rungs}, trial {trial + 1}, seed {seed}: training to step {end}")
            config = replace(
                plan.configs[trial],
                seed=seed,
                run_dir=str(self._run_dir(trial, number)),
                resume=True,
                schedule=replace(plan.configs[trial].schedule, keep_last=1),
            )
            step = max(checkpoint.steps_saved(Path(config.run_dir) / "checkpoints"), default=0)
            if self._journal.gave_up(trial, rung, number, step):
                failed = f"the process ended each time that it trained on from step {step}, out of memory perhaps"
                return Done(trial, rung, values, end, seconds, failed)
            if self._main:
                self._journal.append("begun", {"trial": trial, "rung": rung, "seed": number, "step": step})
            result = _train(config, end, self._alone)
            seconds += result.seconds
            if result.stopped:
                return None
            if result.value is None:
                return Done(trial, rung, values, end, seconds, result.failed)
            values.append(result.value)
        return Done(trial, rung, values, end, seconds)

    def _finished(self, done: Done) -> None:
        """Record a trial that finished a rung, and write the best settings so far."""
        if self._main:
            self._journal.append("done", done)
            self._write_best()
        found = f"failed: {done.failed}" if done.failed else _shown(self._plan, done)
        self._say(
            f"rung {done.rung + 1}/{self._plan.rungs}, trial {done.trial + 1} "
            f"({in_one_line(self._plan.trials[done.trial])}): {found}, {done.seconds:.0f} s"
        )

    def _dropped(self, trials: set[int]) -> None:
        """Remove the checkpoints of trials that never train on."""
        for trial in trials if self._main else ():
            for number in range(self._plan.config.seeds):
                shutil.rmtree(self._run_dir(trial, number) / "checkpoints", ignore_errors=True)

    def _best(self) -> Done | None:
        return next(iter(ranked(latest(self._journal.done.values()), self._plan.higher_is_better)), None)

    def _write_best(self) -> None:
        best, plan = self._best(), self._plan
        if best is None:
            return
        run_dir = plan.config.train.run_dir or str(self._folder / "best")
        settings = asdict(replace(plan.configs[best.trial], run_dir=run_dir))
        head = f"# Found by gmeta tune: trial {best.trial + 1} of {len(plan.trials)}, {_shown(plan, best)} on valid\n"
        write_text(self._folder / BEST_FILE, head + yaml.safe_dump(settings, sort_keys=False))

    def _run_dir(self, trial: int, number: int) -> Path:
        seed = self._plan.config.train.seed + number
        return self._folder / RUNS_FOLDER / f"trial-{trial + 1}-seed-{seed}"

    def _tell(self, ending: Ending) -> None:
        """Print the table, what failed, what was not tried, and what to do next."""
        plan, results, best = self._plan, list(self._journal.done.values()), self._best()
        if self._main:
            print_trials(plan.trials, plan.metric, plan.rungs, results, None if best is None else best.trial)
        failed = [done for done in results if done.failed]
        self._say(*(f"trial {done.trial + 1} failed in rung {done.rung + 1}: {done.failed}" for done in failed))
        if ending.stopped:
            self._say("stopped and saved; the same command goes on")
        if ending.not_tried:
            self._say(f"the budget of {plan.config.budget_minutes:g} minutes is spent; not tried: {ending.not_tried}")
            self._say("the same command with a larger --budget_minutes goes on")
        if best is not None:
            self._say(*_advice(plan, self._folder, best, self._run_dir(best.trial, 0)))
        elif failed and ending == Ending():
            raise ValueError(f"every trial failed, the first: {failed[0].failed}; narrow the rates of the space")

    def _say(self, *lines: str) -> None:
        if self._main:
            say(*lines)


@dataclass(frozen=True)
class _Trained:
    """What a training came to."""

    value: float | None  # best validation so far; None where it failed or was stopped
    seconds: float = 0.0
    failed: str | None = None
    stopped: bool = False


def _train(config: TrainConfig, until: int, alone: bool) -> _Trained:
    """Train a run on to a step; collective. Numbers that are not finite, or too little memory, are results.

    Of several ranks (not `alone`), one that runs out of memory cannot tell the others, who wait for it in a collective:
    it raises `PeerLost`, with which it ends, and they with it.
    """
    begun, seconds, failed = time.monotonic(), 0.0, None
    trainer = Trainer(config, parts=Parts(console=Console(quiet=True)))
    try:
        with trainer:
            try:
                training_loop(trainer.run, until)
            except NotFinite as error:
                failed = str(error).partition(". ")[0]
            seconds = broadcast_from_rank_0(time.monotonic() - begun, trainer.run.state.mesh)
            if failed is not None:
                raise NotFinite(failed)
    except NotFinite:
        return _Trained(None, seconds, failed)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        failed = f"out of memory: {str(error).partition(chr(10))[0]}"
        if not alone:
            raise PeerLost(f"{config.run_dir} ran {failed}") from error
    if failed is not None:  # behind the handler, whose traceback holds tensors
        del trainer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return _Trained(None, time.monotonic() - begun, failed)
    progress, metric = trainer.run.state.progress, config.schedule.metric
    if trainer.result.exit_code == EXIT_STOPPED and progress.step < until:
        return _Trained(None, seconds, stopped=True)
    if progress.best is not None:
        return _Trained(progress.best, seconds)
    require(progress.bad_validations > 0, "schedule.metric", metric, "not defined on the valid split; name another")
    return _Trained(None, seconds, f"its scores of the valid split are not finite, so that {metric} has no value")


def _out_of_memory(error: Exception) -> bool:
    named = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return named or "can't allocate memory" in str(error)  # torch's allocator on CPU raises a plain RuntimeError


def _announcement(plan: TuningPlan, num_done: int) -> str:
    """Return what will be tried, and what it costs."""
    config, rungs = plan.config, plan.rungs
    whose = "a small one for the model; --space FILE names another" if config.space is None else config.space
    parts = [Fraction(1, ETA ** (rungs - 1 - rung)) for rung in range(rungs)]
    counts = [num_survivors(len(plan.trials), rung) for rung in range(rungs)]
    new = [part - before for part, before in zip(parts, [Fraction(0), *parts], strict=False)]
    cost = config.seeds * sum(float(part) * count for part, count in zip(new, counts, strict=True))
    lines = [f"space ({whose}):", *(f"  {key}: {_values_shown(values)}" for key, values in plan.space.items())]
    path = [f"{count} to {part}" for count, part in zip(counts[:-1], parts, strict=False)]
    path.append(f"{counts[-1]} to the end")
    lines.append(f"{len(plan.trials)} trials; of the schedule train {', then '.join(path)}")
    lines.append(
        f"each with {config.seeds} seed(s), ranked by {plan.metric} on valid; "
        f"as much work as about {cost:.1f} whole trainings"
    )
    if num_done:
        lines.append(f"going on after {num_done} finished rungs of trials in {config.out}")
    return "\n".join(lines)


def _values_shown(values: Any) -> str:
    return ", ".join(map(str, values)) if isinstance(values, list) else str(values)


def _shown(plan: TuningPlan, done: Done) -> str:
    mean = statistics.fmean(done.values)
    deviation = f" ± {deviation_over_seeds(done.values):.4f}" if len(done.values) > 1 else ""
    return f"{plan.metric} {mean:.4f}{deviation} after {done.steps} steps"


def _advice(plan: TuningPlan, folder: Path, best: Done, run_dir: Path) -> list[str]:
    lines = [f"best: trial {best.trial + 1} ({in_one_line(plan.trials[best.trial])}): {_shown(plan, best)}"]
    if best.rung + 1 == plan.rungs:
        trust = " --trust_model true" if is_foreign(plan.configs[best.trial].model.name) else ""
        lines.append(f"its run is trained to the end: gmeta evaluate --run_dir {shlex.quote(str(run_dir))}{trust}")
    lines.append(f"next: gmeta train --config {shlex.quote(str(folder / BEST_FILE))}")
    return lines


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
