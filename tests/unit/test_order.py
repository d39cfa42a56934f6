"""The order of tasks: every task once an epoch, the same for any number of workers, and never another one."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64

from gmeta.data import order
from gmeta.data.order import (
    BLOCK_TASKS,
    Tasks,
    bucket_by_size,
    keyed_hash,
    num_batches,
    permutation,
    tasks_per_rank,
    window_of_batches,
)


def random_sizes(num_tasks: int, seed: int = 0) -> tuple[Tasks, Tasks]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 40, num_tasks), rng.integers(1, 40, num_tasks)


def epoch_batches(
    num_tasks: int,
    size: int,
    window_batches: int,
    seed: int = 0,
    epoch: int = 0,
    num_rows: Tasks | None = None,
    **switches: Any,
) -> list[Tasks]:
    support, query = random_sizes(num_tasks) if num_rows is None else (num_rows // 2, num_rows - num_rows // 2)
    batches: list[Tasks] = []
    for window in range(num_batches(num_batches(num_tasks, size), window_batches)):
        batches += window_of_batches(
            num_tasks,
            lambda tasks: (support[tasks], query[tasks]),
            tasks_per_batch=size,
            window_batches=window_batches,
            seed=seed,
            epoch=epoch,
            window=window,
            **switches,
        )
    return batches


@settings(max_examples=60, deadline=None)
@given(
    num_tasks=st.integers(1, 700),
    size=st.integers(1, 50),
    window_batches=st.integers(1, 9),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 1000),
    switches=st.fixed_dictionaries(
        {
            "sequential": st.booleans(),
            "size_buckets": st.booleans(),
            "scenarios": st.sampled_from([None, lambda tasks: tasks % 3]),
        }
    ),
)
def test_every_task_once_an_epoch_and_short_only_at_its_end(
    num_tasks, size, window_batches, seed, epoch, switches
) -> None:
    batches = epoch_batches(num_tasks, size, window_batches, seed, epoch, **switches)
    assert sorted(np.concatenate(batches).tolist()) == list(range(num_tasks))
    assert len(batches) == num_batches(num_tasks, size)
    assert {len(batch) for batch in batches[:-1]} <= {size}
    assert len(batches[-1]) == (num_tasks - 1) % size + 1


SIDES = st.tuples(st.integers(0, 30), st.integers(0, 30))


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(SIDES, max_size=8), max_cells=st.integers(1, 400), part=st.integers(0, 60))
def test_the_cheapest_cut_is_that_of_a_search(sizes, max_cells, part) -> None:
    support, query = np.array(sizes, np.int64).reshape(-1, 2).T
    numbers, row = range(1, len(sizes)), 1 + (support + 2 * query) % 3

    def cost(ends: tuple[int, ...]) -> float:
        total = 0.0
        for a, b in itertools.pairwise((0, *ends)):
            rows = (b - a) * int(support[a:b].max(initial=0) + query[a:b].max(initial=0))
            cells = rows * int(row[a:b].max(initial=1))
            total += part + cells if b - a <= 1 or cells <= max_cells else np.inf
        return total

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "PART_CELLS", part)
        found = order.cheapest_ends(support, query, row, max_cells)
    cuts = itertools.chain.from_iterable(itertools.combinations(numbers, k) for k in range(len(sizes) + 1))
    assert found[-1] == len(sizes)
    assert cost(found) == min(cost((*cut, len(sizes))) for cut in cuts)


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(SIDES, max_size=60),
    row=st.integers(1, 40),
    long=st.integers(1, 3000),
    size=st.integers(1, 20),
    max_cells=st.integers(1, 20_000),
)
def test_a_pass_has_every_task_once_and_little_padding(sizes, row, long, size, max_cells) -> None:
    support, query = np.array(sizes, np.int64).reshape(-1, 2).T
    support[3:4] *= long
    per_row = np.ones(len(sizes), np.int64)
    per_row[::5] = row
    batches = order.batches_of_pass(support, query, per_row, size, max_cells, 2)
    assert sorted(np.concatenate([np.zeros(0, np.int64), *batches]).tolist()) == list(range(len(sizes)))
    for tasks in batches:
        cells = len(tasks) * int(support[tasks].max() + query[tasks].max()) * int(per_row[tasks].max())
        assert 1 <= len(tasks) <= size
        assert len(tasks) == 1 or cells <= max_cells
        assert cells - int(((support + query) * per_row)[tasks].sum()) <= order.PART_CELLS * len(tasks)
        assert np.ptp(tasks) < 2 * size, "of one window"


def test_one_long_task_pads_no_others() -> None:
    """The case of one user with 16,000 rows: its batch is below the bound of cells, and 63 others were padded to it."""
    support = np.full(64, 20)
    support[17] = 16_000
    batches = order.batches_of_pass(support, np.full(64, 4), np.ones(64, np.int64), 64, 1 << 20, 64)
    assert sorted(map(len, batches)) == [1, 63]


def test_order_depends_on_seed_and_epoch() -> None:
    first, *others = (
        [batch.tolist() for batch in epoch_batches(300, 8, 4, seed, epoch)] for seed, epoch in ((0, 0), (0, 1), (1, 0))
    )
    assert first == [batch.tolist() for batch in epoch_batches(300, 8, 4)]
    assert all(first != other for other in others)


def test_order_is_the_one_that_checkpoints_refer_to() -> None:
    """A change here makes every saved loader position mean another batch: raise the checkpoint format with it."""
    assert permutation(10, 3, 1).tolist() == GOLDEN_PERMUTATION
    assert [
        batch.tolist() for batch in epoch_batches(11, 3, 2, seed=7, epoch=2, num_rows=2 + np.arange(11) % 4)
    ] == GOLDEN_BATCHES
    key = keyed_hash(np.arange(1000), 1) % np.uint64(40)
    varied, equal = key.astype(np.int64), np.full(1000, 5)
    orders = [epoch_batches(1000, 16, 5, seed=3, epoch=2, num_rows=rows) for rows in (varied, equal)]
    assert [xxh3_64(np.concatenate(batches).tobytes()).hexdigest() for batches in orders] == GOLDEN_HASHES


GOLDEN_PERMUTATION = [2, 0, 9, 6, 3, 7, 4, 5, 1, 8]
GOLDEN_HASHES = ["765ee9ece5752dcc", "73351c46245f2cbc"]  # sizes varied, equal
GOLDEN_BATCHES = [[5, 1, 0], [4, 2, 6], [8, 9, 7], [10, 3]]


def test_a_window_reads_few_blocks() -> None:
    batches = epoch_batches(10_000, 32, 8)
    window = np.concatenate(batches[8:16])
    # The short batch is taken out, so a block may lie across two of the pack's.
    assert len(np.unique(window // BLOCK_TASKS)) <= 2 * (8 * 32 // BLOCK_TASKS + 1)
    # The blocks are not neighbours, so the window still mixes the pack.
    assert np.ptp(window) > 3000


def test_not_sequential_a_window_is_a_draw_of_the_whole_pack() -> None:
    window = np.concatenate(epoch_batches(10_000, 32, 8, sequential=False)[8:16])
    # 256 tasks thrown at 157 blocks miss 157 * exp(-256 / 157) of them, 31, with a standard deviation of 4.
    assert 105 < len(np.unique(window // BLOCK_TASKS)) < 147
    again = np.concatenate(epoch_batches(10_000, 32, 8, epoch=1, sequential=False)[8:16])
    assert len(np.intersect1d(window, again)) < 30


def test_without_buckets_a_window_holds_the_same_tasks_but_pads_more() -> None:
    support, query = random_sizes(1024)
    bucketed, plain = (epoch_batches(1024, 16, 16, size_buckets=on) for on in (True, False))
    for first in range(0, 64, 16):
        windows = (np.sort(np.concatenate(batches[first : first + 16])) for batches in (bucketed, plain))
        assert np.array_equal(*windows)
    assert padding(support, query, bucketed) < 0.25
    assert padding(support, query, plain) > 0.4


def test_permutations_are_fair() -> None:
    counts = np.zeros((6, 6))
    for epoch in range(3000):
        counts[np.arange(6), permutation(6, 11, epoch)] += 1
    assert np.abs(counts / 3000 - 1 / 6).max() < 0.035  # standard deviation 0.0068
    assert len(set(keyed_hash(np.arange(10_000), 5).tolist())) == 10_000


def test_tasks_of_a_short_batch_are_a_fair_draw() -> None:
    """They weigh more, so they must not be the largest ones."""
    support, query = random_sizes(70)
    last = [epoch_batches(70, 16, 8, epoch=epoch)[-1] for epoch in range(200)]
    means = np.array([(support + query)[tasks].mean() for tasks in last])
    assert abs(means.mean() - (support + query).mean()) < 2  # of about 40; largest six: about 67


@pytest.mark.parametrize("num_tasks", [4106, 70, 5])
def test_the_short_batch_is_drawn_from_all_tasks(num_tasks: int) -> None:
    """Also where the epoch's last window has nothing else: by blocks, only the ends of blocks would be in it."""
    epochs, rest = 400, num_tasks % 64
    drawn = np.zeros(num_tasks)
    for epoch in range(epochs):
        last = window_of_batches(
            num_tasks, same_sizes, tasks_per_batch=64, window_batches=64, seed=0, epoch=epoch, window=num_tasks // 4096
        )
        assert len(last[-1]) == len(set(last[-1].tolist())) == rest
        drawn[last[-1]] += 1
    ends = np.arange(num_tasks) % 64 >= 54
    share = rest / num_tasks
    for tasks in (ends, ~ends) if num_tasks > 64 else (~ends,):
        mean, deviation = drawn[tasks].mean() / epochs, (share * (1 - share) / epochs / tasks.sum()) ** 0.5
        assert abs(mean - share) <= 4 * deviation


def same_sizes(tasks: Tasks) -> tuple[Tasks, Tasks]:
    return np.full(len(tasks), 5), np.full(len(tasks), 5)


def padding(support: Tasks, query: Tasks, batches: list[Tasks]) -> float:
    cells = sum(len(b) * (support[b].max() + query[b].max()) for b in batches)
    return 1 - float(support.sum() + query.sum()) / float(cells)


@pytest.mark.parametrize("shape", ["independent", "ratio", "fixed query", "fixed support"])
def test_buckets_pad_little(shape: str) -> None:
    rng = np.random.default_rng(0)
    rows = np.clip(rng.lognormal(3.5, 0.8, 4096), 10, 100).astype(np.int64)
    support, query = {
        "independent": (rng.integers(5, 60, 4096), rng.integers(5, 60, 4096)),
        "ratio": (rows * 4 // 5, rows - rows * 4 // 5),
        "fixed query": (rows, np.full(4096, 10)),
        "fixed support": (np.full(4096, 10), rows),
    }[shape]
    batches = bucket_by_size(support, query, 64)
    assert sorted(np.concatenate(batches).tolist()) == list(range(4096))
    assert {len(b) for b in batches} == {64}
    assert padding(support, query, batches) < 0.1
    assert padding(support, query, list(np.arange(4096).reshape(-1, 64))) > 0.3


@pytest.mark.parametrize("num_tasks", [0, 1, 64, 100, 200])
@pytest.mark.parametrize("equal", [True, False])
def test_buckets_of_any_number_of_tasks(num_tasks: int, equal: bool) -> None:
    sizes = np.full(num_tasks, 7) if equal else np.random.default_rng(0).integers(1, 20, num_tasks)
    batches = bucket_by_size(sizes, sizes, 64)
    assert sorted(int(slot) for batch in batches for slot in batch) == list(range(num_tasks))
    assert [len(batch) for batch in batches] == [64] * (num_tasks // 64) + [num_tasks % 64] * (num_tasks % 64 > 0)


@settings(max_examples=100, deadline=None)
@given(cost=st.lists(st.integers(1, 100), max_size=40), world_size=st.integers(1, 8), data=st.data())
def test_tasks_are_dealt_once_and_about_evenly(cost, world_size, data) -> None:
    fractions = data.draw(
        st.none() | st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=world_size, max_size=world_size)
    )
    if fractions is not None and sum(fractions) == 0:
        with pytest.raises(ValueError, match=f"must be {world_size} numbers, not negative, not all 0"):
            tasks_per_rank(np.array(cost, np.int64), world_size, fractions)
        return
    costs = np.array(cost, np.int64)
    ranks = tasks_per_rank(costs, world_size, fractions)
    assert np.concatenate([np.arange(len(cost))[s] for s in ranks]).tolist() == list(range(len(cost)))
    weights = np.array(fractions or [1.0] * world_size)
    for part, weight in zip(ranks, weights, strict=True):
        load, ideal = costs[part].sum(), costs.sum() * weight / weights.sum()
        assert abs(load - ideal) <= max(cost, default=0) + 1e-9
        assert weight > 0 or load == 0


def test_equal_tasks_are_dealt_equally() -> None:
    assert tasks_per_rank(np.full(8, 20), 4) == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    assert tasks_per_rank(np.full(2, 20), 4)[1:3] == [slice(0, 1), slice(1, 1)]
    with pytest.raises(ValueError, match="must be 2 numbers"):
        tasks_per_rank(np.full(8, 20), 2, [1.0])
