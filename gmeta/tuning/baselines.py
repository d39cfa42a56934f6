"""Tune baselines on valid tasks, with the same budget as the trials: factor-analysis and plain-finetuned.

Factor analysis climbs rungs of EM iterations by successive halving. It is fitted anew in each rung, which costs a
third more than going on would, and needs no state. Fine-tuning trains nothing that could be shortened: its settings
are scored on all valid tasks, one after the other.
"""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gmeta.config.evaluation import FactorConfig, FinetuneConfig
from gmeta.config.train import CLICK_METRICS, LossName, MetaConfig
from gmeta.config.tune import TuneConfig
from gmeta.core.errors import require
from gmeta.data.pack import TaskPack
from gmeta.evaluation.baseline_settings import FACTORS, FINETUNED, BaselineSettings, write_baseline_settings
from gmeta.evaluation.baselines import BaselineRows, fit_baselines
from gmeta.evaluation.metrics import HIGHER_IS_BETTER, make_rows, metric_of
from gmeta.evaluation.score import score_split, validation_metrics
from gmeta.evaluation.variants import FINETUNE_LR, FINETUNE_STEPS, baseline_rows, finetuning_learner
from gmeta.meta.learner import MetaLearner
from gmeta.parallel.collectives import broadcast_from_rank_0, on_rank_0
from gmeta.parallel.mesh import Mesh, barrier, close_mesh, open_mesh
from gmeta.recommender.build import load_system
from gmeta.recommender.system import System
from gmeta.runs.data import is_own_pack
from gmeta.runs.directory import read_config, read_run_id
from gmeta.tuning.halving import climb, num_rungs, ranked, validations_of
from gmeta.tuning.journal import FORMAT_VERSION, Done, TrialJournal, cut_torn_line, require_same_question
from gmeta.tuning.show import print_trials, say
from gmeta.tuning.space import Range, Space, TrialSettings, as_json, draw_trials, in_one_line

BASELINES_FILE = "baselines.json"
MAX_ITERATIONS = 90
"""EM iterations of the last rung: three times the usual number."""

_FACTOR_SPACE: Space = {
    "num_factors": Range(2, 48, log=True),
    "loading_ridge": Range(2.0, 200.0, log=True),
    "mean_ridge": Range(0.1, 20.0, log=True),
}
_PARTS = (["decision"], ["head"], ["dense"], ["embeddings", "dense"])
"""What fine-tuning may adapt, where the model has it; besides meta.adapt."""
_PREDICTION_METRIC: dict[LossName, str] = {"bce": "logloss", "mse": "rmse", "l1": "mae", "huber": "mae"}
"""Metric of predictions without logits, in place of a loss."""

Scoring = Callable[[int, int, int], tuple[float, float]]
"""(trial, rung, seed's number) -> value on valid, which is not finite where the trial fails, and seconds."""


@dataclass(frozen=True)
class _Search:
    """A baseline's settings to try, and how they are ranked."""

    name: str
    trials: list[TrialSettings]
    iterations: list[int]  # of EM, one a rung; of fine-tuning [0]
    seeds: int
    metric: str
    question: dict[str, Any]  # what the journal must have been asked

    @property
    def rungs(self) -> int:
        """Return the number of rungs."""
        return len(self.iterations)

    @property
    def higher_is_better(self) -> bool:
        """Say which end of the metric is best."""
        return self.metric in HIGHER_IS_BETTER


def require_plain_run(config: TuneConfig, pack: TaskPack) -> None:
    """Raise ValueError unless `plain_run` is a run without an inner loop on this very pack that has the metric."""
    if config.plain_run is None:
        return
    plain, metric = read_config(Path(config.plain_run)), config.train.schedule.metric
    if plain.meta.adapt:
        raise ValueError(f"plain_run {config.plain_run} was trained with meta.adapt {plain.meta.adapt}: need []")
    if not is_own_pack(Path(config.plain_run), pack):
        raise ValueError(f"plain_run {config.plain_run} was trained on {plain.pack}: train it on {pack.path}")
    clicks = plain.loss == "bce" or metric not in CLICK_METRICS
    require(clicks, "schedule.metric", metric, f"plain_run {config.plain_run} has loss {plain.loss}: name another")


def tune_baselines(config: TuneConfig, pack: TaskPack, folder: Path) -> None:
    """Tune the baselines and write baselines.json; collective. The caller holds the directory.

    Ranks other than 0 return before factor-analysis, which is computed by rank 0 alone and takes no mesh.
    """
    if pack.schema.labels:
        raise ValueError(f"baselines are tuned for one label, and {pack.path} has several: leave --baselines out")
    mesh = open_mesh(config.train.device, config.train.timeout_s)
    try:
        finetuned = None if config.plain_run is None else _tune_finetuning(config, pack, folder, mesh)
        main = mesh.is_main
    finally:
        close_mesh(mesh)
    if not main:
        return
    factors = _tune_factors(config, pack, folder)
    found = {name: one for name, one in ((FACTORS, factors), (FINETUNED, finetuned)) if one is not None}
    write_baseline_settings(
        folder / BASELINES_FILE,
        BaselineSettings(
            None if factors is None else FactorConfig(**factors[0]),
            None if finetuned is None else FinetuneConfig(**finetuned[0]),
        ),
        pack=pack,
        plain_run=None if config.plain_run is None else read_run_id(Path(config.plain_run)),
        values={name: {"metric": metric, "value": value} for name, (_, metric, value) in found.items()},
    )
    if found:
        say(f"next: gmeta evaluate --run_dir RUN --baseline_settings {shlex.quote(str(folder / BASELINES_FILE))}")


def _tune_factors(config: TuneConfig, pack: TaskPack, folder: Path) -> tuple[TrialSettings, str, float] | None:
    """Return the best settings of the factor analysis, with metric and value; None without items, or budget."""
    train, valid = (baseline_rows(pack, pack.split(name)) for name in ("train", "valid"))
    if train.item is None:
        say(f"{FACTORS} is left out: items are no feature of the pack")
        return None
    base, metric = config.train, config.train.schedule.metric
    metric = _PREDICTION_METRIC[base.loss] if metric == "loss" else metric
    first = [{key: getattr(FactorConfig(), key) for key in _FACTOR_SPACE}]
    trials = draw_trials(_FACTOR_SPACE, config.trials, base.seed, first)
    rungs = num_rungs(len(trials), MAX_ITERATIONS)
    iterations = [validations_of(rung, rungs, MAX_ITERATIONS) for rung in range(rungs)]
    question = _question(config, pack, _FACTOR_SPACE, {"metric": metric, "seed": base.seed})
    search = _Search(FACTORS, trials, iterations, config.seeds, metric, question)

    def value(trial: int, rung: int, number: int) -> tuple[float, float]:
        begun = time.monotonic()
        settings = FactorConfig(**trials[trial], num_iterations=iterations[rung])
        found = _factor_value(train, valid, settings, base.seed + number, metric)
        return found, time.monotonic() - begun

    best = _run(search, config, folder, Mesh(), value)
    if best is None:
        return None
    return {**trials[best.trial], "num_iterations": best.steps}, metric, float(np.mean(best.values))


def _factor_value(train: BaselineRows, valid: BaselineRows, settings: FactorConfig, seed: int, metric: str) -> float:
    try:
        fitted = fit_baselines(train, seed=seed, factors=settings)
    except torch.linalg.LinAlgError:  # a ridge so small that a factorisation fails
        return math.nan
    name, query, scores = FACTORS, valid.is_query, fitted.score(valid)
    if not np.isfinite(scores[name]).all():
        return math.nan
    weight = None if valid.weight is None else valid.weight[query]
    rows = make_rows(
        fitted.clip(scores)[name], valid.label[query], valid.task[query], logit=scores[name], weight=weight
    )
    return metric_of(metric, rows)


def _tune_finetuning(
    config: TuneConfig, pack: TaskPack, folder: Path, mesh: Mesh
) -> tuple[TrialSettings, str, float] | None:
    """Return the best settings of fine-tuning the plain run, with metric and value; None without budget; collective."""
    assert config.plain_run is not None
    run_dir, meta, metric = Path(config.plain_run), config.train.meta, config.train.schedule.metric
    # The command named this model, so that its code may run.
    trusted = read_config(run_dir).model.name == config.train.model.name
    texts = pack.text_tables()
    system, plain, _ = load_system(run_dir, "best", mesh, trust_model=trusted, text_tables=texts)
    learners: dict[str, MetaLearner] = {}

    def learner(adapt: list[str], prior: float) -> MetaLearner:
        key = repr((adapt, prior))
        if key not in learners:
            wanted = replace(meta, adapt=adapt, inner_prior=prior, modulation="none", recompute=False)
            learners[key] = finetuning_learner(system, plain, wanted)
        return learners[key]

    parts = _parts_of(meta, lambda adapt: learner(adapt, meta.inner_prior))
    space: Space = {
        "steps": list(FINETUNE_STEPS),
        "inner_lr": Range(min(FINETUNE_LR), max(FINETUNE_LR), log=True),
        "adapt": list(parts),
        "inner_prior": [0.0, 1.0, 5.0, 25.0],
    }
    usual = {"adapt": parts[0], "inner_prior": meta.inner_prior}
    first = [{"steps": steps, "inner_lr": rate, **usual} for steps, rate in product(FINETUNE_STEPS, FINETUNE_LR)]
    trials = draw_trials(space, len(first) + 2 * config.trials, config.train.seed, first)
    asked = {"metric": metric, "seed": config.train.seed, "plain_run": read_run_id(run_dir)}
    asked |= {"meta.inner_loss": meta.inner_loss, "meta.inner_prior": meta.inner_prior}
    search = _Search(FINETUNED, trials, [0], 1, metric, _question(config, pack, space, asked))

    def value(trial: int, rung: int, number: int) -> tuple[float, float]:
        begun, settings = time.monotonic(), trials[trial]
        of_trial = learner(settings["adapt"], settings["inner_prior"])
        found = _finetuned_value(config, system, of_trial, pack, settings, plain.loss, mesh)
        return found, broadcast_from_rank_0(time.monotonic() - begun, mesh)

    best = _run(search, config, folder, mesh, value)
    return None if best is None else (trials[best.trial], metric, best.values[0])


def _parts_of(meta: MetaConfig, build: Callable[[list[str]], MetaLearner]) -> list[list[str]]:
    """Return what a task of this model can adapt; what `meta` names stands first."""
    found: list[list[str]] = []
    for adapt in (meta.adapt, *_PARTS):
        if not adapt or adapt in found:
            continue
        try:
            build(adapt)
        except ValueError:
            if adapt == meta.adapt:
                raise
            continue  # the model has no such part
        found.append(adapt)
    return found


def _finetuned_value(
    config: TuneConfig,
    system: System,
    learner: MetaLearner,
    pack: TaskPack,
    settings: TrialSettings,
    loss: LossName,
    mesh: Mesh,
) -> float:
    """Return the metric of the valid split after fine-tuning; not finite where it diverges; collective."""
    loader = config.train.loader
    scores = score_split(
        system,
        pack.split("valid"),
        tasks_per_batch=max(256, loader.tasks_per_batch),
        max_support_rows=loader.max_support_rows,
        learner=learner,
        steps=settings["steps"],
        inner_lr=settings["inner_lr"],
    )
    metrics = {} if scores is None else validation_metrics(scores, loss)
    return broadcast_from_rank_0(metrics.get(f"{config.train.schedule.metric}_after", math.nan), mesh)


def _question(config: TuneConfig, pack: TaskPack, space: Space, more: dict[str, Any]) -> dict[str, Any]:
    asked = {
        "format": FORMAT_VERSION,
        "pack": pack.manifest["xxh3"],
        "trials": config.trials,
        "seeds": config.seeds,
        "space": as_json(space),
        "train": more,
    }
    found: dict[str, Any] = json.loads(json.dumps(asked))
    return found


def _run(search: _Search, config: TuneConfig, folder: Path, mesh: Mesh, value: Scoring) -> Done | None:
    """Try a baseline's settings within the budget, and return the best result of any rung; collective."""
    path = folder / f"{search.name}.jsonl"

    def begin() -> None:
        cut_torn_line(path)
        journal = TrialJournal(path)
        if journal.asked is None:
            journal.append("asked", search.question)
        else:
            require_same_question(journal.asked, search.question, path)

    on_rank_0(begin, mesh)
    journal = TrialJournal(path)
    barrier(mesh)  # rank 0 appends from here on, and all must have read the same
    ending = climb(
        journal,
        len(search.trials),
        search.rungs,
        budget_s=60 * config.budget_minutes,
        higher_is_better=search.higher_is_better,
        train=partial(_scored, search, value),
        finished=partial(_finished, search, journal) if mesh.is_main else lambda done: None,
    )
    best = next(iter(ranked(journal.done.values(), search.higher_is_better)), None)
    if mesh.is_main:
        _tell(search, journal, best, ending.not_tried, config.budget_minutes)
    return best


def _scored(search: _Search, value: Scoring, trial: int, rung: int) -> Done:
    """Return what a trial comes to in a rung, with every seed."""
    values, seconds = list[float](), 0.0
    for number in range(search.seeds):
        found, took = value(trial, rung, number)
        seconds += took
        if not math.isfinite(found):
            return Done(
                trial, rung, values, search.iterations[rung], seconds, f"its {search.metric} on valid is not finite"
            )
        values.append(found)
    return Done(trial, rung, values, search.iterations[rung], seconds)


def _finished(search: _Search, journal: TrialJournal, done: Done) -> None:
    journal.append("done", done)
    found = f"failed: {done.failed}" if done.failed else _shown(search, done)
    settings = in_one_line(search.trials[done.trial])
    say(f"{search.name}, rung {done.rung + 1}/{search.rungs}, trial {done.trial + 1} ({settings}): {found}")


def _shown(search: _Search, done: Done) -> str:
    after = f" after {done.steps} iterations" if done.steps else ""
    return f"{search.metric} {float(np.mean(done.values)):.4f}{after}"


def _tell(search: _Search, journal: TrialJournal, best: Done | None, not_tried: str, minutes: float) -> None:
    number = None if best is None else best.trial
    say(f"{search.name}:")
    print_trials(search.trials, search.metric, search.rungs, journal.done.values(), number)
    if not_tried:
        say(f"the budget of {minutes:g} minutes is spent; not tried: {not_tried}")
    if best is not None:
        settings = in_one_line(search.trials[best.trial])
        say(f"best {search.name}: trial {best.trial + 1} ({settings}): {_shown(search, best)}")
