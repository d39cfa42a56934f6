"""What `gmeta gate` measures of versions that find next items: where each ranks the targets of the newest day.

Each ranks as it serves. Ids of the pack are turned into its own; an item that it does not know it never recommends, so
that such a target ranks last, and leaves such events of a history out, unless it reads their texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gmeta.config.delivery import GateConfig
from gmeta.core.batch import Examples, TaskBatch
from gmeta.data.catalogue import Catalogue, read_catalogue
from gmeta.data.pack import TaskPack
from gmeta.data.schema import OOV
from gmeta.data.shards import PackSplit
from gmeta.evaluation.documents import Json
from gmeta.evaluation.evaluate_next_item import ranked_split
from gmeta.evaluation.rank_split import candidates_of, rank_split
from gmeta.evaluation.score import Ints
from gmeta.evaluation.target_ranks import TargetRanks
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.build import candidate_draw, domain_of, load_system, version_of
from gmeta.recommender.catalogue_vectors import next_item_learner
from gmeta.runs.directory import read_schema
from gmeta.runs.translation import Translation


@dataclass(frozen=True)
class Ranked:
    """Where a version ranks the targets of a day; on rank 0."""

    id: str
    pack: TaskPack
    split: PackSplit
    ranks: TargetRanks

    def not_finite(self) -> int:
        """Count the targets with a score that is no finite number."""
        return int((self.ranks.finite == 0).sum())


def rank_day(
    mesh: Mesh, config: GateConfig, source: Path, pack: TaskPack, split: PackSplit, translation: Translation
) -> Ranked | None:
    """Rank the targets of a split of a pack by a version; collective, None on other ranks than 0."""
    texts = pack.text_tables()
    system, trained, step = load_system(source, "best", mesh, trust_model=config.trust_model, text_tables=texts)
    schema, item = read_schema(source)[0], str(pack.schema.item)
    own = translation.of_feature(item, np.arange(pack.schema.feature(item).num_ids))
    catalogue = _with_texts_of(pack, read_catalogue(source / "vocab", schema), own)
    reads_texts = bool(next_item_learner(system).texts) and hasattr(system.objective.model, "add_texts")
    pack_catalogue = pack.catalogue()
    ranks = rank_split(
        system,
        split,
        catalogue,
        replace(candidates_of(pack_catalogue, domain_of(pack.schema)), seed=config.seed),
        tasks_per_batch=config.tasks_per_batch,
        max_support_rows=trained.loader.max_support_rows if reads_texts else 0,
        draw=candidate_draw(trained, catalogue, schema),
        translate=translation if reads_texts else _Known(translation, item, trained.loader.max_support_rows),
        own=own,
    )
    return None if ranks is None else Ranked(version_of(source, step), pack, split, ranks)


def evaluation_of(config: GateConfig, found: Mapping[str, Ranked]) -> Json:
    """Return the evaluation of versions by name, and of baselines on the day's own training rows."""
    one = next(iter(found.values()))
    candidates = replace(candidates_of(one.pack.catalogue(), domain_of(one.pack.schema)), seed=config.seed)
    ranks = {name: ranked.ranks for name, ranked in found.items()}
    ranked = ranked_split(one.pack, one.split, candidates, ranks, baselines="train" in one.pack.splits)
    return ranked.document(config.resamples, config.seed)


def _with_texts_of(pack: TaskPack, catalogue: Catalogue, own: Ints) -> Catalogue:
    """Return a version's catalogue with the pack's ids of texts, which its model is given; `own` [num_ids of the pack]
    has the version's id of each item. Of an item that the pack does not know there is no text.
    """
    of_pack = np.zeros(catalogue.num_ids, np.int64)
    of_pack[own] = np.arange(len(own))
    of_pack[OOV] = OOV
    features = [pack.schema.feature(name) for name in catalogue.owned]
    texts = {f.name: pack.catalogue().owned[f.name][of_pack] for f in features if f.num_texts is not None}
    return replace(catalogue, owned={**catalogue.owned, **texts})


@dataclass(frozen=True)
class _Known:
    """Turns batches into a version's ids, and leaves of each history the last `most` events (0: all) whose item it
    knows, out of the whole history, as a server does.
    """

    translation: Translation
    item: str
    most: int

    def __call__(self, batch: TaskBatch) -> TaskBatch:
        batch = self.translation(batch)
        parts: Any = tuple(replace(part, support=self._known(part.support)) for part in batch.parts)
        return replace(batch, support=self._known(batch.support), parts=parts)

    def _known(self, support: Examples) -> Examples:
        mask = support.mask & (support.ids[self.item] != OOV)
        if self.most:
            mask &= mask.flip(1).cumsum(1).flip(1) <= self.most
        return replace(support, mask=mask)
