"""Where a split's next items stand among all items: each rank takes a part of the users, rank 0 gathers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from gmeta.core.batch import TaskBatch
from gmeta.data.candidates import CandidateDraw
from gmeta.data.catalogue import Catalogue
from gmeta.data.schema import OOV
from gmeta.data.shards import PackSplit
from gmeta.evaluation.score import Ints, loader_of_pass
from gmeta.evaluation.target_ranks import Candidates, TargetRanks, Targets, gather_ranks, ranks_of
from gmeta.recommender.catalogue_vectors import item_vectors, next_item_learner, to_adapt
from gmeta.recommender.system import System


def candidates_of(catalogue: Catalogue, domain: str | None, **settings: bool) -> Candidates:
    """Return who is ranked: the items of the target's domain, unless `settings` say otherwise."""
    numbers = np.zeros(catalogue.num_ids, np.int64) if domain is None else catalogue.owned[domain]
    return Candidates(numbers, **settings)


def rank_split(
    system: System,
    split: PackSplit,
    catalogue: Catalogue,
    candidates: Candidates,
    *,
    tasks_per_batch: int = 256,
    max_support_rows: int = 0,
    draw: CandidateDraw | None = None,
    steps: int | None = None,
    translate: Callable[[TaskBatch], TaskBatch] = lambda batch: batch,
    own: Ints | None = None,
) -> TargetRanks | None:
    """Rank every query row's item by the state after its task's support; None on other ranks than 0.

    Users read their last `max_support_rows` events, 0: all. Where they adapt, it is beside the items that
    `draw` draws after training, in `steps` steps instead of those of the run. The call is collective, and no other
    loader may exchange ids meanwhile.

    Where the system has other ids than the split, `translate` turns those of batches into its own, `catalogue` and
    `draw` have its own, and `own` [candidates.num_ids] says which of them each item has. One that it does not know
    (`OOV`) it never recommends: such an item scores lower than any other.
    """
    learner, mesh = next_item_learner(system), system.mesh
    loader = loader_of_pass(
        split,
        mesh,
        lambda batch: system.prepare(to_adapt(learner, translate(batch), draw)),
        tasks_per_batch=tasks_per_batch,
        max_support_rows=max_support_rows,
    )
    training = learner.training
    learner.eval()
    items = item_vectors(system, catalogue, split.schema if draw is None else draw.schema)
    unknown = torch.zeros(len(items), dtype=torch.bool, device=items.device)
    if own is not None:
        index = torch.from_numpy(own).to(items.device)
        items, unknown = items[index], index == OOV
    rows_of, users_of = [torch.zeros(0, dtype=torch.int64)], [items[:0]]
    with loader, torch.no_grad():
        for prepared in loader:
            rows = system.exchange.fetch(prepared.routed)
            for part in prepared.parts:
                with system.precision():
                    users = learner.users(part.rows(rows), part.tasks, steps=steps).float()
                query = part.tasks.query
                rows_of.append(query.row[query.mask].cpu())
                users_of.append(users[query.mask.nonzero()[:, 0]])
    learner.train(training)
    row, order = torch.cat(rows_of).sort()
    users = torch.cat(users_of)[order.to(items.device)]
    targets = Targets.of_split(split, learner.item).at_rows(row.numpy())

    def scores(some: slice) -> torch.Tensor:
        found = users[some] @ items.mT
        return found if own is None else found.masked_fill(unknown, -torch.inf)

    return gather_ranks(ranks_of(scores, targets, candidates), mesh)
