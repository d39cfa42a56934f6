"""Policies: what they ask for is possible, close to the best, steady under noise and quick at a burst."""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmeta.elastic.actions import AdjustAccumulation, AdjustBatch, DropLate, KillRestart, Setting, apply_actions
from gmeta.elastic.controller import Controller, Decided, Granted, Limits
from gmeta.elastic.monitor import Snapshot, StepStats, StepTime, WorkerView
from gmeta.elastic.policies import POLICIES, backup, dd, lb_bsp, load_policy, nd

nan = float("nan")


def window(slot_s: float, slots: float, steps: int = 5) -> StepStats:
    return StepStats(steps, slot_s * slots if slots else 0.0, 0.0, 0.0, slot_s if slots else nan)


def known(slot_s, slots=None, settled: int = 100, restarts: int = 0, long: bool = True, **about) -> Snapshot:
    """Ranks that take `slot_s` seconds a slot, and always did."""
    slots = slots or Setting.equal(16 * len(slot_s), len(slot_s)).tasks_per_rank
    views = []
    for rank, (cost, count) in enumerate(zip(slot_s, slots, strict=True)):
        mine = {key: values[rank] for key, values in about.items()}
        whole = window(cost, count, 100) if long else None
        views.append(WorkerView(rank, short=window(cost, count), long=whole, **mine))
    setting = Setting(3, 50, tuple(slots), (1,) * len(slots))
    return Snapshot(10.0, 200, setting, settled, tuple(views), restarts)


numbers = st.sampled_from([0.0, nan, float("inf"), -1.0, 1e-300, 1e300, 5e-324]) | st.floats(1e-4, 10.0)
windows = st.none() | st.builds(StepStats, st.integers(1, 100), numbers, numbers, numbers, numbers)


@st.composite
def snapshots(draw) -> Snapshot:
    size = draw(st.integers(1, 6))
    slots = draw(st.lists(st.integers(0, 40), min_size=size, max_size=size).filter(any))  # a batch has tasks
    parts = draw(st.lists(st.integers(1, 4), min_size=size, max_size=size))
    views = [
        WorkerView(
            rank,
            role=draw(st.sampled_from(["worker", "server"])),
            device=draw(st.sampled_from(["", "a", "b"])),
            max_slots=draw(st.none() | st.integers(0, 20)),
            short=draw(windows),
            long=draw(windows),
        )
        for rank in range(size)
    ]
    setting = Setting(1, 5, tuple(slots), tuple(parts), draw(st.none() | st.floats(1e-3, 10.0)))
    return Snapshot(1.0, 9, setting, draw(st.sampled_from([0, 4, 60, 200])), tuple(views), draw(st.integers(0, 2)))


@settings(max_examples=200, deadline=None)
@given(snapshot=snapshots())
def test_every_action_is_possible_whatever_is_known(snapshot: Snapshot) -> None:
    """Of every policy: to draw a snapshot takes longer than to act on it."""
    for name, policy in sorted(POLICIES.items()):
        after = apply_actions(snapshot.setting, policy(snapshot), 9)
        assert sum(after.tasks_per_rank) == snapshot.batch, name
        assert after.restart is None or snapshot.restarts_left, name


@settings(max_examples=100, deadline=None)
@given(costs=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=3), total=st.integers(3, 24))
def test_nd_is_within_its_threshold_of_the_best(costs: list[float], total: int) -> None:
    snapshot = known(costs, Setting.equal(total, len(costs)).tasks_per_rank)
    actions = [action for action in nd(snapshot) if isinstance(action, AdjustBatch)]
    slots = actions[0].tasks_per_rank if actions else snapshot.setting.tasks_per_rank

    def ends(each) -> float:
        return max(n * cost for n, cost in zip(each, costs, strict=True))

    best = min(ends(each) for each in product(range(total + 1), repeat=len(costs)) if sum(each) == total)
    assert ends(slots) <= best / (1 - 0.05) * (1 + 1e-9)
    assert not actions or ends(slots) == pytest.approx(best)


def test_nd_waits_for_its_window_unless_the_change_is_large() -> None:
    mild, large = [0.01, 0.01, 0.01, 0.0115], [0.01, 0.01, 0.01, 0.03]
    assert nd(known(mild, settled=2)) == []
    assert nd(known(mild)) == [AdjustBatch((17, 17, 16, 14))]
    assert nd(known(large, settled=0)) == [AdjustBatch((20, 19, 19, 6))]
    assert nd(known([0.01, 0.01, 0.01, 0.0102])) == [], "too little to win"


def test_nd_believes_the_last_steps_only_when_they_differ_much() -> None:
    base = known([0.01] * 4)

    def with_last(short: float) -> Snapshot:
        views = [*base.workers[:3], WorkerView(3, short=window(short, 16), long=window(0.01, 16, 100))]
        return Snapshot(1.0, 9, base.setting, 100, tuple(views), 0)

    assert nd(with_last(0.0115)) == []
    (action,) = nd(with_last(0.03))
    assert action.tasks_per_rank[3] < 8


def test_nd_does_not_chase_a_crowd() -> None:
    base = known([0.01] * 12 + [0.02] * 2, (18,) * 12 + (9, 9))

    def with_bursts(count: int) -> Snapshot:
        bursting = [WorkerView(r, short=window(0.03, 18), long=window(0.01, 18, 100)) for r in range(count)]
        return Snapshot(1.0, 9, base.setting, 100, (*bursting, *base.workers[count:]), 0)

    (action,) = nd(with_bursts(4))
    assert max(action.tasks_per_rank[:4]) < 10
    assert nd(with_bursts(5)) == []


def test_nd_restarts_who_is_slow_for_long_among_its_peers() -> None:
    costs, slots = [0.01, 0.01, 0.01, 0.03], (19, 19, 19, 7)
    per_step = 0.21 * (1 - (3 + 1 / 3) / 4)  # seconds that a rank like its peers would save
    enough = int(30 / per_step) + 1
    slow = known(costs, slots, settled=enough, restarts=1)
    assert nd(slow) == [KillRestart(3, f"3.0 times slower than its peers for {enough} steps")]

    def restarts(*args, **more) -> bool:
        return any(isinstance(action, KillRestart) for action in nd(known(*args, **more)))

    assert not restarts(costs, slots, settled=enough - 2, restarts=1), "it has not cost as much as a restart"
    assert not restarts(costs, slots, settled=enough, restarts=0), "no budget"
    assert not restarts([100 * cost for cost in costs], slots, settled=90, restarts=1), "may be a burst"
    assert not restarts(costs, slots, settled=enough, restarts=1, long=False)
    assert not restarts([0.01] * 3 + [0.014], (17, 17, 17, 13), settled=10**6, restarts=1), "not slow enough"
    two_classes = {"device": ["a", "a", "b", "b"], "settled": 10**6, "restarts": 1}
    assert not restarts([0.01, 0.01, 0.03, 0.03], (24, 24, 8, 8), **two_classes), "a slow class"
    assert restarts([0.01, 0.01, 0.03, 0.06], (24, 24, 8, 8), **two_classes)


def test_nd_restarts_who_is_too_slow_for_any_slot() -> None:
    base = known([1.0, 1.0, 1.0, 100.0], (22, 21, 21, 0), settled=60, restarts=1)
    before = WorkerView(3, short=window(100.0, 0), long=StepStats(100, 0.0, 0.0, 0.0, 100.0))
    (action,) = nd(Snapshot(1.0, 9, base.setting, 60, (*base.workers[:3], before), 1))
    assert action.rank == 3


def test_nd_tries_a_rank_again_that_had_no_slots_for_long() -> None:
    slots = (22, 21, 21, 0)
    assert nd(known([0.01] * 4, slots, settled=0)) == []
    (action,) = nd(known([0.01] * 4, slots))
    assert action.tasks_per_rank[3] == 1
    slow = known([0.01, 0.01, 0.01, 1.0], (21, 21, 21, 1))
    (action,) = nd(slow)
    assert action.tasks_per_rank[3] == 0


def test_nd_keeps_to_memory() -> None:
    snapshot = known([0.01, 0.01, 0.01, 0.05], max_slots=[18, 30, 18, 30])
    (action,) = nd(snapshot)
    assert action.tasks_per_rank[0] == action.tasks_per_rank[2] == 18
    assert nd(known([0.01, 0.05], max_slots=[16, 16])) == [], "there is no room"


def test_dd_gives_classes_whole_micro_batches_within_memory() -> None:
    device = ["fast", "fast", "slow", "slow"]
    found = dd(known([0.01, 0.01, 0.02, 0.02], (12, 12, 12, 12), device=device, max_slots=[16, 16, 4, 4]))
    assert found == [AdjustBatch((16, 16, 8, 8)), AdjustAccumulation((1, 1, 2, 2))]
    decided = known([0.01, 0.01, 0.02, 0.02], (16, 16, 8, 8), device=device)
    assert dd(decided) == []
    assert dd(known([0.01, 0.01, 0.02, 0.02], (12, 12, 12, 12), device=device, settled=2)) == []
    assert dd(known([0.01, 0.0105, 0.02, 0.021], (16, 16, 8, 8), device=device)) == []


def test_dd_cuts_unevenly_where_equal_parts_do_not_fit() -> None:
    found = dd(known([0.01] * 3 + [0.03] * 2, (4, 4, 4, 3, 2), device=["a"] * 3 + ["b"] * 2, max_slots=[3] * 5))
    slots, parts = found
    assert sum(slots.tasks_per_rank) == 17
    assert all(0 <= n <= 3 * c for n, c in zip(slots.tasks_per_rank, parts.micro_batches, strict=True))
    assert max(slots.tasks_per_rank[:3]) - min(slots.tasks_per_rank[:3]) <= 1


def test_lb_bsp_goes_step_by_step() -> None:
    (action,) = lb_bsp(known([0.01, 0.03], (16, 16)))
    assert action.tasks_per_rank == (20, 12)
    assert lb_bsp(known([0.001, 1.0], (31, 1))) == [], "a rank without slots would never be measured again"
    (action,) = lb_bsp(known([0.001, 0.001, 0.001, 0.001, 0.04], (3, 4, 4, 1, 1)))
    assert min(action.tasks_per_rank) == 1


def test_backup_stops_late_ranks_between_parts() -> None:
    assert backup(known([0.01, 0.01, 0.01, 0.04])) == [AdjustAccumulation((4,) * 4), DropLate(pytest.approx(0.24))]


def run(policy, speeds, steps: int, noise: float = 0.0, fixed_s: float = 0.0, workers: int = 4):
    """A bare loop around a Controller: [(step decided at, slots)], and the seconds of each step."""
    draws = random.Random(5)
    controller = Controller.begin(policy, world_size=workers, batch=16 * workers, report_s=0.1, limits=Limits(0))
    controller.apply(controller.grant())
    now, decisions, seconds = 0.0, [], []
    for step in range(steps):
        setting = [s for s in controller.settings if s.step <= step][-1]
        times = [
            (fixed_s + n * speeds(rank, step) * 0.00625) * (1 + noise * max(-1.0, min(draws.gauss(0, 1), 3.0)))
            for rank, n in enumerate(setting.tasks_per_rank)
        ]
        now += max(times)
        seconds.append(max(times))
        for rank, (took, n) in enumerate(zip(times, setting.tasks_per_rank, strict=True)):
            controller.report(rank, now, [StepTime(step, took, 0.0, max(times) - took, n)], {})
        granted = controller.grant()
        if isinstance(granted, Granted):
            controller.apply(granted)
        _, decided = controller.decide(now)
        if isinstance(decided, Decided):
            controller.apply(decided)
            decisions.append((step, decided.setting.tasks_per_rank))
    return decisions, seconds


@pytest.mark.parametrize("workers", [4, 16, pytest.param(64, marks=pytest.mark.slow)])
def test_nd_does_not_flap_under_noise(workers: int) -> None:
    decisions, _ = run(nd, lambda rank, step: 1.0, 1000, noise=0.05, workers=workers)
    assert len([step for step, _ in decisions if step > 110]) <= 2
    assert len(decisions) <= 12, "before the long windows are full"


def test_nd_follows_a_burst_there_and_back() -> None:
    decisions, seconds = run(nd, lambda rank, step: 3.0 if rank == 1 and 300 <= step < 350 else 1.0, 500, noise=0.02)
    steps = [step for step, _ in decisions if step >= 300]
    assert 300 <= steps[0] <= 303
    assert 350 <= steps[-1] <= 360
    assert min(decisions[-1][1]) >= 15
    assert seconds[345] < 0.14 < 0.28 < seconds[301]
    assert len(steps) <= 6


def test_nd_balances_in_spite_of_fixed_costs() -> None:
    _, seconds = run(nd, lambda rank, step: 2.0 if rank == 0 else 1.0, 300, fixed_s=0.03)
    rate = 1 / 0.00625
    best = 0.03 + 64 / (3 * rate + rate / 2)
    assert seconds[0] > best * 1.4
    assert max(seconds[30:]) < best * 1.08, "a whole slot of the slow rank is 8 %"


def test_policies_are_found_by_name_or_by_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_policy("nd") is nd
    with pytest.raises(ValueError, match="policy is 'ndd': must be one of static, nd, dd, lb_bsp, backup"):
        load_policy("ndd")
    (tmp_path / "mine_here.py").write_text("def act(snapshot):\n    return []\n\nnumber = 3\n")
    (tmp_path / "broken_here.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_policy("mine_here:act")(None) == []
    for text, complaint in {
        "no_such_module:act": "No module named",
        "mine_here:other": "has no attribute 'other'",
        "broken_here:act": "ZeroDivisionError",
        "mine_here:number": "is a int: must be a function",
    }.items():
        with pytest.raises(ValueError, match=complaint):
            load_policy(text)


def test_no_more_micro_batches_than_slots() -> None:
    setting = Setting.equal(8, 2)
    with pytest.raises(ValueError, match="a batch has 8 tasks, and no more parts"):
        apply_actions(setting, [AdjustAccumulation((9, 1))], 5)
    assert apply_actions(setting, [AdjustAccumulation((8, 1))], 5).micro_batches == (8, 1)
