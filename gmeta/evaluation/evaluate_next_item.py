"""`gmeta evaluate` of a next-item run: rank every target by the model and by baselines, and measure where they are."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from gmeta.config.evaluation import EvaluateConfig
from gmeta.config.train import TrainConfig
from gmeta.core.files import replacing
from gmeta.data.events.hold_out import BY_PLACE
from gmeta.data.pack import TaskPack
from gmeta.data.shards import PackSplit
from gmeta.evaluation.next_item import (
    MODEL,
    NEXT_ITEM,
    POPULARITY_CLASSES,
    RANKED_AMONG,
    Places,
    RankedRows,
    next_item_records,
    popularity_classes,
)
from gmeta.evaluation.next_item_baselines import NEXT_ITEM_BASELINES, ScoreTargets, fit_next_item_baselines
from gmeta.evaluation.predictions import scenarios_of, task_keys, values_of_ids
from gmeta.evaluation.rank_split import candidates_of, rank_split
from gmeta.evaluation.score import Ints
from gmeta.evaluation.slices import BEFORE
from gmeta.evaluation.target_ranks import Candidates, TargetRanks, Targets, ranks_of
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.build import candidate_draw, domain_of
from gmeta.recommender.catalogue_vectors import next_item_learner
from gmeta.recommender.system import System

_SCORING_ONLY = ("inner_lr", "support_sizes", "plain_run", "truth", "relevant_label", "baseline_settings")
_NEXT_ITEM_ONLY = ("candidates", "exclude_history")


@dataclass(frozen=True)
class RankedSplit:
    """The targets of a split, ranked by the model and by baselines."""

    pack: TaskPack
    split: PackSplit
    candidates: Candidates
    ranks: dict[str, TargetRanks]  # by variant, all of the same targets
    user: pa.Array  # [N], raw key as text
    rows: RankedRows

    @property
    def told(self) -> dict[str, Any]:
        """Return what evaluation.json and predictions.parquet tell of the candidates."""
        among = self.candidates
        values = ("all" if among.all_domains else "domain", among.exclude_history, among.seed)
        return {"objective": NEXT_ITEM, **dict(zip(RANKED_AMONG, values, strict=True))}

    def document(self, resamples: int, seed: int) -> dict[str, Any]:
        """Return the content of evaluation.json, but for its settings."""
        places = {name: Places(found.rank, found.sampled_rank) for name, found in self.ranks.items()}
        baselines = [name for name in self.ranks if name in NEXT_ITEM_BASELINES]
        document = next_item_records(places, self.rows, baselines=baselines, resamples=resamples, seed=seed)
        document["notes"] += self.pack.warnings()
        return document | {"left_out": self.pack.left_out(self.split.name)}

    def write(self, path: Path, *, step: int) -> None:
        """Write predictions.parquet: one row a target, with `<variant>.rank` and `<variant>.sampled_rank`."""
        schema, found = self.pack.schema, self.ranks[MODEL]
        task_id = self.split.task_id[found.task]
        columns: dict[str, Any] = {"task_id": task_id, "task": task_keys(self.pack, task_id), "user": self.user}
        for name, feature in (("scenario", schema.scenario), ("item", schema.item)):
            values = values_of_ids(self.pack, feature)
            if values is not None and feature is not None:
                columns[name] = values.take(pa.array(self.split.feature_ids(feature)[found.row]))
        columns |= {name: getattr(found, name) for name in ("row", "candidates", "history", "domains")}
        columns["popularity"] = np.array(POPULARITY_CLASSES)[self.rows.popularity]
        for name, ranked in self.ranks.items():
            columns |= {f"{name}.rank": ranked.rank, f"{name}.sampled_rank": ranked.sampled_rank}
        told = {"step": step, "variants": json.dumps(list(self.ranks)), **self.told}
        if self.rows.domain is not None:
            told["scenarios"] = json.dumps(self.rows.domain.names)
        metadata = {key: str(value) for key, value in told.items()}
        with replacing(path) as file:
            pq.write_table(pa.table(columns).replace_schema_metadata(metadata), file)


def require_options(config: EvaluateConfig, *, next_item: bool) -> None:
    """Raise ValueError that names an option of the other objective than the run's."""
    for name in _SCORING_ONLY if next_item else _NEXT_ITEM_ONLY:
        if (value := getattr(config, name)) is not None:
            kind, other = ("ranks next items", "score rows") if next_item else ("scores rows", "rank next items")
            raise ValueError(f"{name} is {value!r}: it is for runs that {other}, and this one {kind}; leave it out")


def rank_next_items(
    mesh: Mesh, config: EvaluateConfig, system: System, trained: TrainConfig, pack: TaskPack, split: PackSplit
) -> RankedSplit | None:
    """Rank the targets of a split by the model, where it adapts also before it does, and by the baselines, unless they
    are turned off; collective, None on other ranks than 0.
    """
    draw = candidate_draw(trained, pack.catalogue(), pack.schema)
    catalogue = draw.catalogue
    candidates = candidates_of(
        catalogue,
        domain_of(pack.schema),
        all_domains=config.candidates == "all",
        exclude_history=config.exclude_history is not False,
    )
    candidates = replace(candidates, seed=config.seed)
    variants = {MODEL: config.steps}
    if next_item_learner(system).inner_loop is not None:
        variants[BEFORE] = 0
    elif config.steps is not None:
        raise ValueError(f"steps is {config.steps}: the run's users adapt nothing (meta.adapt is empty); leave it out")
    ranks = {}
    for name, steps in variants.items():
        found = rank_split(
            system,
            split,
            catalogue,
            candidates,
            tasks_per_batch=config.tasks_per_batch,
            max_support_rows=trained.loader.max_support_rows,
            draw=draw,
            steps=steps,
        )
        if found is not None:
            ranks[name] = found
    if mesh.rank != 0:
        return None
    return ranked_split(pack, split, candidates, ranks, baselines=config.baselines)


def ranked_split(
    pack: TaskPack, split: PackSplit, candidates: Candidates, ranks: dict[str, TargetRanks], *, baselines: bool
) -> RankedSplit:
    """Return the targets of a split as variants `ranks` them, and with `baselines` as these do."""
    found, catalogue = next(iter(ranks.values())), pack.catalogue()
    if baselines:
        targets = Targets.of_split(split, catalogue.item).at_rows(found.row)
        train = pack.split("train").columns((catalogue.item,))
        for name, score in fit_next_item_baselines(train.task, train.ids[catalogue.item], catalogue.num_ids).items():
            ranks = {**ranks, name: ranks_of(partial(_score_part, score, targets), targets, candidates)}
    user = user_keys(pack, split, found, candidates.domain)
    rows = RankedRows(
        user=np.unique(user, return_inverse=True)[1].astype(np.int64),
        popularity=popularity_classes(catalogue.count)[found.target],
        history=found.history,
        domains=found.domains,
        candidates=found.candidates,
        domain=scenarios_of(pack, split, found.row),
    )
    return RankedSplit(pack, split, candidates, ranks, user, rows)


def _score_part(score: ScoreTargets, targets: Targets, part: slice) -> Tensor:
    return score(targets.where(part))


def user_keys(pack: TaskPack, split: PackSplit, found: TargetRanks, domain: Ints) -> pa.Array:
    """Return the raw user of each target [N] as text. Held-out tasks are called user|domain where there are several
    domains, and their targets are numbered where a user may have several; `domain` [num_ids] is that of each item.
    """
    keys = task_keys(pack, split.task_id[found.task]).cast(pa.string()).to_pylist()
    if split.name != "train" and _are_numbered(pack):
        keys = [key.rpartition("#")[0] for key in keys]
    values = values_of_ids(pack, pack.schema.scenario)
    if values is not None and len(values) > 2 and split.name != "train":  # the first stands for the unknown one
        names = values.cast(pa.string()).to_pylist()
        of_target = domain[found.target].tolist()
        keys = [key.removesuffix(f"|{names[number]}") for key, number in zip(keys, of_target, strict=True)]
    return pa.array(keys, pa.string())


def _are_numbered(pack: TaskPack) -> bool:
    """Say whether held-out tasks end with `#` and a number: where a time or a day parts events, or others drew them."""
    settings = pack.manifest["settings"]
    by_time = settings.get("holdout") not in (None, *BY_PLACE)
    return by_time or "day" in pack.manifest or settings.get("dataset") == "amazon-office"
