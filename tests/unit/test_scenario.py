"""Scenarios: what they mean, that they are reproducible, and what is said about wrong ones."""

from __future__ import annotations

import statistics
from itertools import pairwise
from pathlib import Path

import pytest

from gmeta.elastic.scenario import Deterministic, Devices, Kill, Persistent, Scenario, Transient, parse_scenario

READY = sorted((Path(__file__).resolve().parents[2] / "examples" / "scenarios").glob("*.yaml"))


def parse(text: str) -> Scenario:
    return parse_scenario("workers: 4\nsteps: 100\n" + text, "s.yaml")


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_ready_scenarios(path: Path) -> None:
    scenario = parse_scenario(path.read_text(), str(path))
    assert (scenario.workers, scenario.steps) == (4, 1000)
    assert scenario.tasks_per_batch / 4 * scenario.slot_s == pytest.approx(0.1)
    factors = {scenario.slowdown(r, step=s, time_s=0.1 * s) for r in range(4) for s in range(0, 1000, 5)}
    expected = {"deterministic-2x": 2, "deterministic-4x": 4, "two-classes": 2, "kill": 1}.get(path.stem, 3)
    assert factors == {1.0, expected}


def test_slowness_has_its_time_and_its_machine() -> None:
    scenario = parse("""
devices: [{name: fast, count: 2, speed: 2.0}]
events:
  - {kind: deterministic, rank: 0, factor: 3}
  - {kind: persistent, rank: 0, factor: 2, from_step: 10, until: restart}
  - {kind: persistent, rank: 3, factor: 2, from_s: 5}
""")
    assert scenario.slowdown(0, step=9, time_s=99.0) == 1.5
    assert scenario.slowdown(0, step=10, time_s=0.0) == 3.0
    assert scenario.slowdown(0, step=10, time_s=0.0, incarnation=1) == 1.5
    assert [scenario.slowdown(3, step=0, time_s=t, incarnation=2) for t in (4.9, 5.0)] == [1.0, 2.0]
    assert scenario.slowdown(1, step=0, time_s=0.0) == 0.5
    assert scenario.device(1) == Devices("fast", 2, 2.0)
    assert scenario.device(2) is None


@pytest.mark.parametrize("unit", ["mean_steps", "mean_s"])
def test_bursts_are_random_seeded_and_as_often_as_said(unit: str) -> None:
    event = Transient(ranks=(0, 1), factor=3.0, share=0.2, **{unit: 50.0})
    scenario = Scenario(workers=3, steps=10, seed=4, events=(event,))

    def factors(of: Scenario, rank: int) -> list[float]:
        return [of.slowdown(rank, step=k, time_s=float(k)) for k in range(200_000)]

    mine = factors(scenario, 0)
    assert statistics.mean(f == 3.0 for f in mine) == pytest.approx(0.2, abs=0.02)
    begun = sum(a < b for a, b in pairwise(mine))
    assert sum(f == 3.0 for f in mine) / begun == pytest.approx(50, rel=0.15)
    assert factors(scenario, 1) != mine
    assert set(factors(scenario, 2)) == {1.0}
    again = Scenario(workers=3, steps=10, seed=4, events=(event,))
    assert [again.slowdown(0, step=k, time_s=float(k)) for k in (150_000, 10, 70_000)] == [
        mine[k] for k in (150_000, 10, 70_000)
    ], "whatever was asked for before"
    assert factors(Scenario(workers=3, steps=10, seed=5, events=(event,)), 0) != mine


def test_more_workers_repeat_the_slow_ones() -> None:
    scenario = parse("""
devices: [{name: a, count: 1}, {name: b, count: 2, speed: 2.0}]
events:
  - {kind: deterministic, rank: 1, factor: 2}
  - {kind: transient, ranks: [0, 3], factor: 2, share: 0.5, mean_s: 3}
  - {kind: kill, who: rank 3, at_step: 9}
  - {kind: cut, at_s: 1, for_s: 2}
""")
    more = scenario.scaled(8)
    assert [(d.name, d.count) for d in more.devices] == [("a", 2), ("b", 4)]
    assert more.tasks_per_batch == 128
    assert [e.rank for e in more.events if isinstance(e, Deterministic)] == [1, 5]
    assert [e.ranks for e in more.events if isinstance(e, Transient)] == [(0, 3, 4, 7)]
    assert len([e for e in more.events if isinstance(e, Kill)]) == 1
    fewer = scenario.scaled(2)
    assert [e.ranks for e in fewer.events if isinstance(e, Transient)] == [(0,)]
    assert not [e for e in fewer.events if isinstance(e, Kill)]
    assert scenario.scaled(4) is scenario


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("stepps: 3", "s.yaml: unknown key stepps: must be one of workers, steps"),
        ("slot_s: 0", "s.yaml: slot_s is 0: must be more than 0"),
        ("slot_s: fast", "s.yaml: slot_s is 'fast': must be float"),
        ("slot_s: 1e-3", "s.yaml: slot_s is 1e-3, which YAML takes for text: write 0.001"),
        ("noise: .nan", "s.yaml: noise is nan"),
        ("seed: true", "s.yaml: seed is True: must be int"),
        ("events: 3", "s.yaml: events is 3: must be a list"),
        ("events: [3]", "s.yaml, event 0 is 3: must hold `key: value` lines"),
        ("events: [{kind: slow}]", "event 0: kind is 'slow': must be one of deterministic, transient"),
        ("events: [{kind: deterministic, rank: 0}]", r"event 0 \(deterministic\): factor is missing"),
        ("events: [{kind: deterministic, rank: 4, factor: 2}]", "rank is 4: must be 0 to 3"),
        ("events: [{kind: deterministic, rank: 1, factor: 0}]", "factor is 0: must be more than 0"),
        ("events: [{kind: persistent, rank: 1, factor: 2, until: noon}]", "until is 'noon': must be restart or never"),
        ("events: [{kind: persistent, rank: 1, factor: 2, from_s: 1, from_step: 1}]", "must be from_s or from_step"),
        ("events: [{kind: transient, ranks: [0], factor: 2, share: 1.5, mean_s: 1}]", "share is 1.5"),
        ("events: [{kind: transient, ranks: [0], factor: 2, share: 0.5}]", "or mean_s, not both"),
        ("events: [{kind: transient, ranks: 0, factor: 2, share: 0.5, mean_s: 1}]", "ranks is 0: must be a list"),
        ("events: [{kind: kill, who: me, at_s: 1}]", "who is 'me': must be rank N, coordinator"),
        ("events: [{kind: kill, who: rank 1}]", "nothing is given: must be at_s or at_step"),
        ("devices: [{name: a, count: 9}]", "devices is 9: must not be of more than 4 workers"),
        ("events: [", "s.yaml is no YAML"),
    ],
)
def test_wrong_scenarios(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse(text)


def test_a_kill_has_its_time() -> None:
    assert Kill("rank 2 + coordinator", at_step=5).due(5, 0.0)
    assert not Kill("rank 2", at_s=5.0).due(9, 4.9)
    both = Kill("rank 2 + coordinator", at_step=5)
    assert (both.rank, both.coordinator) == (2, True)
    assert (Kill("coordinator", at_s=1.0).rank, Kill("coordinator", at_s=1.0).coordinator) == (None, True)
    assert Persistent(0, 2.0).until == "never"
