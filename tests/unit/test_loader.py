"""The loader: restored at every step, the same batches for any number of workers, no thread left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import chain, islice, product
from pathlib import Path

import numpy as np
import pytest
import torch
from random_packs import random_tasks, schema, write_pack

from gmeta.core.batch import TaskBatch, map_tensors
from gmeta.data.loader import TaskLoader, long_task_warning
from gmeta.data.order import window_of_batches
from gmeta.data.pack import open_pack
from gmeta.data.shards import PackSplit

NUM_TASKS = 43


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> PackSplit:
    tasks = random_tasks(np.random.default_rng(5), schema(), NUM_TASKS, first_id=100, max_rows=12)
    path = write_pack(
        tmp_path_factory.mktemp("packs") / "pack", schema(), [("train", tasks[:20]), ("train", tasks[20:])]
    )
    return open_pack(path).split("train")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("gmeta-loader")] == []


def loader(split: PackSplit, **changes: object) -> TaskLoader[TaskBatch]:
    settings: dict[str, object] = {"tasks_per_batch": 6, "seed": 9, "window_batches": 3, "prefetch": 0}
    return TaskLoader(split, **{**settings, **changes})  # type: ignore[arg-type]


def same(a: TaskBatch, b: TaskBatch) -> bool:
    tensors: list[list[torch.Tensor]] = [[], []]
    for batch, into in zip((a, b), tensors, strict=True):
        map_tensors(batch, lambda t, into=into: (into.append(t), t)[1])  # type: ignore[misc]
    equal = all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(*tensors, strict=True))
    return equal and (a.epoch, a.index, a.num_tasks_global) == (b.epoch, b.index, b.num_tasks_global)


@pytest.mark.parametrize("switches", [{}, {"sequential": False}, {"size_buckets": False}])
def test_batches_hold_the_tasks_that_the_order_says(split: PackSplit, switches: dict[str, bool]) -> None:
    batches = loader(split, **switches)
    for epoch, window in product(range(2), range(3)):
        of_window = window_of_batches(
            split.num_tasks,
            split.sizes,
            tasks_per_batch=6,
            window_batches=3,
            seed=9,
            epoch=epoch,
            window=window,
            **switches,
        )
        for k, tasks in enumerate(of_window):
            expected = TaskBatch(*split.examples(tasks), len(tasks), epoch, 3 * window + k)
            assert same(next(batches), expected)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("resample", [False, True])
def test_restored_at_every_step_the_tail_is_the_same(split: PackSplit, prefetch: int, resample: bool) -> None:
    whole = loader(split, resample=resample)
    states, batches = [], []
    for _ in range(19):  # an epoch has 8 batches: two and a bit
        states.append(whole.state_dict())
        batches.append(next(whole))
    assert (states[8], states[18]) == ({"epoch": 1, "index": 0}, {"epoch": 2, "index": 2})
    for step, state in enumerate(states):
        with loader(split, resample=resample, prefetch=prefetch) as restored:
            restored.load_state_dict(state)
            assert restored.state_dict() == state
            assert all(same(batch, next(restored)) for batch in batches[step:])


def test_restoring_amid_iteration_drops_what_was_prefetched(split: PackSplit) -> None:
    expected = list(islice(loader(split), 10))
    with loader(split, prefetch=3) as moved:
        assert all(same(batch, next(moved)) for batch in expected[:5])
        assert moved.state_dict() == {"epoch": 0, "index": 5}
        moved.load_state_dict({"epoch": 0, "index": 1})
        assert all(same(batch, next(moved)) for batch in expected[1:])


def test_a_state_of_another_epoch_length_is_refused(split: PackSplit) -> None:
    with pytest.raises(ValueError, match="epoch 0, index 8: an epoch has 8 batches; it was saved with another pack"):
        loader(split).load_state_dict({"epoch": 0, "index": 8})
    with pytest.raises(ValueError, match="epoch -1, index 0"):
        loader(split).load_state_dict({"epoch": -1, "index": 0})


def test_epochs_differ_and_hold_every_task(split: PackSplit) -> None:
    epochs = [[next(batches).task_id.tolist() for _ in range(8)] for batches in [loader(split)] for _ in range(2)]
    for epoch in epochs:
        assert sorted(chain.from_iterable(epoch)) == list(range(100, 100 + NUM_TASKS))
        assert [len(batch) for batch in epoch] == [6] * 7 + [1]
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("order", [{}, {"shuffle": False}, {"sequential": False, "size_buckets": False}])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_of_one_process(split: PackSplit, order: dict[str, bool], world_size: int) -> None:
    alone = loader(split, **order)
    ranks = [loader(split, rank=r, world_size=world_size, **order) for r in range(world_size)]
    for _ in range(8):
        whole, parts = next(alone), [next(r) for r in ranks]
        assert torch.cat([part.task_id for part in parts]).tolist() == whole.task_id.tolist()
        assert {part.num_tasks_global for part in parts} == {len(whole.task_id)}
        for side in ("support", "query"):
            rows = torch.cat([getattr(part, side).row[getattr(part, side).mask] for part in parts])
            assert torch.equal(rows, getattr(whole, side).row[getattr(whole, side).mask])


def test_a_rank_may_get_no_task(split: PackSplit) -> None:
    parts = []
    for rank in range(4):
        ranked = loader(split, rank=rank, world_size=4, shuffle=False)
        parts.append(list(ranked)[-1])  # the last batch has one task
    assert sorted(part.num_tasks for part in parts) == [0, 0, 0, 1]
    empty = next(part for part in parts if part.num_tasks == 0)
    assert set(empty.support.ids) == {"f0", "f1"}
    assert empty.query.dense.shape == (0, 0, 1)


def test_fewer_tasks_than_workers_are_refused(split: PackSplit) -> None:
    with pytest.raises(ValueError, match=r"loader\.tasks_per_batch is 2, world size is 4: .*to 4 or more"):
        loader(split, tasks_per_batch=2, world_size=4)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_evaluation_is_one_pass_in_stored_order(split: PackSplit, prefetch: int) -> None:
    once = loader(split, shuffle=False, prefetch=prefetch)
    for _ in range(2):  # and again from its start
        batches = list(once)
        assert torch.cat([b.task_id for b in batches]).tolist() == list(range(100, 100 + NUM_TASKS))
        assert [(b.epoch, b.index) for b in batches] == [(0, i) for i in range(8)]


def test_transform_runs_in_the_thread_and_only_so_far_ahead(split: PackSplit) -> None:
    made: list[tuple[int, str]] = []

    def note(batch: TaskBatch) -> int:
        made.append((batch.index, threading.current_thread().name))
        return batch.index

    with TaskLoader(split, tasks_per_batch=6, seed=0, prefetch=2, transform=note) as ahead:
        assert made == []
        assert list(islice(ahead, 3)) == [0, 1, 2]
        assert ahead.state_dict() == {"epoch": 0, "index": 3}
        deadline = time.monotonic() + 10
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert [index for index, _ in made] == [0, 1, 2, 3, 4]
        assert all(name.startswith("gmeta-loader") for _, name in made)


def test_the_thread_takes_one_core_and_leaves_the_step_its_own(split: PackSplit) -> None:
    def threads_of(batch: TaskBatch) -> int:
        return torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with TaskLoader(split, tasks_per_batch=6, seed=0, prefetch=2, transform=threads_of) as ahead:
            assert next(iter(ahead)) == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_reaches_the_consumer_at_its_batch(split: PackSplit, prefetch: int) -> None:
    broken = [True]

    def fail_at_2(batch: TaskBatch) -> int:
        if batch.index == 2 and broken[0]:
            raise ValueError("item 17 is cursed")
        return batch.index

    batches = TaskLoader(split, tasks_per_batch=6, seed=0, prefetch=prefetch, transform=fail_at_2)
    assert [next(batches), next(batches)] == [0, 1]
    for _ in range(2):
        with pytest.raises(ValueError, match="item 17 is cursed"):
            next(batches)
        assert batches.state_dict() == {"epoch": 0, "index": 2}
    broken[0] = False
    assert next(batches) == 2
    batches.close()


def test_leaving_a_loop_early_leaves_no_thread_after_close(split: PackSplit) -> None:
    early = loader(split, prefetch=4)
    for batch in early:
        if batch.index == 3:
            break
    assert [t for t in threading.enumerate() if t.name.startswith("gmeta-loader")]
    early.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("gmeta-loader")]
    assert next(early).index == 4  # closing is no end
    early.close()


def test_what_was_asked_for_is_made_to_its_end(split: PackSplit) -> None:
    """Every rank's thread must make the same batches, because `transform` may be collective."""
    made: list[int] = []
    go = threading.Event()

    def transform(batch: TaskBatch) -> int:
        assert go.wait(10)
        made.append(batch.index)
        return batch.index

    with TaskLoader(split, tasks_per_batch=2, seed=0, prefetch=3, transform=transform) as loader:
        threading.Timer(0.05, go.set).start()
        assert next(loader) == 0
        go.clear()
        threading.Timer(0.05, go.set).start()
    assert made == [0, 1, 2, 3]


def test_settle_waits_for_what_was_asked_for(split: PackSplit) -> None:
    made: list[int] = []

    def transform(batch: TaskBatch) -> None:
        time.sleep(0.02)
        made.append(batch.index)

    with TaskLoader(split, tasks_per_batch=2, seed=0, prefetch=3, transform=transform) as loader:
        next(loader)
        loader.settle()
        assert made == [0, 1, 2, 3]


def test_no_batch_is_made_after_one_that_failed(split: PackSplit) -> None:
    made: list[int] = []

    def transform(batch: TaskBatch) -> None:
        made.append(batch.index)
        if batch.index == 1:
            raise ValueError("broken")

    with TaskLoader(split, tasks_per_batch=2, seed=0, prefetch=3, transform=transform) as loader:
        next(loader)
        with pytest.raises(ValueError, match="broken"):
            next(loader)
    assert made == [0, 1]


def cells_of(batch: TaskBatch) -> int:
    return batch.support.mask.numel() + batch.query.mask.numel()


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_pass_within_a_budget_of_cells_has_all_of_the_pass(split: PackSplit, world_size: int, prefetch: int) -> None:
    usual = sorted(row for batch in loader(split, shuffle=False) for row in examples_by_task(batch))
    for max_cells in (60, 10**6):
        found = []
        for rank in range(world_size):
            cut = list(
                loader(split, shuffle=False, rank=rank, world_size=world_size, prefetch=prefetch, max_cells=max_cells)
            )
            assert all(cells_of(batch) <= max_cells or batch.num_tasks == 1 for batch in cut)
            assert all(not b.parts and b.batch_split is None for b in cut)
            found += [row for batch in cut for row in examples_by_task(batch)]
        assert sorted(found) == usual


def examples_by_task(batch: TaskBatch) -> list[tuple[object, ...]]:
    """A slow reference: every task's rows, one value after the other, whatever the padding."""
    found: list[tuple[object, ...]] = []
    for part in batch.parts or (batch,):
        for t, task in enumerate(part.task_id.tolist()):
            values: list[object] = [task]
            for side in (part.support, part.query):
                keep = side.mask[t]
                columns = (*side.ids.values(), side.dense, side.label, side.row, side.item_cold)
                values += [column[t][keep].tolist() for column in columns]
                for bag in side.bags.values():
                    first = int(bag.lengths[:t].sum())
                    of_task = bag.values[first : first + int(bag.lengths[t].sum())].tolist()
                    values.append((bag.lengths[t][keep].tolist(), of_task))
            found.append(tuple(values))
    return found


@pytest.mark.parametrize("resample", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_batch_beyond_the_budget_comes_in_micro_batches(split: PackSplit, world_size: int, resample: bool) -> None:
    """The same tasks and rows, and every rank knows how many micro-batches each of them has."""
    settings = {"world_size": world_size, "resample": resample}
    usual = [loader(split, rank=r, **settings) for r in range(world_size)]
    cut = [loader(split, rank=r, max_cells=50 // world_size, **settings) for r in range(world_size)]
    several = 0
    for _ in range(16):
        wholes, found = [next(rank) for rank in usual], [next(rank) for rank in cut]
        splits = [batch.batch_split for batch in found]
        assert len({None if s is None else s.ends for s in splits}) == 1
        assert (splits[0] is not None) == any(batch.parts for batch in found)
        for rank, (whole, batch) in enumerate(zip(wholes, found, strict=True)):
            assert examples_by_task(batch) == examples_by_task(whole)
            assert torch.equal(batch.task_id, whole.task_id)
            if splits[rank] is None:
                assert same(batch, whole)
                continue
            assert splits[rank].in_parts
            assert splits[rank].tasks_per_rank == tuple(w.num_tasks for w in wholes)
            assert len(splits[rank].ends[rank]) == max(1, len(batch.parts))
            for part in batch.parts:
                several += 1
                assert cells_of(part) <= 50 // world_size // 4 or part.num_tasks == 1
                assert (part.epoch, part.index, part.num_tasks_global) == (
                    whole.epoch,
                    whole.index,
                    whole.num_tasks_global,
                )
            if batch.parts:
                rows = [side.row[side.mask] for side in (whole.support, whole.query)]
                assert torch.equal(batch.support.row[0], rows[0])
                assert torch.equal(batch.query.row[0], rows[1])
                assert sum(map(cells_of, batch.parts)) < cells_of(whole)
    assert several > 10


@pytest.mark.parametrize("resample", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_only_the_last_support_rows_are_kept(split: PackSplit, shuffle: bool, resample: bool) -> None:
    whole, kept = (
        {
            task[0]: task
            for batch in islice(loader(split, shuffle=shuffle, resample=resample, max_support_rows=n), 8)
            for task in examples_by_task(batch)
        }
        for n in (0, 3)
    )
    assert whole.keys() == kept.keys()
    stored = dict(zip(split.task_id.tolist(), split.num_support.tolist(), strict=True))
    place = 5  # of the rows among a side's columns: two features, dense, label
    longer = 0
    for task, found in kept.items():
        support, query = found[place], found[place + 7]
        before = whole[task][place] + whole[task][place + 7]  # type: ignore[operator]
        assert len(support) == min(3, stored[task])  # type: ignore[arg-type]
        assert len(query) == len(whole[task][place + 7])  # type: ignore[arg-type]
        first = min(before) + max(0, stored[task] - 3)
        assert sorted(support + query) == [row for row in sorted(before) if row >= first]  # type: ignore[operator]
        longer += stored[task] > 3
        if not resample:
            assert query == whole[task][place + 7]
    assert longer > 5


@pytest.mark.parametrize("long", [0, 30_000])
def test_a_task_far_above_the_rest_is_named(tmp_path: Path, long: int) -> None:
    tasks = random_tasks(np.random.default_rng(1), schema(), 20, first_id=7, max_rows=12)
    if long:
        tasks[13].rows = tasks[13].rows[:1] * long
        tasks[13].num_support = long - 5
    pack = open_pack(write_pack(tmp_path / "pack", schema(), [("train", tasks[:10]), ("train", tasks[10:])]))

    def warning(most: int) -> str | None:
        return long_task_warning(pack, "train", tasks_per_batch=64, max_support_rows=most)

    assert warning(100) is None
    if not long:
        assert warning(0) is None
        return
    found = str(warning(0))
    assert found.startswith("warning: task 'u20' of split train has 30,000 rows, the median task ")
    assert "loader.max_support_rows" in found
    assert "--max_task_rows" in found
