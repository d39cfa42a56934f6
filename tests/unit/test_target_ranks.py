"""Targets are ranked as a plain loop over candidates ranks them, and never better than they deserve."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from packs import make_pack

from gmeta.data.pack import open_pack
from gmeta.evaluation import target_ranks
from gmeta.evaluation.target_ranks import Candidates, TargetRanks, Targets, gather_ranks, rank_targets, ranks_of
from gmeta.parallel.mesh import Mesh


def make_targets(seed: int, num_ids: int, num: int = 40, longest: int = 12) -> Targets:
    """Histories with repeats, some empty, some of which hold the target, each followed by its target."""
    rng = np.random.default_rng(seed)
    length = rng.integers(0, longest, num)
    start = np.cumsum(length + 1) - length - 1
    items = rng.integers(1, num_ids, int((length + 1).sum())).astype(np.int32)
    return Targets(start + length, np.arange(num), items, start, length)


def plain_ranks(scores: np.ndarray, targets: Targets, candidates: Candidates) -> list[tuple[int, int, set[int], int]]:
    """Rank, number of candidates, others of the domain, and domains of the history, one target after the other."""
    found = []
    for i, target in enumerate(targets.target.tolist()):
        history = set(targets.items[targets.first[i] : targets.first[i] + targets.length[i]].tolist())
        own = scores[i, target]
        near = {e for e in range(1, candidates.num_ids) if candidates.domain[e] == candidates.domain[target]}
        pool = set(range(1, candidates.num_ids)) if candidates.all_domains else near
        pool = (pool - history if candidates.exclude_history else pool) - {target}
        ahead = [e for e in pool if math.isnan(own) or scores[i, e] >= own]
        domains = {int(candidates.domain[e]) for e in history}
        found.append((1 + len(ahead), 1 + len(pool), near - history - {target}, len(domains)))
    return found


@pytest.mark.parametrize("all_domains", [False, True])
@pytest.mark.parametrize("exclude_history", [False, True])
def test_ranks_are_those_of_a_plain_loop(
    monkeypatch: pytest.MonkeyPatch, all_domains: bool, exclude_history: bool
) -> None:
    num_ids = 31
    targets, rng = make_targets(0, num_ids), np.random.default_rng(1)
    domain = np.concatenate([[0], rng.integers(1, 4, num_ids - 1)])
    scores = rng.integers(0, 6, (len(targets), num_ids)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.1] = np.nan
    candidates = Candidates(domain, all_domains=all_domains, exclude_history=exclude_history)
    expected = plain_ranks(scores, targets, candidates)
    whole = ranks_of(lambda part: torch.from_numpy(scores[part]), targets, candidates)
    assert list(zip(whole.rank, whole.candidates, whole.domains, strict=True)) == [(a, b, d) for a, b, _, d in expected]
    assert whole.target.tolist() == targets.target.tolist()
    assert whole.history.tolist() == targets.length.tolist()
    in_domain = ranks_of(lambda part: torch.from_numpy(scores[part]), targets, Candidates(domain))
    assert whole.sampled_rank.tolist() == in_domain.rank.tolist(), "fewer than 1,000 others: all of them"
    monkeypatch.setattr(target_ranks, "_BLOCK_SCORES", 7 * 2 * target_ranks.NUM_SAMPLED)
    parts: list[int] = []

    def score(part: slice) -> torch.Tensor:
        parts.append(part.stop - part.start)
        return torch.from_numpy(scores[part])

    in_parts = ranks_of(score, targets, candidates)
    assert parts == [7, 7, 7, 7, 7, 5]
    for name, column in whole.columns().items():
        np.testing.assert_array_equal(in_parts.columns()[name], column, err_msg=name)


def test_constant_scores_and_ties_look_bad() -> None:
    scores = torch.tensor([[9.0, 1, 1, 1, 1], [9, 3, 2, 2, 1], [9, 3, 2, 1, 0], [9, 1, 2, 3, 4]])
    target, everyone = torch.tensor([1, 2, 2, 4]), torch.ones(4, 5, dtype=torch.bool)
    everyone[:, 0] = False
    assert rank_targets(scores, target, everyone).tolist() == [4, 3, 2, 1]
    nobody = torch.zeros(4, 5, dtype=torch.bool)
    assert rank_targets(scores, target, nobody).tolist() == [1, 1, 1, 1]
    assert everyone[:, 1:].all(), "the mask is left as it was"


def test_what_is_no_number_is_last() -> None:
    nan = math.nan
    scores = torch.tensor([[0, nan, 1, 2], [0, 1, nan, nan], [0, nan, nan, nan], [5, 1, 2, 3]])
    everyone = torch.tensor([False, True, True, True]).expand(4, 4)
    assert rank_targets(scores, torch.tensor([1, 1, 1, 0]), everyone).tolist() == [3, 1, 3, 4]


def test_an_unknown_target_is_behind_all_items() -> None:
    targets = Targets(np.array([1]), np.array([0]), np.array([3, 0]), np.array([0]), np.array([1]))
    found = ranks_of(lambda part: torch.zeros(1, 5), targets, Candidates(np.array([0, 1, 1, 2, 2])))
    assert (found.rank[0], found.candidates[0], found.sampled_rank[0]) == (4, 4, 4)


def test_a_sample_is_of_the_domain_without_history_and_the_same_for_any_division() -> None:
    """With scores that fall with the id, a sampled rank says how many of the sample lie before the target."""
    num_ids = 5001
    targets = make_targets(2, num_ids, num=60, longest=40)
    domain = np.concatenate([[0], 1 + np.arange(num_ids - 1) % 2])
    scores = -torch.arange(num_ids, dtype=torch.float64).expand(len(targets), -1)
    candidates = Candidates(domain, seed=3)
    whole = ranks_of(lambda part: scores[part], targets, candidates)
    position = np.random.default_rng(0).permutation(len(targets))
    shares = [targets.where(np.sort(position[:25])), targets.where(np.sort(position[20:]))]
    parts = [ranks_of(lambda part: scores[part], share, candidates) for share in shares]
    joined = TargetRanks(**{n: np.concatenate([p.columns()[n] for p in parts]) for n in whole.columns()})
    gathered = gather_ranks(joined, Mesh())
    assert gathered is not None
    for name, column in whole.columns().items():
        np.testing.assert_array_equal(gathered.columns()[name], column, err_msg=name)
    share = (whole.rank - 1) / (whole.candidates - 1)
    error = (whole.sampled_rank - 1) / 1000 - share
    assert np.abs(error).max() < 5 * 0.5 / math.sqrt(1000)
    assert np.abs(error).max() > 0.002, "it is a sample"
    other = ranks_of(lambda part: scores[part], targets, Candidates(domain, seed=4))
    assert (other.sampled_rank != whole.sampled_rank).any()
    assert (other.rank == whole.rank).all()


@pytest.mark.parametrize("others", [999, 1000, 1002])
def test_every_other_item_is_drawn_once_at_most(others: int) -> None:
    """With 1,000 others or fewer all are there; with one more, one of them is not, and each as often as any."""
    num_ids, num = others + 4, 80
    items = np.concatenate([[1, 2, 3]] * num)  # two events and a target, each its own task
    start = 3 * np.arange(num)
    targets = Targets(start + 2, np.arange(num), items, start, np.full(num, 2))
    domain = np.concatenate([[0], np.ones(num_ids - 1, np.int64)])
    worst = torch.zeros(1, num_ids).index_fill(1, torch.tensor([3]), -1.0).expand(num, -1)
    found = ranks_of(lambda part: worst[part], targets, Candidates(domain))
    assert set(found.sampled_rank) == {1 + min(others, 1000)}
    last_ahead = torch.zeros(1, num_ids).index_fill(1, torch.tensor([num_ids - 1]), 1.0)
    last_ahead[0, 3] = 0.5
    drawn = ranks_of(lambda part: last_ahead.expand(num, -1)[part], targets, Candidates(domain)).sampled_rank - 1
    missed = num * max(0, others - 1000) / others
    assert abs((num - drawn.sum()) - missed) <= 5 * math.sqrt(missed)
    best = torch.zeros(1, num_ids).index_fill(1, torch.tensor([1, 2]), 1.0).index_fill(1, torch.tensor([3]), 0.5)
    found = ranks_of(lambda part: best.expand(num, -1)[part], targets, Candidates(domain, exclude_history=False))
    assert set(found.sampled_rank) == {1}, "the history is in no sample"
    assert set(found.rank) == {3}


def test_targets_of_a_split_have_its_support_as_history(tmp_path: Path) -> None:
    split = open_pack(make_pack(tmp_path / "pack", test=9)).split("test")
    targets, columns = Targets.of_split(split, "item"), split.columns(("item",))
    assert targets.row.tolist() == np.flatnonzero(columns.is_query).tolist()
    position, item = targets.histories()
    for i, (row, task) in enumerate(zip(targets.row, targets.task, strict=True)):
        support = columns.ids["item"][(columns.task == task) & ~columns.is_query]
        assert item[position == i].tolist() == support.tolist()
        assert targets.target[i] == columns.ids["item"][row]
    some = targets.at_rows(targets.row[[5, 2, 2]])
    assert some.task.tolist() == targets.task[[5, 2, 2]].tolist()


def test_no_targets_have_no_ranks() -> None:
    targets = make_targets(0, 5).where(slice(0))
    found = ranks_of(lambda part: torch.zeros(0, 5), targets, Candidates(np.array([0, 1, 1, 1, 1])))
    assert {len(column) for column in found.columns().values()} == {0}
    assert all(column.dtype == np.int64 for column in found.columns().values())
