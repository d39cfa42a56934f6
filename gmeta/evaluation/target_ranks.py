"""Rank targets among the items that could have come next, exactly and among a sample. docs/next-item.md says who is
ranked.

Ties count against the target, since a constant score would otherwise look perfect. What is ranked depends on the pack
alone, never on how many processes share the work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmeta.core.hashing import splitmix64_tensor
from gmeta.data.cells import ranges
from gmeta.data.schema import OOV
from gmeta.data.shards import PackSplit
from gmeta.evaluation.score import Ints
from gmeta.parallel.collectives import gather_to_rank_0
from gmeta.parallel.mesh import Mesh

NUM_SAMPLED = 1000
"""Others that the sampled protocol ranks a target among."""
_BLOCK_SCORES = 1 << 24
"""Scores held at a time (64 MiB of float32)."""
_POSITIVE = (1 << 63) - 1


@dataclass(frozen=True)
class TargetRanks:
    """One entry a query row, ordered by `row`."""

    row: Ints  # [N], row of the split
    task: Ints  # [N], position of its task in the split
    target: Ints  # [N], item id
    rank: Ints  # [N], from 1, among all candidates; ties count against the target
    candidates: Ints  # [N], how many were ranked, the target included
    sampled_rank: Ints  # [N], among the target and `NUM_SAMPLED` others of its domain, or all others; 0: not ranked so
    history: Ints  # [N], events in the history
    domains: Ints  # [N], distinct domains in the history
    finite: Ints  # [N], 1; 0 where some score is no number, or infinite

    def columns(self) -> dict[str, Ints]:
        """Return the columns by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Targets:
    """The query rows of a split, each a target with the history before it: its task's support rows."""

    row: Ints  # [N], row of the split
    task: Ints  # [N], position of its task in the split
    items: NDArray[Any]  # [rows of the split], item id of every row
    first: Ints  # [N], row where the history begins
    length: Ints  # [N], events in it

    @staticmethod
    def of_split(split: PackSplit, item: str) -> Targets:
        """Return the targets of a split, ordered by row; `item` names the feature of the items."""
        columns = split.columns((item,))
        row = np.flatnonzero(columns.is_query)
        task, sizes = columns.task[row], split.num_task_rows
        return Targets(row, task, columns.ids[item], (np.cumsum(sizes) - sizes)[task], split.num_support[task])

    def __len__(self) -> int:
        return len(self.row)

    @property
    def target(self) -> Ints:
        """Return the item id of each target, [N]."""
        return self.items[self.row].astype(np.int64)

    def where(self, index: slice | NDArray[Any]) -> Targets:
        """Return some of the targets."""
        return Targets(self.row[index], self.task[index], self.items, self.first[index], self.length[index])

    def at_rows(self, row: Ints) -> Targets:
        """Return the targets at these rows of the split, [n], which are query rows."""
        return self.where(np.searchsorted(self.row, row))

    def histories(self) -> tuple[Ints, Ints]:
        """Return all events of all histories, in stored order: position of the target, and item id, each [events]."""
        item = self.items[ranges(self.first, self.length)].astype(np.int64)
        return np.repeat(np.arange(len(self)), self.length), item

    def item_before(self, back: int) -> tuple[Ints, Ints]:
        """Return the event that lies `back` before the end of each history that is so long (1 is the last): position of
        the target, and item id.
        """
        position = np.flatnonzero(self.length >= back)
        return position, self.items[(self.first + self.length - back)[position]].astype(np.int64)


@dataclass(frozen=True)
class Candidates:
    """Who is ranked against a target: the known items of its domain or of all, never id 0."""

    domain: Ints  # [num_ids], number of each item's domain; all are equal where items have no domains
    all_domains: bool = False
    exclude_history: bool = True
    seed: int = 0  # of the sampled protocol
    sampled: bool = True  # rank among a sample besides; a validation has no use for it

    @property
    def num_ids(self) -> int:
        """Return the number of item ids, 0 included."""
        return len(self.domain)


def rank_targets(scores: Tensor, target: Tensor, allowed: Tensor) -> Tensor:
    """Return the rank of each target among the allowed items, int64 [n]: 1 + those that score at least as high.

    A score that is NaN is worse than any other, and a target with such a score ranks last; so does the unknown item 0.

    Args:
        scores: [n, C], of every item.
        target: int64 [n], ids of the targets. They take part whether or not they are allowed.
        allowed: bool [n, C], the items that are ranked.
    """
    return 1 + _count(allowed.scatter(1, target[:, None], False) & _ahead(scores, target))


def ranks_of(score: Callable[[slice], Tensor], targets: Targets, candidates: Candidates) -> TargetRanks:
    """Rank every target; `score(part)` returns the scores [n, num_ids] of some targets for every item, on any device.

    Some targets are scored at a time, so that memory does not grow with their number.
    """
    shelves = _Shelves.build(candidates.domain)
    at_a_time = max(1, _BLOCK_SCORES // max(candidates.num_ids, 2 * NUM_SAMPLED))
    parts = [np.zeros((5, 0), np.int64)]
    for begin in range(0, len(targets), at_a_time):
        part = slice(begin, min(begin + at_a_time, len(targets)))
        parts.append(_ranks_of_part(score(part), targets.where(part), candidates, shelves))
    rank, ranked, sampled_rank, domains, finite = np.concatenate(parts, axis=1)
    which = targets.row, targets.task, targets.target
    return TargetRanks(*which, rank, ranked, sampled_rank, targets.length, domains, finite)


def gather_ranks(ranks: TargetRanks, mesh: Mesh) -> TargetRanks | None:
    """Return the ranks of all processes ordered by row, each row once; None on other ranks than 0. Collective."""
    columns = {name: gather_to_rank_0(column, mesh) for name, column in ranks.columns().items()}
    if mesh.rank != 0:
        return None
    _, first = np.unique(columns["row"], return_index=True)
    return TargetRanks(**{name: column[first] for name, column in columns.items()})


@dataclass(frozen=True)
class _Shelves:
    """The items of each domain, one domain behind the other: those of d are item[start[d]:][:size[d]]."""

    domain: Tensor  # [num_ids]
    item: Tensor  # [num_ids - 1]
    start: Tensor  # [domains]
    size: Tensor  # [domains]

    @staticmethod
    def build(domain: Ints) -> _Shelves:
        of_item = torch.from_numpy(domain)
        size = torch.bincount(of_item[1:], minlength=int(domain.max()) + 1)
        return _Shelves(of_item, 1 + torch.argsort(of_item[1:], stable=True), size.cumsum(0) - size, size)

    def to(self, device: torch.device) -> _Shelves:
        return _Shelves(*(getattr(self, field.name).to(device) for field in fields(self)))


def _ranks_of_part(scores: Tensor, targets: Targets, candidates: Candidates, shelves: _Shelves) -> Ints:
    """Return rank, number of candidates, sampled rank, domains of the history, and `finite` of some targets, [5, n]."""
    device = scores.device
    shelves = shelves.to(device)
    target = torch.from_numpy(targets.target).to(device)
    position, item = targets.histories()
    seen = torch.from_numpy(position).to(device), torch.from_numpy(item).to(device)
    near = shelves.domain == shelves.domain[target][:, None]
    near[target == OOV] = True  # nobody knows its domain: it is the last of all items
    pool = torch.ones_like(near) if candidates.all_domains else near.clone()
    for mask in (near, pool):
        mask[:, OOV] = False
        mask.scatter_(1, target[:, None], False)
    near[seen] = False
    if candidates.exclude_history:
        pool[seen] = False
    ahead = _ahead(scores, target)
    start = splitmix64_tensor(splitmix64_tensor(torch.tensor([candidates.seed])) + torch.from_numpy(targets.row))
    found = [1 + _count(pool & ahead), 1 + _count(pool), torch.zeros_like(target)]
    if candidates.sampled:
        found[2] = _sampled_ranks(ahead, target, near, shelves, start.to(device))
    pairs = np.unique(np.stack([position, candidates.domain[item]]), axis=1)
    domains = np.bincount(pairs[0], minlength=len(targets))
    finite = (scores < torch.inf).all(1).long()  # an item that a version does not know scores -inf
    return np.stack([*(column.cpu().numpy() for column in found), domains, finite.cpu().numpy()])


def _sampled_ranks(ahead: Tensor, target: Tensor, others: Tensor, shelves: _Shelves, start: Tensor) -> Tensor:
    """Return the rank of each target among `NUM_SAMPLED` of its `others` (bool [n, C]), or all where there are fewer.

    Items of the target's domain are drawn one after the other, and kept where they are among the others and new.
    `start` [n] is where the stream of random words of each row begins.
    """
    domain = shelves.domain[target]
    first, size = shelves.start[domain][:, None], shelves.size[domain][:, None].clamp(min=1)
    few = (_count(others) <= NUM_SAMPLED) | (target == OOV)
    draws = NUM_SAMPLED + NUM_SAMPLED // 4
    while True:
        word = splitmix64_tensor(start[:, None] + torch.arange(draws, device=start.device))
        item = shelves.item[first + (word & _POSITIVE) % size]
        kept = others.gather(1, item) & ~_repeated(item)
        if bool((few | (_count(kept) >= NUM_SAMPLED)).all()):
            break
        draws *= 2
    kept &= kept.cumsum(1) <= NUM_SAMPLED
    return 1 + torch.where(few, _count(others & ahead), _count(kept & ahead.gather(1, item)))


def _repeated(item: Tensor) -> Tensor:
    """Mark what was there before in its row, for int64 [n, m]."""
    value, order = item.sort(dim=1, stable=True)
    again = torch.zeros_like(item, dtype=torch.bool)
    again[:, 1:] = value[:, 1:] == value[:, :-1]
    return torch.zeros_like(again).scatter(1, order, again)


def _ahead(scores: Tensor, target: Tensor) -> Tensor:
    """Mark the scores [n, C] that are not below the target's."""
    own = scores.gather(1, target[:, None])
    ahead = scores >= own
    ahead[own.isnan()[:, 0] | (target == OOV)] = True
    return ahead


def _count(mask: Tensor) -> Tensor:
    """Count what is true in each row, int64 [n]."""
    if mask.device.type == "cpu":  # torch takes twenty times as long
        return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1).astype(np.int64))
    return mask.sum(1)
