"""Assignments of slots, against brute force."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmeta.elastic.balance import DeviceClass, Share, Worker, accumulated, balanced, proportional

speeds = st.floats(0.1, 10.0)
workers = st.lists(
    st.builds(
        lambda speed, fixed, least, room: Worker(speed, fixed, least, None if room is None else least + room),
        speeds,
        st.sampled_from([0.0, 0.3, 2.0]),
        st.integers(0, 2),
        st.none() | st.integers(0, 6),
    ),
    min_size=1,
    max_size=4,
)


def end(slots, found) -> float:
    return max((worker.seconds(n) for worker, n in zip(found, slots, strict=True)), default=0.0)


def every_assignment(total: int, found: list[Worker]) -> list[tuple[int, ...]]:
    ranges = [range(w.least, (total if w.most is None else min(w.most, total)) + 1) for w in found]
    return [slots for slots in product(*ranges) if sum(slots) == total]


@settings(max_examples=300, deadline=None)
@given(total=st.integers(0, 12), found=workers)
def test_no_assignment_ends_earlier(total: int, found: list[Worker]) -> None:
    every = every_assignment(total, found)
    if not every:
        with pytest.raises(ValueError, match=f"{total} slots do not fit workers that take"):
            balanced(total, found)
        return
    slots = balanced(total, found)
    assert tuple(slots) in every
    assert end(slots, found) == min(end(other, found) for other in every)


def test_equal_workers_share_equally_and_a_slow_one_gets_less() -> None:
    assert balanced(10, [Worker(1.0)] * 4) == [3, 3, 2, 2]
    assert balanced(10, [Worker(1.0), Worker(1.0), Worker(1.0), Worker(0.25)]) == [3, 3, 3, 1]
    assert balanced(6, [Worker(1.0), Worker(1.0, fixed_s=100.0)]) == [6, 0]


@settings(max_examples=200, deadline=None)
@given(total=st.integers(0, 1000), weights=st.lists(speeds, min_size=1, max_size=8))
def test_proportions_are_off_by_less_than_one(total: int, weights: list[float]) -> None:
    slots = proportional(total, weights)
    assert sum(slots) == total
    assert all(abs(n - total * w / sum(weights)) < 1 for n, w in zip(slots, weights, strict=True))


@settings(max_examples=100, deadline=None)
@given(
    total=st.integers(1, 24),
    fast=st.builds(Worker, speeds, st.sampled_from([0.0, 0.5]), st.just(0), st.integers(1, 6)),
    slow=st.builds(Worker, speeds, st.sampled_from([0.0, 0.5]), st.just(0), st.integers(1, 6)),
    counts=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_no_accumulation_ends_earlier(total: int, fast: Worker, slow: Worker, counts: tuple[int, int]) -> None:
    classes = [DeviceClass(counts[0], fast), DeviceClass(counts[1], slow)]
    every = [
        ((c, m), (d, n))
        for c, d in product(range(1, 4), repeat=2)
        for m, n in product(range(fast.most + 1), range(slow.most + 1))
        if counts[0] * c * m + counts[1] * d * n == total
    ]
    if not every:
        with pytest.raises(ValueError, match=f"{total} slots cannot be cut"):
            accumulated(total, classes, max_accumulation=3)
        return
    found = accumulated(total, classes, max_accumulation=3)
    assert sum(k.count * s.accumulation * s.micro_batch for k, s in zip(classes, found, strict=True)) == total
    ours = max(s.accumulation * k.worker.seconds(s.micro_batch) for k, s in zip(classes, found, strict=True))
    assert ours == min(max(c * fast.seconds(m), d * slow.seconds(n)) for (c, m), (d, n) in every)


def test_memory_makes_a_slow_class_accumulate() -> None:
    fast, slow = Worker(2.0, most=8), Worker(1.0, most=2)
    assert accumulated(24, [DeviceClass(2, fast), DeviceClass(2, slow)]) == [Share(8, 1), Share(2, 2)]


@pytest.mark.parametrize("bad", [{"speed": 0.0}, {"speed": 1.0, "fixed_s": -1.0}, {"speed": 1.0, "most": -1}])
def test_workers_that_cannot_be(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        Worker(**bad)
    with pytest.raises(ValueError, match="not all 0"):
        proportional(3, [0.0, 0.0])
