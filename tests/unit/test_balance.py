"""Assignments of slots, against brute force."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmeta.elastic.balance import DeviceClass, MicroBatching, Worker, accumulated, balanced, proportional

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
        with pytest.raises(ValueError, match=f"{total} tasks do not fit workers that take"):
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


def one_by_one(total: int, found: list[Worker]) -> list[int]:
    """Every slot to whoever would end first with one more: what `balanced` says it does."""
    slots = [worker.least for worker in found]
    while sum(slots) < total:
        open_ = [i for i, w in enumerate(found) if slots[i] != w.most]
        slots[min(open_, key=lambda i: (found[i].seconds(slots[i] + 1), slots[i], i))] += 1
    return slots


@settings(max_examples=200, deadline=None)
@given(
    total=st.integers(0, 300),
    found=st.lists(
        st.builds(
            lambda speed, fixed, least, room: Worker(speed, fixed, least, None if room is None else least + room),
            st.sampled_from([1e-6, 0.5, 1.0, 3.0, 1e9]) | speeds,
            st.sampled_from([0.0, 0.3, 2.0, 1e4]),
            st.integers(0, 5),
            st.none() | st.integers(0, 60),
        ),
        min_size=1,
        max_size=12,
    ),
)
def test_slots_given_at_once_are_those_given_one_by_one(total: int, found: list[Worker]) -> None:
    try:
        slots = balanced(total, found)
    except ValueError:
        return
    assert slots == one_by_one(total, found)


device_classes = st.lists(
    st.builds(
        DeviceClass,
        st.integers(1, 2),
        st.builds(Worker, speeds, st.sampled_from([0.0, 0.5]), st.integers(0, 1), st.integers(1, 5)),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=150, deadline=None)
@given(total=st.integers(1, 24), classes=device_classes, most=st.integers(1, 3))
def test_no_accumulation_ends_earlier(total: int, classes: list[DeviceClass], most: int) -> None:
    each = [list(product(range(1, most + 1), range(k.worker.least, k.worker.most + 1))) for k in classes]
    every = [
        choice
        for choice in product(*each)
        if sum(k.count * c * m for k, (c, m) in zip(classes, choice, strict=True)) == total
    ]
    if not every:
        with pytest.raises(ValueError, match=f"{total} tasks cannot be split"):
            accumulated(total, classes, most)
        return
    found = accumulated(total, classes, most)
    assert tuple((s.accumulation, s.micro_batch) for s in found) in every

    def ends(choice) -> float:
        return max(c * k.worker.seconds(m) for k, (c, m) in zip(classes, choice, strict=True))

    ours = ends([(s.accumulation, s.micro_batch) for s in found])
    assert ours == pytest.approx(min(ends(choice) for choice in every), rel=1e-12)


def test_equal_ends_take_the_fewest_micro_batches() -> None:
    for speed in (0.3, 3.0, 7.0):
        assert accumulated(240, [DeviceClass(1, Worker(speed))]) == [MicroBatching(240, 1)]


def test_memory_makes_a_slow_class_accumulate() -> None:
    fast, slow = Worker(2.0, most=8), Worker(1.0, most=2)
    assert accumulated(24, [DeviceClass(2, fast), DeviceClass(2, slow)]) == [MicroBatching(8, 1), MicroBatching(2, 2)]


@pytest.mark.parametrize("bad", [{"speed": 0.0}, {"speed": 1.0, "fixed_s": -1.0}, {"speed": 1.0, "most": -1}])
def test_workers_that_cannot_be(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        Worker(**bad)
    with pytest.raises(ValueError, match="not all 0"):
        proportional(3, [0.0, 0.0])
